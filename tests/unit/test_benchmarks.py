"""What the benchmarks compare is equal, and what they feed is what shards hold."""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    bench,
    engine_overhead,
    finetuning,
    gpu_all,
    loader,
    measure,
    optimizer_step,
    profile_step,
    readme,
    real_run,
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
    "dropout": None,
    "kernels": [],
    "only": None,
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
    kernels = [[("attention", "sdpa"), ("packing", False)]]
    arguments = argparse.Namespace(**{**STEP, "dtype": dtype, "kernels": kernels, "rounds": 2})
    first, figures = train_step.run(arguments)
    assert len(first["samples_per_s"]["zerobert"]) == 1  # known before the last round
    assert figures["failed"] == {}
    assert set(figures["samples_per_s"]) == {
        *("Hugging Face eager", "Hugging Face sdpa", "NVIDIA", "zerobert", "zerobert, padded"),
        "zerobert, attention=sdpa packing=false",
    }
    assert all(len(rates) == 2 for rates in figures["samples_per_s"].values())
    assert "| 214 x 128 x 384 |" in train_step.tell(figures, arguments)


def test_each_turn_begins_with_a_step_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the same batches, so that no compiler runs in those that are."""
    seen: list[Any] = []
    monkeypatch.setitem(train_step.SIZES, "tiny", dataclasses.asdict(CONFIG))
    monkeypatch.setattr(train_step, "check_equal", lambda *_: None)
    monkeypatch.setattr(train_step, "limits", lambda *_: {})
    monkeypatch.setattr(
        train_step.Contender, "step", lambda self, batches, device: seen.append(batches)
    )
    clock = itertools.count()

    def perf_counter() -> int:
        seen.append("clock")
        return next(clock)

    monkeypatch.setattr(train_step, "time", SimpleNamespace(perf_counter=perf_counter))
    changes = {"rounds": 2, "steps": 3, "only": ["zerobert"]}
    list(train_step.run(argparse.Namespace(**{**STEP, **changes})))
    one, other = seen[0], seen[6]
    assert one is not other
    assert seen == [
        *(one, "clock", one, one, one, "clock"),
        *(other, "clock", other, other, other, "clock"),
    ]


def test_the_contenders_that_are_asked_for() -> None:
    arguments = argparse.Namespace(**{**STEP, "compile": True, "only": ["zerobert, compiled"]})
    assert list(train_step.chosen(CONFIG, arguments)) == ["zerobert, compiled"]
    arguments.only = ["nosuch"]
    with pytest.raises(SystemExit, match="nosuch"):
        train_step.chosen(CONFIG, arguments)
    assert train_step.kernel_setting("compile=true") == ("compile", True)
    for word in ("compile=sdpa", "attention=nosuch", "nosuch=true"):
        with pytest.raises(argparse.ArgumentTypeError, match="should be"):
            train_step.kernel_setting(word)


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
    (figures,) = train_step.run(arguments)
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


def test_a_part_ends_within_nine_minutes_and_judges_its_own_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = argparse.Namespace(
        hardware="h100",
        device="cuda",
        quick=False,
        precision=None,
        glue_dir=Path("glue"),
        text=[Path("text")],
        output_dir=tmp_path,
        model_name_or_path="model",
    )
    for device in ("cuda", "cpu"):
        asked.device = device
        for commands in gpu_all.parts(asked).values():
            assert sum(command.limit_s for command in commands) <= gpu_all.PART_S
            assert len({command.name for command in commands}) == len(commands)
    assert gpu_all.PART_S + gpu_all.GRACE_S < 540

    report = tmp_path / "reports" / "it_h100_202611.md"
    report.parent.mkdir()
    report.write_text("old")
    os.utime(report, (0, 0))
    monkeypatch.setattr(gpu_all, "HERE", report.parent)
    write = f"import pathlib; pathlib.Path({str(report)!r}).write_text('new')"
    commands = {
        1: [gpu_all.python("fails", 20, "-c", "raise SystemExit(2)")],
        2: [gpu_all.python("writes", 20, "-c", write)],
        3: [gpu_all.python("goes_on", 20, "-c", "raise SystemExit(3)")],
    }
    monkeypatch.setattr(gpu_all, "parts", lambda arguments: commands)
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--part"]
    assert gpu_all.main([*flags, "1"]) == 1
    assert not (out / report.name).exists()
    assert gpu_all.main([*flags, "2"]) == 0
    assert (out / report.name).read_text() == "new"
    assert (out / "part2_writes.log").is_file()
    assert gpu_all.main([*flags, "2", "3"]) == 3
    for wrong in (["14"], ["1", "--only", "nosuch"]):
        with pytest.raises(SystemExit):
            gpu_all.main([*flags, *wrong])
    said = capsys.readouterr().err
    assert "--part 14: there are parts 1 to 3" in said
    assert "--only nosuch: these parts have fails" in said


@pytest.mark.parametrize("given", [[], ["--glue_dir", "glue", "--text", "text"]])
@pytest.mark.parametrize("is_slow", [True, False])
def test_the_set_for_a_cpu_takes_a_quarter_of_an_hour(
    given: list[str], is_slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, float] = {}

    def run(command: gpu_all.Command, folder: Path, limit_s: float) -> int:
        taken[command.name] = limit_s
        return 0

    monkeypatch.setattr(bench, "run", run)
    clock = argparse.Namespace(monotonic=lambda: sum(taken.values()))
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "slow_precision", lambda *_: "no bf16" if is_slow else None)
    assert bench.main(["--output_dir", str(tmp_path), *given]) == 0
    assert sum(taken.values()) == pytest.approx(900)
    assert {"train_step_fp32", "end_to_end", "engine_overhead"} <= taken.keys()
    assert ("train_step_bf16" in taken) != is_slow
    assert (taken.keys() >= {"finetuning", "data_preparation"}) == bool(given)


def test_what_an_optimizer_calls_its_step_is_not_counted_beside_its_kernels() -> None:
    event = argparse.Namespace(
        device_type=torch.autograd.DeviceType.CUDA, self_device_time_total=2e6
    )
    assert profile_step.own_s(event, torch.device("cuda")) == 2
    event.is_user_annotation = True
    assert profile_step.own_s(event, torch.device("cuda")) == 0


@pytest.mark.parametrize(
    ("name", "title"),
    [
        # Of libtorch_cuda 2.11: what a C++ lambda computes is no LAMB.
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl("
            "at::TensorIteratorBase&, at::native::GeluType)::{lambda()#2}::operator()() const",
            "element by element",
        ),
        ("at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}", "copies"),
        ("at::native::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float>", "layer norm"),
        ("_lamb_kernel", "optimizer"),
        ("multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4>, ...>", "optimizer"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNT", "matrix products"),
        ("flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>", "attention"),
    ],
)
def test_a_kernel_is_counted_as_what_it_does(name: str, title: str) -> None:
    assert profile_step.category(name) == title


def test_kernels_for_16_bits_are_not_checked_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def found(config: object, arguments: argparse.Namespace) -> dict[str, Any]:
        names = ("zerobert", "zerobert, attention=varlen", "zerobert, attention=sdpa")
        return {name: lambda name=name: (arguments.dtype, name) for name in names}

    monkeypatch.setattr(train_step, "chosen", found)
    monkeypatch.setattr(train_step, "build", lambda *_: {train_step.REFERENCE: lambda: None})
    monkeypatch.setattr(train_step, "gradients_of", lambda made, *_: made and seen.append(made))
    monkeypatch.setattr(train_step, "hold_against", lambda *_: None)
    train_step.check_equal(CONFIG, argparse.Namespace(**{**STEP, "dtype": "bf16"}), {})
    in_32 = [name for dtype, name in seen if dtype == "fp32"]
    assert in_32 == ["zerobert", "zerobert, attention=sdpa"]
    assert len(seen) == 5


def test_shards_that_are_whole_are_not_prepared_again(tmp_path: Path) -> None:
    shards = tmp_path / "shards" / "hdf5_it" / "real"
    shards.mkdir(parents=True)
    asked = argparse.Namespace(output_dir=tmp_path, text=[], workers=1, vocab_size=9, dupe_factor=1)
    commands = real_run.Commands(limit_s=0)
    with pytest.raises(real_run.TimeIsUpError):
        real_run.prepare(commands, asked)
    (shards / "manifest.json").write_text("{}")
    real_run.prepare(commands, asked)


def test_each_layer_norm_that_a_gpu_has_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(**{**STEP, "dtype": "bf16", "device": "cuda"})
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
    failed: dict[str, str] = {}
    optimizer_step.check_equal(CONFIG, torch.device("cpu"), [1000], failed)
    assert failed == {}
    monkeypatch.setattr(optimizer_step.lamb, "square", lambda block: 1.0)
    monkeypatch.setitem(optimizer_step.SIZES, "tiny", dataclasses.asdict(CONFIG))
    asked = {"blocks": [], "deepspeed": False, **STEP}
    (figures,) = optimizer_step.run(argparse.Namespace(**asked))
    assert figures["failed"]["blocked"].startswith("ValueError: weights of shape")
    assert "plain" in figures["seconds"]
    said = optimizer_step.tell(figures, argparse.Namespace(**asked))
    assert "| AdamW fused |" in said
    assert "blocked failed: ValueError" in said


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


def test_what_a_user_starts_trains_at_two_stages_alike(repository: Path) -> None:
    command = [sys.executable, "benchmarks/end_to_end.py", "--quick", "--device", "cpu"]
    command += ["--size", "tiny", "--stage", "0", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "| stage 1, fp32 |" in done.stdout


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


def test_the_newest_report_that_has_the_figures_is_told_on_any_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    reports: dict[str, dict[str, Any]] = {
        "train_step_epyc2_bf16_128_202611": {"date": "2026-11-01", "base 0.9": 1},
        "train_step_there_bf16_128_202612": {"date": "2026-12-01", "base 0.9": 1},
        "train_step_old_bf16_128_202612": {"date": "2026-12-01T09:00:00+00:00", "base 0.9": 1},
        "train_step_local_bf16_128_202612": {"date": "2026-12-01T10:00:00+00:00", "base 0.9": 2},
        "train_step_local_fp32_128_202612": {"date": "2026-12-02", "base 0.9": 3},
        "train_step_other_bf16_128_202612": {"date": "2026-12-03", "mini 0.9": 4},
        "finetuning_it_202611": {"date": "2026-11-01"},
        "finetuning_it_202612": {"date": "2026-12-01", "arguments": {"precision": "bf16"}},
    }
    for name, figures in reports.items():
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(figures))
    found = readme.newest("train_step", {"base 0.9": None, "dtype": "bf16"})
    assert found is not None
    assert found[1] == "train_step_local_bf16_128_202612.md"
    assert found[0]["base 0.9"] == 2
    found = readme.newest("finetuning", {"precision": "fp32"})
    assert found is not None
    assert found[1] == "finetuning_it_202611.md"
    assert readme.newest("loader", {}) is None
    for name, commit in (("here", "a"), ("there", "b")):
        figures = {"date": "2026-12-01", "commit": commit}
        (tmp_path / "benchmarks" / f"loader_{name}_202612.json").write_text(json.dumps(figures))
    with pytest.raises(ValueError, match="are both of 2026-12-01"):
        readme.newest("loader", {})


def test_a_ratio_is_that_of_the_medians_beside_it() -> None:
    rates = {"zerobert": [10.0, 30.0, 22.0], "NVIDIA": [5.0, 10.0, 20.0]}
    figures = {"base 0.9": {"samples_per_s": {**rates, "Hugging Face sdpa": [1.0, 1.0, 1.0]}}}
    rows = list(readme.train_step(figures, size="base", dtype="fp32"))
    assert [row[1:] for row in rows] == [
        ("22.00 rows/s", "Hugging Face's BERT: 1.00", "22.00"),
        ("22.00 rows/s", "NVIDIA's BERT: 10.00", "2.20"),
    ]
    arguments = argparse.Namespace(batch_size=32, precision="fp32", **STEP)
    arguments.dtype = "fp32"
    assert "| NVIDIA | 10.00 (5.00 to 20.00) | 2.20 |" in finetuning.tell_rates(rates, arguments, 9)
    times = {"bare loop": rates["NVIDIA"], "engine, stage 1": rates["zerobert"]}
    assert "| +120.0 % |" in engine_overhead.tell(times, arguments)


def test_a_peer_whose_gradients_differ_in_one_tensor_is_noticed() -> None:
    wanted = {"a": torch.ones(4), "b": torch.ones(4, 2)}
    filled_up = {**wanted, "a": torch.cat([wanted["a"], torch.zeros(4)])}
    train_step.hold_against((1.0, filled_up), (1.0, wanted), "fp32")
    swapped = {"a": torch.tensor([1.0, 1.0, 1.0, -1.0]), "b": wanted["b"]}  # of the same norm
    with pytest.raises(ValueError, match="the gradient of a in fp32 is off by 1"):
        train_step.hold_against((1.0, swapped), (1.0, wanted), "fp32")
    with pytest.raises(ValueError, match=r"other parameters: \['c'\]"):
        train_step.hold_against((1.0, {**wanted, "c": torch.zeros(1)}), (1.0, wanted), "fp32")


def test_a_report_says_what_it_was_made_with_and_a_trial_run_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "HERE", tmp_path / "real")
    monkeypatch.setattr(measure, "QUICK", tmp_path / "quick")
    what = {"title": "T", "command": "c", "sections": ["s"], "figures": {"f": 1}, "slug": "h"}
    for is_quick in (False, True):
        asked = argparse.Namespace(quick=is_quick, data_dir=Path("/home/me/glue"), rounds=3)
        path = measure.write_report("theme", **what, arguments=asked)
        assert path.parent == (measure.QUICK if is_quick else measure.HERE)
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["arguments"] == {"quick": is_quick, "data_dir": "glue", "rounds": 3}
        assert record["versions"]["torch"] == torch.__version__
        assert f"torch {torch.__version__}, " in path.read_text()
    assert measure.command("it.py", ["--data_dir", "/home/me/glue"]).endswith("--data_dir glue")
