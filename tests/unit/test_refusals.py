"""What DeepSpeed refuses is one line; gradients that are no numbers are left out or end the run."""

import json
import math
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.ranks import run_ranks

WORKER = REPOSITORY / "tests" / "workers" / "refusals.py"
STAGES = (0, 1, 2, 3)
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}


def run(
    cases: list[dict[str, Any]], folder: Path, *, ranks: int = 1, **more: Any
) -> list[dict[str, Any]]:
    asked, found = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps([{"ds": case, "steps": 0, **more} for case in cases]))
    run_ranks(WORKER, ranks, str(asked), str(found))
    findings: list[dict[str, Any]] = json.loads(found.read_text())
    return findings


def at_stages(**fp16: Any) -> list[dict[str, Any]]:
    return [
        {"fp16": {"enabled": True, **fp16}, "zero_optimization": {"stage": stage}}
        for stage in STAGES
    ]


def test_what_deepspeed_refuses_is_one_line(tmp_path: Path) -> None:
    cases = [
        {"zero_optimization": {"stage": 1, "allgather_bucket_size": -1}},
        {"amp": {"enabled": True}},
        {"communication_data_type": "fp8"},
    ]
    for finding, words in zip(
        run(cases, tmp_path),
        ("allgather_bucket_size", "AMP", "communication_data_type"),
        strict=True,
    ):
        name, message = finding["error"]
        assert name == "ConfigError"
        assert message.startswith("DeepSpeed refuses the configuration: ")
        assert words in message
        assert "\n" not in message


def test_a_static_loss_scale_may_fit_or_end_the_run(tmp_path: Path) -> None:
    cases = [*at_stages(loss_scale=2.0**24), *at_stages(loss_scale=2.0**8)]
    found = run(cases, tmp_path, steps=12)
    for finding in found[: len(STAGES)]:
        assert finding["skipped"] == list(range(1, 10))  # the tenth raises
        name, message = finding["error"]
        assert name == "TrainingDivergedError"
        assert "the last 10 steps" in message
        assert "fp16.loss_scale of 1.67772e+07" in message
    for finding in found[len(STAGES) :]:
        assert (finding["error"], finding["skipped"][-1]) == (None, 0)


def test_hysteresis_is_the_same_at_every_stage(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"hysteresis": 3},
        {"hysteresis": 2, "consecutive_hysteresis": True},
    ]
    common = {"initial_scale_power": 20, "loss_scale_window": 3}
    cases = [case for more in settings for case in at_stages(**common, **more)]
    found = run(cases, tmp_path, steps=12)
    for number, more in enumerate(settings):
        first, *others = found[number * len(STAGES) :][: len(STAGES)]
        patience = more.get("hysteresis", 2)
        assert first["scales"][:patience] == [2.0**20] * (patience - 1) + [2.0**19]
        for other in others:
            assert (other["scales"], other["skipped"]) == (first["scales"], first["skipped"])


# On one rank fp32 is at stage 0 whatever is asked for.
EACH = [
    {**low, "zero_optimization": {"stage": stage}, "gradient_clipping": clipping}
    for low in ({}, {"bf16": {"enabled": True}}, {"torch_autocast": AUTOCAST})
    for stage, clipping in zip(STAGES, (1.0, 0.0, 1.0, 0.0), strict=True)
]


def test_a_gradient_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    for finding in run(EACH, tmp_path, ranks=2, steps=4, infinite=[1, 3]):
        assert (finding["error"], finding["skipped"]) == (None, [1, 1, 2, 2])
        first, second, third, fourth = finding["weights"]
        assert second == third
        assert all(map(math.isfinite, fourth))
        assert not fourth or first != second != fourth


def test_gradients_that_stay_no_numbers_end_the_run(tmp_path: Path) -> None:
    for finding in run(EACH[::3], tmp_path, steps=12, infinite=list(range(2, 13))):
        assert finding["skipped"] == list(range(10))
        name, message = finding["error"]
        assert name == "TrainingDivergedError"
        assert "no finite numbers in the last 10 steps" in message
        assert "lower the learning rate" in message
