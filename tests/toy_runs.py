"""Pretraining in seconds, as its users start it: rows that can be learnt, a small experiment, its
command, and what a run leaves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests import forked
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = REPOSITORY / "pretrain" / "run.py"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = [*SPECIALS, *(f"word{i}" for i in range(60))]
TIMEOUT_S = 150

EXPERIMENT: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Lamb", "params": {"lr": 0.01}},
    "bert": {
        "model": {"size": "tiny", "hidden_size": 32, "num_hidden_layers": 1},
        "schedule": {"name": "linear", "warmup_steps": 2},
        "run": {"max_steps": 12, "logging_steps": 1, "save_steps": 4, "eval_steps": 6},
    },
}


def rows(num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Rows that can be learnt: a masked word is always its neighbour's successor."""
    generator = np.random.default_rng(seed)
    length = generator.integers(8, 17, num_rows)
    index = np.arange(16)
    first = generator.integers(0, 60, num_rows)
    ids = 5 + (first[:, None] + index) % 60
    ids[:, 0], ids[:, 4] = 2, 3
    ids[np.arange(num_rows), length - 1] = 3
    real = index < length[:, None]
    positions = np.tile([2, 5, 0], (num_rows, 1))
    answers = np.where(positions > 0, np.take_along_axis(ids, positions, axis=1), 0)
    np.put_along_axis(ids, positions[:, :2], 4, axis=1)
    return {
        "input_ids": np.where(real, ids, 0).astype("i4"),
        "input_mask": real.astype("i1"),
        "segment_ids": (real & (index > 4)).astype("i1"),
        "masked_lm_positions": positions.astype("i4"),
        "masked_lm_ids": answers.astype("i4"),
        "next_sentence_labels": generator.integers(0, 2, num_rows).astype("i1"),
    }


def environment(**extra: str) -> dict[str, str]:
    """This process's, without its paths, one thread a rank, and what is asked for."""
    return {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **extra}


def command(data: Path, output: Path, *flags: str, ranks: int = 0) -> list[str]:
    """Plain `python`, or DeepSpeed's launcher where ranks are given."""
    launcher = [sys.executable, str(RUN)]
    if ranks:
        runner = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        launcher = [sys.executable, *runner, "--master_port", str(20000 + os.getpid() % 20000)]
        launcher.append(str(RUN))
    config = ["--deepspeed_config", str(data / "toy.json"), "--input_dir", str(data)]
    return [*launcher, *config, "--output_dir", str(output), *flags]


def run(command: list[str], **extra: str) -> "subprocess.CompletedProcess[str]":
    """A command, to its end."""
    return forked.run(command, environment(**extra), timeout_s=TIMEOUT_S)


def run_on(ranks: int, command: list[str]) -> None:
    """A command that starts `RUN`, as so many ranks and without a launcher; all have to succeed."""
    _, script, *flags = command
    run_ranks(Path(script), ranks, *flags, timeout_s=TIMEOUT_S)


def metrics(output: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl the lines that are no events."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "event" not in line]


def losses(output: Path) -> dict[int, float]:
    """The training loss of each step."""
    return {line["step"]: line["train/loss"] for line in metrics(output) if "train/loss" in line}


def weights(output: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """What the model folder of a step holds."""
    return load_file(output / f"model_{step}" / "model.safetensors")
