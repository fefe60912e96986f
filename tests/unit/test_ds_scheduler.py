"""DeepSpeed's schedulers: our rates beside those of its own classes, update by update."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from zerobert.ds_scheduler import scheduler_config
from zerobert.errors import ConfigError

LR = 3e-3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Its classes warn of the first rate, which the engine asks for too."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def deepspeed_rates(kind: str, params: dict[str, Any], num_updates: int) -> list[float]:
    """What each update uses when the scheduler advances after it, as DeepSpeed's engine does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    rates = []
    for _ in range(num_updates):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


WARMUPS: list[dict[str, Any]] = [
    {},
    {"warmup_num_steps": 20},
    {"warmup_num_steps": 20, "warmup_type": "linear"},
    {"warmup_num_steps": 1},
    {"warmup_num_steps": 2, "warmup_type": "linear"},
    {"warmup_num_steps": 90},
]
PEAKS: list[dict[str, Any]] = [
    {},
    {"warmup_max_lr": 0.02},
    {"warmup_min_lr": 1e-4, "warmup_max_lr": 0.02},
    {"warmup_min_lr": 1e-2},
]
TOTALS: list[dict[str, Any]] = [{"total_num_steps": total} for total in (1, 21, 100, 300)]
RATIOS: list[dict[str, Any]] = [
    {},
    {"warmup_min_ratio": 0.1},
    {"cos_min_ratio": 0.2, "warmup_min_ratio": 0.05},
    {"cos_min_ratio": 0.0},
]
CASES = (
    [("WarmupLR", a | b) for a in WARMUPS for b in PEAKS]
    + [("WarmupDecayLR", a | b | c) for a in WARMUPS for b in PEAKS for c in TOTALS]
    + [("WarmupCosineLR", a | b | c) for a in WARMUPS for b in RATIOS for c in TOTALS]
)


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_every_update_has_deepspeed_s_rate(kind: str, params: dict[str, Any]) -> None:
    config = scheduler_config({"type": kind, "params": params}, "scheduler")
    wanted = deepspeed_rates(kind, params, 150)
    got = [config.rate(step, LR) for step in range(150)]
    assert got == pytest.approx(wanted, rel=1e-12, abs=1e-18)


def test_the_first_two_updates_have_the_lowest_rate() -> None:
    params = {"warmup_num_steps": 10, "warmup_type": "linear", "warmup_max_lr": 1.0}
    config = scheduler_config({"type": "WarmupLR", "params": params}, "scheduler")
    got = [config.rate(step, LR) for step in (0, 1, 2, 3, 10, 11, 12)]
    assert got == pytest.approx([0, 0, 0.1, 0.2, 0.9, 1, 1])


def test_which_rate_is_the_peak() -> None:
    def peak(kind: str, **params: object) -> float:
        params = {"warmup_num_steps": 2, **params}
        config = scheduler_config({"type": kind, "params": params}, "scheduler")
        return max(config.rate(step, LR) for step in range(10))

    assert peak("WarmupLR") == LR
    assert peak("WarmupLR", warmup_max_lr=0.5) == 0.5
    assert peak("WarmupDecayLR", total_num_steps=10) == 0.001
    assert peak("WarmupDecayLR", total_num_steps=10, warmup_max_lr=0.5) == 0.5


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "OneCycle"}, r"x\.type: OneCycle is not served; use .*\"warmup_proportion\": 0"),
        ({"type": "LRRangeTest"}, r"x\.type: LRRangeTest is not served; start short runs"),
        ({"type": "StepLR"}, r"x\.type: wanted one of WarmupLR, .*WarmupCosineLR, got 'StepLR'"),
        ({"type": ["WarmupLR"]}, r"x\.type: wanted one of WarmupLR"),
        ({}, r"x\.type: wanted one of WarmupLR, .*got None"),
        ([], r"x: wanted an object \{\.\.\.\}, got \[\]"),
        ({"type": "WarmupLR", "parms": {}}, "x: unknown key 'parms'"),
        ({"type": "WarmupLR", "params": {"total_num_steps": 5}}, "unknown key 'total_num_steps'"),
        ({"type": "WarmupDecayLR", "params": {}}, r"x\.params: missing total_num_steps"),
        ({"type": "WarmupCosineLR"}, r"x\.params: missing total_num_steps"),
        (
            {"type": "WarmupLR", "params": {"warmup_type": "cosine"}},
            r"warmup_type: wanted one of 'log', 'linear', got 'cosine'",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 0}},
            "warmup_num_steps: wanted at least 1, got 0",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_max_lr": -1.0}},
            "warmup_max_lr: must not be negative, got -1.0",
        ),
    ],
)
def test_what_is_not_served_is_named(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler_config(section, "x")
