"""What is counted of memory is what is alive."""

import json
from pathlib import Path

import pytest
import torch

from pretrain import footprint, memory
from tests.conftest import REPOSITORY
from tests.ranks import run_ranks
from zerobert.config import BertConfig
from zerobert.kernels import Kernels

WORKER = REPOSITORY / "tests" / "workers" / "footprint.py"
BASE = BertConfig.from_size({"size": "base", "num_hidden_layers": 4}, "test")


def states(precision: str, stage: str) -> float:
    return footprint.state_bytes(1, precision=precision, stage=int(stage), ranks=2)


@pytest.mark.parametrize(
    "cases",
    [
        ["bf16 1", "fp16 1"],
        pytest.param(
            [f"{p} {s}" for p in ("fp32", "bf16", "fp16") for s in range(4)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "all"],
)
def test_states_are_what_is_alive_in_a_backward_pass(cases: list[str], tmp_path: Path) -> None:
    run_ranks(WORKER, 2, str(tmp_path / "found.json"), *cases)
    found = json.loads((tmp_path / "found.json").read_text())
    counted = {case: states(*case.split()) for case in cases}
    assert found == pytest.approx(counted, abs=0.4)


def activations(*, width: int, is_checkpointed: bool = False) -> float:
    return footprint.activation_bytes(
        BASE, num_tokens=128, max_predictions=20, width=width, is_checkpointed=is_checkpointed
    )


def test_activations_are_about_what_the_forward_pass_keeps() -> None:
    """Of the twin that runs everywhere: attention in parts keeps scores that fused does not."""
    build = memory.builder(BASE, Kernels(), nsp=True, dtype=torch.float32)
    kept = [
        memory._step_bytes(
            build().train(), rows, dtype=torch.float32, seq_length=128, max_predictions=20
        )
        for rows in (2, 4)
    ]
    assert activations(width=4) == pytest.approx((kept[1] - kept[0]) / 2, rel=0.3)


def test_fp32_keeps_about_twice_and_checkpointing_a_layer() -> None:
    assert 1.8 < activations(width=4) / activations(width=2) < 2
    full, less = (activations(width=2, is_checkpointed=kept) for kept in (False, True))
    logits = 6 * 20 * BASE.vocab_size
    assert (full - logits) / 34 == 4 * 128 * 768
    assert less - logits == (34 + 4 * 2) * 128 * 768
