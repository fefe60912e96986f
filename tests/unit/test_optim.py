"""LAMB against a float64 reference on whole tensors, parameter groups, the optimizer section."""

import math

import pytest
import torch
from torch import nn

from tests.optimizer_references import ReferenceLamb
from zerobert.errors import ConfigError
from zerobert.optim import Lamb, build_optimizer, optimizer_config, parameter_groups


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
        ({"type": "Lamb", "params": {"lr": -1}}, r"params\.lr: wanted a number from 0 on, got -1"),
        (
            {"type": "Lamb", "params": {"max_grad_norm": -1}},
            "max_grad_norm: wanted a number from 0",
        ),
        ({"type": "AdamW", "params": {"lr": math.nan}}, "lr: wanted a number from 0 on, got nan"),
        ({"type": "AdamW", "params": {"eps": math.inf}}, "eps: wanted a number from 0 on, got inf"),
        ({"type": "Lamb", "params": {"max_coeff": 0}}, "max_coeff: wanted above 0, which is"),
        ({"type": "Lamb", "params": {"min_coeff": 2, "max_coeff": 1}}, "max_coeff: wanted above 2"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam_w_mode: false is not served"),
        ({"type": "AdamW", "params": {"bias_correction": False}}, "bias_correction: false"),
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
