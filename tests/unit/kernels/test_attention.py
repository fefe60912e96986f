"""Attention's implementations against each other, on rows and on packed tokens."""

import pytest
import torch
from torch import Tensor

from zerobert.kernels import attention
from zerobert.kernels.attention import Layout
from zerobert.packing import pack

LENGTHS = [16, 9, 1, 12]


def make_inputs() -> tuple[Tensor, Tensor]:
    """Queries, keys and values of four rows [B, S, 3, N, D], and where tokens are."""
    torch.manual_seed(0)
    mask = (torch.arange(16) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randn(4, 16, 3, 2, 8, requires_grad=True), mask


def test_plain_is_the_formula() -> None:
    qkv, mask = make_inputs()
    got = attention.plain(*qkv.unbind(-3), Layout(mask.bool(), None), 0.0)
    for row, length in enumerate(LENGTHS):
        for head in range(2):
            q, k, v = qkv[row, :length, :, head].unbind(1)
            weights = torch.softmax(q @ k.T / 8**0.5, dim=-1)
            torch.testing.assert_close(got[row, :length, head], weights @ v)


@pytest.mark.parametrize("name", ["plain", "sdpa"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_all_agree_in_value_and_gradient(name: str, is_packed: bool) -> None:
    qkv, mask = make_inputs()
    weights = torch.randn(4, 16, 2, 8) * mask[..., None, None]
    wanted = attention.plain(*qkv.unbind(-3), Layout(mask.bool(), None), 0.0)
    (wanted_grad,) = torch.autograd.grad((wanted * weights).sum(), qkv)
    packing = pack(mask) if is_packed else None
    places = slice(None) if packing is None else packing.places_T
    tokens = qkv if packing is None else qkv.flatten(0, 1)[places]
    got = attention.IMPLEMENTATIONS[name](*tokens.unbind(-3), Layout(mask.bool(), packing), 0.0)
    shares = weights if packing is None else weights.flatten(0, 1)[places]
    (got_grad,) = torch.autograd.grad((got * shares).sum(), qkv)
    torch.testing.assert_close(
        got * shares,
        (wanted * weights) if packing is None else (wanted * weights).flatten(0, 1)[places],
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(got_grad, wanted_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_dropout_keeps_the_mean(name: str) -> None:
    torch.manual_seed(0)
    qkv = torch.zeros(4, 64, 3, 4, 8)  # equal scores: every weight is 1/64
    qkv[:, :, 2] = 1
    layout = Layout(torch.ones(4, 64, dtype=torch.bool), None)
    out = attention.IMPLEMENTATIONS[name](*qkv.unbind(-3), layout, 0.1)
    # 1024 means over 64 Bernoulli draws: sigma = sqrt(.1/.9/64)/sqrt(1024)
    assert abs(out[..., 0].mean().item() - 1) < 4 * (0.1 / 0.9 / 64 / 1024) ** 0.5
    assert out.std() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_fused_packed_attention_agrees_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernel = attention.FLASH_KERNEL if name == "flash" else attention.VARLEN_KERNEL
    if kernel is None:
        pytest.skip(f"the package of {name} is not installed")
    torch.manual_seed(0)
    lengths = torch.randint(1, 129, (64, 1))  # more than 32 rows: padding longer than one
    mask = (torch.arange(128) < lengths).long()
    qkv = torch.randn(64, 128, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    packing = attention.Packing(*(part.cuda() for part in pack(mask)))
    tokens = qkv.flatten(0, 1)[packing.places_T].requires_grad_()
    layout = Layout(mask.bool().cuda(), packing)
    num_tokens = int(mask.sum())
    fast = attention.IMPLEMENTATIONS[name]
    dropped = fast(*tokens.unbind(-3), layout, 0.1)
    assert torch.autograd.grad(dropped.float().square().sum(), tokens)[0].isfinite().all()
    results = []
    for attend, dtype in ((attention.plain, torch.float32), (fast, torch.bfloat16)):
        out = attend(*tokens.to(dtype).unbind(-3), layout, 0.0)[:num_tokens]
        results.append((out, torch.autograd.grad(out.float().square().sum(), tokens)[0]))
    for expected, found in zip(*results, strict=True):  # bf16 keeps 8 bits
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
