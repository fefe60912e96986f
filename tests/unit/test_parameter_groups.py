"""Which parameter trains at which rate and with which weight decay."""

import dataclasses

import pytest
import torch

from zerobert.config import BertConfig
from zerobert.model import BertForSequenceClassification
from zerobert.optim import parameter_groups

CONFIG = BertConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
)


@pytest.fixture
def model() -> BertForSequenceClassification:
    return BertForSequenceClassification(CONFIG, 2)


def test_biases_and_norms_are_not_decayed(model: BertForSequenceClassification) -> None:
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["name"], no_decay["name"]) == ("decay", "no_decay")
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept = {names[parameter] for parameter in no_decay["params"]}
    assert kept == {name for name in names.values() if name.endswith(("bias", "LayerNorm.weight"))}
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


def test_the_rate_falls_from_the_head_to_the_embeddings(
    model: BertForSequenceClassification,
) -> None:
    groups = parameter_groups(model, 0.1, 0.5)
    factor_of = {parameter: group["lr_factor"] for group in groups for parameter in group["params"]}
    wanted = {
        "bert.embeddings": 1 / 16,
        "bert.encoder.layer.0": 1 / 8,
        "bert.encoder.layer.1": 1 / 4,
        "bert.encoder.layer.2": 1 / 2,
        "bert.pooler": 1,
        "classifier": 1,
    }
    for name, parameter in model.named_parameters():
        (part,) = [part for part in wanted if name.startswith(part + ".")]
        assert factor_of[parameter] == wanted[part], name


def test_layers_are_cut_out_of_the_two_groups(model: BertForSequenceClassification) -> None:
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    plain = {group["name"]: group for group in parameter_groups(model, 0.1)}
    groups = parameter_groups(model, 0.1, 0.9)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names) == 10
    for kind, whole in plain.items():
        parts = [group for group in groups if group["name"].rsplit("_", 1)[0] == kind]
        assert {group["weight_decay"] for group in parts} == {whole["weight_decay"]}
        got = [id(parameter) for group in parts for parameter in group["params"]]
        assert sorted(got) == sorted(map(id, whole["params"]))


def test_a_final_norm_belongs_above_the_layers() -> None:
    model = BertForSequenceClassification(dataclasses.replace(CONFIG, layer_norm_position="pre"), 2)
    groups = parameter_groups(model, 0.1, 0.5)
    (factor,) = [
        group["lr_factor"]
        for group in groups
        if any(parameter is model.bert.encoder.LayerNorm.weight for parameter in group["params"])
    ]
    assert factor == 1


def test_an_optimizer_keeps_the_factor(model: BertForSequenceClassification) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 0.5), lr=1.0)
    assert {group["lr_factor"] for group in optimizer.param_groups} == {
        0.5**depth for depth in range(5)
    }
