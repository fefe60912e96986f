"""DeepSpeed's own `"scheduler"` section: the rates of its schedulers, without the schedulers.

A JSON that was written for DeepSpeed keeps its meaning, and the training loop alone sets the rate.
DeepSpeed's counter is at -1 for the first update and advances after each, so the update that `step`
others went before uses `step - 1`: a warm-up from 0 has a rate of 0 twice.

Source: deepspeed/runtime/lr_schedules.py, 0.19.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from zerobert.config import check_keys, from_dict
from zerobert.errors import ConfigError

_INSTEAD = {
    "LRRangeTest": "start short runs with different --learning_rate instead",
    "OneCycle": 'use "bert": {"schedule": {"name": "linear", "warmup_proportion": 0.5}} instead',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Warmup:
    """The warm-up that all three have."""

    warmup_num_steps: int = 1000
    warmup_type: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("num_steps") and value < 1:
                raise ConfigError(f"{field.name}: wanted at least 1, got {value}")
            if field.name.endswith(("lr", "ratio")) and value is not None and value < 0:
                raise ConfigError(f"{field.name}: must not be negative, got {value}")

    @property
    def _steps(self) -> int:
        return max(2, self.warmup_num_steps)  # the logarithm of 1 would divide by zero

    def _risen(self, counter: int) -> float:
        """The share of the way up, from 0 to 1."""
        if self.warmup_type == "log":
            return math.log(counter + 1) / math.log(self._steps)
        return counter / self._steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupLR(_Warmup):
    """Warm up between two rates, then stay.

    Attributes:
        warmup_max_lr: the peak; by default the optimizer's `lr`.
    """

    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = None

    def rate(self, step: int, lr: float) -> float:
        """The rate of the update that `step` others went before; `lr` is the optimizer's."""
        counter = step - 1
        peak = lr if self.warmup_max_lr is None else self.warmup_max_lr
        if counter < 0:
            return self.warmup_min_lr
        share = self._risen(counter) if counter < self._steps else self._after(counter)
        return self.warmup_min_lr + (peak - self.warmup_min_lr) * share

    def _after(self, counter: int) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(WarmupLR):
    """Warm up between two rates, then fall back to the lower in a straight line.

    Attributes:
        warmup_max_lr: the peak; its default is DeepSpeed's, not the optimizer's `lr`.
    """

    total_num_steps: int
    warmup_max_lr: float | None = 0.001

    def _after(self, counter: int) -> float:
        left = self.total_num_steps - counter
        return max(0.0, left / max(1.0, self.total_num_steps - self._steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(_Warmup):
    """Warm up to the optimizer's `lr`, then fall along half a cosine; ratios are shares of `lr`."""

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    cos_min_ratio: float = 0.0001

    def rate(self, step: int, lr: float) -> float:
        """The rate of the update that `step` others went before; `lr` is the optimizer's."""
        counter = step - 1
        if counter < 0:
            return 0.0
        if counter < self._steps:
            lowest, share = self.warmup_min_ratio, self._risen(counter)
        else:
            progress = (counter - self._steps + 1) / max(1, self.total_num_steps - self._steps)
            lowest = self.cos_min_ratio
            share = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return lr * (lowest + (1 - lowest) * share)


DeepSpeedScheduler = WarmupLR | WarmupDecayLR | WarmupCosineLR


def scheduler_config(section: Any, where: str) -> DeepSpeedScheduler:
    """Read DeepSpeed's `{"type": ..., "params": {...}}`.

    Raises:
        ConfigError: another scheduler, an unknown parameter, or a value out of range.
    """
    kinds: dict[str, type[DeepSpeedScheduler]] = {
        "WarmupLR": WarmupLR,
        "WarmupDecayLR": WarmupDecayLR,
        "WarmupCosineLR": WarmupCosineLR,
    }
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: wanted an object {{...}}, got {section!r}")
    check_keys(section, ["type", "params"], where)
    kind = section.get("type")
    if isinstance(kind, str) and kind in _INSTEAD:
        raise ConfigError(f"{where}.type: {kind} is not served; {_INSTEAD[kind]}")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{where}.type: wanted one of {', '.join(kinds)}, got {kind!r}")
    return from_dict(kinds[kind], section.get("params", {}), f"{where}.params")
