"""LAMB by NVIDIA apex's fused kernel, which takes whole parameters: ZeRO stage 0 alone.

It writes each update over the gradient that it came from. Written after apex's source
(apex/optimizers/fused_lamb.py, csrc/multi_tensor_lamb.cu); it has not run on a device yet.
"""

from typing import Any

import torch
from torch import Tensor

from zerobert.errors import ConfigError
from zerobert.kernels.lamb import Implementation, Pieces, Rates, Scaling

try:
    from amp_C import multi_tensor_lamb as _lamb
    from apex.multi_tensor_apply import multi_tensor_applier as _applier
except ImportError:
    _lamb = _applier = None

LAMB: Any = _lamb  # None where it is not installed
APPLIER: Any = _applier


def _step_local(pieces: Pieces, rates: Rates, scaling: Scaling) -> None:
    if scaling.min_coeff is not None or scaling.max_coeff is not None:
        raise ConfigError("kernels.lamb 'apex' knows no min_coeff and max_coeff; use 'triton'")
    device = pieces.weights[0].device
    nothing_overflowed = torch.zeros(1, dtype=torch.int, device=device)
    unclipped = torch.zeros(1, device=device), 1.0  # the gradients' norm, and its limit
    APPLIER(
        LAMB,
        nothing_overflowed,
        [pieces.gradients, pieces.weights, pieces.exp_avgs, pieces.exp_avg_sqs],
        scaling.lr,
        rates.beta1,
        rates.beta2,
        rates.eps,
        rates.step,
        rates.corrects,
        rates.weight_decay,
        True,  # the new moment takes 1 - beta1 of the gradient
        1,  # weight decay is part of the update
        *unclipped,
        scaling.adapts,  # of parameters without weight decay, too
    )


def _refuse(*_: object) -> Tensor:
    raise ConfigError(
        "kernels.lamb 'apex' takes whole parameters, ZeRO stage 1 and above have pieces of them; "
        "choose 'auto', or stage 0"
    )


def _refuse_apply(pieces: Pieces, rates: Rates, scales: Tensor) -> None:
    _refuse()


IMPLEMENTATION = Implementation(_refuse, _refuse_apply, _step_local)
