"""Several tasks side by side: which there is data for, and their results beside published ones."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data import find_in_root, glue_roots
from finetune.tasks import TASKS, Task
from zerobert.errors import DataError
from zerobert.manifest import write_json
from zerobert.page import Table, format_table


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
    """One line a task: its metrics (the median over seeds), the majority class, PaddleNLP."""
    rows = [_row(result) for result in results]
    header = ("task", "metrics", "ours", "majority class", "PaddleNLP", "seeds", "steps")
    return format_table(Table(title=title, header=header, rows=rows))


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    published = {
        task.name: dict(zip(task.reported, task.published, strict=False)) for task in TASKS
    }.get(result["task"], {})
    scores = result.get("median_metrics", result["metrics"])
    return (
        result["task"],
        "/".join(scores) or "-",
        "/".join(f"{100 * value:.2f}" for value in scores.values()) or "predictions only",
        _percent(result["majority_baseline"]),
        "/".join(f"{published[name]:.2f}" for name in scores if name in published) or "-",
        str(len(result.get("all", [result]))),
        str(result["steps"]),
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
    scored = [result.get("median", result["value"]) for result in results if result["metrics"]]
    write_json(
        path,
        {
            "average": sum(scored) / len(scored) if scored else None,
            "num_scored_tasks": len(scored),
            "is_finished": is_finished,
            "tasks": {result["task"]: dict(result) for result in results},
        },
    )
