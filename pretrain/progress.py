"""A line for people on how a training does; scripts read metrics.jsonl or PaddleNLP's line."""

import math
from collections.abc import Mapping


def progress_line(
    step: int,
    metrics: Mapping[str, float | None],
    *,
    total_steps: int | None,
    max_train_s: float | None,
    accuracy: float | None,
) -> str:
    """How far a run is and how it does; what is not known is left out.

    Args:
        metrics: of metrics.jsonl.
        total_steps, max_train_s: the limit that is met first ends the run; None for no such limit.
        accuracy: share of held-out masked words that the last evaluation found.
    """
    done, left_s = _progress(step, metrics["elapsed_s"] or 0.0, total_steps, max_train_s)
    of = "" if total_steps is None else f"/{total_steps}"
    parts = [f"{done:.1%}" if done is not None else None, f"step {step}{of}"]

    def part(key: str, form: str) -> None:
        value = metrics.get(key)
        parts.append(None if value is None else form.format(value))

    def rate(key: str, unit: str) -> None:
        value = metrics.get(key)
        parts.append(None if value is None else f"{_short(value)} {unit}")

    part("train/mlm_loss", "mlm {:.4f}")
    part("train/nsp_loss", "nsp {:.4f}")
    parts.append(None if accuracy is None else f"held-out accuracy {accuracy:.1%}")
    part("train/lr", "lr {:.3g}")
    part("train/grad_norm", "grad {:.3g}")
    rate("perf/samples_per_s", "samples/s")
    rate("perf/tokens_per_s", "tokens/s")
    part("perf/mfu", "mfu {:.1%}")
    part("perf/data_wait_frac", "data wait {:.1%}")
    memory = metrics.get("perf/peak_memory_bytes")
    parts.append(None if memory is None else f"{memory / 2**30:.1f} GiB")
    parts.append(None if left_s is None else f"{format_duration(left_s)} left")
    return "  " + " | ".join(part for part in parts if part is not None)


def format_duration(seconds: float) -> str:
    """`0:07`, `59:59`, `1:00:00`, `2d 03:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: float) -> str:
    """Three figures: `0.0712`, `48.2`, `4,871`, `48.2k`."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k" if value >= 99_950 else f"{value / 1000:.1f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _progress(
    step: int, elapsed_s: float, total_steps: int | None, max_train_s: float | None
) -> tuple[float | None, float | None]:
    """The share that is done and the seconds that are left, by the limit that comes first.

    The pace is that of the whole run, evaluations and saves included.
    """
    share, left_s = 0.0, math.inf
    if total_steps is not None:
        share = step / total_steps
        left_s = elapsed_s / step * (total_steps - step)
    if max_train_s is not None:
        share = max(share, min(1.0, elapsed_s / max_train_s))
        left_s = min(left_s, max(0.0, max_train_s - elapsed_s))
    return (share, left_s) if left_s < math.inf else (None, None)
