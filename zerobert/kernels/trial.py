"""Kernels of a GPU are trusted once they have agreed there with their plain twins.

A trial takes some milliseconds as a run starts, and leaves torch's random numbers as they are.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zerobert.kernels import attention, layer_norm

# Of the largest value: 16 bits have 8 to 11 of them, and sums are in another order.
_TOLERANCE = 0.05
# Of values that are kept so many may have a gradient of 0, which looks as if they were dropped.
_MOST_STRAY = 1e-3
_NUM_HEADS = 2
# More rows than 32 have more padding at their end than a row has places.
_NUM_ROWS, _ROW_LENGTH = 40, 32


@functools.cache
def attention_failure(
    name: str, device: torch.device, dtype: torch.dtype, head_width: int, dropout_p: float
) -> str | None:
    """Why an implementation of attention over packed tokens can't serve; None where it can."""
    from zerobert.packing import pack  # which imports this package

    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(1, _ROW_LENGTH + 1, (_NUM_ROWS,), generator=generator)
    mask_BS = (torch.arange(_ROW_LENGTH) < lengths_B[:, None]).long()
    places_T, cu_seqlens = (part.to(device) for part in pack(mask_BS))
    packing = attention.Packing(places_T, cu_seqlens)
    layout = attention.Layout(mask_BS.bool().to(device), packing)
    shape = (3, len(places_T), _NUM_HEADS, head_width)
    inputs = torch.randn(shape, generator=generator).to(device, dtype)
    rows = slice(int(lengths_B.sum()))

    def run(name: str, dropout_p: float) -> list[Tensor]:
        q_TND, k_TND, v_TND = (part.detach().requires_grad_() for part in inputs)
        mixed_TND = attention.IMPLEMENTATIONS[name](q_TND, k_TND, v_TND, layout, dropout_p)[rows]
        leaves = (q_TND, k_TND, v_TND)
        return [mixed_TND, *torch.autograd.grad(mixed_TND.float().square().sum(), leaves)]

    return _failure(name, run, device, dropout_p)


@functools.cache
def layer_norm_failure(
    name: str, device: torch.device, dtype: torch.dtype, width: int
) -> str | None:
    """Why an implementation of layer norm can't serve rows of this width; None where it can."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, _ROW_LENGTH, width, generator=generator).to(device, dtype)
    norm, dropout_p = nn.LayerNorm(width).to(device, dtype), 0.1

    def run(name: str, dropout_p: float) -> list[Tensor]:
        x_XH, residual_XH = (part.detach().requires_grad_() for part in inputs)
        out_XH = layer_norm.IMPLEMENTATIONS[name](x_XH, norm, residual_XH, dropout_p)
        leaves = [x_XH, residual_XH, norm.weight, norm.bias]
        return [out_XH, *torch.autograd.grad((out_XH.float() ** 3).sum(), leaves)]

    def mask_failure(dropped: list[Tensor]) -> str | None:
        out_XH, x_grad_XH, *_ = dropped
        kept_XH = inputs[0] * (x_grad_XH != 0) / (1 - dropout_p)
        wanted_XH = layer_norm.plain(kept_XH, norm, inputs[1])
        is_apart_XH = (out_XH - wanted_XH).abs() > _TOLERANCE * wanted_XH.abs().max()
        share = is_apart_XH.float().mean().item()
        return None if share <= _MOST_STRAY else "drops other values on the way back"

    return _failure(name, run, device, dropout_p, mask_failure)


def _failure(
    name: str,
    run: Callable[[str, float], list[Tensor]],
    device: torch.device,
    dropout_p: float,
    mask_failure: Callable[[list[Tensor]], str | None] = lambda dropped: None,
) -> str | None:
    """Hold an implementation against `plain` without dropout, and see that it runs with it.

    Args:
        run: an implementation's value and gradients, by its name and a probability of dropping.
        mask_failure: what is wrong with those where something was dropped.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        try:
            pairs = list(zip(run(name, 0.0), run("plain", 0.0), strict=True))
            dropped = run(name, dropout_p)
        except torch.OutOfMemoryError:  # says nothing of the kernel, and is remembered nowhere
            raise
        except Exception as error:  # noqa: BLE001 - kernels' and compilers' have no other base
            lines = str(error).strip().splitlines() or [""]
            return f"fails on this device ({type(error).__name__}: {lines[0]:.120})"
    for got, wanted in pairs:
        apart = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not apart <= _TOLERANCE:  # what is no number too
            return f"differs from the plain one on this device by {apart:.2g}"
    if not all(part.isfinite().all() for part in dropped):
        return "gives what is no number on this device"
    return mask_failure(dropped)
