"""The flags that all fine-tuning has; PaddleNLP's keep their names and meaning."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from zerobert.errors import ConfigError, truth


class _Elsewhere(argparse.Action):
    """A flag of other programs for the same; `const` says what to write here."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"{self.option_strings[0]}: {self.const}")


def name_or_path(text: str) -> str:
    """A model, which nobody means by an empty word: a variable of the shell is not set.

    Raises:
        argparse.ArgumentTypeError: the word is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("wanted a model's folder or name, got nothing")
    return text


def refuse_flags(parser: argparse.ArgumentParser, hints: Mapping[str, str]) -> None:
    """Answer flags that users bring from elsewhere with what to write here."""
    for flag, hint in hints.items():
        parser.add_argument(flag, action=_Elsewhere, nargs="?", const=hint, help=argparse.SUPPRESS)


def add_training_flags(
    parser: argparse.ArgumentParser, *, batch_size: str, learning_rate: str, num_epochs: str
) -> Any:
    """Add them.

    Args:
        batch_size, learning_rate, num_epochs: their defaults, in words.

    Returns:
        The group of `--seed`, for another flag that can't stand beside it.
    """
    add = parser.add_argument
    add("--model_type", choices=["bert"], default="bert")
    add(
        "--model_name_or_path",
        type=name_or_path,
        help="a model folder or a hub name (default: the newest under runs/)",
    )
    add(
        "--random_init",
        action="store_true",
        help="that model's architecture and vocabulary, new weights",
    )
    add("--batch_size", type=int, help=f"of each process; default: {batch_size}")
    add("--learning_rate", type=float, help=f"default: {learning_rate}")
    add("--num_train_epochs", type=float, help=f"default: {num_epochs}")
    add("--max_steps", type=int, default=-1, help="end earlier; -1 for no limit (default)")
    # Source of the defaults: google-research/bert run_classifier.py and optimization.py.
    add("--warmup_proportion", type=float, default=0.1, help="share of the steps (default: 0.1)")
    add("--warmup_steps", type=int, help="above 0 wins over the proportion")
    add(
        "--layer_decay",
        type=float,
        help="factor of the rate from each layer to the one below, as 0.9 (default: one rate)",
    )
    add("--weight_decay", type=float, help="default: 0.01")
    add("--adam_epsilon", type=float, help="default: 1e-6")
    add("--max_grad_norm", type=float, help="0: none; default: 1.0")
    add("--logging_steps", type=int, default=100, help="default: 100")
    add(
        "--save_steps",
        type=int,
        help="evaluate and save into step_N/ (default: evaluate after each epoch, save at the end)",
    )
    seeds = parser.add_mutually_exclusive_group()
    # A string: else argparse can't tell a 42 that was given from its own.
    seeds.add_argument("--seed", type=int, default="42", help="default: 42")
    add(
        "--early_stopping_patience",
        type=int,
        metavar="N",
        help="end after N evaluations in a row without a better one; the best model is kept",
    )
    add("--load_best_model_at_end", action="store_true", help="keep the best model, not the last")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on with a training that was ended before its time (default: auto)",
    )
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the JSON's, or fp32")
    add(
        "--n_gpu",
        type=int,
        help="more than 1 starts so many processes; 0 is the CPU (default: one process)",
    )
    add("--deepspeed_config", metavar="JSON", help="DeepSpeed's settings; flags stand above it")
    add("--device", choices=("cpu", "gpu"), help="default: what there is")
    add("--use_amp", type=truth, metavar="BOOL", help="true: fp16 with fp32 masters; false: fp32")
    add("--scale_loss", type=float, metavar="X", help="first loss scale of fp16, a power of 2")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    add("--output_dir", type=Path, help="default: runs/finetune/TASK")
    hints = {
        "--per_device_train_batch_size": "give --batch_size, which is of each process",
        "--per_device_eval_batch_size": "leave it out: it changes no score",
        "--do_eval": "leave it out: the dev set is always scored",
    }
    refuse_flags(parser, hints)
    return seeds


def ranks_asked_for(args: argparse.Namespace) -> int | None:
    """What the launcher is to start; 0 is one process on the CPU, None whatever there is.

    Raises:
        ConfigError: less than none.
    """
    if args.n_gpu is not None and args.n_gpu < 0:
        raise ConfigError(f"--n_gpu: wanted 0 (the CPU) or more, got {args.n_gpu}")
    return 0 if args.device == "cpu" else args.n_gpu
