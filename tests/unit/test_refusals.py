"""Configurations that DeepSpeed refuses end in one line, an unfit loss scale ends the run."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.ranks import run_ranks

WORKER = REPOSITORY / "tests" / "workers" / "refusals.py"
STAGES = (0, 1, 2, 3)


def run(cases: list[dict[str, Any]], folder: Path, *, steps: int = 0) -> list[dict[str, Any]]:
    asked, found = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps([{"ds": case, "steps": steps} for case in cases]))
    run_ranks(WORKER, 1, str(asked), str(found))
    findings: list[dict[str, Any]] = json.loads(found.read_text())
    return findings


def at_stages(**fp16: Any) -> list[dict[str, Any]]:
    return [
        {"fp16": {"enabled": True, **fp16}, "zero_optimization": {"stage": stage}}
        for stage in STAGES
    ]


def test_what_deepspeed_refuses_is_one_line(tmp_path: Path) -> None:
    cases = [
        {"zero_optimization": {"stage": 1, "foo": 1}},
        {"amp": {"enabled": True}},
        {"communication_data_type": "fp8"},
    ]
    for finding, words in zip(
        run(cases, tmp_path), ("foo", "AMP", "communication_data_type"), strict=True
    ):
        name, message = finding["error"]
        assert name == "ConfigError"
        assert message.startswith("DeepSpeed refuses the configuration: ")
        assert words in message
        assert "\n" not in message


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="is installed")
def test_a_monitor_whose_package_is_missing_is_one_line(tmp_path: Path) -> None:
    (finding,) = run([{"tensorboard": {"enabled": True}}], tmp_path)
    name, message = finding["error"]
    assert name == "MissingDependencyError"
    assert "tensorboard" in message
    assert "\n" not in message


def test_a_static_loss_scale_that_never_fits_ends_the_run(tmp_path: Path) -> None:
    for finding in run(at_stages(loss_scale=2.0**24), tmp_path, steps=12):
        assert finding["skipped"] == list(range(1, 10))  # the tenth raises
        name, message = finding["error"]
        assert name == "TrainingDivergedError"
        assert "the last 10 steps" in message
        assert "fp16.loss_scale of 1.67772e+07" in message


def test_a_static_loss_scale_that_fits_trains(tmp_path: Path) -> None:
    for finding in run(at_stages(loss_scale=2.0**8), tmp_path, steps=12):
        assert (finding["error"], finding["skipped"][-1]) == (None, 0)


@pytest.mark.parametrize(
    "more", [{}, {"hysteresis": 3}, {"hysteresis": 2, "consecutive_hysteresis": True}], ids=str
)
def test_hysteresis_is_the_same_at_every_stage(tmp_path: Path, more: dict[str, Any]) -> None:
    cases = at_stages(initial_scale_power=20, loss_scale_window=3, **more)
    first, *others = run(cases, tmp_path, steps=12)
    patience = more.get("hysteresis", 2)
    assert first["scales"][:patience] == [2.0**20] * (patience - 1) + [2.0**19]
    assert all(other == first for other in others)
