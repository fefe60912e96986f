"""Finding the largest micro-batch that memory allows."""

from pathlib import Path

import pytest
import torch

from pretrain import memory
from zerobert.config import BertConfig
from zerobert.errors import ConfigError
from zerobert.kernels import Kernels

CPU = torch.device("cpu")
CONFIG = BertConfig.from_size({"size": "tiny", "vocab_size": 1000}, "test")


def found(
    monkeypatch: pytest.MonkeyPatch, free: float, *, kernels: Kernels | None = None, share: int = 48
) -> int:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    return memory.largest_micro_batch(
        memory.builder(CONFIG, kernels or Kernels(), nsp=True, dtype=torch.float32),
        dtype=torch.float32,
        seq_length=128,
        max_predictions=20,
        rank_samples=share,
        state_bytes=1e6,
        device=CPU,
    )


def test_it_grows_with_memory_and_divides_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [found(monkeypatch, free) for free in (30e6, 60e6, 120e6, 1e12)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 48
    assert all(48 % size == 0 for size in sizes)


def test_what_it_takes_is_what_is_saved_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the memory beside what is fixed holds twice the rows."""
    small, large = (found(monkeypatch, free, share=64) for free in (41e6, 81e6))
    assert large == 2 * small


def test_checkpointing_fits_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = found(monkeypatch, 40e6)
    assert found(monkeypatch, 40e6, kernels=Kernels(activation_checkpointing=True)) > plain


def test_what_never_fits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--auto_micro_batch: a sequence takes .* try"):
        found(monkeypatch, 2e6)


def test_this_machine_has_memory() -> None:
    assert 1e8 < memory.free_bytes(CPU) < 1e14


@pytest.mark.parametrize(("limit", "free"), [("4000000", 2_500_000), ("max", None)])
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, limit: str, free: int | None
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    found = memory.free_bytes(CPU, tmp_path)
    assert found == free if free is not None else found > 1e8


@pytest.mark.parametrize("max_predictions", [1, 8, 11])
def test_a_full_batch_has_room_for_as_many_predictions_as_shards(max_predictions: int) -> None:
    batch = memory.full_batch(2, 8, max_predictions, 30)
    assert batch["masked_lm_ids"].shape == batch["masked_lm_positions"].shape
    assert batch["masked_lm_positions"].shape == (2, max_predictions)
    assert batch["masked_lm_positions"].min() >= 1
    assert batch["masked_lm_positions"].max() < 8


def test_a_gpu_is_tried_until_it_has_too_little() -> None:
    ran: list[int] = []

    def run(size: int) -> None:
        ran.append(size)
        if size > 12:
            raise torch.OutOfMemoryError

    assert memory.largest_that_runs([1, 2, 4, 8, 12, 16, 48], run, 10.0, CPU) == 12
    assert ran == [1, 2, 4, 8, 12, 16]
    assert memory.largest_that_runs([16, 48], run, 10.0, CPU) is None
    assert memory.largest_that_runs([1, 2], run, 10.0, CPU) == 2
