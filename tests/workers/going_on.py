"""Save training states of small models, or go on from those that other processes saved.

argv: `save`, `go-on` or `collapse`, a JSON file with cases as tests/workers/exactness.py takes
them, and the folder of the states. Each rank checks what it finds; going on from a state that was
saved with the same stage on as many ranks must change no bit. A case of `collapse` has a loss scale
that overflows and may be halved once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from tests.workers.exactness import (
    ACCUMULATION,
    Case,
    global_batches,
    loss_of,
    parts,
    start,
    whole,
    whole_weights,
)
from zerobert import distributed, training_state
from zerobert.engine import Engine, init_distributed, leave_distributed
from zerobert.errors import TrainingDivergedError
from zerobert.training_state import MOMENTS, WEIGHTS, StateReader

STEPS_BEFORE, STEPS_AFTER = 3, 2
KINDS = (WEIGHTS, *MOMENTS)


def train(engine: Engine, case: Case, first: int, last: int) -> None:
    rank, ranks = distributed.rank(), distributed.world_size()
    for batch in list(global_batches(last))[first:]:
        for micro in parts(batch, ACCUMULATION * ranks)[rank::ranks]:
            engine.backward(loss_of(engine.forward, micro, engine.device))
            engine.step(case["optimizer"]["params"]["lr"])


def save(case: Case, folder: Path) -> None:
    """The state after some steps, in the folder; beside it what the run then becomes."""
    engine, _ = start(case)
    train(engine, case, 0, STEPS_BEFORE)
    snapshot = engine.snapshot()
    before = {kind: whole(engine, kind) for kind in KINDS}
    # What is saved is a copy: training goes on before it is written.
    train(engine, case, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    if distributed.is_main():
        folder.mkdir()
    distributed.barrier()
    training_state.write_pieces(folder, distributed.rank(), snapshot.pieces)
    distributed.barrier()
    after = whole_weights(engine)
    if distributed.is_main():
        training_state.write_index(folder, snapshot)
        facts = {"before": before, "after": after, "counters": dict(engine.snapshot().counters)}
        torch.save(facts, folder.with_suffix(".pt"))
    engine.close()


def go_on(case: Case, folder: Path, *, is_same: bool) -> None:
    """From a state that was saved, perhaps under another stage on other ranks."""
    facts: dict[str, Any] = torch.load(folder.with_suffix(".pt"), weights_only=True)
    engine, _ = start(case)
    begin_with_moments(engine, folder, facts["before"])
    train(engine, case, 0, 1)  # to be undone, as when a run goes back to an earlier state
    engine.restore(StateReader(folder))
    for kind in KINDS:
        for name, tensor in whole(engine, kind).items():
            wanted = facts["before"][kind][name]
            assert torch.equal(tensor, wanted), (case["name"], kind, name)
    train(engine, case, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    counters = engine.snapshot().counters
    assert counters["steps"] == facts["counters"]["steps"]
    assert counters["optimizer_steps"] == facts["counters"]["optimizer_steps"]
    assert counters["loss_scale"].get("cur_scale") == facts["counters"]["loss_scale"].get(
        "cur_scale"
    )
    if is_same:
        assert counters == facts["counters"], case["name"]
    check_alike(whole_weights(engine), facts["after"], case, is_same=is_same)
    engine.close()


def begin_with_moments(engine: Engine, folder: Path, wanted: dict[str, dict[str, Tensor]]) -> None:
    """As a second phase does, with weights and a count of steps of its own."""
    weights = whole(engine, WEIGHTS)
    engine.restore_moments(StateReader(folder))
    assert all(torch.equal(x, weights[name]) for name, x in whole(engine, WEIGHTS).items())
    for kind in MOMENTS:
        assert all(torch.equal(x, wanted[kind][name]) for name, x in whole(engine, kind).items())
    assert engine.snapshot().counters["optimizer_steps"] == 0


def collapse(case: Case) -> None:
    """The first overflow lowers the loss scale, the second ends the training, on every rank."""
    engine, _ = start(case)
    train(engine, case, 0, 1)
    assert engine.skipped_steps == 1
    with pytest.raises(TrainingDivergedError, match=r"at 1\.04858e\+06 too, the least loss scale"):
        train(engine, case, 1, 2)
    engine.close()


def check_alike(
    got: dict[str, Tensor], wanted: dict[str, Tensor], case: Case, *, is_same: bool
) -> None:
    # The update is at most about the rate: what rounding can turn is its direction, where a
    # gradient is zero but for rounding, as that of the keys' bias is.
    tolerance = 2e-6 if case["name"].startswith("fp32") else 2e-3
    for name, weight in got.items():
        if is_same:
            assert torch.equal(weight, wanted[name]), (case["name"], name)
        elif not name.endswith("key.bias"):
            error = float((weight - wanted[name]).abs().mean())
            assert error <= tolerance, (case["name"], name, error)


def main() -> None:
    what, cases, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    init_distributed()
    # What computes fp16 slowly computes it rightly.
    get_accelerator().is_fp16_supported = lambda: True
    for case in cases:
        print(case["name"], case.get("state"), file=sys.stderr, flush=True)
        if what == "collapse":
            collapse(case)
        elif what == "save":
            save(case, folder / case["state"])
        else:
            go_on(case, folder / case["state"], is_same=case["is_same"])
    leave_distributed()


if __name__ == "__main__":
    main()
