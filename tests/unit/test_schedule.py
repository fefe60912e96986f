"""Learning rates in exact numbers; `factor(step)` is what update number `step + 1` uses."""

import dataclasses
import math

import pytest

from zerobert.errors import ConfigError
from zerobert.schedule import ScheduleConfig, factor, rate

NAMES = [
    *("linear", "nvidia_polynomial", "paddle_linear", "polynomial", "cosine", "wsd", "constant"),
]


def rates(total_steps: int, **options: object) -> list[float]:
    """The factors of a whole run."""
    config = ScheduleConfig(**options)  # type: ignore[arg-type]
    return [factor(config, step, total=total_steps) for step in range(total_steps)]


def by_time(seconds: list[float], **options: object) -> list[float]:
    """The factors at times of a run of 100 s."""
    config = ScheduleConfig(by="time", **options)  # type: ignore[arg-type]
    return [factor(config, elapsed_s, total=100.0) for elapsed_s in seconds]


def test_linear() -> None:
    got = rates(10, name="linear", warmup_steps=4)
    assert got == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert factor(ScheduleConfig(warmup_steps=4), 10, total=10) == 0.0


def test_paddlenlp_s_linear_counts_the_update_itself() -> None:
    """The peak is the warm-up's last update alone; the run's last update moves nothing."""
    got = rates(10, name="paddle_linear", warmup_steps=4)
    assert got == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert rates(4, name="paddle_linear") == pytest.approx([3 / 4, 2 / 4, 1 / 4, 0])
    assert rates(2, name="paddle_linear", warmup_steps=2) == [0.5, 0]


@pytest.mark.parametrize(("warmup", "total"), [(10_000, 1_000_000), (7, 30), (0, 5), (5, 5)])
def test_paddlenlp_s_rate_at_every_update(warmup: int, total: int) -> None:
    """Its own form, which is asked for update number 1 first (`last_epoch=0`)."""

    def paddle(number: int) -> float:
        if number < warmup:
            return number / max(1, warmup)
        return max(0.0, (total - number) / max(1, total - warmup))

    got = rates(total, name="paddle_linear", warmup_steps=warmup)
    errors = (abs(rate - paddle(number)) for number, rate in enumerate(got, start=1))
    assert max(errors) < 1e-15


def test_mosaicbert_s_linear_ends_at_two_percent() -> None:
    got = rates(6, name="linear", warmup_steps=2, min_lr_ratio=0.02)
    assert got == pytest.approx([0.5, 1, 1, 0.755, 0.51, 0.265])
    config = ScheduleConfig(name="linear", warmup_steps=2, min_lr_ratio=0.02)
    assert factor(config, 6, total=6) == 0.02


def test_polynomial_starts_its_fall_at_the_peak() -> None:
    got = rates(6, name="polynomial", warmup_steps=2, degree=0.5)
    assert got == pytest.approx([0.5, 1, 1, math.sqrt(3 / 4), math.sqrt(2 / 4), math.sqrt(1 / 4)])


def test_cosine() -> None:
    got = rates(6, name="cosine", warmup_steps=2)
    half = math.sqrt(0.5)
    assert got == pytest.approx([0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_cosine_with_a_floor() -> None:
    got = rates(6, name="cosine", warmup_steps=2, min_lr_ratio=0.1)
    half = math.sqrt(0.5)
    wanted = [0.1 + 0.9 * (1 + half) / 2, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 - half) / 2]
    assert got == pytest.approx([0.5, 1, 1, *wanted])


def test_constant() -> None:
    assert rates(5, name="constant", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_warm_up_stable_decay() -> None:
    steps = rates(10, name="wsd", warmup_steps=2, decay_steps=4)
    assert steps == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    share = rates(10, name="wsd", warmup_proportion=0.2, decay_proportion=0.4)
    assert share == steps
    assert rates(20, name="wsd")[17:] == pytest.approx([1, 1, 0.5])  # a tenth by default


def test_warm_up_stable_decay_by_one_minus_the_root() -> None:
    got = rates(8, name="wsd", decay_steps=4, decay_type="1-sqrt", min_lr_ratio=0.2)
    fall = [1 - math.sqrt(share) for share in (0, 1 / 4, 2 / 4, 3 / 4)]
    assert got == pytest.approx([1, 1, 1, 1, *(0.2 + 0.8 * left for left in fall)])


def test_a_decay_longer_than_what_the_warm_up_leaves_is_all_there_is() -> None:
    got = rates(10, name="wsd", warmup_steps=6, decay_steps=8)
    assert got == pytest.approx(rates(10, name="linear", warmup_steps=6))


def test_a_warm_up_can_start_above_zero() -> None:
    got = rates(6, name="constant", warmup_steps=4, warmup_min_ratio=0.2)
    assert got == pytest.approx([0.4, 0.6, 0.8, 1, 1, 1])


def test_nvidia_s_recipe_jumps_down_when_the_warm_up_ends() -> None:
    got = rates(7038, name="nvidia_polynomial", warmup_proportion=0.2843, degree=0.5)
    # Its warm-up is a share that is not rounded to steps, and each update counts as made.
    assert got[0] == pytest.approx(1 / (0.2843 * 7038))
    assert got[1999] == pytest.approx(2000 / (0.2843 * 7038))
    assert got[2000] == pytest.approx(math.sqrt(1 - 2001 / 7038))
    assert got[2000] == pytest.approx(0.846, abs=5e-4)
    assert got[5000] == pytest.approx(math.sqrt(1 - 5001 / 7038))
    assert got[7037] == 0.0


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.25, 1.0])
def test_nvidia_s_rates_are_those_of_its_scheduler(warmup: float) -> None:
    """PolyWarmUpScheduler sets the rate before the update, by the number that the update gets."""
    got = rates(40, name="nvidia_polynomial", warmup_proportion=warmup, degree=0.5)
    shares = [number / 40 for number in range(1, 41)]
    wanted = [share / warmup if share < warmup else (1 - share) ** 0.5 for share in shares]
    assert got == pytest.approx(wanted, abs=1e-12)


def test_the_plain_polynomial_has_no_jump_there() -> None:
    got = rates(7038, name="polynomial", warmup_proportion=0.2843, degree=0.5)
    assert got[2000] == got[2001] == 1.0
    assert got[2002] == pytest.approx(math.sqrt(5036 / 5037))


def test_steps_win_over_the_proportion() -> None:
    assert rates(100, warmup_proportion=0.5, warmup_steps=3)[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates(100, warmup_proportion=0.5, warmup_steps=0)[0] == 1.0
    assert rates(100, warmup_proportion=0.5).index(1.0) == 49


def test_academic_budget_s_schedule_by_time() -> None:
    """Its own form: elapsed / warm-up, then (total - elapsed) / (total - warm-up)."""
    got = by_time([0, 1.5, 3, 6, 29.5, 53, 100, 101], name="linear", warmup_proportion=0.06)
    assert got == pytest.approx([0, 0.25, 0.5, 1, 0.75, 0.5, 0, 0])


def test_cramming_s_triangle_by_time() -> None:
    """From a quarter of the peak up to it at three quarters of the time, then to nothing."""
    options = {"name": "linear", "warmup_proportion": 0.75, "warmup_min_ratio": 0.25}
    seconds = [0.0, 10.0, 25.0, 50.0, 74.9, 75.0, 90.0, 100.0]
    source = [min(0.25 + s * 0.75 / 0.75 / 100, 1 / 0.25 - s / (100 * 0.25)) for s in seconds]
    assert by_time(seconds, **options) == pytest.approx(source)
    assert source[2:] == pytest.approx([0.5, 0.75, 0.999, 1, 0.4, 0])


def test_lengths_by_time_are_not_rounded() -> None:
    got = by_time([99.4, 99.6, 99.8], name="wsd", decay_proportion=0.005)
    assert got == pytest.approx([1, 0.8, 0.4])


def test_the_rate_follows_the_steps_or_the_time() -> None:
    budgets = {"peak_lr": 0.01, "total_steps": 10, "max_train_s": 100.0}
    assert rate(ScheduleConfig(), 5, 75.0, **budgets) == pytest.approx(0.005)
    assert rate(ScheduleConfig(by="time"), 5, 75.0, **budgets) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("nvidia_polynomial", "paddle_linear")]
)
def test_every_schedule_begins_above_zero_and_stays_within_the_peak(name: str) -> None:
    for total, warmup in [(1, 0), (1, 1), (2, 1), (50, 7), (50, 0), (50, 50)]:
        got = rates(total, name=name, warmup_steps=warmup)
        assert all(0 < rate <= 1 for rate in got), (total, warmup, got)
        assert max(got) == 1.0
        assert got[:warmup] == sorted(got[:warmup])
        assert got[warmup:] == sorted(got[warmup:], reverse=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.95, 1.0])
def test_a_schedule_by_time_is_the_limit_of_ever_shorter_steps(name: str, warmup: float) -> None:
    options = {"name": name, "warmup_proportion": warmup, "warmup_min_ratio": 0.3}
    shares = [0.0, 0.02, 0.5, 0.9, 0.97, 0.999]
    by_steps = ScheduleConfig(**options)  # type: ignore[arg-type]
    wanted = [factor(by_steps, round(1e6 * share), total=1e6) for share in shares]
    got = by_time([100 * share for share in shares], **options)
    one_step = 1 / (0.05 * 1e6)  # of the steepest fall: some forms count the update itself
    assert got == pytest.approx(wanted, abs=1.001 * one_step)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_longer_than_the_run_never_reaches_the_peak(name: str) -> None:
    assert rates(3, name=name, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_after_the_last_step_the_floor_is_left(name: str, floor: float) -> None:
    config = ScheduleConfig(name=name, warmup_steps=2, min_lr_ratio=floor)  # type: ignore[arg-type]
    assert factor(config, 10, total=10) == pytest.approx(floor, abs=1e-12)
    assert factor(config, 15, total=10) == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_proportion": 1.5}, "warmup_proportion: wanted 0 to 1, got 1.5"),
        ({"warmup_min_ratio": -0.5}, "warmup_min_ratio: wanted 0 to 1, got -0.5"),
        ({"min_lr_ratio": math.nan}, "min_lr_ratio: wanted 0 to 1, got nan"),
        ({"warmup_steps": -1}, "warmup_steps: wanted at least 0, got -1"),
        ({"name": "wsd", "decay_steps": -1}, "decay_steps: wanted at least 0, got -1"),
        ({"degree": 0.0}, "degree: wanted above 0, got 0.0"),
        (
            {"by": "time", "warmup_steps": 5},
            "warmup_steps: this schedule goes by time; give warmup_proportion instead",
        ),
        (
            {"by": "time", "name": "wsd", "decay_steps": 5},
            "decay_steps: this schedule goes by time; give decay_proportion instead",
        ),
        ({"decay_steps": 5}, "decay_steps: schedule linear has none; remove it"),
        (
            {"name": "cosine", "decay_type": "1-sqrt"},
            "decay_type: schedule cosine has none; remove it",
        ),
        (
            {"name": "linear", "degree": 0.5},
            "degree: schedule linear has none; remove it",
        ),
        (
            {"name": "constant", "min_lr_ratio": 0.1},
            "min_lr_ratio: schedule constant has none; remove it",
        ),
    ],
)
def test_values_that_mean_nothing_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_defaults_are_written_out_and_read_again() -> None:
    for name in NAMES:
        config = ScheduleConfig(name=name)  # type: ignore[arg-type]
        assert ScheduleConfig(**dataclasses.asdict(config)) == config
