"""Learning rates in exact numbers; `factor(step)` is what update number `step + 1` uses."""

import dataclasses
import math

import pytest

from zerobert.errors import ConfigError
from zerobert.schedule import ScheduleConfig, factor, linear, warmup_steps

NAMES = ["linear", "nvidia_polynomial", "polynomial", "cosine", "constant"]


def rates(total_steps: int, **options: object) -> list[float]:
    """The factors of a whole run."""
    config = ScheduleConfig(**options)  # type: ignore[arg-type]
    return [factor(config, step, total_steps=total_steps) for step in range(total_steps)]


def test_linear() -> None:
    got = rates(10, name="linear", warmup_steps=4)
    assert got == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert linear(7, total_steps=10, warmup_steps=4) == pytest.approx(0.5)
    assert linear(10, total_steps=10, warmup_steps=4) == 0.0


def test_polynomial_starts_its_fall_at_the_peak() -> None:
    got = rates(6, name="polynomial", warmup_steps=2, degree=0.5)
    assert got == pytest.approx([0.5, 1, 1, math.sqrt(3 / 4), math.sqrt(2 / 4), math.sqrt(1 / 4)])


def test_cosine() -> None:
    got = rates(6, name="cosine", warmup_steps=2)
    half = math.sqrt(0.5)
    assert got == pytest.approx([0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_constant() -> None:
    assert rates(5, name="constant", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_nvidia_s_recipe_jumps_down_when_the_warm_up_ends() -> None:
    config = ScheduleConfig(name="nvidia_polynomial", warmup_proportion=0.2843, degree=0.5)
    assert warmup_steps(config, 7038) == 2001
    got = rates(7038, name="nvidia_polynomial", warmup_proportion=0.2843, degree=0.5)
    assert got[0] == pytest.approx(1 / 2001)
    assert got[1000] == pytest.approx(1001 / 2001)
    assert got[2000] == 1.0
    assert got[2001] == pytest.approx(math.sqrt(5037 / 7038))
    assert got[2001] == pytest.approx(0.846, abs=5e-4)
    assert got[5000] == pytest.approx(math.sqrt(2038 / 7038))
    assert got[7037] == pytest.approx(math.sqrt(1 / 7038))


def test_the_plain_polynomial_has_no_jump_there() -> None:
    got = rates(7038, name="polynomial", warmup_proportion=0.2843, degree=0.5)
    assert got[2000] == got[2001] == 1.0
    assert got[2002] == pytest.approx(math.sqrt(5036 / 5037))


def test_steps_win_over_the_proportion() -> None:
    config = ScheduleConfig(warmup_proportion=0.5, warmup_steps=3)
    assert warmup_steps(config, 100) == 3
    assert warmup_steps(dataclasses.replace(config, warmup_steps=0), 100) == 0
    assert warmup_steps(dataclasses.replace(config, warmup_steps=None), 100) == 50


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_begins_above_zero_and_stays_within_the_peak(name: str) -> None:
    for total, warmup in [(1, 0), (1, 1), (2, 1), (50, 7), (50, 0), (50, 50)]:
        got = rates(total, name=name, warmup_steps=warmup)
        assert all(0 < rate <= 1 for rate in got), (total, warmup, got)
        assert max(got) == 1.0
        assert got[:warmup] == sorted(got[:warmup])
        assert got[warmup:] == sorted(got[warmup:], reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_longer_than_the_run_never_reaches_the_peak(name: str) -> None:
    assert rates(3, name=name, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_nothing_is_left_after_the_last_step(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=2)  # type: ignore[arg-type]
    assert factor(config, 10, total_steps=10) == pytest.approx(0, abs=1e-12)
    assert factor(config, 15, total_steps=10) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_proportion": 1.5}, "warmup_proportion: wanted 0 to 1, got 1.5"),
        ({"warmup_steps": -1}, "warmup_steps: wanted at least 0, got -1"),
        ({"degree": 0.0}, "degree: wanted above 0, got 0.0"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message
