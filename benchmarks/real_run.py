"""From raw text to scores: what a recipe makes of a corpus in the time it is given.

    python benchmarks/real_run.py --text DIR --glue_dir data/glue --output_dir runs/real
        --deepspeed_config ds_configs/h100_20min.json --hardware h100

Text, vocabulary, shards, pretraining, then fine-tuning from that model and from random weights of
the same architecture. Each stage is the product's own command; what is done is not done again, and
with `--limit_s` a call ends in time (by SIGTERM, which saves) and the next one goes on. The report
has the curve, the speed and the scores, as far as they are there: it is written when a call ends,
after pretraining and after each task.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from zerobert.tracking import read_metrics  # noqa: E402

TASKS = ("SST-2", "MRPC", "STS-B")
STARTS = {"pretrained": (), "random weights": ("--random_init",)}
_POINTS = 16  # of the curve in the report


class TimeIsUpError(Exception):
    """What is left is for the next call."""


class Commands:
    """Runs the product's commands until a moment.

    Args:
        limit_s: from now; None for no limit.
    """

    def __init__(self, limit_s: float | None) -> None:
        self.ends = None if limit_s is None else time.monotonic() + limit_s

    def run(self, *words: str | Path) -> None:
        """Run a script of the project to its end, or ask it to save and end when the time is up.

        Raises:
            TimeIsUpError: it was ended, or there was no time to begin.
            RuntimeError: it failed.
        """
        left_s = None if self.ends is None else self.ends - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeIsUpError
        print("$", *words, flush=True)
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
        try:
            code = process.wait(left_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise TimeIsUpError from None
        if code:
            raise RuntimeError(f"{words[0]} ended with {code}")


def prepare(commands: Commands, arguments: argparse.Namespace) -> None:
    """Text, vocabulary and shards, where they are not there yet."""
    out: Path = arguments.output_dir
    if any((out / "shards").glob("hdf5_*/*/manifest.json")):
        return  # whole, and the product would read all of the text again to say so
    workers = ("--workers", str(arguments.workers))
    prep = ROOT / "data_prep" / "__main__.py"
    if not (out / "text" / "manifest.json").is_file():
        text = ("--input", *arguments.text, "--output_dir", out / "text")
        commands.run(prep, "text", *text, *workers)
    vocab = out / "vocab.txt"
    if not vocab.is_file():
        size = ("--vocab_size", str(arguments.vocab_size))
        commands.run(prep, "vocab", "--input_dir", out / "text", "--output", vocab, *size)
    commands.run(
        *(prep, "shards", "--input_dir", out / "text", "--vocab_file", vocab),
        *("--output_dir", out / "shards", "--name", "real", "--no_nsp"),
        *("--n_training_shards", "16", "--n_test_shards", "1", "--fraction_test_set", "0.01"),
        *("--dupe_factor", str(arguments.dupe_factor), *workers),
    )


def pretrain(commands: Commands, arguments: argparse.Namespace) -> Path:
    """The pretrained model's folder."""
    out: Path = arguments.output_dir
    status = out / "run" / "status.json"
    if not status.is_file() or json.loads(status.read_text())["state"] != "done":
        commands.run(
            *(ROOT / "zerobert" / "launcher.py", ROOT / "pretrain" / "run.py"),
            *("--deepspeed_config", arguments.deepspeed_config),
            *("--input_dir", out / "shards", "--output_dir", out / "run"),
            *_flags(arguments),
        )
    models = (out / "run").glob("model_*/manifest.json")
    return max(models, key=lambda path: int(path.parent.name.removeprefix("model_"))).parent


def finetune(
    commands: Commands, arguments: argparse.Namespace, model: Path
) -> Iterator[dict[str, dict[str, Any]]]:
    """The result of each task from each start, after each task."""
    found: dict[str, dict[str, Any]] = {}
    for task in arguments.tasks.split(","):
        for start, flags in STARTS.items():
            out = arguments.output_dir / "finetune" / start.split()[0] / task
            if not (out / "manifest.json").is_file():
                commands.run(
                    *(ROOT / "finetune" / "run_glue.py", "--task_name", task),
                    *("--model_name_or_path", model, "--data_dir", arguments.glue_dir),
                    *("--output_dir", out, "--seeds", arguments.seeds, *flags),
                    *("--learning_rate", str(arguments.learning_rate)),
                    *("--precision", arguments.precision),
                    *_flags(arguments),
                )
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
            found.setdefault(task, {})[start] = result
        yield found


def _flags(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What both trainings are told alike."""
    device = measure.device_flag(arguments.device) if arguments.device else ()
    return (*device, *(("--max_steps", "20") if arguments.quick else ()))


def curve(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The training and held-out figures over time: a header and some rows, evenly spread."""
    train = [row for row in rows if "train/mlm_loss" in row]
    held_out = [row for row in rows if "eval/mlm_loss" in row]
    chosen = sorted({round(i * (len(train) - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    lines = []
    for row in (train[i] for i in chosen):
        seen = [each for each in held_out if each["step"] <= row["step"]]
        loss, accuracy = (
            (f"{seen[-1]['eval/mlm_loss']:.3f}", f"{100 * seen[-1]['eval/mlm_accuracy']:.1f} %")
            if seen
            else ("", "")
        )
        lines.append(
            [
                f"{row['elapsed_s'] / 60:.1f}",
                f"{row['step']:,}",
                f"{row['tokens'] / 1e6:.1f}",
                f"{row['train/mlm_loss']:.3f}",
                *(loss, accuracy, f"{row['perf/samples_per_s']:,.0f}"),
            ]
        )
    header = ["minutes", "step", "M tokens", "MLM loss", "held-out loss", "accuracy", "samples/s"]
    return header, lines


def scores(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """A row a task and metric: from the pretrained model, from random weights, the majority."""
    rows = []
    for task, starts in results.items():
        for metric in starts["pretrained"]["metrics"]:
            figures = [_figure(starts[start], metric) for start in STARTS]
            base = starts["pretrained"]["majority_baseline"]
            is_main = metric == starts["pretrained"]["metric"] and base is not None
            rows.append([task, metric, *figures, f"{100 * base:.2f}" if is_main else ""])
    return rows


def _figure(result: Mapping[str, Any], metric: str) -> str:
    runs = result.get("all", [result])
    values = sorted(100 * run["metrics"][metric] for run in runs)
    spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
    return f"{measure.median(values):.2f}{spread}"


def report(
    arguments: argparse.Namespace, results: Mapping[str, Any], words: Sequence[str] | None
) -> None:
    """Write the report, with the run's page of curves beside it."""
    run: Path = arguments.output_dir / "run"
    rows = read_metrics(run / "metrics.jsonl")
    train = [row for row in rows if "train/mlm_loss" in row]
    held_out = [row for row in rows if "eval/mlm_loss" in row]
    rates = [row["perf/samples_per_s"] for row in train]
    shares = [row["perf/mfu"] for row in train if row.get("perf/mfu") is not None]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    facts = [
        f"{train[-1]['samples']:,} sequences, {train[-1]['tokens'] / 1e6:,.1f} M tokens in "
        f"{train[-1]['elapsed_s'] / 60:.1f} minutes and {train[-1]['step']:,} steps: "
        f"{measure.median(rates):,.1f} sequences/s (median of the log's lines)"
        + (f", {100 * measure.median(shares):.1f} % of the peak." if shares else "."),
        *(
            f"Held out, at the end: loss {last['eval/mlm_loss']:.4f}, "
            f"{100 * last['eval/mlm_accuracy']:.2f} % of the masked words."
            for last in held_out[-1:]
        ),
    ]
    header, lines = curve(rows)
    seeds = f"seeds {arguments.seeds}, rate {arguments.learning_rate:g}, {arguments.precision}"
    columns = ("task", "metric", *STARTS, "majority class")
    path = measure.write_report(
        "real_run",
        title="A real run: from text to scores",
        command=measure.command("real_run.py", words),
        sections=[
            *([arguments.note] if arguments.note else []),
            *facts,
            "## Pretraining\n\n" + measure.table(header, lines),
            f"## Fine-tuning, {seeds}: medians\n\n" + measure.table(columns, scores(results)),
            "## The whole configuration\n\n```json\n" + json.dumps(config, indent=1) + "\n```",
        ],
        figures={"curve": train, "results": _without_paths(results), "config": config},
        slug=arguments.hardware,
        arguments=arguments,
    )
    if (run / "report.html").is_file():
        shutil.copy2(run / "report.html", path.with_suffix(".html"))


def _without_paths(results: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("metric", "value", "metrics", "majority_baseline", "eval_loss", "seed", "steps", "all")
    return {
        task: {
            start: {name: result[name] for name in kept if name in result}
            for start, result in starts.items()
        }
        for task, starts in results.items()
    }


def main(words: Sequence[str] | None = None) -> int:
    """Do what is left to do; 0 when all is done, 3 when the time was up before."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", default=[], help="raw text; not needed for shards there")
    add("--glue_dir", type=Path, required=True)
    add("--output_dir", type=Path, required=True)
    add("--deepspeed_config", required=True)
    add("--vocab_size", type=int, default=30522)
    add("--dupe_factor", type=int, default=5)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=cores, help="of preparation (default: the usable cores)")
    add("--tasks", default=",".join(TASKS))
    add("--seeds", default="1,2,3")
    add("--learning_rate", type=float, default=5e-5)
    add("--precision", default="fp32")
    add("--device", choices=("cpu", "cuda"), help="default: what there is")
    add("--quick", action="store_true", help="a few steps of each training")
    add("--limit_s", type=float, help="end by then, and go on with the next call")
    add("--note", default="", help="a sentence for the report: of the text and the machine")
    add("--hardware", help="a word for the report's name; without it none is written")
    arguments = parser.parse_args(words)
    for name in ("output_dir", "glue_dir"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    os.environ.pop("RANK", None)
    commands = Commands(arguments.limit_s)
    results: dict[str, dict[str, Any]] = {}
    try:
        if arguments.text:
            prepare(commands, arguments)
        model = pretrain(commands, arguments)
        write(arguments, results, words)
        for results in finetune(commands, arguments, model):
            write(arguments, results, words)
    except TimeIsUpError:
        write(arguments, results, words)
        print("the time is up; the same command goes on")
        return 3
    for line in _lines(results):
        print(line)
    return 0


def write(
    arguments: argparse.Namespace, results: Mapping[str, Any], words: Sequence[str] | None
) -> None:
    """The report, where there is a name for it and something to tell."""
    metrics = arguments.output_dir / "run" / "metrics.jsonl"
    rows = read_metrics(metrics) if arguments.hardware and metrics.is_file() else []
    if any("train/mlm_loss" in row for row in rows):
        report(arguments, results, words)


def _lines(results: Mapping[str, Any]) -> Iterable[str]:
    return ("  ".join(row) for row in scores(results))


if __name__ == "__main__":
    sys.exit(main())
