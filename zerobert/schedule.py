"""Learning-rate schedules: the factor of the peak rate as a pure function of the step.

Steps are counted from 0: `factor(step)` is what the update number `step + 1` uses. Every schedule
warms up linearly and reaches the peak with the last step of the warm-up.
"""

import dataclasses
import math
from typing import Literal

from zerobert.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The JSON's `"schedule"` section; the peak rate is the optimizer's `lr`.

    Attributes:
        name: `linear` falls to 0; `nvidia_polynomial` is NVIDIA's (1 - step / total)^degree, which
            falls at once from 1 when the warm-up ends; `polynomial` starts its fall there instead.
        warmup_steps: steps of linear warm-up; wins over the proportion where both are given.
        warmup_proportion: warm-up as a share of all steps.
        degree: the exponent of the polynomials.
    """

    name: Literal["linear", "nvidia_polynomial", "polynomial", "cosine", "constant"] = "linear"
    warmup_steps: int | None = None
    warmup_proportion: float = 0.0
    degree: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_proportion <= 1:
            raise ConfigError(f"warmup_proportion: wanted 0 to 1, got {self.warmup_proportion}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps: wanted at least 0, got {self.warmup_steps}")
        if self.degree <= 0:
            raise ConfigError(f"degree: wanted above 0, got {self.degree}")


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """The length of the warm-up in steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_proportion * total_steps)


def factor(config: ScheduleConfig, step: int, *, total_steps: int) -> float:
    """The share of the peak rate that step `step` of `total_steps` uses, from 0 to 1."""
    warmup = warmup_steps(config, total_steps)
    match config.name:
        case "linear":
            return linear(step, total_steps=total_steps, warmup_steps=warmup)
        case "nvidia_polynomial":
            return nvidia_polynomial(
                step, total_steps=total_steps, warmup_steps=warmup, degree=config.degree
            )
        case "polynomial":
            return polynomial(
                step, total_steps=total_steps, warmup_steps=warmup, degree=config.degree
            )
        case "cosine":
            return cosine(step, total_steps=total_steps, warmup_steps=warmup)
        case "constant":
            return constant(step, warmup_steps=warmup)


def constant(step: int, *, warmup_steps: int) -> float:
    """Warm up, then stay at the peak."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def linear(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Warm up, then fall in a straight line that would reach 0 one step after the last."""
    return polynomial(step, total_steps=total_steps, warmup_steps=warmup_steps, degree=1.0)


def polynomial(step: int, *, total_steps: int, warmup_steps: int, degree: float) -> float:
    """Warm up, then fall as (share of the steps after the warm-up that are left)^degree."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.pow(_share_left(step - warmup_steps, total_steps - warmup_steps), degree)


def nvidia_polynomial(step: int, *, total_steps: int, warmup_steps: int, degree: float) -> float:
    """Warm up, then fall as (share of all steps left)^degree, with the jump that this makes.

    Source: NVIDIA DeepLearningExamples, PyTorch BERT, schedulers.py (PolyWarmUpScheduler), where
    the progress after warm-up is measured from the first step of the run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.pow(_share_left(step, total_steps), degree)


def cosine(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Warm up, then fall along half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = _share_left(step - warmup_steps, total_steps - warmup_steps)
    return 0.5 * (1 - math.cos(math.pi * left))


def _share_left(done: int, total: int) -> float:
    return max(0.0, 1 - done / total) if total > 0 else 0.0
