"""What the benchmarks compare is equal, and what they feed is what shards hold."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    engine_overhead,
    finetuning,
    gpu_all,
    loader,
    optimizer_step,
    readme,
    train_step,
)
from tests.ranks import is_alive
from zerobert.config import SIZES, BertConfig
from zerobert.shards import check_values

CONFIG = BertConfig(**{**SIZES["tiny"], "vocab_size": 2003})
STEP: dict[str, Any] = {
    "size": "tiny",
    "dtype": "fp32",
    "device": "cpu",
    "compile": False,
    "micro_batch": 2,
    "accumulation": 1,
    "seq_length": 128,
    "fill": 0.9,
    "rounds": 1,
    "steps": 1,
}


def test_all_models_compute_the_same_before_they_are_timed() -> None:
    arguments = argparse.Namespace(**STEP)
    failed: dict[str, str] = {}
    train_step.check_equal(CONFIG, arguments, failed)
    assert failed == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_takes_steps(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.SIZES, "tiny", dataclasses.asdict(CONFIG))
    monkeypatch.setattr(train_step, "least_s", lambda work, device: 1.0)
    figures = train_step.run(argparse.Namespace(**{**STEP, "dtype": dtype}))
    assert figures["failed"] == {}
    assert set(figures["samples_per_s"]) == {
        *("Hugging Face eager", "Hugging Face sdpa", "NVIDIA", "zerobert", "zerobert, padded")
    }


def test_a_model_that_differs_or_fails_is_not_timed_but_the_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("does not compile\nat line 1")

    monkeypatch.setattr(train_step.peers.NvidiaLayer, "forward", lambda self, x, bias: x)
    monkeypatch.setattr(train_step.layer_norm, "APEX_KERNEL", None)
    monkeypatch.setattr(train_step, "pack", no_kernel)
    monkeypatch.setitem(train_step.SIZES, "tiny", dataclasses.asdict(CONFIG))
    monkeypatch.setattr(train_step, "least_s", lambda work, device: 1.0)
    arguments = argparse.Namespace(**STEP)
    figures = train_step.run(arguments)
    assert set(figures["samples_per_s"]) == {
        "Hugging Face eager",
        "Hugging Face sdpa",
        "zerobert, padded",
    }
    assert figures["failed"]["zerobert"] == "RuntimeError: does not compile"
    assert figures["failed"]["NVIDIA"].startswith("ValueError: loss")
    said = train_step.tell(figures, arguments)
    assert "zerobert failed: RuntimeError: does not compile." in said
    assert "| Hugging Face sdpa |" in said


def test_a_command_that_is_cut_off_takes_its_children_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_all, "GRACE_S", 1)
    child = "import time; time.sleep(60)"
    parent = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True);"
        "time.sleep(60)"
    )
    gpu_all.run(gpu_all.python("it", 60, "-c", parent), tmp_path, 8)
    line = json.loads((tmp_path / "summary.jsonl").read_text())
    assert (line["command"], line["code"]) == ("it", "cut off")
    pid = int((tmp_path / "it.log").read_text().splitlines()[-1])
    deadline = time.monotonic() + 10  # a kill takes effect when the child's turn comes
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_each_layer_norm_that_a_gpu_has_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(dtype="bf16", device="cuda", compile=False)
    for has_both in (True, False):
        monkeypatch.setattr(train_step.layer_norm, "APEX_KERNEL", object() if has_both else None)
        monkeypatch.setattr(train_step.layer_norm, "HAS_TRITON", has_both)
        found = set(train_step.build(CONFIG, arguments))
        assert {"zerobert", "zerobert, padded", "NVIDIA"} <= found
        assert (found >= {"zerobert, apex", "zerobert, triton"}) == has_both


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_the_bytes_of_base_outside_of_products(dtype: str, width: int) -> None:
    arguments = argparse.Namespace(dtype=dtype, accumulation=2)
    per_token = 12 * (30 * 768 + 5 * 3072) + 5 * 768
    got = train_step.elementwise_bytes(BertConfig(), arguments, 1000, 110_000_000)
    assert got == 2 * width * (1000 * per_token + 150 * 2 * 30_522) + 28 * 110_000_000


def test_lambs_agree_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer_step.check_equal(CONFIG, torch.device("cpu"), [1000])
    monkeypatch.setattr(optimizer_step.lamb, "_square", lambda block: 1.0)
    with pytest.raises(ValueError, match="weights of shape"):
        optimizer_step.check_equal(CONFIG, torch.device("cpu"), [])


@pytest.mark.parametrize("seq_length", [128, 512])
def test_batches_are_like_those_of_shards(seq_length: int) -> None:
    batch = train_step.make_batch(CONFIG, 200, seq_length, 0.8, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    check_values(arrays, vocab_size=CONFIG.vocab_size, where="batch")
    assert abs(arrays["input_mask"].mean() - 0.8) < 0.03
    positions = arrays["masked_lm_positions"]
    assert ((positions > 0).sum(1) >= 1).all()
    assert positions.shape == (200, 20 if seq_length == 128 else 80)


def test_an_engine_that_trains_otherwise_is_noticed() -> None:
    wanted = {"pooler.weight": torch.zeros(10), "key.bias": torch.zeros(10)}
    other = {"pooler.weight": torch.zeros(10), "key.bias": torch.ones(10)}
    engine_overhead.check_equal({"bare loop": wanted, "engine, stage 1": other}, 1e-3)
    other["pooler.weight"][0] = 1e-2 * engine_overhead.LR
    engine_overhead.check_equal({"bare loop": wanted, "engine, stage 1": other}, 1.1e-3)
    with pytest.raises(ValueError, match=r"engine, stage 1: pooler\.weight is 1\.0e-03 rates off"):
        engine_overhead.check_equal({"bare loop": wanted, "engine, stage 1": other}, 0.9e-3)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_engine_trains_as_a_bare_loop(repository: Path, dtype: str) -> None:
    command = [sys.executable, "benchmarks/engine_overhead.py", "--quick", "--device", "cpu"]
    command += ["--dtype", dtype]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "weights are equal" in done.stderr
    assert "engine, stage 1 |" in done.stdout


def test_loaders_give_equal_batches_before_they_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = loader.write_layouts(tmp_path, loader.make_rows(4 * 1500))
    assert layouts["own"][0].chunks[0] == (1024, 128)
    assert layouts["NVIDIA's"][0].chunks[0] == (188, 16)  # h5py's choice
    monkeypatch.setattr(loader, "GLOBAL_BATCH", 256)
    for shards in layouts.values():
        loader.check_equal(shards)
        loader.check_equal(shards, rank=1, world_size=2)
    monkeypatch.setattr(loader.peers, "full_labels", lambda batch, ignored: batch["input_ids"])
    with pytest.raises(ValueError, match="not NVIDIA's"):
        loader.check_equal(layouts["own"])


def test_the_readme_has_the_figures_of_the_newest_reports() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rewritten(text) == text, "python benchmarks/readme.py rewrites it"
    assert text.count("](benchmarks/") >= 5


def test_a_ratio_is_that_of_the_medians_beside_it() -> None:
    rates = {"zerobert": [10.0, 30.0, 22.0], "NVIDIA": [5.0, 10.0, 20.0]}
    figures = {"base 0.9": {"samples_per_s": {**rates, "Hugging Face sdpa": [1.0, 1.0, 1.0]}}}
    rows = list(readme.train_step(figures, dtype="fp32"))
    assert [row[1:] for row in rows] == [
        ("22.00 rows/s", "Hugging Face's BERT: 1.00", "22.00"),
        ("22.00 rows/s", "NVIDIA's BERT: 10.00", "2.20"),
    ]
    arguments = argparse.Namespace(batch_size=32, precision="fp32", **STEP)
    arguments.dtype = "fp32"
    assert "| NVIDIA | 10.00 (5.00 to 20.00) | 2.20 |" in finetuning.tell_rates(rates, arguments, 9)
    times = {"bare loop": rates["NVIDIA"], "engine, stage 1": rates["zerobert"]}
    assert "| +120.0 % |" in engine_overhead.tell(times, arguments)
