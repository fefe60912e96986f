"""What a pretraining would take on GPUs that are not at hand.

python pretrain/plan.py --model bert_large --gpu h100 --num_gpus 1024
    --deepspeed_config ds_configs/bert_large_phase1.json

docs/scaling.md says how it is reckoned, and how far from published runs that is.
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zerobert.launcher import choose_accelerator

choose_accelerator(os.environ)  # before DeepSpeed looks for one, and says so

from pretrain import config, cost  # noqa: E402
from pretrain.run import parse_args  # noqa: E402
from zerobert.config import BertConfig  # noqa: E402
from zerobert.ds_config import batch_sizes  # noqa: E402
from zerobert.errors import ArgumentParser, ConfigError, run_script  # noqa: E402
from zerobert.page import Table, format_table  # noqa: E402

_JSON = config.REPOSITORY / "ds_configs" / "bert_large_phase1.json"
_VOCAB_SIZE = 30522


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", metavar="JSON", default=str(_JSON))
    add("--model", metavar="SIZE", help="bert_base, bert_large, ... (default: the JSON's)")
    add("--gpu", default="h100", help="v100, a100, h100, h200 or b200 (default: h100)")
    add("--num_gpus", type=int, default=8, help="default: 8")
    add("--gpus_per_machine", type=int, metavar="N", help="default: the maker's server's")
    add("--machine_gbit", type=float, metavar="X", help="all network adapters of a machine, Gbit/s")
    add("--max_seq_length", type=int, default=128, help="of the shards (default: 128)")
    add("--max_predictions_per_seq", type=int, metavar="N", help="default: 20, or 80 from 512 on")
    add("--vocab_size", type=int, default=_VOCAB_SIZE, help=f"default: {_VOCAB_SIZE}")
    add("--fill", type=float, default=1.0, help="share of tokens that are no padding (default: 1)")
    add("--max_steps", type=int, help="default: the JSON's")
    add("--price", type=float, metavar="X", help="of a GPU for an hour")
    return parser


def main() -> int:
    """Print the plan."""
    args = build_parser().parse_args()
    print("\n\n".join(plan(args)))
    return 0


def plan(args: argparse.Namespace) -> list[str]:
    """The tables: what is assumed, memory by ZeRO stage, the step and the whole training.

    Raises:
        ConfigError: a value is out of range, or the batch does not fit the GPUs.
    """
    run, limits = _run(args)
    step = cost.time_step(run)
    tables = [_assumed(run, args.gpu), _memory(run), _step(run, step)]
    tables.append(_training(run, step, limits, args.price))
    return [format_table(table) for table in tables]


def _assumed(run: cost.Run, name: str) -> Table:
    gpu, model = run.gpu, run.model
    millions = cost.num_parameters(model) / 1e6
    rows = [
        (
            "model",
            f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, {millions:.0f} M",
        ),
        (
            "rows",
            f"{run.seq_length} tokens, {100 * run.fill:g} % filled, {run.max_predictions} asked",
        ),
        ("GPUs", f"{run.num_gpus:,} x {name.lower()}, {gpu.per_machine} a machine"),
        ("peak", f"{gpu.matrix_flops / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s"),
        ("links", f"GPU {gpu.link / 1e9:g} GB/s, machine {gpu.machine_link / 1e9:g} GB/s each way"),
        ("batch", f"{run.global_samples:,} sequences, {run.optimizer}, ZeRO stage {run.stage}"),
    ]
    return Table(title="Assumed", header=("", "value"), rows=rows)


def _memory(run: cost.Run) -> Table:
    rows = []
    for stage in range(4):
        other = dataclasses.replace(run, stage=stage)
        states = f"{cost.state_bytes(other) / 1e9:.2f}"
        try:
            step = cost.time_step(other)
        except ConfigError:
            rows.append((str(stage), states, "none fits", "-"))
            continue
        rate = f"{run.global_samples / step.seconds:,.0f}"
        rows.append((str(stage), states, f"{step.micro_samples:,}", rate))
    header = ("ZeRO stage", "GB of states a GPU", "largest micro-batch", "sequences/s")
    sample = cost.sample_bytes(run) / 1e6
    return Table(title=f"Memory; a sequence takes {sample:.0f} MB", header=header, rows=rows)


def _step(run: cost.Run, step: cost.Step) -> Table:
    parts = {
        "matrix products": step.matmul_s,
        "memory traffic": step.memory_s,
        "optimizer": step.optimizer_s,
        "messages that nothing hides": step.communication_s,
        "all": step.seconds,
    }
    rows = [
        (name, f"{1e3 * seconds:,.2f}", f"{100 * seconds / step.seconds:.1f} %")
        for name, seconds in parts.items()
    ]
    cut = f"{step.accumulation_steps} micro-batches of {step.micro_samples} a GPU"
    return Table(title=f"An optimizer step: {cut}", header=("", "ms", "share"), rows=rows)


def _training(
    run: cost.Run, step: cost.Step, limits: tuple[int | None, float | None], price: float | None
) -> Table:
    steps, budget_s = limits
    rate = run.global_samples / step.seconds
    rows = [
        ("sequences/s", f"{rate:,.0f}, {rate / run.num_gpus:,.0f} a GPU"),
        ("MFU", f"{100 * cost.mfu(run, step):.1f} %"),
        ("limit", step.limit),
    ]
    seconds = math.inf if steps is None else steps * step.seconds
    if budget_s is not None and budget_s < seconds:
        seconds, steps = budget_s, int(budget_s / step.seconds)
    if steps is not None:
        rows.append(("steps", f"{steps:,}, {steps * run.global_samples / 1e6:,.1f} M sequences"))
        hours = seconds / 3600
        time = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        rows.append(("time", f"{time}, {hours * run.num_gpus:,.0f} GPU-hours"))
        if price is not None:
            rows.append(("cost", f"{hours * run.num_gpus * price:,.0f}"))
    return Table(title="Training", header=("", "value"), rows=rows)


def _run(args: argparse.Namespace) -> tuple[cost.Run, tuple[int | None, float | None]]:
    """The run, and its limits in steps and seconds."""
    experiment = config.resolve(parse_args(["--deepspeed_config", str(args.deepspeed_config)]))
    ds, asked = experiment.deepspeed, experiment.bert.run
    model = experiment.model(args.vocab_size)
    if args.model is not None:
        size = args.model.lower().replace("-", "_").removeprefix("bert_").split("_")[0]
        model = BertConfig.from_size({"size": size, "vocab_size": args.vocab_size}, "--model")
    if args.num_gpus < 1:
        raise ConfigError(f"--num_gpus: wanted 1 or more, got {args.num_gpus}")
    if not 0 < args.fill <= 1:
        raise ConfigError(f"--fill: wanted above 0, at most 1, got {args.fill:g}")
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    length = args.max_seq_length
    predictions = args.max_predictions_per_seq or (20 if length < 512 else 80)
    # Its micro-batch is for some other GPU: what fits this one is found.
    shared = {k: v for k, v in ds.items() if k == "train_batch_size"} or ds
    run = cost.Run(
        model=model,
        gpu=_gpu(args),
        num_gpus=args.num_gpus,
        global_samples=batch_sizes(shared, args.num_gpus).global_samples,
        seq_length=length,
        max_predictions=predictions,
        stage=stage,
        optimizer=experiment.optimizer.type,
        fill=args.fill,
        overlaps=zero.get("overlap_comm", stage == 3),
        is_checkpointed=experiment.bert.kernels.activation_checkpointing,
    )
    steps = args.max_steps or (asked.max_steps if (asked.max_steps or 0) > 0 else None)
    return run, (steps, asked.max_train_s)


def _gpu(args: argparse.Namespace) -> cost.Gpu:
    if args.gpu.lower() not in cost.GPUS:
        raise ConfigError(f"--gpu: wanted one of {', '.join(cost.GPUS)}, got {args.gpu!r}")
    gpu = cost.GPUS[args.gpu.lower()]
    for name in ("gpus_per_machine", "machine_gbit"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ConfigError(f"--{name}: wanted above 0, got {value}")
    if args.gpus_per_machine is not None:
        gpu = dataclasses.replace(gpu, per_machine=args.gpus_per_machine)
    if args.machine_gbit is not None:
        gpu = dataclasses.replace(gpu, machine_link=args.machine_gbit * 1e9 / 8)
    return gpu


if __name__ == "__main__":
    run_script(main)
