"""Every JSON in `ds_configs/`: it resolves, it trains, and its numbers are those of its source."""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain import experiment
from pretrain.config import (
    PretrainConfig,
    resolve,
    resolved_json,
    total_steps,
)
from pretrain.run import parse_args
from tests.conftest import REPOSITORY
from tests.ranks import run_ranks
from zerobert.config import SIZES, load_json
from zerobert.ds_config import BatchSizes, batch_sizes
from zerobert.optim import AdamWParams, LambParams
from zerobert.shards import write_shard
from zerobert.tokenizer import SPECIAL_TOKENS

RECIPES = {path.stem: path for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))}
WORKER = REPOSITORY / "tests" / "workers" / "recipes.py"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "hipcc", "ninja", "cmake")
# What a recipe is shrunk to; all else is its own.
MICRO, ACCUMULATION = 2, 3
SHRUNK = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
VOCAB = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(40))]


def recipe(name: str, *flags: str) -> PretrainConfig:
    return resolve(parse_args(["--deepspeed_config", str(RECIPES[name]), *flags]))


def shrink(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe on a model and batches that two cores train in no time."""
    raw["train_micro_batch_size_per_gpu"] = MICRO
    if "train_batch_size" in raw:
        raw["train_batch_size"] = MICRO * ACCUMULATION
    bert = raw.setdefault("bert", {})
    model = {key: value for key, value in bert.get("model", {}).items() if key != "size"}
    bert["model"] = {**model, **SHRUNK}
    bert.get("kernels", {}).pop("compile", None)  # there is no compiler
    return raw


def write_rows(path: Path, num_rows: int) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(len(SPECIAL_TOKENS), len(VOCAB), (num_rows, 16))
    ids[:, 0] = VOCAB.index("[CLS]")
    positions = np.tile([2, 5, 0], (num_rows, 1))
    rows = {
        "input_ids": ids.astype("i4"),
        "input_mask": np.ones((num_rows, 16), "i1"),
        "segment_ids": (np.arange(16) > 7).astype("i1") * np.ones((num_rows, 1), "i1"),
        "masked_lm_positions": positions.astype("i4"),
        "masked_lm_ids": np.where(positions > 0, 7, 0).astype("i4"),
        "next_sentence_labels": generator.integers(0, 2, num_rows).astype("i1"),
    }
    write_shard(path, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """What two steps of every recipe did, in a process that finds no compiler but our traps."""
    for name in ("shrunk", "shards", "traps"):
        (folder / name).mkdir()
    for name, path in RECIPES.items():
        (folder / "shrunk" / f"{name}.json").write_text(json.dumps(shrink(load_json(path))))
    write_rows(folder / "shards" / "toy_training_0.hdf5", 13)
    (folder / "shards" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    for name in COMPILERS:
        trap = folder / "traps" / name
        trap.write_text(f'#!/bin/sh\necho "$0 $*" >> {folder}/started\nexit 1\n')
        trap.chmod(trap.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'traps'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        for name in ("CC", "CXX"):
            patch.delenv(name, raising=False)
        flags = (folder / "shrunk", folder / "shards", folder / "findings.json")
        run_ranks(WORKER, 1, *map(str, flags))
    findings: dict[str, Any] = json.loads((folder / "findings.json").read_text())
    return findings


def warm_up_rate(raw: dict[str, Any], step: int, elapsed_s: float, samples: int) -> float:
    """The rate early in a recipe's warm-up, straight from what its JSON says."""
    schedule, run = raw["bert"]["schedule"], raw["bert"]["run"]
    share = schedule.get("warmup_proportion", 0.0)
    lowest = schedule.get("warmup_min_ratio", 0.0)
    if schedule.get("by") == "time":
        done = elapsed_s / (share * run["max_train_s"])
    else:
        steps = run["max_steps"] if "max_steps" in run else run["max_samples"] / samples
        length = schedule.get("warmup_steps", share * steps)
        if schedule["name"] != "nvidia_polynomial":
            length = round(length)
        done = (step + 1) / length
    assert 0 <= done < 1, "beyond the warm-up: give this schedule a formula here"
    peak: float = raw["optimizer"]["params"]["lr"]
    return peak * (lowest + (1 - lowest) * done)


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_are_as_the_recipe_says(trained: dict[str, Any], name: str) -> None:
    raw, found = load_json(RECIPES[name]), trained[name]
    accumulation = ACCUMULATION if "train_batch_size" in raw else 1
    samples = MICRO * accumulation

    assert found["sizes"] == [samples, MICRO, accumulation]
    assert found["rows"] == [MICRO] * (2 * accumulation)
    assert [line["samples"] for line in found["metrics"]] == [samples, 2 * samples]
    for line in found["metrics"]:
        assert math.isfinite(line["train/loss"])
        assert line["train/grad_norm"] > 0
        has_nsp = raw["bert"].get("data", {}).get("nsp", True)
        assert (line["train/nsp_loss"] is not None) == found["has_nsp"] == has_nsp

    # The rate: asked for at these moments, in the optimizer at both updates, and logged.
    assert [step for step, _ in found["asked"]] == [0, 1]
    wanted = [warm_up_rate(raw, step, seconds, samples) for step, seconds in found["asked"]]
    assert [line["train/lr"] for line in found["metrics"]] == pytest.approx(wanted, rel=1e-12)
    for rates, rate in zip(found["rates"], wanted, strict=True):
        assert rates == pytest.approx([rate, rate], rel=1e-12)
    assert wanted[1] > wanted[0] >= 0

    asked = raw["optimizer"]
    assert found["optimizer"] == asked["type"]
    decayed, spared = found["groups"]
    assert (decayed["name"], spared["name"]) == ("decay", "no_decay")
    assert decayed["weight_decay"] == asked["params"]["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    for group in found["groups"]:
        assert group["betas"] == asked["params"]["betas"]
        assert group["eps"] == asked["params"]["eps"]
        if asked["type"] == "Lamb":
            assert (group["bias_correction"], group["use_nvlamb"]) == (True, False)
            assert (group["min_coeff"], group["max_coeff"]) == (None, None)
    assert found["clipping"] == raw["gradient_clipping"]
    assert found["stage"] == 0 < raw["zero_optimization"]["stage"]  # one rank, in fp32

    model = raw["bert"]["model"]
    dropouts = {model.get(f"{part}_dropout_prob", 0.1) for part in ("hidden", "attention_probs")}
    assert set(found["dropout"]) == dropouts
    assert found["model"]["layer_norm_position"] == model.get("layer_norm_position", "post")
    assert found["code"] == 143
    assert {"model_2", "state_2", "latest"} <= set(found["kept"])


def test_nothing_is_compiled_at_start(trained: dict[str, Any], folder: Path) -> None:
    assert trained.keys() == RECIPES.keys()
    started = (folder / "started").read_text().splitlines()
    # DeepSpeed's import asks, by a program of one line, whether there is a library for disk access.
    assert [line for line in started if not re.search(r" -c \S+/test\.c -o ", line)] == []
    assert not (folder / "extensions").exists()


def test_a_slow_precision_is_a_line_of_the_header(
    trained: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all("warning" not in found["facts"] for found in trained.values())  # fp32, all of them
    monkeypatch.setattr(experiment, "slow_precision", lambda device, low: f"{low} is slow here")
    flags = ["--deepspeed_config", str(folder / "shrunk" / "bert_base.json")]
    flags += ["--input_dir", str(folder / "shards"), "--precision", "bf16"]
    assert experiment.prepare(parse_args(flags)).facts()["warning"] == "bf16 is slow here"


def test_the_header_tells_what_a_run_leaves_and_how_high_its_rate_comes(folder: Path) -> None:
    flags = ["--deepspeed_config", str(folder / "shrunk" / "bert_base.json")]
    flags += ["--input_dir", str(folder / "shards"), "--max_steps", "10", "--save_steps", "4"]
    flags += ["--precision", "fp32"]
    run = experiment.prepare(parse_args([*flags, "--warmup_steps", "100"]))
    facts = run.facts()
    model, state = (f"{each * run.parameters:.2f}" for each in (4e-9, 12e-9))
    total = f"{(3 * 4e-9 + 2 * 12e-9) * run.parameters:.2f}"
    assert facts["on the disk"] == (
        f"{total} GB in the end = models, 3 x {model}, and states, 2 x {state}"
    )
    assert facts["learning rate"].endswith("at its peak, of which a run of 10 reaches 10.0%")
    reached = experiment.prepare(parse_args([*flags, "--warmup_steps", "1"])).facts()
    assert reached["learning rate"].endswith("at its peak")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_runs_again_from_its_resolved_json(
    tmp_path: Path, name: str
) -> None:
    config = recipe(name)
    model = config.model(30522)
    for world_size in {"bert_tiny_cpu": (1, 2), "tiny_cpu_1h": (1,)}.get(name, (1, 2, 8)):
        sizes = batch_sizes(config.deepspeed, world_size)
        cut = sizes.micro_samples * sizes.accumulation_steps * world_size
        assert cut == sizes.global_samples
    run = config.bert.run
    steps = total_steps(run, 10**9, batch_sizes(config.deepspeed, 1).global_samples)
    assert (steps is None) == config.goes_by_time
    path = tmp_path / "again.json"
    path.write_text(json.dumps(resolved_json(config, model)))
    again = resolve(parse_args(["--deepspeed_config", str(path)]))
    assert again.model(30522) == model
    assert again.optimizer == config.optimizer
    assert again.deepspeed == config.deepspeed
    assert resolved_json(again, model) == resolved_json(config, model)


def test_every_recipe_has_its_source_in_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "reproduce.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    for name in RECIPES:
        assert any(f"`{name}.json`" in heading for heading in headings), name


def rates_of(config: PretrainConfig, steps: int) -> list[float]:
    return [config.rate(step, 0.0, total_steps=steps) for step in range(steps)]


def hours_of(config: PretrainConfig, hours: list[float]) -> list[float]:
    return [config.rate(10**6, 3600 * hour, total_steps=None) for hour in hours]


@pytest.mark.parametrize(
    ("phase", "lr", "total", "micro", "accumulation", "steps", "warmup"),
    [
        # Source: NVIDIA DeepLearningExamples, PyTorch BERT, scripts/run_pretraining.sh: 8192
        # sequences a GPU in 128 steps and 4096 in 512, on eight of them.
        (1, 6e-3, 65536, 64, 128, 7038, 2000),
        (2, 4e-3, 32768, 8, 512, 1563, 200),
    ],
)
def test_nvidia_s_recipe_in_numbers(
    phase: int, lr: float, total: int, micro: int, accumulation: int, steps: int, warmup: int
) -> None:
    config = recipe(f"bert_large_phase{phase}")
    assert batch_sizes(config.deepspeed, 8) == BatchSizes(
        global_samples=total, micro_samples=micro, accumulation_steps=accumulation
    )
    assert config.optimizer.type == "Lamb"
    assert config.optimizer.params == LambParams(
        lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01
    )
    assert config.deepspeed["gradient_clipping"] == 1.0
    # torch's GradScaler from 2^20: twice after 2,000 good steps, half at every overflow.
    assert config.deepspeed["fp16"] == {
        "enabled": True,
        "initial_scale_power": 20,
        "loss_scale_window": 2000,
        "hysteresis": 1,
    }
    assert (config.bert.run.max_steps, config.bert.run.save_steps) == (steps, 200)
    share = {1: 0.2843, 2: 0.128}[phase]
    wanted = [
        lr * (number / steps / share if number / steps < share else (1 - number / steps) ** 0.5)
        for number in range(1, steps + 1)
    ]
    rates = rates_of(config, steps)
    assert rates == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert rates.index(max(rates)) == warmup - 1  # number 2,000 or 200: the last below the share
    model = config.model(30522)
    assert (model.num_hidden_layers, model.hidden_size) == (24, 1024)
    assert (model.num_attention_heads, model.intermediate_size) == (16, 4096)
    assert (model.hidden_dropout_prob, model.max_position_embeddings) == (0.1, 512)


def test_paddlenlp_s_recipe_in_numbers() -> None:
    config = recipe("paddle_base")
    assert batch_sizes(config.deepspeed, 4) == BatchSizes(
        global_samples=128, micro_samples=32, accumulation_steps=1
    )
    assert config.optimizer.params == AdamWParams(lr=1e-4, eps=1e-6, weight_decay=0.01)
    assert (config.deepspeed["gradient_clipping"], config.bert.run.max_steps) == (0.0, 10**6)
    moments = [1, 5000, 10_000, 10_001, 505_000, 999_999, 1_000_000]
    rates = [config.rate(number - 1, 0.0, total_steps=10**6) for number in moments]
    falling = [989_999 / 990_000, 495_000 / 990_000, 1 / 990_000, 0]
    wanted = [1e-4 * share for share in (1e-4, 0.5, 1, *falling)]
    assert rates == pytest.approx(wanted, rel=1e-9, abs=1e-18)


def test_academic_budget_s_recipe_in_numbers() -> None:
    config = recipe("academic_24h")
    assert hours_of(config, [0, 0.72, 1.44, 12.72, 24]) == pytest.approx([0, 5e-4, 1e-3, 5e-4, 0])
    assert (config.bert.data.nsp, config.deepspeed["gradient_clipping"]) == (False, 0.0)
    assert config.optimizer.params == AdamWParams(
        lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
    )
    assert batch_sizes(config.deepspeed, 8) == BatchSizes(
        global_samples=4096, micro_samples=32, accumulation_steps=16
    )
    assert config.deepspeed["fp16"] == {"enabled": True, "loss_scale_window": 1000, "hysteresis": 2}
    model = config.model(30522)
    assert (model.num_hidden_layers, model.hidden_size) == (24, 1024)
    assert (model.layer_norm_position, model.hidden_dropout_prob) == ("pre", 0.1)


def test_mosaicbert_s_recipe_in_numbers() -> None:
    config = recipe("mosaic_base")
    params = config.optimizer.params
    assert (params.lr, params.betas, params.eps) == (5e-4, (0.9, 0.98), 1e-6)
    # Theirs takes 1e-5 of a weight at the peak; torch's AdamW the rate times what is said here.
    assert params.lr * params.weight_decay == pytest.approx(1e-5)
    sizes = batch_sizes(config.deepspeed, 8)
    assert (sizes.global_samples, sizes.micro_samples) == (4096, 128)
    steps = total_steps(config.bert.run, 10**9, sizes.global_samples)
    assert steps == 70_000
    rates = rates_of(config, steps)
    moments = [rates[number] / 5e-4 for number in (0, 2099, 4199, 4200, 37_100, 69_999)]
    wanted = [1 / 4200, 0.5, 1, 1, 0.51, 0.02 + 0.98 / 65_800]
    assert moments == pytest.approx(wanted, rel=1e-9)
    model = config.model(30522)
    assert (model.attention_probs_dropout_prob, model.hidden_dropout_prob) == (0.0, 0.1)
    assert (config.bert.data.nsp, config.bert.run.seed) == (False, 17)


def test_cramming_s_recipe_in_numbers() -> None:
    config = recipe("cramming")
    assert config.optimizer.params == AdamWParams(
        lr=1e-3, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.01
    )
    assert config.deepspeed["gradient_clipping"] == 0.5
    assert batch_sizes(config.deepspeed, 1) == BatchSizes(
        global_samples=8192, micro_samples=128, accumulation_steps=64
    )
    rates = hours_of(config, [0, 6, 18, 21, 24])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 0.5e-3, 0])
    model = config.model(32768)
    assert (model.num_hidden_layers, model.hidden_size, model.layer_norm_position) == (
        *(16, 768),
        "pre",
    )
    # As many weights as their gated layer: 768 x 3072 in, half of that out.
    assert 2 * model.intermediate_size * 768 == 768 * 3072 + 1536 * 768
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0.0, 0.0)
    assert (config.bert.data.nsp, model.max_position_embeddings) == (False, 128)


def test_the_paper_s_lamb_in_numbers() -> None:
    """You et al. 2019, table of untuned LAMB: 5 / (2^1.5 x 10^3) and 1/40 for a batch of 4,096."""
    config = recipe("bert_base")
    assert config.optimizer.params.lr == pytest.approx(5 / (2**1.5 * 1000), rel=5e-3)
    rates = rates_of(config, 125_000)
    assert rates.index(max(rates)) == 125_000 // 40 - 1
    assert 125_000 * 4096 == 1_000_000 * 512
    assert config.model(30522).hidden_size == SIZES["base"]["hidden_size"]
