"""What the benchmarks compare is equal, and what they feed is what shards hold."""

import argparse

import pytest
import torch

from benchmarks import optimizer_step, train_step
from zerobert.config import SIZES, BertConfig
from zerobert.shards import check_values

CONFIG = BertConfig(**{**SIZES["tiny"], "vocab_size": 2003})


def test_all_models_compute_the_same_before_they_are_timed() -> None:
    arguments = argparse.Namespace(dtype="fp32", device="cpu", seq_length=128, compile=False)
    train_step.check_equal(CONFIG, arguments)


def test_a_model_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(dtype="fp32", device="cpu", seq_length=128, compile=False)
    monkeypatch.setattr(train_step.peers.NvidiaLayer, "forward", lambda self, x, bias: x)
    with pytest.raises(ValueError, match="NVIDIA: loss"):
        train_step.check_equal(CONFIG, arguments)


def test_lambs_agree_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer_step.check_equal(CONFIG, torch.device("cpu"), [1000])
    monkeypatch.setattr(optimizer_step.lamb, "_square", lambda block: 1.0)
    with pytest.raises(ValueError, match="blocked: weights of shape"):
        optimizer_step.check_equal(CONFIG, torch.device("cpu"), [])


@pytest.mark.parametrize("seq_length", [128, 512])
def test_batches_are_like_those_of_shards(seq_length: int) -> None:
    batch = train_step.make_batch(CONFIG, 200, seq_length, 0.8, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    check_values(arrays, vocab_size=CONFIG.vocab_size, where="batch")
    assert abs(arrays["input_mask"].mean() - 0.8) < 0.03
    positions = arrays["masked_lm_positions"]
    assert ((positions > 0).sum(1) >= 1).all()
    assert positions.shape == (200, 20 if seq_length == 128 else 80)
