"""What a pretraining would take on GPUs that are not at hand.

python pretrain/plan.py --model bert_large --gpu h100 --num_gpus 1024
    --deepspeed_config ds_configs/bert_large_phase1.json

docs/scaling.md says how it is reckoned, and how far from published runs that is.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import config, cost, masking
from pretrain.run import parse_args
from zerobert import served
from zerobert.config import SIZES, BertConfig
from zerobert.ds_config import batch_sizes
from zerobert.errors import ArgumentParser, ConfigError, run_script
from zerobert.page import Table, format_table

_JSON = config.REPOSITORY / "ds_configs" / "bert_large_phase1.json"
_VOCAB_SIZE = 30522
_SEQ_LENGTH = 128
# What the shards of the two usual lengths ask for. Source: Devlin et al. 2018's data scripts.
_PREDICTIONS = {128: 20, 512: 80}


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
    add("--precision", choices=cost.PRECISIONS, help="default: the JSON's")
    add("--gpu", default="h100", help="v100, a100, h100, h200 or b200 (default: h100)")
    add("--num_gpus", type=int, default=8, help="default: 8")
    add("--gpus_per_machine", type=int, metavar="N", help="default: the maker's server's")
    add("--machine_gbit", type=float, metavar="X", help="all network adapters of a machine, Gbit/s")
    add("--max_seq_length", type=int, metavar="N", help=f"of the shards (default: {_SEQ_LENGTH})")
    add("--max_predictions_per_seq", type=int, metavar="N", help="default: as rows are masked")
    add("--vocab_size", type=int, default=_VOCAB_SIZE, help=f"default: {_VOCAB_SIZE}")
    add("--fill", type=float, default=1.0, help="share of tokens that are no padding (default: 1)")
    add(
        "--efficiency",
        type=float,
        default=cost.EFFICIENCY,
        metavar="X",
        help=f"share of the GPU's roofline that is reached (default: {cost.EFFICIENCY}, a goal)",
    )
    add("--max_steps", type=int, metavar="N", help="default: the JSON's")
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
    _check(args)
    experiment = _experiment(args)
    run = _run(args, experiment)
    step = cost.time_step(run)
    steps, untold = _limits(experiment, run)
    tables = [
        _assumed(run, args.gpu, _notes(args, run)),
        _memory(run),
        _step(run, step),
        _training(run, step, (steps, experiment.bert.run.max_train_s), args.price, untold),
    ]
    return [format_table(table) for table in tables]


def _check(args: argparse.Namespace) -> None:
    """Numbers that no training has.

    Raises:
        ConfigError: names the flag.
    """
    for name in ("num_gpus", "max_seq_length", "max_predictions_per_seq", "max_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name}: wanted 1 or more, got {value}")
    for name in ("fill", "efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigError(f"--{name}: wanted above 0, at most 1, got {getattr(args, name):g}")
    for name in ("gpus_per_machine", "machine_gbit"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name}: wanted above 0, got {value}")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ConfigError(f"--price: wanted a number from 0 on, got {args.price:g}")


def _experiment(args: argparse.Namespace) -> config.PretrainConfig:
    """The recipe, with the flags that a training has too.

    Raises:
        ConfigError: it can't be served, or has parts that the model of cost does not know.
    """
    flags = ["--deepspeed_config", str(args.deepspeed_config)]
    if args.precision is not None:
        flags += ["--precision", "fp32" if args.precision == "tf32" else args.precision]
    if args.max_steps is not None:
        flags += ["--max_steps", str(args.max_steps)]
    experiment = config.resolve(parse_args(flags))
    zero = experiment.deepspeed.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        if served.offloads_to(zero, name) != "none":
            raise ConfigError(
                f"zero_optimization.{name}: a plan does not know the time and memory of a CPU; "
                "remove it from a copy of the JSON, and read the plan as a bound of the speed"
            )
    if experiment.bert.kernels.attention == "plain":
        raise ConfigError(
            "kernels.attention: a plan knows fused attention alone, not plain's scores in memory; "
            "leave it out"
        )
    return experiment


def _notes(args: argparse.Namespace, run: cost.Run) -> list[tuple[str, str]]:
    """What was assumed for want of a flag."""
    notes = []
    if args.max_seq_length is None:
        notes.append(
            (
                "length",
                f"{run.seq_length} is assumed: a JSON does not know its shards; --max_seq_length N",
            )
        )
    if run.precision == "tf32":
        notes.append(("TF32", "torch computes in it with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 only"))
    return notes


def _assumed(run: cost.Run, name: str, notes: list[tuple[str, str]]) -> Table:
    gpu, model = run.gpu, run.model
    millions = cost.num_parameters(model) / 1e6
    precision = f"{run.precision}, weights in fp32" if run.is_autocast else run.precision
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
        ("precision", precision),
        ("peak", f"{run.peak_flops / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s"),
        ("efficiency", f"{run.efficiency:g} of the roofline (--efficiency: one that you measured)"),
        ("links", f"GPU {gpu.link / 1e9:g} GB/s, machine {gpu.machine_link / 1e9:g} GB/s each way"),
        ("batch", f"{run.global_samples:,} sequences, {run.optimizer}, ZeRO stage {run.stage}"),
        *notes,
    ]
    return Table(title="Assumed", header=("", "value"), rows=rows)


def _memory(run: cost.Run) -> Table:
    rows = []
    sample = cost.sample_bytes(run)
    for stage in range(4):
        other = dataclasses.replace(run, stage=stage)
        states = cost.state_bytes(other)
        try:
            step = cost.time_step(other)
        except ConfigError:
            rows.append((str(stage), f"{states / 1e9:.2f}", "none fits", "-", "-"))
            continue
        total = states + step.micro_samples * sample
        rate = f"{run.global_samples / step.seconds:,.0f}"
        micro = f"{step.micro_samples:,}"
        rows.append((str(stage), f"{states / 1e9:.2f}", micro, f"{total / 1e9:.2f}", rate))
    header = (
        "ZeRO stage",
        "GB of states a GPU",
        "largest micro-batch",
        "GB in all a GPU",
        "sequences/s",
    )
    title = f"Memory; a sequence takes {sample / 1e6:.0f} MB"
    return Table(title=title, header=header, rows=rows)


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
    run: cost.Run,
    step: cost.Step,
    limits: tuple[int | None, float | None],
    price: float | None,
    untold: str | None,
) -> Table:
    steps, budget_s = limits
    rate = run.global_samples / step.seconds
    rows = [
        ("sequences/s", f"{rate:,.0f}, {rate / run.num_gpus:,.0f} a GPU"),
        ("MFU", f"{100 * cost.mfu(run, step):.1f} %"),
        ("limit", step.limit),
    ]
    if untold is not None:
        rows.append(("length", untold))
    seconds = math.inf if steps is None else steps * step.seconds
    if budget_s is not None and budget_s < seconds:
        seconds, steps = budget_s, int(budget_s / step.seconds)
    if steps is not None:
        rows.append(("steps", f"{steps:,}, {_figures(steps * run.global_samples)} sequences"))
        hours = seconds / 3600
        time = f"{hours:,.1f} h" if hours >= 1 else f"{_figures(60 * hours)} min"
        rows.append(("time", f"{time}, {_figures(hours * run.num_gpus)} GPU-hours"))
        if price is not None:
            rows.append(("cost", _figures(hours * run.num_gpus * price)))
    return Table(title="Training", header=("", "value"), rows=rows)


def _run(args: argparse.Namespace, experiment: config.PretrainConfig) -> cost.Run:
    ds, kernels = experiment.deepspeed, experiment.bert.kernels
    model = _model(args, experiment)
    length = args.max_seq_length or min(_SEQ_LENGTH, model.max_position_embeddings)
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"--max_seq_length: wanted at most the model's max_position_embeddings, "
            f"{model.max_position_embeddings}, got {length}"
        )
    zero = ds.get("zero_optimization", {})
    stage = served.stage(ds, args.num_gpus)
    computed = served.computes_in(ds)
    run = cost.Run(
        model=model,
        gpu=_gpu(args),
        num_gpus=args.num_gpus,
        global_samples=_global_samples(ds, args.num_gpus),
        seq_length=length,
        max_predictions=_predictions(args, experiment.bert.data, length),
        stage=stage,
        precision="tf32" if args.precision == "tf32" else computed,
        is_autocast=computed != served.precision(ds),
        efficiency=args.efficiency,
        optimizer=experiment.optimizer.type,
        fill=args.fill if kernels.packing else 1.0,  # else padding is computed as words are
        overlaps=zero.get("overlap_comm", stage == 3),
        zero=zero,
        is_checkpointed=kernels.activation_checkpointing,
    )
    run.peak_flops  # noqa: B018 - refuses a precision that the GPU has no units for
    return run


def _model(args: argparse.Namespace, experiment: config.PretrainConfig) -> BertConfig:
    """The JSON's architecture, or the one that `--model` names.

    Raises:
        ConfigError: no such name.
    """
    if args.model is None:
        return experiment.model(args.vocab_size)
    name = args.model.lower().replace("_", "-")
    sizes = {f"bert-{size}": {"size": size} for size in SIZES} | config.KNOWN_NAMES
    size = sizes.get(name) or sizes.get(f"bert-{name}")
    if size is None:
        known = ", ".join(f"bert_{size}" for size in SIZES)
        raise ConfigError(
            f"--model: wanted one of {known} or of {', '.join(config.KNOWN_NAMES)}, got "
            f"{args.model!r}"
        )
    return BertConfig.from_size({**size, "vocab_size": args.vocab_size}, "--model")


def _figures(value: float) -> str:
    """`1,235`, `12.3`, `0.12`, `0.0012`."""
    if value >= 1:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2g}"


def _global_samples(ds: Mapping[str, Any], num_gpus: int) -> int:
    """Sequences a step: a fixed number, or as many a GPU as the JSON says."""
    total = ds.get("train_batch_size")
    # The JSON's micro-batch is for some other GPU: what fits this one is found.
    if total is not None:
        return batch_sizes({"train_batch_size": total}, 1).global_samples
    return batch_sizes(ds, num_gpus).global_samples


def _predictions(args: argparse.Namespace, data: config.DataConfig, length: int) -> int:
    """Masked words of a row: as asked, or as the recipe or the usual shards mask them."""
    asked: int | None = args.max_predictions_per_seq
    if asked is not None:
        if asked > length:
            raise ConfigError(
                f"--max_predictions_per_seq: wanted at most --max_seq_length, {length}, got {asked}"
            )
        return asked
    drawn = masking.num_predictions(length, data.masked_lm_prob or masking.MASKED_LM_PROB)
    return drawn if data.masking == "dynamic" else _PREDICTIONS.get(length, drawn)


def _limits(experiment: config.PretrainConfig, run: cost.Run) -> tuple[int | None, str | None]:
    """The steps of the training, and what of its length is not known here."""
    asked = experiment.bert.run
    untold = None
    if asked.num_train_epochs is not None:
        untold = (
            f"{asked.num_train_epochs:g} epochs end it too, of rows that are not known here: "
            "--max_steps N"
        )
    counted = dataclasses.replace(asked, num_train_epochs=None)
    if counted.max_steps is None and counted.max_samples is None:
        return None, untold
    return config.total_steps(counted, 0, run.global_samples), untold


def _gpu(args: argparse.Namespace) -> cost.Gpu:
    if args.gpu.lower() not in cost.GPUS:
        raise ConfigError(f"--gpu: wanted one of {', '.join(cost.GPUS)}, got {args.gpu!r}")
    gpu = cost.GPUS[args.gpu.lower()]
    if args.gpus_per_machine is not None:
        gpu = dataclasses.replace(gpu, per_machine=args.gpus_per_machine)
    if args.machine_gbit is not None:
        gpu = dataclasses.replace(gpu, machine_link=args.machine_gbit * 1e9 / 8)
    return gpu


if __name__ == "__main__":
    run_script(main)
