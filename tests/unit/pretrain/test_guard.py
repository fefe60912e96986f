"""What counts as a training gone wrong."""

import math

import pytest

from pretrain.guard import GuardConfig, SpikeGuard
from zerobert.errors import ConfigError, TrainingDivergedError


def test_without_a_factor_nothing_is_a_spike() -> None:
    guard = SpikeGuard(GuardConfig())
    for step in range(20):
        guard.check(10.0**step, step)


def test_a_loss_is_held_against_the_median_of_the_window() -> None:
    guard = SpikeGuard(GuardConfig(spike_factor=2.0, spike_window=5))
    for step, loss in enumerate([50.0, 8.0, 6.0, 4.0, 4.0, 4.0]):
        guard.check(loss, step)
    guard.check(8.0, 6)  # the median of 8, 6, 4, 4, 4 is 4
    with pytest.raises(
        TrainingDivergedError, match=r"step 7, 8\.1000, is more than 2 times .* before, 4\.0000"
    ):
        guard.check(8.1, 7)
    with pytest.raises(TrainingDivergedError):
        guard.check(8.1, 8)  # a spike does not become the measure


def test_of_too_few_lines_no_verdict_is_given() -> None:
    guard = SpikeGuard(GuardConfig(spike_factor=1.5))
    for step, loss in enumerate([1.0, 100.0, 1.0, 100.0, 1.0]):
        guard.check(loss, step)
    with pytest.raises(TrainingDivergedError):
        guard.check(100.0, 5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"spike_factor": 1.0}, "spike_factor: wanted a number above 1, or null, got 1.0"),
        ({"spike_factor": math.nan}, "spike_factor"),
        ({"spike_factor": math.inf}, "spike_factor"),
        ({"spike_window": 4}, "spike_window: wanted at least 5, got 4"),
        ({"rollback_states": 0}, "rollback_states: wanted at least 1, got 0"),
        ({"max_rollbacks": 0}, "max_rollbacks: wanted at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(setting: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig(**setting)  # type: ignore[arg-type]
    assert said in str(caught.value)
