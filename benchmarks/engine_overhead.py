"""What DeepSpeed's engine and our training loop cost over a bare loop of torch.

    python benchmarks/engine_overhead.py --size base --stage 0 1

The bare loop has no engine, no scaling, no agreement between ranks and no log: forward, backward,
clip, fused AdamW; with `--dtype bf16` weights of 16 bits, and masters and sums of gradients in
fp32, as the engines have them. Beside it, in turns within one process, the training step of
`pretrain` (`pretrain/loop.py`) on engines of each stage; in fp32 one process trains at stage 0
whatever it is asked for. All train on the same batches from the same weights, and after the first
steps must have the same weights. The report is written again after each round.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.train_step import DTYPES, make_batch, synchronize  # noqa: E402
from pretrain import loop  # noqa: E402
from pretrain.data import MicroBatches, StepBatch, dropout_seed  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.device import copied_to  # noqa: E402
from zerobert.engine import Engine, init_distributed, leave_distributed  # noqa: E402
from zerobert.kernels import Kernels  # noqa: E402
from zerobert.model import BertForPreTraining  # noqa: E402
from zerobert.optim import parameter_groups  # noqa: E402

LR, CLIP, SEED = 1e-4, 1.0, 42
STEPS_CHECKED = 2
# The mean error of a weight, in learning rates: Adam turns rounding into whole steps where a
# gradient is near zero.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
Step = Callable[[], object]
Weights = dict[str, Tensor]
Contender = tuple[Callable[[], Weights], Step]


class NobodyStops:
    """What the loop asks whether a signal came."""

    exit_code = 0


def make_step_batch(config: BertConfig, arguments: argparse.Namespace) -> StepBatch:
    """A global batch of one rank."""
    rows, size = arguments.micro_batch * arguments.accumulation, arguments.micro_batch
    whole = make_batch(config, rows, arguments.seq_length, 0.9, SEED)
    starts = range(0, rows, size)
    arrays = {name: tensor.numpy() for name, tensor in whole.items()}
    return StepBatch(
        micro_batches=MicroBatches(arrays, size, num_shapes=Kernels().num_shapes),
        first_samples=tuple(starts),
        num_masked=int(whole["masked_lm_positions"].count_nonzero()),
        num_tokens=int(whole["input_mask"].count_nonzero()),
    )


def new_model(config: BertConfig) -> BertForPreTraining:
    """The same weights each time."""
    torch.manual_seed(SEED)
    return BertForPreTraining(config)


def bare(
    config: BertConfig, batch: StepBatch, device: torch.device, dtype: torch.dtype
) -> Contender:
    """A step of plain torch."""
    model = new_model(config).to(device)
    groups = parameter_groups(model, 0.01)
    weights = [weight for group in groups for weight in group["params"]]
    masters = weights
    if dtype != torch.float32:
        masters = [weight.detach().clone().requires_grad_() for weight in weights]
        model.to(dtype)
        left = iter(masters)
        groups = [{**group, "params": [next(left) for _ in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    rows = sum(len(micro["input_ids"]) for micro in batch.micro_batches)

    def step() -> None:
        for micro, first in zip(batch.micro_batches, batch.first_samples, strict=True):
            torch.manual_seed(dropout_seed(SEED, first))
            losses = model(**{name: copied_to(device, x) for name, x in micro.items()})
            (losses.mlm_loss_sum / batch.num_masked + losses.nsp_loss_sum / rows).backward()
            if masters is not weights:
                add_up()
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    def add_up() -> None:
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

    def values() -> Weights:
        held = dict(zip(weights, masters, strict=True))
        return {name: held[p].detach().cpu().clone() for name, p in model.named_parameters()}

    return values, step


def under_engine(
    config: BertConfig, batch: StepBatch, arguments: argparse.Namespace, stage: int
) -> Contender:
    """The step of `pretrain` on an engine."""
    model = new_model(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=LR, fused=True)
    low = {"bf16": {"enabled": True}} if arguments.dtype == "bf16" else {}
    engine = Engine(
        model,
        optimizer,
        {
            "train_micro_batch_size_per_gpu": arguments.micro_batch,
            "gradient_accumulation_steps": arguments.accumulation,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage},
            **low,
        },
    )
    engine.train()
    stop: Any = NobodyStops()

    def step() -> None:
        window = loop.Window(lr=LR)
        loop.train_step(engine, batch, loop.share(batch, 0.0, stop), window, SEED)

    def weights() -> Weights:
        snapshot = engine.snapshot()  # of one rank: whole parameters
        return {p.name: p.values["weights"].view(snapshot.shapes[p.name]) for p in snapshot.pieces}

    return weights, step


def check_equal(contenders: dict[str, Weights], tolerance: float) -> None:
    """Weights after the first steps; the keys' bias has no gradient but rounding.

    Raises:
        ValueError: an engine's are further from the bare loop's than rounding explains.
    """
    wanted = contenders["bare loop"]
    for name, weights in contenders.items():
        for key, weight in weights.items():
            error = float((weight - wanted[key]).abs().mean()) / LR
            if not error <= tolerance and not key.endswith("key.bias"):
                raise ValueError(f"{name}: {key} is {error:.1e} rates off the bare loop's")


def run(arguments: argparse.Namespace) -> Iterator[dict[str, list[float]]]:
    """Seconds a step of each contender, in turns; what is known after each round."""
    config = BertConfig(**SIZES[arguments.size])
    device = torch.device(arguments.device)
    batch = make_step_batch(config, arguments)
    contenders = {"bare loop": bare(config, batch, device, DTYPES[arguments.dtype])}
    for stage in arguments.stage:
        contenders[f"engine, stage {stage}"] = under_engine(config, batch, arguments, stage)
    for _ in range(STEPS_CHECKED):
        for _, step in contenders.values():
            step()
    weights = {name: weights() for name, (weights, _) in contenders.items()}
    check_equal(weights, TOLERANCE[arguments.dtype])
    del weights
    print("weights are equal", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (_, step) in contenders.items():
            synchronize(device)
            started = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            synchronize(device)
            times[name].append((time.perf_counter() - started) / arguments.steps)
        yield times


def tell(times: dict[str, list[float]], arguments: argparse.Namespace) -> str:
    """The table; the overhead is the ratio of the medians."""
    rows = []
    for name, seconds in times.items():
        overhead = f"{100 * (measure.ratio(seconds, times['bare loop']) - 1):+.1f} %"
        rows.append((name, measure.spread([1e3 * second for second in seconds]), overhead))
    batch = f"{arguments.accumulation} x {arguments.micro_batch} rows of {arguments.seq_length}"
    return f"## {arguments.size}, {batch}, {arguments.dtype}\n\n" + measure.table(
        ("", "ms a step", "overhead"), rows
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run one size, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="base")
    add("--stage", type=int, nargs="+", choices=[0, 1, 2, 3], default=[0, 1])
    add("--dtype", choices=list(DTYPES), default="fp32", help="of all")
    add("--seq_length", type=int, choices=[128, 512], default=128)
    add("--micro_batch", type=int, default=4)
    add("--accumulation", type=int, default=2)
    add("--rounds", type=int, default=9)
    add("--steps", type=int, default=1, help="steps in a row of each contender")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="the smallest model, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.rounds = "tiny", 1
    init_distributed()
    for times in run(arguments):
        section = tell(times, arguments)
        if arguments.hardware:
            measure.write_report(
                "engine_overhead",
                title="What the engine costs",
                command=measure.command("engine_overhead.py", words),
                sections=[section],
                figures={"seconds": times},
                slug=arguments.hardware,
                arguments=arguments,
            )
    print(section)
    leave_distributed()


if __name__ == "__main__":
    main()
