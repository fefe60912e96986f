"""Layer normalisation's implementations against each other."""

import pytest
import torch
from torch import nn

from zerobert.kernels import layer_norm


def results_of(name: str, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(48, eps=1e-12)
    with torch.no_grad():
        norm.weight.add_(torch.randn(48))
        norm.bias.add_(torch.randn(48))
    x, shares = torch.randn(2, 3, 5, 48)
    norm, x = norm.to(device), x.to(device).requires_grad_()
    out = layer_norm.IMPLEMENTATIONS[name](x, norm)
    grads = torch.autograd.grad((out * shares.to(device)).sum(), [x, norm.weight, norm.bias])
    return [part.cpu() for part in (out, *grads)]


def test_torch_agrees_in_value_and_gradient() -> None:
    torch.testing.assert_close(results_of("torch", "cpu"), results_of("plain", "cpu"))


@pytest.mark.gpu
def test_apex_agrees_on_a_gpu() -> None:
    if not torch.cuda.is_available() or layer_norm.APEX_KERNEL is None:
        pytest.skip("no CUDA device with NVIDIA's apex")
    torch.testing.assert_close(
        results_of("apex", "cuda"), results_of("plain", "cpu"), atol=1e-4, rtol=1e-4
    )


def test_16_bits_are_summed_in_32() -> None:
    norm = nn.LayerNorm(768).bfloat16()
    x = (torch.randn(4, 768) + 100).bfloat16()
    wanted = layer_norm.plain(x.float(), nn.LayerNorm(768))
    got = layer_norm.plain(x, norm)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, atol=0.02, rtol=0.02)
