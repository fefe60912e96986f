"""Kernels are held against their plain twins on the device before they are used."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from zerobert.kernels import attention, layer_norm, trial
from zerobert.kernels.attention import Layout

CPU, FP32 = torch.device("cpu"), torch.float32
Attention = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    trial.attention_failure.cache_clear()
    trial.layer_norm_failure.cache_clear()
    yield
    trial.attention_failure.cache_clear()
    trial.layer_norm_failure.cache_clear()


def failure_of(monkeypatch: pytest.MonkeyPatch, attend: Attention) -> str | None:
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "new", attend)
    return trial.attention_failure("new", CPU, FP32, 16, 0.1)


def test_what_agrees_may_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure_of(monkeypatch, attention.sdpa) is None
    assert trial.layer_norm_failure("torch", CPU, torch.bfloat16, 96) is None


def test_what_differs_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
        return attention.plain(q * 2, k, v, layout, dropout_p)

    def leaking(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
        return attention.plain(q, k, v.detach(), layout, dropout_p) + 0 * v

    for wrong in (unscaled, leaking):
        trial.attention_failure.cache_clear()
        assert "differs from the plain one" in (failure_of(monkeypatch, wrong) or "")


def test_what_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    assert failure_of(monkeypatch, broken) == (
        "fails on this device (RuntimeError: FlashAttention only supports Ampere GPUs or newer.)"
    )


def test_what_is_no_number_with_dropout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(
        x: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        return layer_norm.plain(x, norm, residual) / (0 if dropout_p else 1)

    monkeypatch.setitem(layer_norm.IMPLEMENTATIONS, "new", infinite)
    assert (
        trial.layer_norm_failure("new", CPU, FP32, 96) == "gives what is no number on this device"
    )


def test_want_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(layer_norm.IMPLEMENTATIONS, "new", full)
    with pytest.raises(torch.OutOfMemoryError):
        trial.layer_norm_failure("new", CPU, FP32, 96)
    monkeypatch.setitem(layer_norm.IMPLEMENTATIONS, "new", layer_norm.plain)
    assert trial.layer_norm_failure("new", CPU, FP32, 96) is None


def test_another_mask_on_the_way_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(
        x: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        there, back = (layer_norm.plain(x, norm, residual, dropout_p) for _ in range(2))
        return back + (there - back).detach()

    monkeypatch.setitem(layer_norm.IMPLEMENTATIONS, "new", forgetful)
    failure = trial.layer_norm_failure("new", CPU, FP32, 96)
    assert failure == "drops other values on the way back"


def test_a_trial_draws_none_of_the_runs_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with torch.no_grad():
        assert failure_of(monkeypatch, attention.sdpa) is None
    torch.testing.assert_close(torch.rand(4), wanted, rtol=0, atol=0)
