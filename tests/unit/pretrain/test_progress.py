"""The line for people, letter for letter."""

import pytest

from pretrain.progress import format_duration, progress_line

METRICS = {
    "samples": 30_720,
    "elapsed_s": 600.0,
    "train/loss": 8.1,
    "train/mlm_loss": 7.43021,
    "train/nsp_loss": 0.69318,
    "train/lr": 9.6e-5,
    "train/grad_norm": 1.2345,
    "train/loss_scale": 1.0,
    "perf/samples_per_s": 412.34,
    "perf/tokens_per_s": 48_213.9,
    "perf/mfu": 0.34567,
    "perf/data_wait_frac": 0.0031,
    "perf/peak_memory_bytes": 12.34 * 2**30,
}


def line(
    metrics: dict[str, float | None],
    *,
    step: int = 120,
    total_steps: int | None = 1000,
    max_train_s: float | None = None,
    accuracy: float | None = None,
) -> str:
    return progress_line(
        step, metrics, total_steps=total_steps, max_train_s=max_train_s, accuracy=accuracy
    )


def test_all_that_is_known() -> None:
    assert line({**METRICS}, accuracy=0.4123) == (
        "  12.0% | step 120/1000 | mlm 7.4302 | nsp 0.6932 | held-out accuracy 41.2% | lr 9.6e-05"
        " | grad 1.23 | 412 samples/s | 48.2k tokens/s | mfu 34.6% | data wait 0.3% | 12.3 GiB"
        " | 1:13:20 left"
    )


def test_what_is_not_known_is_left_out() -> None:
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics |= {"elapsed_s": 600.0, "train/mlm_loss": 7.4, "perf/tokens_per_s": 999.6}
    assert line(metrics) == "  12.0% | step 120/1000 | mlm 7.4000 | 1,000 tokens/s | 1:13:20 left"


@pytest.mark.parametrize(
    ("total_steps", "max_train_s", "wanted"),
    [
        (1000, None, "12.0% | step 120/1000 | 1:13:20 left"),
        (None, 1200.0, "50.0% | step 120 | 10:00 left"),
        (1000, 1200.0, "50.0% | step 120/1000 | 10:00 left"),
        (200, 86_400.0, "60.0% | step 120/200 | 6:40 left"),
        (None, 500.0, "100.0% | step 120 | 0:00 left"),
        (None, None, "step 120"),
    ],
)
def test_the_limit_that_comes_first_is_what_is_left(
    total_steps: int | None, max_train_s: float | None, wanted: str
) -> None:
    found = line({"elapsed_s": 600.0}, total_steps=total_steps, max_train_s=max_train_s)
    assert found == f"  {wanted}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.07123, "0.0712"), (48.21, "48.2"), (4871.4, "4,871"), (48_213, "48.2k"), (2.5e6, "2,500k")],
)
def test_rates_have_three_figures(value: float, text: str) -> None:
    found = line({"elapsed_s": 1.0, "perf/samples_per_s": value})
    assert f"| {text} samples/s |" in found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.6, "0:07"), (3599, "59:59"), (3600, "1:00:00"), (183_845, "2d 03:04:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
