"""Dropout by words of random bits: its share, its scale, its gradient, its seed."""

import pytest
import torch

from zerobert.kernels import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_of_dropped_values_and_the_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = dropout.words(torch.ones(1000, 1001, dtype=dtype), p)
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / out.numel()) ** 0.5 + 2**-17
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), atol=2e-5, rtol=0.004)


def test_values_are_dropped_independently_of_their_neighbours() -> None:
    torch.manual_seed(0)
    out = dropout.words(torch.ones(1 << 20), 0.5) > 0
    for distance in (1, 2, 3, 4, 8):
        both = (out[distance:] & out[:-distance]).double().mean().item()
        assert abs(both - 0.25) < 4 * (0.25 * 0.75 / len(out)) ** 0.5


def test_the_gradient_is_autograds() -> None:
    x = torch.randn(7, 13, requires_grad=True)
    torch.manual_seed(3)
    out = dropout.words(x, 0.3)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    scale = (out / x).detach()
    torch.testing.assert_close(grad, weights * scale)


def test_torchs_seed_decides() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout.drop(torch.ones(100), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    x = torch.randn(4)
    state = torch.get_rng_state()
    assert dropout.drop(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transposed_tensor_is_dropped_in_its_own_shape() -> None:
    x = torch.ones(5, 8).mT
    assert dropout.words(x, 0.5).shape == (8, 5)
    assert dropout.words(torch.ones(0, 3), 0.5).shape == (0, 3)
