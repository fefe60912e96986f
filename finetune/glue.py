"""Several tasks side by side: which there is data for, and their results beside published ones."""

import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data import find_in_root, glue_roots
from finetune.report import REPORT_NAME
from finetune.tasks import TASKS, Task
from zerobert.errors import DataError
from zerobert.manifest import write_json, write_text
from zerobert.page import Table, format_table, render_page

# Not in published averages over dev sets: on WNLI nothing beats the majority, AX is a diagnosis.
_APART = ("WNLI", "AX")
_PUBLISHED = {task.name: task.published_scores for task in TASKS}


def available_tasks(data_dir: Path | None) -> list[Task]:
    """The tasks whose files are here; all of them where none is and the hub can be asked.

    Raises:
        DataError: there is no data.
    """
    roots = glue_roots(data_dir)
    tasks = [task for task in TASKS if any(find_in_root(task, root) for root in roots)]
    names = {task.name for task in tasks}
    if tasks:
        return [task for task in tasks if not task.trained_on or task.trained_on in names]
    if data_dir is None and importlib.util.find_spec("datasets"):
        return list(TASKS)
    raise DataError(
        f"no GLUE task in {', '.join(map(str, roots))}: put the official folders (CoLA/, SST-2/, "
        "...) there, or name their folder with --data_dir or GLUE_DIR; or, with network: "
        "pip install datasets"
    )


def format_results(results: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """One line a task: its metrics over the seeds, the majority class, PaddleNLP."""
    rows = [_row(result) for result in results]
    header = (
        *("task", "metrics", "median", "best", "spread", "majority class", "PaddleNLP"),
        *("seeds", "steps"),
    )
    return format_table(Table(title=title, header=header, rows=rows))


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    published = _PUBLISHED.get(result["task"], {})
    names = list(result["metrics"])
    each = [_over_seeds(result, name) for name in names]
    median, best, spread = ("/".join(cells) for cells in zip(*each, strict=True)) if each else "---"
    return (
        result["task"],
        "/".join(names) or "-",
        median if each else "predictions only",
        best,
        spread if len(_runs(result)) > 1 else "-",
        _percent(result["majority_baseline"]),
        "/".join(f"{published[name]:.2f}" for name in names if name in published) or "-",
        str(len(_runs(result))),
        str(result["steps"]),
    )


def _runs(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What is known of each seed."""
    runs: Sequence[Mapping[str, Any]] = result.get("all", [result])
    return runs


def _over_seeds(result: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """A metric's median, best and spread, as they are shown."""
    values = [run["metrics"][name] for run in _runs(result) if name in run["metrics"]]
    return (
        _percent(statistics.median(values) if values else None),
        _percent(max(values, default=None)),
        _percent(max(values) - min(values) if len(values) > 1 else None),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def is_unfinished(path: Path) -> bool:
    """Whether a `glue.json` is of a run that did not come to its end."""
    try:
        return not json.loads(path.read_text(encoding="utf-8"))["is_finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_results(path: Path, results: Sequence[Mapping[str, Any]], *, is_finished: bool) -> None:
    """Write every task's result and their average, as far as the run has come.

    Raises:
        DataError: the file can't be written.
    """
    write_json(
        path,
        {
            "average": _average(results),
            "num_scored_tasks": len(_values(results)),
            "is_finished": is_finished,
            "tasks": {result["task"]: dict(result) for result in results},
        },
    )


def _values(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each task's mean over its metrics, the medians over its seeds, as GLUE's own average takes
    them; WNLI and AX stand for themselves.
    """
    scored = [result for result in results if result["metrics"] and result["task"] not in _APART]
    return [
        statistics.mean(result.get("median_metrics", result["metrics"]).values())
        for result in scored
    ]


def _average(results: Sequence[Mapping[str, Any]]) -> float | None:
    values = _values(results)
    return sum(values) / len(values) if values else None


def write_page(path: Path, results: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Write the results as a page that leads to the tasks' own, as far as the run has come.

    Raises:
        DataError: the file can't be written.
    """
    links = {result["task"]: f"{result['task']}/{REPORT_NAME}" for result in results}
    there = {task: link for task, link in links.items() if (path.parent / link).is_file()}
    write_text(path, render_page(title, [results_table(results, there)]))


def results_table(results: Sequence[Mapping[str, Any]], links: Mapping[str, str]) -> Table:
    """One line a metric: its median, best and spread over the seeds, beside published figures.

    Args:
        links: the addresses of tasks' own pages.
    """
    rows, leads = [], []
    for result in results:
        for name in result["metrics"] or ["predictions only"]:
            rows.append(_metric_row(result, name))
            leads.append(links.get(result["task"], ""))
    average = _average(results)
    return Table(
        title="Dev sets, in percent"
        + (
            ""
            if average is None
            else f"; the average of {len(_values(results))} tasks' mean metrics, without WNLI and "
            f"AX, is {100 * average:.2f}"
        ),
        header=(
            *("task", "metric", "median", "best", "spread", "majority class", "PaddleNLP"),
            *("seeds", "steps"),
        ),
        rows=rows,
        links=leads,
    )


def _metric_row(result: Mapping[str, Any], name: str) -> tuple[str, ...]:
    published = _PUBLISHED.get(result["task"], {}).get(name)
    return (
        result["task"],
        name,
        *_over_seeds(result, name),
        _percent(result["majority_baseline"] if name == result["metric"] else None),
        "-" if published is None else f"{published:.2f}",
        str(len(_runs(result))),
        f"{result['steps']:,}",
    )
