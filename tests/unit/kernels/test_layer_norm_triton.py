"""The fused Triton kernels against their plain twin: on a GPU, or in Triton's interpreter.

Triton decides on its interpreter when it is imported: `test_layer_norm.py` runs this file in a
process of its own with `TRITON_INTERPRET=1`, and then it stays on the CPU.
"""

import dataclasses
import os

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerobert.config import BertConfig
from zerobert.kernels import Kernels, layer_norm
from zerobert.model import BertForPreTraining

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
if not IS_INTERPRETED:
    pytestmark = pytest.mark.gpu
if not layer_norm.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no CUDA device; the interpreter's turn is elsewhere", allow_module_level=True)

CONFIG = BertConfig(
    vocab_size=101,
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=16,
)


def make_inputs(
    hidden: int, *, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 3)
) -> tuple[nn.LayerNorm, Tensor, Tensor, Tensor]:
    """A norm, a branch, a residual, and the gradient of what comes out."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(hidden, eps=1e-12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, residual, shares = torch.randn(3, *shape, hidden).to(DEVICE, dtype)
    return norm.to(DEVICE, dtype), x.requires_grad_(), residual.requires_grad_(), shares


def gradients(out: Tensor, shares: Tensor, norm: nn.LayerNorm, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [*inputs, norm.weight, norm.bias], shares.to(out.dtype)))


def kept(shape: tuple[int, ...], p: float) -> Tensor:
    """The mask of such a tensor at the generator's present state: of ones, those that are kept end
    above the row's mean.
    """
    ones = torch.ones(shape, device=DEVICE)
    return layer_norm.triton(ones, nn.LayerNorm(shape[-1]).to(DEVICE), None, p) > 0


@pytest.mark.parametrize("hidden", [16, 48, 768, 1000])
@pytest.mark.parametrize("has_residual", [True, False])
def test_agrees_in_value_and_gradient(hidden: int, has_residual: bool) -> None:
    norm, x, residual, shares = make_inputs(hidden)
    inputs = [x, residual] if has_residual else [x]
    got, wanted = (
        implementation(x, norm, residual if has_residual else None)
        for implementation in (layer_norm.triton, layer_norm.plain)
    )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradients(got, shares, norm, *inputs),
        gradients(wanted, shares, norm, *inputs),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_summed_in_32(dtype: torch.dtype) -> None:
    norm, x, residual, shares = make_inputs(768, dtype=dtype)
    exact_norm = nn.LayerNorm(768, eps=1e-12).to(DEVICE)
    exact_norm.load_state_dict(norm.state_dict())
    exact = [part.detach().float().requires_grad_() for part in (x, residual)]
    wanted = layer_norm.plain(exact[0], exact_norm, exact[1])
    got = layer_norm.triton(x, norm, residual)
    for part, true in zip(
        [got, *gradients(got, shares, norm, x, residual)],
        [wanted, *gradients(wanted, shares, exact_norm, *exact)],
        strict=True,
    ):
        assert part.dtype == dtype
        error = (part.float() - true).abs() / true.abs().clamp(min=1e-3)
        # A unit in the last place: the interpreter cuts bf16 off where a GPU rounds.
        assert error.max() <= 1.01 * torch.finfo(dtype).eps


def test_a_wider_residual_decides_the_width() -> None:
    norm, x, residual, shares = make_inputs(48)
    narrow = x.detach().bfloat16().requires_grad_()
    for p in (0.0, 0.3):
        got = layer_norm.triton(narrow, norm, residual, p)
        grads = gradients(got, shares, norm, narrow, residual)
        assert [part.dtype for part in (got, *grads)] == [torch.float32, torch.bfloat16] + [
            torch.float32
        ] * 3


@pytest.mark.parametrize("hidden", [48, 1000])
def test_both_passes_drop_the_same_and_scale_the_rest(hidden: int) -> None:
    p, scale = 0.3, (1 << 16) / ((1 << 16) - round(0.3 * (1 << 16)))
    norm, x, residual, shares = make_inputs(hidden)
    torch.manual_seed(3)
    mask = kept(tuple(x.shape), p)
    torch.manual_seed(3)
    got = layer_norm.triton(x, norm, residual, p)
    got_grads = gradients(got, shares, norm, x, residual)
    assert torch.equal(got_grads[0] != 0, mask)
    wanted = layer_norm.plain(x * mask * scale, norm, residual)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        got_grads, gradients(wanted, shares, norm, x, residual), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("p", "hidden"), [(0.1, 1000), (0.5, 1024)])
def test_the_share_of_dropped_values_and_their_independence(p: float, hidden: int) -> None:
    torch.manual_seed(0)
    mask = kept((50, hidden), p)
    assert abs(1 - mask.double().mean().item() - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    # Neighbours, the words of one draw, its halves, other draws, the next row.
    mask = mask.flatten()
    for distance in (1, 2, 3, 4, 5, 6, 7, 8, hidden // 2, hidden):
        pairs = len(mask) - distance
        differ = (mask[distance:] ^ mask[:-distance]).double().mean().item()
        share = 2 * p * (1 - p)
        assert abs(differ - share) < 4 * (2 * share * (1 - share) / pairs) ** 0.5


def test_torchs_seed_decides() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kept((5, 48), 0.5))
    masks.append(kept((5, 48), 0.5))  # and goes on
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], masks[3])


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    norm, x, residual, _ = make_inputs(48)
    state = torch.get_rng_state()
    layer_norm.triton(x, norm, residual, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_draws_the_same_mask_again() -> None:
    norm, x, residual, shares = make_inputs(48)
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(5)
        arguments = (x, norm, residual, 0.4)
        out = (
            checkpoint(layer_norm.triton, *arguments, use_reentrant=False)
            if is_checkpointed
            else layer_norm.triton(*arguments)
        )
        torch.rand(3)  # the generator goes on before the backward pass
        results.append([out, *gradients(out, shares, norm, x, residual)])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


def test_the_parameters_gradients_are_the_same_every_time() -> None:
    norm, x, residual, shares = make_inputs(768)
    first, second = (
        gradients(layer_norm.triton(x, norm, residual), shares, norm, x, residual) for _ in range(2)
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_transposed_inputs_and_no_rows() -> None:
    norm, x, residual, shares = make_inputs(48, shape=(5, 6))
    got = layer_norm.triton(x.mT.contiguous().mT, norm, residual.transpose(0, 1).transpose(0, 1))
    torch.testing.assert_close(got, layer_norm.plain(x, norm, residual), atol=1e-5, rtol=1e-5)
    none = layer_norm.triton(x[:0], norm, residual[:0], 0.1)
    assert none.shape == (0, 6, 48)
    grads = gradients(none, shares[:0], norm, x, residual)
    assert all(not grad.any() for grad in grads)


def loss_and_gradients(config: BertConfig, kernels: Kernels) -> list[Tensor]:
    torch.manual_seed(0)
    model = BertForPreTraining(config, kernels).to(DEVICE)
    words = torch.randint(1, config.vocab_size, (2, 6))
    positions = torch.tensor([[1, 3], [2, 0]])
    batch = {
        "input_ids": words,
        "input_mask": (torch.arange(6) < torch.tensor([6, 3])[:, None]).long(),
        "segment_ids": torch.zeros_like(words),
        "masked_lm_positions": positions,
        "masked_lm_ids": words[:, :2] * (positions > 0),
        "next_sentence_labels": torch.tensor([0, 1]),
    }
    losses = model(**{name: part.to(DEVICE) for name, part in batch.items()})
    loss = losses.mlm_loss_sum + losses.nsp_loss_sum
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("position", ["post", "pre"])
def test_the_whole_model_trains_the_same(position: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        layer_norm_position=position,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    got, wanted = (
        loss_and_gradients(config, Kernels(layer_norm=name)) for name in ("triton", "torch")
    )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_the_whole_model_trains_the_same_with_checkpointed_dropout() -> None:
    config = dataclasses.replace(CONFIG, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.0)
    got, wanted = (
        loss_and_gradients(
            config, Kernels(layer_norm="triton", activation_checkpointing=is_checkpointed)
        )
        for is_checkpointed in (True, False)
    )
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
