"""Pretrain BERT: `deepspeed pretrain/run.py --deepspeed_config ds_configs/bert_base.json [flags]`.

Also under torchrun and as plain `python`. docs/reproduce.md has the recipes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zerobert.errors import ArgumentParser, ConfigError, run_script, truth
from zerobert.launcher import start
from zerobert.signals import StopRequest

if TYPE_CHECKING:
    from pretrain.experiment import Experiment


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; None stands for what the JSON or a default decides."""
    parser = ArgumentParser(
        prog="pretrain/run.py",
        description="Pretrain BERT on HDF5 shards with DeepSpeed.",
        epilog="example: deepspeed pretrain/run.py --deepspeed_config ds_configs/bert_base.json "
        "--input_dir data/shards --output_dir runs/base",
    )
    add = parser.add_argument
    add("--deepspeed_config", metavar="JSON", help="the experiment (default: paddle_base.json)")
    add("--input_dir", metavar="DIR", action="append", help="shards; repeatable (data/shards)")
    add(
        "--eval_dir",
        metavar="DIR",
        help="held-out shards (default: those beside the training ones)",
    )
    add("--vocab_file", metavar="FILE", help="for shards with no vocab.txt beside them")
    add("--output_dir", metavar="DIR", help="default: runs/<the JSON's name>")
    add("--max_steps", type=int, metavar="N", help="optimizer steps; -1: no limit")
    add("--max_samples", type=int, metavar="N", help="sequences")
    add("--num_train_epochs", type=float, metavar="X", help="the earliest limit ends the run")
    add("--max_train_s", type=float, metavar="X", help="seconds of training; resuming counts on")
    add(
        "--schedule_by",
        dest="by",
        choices=("steps", "time"),
        help="what the learning rate follows: steps (default), or the time of --max_train_s",
    )
    add("--resume", default="auto", metavar="auto|never|DIR", help="default: auto")
    add(
        "--init_from",
        metavar="MODEL",
        help="start from a model folder's weights; from a state's moments too",
    )
    add("--seed", type=int, metavar="N")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="replaces the JSON's sections")
    add("--tracker", action="append", choices=("none", "wandb"), help="repeatable (default: none)")
    add("--eval_steps", type=int, metavar="N", help="0: only at the end")
    add("--eval_rows", type=int, metavar="N", help="held-out rows on the way; 0: all (10000)")
    add(
        "--auto_micro_batch",
        action="store_true",
        help="the largest micro-batch that memory allows; the global batch stays",
    )
    add("--profile", action="store_true", help="trace a few steps into trace.json")
    add("--dry_run", action="store_true", help="print what would run, and stop")
    paddle = parser.add_argument_group("flags that PaddleNLP's run_pretrain.py has too")
    add = paddle.add_argument
    add("--model_type", type=str.lower, choices=("bert",), default="bert")
    add("--model_name_or_path", metavar="NAME|DIR", help="a known name is its architecture")
    add("--max_predictions_per_seq", type=int, metavar="N", help="checked against the shards")
    add("--batch_size", type=int, metavar="N", help="sequences per device and step")
    add("--learning_rate", type=float, metavar="X", help="peak rate")
    add("--weight_decay", type=float, metavar="X")
    add("--adam_epsilon", type=float, metavar="X")
    add("--max_grad_norm", type=float, metavar="X", help="gradient_clipping; 0: none")
    add("--warmup_steps", type=int, metavar="N")
    add("--logging_steps", type=int, metavar="N")
    add("--save_steps", type=int, metavar="N")
    add(
        "--n_gpu",
        "--n_cards",
        type=int,
        metavar="N",
        help="more than 1 starts the launcher; 0 is the CPU",
    )
    add("--device", "--select_device", choices=("cpu", "gpu"), help="default: what there is")
    add("--use_amp", type=truth, metavar="BOOL", help="true: fp16 with fp32 masters; false: fp32")
    add("--amp_level", choices=("O1", "O2"), help="both are fp16 weights with fp32 masters")
    add("--scale_loss", type=float, metavar="X", help="first loss scale of fp16, a power of 2")
    add("--to_static", type=truth, metavar="BOOL", help="true: bert.kernels.compile")
    add("--fuse_transformer", type=truth, metavar="BOOL", help="kernels are chosen either way")
    add("--profiler_options", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.profiler_options is not None:
        raise ConfigError("--profiler_options: use --profile, which traces a few steps")
    if args.device == "gpu" and args.n_gpu == 0:
        raise ConfigError("--device gpu and --n_gpu 0, which is the CPU, contradict each other")
    return args


def main() -> int:
    """Parse, hand over to the launcher where several processes are wanted, else train."""
    args = parse_args(sys.argv[1:])
    num_ranks = 0 if args.device == "cpu" else args.n_gpu
    return start(Path(__file__), sys.argv[1:], num_ranks, lambda stop: _train(args, stop))


def _train(args: argparse.Namespace, stop: StopRequest) -> int:
    import torch

    from pretrain import experiment, training
    from zerobert import distributed

    with distributed.one_voice():
        run = experiment.prepare(args)
    if args.auto_micro_batch:
        with distributed.one_voice():
            fitting = experiment.fitting_micro_batch(run, args)
        agreed = distributed.all_reduce_min(fitting)
        with distributed.one_voice():
            run = experiment.prepare(args, micro_samples=agreed)
    if args.device == "gpu" and distributed.is_main() and not torch.cuda.is_available():
        print("--device gpu: torch finds no GPU here; training on the CPU", file=sys.stderr)
    if args.dry_run:
        if distributed.is_main():
            _print_plan(run)
        return 0
    return training.train(run, args, stop)


def _print_plan(run: "Experiment") -> None:
    print(json.dumps(run.folder.resolved, indent=2))
    for name, value in run.facts().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    run_script(main)
