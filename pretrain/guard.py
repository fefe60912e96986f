"""Notices a training that has gone wrong: a loss far above what it has been of late."""

import collections
import dataclasses
import math
import statistics
from typing import Literal

from zerobert.errors import ConfigError, TrainingDivergedError

# Of fewer lines a median says nothing.
_LEAST_LINES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The JSON's `"guard"` section: what counts as gone wrong, and what is done then.

    A loss that is no finite number always counts; so do gradients that are none in several steps
    in a row, each of which is left out, and a loss scale that overflows at its least value.

    Attributes:
        action: `stop`, or `rollback`: go back to an earlier state, and leave out the samples that
            were trained on since.
        spike_factor: a loss above so many times the median counts too; null for no such check.
        spike_window: the median is over so many log lines before.
        rollback_states: how many states to go back, 1 for the newest.
        max_rollbacks: the next time after so many, the run stops.
    """

    action: Literal["stop", "rollback"] = "stop"
    spike_factor: float | None = None
    spike_window: int = 50
    rollback_states: int = 1
    max_rollbacks: int = 5

    def __post_init__(self) -> None:
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise ConfigError(
                f"spike_factor: wanted a number above 1, or null, got {self.spike_factor}"
            )
        if self.spike_window < _LEAST_LINES:
            raise ConfigError(
                f"spike_window: wanted at least {_LEAST_LINES}, got {self.spike_window}"
            )
        for name in ("rollback_states", "max_rollbacks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: wanted at least 1, got {getattr(self, name)}")


class SpikeGuard:
    """Holds the loss of each log line against the median of those before it."""

    def __init__(self, config: GuardConfig) -> None:
        self._factor = config.spike_factor
        self._losses: collections.deque[float] = collections.deque(maxlen=config.spike_window)

    def check(self, loss: float, step: int) -> None:
        """Take in a line's loss.

        Raises:
            TrainingDivergedError: it is a spike.
        """
        if self._factor is not None and len(self._losses) >= _LEAST_LINES:
            median = statistics.median(self._losses)
            if loss > self._factor * median:
                raise TrainingDivergedError(
                    f"the loss at step {step}, {loss:.4f}, is more than {self._factor:g} times the "
                    f"median of the lines before, {median:.4f} (bert.guard.spike_factor)"
                )
        self._losses.append(loss)
