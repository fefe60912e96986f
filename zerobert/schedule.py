"""Learning-rate schedules: the rate as a pure function of how far a run is.

How far is counted in the schedule's own unit: optimizer steps, or the seconds of a budget. Steps
count from 0: `factor(step)` is what the update number `step + 1` uses, so that the last step of a
warm-up has the peak. A time is that at which the update begins.
"""

import dataclasses
import math
from typing import Literal

from zerobert.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The JSON's `"schedule"` section; the peak rate is the optimizer's `lr`.

    Every schedule warms up in a straight line, and all but `constant` then fall from the peak.

    Attributes:
        name: the form of the fall. `linear`; `polynomial`, a power of what is left after the
            warm-up; `nvidia_polynomial`, that power of what is left of the whole run after the
            update, which falls at once when the warm-up ends, and to 0; `paddle_linear`, linear by
            what is left after the update, to 0; `cosine`, half a wave; `wsd` (warm-up, stable,
            decay) stays at the peak until its decay; `constant`.
        by: `steps`, or `time` as a share of the run's `max_train_s`.
        warmup_steps: wins over the proportion where both are given; none with `time`.
        warmup_proportion: warm-up as a share of the whole run.
        warmup_min_ratio: the share of the peak that the warm-up starts from.
        min_lr_ratio: the share of the peak that the fall ends at.
        degree: the exponent of the polynomials.
        decay_steps: the length of `wsd`'s decay at the end of the run; wins over the proportion;
            none with `time`.
        decay_proportion: that length as a share of the whole run.
        decay_type: the form of that decay.

    Source: nvidia_polynomial: NVIDIA DeepLearningExamples, PyTorch BERT, schedulers.py
    (PolyWarmUpScheduler). paddle_linear: PaddleNLP, transformers/optimization.py
    (LinearDecayWithWarmup with `last_epoch=0`, as its run_pretrain.py has it). wsd: Hu et al. 2024
    (arXiv:2404.06395), whose decay of a tenth is the default; its forms: Haegele et al. 2024
    (arXiv:2405.18392). time: Izsak et al. 2021 (arXiv:2104.07705).
    """

    name: Literal[
        "linear",
        "nvidia_polynomial",
        "paddle_linear",
        "polynomial",
        "cosine",
        "wsd",
        "constant",
    ] = "linear"
    by: Literal["steps", "time"] = "steps"
    warmup_steps: int | None = None
    warmup_proportion: float = 0.0
    warmup_min_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    degree: float = 1.0
    decay_steps: int | None = None
    decay_proportion: float = 0.1
    decay_type: Literal["linear", "1-sqrt"] = "linear"

    def __post_init__(self) -> None:
        for name in ("warmup_proportion", "warmup_min_ratio", "min_lr_ratio", "decay_proportion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: wanted 0 to 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "decay_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 0:
                raise ConfigError(f"{name}: wanted at least 0, got {steps}")
            if steps is not None and self.by == "time":
                share = name.replace("steps", "proportion")
                raise ConfigError(f"{name}: this schedule goes by time; give {share} instead")
        if not 0 < self.degree < math.inf:
            raise ConfigError(f"degree: wanted above 0, got {self.degree}")
        # A setting that nothing reads is a mistake about the schedule's name.
        strange = [
            field.name
            for field in dataclasses.fields(self)
            if (field.name.startswith("decay_") and self.name != "wsd")
            or (field.name == "min_lr_ratio" and self.name == "constant")
            or (field.name == "degree" and not self.name.endswith("polynomial"))
            if getattr(self, field.name) != field.default
        ]
        if strange:
            raise ConfigError(f"{strange[0]}: schedule {self.name} has none; remove it")

    @property
    def length(self) -> Literal["steps", "time"] | None:
        """Which length of the run the rate depends on; None for a constant one whose warm-up is
        told in steps.
        """
        warms_up_by_share = self.warmup_steps is None and self.warmup_proportion > 0
        return self.by if self.name != "constant" or warms_up_by_share else None


def rate(
    config: ScheduleConfig,
    step: int,
    elapsed_s: float,
    *,
    peak_lr: float,
    total_steps: int | None,
    max_train_s: float | None,
) -> float:
    """The learning rate of an update.

    Args:
        step: the updates made before.
        elapsed_s: the seconds trained before.
        total_steps: of the run; needed by a schedule that goes by steps.
        max_train_s: the run's budget; needed by a schedule that goes by time.
    """
    done, total = (elapsed_s, max_train_s) if config.by == "time" else (step, total_steps)
    assert total is not None
    return peak_lr * factor(config, done, total=total)


def factor(config: ScheduleConfig, done: float, *, total: float) -> float:
    """The share of the peak rate, from 0 to 1, that an update uses.

    Args:
        done: steps or seconds before it.
        total: steps or seconds of the whole run.
    """
    # A step counts as taken; when an update of a schedule by time will end, nobody knows.
    reached = done + 1 if config.by == "steps" else done
    if config.name == "nvidia_polynomial":
        steps = config.warmup_steps
        warmup = config.warmup_proportion * total if steps is None else float(steps)
        if reached < warmup:
            return _between(config.warmup_min_ratio, reached / warmup)
        left = math.pow(_share_left(reached, total), config.degree)
        return _between(config.min_lr_ratio, left)
    warmup = _length(config.warmup_steps, config.warmup_proportion, config, total)
    behind = reached if config.name == "paddle_linear" else done
    if behind < warmup:
        return _between(config.warmup_min_ratio, reached / warmup)
    return _between(config.min_lr_ratio, _fall(config, behind, total, warmup))


def _fall(config: ScheduleConfig, done: float, total: float, warmup: float) -> float:
    """What is left, from 1 to 0, of the way down to the lowest rate."""
    left = _share_left(done - warmup, total - warmup)
    match config.name:
        case "constant":
            return 1.0
        case "linear" | "paddle_linear":
            return left
        case "polynomial":
            return math.pow(left, config.degree)
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        case "wsd":
            decay = _length(config.decay_steps, config.decay_proportion, config, total)
            decay = min(decay, total - warmup)
            if done < total - decay:
                return 1.0
            left = _share_left(done - (total - decay), decay)
            return left if config.decay_type == "linear" else 1 - math.sqrt(1 - left)
        case "nvidia_polynomial":
            raise AssertionError("it has no fall of its own: see `factor`")


def _length(steps: int | None, share: float, config: ScheduleConfig, total: float) -> float:
    """The length of a warm-up or a decay, in the schedule's unit."""
    if steps is not None:
        return steps
    return share * total if config.by == "time" else round(share * total)


def _share_left(done: float, total: float) -> float:
    return max(0.0, 1 - done / total) if total > 0 else 0.0


def _between(lowest: float, share: float) -> float:
    """That share of the way from the lowest rate to the peak."""
    return lowest + (1 - lowest) * share
