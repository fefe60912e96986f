"""What a user gets: `pretrain/run.py` itself, shards, loader and log included, at each ZeRO stage.

    python benchmarks/end_to_end.py --size base --precision bf16 fp16 --stage 0 1 2 3

Shards of random rows are written once; every combination of stage and precision then runs as a
process of its own, in turns. Before a figure is given, the losses of a stage are held against those
of the first one of its precision: the same rows in the same order train the same model. A run that
fails does not end the others, and the report is written again after each.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.train_step import make_batch  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.shards import write_shard  # noqa: E402
from zerobert.tokenizer import SPECIAL_TOKENS  # noqa: E402
from zerobert.tracking import read_metrics  # noqa: E402

SHARDS, TYPES = 4, {"input_mask": "i1", "segment_ids": "i1", "next_sentence_labels": "i1"}
WARM_UP_LINES = 2
# Largest difference of a step's loss between stages: rounding, which 16 bits make large.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


def write_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Shards for the whole run, and their vocabulary."""
    config = BertConfig(**SIZES[arguments.size])
    rows = arguments.batch * arguments.steps
    for number in range(SHARDS):
        batch = make_batch(config, -(-rows // SHARDS), arguments.seq_length, arguments.fill, number)
        arrays = {name: x.numpy().astype(TYPES.get(name, "i4")) for name, x in batch.items()}
        arrays["input_ids"][:, 0] = SPECIAL_TOKENS.index("[CLS]")
        write_shard(folder / f"random_training_{number}.hdf5", arrays)
    words = [f"word{i}" for i in range(config.vocab_size - len(SPECIAL_TOKENS))]
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")


def experiment(arguments: argparse.Namespace, stage: int, precision: str) -> dict[str, Any]:
    """The JSON of a run; without dropout, so that stages can be compared."""
    low = {} if precision == "fp32" else {precision: {"enabled": True}}
    return {
        "train_batch_size": arguments.batch,
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": arguments.optimizer, "params": {"lr": 1e-4}},
        **low,
        "bert": {
            "model": {
                "size": arguments.size,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            "schedule": {"name": "constant"},
            "run": {
                "max_steps": arguments.steps,
                "logging_steps": max(1, arguments.steps // 10),
                "save_steps": 10**6,
                "eval_steps": 0,
            },
            "kernels": {"compile": arguments.compile and stage < 3},
        },
    }


def train(data: Path, folder: Path, config: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """One run; its lines of metrics.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    folder.mkdir()
    path = folder / "experiment.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    flags = ["--deepspeed_config", str(path), "--input_dir", str(data)]
    flags += measure.device_flag(device)
    command = [sys.executable, str(ROOT / "pretrain" / "run.py"), *flags]
    done = subprocess.run(
        [*command, "--output_dir", str(folder / "run")], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        )
    return [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in line]


def check_equal(losses: dict[str, list[float]], precision: str) -> None:
    """The losses of a precision's stages.

    Raises:
        ValueError: two differ by more than rounding explains.
    """
    (first, wanted), *others = losses.items()
    for name, got in others:
        error = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
        if not error <= TOLERANCE[precision]:
            raise ValueError(f"{name}: a loss is {error:.1e} off that of {first}")


def run(
    arguments: argparse.Namespace, failed: dict[str, str]
) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Every combination's samples a second, share of waiting, and losses, after each run.

    Args:
        failed: combination -> why; those are added that fail or whose losses differ.
    """
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        data.mkdir()
        write_data(data, arguments)
        for number, precision in itertools.product(range(arguments.rounds), arguments.precision):
            losses: dict[str, list[float]] = {}
            for stage in arguments.stage:
                title = f"stage {stage}, {precision}"
                print(f"round {number + 1} of {arguments.rounds}: {title}", file=sys.stderr)
                folder = Path(name, f"{stage}_{precision}_{number}")
                with measure.noting(title, failed):
                    lines = train(
                        data, folder, experiment(arguments, stage, precision), arguments.device
                    )
                    losses[title] = [line["train/loss"] for line in lines]
                    check_equal(losses, precision)
                if title in failed:
                    losses.pop(title, None)
                    continue
                row = found.setdefault(title, {"samples_per_s": [], "data_wait": [], "loss": []})
                late = lines[WARM_UP_LINES:] or lines
                row["samples_per_s"] += [line["perf/samples_per_s"] for line in late]
                row["data_wait"] += [line["perf/data_wait_frac"] for line in late]
                row["loss"] = losses[title]
                yield found


def longest_wait(found: dict[str, dict[str, list[float]]]) -> float:
    """The largest of the combinations' median shares of waiting for data."""
    return max(measure.median(row["data_wait"]) for row in found.values())


def tell(
    found: dict[str, dict[str, list[float]]], failed: dict[str, str], arguments: argparse.Namespace
) -> str:
    """The table, of medians."""
    rows = [
        (
            name,
            measure.spread(row["samples_per_s"]),
            f"{measure.median(row['data_wait']):.2%}",
            f"{row['loss'][-1]:.4f}",
        )
        for name, row in found.items()
    ]
    batch = f"{arguments.batch} rows of {arguments.seq_length} in micro-batches of "
    title = f"## {arguments.size}, {arguments.optimizer}, {batch}{arguments.micro_batch}"
    header = ("", "samples/s", "waiting for data", "last loss")
    wait = f"The longest wait for data is {longest_wait(found):.2%} of the time"
    if arguments.most_wait is not None:
        wait += f"; at most {arguments.most_wait:.2%} is asked for"
    lost = measure.tell_failed(failed)
    return f"{title}\n\n{measure.table(header, rows)}\n\n{wait}.{lost}"


def main(words: Sequence[str] | None = None) -> None:
    """Run all combinations, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="base")
    add("--stage", type=int, nargs="+", choices=[0, 1, 2, 3], default=[0, 1, 2, 3])
    add("--precision", nargs="+", choices=list(TOLERANCE), default=["fp32"])
    add("--optimizer", choices=["Lamb", "AdamW"], default="Lamb")
    add("--seq_length", type=int, choices=[128, 512], default=128)
    add("--fill", type=float, default=0.9, help="mean share of a row that is no padding")
    add("--batch", type=int, default=32)
    add("--micro_batch", type=int, default=8)
    add("--steps", type=int, default=20)
    add("--rounds", type=int, default=1)
    add("--compile", action="store_true", help="kernels.compile, where the stage has it")
    add(
        "--most_wait",
        type=float,
        help="fail where a larger share of the time is lost to the loader",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="the smallest model, a few steps")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.batch, arguments.steps, arguments.rounds = "tiny", 16, 6, 1
        arguments.micro_batch = 8
    failed: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for found in run(arguments, failed):
        if arguments.hardware:
            write(found, failed, arguments, words)
    if not found:
        raise SystemExit(f"nothing ran: {failed}")
    print(tell(found, failed, arguments))
    if arguments.hardware:  # with what failed last
        write(found, failed, arguments, words)
    too_long = arguments.most_wait is not None and longest_wait(found) > arguments.most_wait
    if failed or too_long:
        sys.exit(1)


def write(
    found: dict[str, dict[str, list[float]]],
    failed: dict[str, str],
    arguments: argparse.Namespace,
    words: Sequence[str] | None,
) -> None:
    """The report."""
    measure.write_report(
        "end_to_end",
        title="Pretraining, end to end",
        command=measure.command("end_to_end.py", words),
        sections=[tell(found, failed, arguments)],
        figures={**found, "failed": failed},
        slug=arguments.hardware,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
