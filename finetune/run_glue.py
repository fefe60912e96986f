"""Fine-tune a pretrained model on a GLUE task, on all of them, or on your own data.

python finetune/run_glue.py --task_name SST-2 --data_dir data/glue

python finetune/run_glue.py --task_name custom --train_file train.csv --dev_file dev.csv
    --text_columns review --label_column stars

Without `--model_name_or_path` it takes the newest pretrained model under `runs/`.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

import torch

from finetune import glue, job, loop, submission
from finetune.data import find_labels, parse_columns
from finetune.output import check_output
from finetune.report import REPORT_NAME
from finetune.tasks import Task, custom_task, find_task, plain
from zerobert.checkpoint import newest_model
from zerobert.device import set_threads, slow_precision
from zerobert.errors import ArgumentParser, ConfigError, run_script
from zerobert.manifest import is_complete
from zerobert.schedule import ScheduleConfig

RUNS = Path("runs")
FINETUNED = RUNS / "finetune"


def build_parser() -> argparse.ArgumentParser:
    """The command line; PaddleNLP's flags keep their names and meaning."""
    parser = ArgumentParser(
        prog="finetune/run_glue.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--task_name",
        required=True,
        help="a GLUE task in any usual spelling, glue for all, or custom",
    )
    add("--model_type", choices=["bert"], default="bert")
    add(
        "--model_name_or_path",
        help="a model folder or a hub name (default: the newest under runs/)",
    )
    add(
        "--random_init",
        action="store_true",
        help="that model's architecture and vocabulary, new weights",
    )
    add(
        "--data_dir",
        type=Path,
        help="the task's folder or the GLUE folder (default: $GLUE_DIR, data/glue, the hub)",
    )
    add("--output_dir", type=Path, help="default: runs/finetune/TASK")
    add("--max_seq_length", type=int, help="default: 128, or the model's limit")
    add("--batch_size", type=int, help="default: the task's, 32")
    add("--learning_rate", type=float, help="default: the task's, 2e-5")
    add("--num_train_epochs", type=float, help="default: the task's, 3 (MRPC and WNLI 5)")
    add("--max_steps", type=int, default=-1, help="end earlier; -1 for no limit (default)")
    # Source of the four defaults: google-research/bert run_classifier.py and optimization.py.
    add("--warmup_proportion", type=float, default=0.1, help="share of the steps (default: 0.1)")
    add("--warmup_steps", type=int, help="wins over the proportion")
    add(
        "--layer_decay",
        type=float,
        help="factor of the rate from each layer to the one below, as 0.9 (default: one rate)",
    )
    add("--weight_decay", type=float, default=0.01, help="default: 0.01")
    add("--adam_epsilon", type=float, default=1e-6, help="default: 1e-6")
    add("--max_grad_norm", type=float, default=1.0, help="default: 1.0")
    add("--logging_steps", type=int, default=100, help="default: 100")
    add(
        "--save_steps",
        type=int,
        help="evaluate and save into step_N/ (default: evaluate after each epoch, save at the end)",
    )
    add("--seed", type=int, default=42, help="default: 42")
    add("--seeds", help="several runs, as 1,2,3: the best is kept, result.json has the median too")
    add(
        "--do_predict",
        action="store_true",
        help="write the test set's answers as the GLUE server takes them",
    )
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    add(
        "--n_gpu", type=int, help="0 for the CPU, 1 for one GPU (default: a GPU where there is one)"
    )
    add("--deepspeed_config", help=argparse.SUPPRESS)
    own = parser.add_argument_group("your own data (--task_name custom): TSV, CSV or JSONL")
    own.add_argument("--train_file", type=Path)
    own.add_argument("--dev_file", type=Path)
    own.add_argument("--test_file", type=Path, help="for --do_predict")
    own.add_argument("--text_columns", help="one column, or two as a,b")
    own.add_argument("--label_column")
    own.add_argument("--regression", action="store_true", help="the label is a number, not a class")
    return parser


def main() -> int:
    """Run the command line."""
    args = build_parser().parse_args()
    set_threads()
    # Without network it would print ten lines of retries before our one.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if args.deepspeed_config:
        raise ConfigError(
            "--deepspeed_config: fine-tuning runs in one process without DeepSpeed; "
            "leave the flag out"
        )
    if plain(args.task_name) == "glue":
        run_all(args)
    else:
        task = custom_row(args) if plain(args.task_name) == "custom" else find_task(args.task_name)
        out = args.output_dir or FINETUNED / task.name
        result = run_task(args, task, args.model_name_or_path or default_model(task), out)
        print(glue.format_results([result], title=f"{task.name} ({out})"))
        if result["metrics"]:
            print(f"mistakes and settings: {out / REPORT_NAME}")
    return 0


def run_all(args: argparse.Namespace) -> None:
    """Fine-tune on every task that there is data for.

    The table is also in `glue.json` and `glue.html`, and the predictions in `submission.zip`.
    """
    model = args.model_name_or_path or str(newest_model(RUNS))
    out = args.output_dir or FINETUNED
    title = f"GLUE dev sets, {model}"
    results = []
    for task in glue.available_tasks(args.data_dir):
        start = str(out / task.trained_on) if task.trained_on else model
        results.append(run_task(args, task, start, out / task.name))
        glue.write_results(out / "glue.json", results)
        glue.write_page(out / "glue.html", results, title=title)
    print(glue.format_results(results, title=title))
    print(f"models, predictions and {out / 'glue.json'} are in {out}/")
    print(f"the same with links to each task's page: {out / 'glue.html'}")
    zip_path = out / submission.ZIP_NAME
    if not args.do_predict:
        zip_path.unlink(missing_ok=True)  # of other models than those that are here now
        return
    missing = submission.write_zip(zip_path, [out / result["task"] for result in results])
    print(f"for the GLUE server: {zip_path}")
    if missing:
        print(f"warning: it lacks {', '.join(missing)}, and the server takes no zip without them")


def run_task(args: argparse.Namespace, task: Task, model: str, out: Path) -> dict[str, Any]:
    """Fine-tune on one task with every seed asked for."""
    seeds = parse_seeds(args)
    settings = choose_settings(args, task, seeds[0])
    check_output(out, Path(model))
    device = choose_device(args.n_gpu)
    if slow := slow_precision(device, args.precision):
        print(f"warning: {slow}")
    prepared = job.prepare(
        task,
        model=model,
        random_init=args.random_init,
        data_dir=args.data_dir,
        max_seq_length=args.max_seq_length,
        do_predict=args.do_predict,
        device=device,
    )
    return job.run_seeds(prepared, settings, seeds, out)


def default_model(task: Task) -> str:
    """The newest pretrained model, or the fine-tuned one for a task that can't be trained on.

    Raises:
        ConfigError: there is none.
    """
    if not task.trained_on:
        return str(newest_model(RUNS))
    folder = FINETUNED / task.trained_on
    if not is_complete(folder):
        raise ConfigError(
            f"{task.name} has no training set, a model fine-tuned on {task.trained_on} answers it: "
            f"there is none in {folder}; run --task_name {task.trained_on} first or give "
            "--model_name_or_path"
        )
    return str(folder)


def custom_row(args: argparse.Namespace) -> Task:
    """The task that the user's own files make.

    Raises:
        ConfigError: a flag is missing.
    """
    needed = ("train_file", "dev_file", "text_columns", "label_column")
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise ConfigError(f"--task_name custom: also give {', '.join(missing)}")
    if args.do_predict and args.test_file is None:
        raise ConfigError("--do_predict: --task_name custom also needs --test_file")
    return custom_task(
        train_file=args.train_file,
        dev_file=args.dev_file,
        test_file=args.test_file,
        text_columns=parse_columns(args.text_columns),
        label_column=args.label_column,
        labels=() if args.regression else find_labels(args.train_file, args.label_column),
    )


def choose_settings(args: argparse.Namespace, task: Task, seed: int) -> loop.Settings:
    """The flags, and the task's own settings where there is none.

    Raises:
        ConfigError: a value is out of range.
    """

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return loop.Settings(
        batch_size=int(given(args.batch_size, task.batch_size)),
        learning_rate=given(args.learning_rate, task.learning_rate),
        num_epochs=given(args.num_train_epochs, task.num_epochs),
        max_steps=None if args.max_steps == -1 else args.max_steps,
        schedule=ScheduleConfig(
            warmup_steps=args.warmup_steps, warmup_proportion=args.warmup_proportion
        ),
        layer_decay=args.layer_decay,
        weight_decay=args.weight_decay,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        seed=seed,
        precision=args.precision,
    )


def parse_seeds(args: argparse.Namespace) -> list[int]:
    """`--seeds 1,2,3`, or the one `--seed`.

    Raises:
        ConfigError: not numbers, or one twice.
    """
    if args.seeds is None:
        return [args.seed]
    words = args.seeds.split(",")
    if not all(word.strip().isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--seeds: wanted different numbers as 1,2,3, got {args.seeds!r}")
    return [int(word) for word in words]


def choose_device(n_gpu: int | None) -> torch.device:
    """The CPU or one GPU; says so where a GPU was asked for and there is none.

    Raises:
        ConfigError: more than one GPU.
    """
    if n_gpu is not None and not 0 <= n_gpu <= 1:
        raise ConfigError(
            f"--n_gpu {n_gpu}: fine-tuning runs in one process; use 1, or 0 for the CPU"
        )
    if n_gpu == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if n_gpu == 1:
        print("--n_gpu 1: this machine has no CUDA device; running on the CPU")
    return torch.device("cpu")


if __name__ == "__main__":
    run_script(main)
