"""Fine-tuning on several ranks is that of one: answers to the last bit, losses to rounding."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.ranks import run_ranks

WORKER = REPOSITORY / "tests" / "workers" / "finetuning.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    """What one process at stage 0 gives."""
    return result(tmp_path_factory.mktemp("alone") / "out.npz", 1, 0)


def result(path: Path, num_ranks: int, stage: int) -> dict[str, np.ndarray]:
    run_ranks(WORKER, num_ranks, str(path), str(stage))
    with np.load(path) as found:
        return dict(found)


@pytest.mark.parametrize(("num_ranks", "stage"), [(2, 0), (3, 1), (2, 3)])
def test_ranks_agree_with_one(
    alone: dict[str, np.ndarray], tmp_path: Path, num_ranks: int, stage: int
) -> None:
    found = result(tmp_path / "out.npz", num_ranks, stage)
    np.testing.assert_array_equal(found["before"], alone["before"])
    assert len(found["losses"]) == 26
    np.testing.assert_allclose(found["losses"], alone["losses"], atol=2e-6, rtol=0)
    np.testing.assert_allclose(found["after"], alone["after"], atol=1e-4, rtol=0)
    assert np.abs(alone["after"] - alone["before"]).max() > 0.01
