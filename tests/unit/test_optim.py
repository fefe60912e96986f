"""LAMB against a float64 reference, on whole tensors and on ZeRO's shards."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.lamb_reference import ReferenceLamb
from tests.ranks import run_ranks
from zerobert.errors import ConfigError
from zerobert.optim import Lamb, build_optimizer, optimizer_config, parameter_groups

WORKER = Path(__file__).resolve().parents[1] / "workers" / "lamb.py"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 7)
        self.LayerNorm = nn.LayerNorm(7)
        self.zeros = nn.Parameter(torch.zeros(3, 3))


OPTIONS = [
    {},
    {"bias_correction": False},
    {"use_nvlamb": True},
    {"max_coeff": 0.5, "min_coeff": 0.2},
    {"betas": (0.8, 0.95), "eps": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_lamb_follows_the_paper(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Toy()
    optimizer = Lamb(parameter_groups(model, 0.01), lr=0.1, **options)
    reference = ReferenceLamb(dict(model.named_parameters()), lr=0.1, weight_decay=0.01, **options)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        reference.step({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
    for name, parameter in model.named_parameters():
        error = (parameter.double() - reference.weights[name]).norm() / parameter.norm()
        assert error < 1e-6, name


CASES = {
    "fp32 stage 0": ({"zero_optimization": {"stage": 0}}, {}, 1e-6),
    "fp32 stage 1": ({"zero_optimization": {"stage": 1}}, {}, 1e-6),
    "fp32 stage 1, small buckets, nvlamb": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500, "overlap_comm": False}},
        {"use_nvlamb": True},
        1e-6,
    ),
    "fp32 stage 2, clamped": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 700}},
        {"max_coeff": 2.0, "min_coeff": 0.1},
        1e-6,
    ),
    "bf16 stage 1, fp32 accumulation": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {},
        1e-6,
    ),
    "bf16 stage 2": ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, {}, 1e-6),
}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_trust_ratios_are_exact_under_zero(case: str, num_ranks: int) -> None:
    ds, options, tolerance = CASES[case]
    argument = {"ds": ds, "lamb": options, "tolerance": tolerance}
    run_ranks(WORKER, num_ranks, json.dumps(argument))


def test_one_ratio_for_a_whole_shard_is_wrong() -> None:
    """What any LAMB does that takes ZeRO's flat shard for one tensor."""
    torch.manual_seed(0)
    model = Toy()
    weights = {"flat": torch.cat([p.detach().flatten() for p in (model.dense.weight, model.zeros)])}
    naive = ReferenceLamb(weights, lr=0.1, weight_decay=0.01)
    exact = ReferenceLamb(
        {"a": model.dense.weight.detach(), "b": model.zeros.detach()}, lr=0.1, weight_decay=0.01
    )
    gradient = torch.randn(44)
    naive.step({"flat": gradient})
    exact.step({"a": gradient[:35].view(7, 5), "b": gradient[35:].view(3, 3)})
    wanted = torch.cat([exact.weights["a"].flatten(), exact.weights["b"].flatten()])
    assert (naive.weights["flat"] - wanted).norm() / wanted.norm() > 1e-2


def test_biases_and_layer_norms_are_not_decayed() -> None:
    groups = parameter_groups(Toy(), 0.1)
    shapes = {group["name"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert shapes == {"decay": [(3, 3), (7, 5)], "no_decay": [(7,), (7,), (7,)]}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"type": "OneBitLamb"}, "wanted Lamb or AdamW, got 'OneBitLamb'"),
        ({}, "got None"),
        ({"type": "Lamb", "parms": {}}, "unknown key 'parms'"),
        ({"type": "Lamb", "params": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
        ({"type": "AdamW", "params": {"use_nvlamb": True}}, "unknown key 'use_nvlamb'"),
        ({"type": "Lamb", "params": {"lr": "fast"}}, "wanted float, got 'fast'"),
        ({"type": "Lamb", "params": {"betas": [0.9]}}, "two numbers"),
        ({"type": "Lamb", "params": {"lr": -1}}, "must not be negative"),
    ],
)
def test_a_wrong_optimizer_section_is_named(section: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        optimizer_config(section, "x.json: optimizer")


def test_the_json_chooses_the_optimizer() -> None:
    lamb = build_optimizer(Toy(), optimizer_config({"type": "Lamb", "params": {"lr": 1}}, "x"))
    assert isinstance(lamb, Lamb)
    assert lamb.param_groups[0]["lr"] == 1.0
    adamw = build_optimizer(Toy(), optimizer_config({"type": "adam"}, "x"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[1]["weight_decay"] == 0.0
