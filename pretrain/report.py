"""A run folder -> its page: losses, accuracies, rate, gradients, speed, and the resolved config.

Several runs are laid over each other: `python pretrain/report.py runs/a runs/b --output both.html`.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zerobert.errors import ArgumentParser, ConfigError, run_script
from zerobert.manifest import write_text
from zerobert.page import Chart, Series, Table, Text, render_page
from zerobert.tracking import METRICS_NAME, read_metrics

CONFIG_NAME = "config.json"
REPORT_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class _ChartRow:
    """One chart: which metrics it lays over each other, and what the legend calls them."""

    title: str
    y_label: str
    metrics: dict[str, str]


_CHARTS = (
    _ChartRow(
        title="Masked-LM loss",
        y_label="nats a masked token",
        metrics={"train/mlm_loss": "training", "eval/mlm_loss": "held-out"},
    ),
    _ChartRow(
        title="Masked-LM accuracy", y_label="share right", metrics={"eval/mlm_accuracy": "held-out"}
    ),
    _ChartRow(
        title="Next-sentence loss", y_label="nats a pair", metrics={"train/nsp_loss": "training"}
    ),
    _ChartRow(
        title="Next-sentence accuracy",
        y_label="share right",
        metrics={"eval/nsp_accuracy": "held-out"},
    ),
    _ChartRow(title="Whole loss", y_label="nats", metrics={"train/loss": "training"}),
    _ChartRow(title="Learning rate", y_label="rate", metrics={"train/lr": "rate"}),
    _ChartRow(
        title="Gradient norm", y_label="norm", metrics={"train/grad_norm": "before clipping"}
    ),
    _ChartRow(
        title="Speed", y_label="samples a second", metrics={"perf/samples_per_s": "all devices"}
    ),
    _ChartRow(
        title="Model FLOPs utilization",
        y_label="share of peak",
        metrics={"perf/mfu": "utilization"},
    ),
    _ChartRow(
        title="Waiting for data",
        y_label="share of time",
        metrics={"perf/data_wait_frac": "waiting"},
    ),
    _ChartRow(title="Loss scale", y_label="factor", metrics={"train/loss_scale": "scale"}),
    _ChartRow(title="Skipped steps", y_label="steps", metrics={"train/skipped_steps": "overflows"}),
)


@dataclass(frozen=True, kw_only=True)
class _Run:
    name: str
    config: str | None
    metrics: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; lines without it, and nulls, are left out."""
        lines = [line for line in self.metrics if isinstance(line.get(key), int | float)]
        return [line["step"] for line in lines], [line[key] for line in lines]


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Draw the page of one or several pretraining runs; returns `output`.

    Raises:
        ConfigError: a folder is not that of a run.
        DataError: a run's metrics can't be read, or the page can't be written.
    """
    runs = [
        _read_run(folder, name) for folder, name in zip(run_dirs, _names(run_dirs), strict=True)
    ]
    charts = [chart for row in _CHARTS if (chart := _chart(row, runs)).series]
    configs = [
        Text(title=f"Config of {run.name}", body=run.config)
        for run in runs
        if run.config is not None
    ]
    write_text(
        output, render_page(", ".join(_names(run_dirs)), [_summary(runs), *charts, *configs])
    )
    return output


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two folders have the same name."""
    names = [folder.resolve().name for folder in run_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in run_dirs]


def _read_run(folder: Path, name: str) -> _Run:
    if not (folder / METRICS_NAME).is_file():
        raise ConfigError(
            f"{folder}: wanted the output folder of a pretraining run, found no {METRICS_NAME}; "
            "`bash launch.sh pretrain` makes one"
        )
    config = folder / CONFIG_NAME
    return _Run(
        name=name,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        metrics=read_metrics(folder / METRICS_NAME),
    )


def _chart(row: _ChartRow, runs: Sequence[_Run]) -> Chart:
    series = []
    for run in runs:
        for key, label in row.metrics.items():
            steps, values = run.curve(key)
            if values:
                name = label if len(runs) == 1 else f"{run.name}, {label}"
                series.append(Series(name=name, xs=steps, ys=values))
    return Chart(title=row.title, x_label="step", y_label=row.y_label, series=series)


def _summary(runs: Sequence[_Run]) -> Table:
    header = (
        "run",
        "steps",
        "samples",
        "time",
        "training MLM loss",
        "held-out MLM loss",
        "held-out MLM accuracy",
        "samples/s",
    )
    return Table(title="Where it stands", header=header, rows=[_summary_row(run) for run in runs])


def _summary_row(run: _Run) -> list[str]:
    def last(key: str, form: str) -> str:
        values = run.curve(key)[1]
        return format(values[-1], form) if values else "-"

    speeds = run.curve("perf/samples_per_s")[1]
    seconds = run.curve("elapsed_s")[1]
    return [
        run.name,
        last("step", ",.0f"),
        last("samples", ",.0f"),
        f"{seconds[-1] / 60:.1f} min" if seconds else "-",
        last("train/mlm_loss", ".4f"),
        last("eval/mlm_loss", ".4f"),
        last("eval/mlm_accuracy", ".2%"),
        f"{statistics.median(speeds):,.1f}" if speeds else "-",
    ]


def main() -> int:
    parser = ArgumentParser(
        description="Draw the curves of one or several pretraining runs as one HTML page.",
        epilog="example: bash launch.sh report runs/bert_base",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, help=f"the page to write (default: {REPORT_NAME} in the first RUN)"
    )
    args = parser.parse_args()
    print(write_report(args.runs, args.output or args.runs[0] / REPORT_NAME))
    return 0


if __name__ == "__main__":
    run_script(main)
