"""Pretraining as its users start it: each test runs the command in processes of its own."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from pretrain.order import sample_order
from tests import toy_runs as toy
from tests.wandb_server import serve_wandb
from zerobert.manifest import read_manifest, write_manifest
from zerobert.schedule import ScheduleConfig, factor
from zerobert.shards import find_shards, write_shard
from zerobert.tracking import code_version, read_metrics


def test_a_run_leaves_what_the_interface_promises(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    # Two states are kept, all models.
    assert names >= {"model_4", "model_8", "model_12", "state_8", "state_12", "latest"}
    assert names >= {"config.json", "report.html", "metrics.jsonl", "status.json"}
    assert "state_4" not in names
    assert not [name for name in names if name.startswith(".")]
    assert (unbroken / "latest").read_text() == "state_12\n"
    status = json.loads((unbroken / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["total_steps"]) == ("done", 0, 12)
    log = (unbroken / "stdout.txt").read_text()
    assert "untested" not in log  # DeepSpeed's doubt of any LAMB under ZeRO
    assert "WARNING" not in log
    assert re.search(
        r"^global step: 12, epoch: 1, batch: \d+, loss: \d+\.\d{6}, "
        r"avg_reader_cost: \d\.\d{5} sec, avg_batch_cost: \d+\.\d{5} sec, "
        r"avg_samples: 8\.00000, ips: \d+\.\d{5} sequences/sec\n"
        r"  100\.0% \| step 12/12 \| mlm \d\.\d{4} \| nsp \d\.\d{4} \| "
        r"held-out accuracy \d+\.\d% \| lr \S+ \| grad \S+ \| \S+ samples/s \| "
        r"\S+ tokens/s \| data wait \d+\.\d% \| "
        r"\d+\.\d GiB \| 0:00 left$",
        log,
        re.M,
    )


def test_metrics_have_every_key(unbroken: Path) -> None:
    train, *_ = [line for line in toy.metrics(unbroken) if line["step"] == 12]
    assert set(train) == {
        "step",
        "samples",
        "tokens",
        "epoch",
        "elapsed_s",
        "train/loss",
        "train/mlm_loss",
        "train/nsp_loss",
        "train/lr",
        "train/grad_norm",
        "train/loss_scale",
        "train/skipped_steps",
        "perf/samples_per_s",
        "perf/tokens_per_s",
        "perf/mfu",
        "perf/data_wait_frac",
        "perf/peak_memory_bytes",
    }
    assert train["samples"] == 96
    assert train["perf/mfu"] is None
    assert 2**27 < train["perf/peak_memory_bytes"] < 2**33
    assert train["train/loss"] == pytest.approx(train["train/mlm_loss"] + train["train/nsp_loss"])
    last = [line for line in toy.metrics(unbroken) if "eval/mlm_loss" in line][-1]
    assert last["step"] == 12
    assert last["eval/rows"] == 11
    assert {"eval/mlm_accuracy", "eval/nsp_accuracy"} <= set(last)


def test_the_resolved_config_runs_again(data: Path, unbroken: Path, tmp_path: Path) -> None:
    flags = ["--deepspeed_config", str(unbroken / "config.json"), "--max_steps", "2"]
    again = toy.run(toy.command(data, tmp_path / "again", *flags))
    assert again.returncode == 0, again.stderr
    assert toy.losses(tmp_path / "again")[1] == toy.losses(unbroken)[1]


def test_running_a_finished_command_again_changes_nothing(data: Path, unbroken: Path) -> None:
    before = toy.metrics(unbroken)
    again = toy.run(toy.command(data, unbroken))
    assert again.returncode == 0, again.stderr
    assert "complete" in again.stdout
    assert toy.metrics(unbroken) == before
    assert json.loads((unbroken / "status.json").read_text())["state"] == "done"


def test_two_processes_train_as_one(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """With dropout: the same losses and weights as one process with twice the accumulation."""
    two = toy.run(toy.command(data, tmp_path, ranks=2))
    assert two.returncode == 0, two.stderr
    for step, loss in toy.losses(unbroken).items():
        assert toy.losses(tmp_path)[step] == pytest.approx(loss, abs=2e-6)
    one, both = toy.weights(unbroken), toy.weights(tmp_path)
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, atol=1e-5, rtol=0, msg=name)
    evaluations = [
        [line for line in toy.metrics(output) if "eval/mlm_loss" in line][-1]
        for output in (unbroken, tmp_path)
    ]
    assert evaluations[0]["eval/rows"] == evaluations[1]["eval/rows"]
    assert evaluations[0]["eval/mlm_loss"] == pytest.approx(
        evaluations[1]["eval/mlm_loss"], abs=1e-5
    )


def _wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + toy.TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def test_killed_and_run_again_equals_unbroken(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, losses, and no step logged twice."""
    process = subprocess.Popen(
        toy.command(data, tmp_path),
        env=toy.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(tmp_path / "state_4", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "model_12").exists()
    again = toy.run(toy.command(data, tmp_path))
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [event] = [line for line in lines if "event" in line]
    assert (event["step"], event["event"], event["processes"]) in [
        (step, "resume", 1) for step in (4, 8)
    ]
    page = (tmp_path / "report.html").read_text()
    assert f'<td class="figure">{event["step"]}</td><td>resume</td>' in page
    assert toy.losses(tmp_path) == toy.losses(unbroken)
    assert len(toy.metrics(tmp_path)) == len(toy.metrics(unbroken))
    for name, weight in toy.weights(unbroken).items():
        assert torch.equal(weight, toy.weights(tmp_path)[name]), name


def test_a_run_by_time_ends_with_its_budget_however_often_it_stops(
    data: Path, tmp_path: Path
) -> None:
    budget_s, peak = 8.0, 0.01
    run = {"max_train_s": budget_s, "max_steps": None, "save_steps": 10, "eval_steps": 0}
    schedule = {"by": "time", "warmup_steps": None, "warmup_proportion": 0.25}
    config = _varied(tmp_path, run=run, schedule=schedule)
    out = tmp_path / "out"
    command = toy.command(data, out, "--deepspeed_config", str(config))
    process = subprocess.Popen(
        command, env=toy.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _wait_for(out / "state_10", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=toy.TIMEOUT_S)
    assert process.returncode == 143, stderr
    stopped = json.loads((out / "status.json").read_text())
    again = toy.run(command)
    assert again.returncode == 0, again.stderr
    assert f"at step {stopped['step']} of 8 s" in again.stdout
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", toy.metrics(out)[-1]["step"])
    assert (out / f"model_{status['step']}").is_dir()

    lines = [line for line in toy.metrics(out) if "train/lr" in line]
    assert [line["step"] for line in lines] == list(range(1, status["step"] + 1))
    config_of_rate = ScheduleConfig(by="time", warmup_proportion=0.25)
    for before, line in itertools.pairwise([{"elapsed_s": 0.0}, *lines]):
        # The rate is that of the moment when the step began, between two lines.
        moments = [before["elapsed_s"], line["elapsed_s"]]
        if moments[0] <= budget_s / 4 <= moments[1]:
            moments.append(budget_s / 4)
        factors = [factor(config_of_rate, moment, total=budget_s) for moment in moments]
        assert min(factors) <= line["train/lr"] / peak <= max(factors), line
    assert lines[-2]["elapsed_s"] < budget_s <= status["elapsed_s"]
    evaluations = [line["step"] for line in toy.metrics(out) if "eval/mlm_loss" in line]
    assert evaluations == [status["step"]]

    before_again = toy.metrics(out)
    once_more = toy.run(command)
    assert once_more.returncode == 0, once_more.stderr
    assert "complete" in once_more.stdout
    assert toy.metrics(out) == before_again


def test_deepspeed_s_scheduler_is_followed(data: Path, tmp_path: Path) -> None:
    params = {"warmup_num_steps": 2, "warmup_type": "linear", "total_num_steps": 5}
    experiment: dict[str, Any] = {**toy.EXPERIMENT, "bert": {**toy.EXPERIMENT["bert"]}}
    del experiment["bert"]["schedule"]
    experiment["scheduler"] = {"type": "WarmupCosineLR", "params": params}
    path = tmp_path / "scheduled.json"
    path.write_text(json.dumps(experiment))
    flags = ["--deepspeed_config", str(path), "--max_steps", "5"]
    done = toy.run(toy.command(data, tmp_path / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert "learning rate: DeepSpeed's WarmupCosineLR" in done.stdout
    rates = [line["train/lr"] for line in toy.metrics(tmp_path / "out") if "train/lr" in line]
    third = 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi / 3)) / 2
    two_thirds = 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * 2 / 3)) / 2
    assert rates[:2] == [0.0, 0.0]
    assert rates[2:] == pytest.approx([0.005, 0.01 * third, 0.01 * two_thirds])


@pytest.mark.parametrize("is_cased", [True, False])
def test_shards_that_do_not_say_their_case_are_judged_by_the_vocabulary(
    data: Path, tmp_path: Path, is_cased: bool
) -> None:
    words = [word.capitalize() if is_cased else word for word in toy.VOCAB[5:]]
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    (shards / "vocab.txt").write_text("\n".join([*toy.VOCAB[:5], *words]) + "\n")
    done = toy.run(toy.command(shards, tmp_path / "out", "--max_steps", "1"))
    assert done.returncode == 0, done.stderr
    assert f"tokens of {'cased' if is_cased else 'lower-cased'} text" in done.stdout
    settings = json.loads((tmp_path / "out" / "model_1" / "tokenizer_config.json").read_text())
    assert settings["do_lower_case"] is not is_cased


def test_a_run_goes_back_and_behind_the_samples_that_it_went_wrong_on(tmp_path: Path) -> None:
    """The rows of the ninth step have answers that no other row has: its loss jumps."""
    data, guard = tmp_path / "data", {"action": "rollback", "spike_factor": 1.03, "spike_window": 5}
    data.mkdir()
    (data / "vocab.txt").write_text("\n".join(toy.VOCAB) + "\n")
    guarded = {**toy.EXPERIMENT, "bert": {**toy.EXPERIMENT["bert"], "guard": guard}}
    (data / "toy.json").write_text(json.dumps(guarded))
    for index in range(2):
        write_shard(data / f"toy_training_{index}.hdf5", toy.rows(100, index))
    shards = find_shards([data], "training")
    poisoned = sample_order(shards, seed=42, global_samples=8).locate(64, 8)
    for index, shard in enumerate(shards):
        rows = toy.rows(100, index)
        of_shard = poisoned[poisoned // 100 == index] % 100
        rows["masked_lm_ids"][of_shard] = np.where(rows["masked_lm_positions"][of_shard] > 0, 1, 0)
        write_shard(shard.path, rows)

    out = tmp_path / "out"
    done = toy.run(toy.command(data, out))
    assert done.returncode == 0, done.stderr
    assert "rolled back from step 9 to step 8: the loss at step 9, " in done.stdout
    (note,) = json.loads((out / "skipped.json").read_text())
    assert (note["to_step"], note["from_step"], note["end_sample"]) == (8, 9, 72)
    events = [line for line in read_metrics(out / "metrics.jsonl") if "event" in line]
    assert [(line["step"], line["event"], line["to_step"]) for line in events] == [
        (9, "rollback", 8)
    ]
    saved = read_manifest(out / "state_12").config["train_state"]
    assert (saved["samples"], saved["position"]) == (96, 104)
    assert (out / "report.html").exists()

    # A later start from there leaves the same samples out.
    weights = toy.weights(out)
    for name in ("state_12", "model_12"):
        shutil.rmtree(out / name)
    again = toy.run(toy.command(data, out))
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    assert "rolled back" not in again.stdout
    for name, weight in toy.weights(out).items():
        assert torch.equal(weight, weights[name]), name


def test_resuming_under_other_settings_is_refused(data: Path, unbroken: Path) -> None:
    done = toy.run(toy.command(data, unbroken, "--learning_rate", "0.5"))
    assert done.returncode == 2
    assert "optimizer.params.lr was 0.01, is 0.5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert json.loads((unbroken / "status.json").read_text())["state"] == "done"


def _processes_with(text: str) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if text in line and "ps -eo" not in line]


@pytest.fixture
def long_run(data: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`bash launch.sh pretrain` on two ranks, with a first state saved."""
    output = tmp_path / "long"
    flags = [f"--deepspeed_config={data / 'toy.json'}", "--input_dir", str(data)]
    flags += ["--output_dir", str(output), "--max_steps", "100000", "--logging_steps", "1000"]
    process = subprocess.Popen(
        ["bash", str(toy.REPOSITORY / "launch.sh"), "pretrain", "--n_gpu", "2", *flags],
        env=toy.environment(ZEROBERT_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(output / "state_4", process)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_nothing_behind(
    long_run: "subprocess.Popen[str]", data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    second = toy.run(toy.command(data, tmp_path / "long"))
    assert second.returncode == 2
    assert "another run is writing into" in second.stderr
    long_run.send_signal(number)
    _, stderr = long_run.communicate(timeout=toy.TIMEOUT_S)
    assert long_run.returncode == code, stderr
    output = tmp_path / "long"
    assert _processes_with(str(output)) == []
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", code)
    latest = (output / "latest").read_text().strip()
    assert latest == f"state_{status['step']}"
    assert (output / latest / "manifest.json").exists()
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


BREAKS: dict[str, tuple[list[str], str]] = {
    "no shards": (["--input_dir", "{empty}"], "no training shards.*launch.sh prep shards"),
    "no such JSON": (["--deepspeed_config", "nowhere.json"], "nowhere.json: no such file"),
    "a misspelt key": (["--deepspeed_config", "{misspelt}"], "'grad_cliping'.*gradient_clipping"),
    "another vocabulary": (["--vocab_file", "{other}"], "is not the vocabulary of the shards"),
    "rows of another vocabulary": (
        ["--input_dir", "{data}", "--input_dir", "{strange}"],
        "made with another vocabulary",
    ),
    "shards of another vocabulary": (["--eval_dir", "{made}"], "made with another vocabulary"),
    "another model": (["--init_from", "{model}"], "model_type 'bert', got 'gpt2'"),
    "a wrong flag": (["--max_step", "x"], "--help"),
    "other predictions": (["--max_predictions_per_seq", "20"], "were made with 3"),
    "offload to a disk": (
        ["--deepspeed_config", "{nvme}"],
        'offload_optimizer.device: wanted "cpu"',
    ),
    "batches that don't divide": (["--batch_size", "0"], "whole numbers above 0"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_bad_input_is_one_line(data: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "misspelt").write_text(json.dumps({**toy.EXPERIMENT, "grad_cliping": 1.0}))
    nvme = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}
    (tmp_path / "nvme").write_text(json.dumps({**toy.EXPERIMENT, **nvme}))
    (tmp_path / "other").write_text("\n".join([*toy.VOCAB, "more"]) + "\n")
    rows = toy.rows(4, 0)
    (tmp_path / "made").mkdir()
    write_shard(tmp_path / "made" / "test.hdf5", rows)
    hashes = {"vocab.txt": 64 * "0"}
    write_manifest(tmp_path / "made", kind="shards", config={}, inputs=hashes)
    (tmp_path / "strange").mkdir()
    rows["input_ids"][:, 0] = 7
    write_shard(tmp_path / "strange" / "train.hdf5", rows)
    flags, words = BREAKS[case]
    names = {"data": data, **{path.name: path for path in tmp_path.iterdir()}}
    flags = [flag.format(**names) for flag in flags]
    command = [sys.executable, str(toy.RUN), "--output_dir", str(tmp_path / "out")]
    command += ["--deepspeed_config", str(data / "toy.json")]
    if "--input_dir" not in flags:
        command += ["--input_dir", str(data)]
    done = toy.run([*command, *flags])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_named(data: Path, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = toy.rows(13, 0)
    rows["input_ids"][3, 3] = 4000
    write_shard(tmp_path / "toy_training_0.hdf5", rows)
    done = toy.run(toy.command(tmp_path, tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "toy_training_0.hdf5" in line
    assert "input_ids" in line
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_a_damaged_held_out_shard_costs_no_step(data: Path, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (held_out,) = tmp_path.glob("*test*.hdf5")
    rows = toy.rows(13, 0)
    rows["input_ids"][3, 3] = 4000
    write_shard(held_out, rows)
    done = toy.run(toy.command(tmp_path, tmp_path / "out", ranks=2))
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert held_out.name in line
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert (tmp_path / "out" / "latest").read_text() == "state_6\n"  # between two saves


def test_a_start_over_does_not_move_what_it_reads(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = toy.run(toy.command(data, output, "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    again = toy.run(
        toy.command(data, output, "--resume", "never", "--init_from", f"{output}/model_2")
    )
    assert again.returncode == 2
    assert f"{output}/model_2, which this run needs" in again.stderr
    assert (output / "latest").read_text() == "state_2\n"
    assert not list(tmp_path.glob("*.old-*"))


def test_held_out_rows_of_another_vocabulary_are_refused(data: Path, tmp_path: Path) -> None:
    for path in data.glob("*test*.hdf5"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.txt").write_text("\n".join([*toy.VOCAB[:9], *toy.VOCAB[:8:-1]]) + "\n")
    done = toy.run(toy.command(data, tmp_path / "out", "--eval_dir", str(tmp_path)))
    assert done.returncode == 2
    assert re.search(r"error: .*vocab\.txt", done.stderr), done.stderr


def test_bert_base_starts_and_says_what_makes_shards(tmp_path: Path) -> None:
    config = toy.REPOSITORY / "ds_configs" / "bert_base.json"
    command = ["-m", "deepspeed.launcher.runner", str(toy.RUN), "--deepspeed_config", str(config)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=toy.environment(),
        capture_output=True,
        text=True,
        timeout=toy.TIMEOUT_S,
    )
    assert done.returncode == 2
    assert "no training shards" in done.stderr
    assert "launch.sh prep shards" in done.stderr


def _varied(folder: Path, **sections: dict[str, Any]) -> Path:
    """The experiment with sections of `bert` changed, as a JSON of its own."""
    bert = {**toy.EXPERIMENT["bert"]}
    for name, changes in sections.items():
        bert[name] = {**bert.get(name, {}), **changes}
    path = folder / "varied.json"
    path.write_text(json.dumps({**toy.EXPERIMENT, "bert": bert}))
    return path


def test_masked_words_alone_with_every_kernel(data: Path, tmp_path: Path) -> None:
    kernels = {
        "attention": "sdpa",
        "cross_entropy": "chunked",
        "activation_checkpointing": True,
        "packing": False,
    }
    path = _varied(tmp_path, data={"nsp": False}, kernels=kernels, run={"max_steps": 4})
    command = toy.command(data, tmp_path / "out", "--deepspeed_config", str(path))
    done = toy.run(command)
    assert done.returncode == 0, done.stderr
    assert "asked for in the configuration" in done.stdout
    metrics = [line for line in toy.metrics(tmp_path / "out") if "train/mlm_loss" in line]
    assert all(line["train/nsp_loss"] is None for line in metrics)
    assert "nsp_accuracy" not in done.stdout
    card = (tmp_path / "out" / "model_4" / "README.md").read_text()
    assert "| training | masked LM |" in card
    model = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "out" / "model_4", output_loading_info=True
    )
    assert not any(model[1][key] for key in ("missing_keys", "unexpected_keys"))


def test_fresh_masks_are_the_same_for_any_ranks_and_the_runs_own(
    data: Path, tmp_path: Path
) -> None:
    """At a rate that asks for more masks than the shards have room for."""
    fresh = {"masking": "dynamic", "masked_lm_prob": 0.5, "whole_word_mask": True}
    path = _varied(tmp_path, data=fresh, run={"max_steps": 4})
    outputs = []
    for ranks in (1, 2):
        outputs.append(tmp_path / f"ranks{ranks}")
        toy.run_on(ranks, toy.command(data, outputs[-1], "--deepspeed_config", str(path)))
    one, two = map(toy.losses, outputs)
    assert two == pytest.approx(one, abs=2e-6)
    _varied(tmp_path, data={**fresh, "masked_lm_prob": 0.3})
    refused = toy.run(toy.command(data, outputs[0], "--deepspeed_config", str(path)))
    assert refused.returncode == 2
    assert "data.masked_lm_prob was 0.5, is 0.3" in refused.stderr
    plans = []
    for prob in (0.5, 0.9):
        _varied(tmp_path, data={**fresh, "masked_lm_prob": prob})
        plan = toy.run(
            toy.command(data, tmp_path / "dry", "--deepspeed_config", str(path), "--dry_run")
        )
        plans.append(float(re.search(r"FLOPs a step: (.*)", plan.stdout)[1]))  # type: ignore[index]
    assert plans[1] > plans[0]


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        pytest.param(
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
                "bf16": {"enabled": True},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, marks=pytest.mark.slow
        ),
    ],
    ids=["stage 3", "stage 0 in bf16", "stage 3 in bf16, offloaded", "stage 2, offloaded"],
)
def test_other_stages_train_alike_and_go_on(
    settings: dict[str, Any], data: Path, unbroken: Path, tmp_path: Path
) -> None:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({**toy.EXPERIMENT, **settings}))
    out = tmp_path / "out"
    command = toy.command(data, out, "--deepspeed_config", str(path), "--save_steps", "6")
    toy.run_on(2, command)
    tolerance = 0.02 if "bf16" in settings else 5e-6
    for step, loss in toy.losses(unbroken).items():
        assert toy.losses(out)[step] == pytest.approx(loss, abs=tolerance)
    weights, losses = toy.weights(out), toy.losses(out)
    shutil.rmtree(out / "state_12")
    shutil.rmtree(out / "model_12")
    toy.run_on(2, command)
    assert '"event": "resume"' in (out / "metrics.jsonl").read_text()
    assert toy.losses(out) == losses
    for name, weight in toy.weights(out).items():
        assert torch.equal(weight, weights[name]), name


def test_a_pre_norm_model_trains_goes_on_and_is_not_taken_for_a_stock_bert(
    data: Path, tmp_path: Path
) -> None:
    path = _varied(tmp_path, model={"layer_norm_position": "pre"}, run={"max_steps": 4})
    out = tmp_path / "out"
    done = toy.run(toy.command(data, out, "--deepspeed_config", str(path)))
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="zerobert-pre-layer-norm"):
        transformers.AutoModel.from_pretrained(out / "model_4")
    more = toy.command(data, tmp_path / "more", "--deepspeed_config", str(path))
    done = toy.run([*more, "--init_from", str(out / "model_4")])
    assert done.returncode == 0, done.stderr


def test_auto_micro_batch_keeps_the_global_batch_and_itself(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = toy.run(toy.command(data, out, "--auto_micro_batch", "--max_steps", "4"))
    assert done.returncode == 0, done.stderr
    assert "batch: 8 sequences = 8 x 1 micro-steps x 1 processes" in done.stdout
    assert json.loads((out / "config.json").read_text())["train_micro_batch_size_per_gpu"] == 8
    again = toy.run(toy.command(data, out, "--auto_micro_batch", "--max_steps", "4"))
    assert again.returncode == 0, again.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    done = toy.run(toy.command(data, tmp_path / "out", "--dry_run"))
    assert done.returncode == 0, done.stderr
    assert "parameters: " in done.stdout
    assert "FLOPs a step: " in done.stdout
    resolved = json.loads(done.stdout[: done.stdout.rindex("\n}") + 2])
    assert resolved["bert"]["model"]["vocab_size"] == len(toy.VOCAB)
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_this_device_can_t_train_in_and_a_training_is_refused(
    data: Path, tmp_path: Path
) -> None:
    if get_accelerator().is_fp16_supported():
        pytest.skip("needs a device that can't train in fp16")
    command = toy.command(data, tmp_path / "out", "--precision", "fp16")
    line = "this device can't train in fp16; pass --precision bf16 or fp32"
    done = toy.run([*command, "--dry_run"])
    assert done.returncode == 0, done.stderr
    assert f"warning: {line}\n" in done.stdout
    assert "parameters: " in done.stdout
    for refused in (command, [*command, "--dry_run", "--auto_micro_batch"]):
        done = toy.run(refused)
        assert (done.returncode, done.stderr.strip()) == (2, f"error: {line}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit_bytes", [60_000, 200_000], ids=["model", "state"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    data: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """A limit on the size of a file stands for the full disk: both fail in write()."""
    done = subprocess.run(
        toy.command(data, tmp_path / "out"),
        env=toy.environment(),
        capture_output=True,
        text=True,
        timeout=toy.TIMEOUT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: cannot write ")
    assert "free space" in line
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.startswith((".", "state_", "latest"))]
    again = toy.run(toy.command(data, tmp_path / "out"))
    assert again.returncode == 0, again.stderr


def test_ctrl_c_before_training_starts(data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            "bash",
            str(toy.REPOSITORY / "launch.sh"),
            "pretrain",
            *toy.command(data, tmp_path / "out")[2:],
        ],
        env=toy.environment(ZEROBERT_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=toy.TIMEOUT_S)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert _processes_with(str(tmp_path / "out")) == []


def test_wandb_offline_needs_no_account_and_keeps_its_id(data: Path, tmp_path: Path) -> None:
    key = "f" * 40
    flags = ["--tracker", "wandb", "--max_steps", "4"]
    done = toy.run(toy.command(data, tmp_path, *flags), WANDB_MODE="offline", WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert key not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_wandb_online_learns_what_the_run_is_made_of(data: Path, tmp_path: Path) -> None:
    """Against a stand-in for its server."""
    with serve_wandb() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "f" * 40}
        done = toy.run(
            toy.command(data, tmp_path, "--tracker", "wandb", "--max_steps", "4"), **environment
        )
    assert done.returncode == 0, done.stderr
    [(run_id, config)] = server.configs.items()
    assert (tmp_path / "wandb_run_id").read_text().strip() == run_id
    assert config["train_batch_size"] == 8
    assert config["bert"]["model"]["hidden_size"] == 32
    assert config["processes"] == 1
    assert config["code"] == code_version()
    assert config["parameters"] == sum(
        tensor.numel() for tensor in toy.weights(tmp_path, 4).values()
    )
    assert (config["data"]["rows"], config["data"]["shards"]) == (58, 3)
    assert "vocab.txt" in config["data"]["inputs"]
    rows = [row for row in server.history[run_id] if "train/loss" in row]
    assert {row["step"]: row["train/loss"] for row in rows} == toy.losses(tmp_path)


def test_torchrun_starts_it_too(data: Path, unbroken: Path, tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 20000)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    done = toy.run(
        [sys.executable, *torchrun, *toy.command(data, tmp_path, "--save_steps", "100")[1:]]
    )
    assert done.returncode == 0, done.stderr
    assert toy.losses(tmp_path)[12] == pytest.approx(toy.losses(unbroken)[12], abs=2e-6)
