"""What a run folder tells, finished or running: what was kept and given up, and what happened."""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from zerobert.errors import ConfigError
from zerobert.manifest import is_complete
from zerobert.tracking import (
    EVENT_KEY,
    METRICS_NAME,
    ROLLBACK,
    STATUS_NAME,
    read_metrics,
    read_status,
)

CONFIG_NAME = "config.json"
Line = Mapping[str, Any]
_MOST = 1e300  # what a curve can show, and arithmetic take
_NUM_NEAR = 100  # an event is written behind the lines that tell where it lies

# What the curves may be drawn over, beside the step: the metric, and how much of it is one unit.
_AXES = {"samples": ("samples", 1.0), "tokens": ("tokens", 1.0), "hours": ("elapsed_s", 3600.0)}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; `xs` is where, on each axis."""

    step: int
    name: str
    text: str
    xs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Lines whose steps rise, in the file's order."""

    lines: Sequence[Line]

    def values(self, key: str) -> Mapping[int, float]:
        """A metric by step; lines without it, and nulls, are left out."""
        return self._columns.get(key, {})

    @functools.cached_property
    def _columns(self) -> dict[str, dict[int, float]]:
        columns: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for line in self.lines:
            step = line["step"]
            for key, value in line.items():
                if type(value) in (int, float) and abs(value) < _MOST:  # NaN is not
                    columns[key][step] = value
        return dict(columns)

    def axes(self, steps: Iterable[int]) -> dict[str, list[float]]:
        """Where steps lie on each axis that this branch knows; between two lines in proportion."""
        wanted = list(steps)
        axes: dict[str, list[float]] = {"step": [float(step) for step in wanted]}
        for name, (known_steps, values) in self._known.items():
            axes[name] = np.interp(wanted, known_steps, values).tolist()
        return axes

    @functools.cached_property
    def _known(self) -> dict[str, tuple[list[int], list[float]]]:
        """For each axis beside the step: steps, and where they lie on it."""
        known = {name: (self.values(key), unit) for name, (key, unit) in _AXES.items()}
        return {
            name: (list(values), [value / unit for value in values.values()])
            for name, (values, unit) in known.items()
            if values
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has left so far.

    Attributes:
        config: every setting by its dotted name, as JSON.
        kept: what the run stands on.
        given_up: the ends that rollbacks cut off.
        state: of `status.json`, with the reason where it has one.
        total_steps: what the run is to come to; None where time alone ends it.
        written_at: when the last line came, `2026-01-31 23:59 UTC`; empty before the first one.
    """

    name: str
    config: Mapping[str, str]
    kept: Branch
    given_up: Sequence[Branch]
    events: Sequence[Event]
    state: str
    total_steps: int | None
    written_at: str


def read_run(folder: Path, name: str) -> Run:
    """Read what is there; a run that only began has its status and no metrics yet.

    Raises:
        ConfigError: the folder is not that of a pretraining run.
        DataError: its metrics can't be read.
    """
    metrics = folder / METRICS_NAME
    has_metrics = metrics.is_file()
    if not has_metrics and not (folder / STATUS_NAME).is_file():
        raise ConfigError(
            f"{folder}: wanted the output folder of a pretraining run, found no {METRICS_NAME}; "
            "`bash launch.sh pretrain` makes one"
        )
    status = read_status(folder)
    if not has_metrics and (status.get("kind") == "finetune" or is_complete(folder)):
        raise ConfigError(
            f"{folder} is of a fine-tuning run, whose page is made as it ends: see its report.html"
        )
    lines = read_metrics(metrics) if has_metrics else []
    kept, given_up, events = _follow(lines)
    state = str(status.get("state", "-"))
    total = status.get("total_steps")
    return Run(
        name=name,
        config=_read_config(folder / CONFIG_NAME),
        kept=Branch(lines=kept),
        given_up=[Branch(lines=end) for end in given_up],
        events=events,
        state=f"{state}: {status['error']}" if status.get("error") else state,
        total_steps=total if isinstance(total, int) else None,
        written_at=_time_of(metrics) if lines else "",
    )


def _follow(lines: Sequence[Line]) -> tuple[list[Line], list[list[Line]], list[Event]]:
    """Walk through the lines as they came: what is kept, what was given up, and the events."""
    kept: list[Line] = []
    given_up: list[list[Line]] = []
    events: list[Event] = []
    for line in lines:
        back_to = math.inf
        if EVENT_KEY in line:
            events.append(_event(line, Branch(lines=kept[-_NUM_NEAR:])))
            if line[EVENT_KEY] == ROLLBACK and isinstance(line.get("to_step"), int):
                back_to = line["to_step"]
        elif kept and line["step"] < kept[-1]["step"]:
            back_to = line["step"] - 1  # a step is made again, though nothing says why
        end = [old for old in kept if old["step"] > back_to] if back_to < math.inf else []
        if end:
            given_up.append(end)
            kept = kept[: len(kept) - len(end)]
        if EVENT_KEY not in line:
            kept.append(line)
    return kept, given_up, events


def _event(line: Line, so_far: Branch) -> Event:
    facts = {key: value for key, value in line.items() if key not in ("step", EVENT_KEY)}
    axes = so_far.axes([line["step"]])
    return Event(
        step=line["step"],
        name=str(line[EVENT_KEY]),
        text=", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()),
        xs={axis: values[0] for axis, values in axes.items()},
    )


def _read_config(path: Path) -> dict[str, str]:
    """The settings of a config that can be read; none otherwise."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return dict(_flatten(config, "")) if isinstance(config, dict) else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return {}


def _flatten(section: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _time_of(path: Path) -> str:
    moment = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M} UTC"
