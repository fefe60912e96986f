"""A run folder -> its page: curves, evaluations, events and the resolved config.

Several runs are laid over each other: `python pretrain/report.py runs/a runs/b --output both.html`.
With `--serve` the page is served, and follows runs that go on.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pretrain.history import CONFIG_NAME, Run, read_run
from pretrain.progress import format_duration
from pretrain.serve import serve
from zerobert.errors import ArgumentParser, ConfigError, run_script
from zerobert.manifest import is_complete, write_text
from zerobert.page import PAGE_HEAD, Chart, Marker, Series, Table, render_page
from zerobert.tracking import METRICS_NAME, STATUS_NAME

REPORT_NAME = "report.html"
_REFRESH_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _ChartRow:
    """One chart: which metrics it lays over each other, and what the legend calls them.

    Attributes:
        dull: a value that says nothing as long as there is no other.
    """

    title: str
    y_label: str
    metrics: dict[str, str]
    unit: float = 1.0
    is_log: bool = False
    is_exact: bool = False
    dull: float | None = None


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
        title="Next-sentence loss",
        y_label="nats a pair",
        metrics={"train/nsp_loss": "training", "eval/nsp_loss": "held-out"},
    ),
    _ChartRow(
        title="Next-sentence accuracy",
        y_label="share right",
        metrics={"eval/nsp_accuracy": "held-out"},
    ),
    _ChartRow(title="Whole loss", y_label="nats", metrics={"train/loss": "training"}),
    _ChartRow(title="Learning rate", y_label="rate", metrics={"train/lr": "rate"}, is_exact=True),
    _ChartRow(
        title="Gradient norm", y_label="norm", metrics={"train/grad_norm": "before clipping"}
    ),
    _ChartRow(
        title="Loss scale",
        y_label="factor",
        metrics={"train/loss_scale": "scale"},
        is_log=True,
        is_exact=True,
        dull=1.0,
    ),
    _ChartRow(
        title="Skipped steps",
        y_label="steps",
        metrics={"train/skipped_steps": "overflows"},
        is_exact=True,
        dull=0.0,
    ),
    _ChartRow(
        title="Speed", y_label="samples a second", metrics={"perf/samples_per_s": "all devices"}
    ),
    _ChartRow(
        title="Tokens", y_label="tokens a second", metrics={"perf/tokens_per_s": "all devices"}
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
    _ChartRow(
        title="Memory",
        y_label="GiB, the most so far",
        metrics={"perf/peak_memory_bytes": "fullest process"},
        unit=2.0**30,
        is_exact=True,
    ),
)


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Draw the page of one or several pretraining runs; returns `output`.

    Raises:
        ConfigError: a folder is not that of a run, or the page is to lie where nothing may change.
        DataError: a run's metrics can't be read, or the page can't be written.
    """
    page = report_page(run_dirs)
    if is_complete(output.parent):  # its manifest names each file, and so it has to stay as it is
        raise ConfigError(f"{output} would lie in a finished folder; choose another --output")
    write_text(output, page)
    return output


def report_page(run_dirs: Sequence[Path], *, refresh_s: float | None = None) -> str:
    """The page of one or several pretraining runs.

    Args:
        refresh_s: how often the page asks for news of itself; None for never.

    Raises:
        ConfigError: a folder is not that of a run.
        DataError: a run's metrics can't be read.
    """
    names = _names(run_dirs)
    runs = [read_run(folder, name) for folder, name in zip(run_dirs, names, strict=True)]
    charts = [chart for row in _CHARTS if (chart := _chart(row, runs)).series]
    tables = [table for table in (_evaluations(runs), _events(runs), _settings(runs)) if table.rows]
    markers = [
        Marker(
            label=f"{run.name}, step {event.step}: {event.name}, {event.text}",
            xs=event.xs,
            group=_group(run, runs),
            color=i if len(runs) > 1 else _EVENT_COLOR,
        )
        for i, run in enumerate(runs)
        for event in run.events
    ]
    sections: list[Chart | Table] = [_summary(runs), *charts, *tables]
    return render_page(", ".join(names), sections, markers=markers, refresh_s=refresh_s)


_EVENT_COLOR = 3  # beside one run's curves


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two folders have the same name."""
    names = [folder.resolve().name for folder in run_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in run_dirs]


def _group(run: Run, runs: Sequence[Run]) -> str:
    """What the reader can hide: a run among others."""
    return run.name if len(runs) > 1 else ""


def _chart(row: _ChartRow, runs: Sequence[Run]) -> Chart:
    """Of one run, each metric has its colour; of several, each run has, and dashes tell metrics."""
    series = []
    if row.dull is not None and _is_dull(row, runs):
        return Chart(title=row.title, y_label=row.y_label, series=())
    for number, run in enumerate(runs):
        for place, (key, label) in enumerate(row.metrics.items()):
            for branch in (*run.given_up, run.kept):
                values = branch.values(key)
                if not values:
                    continue
                series.append(
                    Series(
                        name=label if len(runs) == 1 else f"{run.name}, {label}",
                        xs=branch.axes(values),
                        ys=[value / row.unit for value in values.values()],
                        group=_group(run, runs),
                        color=place if len(runs) == 1 else number,
                        is_dashed=len(runs) > 1 and place > 0,
                        is_exact=key.startswith("eval/") or row.is_exact,
                        is_aside=branch is not run.kept,
                    )
                )
    return Chart(title=row.title, y_label=row.y_label, series=series, is_log=row.is_log)


def _is_dull(row: _ChartRow, runs: Sequence[Run]) -> bool:
    values = [run.kept.values(key).values() for run in runs for key in row.metrics]
    return all(value == row.dull for each in values for value in each)


_SUMMARY: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "samples": ("samples", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "time": ("elapsed_s", format_duration),
    "training MLM loss": ("train/mlm_loss", "{:.4f}".format),
    "held-out MLM loss": ("eval/mlm_loss", "{:.4f}".format),
    "held-out MLM accuracy": ("eval/mlm_accuracy", "{:.2%}".format),
    "held-out NSP accuracy": ("eval/nsp_accuracy", "{:.2%}".format),
    "peak memory": ("perf/peak_memory_bytes", lambda size: f"{size / 2**30:.2f} GiB"),
}


def _summary(runs: Sequence[Run]) -> Table:
    """Where the runs stand; columns that no run has are left out."""
    header = ["run", "state", "last line", "step", *_SUMMARY, "samples/s", "MFU"]
    rows = [_summary_row(run) for run in runs]
    used = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return Table(
        title="Where it stands",
        header=[header[i] for i in used],
        rows=[[row[i] for i in used] for row in rows],
    )


def _summary_row(run: Run) -> list[str]:
    def last(key: str, form: Callable[[float], str]) -> str:
        values = list(run.kept.values(key).values())
        return form(values[-1]) if values else "-"

    def usual(key: str, form: Callable[[float], str]) -> str:
        values = run.kept.values(key).values()
        return form(statistics.median(values)) if values else "-"

    steps = last("step", "{:,.0f}".format)
    return [
        run.name,
        run.state,
        run.written_at or "-",
        f"{steps} of {run.total_steps:,}" if run.total_steps else steps,
        *(last(key, form) for key, form in _SUMMARY.values()),
        usual("perf/samples_per_s", "{:,.1f}".format),
        usual("perf/mfu", "{:.1%}".format),
    ]


def _evaluations(runs: Sequence[Run]) -> Table:
    """Every evaluation, the newest first."""
    metrics: dict[str, tuple[str, str]] = {
        "MLM loss": ("eval/mlm_loss", ".4f"),
        "MLM accuracy": ("eval/mlm_accuracy", ".2%"),
        "NSP loss": ("eval/nsp_loss", ".4f"),
        "NSP accuracy": ("eval/nsp_accuracy", ".2%"),
        "rows": ("eval/rows", ",.0f"),
    }
    rows = []
    for run in runs:
        found = {key: run.kept.values(key) for key, _ in metrics.values()}
        for step in sorted({step for values in found.values() for step in values}, reverse=True):
            cells = [
                format(found[key][step], form) if step in found[key] else "-"
                for key, form in metrics.values()
            ]
            rows.append([run.name, f"{step:,}", *cells])
    return Table(title="Evaluations on held-out rows", header=("run", "step", *metrics), rows=rows)


def _events(runs: Sequence[Run]) -> Table:
    """What happened on the way, skipped steps as one line a run."""
    rows = []
    for run in runs:
        rows += [[run.name, f"{each.step:,}", each.name, each.text] for each in run.events]
        rows += _skipped_steps(run)
    return Table(title="Events", header=("run", "step", "event", "what"), rows=rows)


def _skipped_steps(run: Run) -> list[list[str]]:
    counts = run.kept.values("train/skipped_steps")
    if not counts or not (total := max(counts.values())):
        return []
    last = next(step for step, count in counts.items() if count == total)
    text = f"{total:,.0f}, whose gradients were no finite numbers, the last by step {last:,}"
    return [[run.name, f"{last:,}", "skipped steps", text]]


def _settings(runs: Sequence[Run]) -> Table:
    """The resolved configs side by side."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return Table(
        title="Resolved config",
        header=("setting", *(run.name for run in runs)),
        rows=[[key, *(run.config.get(key, "-") for run in runs)] for key in keys],
        is_long=True,
    )


class _LivePage:
    """The page of runs that go on, made anew only when that does not take most of the time."""

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        self._run_dirs = run_dirs
        self._text = ""
        self._seen: list[float] = []
        self._next_s = 0.0

    def __call__(self) -> str:
        if time.monotonic() >= self._next_s and (seen := self._look()) != self._seen:
            started_s = time.monotonic()
            self._text = report_page(self._run_dirs, refresh_s=_REFRESH_S)
            ended_s = time.monotonic()
            self._seen, self._next_s = seen, ended_s + 10 * (ended_s - started_s)
        return self._text

    def _look(self) -> list[float]:
        """When each file of each run was written; 0 where there is none."""
        names = (METRICS_NAME, STATUS_NAME, CONFIG_NAME)
        paths = [folder / name for folder in self._run_dirs for name in names]
        return [path.stat().st_mtime if path.is_file() else 0.0 for path in paths]


def _is_page(path: Path) -> bool:
    """Whether a file may be written over: a page as ours begin, or none."""
    try:
        with path.open("rb") as file:
            return file.read(len(PAGE_HEAD)) == PAGE_HEAD.encode()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def main() -> int:
    parser = ArgumentParser(
        description="Draw the curves of one or several pretraining runs as one HTML page.",
        epilog="example: bash launch.sh report runs/bert_base runs/bert_base_2 --serve",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, help=f"the page to write (default: {REPORT_NAME} in the first RUN)"
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the page on this machine alone, renewed while the runs go on, until Ctrl-C",
    )
    parser.add_argument(
        "--port", type=int, help="with --serve: where; 0 for any free one (default: 8750)"
    )
    args = parser.parse_args()
    if args.serve and args.output:
        raise ConfigError("--serve writes no page: leave --output out, or --serve")
    if args.port is not None and not args.serve:
        raise ConfigError("--port is where a page is served: add --serve, or leave it out")
    if args.serve:
        page = _LivePage(args.runs)
        page()  # a wrong folder is told before anybody looks at a page
        serve(page, 8750 if args.port is None else args.port)
    if args.output is not None and not _is_page(args.output):
        raise ConfigError(f"--output {args.output} is there and is no page; choose another name")
    print(write_report(args.runs, args.output or args.runs[0] / REPORT_NAME))
    return 0


if __name__ == "__main__":
    run_script(main)
