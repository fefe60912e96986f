"""Fast paths, each in its own file beside the plain-torch twin that a test holds it against.

`Kernels` is the JSON's `"kernels"` section: `auto` chooses by device, a name insists. What was
chosen, and why, is printed at the start of a run and by `bash launch.sh doctor`.
"""

import dataclasses
from typing import Literal

import torch

from zerobert.kernels import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation each op uses."""

    attention: Literal["auto", "sdpa", "plain"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation that an op will use, and why."""

    op: str
    chosen: str
    reason: str


def describe(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """What each op will use on this device at this precision."""
    chosen, reason = attention.choose(kernels.attention, device, dtype)
    return [Choice(op="attention", chosen=chosen, reason=reason)]
