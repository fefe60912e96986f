"""What several processes hold against each other before the first step."""

from pathlib import Path

from pretrain import preflight
from tests.ranks import run_ranks

WORKER = Path(__file__).resolve().parents[2] / "workers" / "preflight.py"


def test_one_process_is_alike_itself(tmp_path: Path) -> None:
    assert preflight.check(tmp_path, {}, {}) is None
    assert not list(tmp_path.iterdir())


def test_each_difference_is_named_with_its_rank(tmp_path: Path) -> None:
    run_ranks(WORKER, 3, str(tmp_path))
