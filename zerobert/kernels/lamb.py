"""LAMB's arithmetic on pieces of parameters: moments, norms, trust ratios, and the step itself.

LAMB needs the norms of a whole parameter before it can change any of it, so it goes over its
tensors twice: `update_moments`, then `apply`, which computes the update again rather than keep it.
Between the two a caller whose parameters are spread over ranks adds up their squares. Where every
piece is a whole parameter `step_local` does it all, each piece while it is still in a cache.

Source: arXiv:1904.00962, algorithm 2.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zerobert.errors import ConfigError, MissingDependencyError


class Pieces(NamedTuple):
    """What a rank holds of a parameter group: at least one piece, each of one model parameter.

    All are contiguous 1-D fp32 tensors on one device; those at the same place have one length.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


class Rates(NamedTuple):
    """A step's numbers; the corrections are 1 - beta**step, or 1 for moments left as they are.

    `step`, counted from 1, and `corrects` are for a kernel that works them out by itself: some
    hundred steps on a correction is 1, too.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction1: float
    correction2: float
    step: int = 1
    corrects: bool = True


class Scaling(NamedTuple):
    """How far along its update a parameter goes: `lr`, times the trust ratio where it `adapts`.

    The coefficients bound the ratio; None for no bound, as in the paper's experiments.
    """

    lr: float
    adapts: bool = True
    min_coeff: float | None = None
    max_coeff: float | None = None


class Implementation(NamedTuple):
    """One way to take LAMB's step; all change tensors in place, without waiting for a device.

    Attributes:
        update_moments: moves both moments towards the gradients; returns the sums of squares of
            each piece's weights and of its update, fp32 [pieces, 2] on the pieces' device. The
            update is (m / correction1) / (sqrt(v / correction2) + eps) + weight_decay * w.
        apply: w -= scales * update, from moments that are up to date; scales are fp32 [pieces]
            on the pieces' device.
        step_local: both at once, for pieces that are whole parameters or that do not adapt.
    """

    update_moments: Callable[[Pieces, Rates], Tensor]
    apply: Callable[[Pieces, Rates, Tensor], None]
    step_local: Callable[[Pieces, Rates, Scaling], None]


def scales(squares: Tensor, scaling: Scaling) -> Tensor:
    """The learning rate times |weights| / |update|, the ratio being 1 where either is 0.

    Args:
        squares: sums over whole parameters, as `update_moments` returns them for pieces.

    Returns:
        fp32 [parameters].
    """
    if not scaling.adapts:
        return torch.full_like(squares[:, 0], scaling.lr)
    weight_norms, update_norms = squares.sqrt().unbind(1)
    ratios = weight_norms / update_norms
    if scaling.min_coeff is not None or scaling.max_coeff is not None:
        ratios = ratios.clamp(min=scaling.min_coeff, max=scaling.max_coeff)
    return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0) * scaling.lr


# --- plain: the formula on whole tensors, all pieces at a time ----------------------------------


def _plain_update_moments(pieces: Pieces, rates: Rates) -> Tensor:
    torch._foreach_lerp_(pieces.exp_avgs, pieces.gradients, 1 - rates.beta1)
    torch._foreach_mul_(pieces.exp_avg_sqs, rates.beta2)
    torch._foreach_addcmul_(pieces.exp_avg_sqs, pieces.gradients, pieces.gradients, 1 - rates.beta2)
    updates = _plain_updates(pieces, rates)
    return torch.stack([_plain_squares(pieces.weights), _plain_squares(updates)], dim=1)


def _plain_apply(pieces: Pieces, rates: Rates, scales: Tensor) -> None:
    updates = _plain_updates(pieces, rates)
    torch._foreach_mul_(updates, list(scales.unbind()))
    torch._foreach_sub_(pieces.weights, updates)


def _plain_step_local(pieces: Pieces, rates: Rates, scaling: Scaling) -> None:
    squares = _plain_update_moments(pieces, rates)
    if scaling.adapts:
        _plain_apply(pieces, rates, scales(squares, scaling))
    else:  # a factor for each would be a launch for each on a GPU
        torch._foreach_sub_(pieces.weights, _plain_updates(pieces, rates), alpha=scaling.lr)


def _plain_updates(pieces: Pieces, rates: Rates) -> list[Tensor]:
    denominators = list(torch._foreach_div(pieces.exp_avg_sqs, rates.correction2))
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, rates.eps)
    updates = list(torch._foreach_div(pieces.exp_avgs, rates.correction1))
    torch._foreach_div_(updates, denominators)
    torch._foreach_add_(updates, pieces.weights, alpha=rates.weight_decay)
    return updates


def _plain_squares(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).square_()
    # On CPU torch's norm adds up one after another in fp32 (6e-4 off at ten million values), its
    # sum in pairs.
    return torch.stack([tensor.square().sum() for tensor in tensors])


# --- blocked: on CPU, blocks that stay in the cache while all is done to them -------------------

# Elements: enough work to outweigh the start of the threads, while five arrays of them fit in the
# cache that cores share (`benchmarks/optimizer_step.py --blocks`).
BLOCK = 1 << 19

_ROW = 1024  # elements whose squares are added up one after another
_CORRECTED = torch.tensor(math.inf)  # the step at which 1 - beta**step is 1


def _blocked_update_moments(pieces: Pieces, rates: Rates) -> Tensor:
    buffer = _scratch(BLOCK)
    squares = [_update_piece(*piece, rates, buffer) for piece in zip(*pieces, strict=True)]
    return torch.tensor(squares)


def _blocked_apply(pieces: Pieces, rates: Rates, scales: Tensor) -> None:
    buffer = _scratch(BLOCK)
    zeros = torch.zeros(BLOCK)
    # Betas so near to 1 that fp32 moments stay where they are, and only the update is made.
    still = rates._replace(beta1=math.nextafter(1, 0), beta2=math.nextafter(1, 0))
    for weight, _, m, v, scale in zip(*pieces, scales.tolist(), strict=True):
        for start, end in _blocks(weight):
            w, update = weight[start:end], buffer[: end - start]
            _move(w, zeros[: end - start], m[start:end], v[start:end], still, update)
            w.sub_(update, alpha=scale)


def _blocked_step_local(pieces: Pieces, rates: Rates, scaling: Scaling) -> None:
    if not scaling.adapts and rates.weight_decay == 0:
        _adam(pieces, rates, scaling.lr)
        return
    buffer = _scratch(max(weight.numel() for weight in pieces.weights))
    for piece in zip(*pieces, strict=True):
        squares = torch.tensor([_update_piece(*piece, rates, buffer)])
        weight = piece[0]
        weight.sub_(buffer[: weight.numel()], alpha=scales(squares, scaling).item())


def _update_piece(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, rates: Rates, buffer: Tensor
) -> tuple[float, float]:
    """Sums of squares of weights and update, whose blocks go to `buffer`, each to its own place
    where that is long enough.
    """
    weight_square, update_square = 0.0, 0.0
    keeps = buffer.numel() >= weight.numel()
    for start, end in _blocks(weight):
        w = weight[start:end]
        update = buffer[start:end] if keeps else buffer[: end - start]
        _move(w, gradient[start:end], m[start:end], v[start:end], rates, update)
        weight_square += square(w)
        update_square += square(update)
    return weight_square, update_square


def _move(w: Tensor, gradient: Tensor, m: Tensor, v: Tensor, rates: Rates, out: Tensor) -> None:
    """Move the moments of a block, and write its update to `out`."""
    torch.mul(w, rates.weight_decay, out=out)
    _adam(Pieces([out], [gradient], [m], [v]), rates, -1.0)


def _adam(pieces: Pieces, rates: Rates, lr: float) -> None:
    """Adam's step, all in one go over memory; without weight decay.

    Torch's fused AdamW does it. The corrections of the moments go into its rate and eps, so that it
    needs no step counter.
    """
    root2 = math.sqrt(rates.correction2)
    torch._fused_adamw_(
        *pieces,
        max_exp_avg_sqs=[],
        state_steps=[_CORRECTED] * len(pieces.weights),
        lr=lr * root2 / rates.correction1,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=0.0,
        eps=rates.eps * root2,
        amsgrad=False,
        maximize=False,
    )


def square(block: Tensor) -> float:
    """The sum of squares of a flat tensor on the CPU, to fp32's accuracy however long it is."""
    whole = block.numel() // _ROW * _ROW
    rest = block[whole:]
    norms = torch.linalg.vector_norm(block[:whole].view(-1, _ROW), dim=1)
    return torch.dot(norms, norms).item() + torch.dot(rest, rest).item()


def _blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    length = tensor.numel()
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


@functools.lru_cache(maxsize=4)
def _scratch(length: int) -> Tensor:
    """Memory that is kept between steps: fresh pages cost as much as the arithmetic."""
    return torch.empty(length)


# --- choice --------------------------------------------------------------------------------------


def choose(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """Which implementation serves, and why.

    Raises:
        ConfigError: an implementation is asked for that can't serve.
        MissingDependencyError: its package is missing.
    """
    if asked not in ("auto", "plain", "blocked", "triton", "apex"):
        known = "auto, plain, blocked, triton or apex"
        raise ConfigError(f"kernels.lamb: wanted {known}, got {asked!r}")
    if asked == "apex":
        _check_apex(device)
    if asked == "blocked" and device.type != "cpu":
        raise ConfigError("kernels.lamb 'blocked' runs on CPU only")
    if asked == "triton" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("kernels.lamb 'triton' needs triton: pip install triton")
    if asked == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "kernels.lamb 'triton' runs on CUDA only, or with TRITON_INTERPRET=1 slowly in "
            "Triton's interpreter"
        )
    if asked != "auto":
        return asked, "asked for in the configuration"
    if device.type == "cpu":
        return "blocked", "blocks that stay in the cache"
    return "plain", "torch's foreach kernels; 'triton' is one kernel, but not measured yet"


def _check_apex(device: torch.device) -> None:
    from zerobert.kernels import lamb_apex

    if lamb_apex.LAMB is None:
        raise MissingDependencyError(
            "kernels.lamb 'apex' needs NVIDIA's apex; `bash launch.sh doctor` says how to build it"
        )
    if device.type != "cuda":
        raise ConfigError("kernels.lamb 'apex' runs on CUDA only")


def implementation(name: str) -> Implementation:
    """The functions behind a name that `choose` gives."""
    if name == "apex":
        from zerobert.kernels import lamb_apex

        return lamb_apex.IMPLEMENTATION
    if name == "triton":  # imported where it is used alone: it takes a while
        from zerobert.kernels import lamb_triton

        return lamb_triton.IMPLEMENTATION
    return IMPLEMENTATIONS[name]


IMPLEMENTATIONS = {
    "plain": Implementation(_plain_update_moments, _plain_apply, _plain_step_local),
    "blocked": Implementation(_blocked_update_moments, _blocked_apply, _blocked_step_local),
}
