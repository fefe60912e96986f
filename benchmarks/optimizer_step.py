"""The optimizer's step alone, on BERT's parameters: LAMB's implementations beside AdamW and peers.

    python benchmarks/optimizer_step.py --size base large --device cuda --deepspeed

All share weights and gradients, the kernels their moments too, and step in turns within one
process. Before anything is timed, each LAMB of ours must reach plain's weights; one that fails does
not end the others. On CUDA apex's fused optimizers are timed too where apex is installed, and
DeepSpeed's where `--deepspeed` asks for them, which has them compiled. The report is written again
after each round.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.errors import ZerobertError  # noqa: E402
from zerobert.kernels import lamb  # noqa: E402
from zerobert.kernels.lamb import Pieces, Rates, Scaling  # noqa: E402
from zerobert.model import BertForPreTraining  # noqa: E402
from zerobert.optim import Lamb, parameter_groups  # noqa: E402

# Reads of weights, gradients and both moments, writes of all but the gradients, in fp32.
FLOOR_BYTES = 28
LR, WEIGHT_DECAY = 1e-3, 0.01
STEPS_CHECKED = 3
TOLERANCE = 1e-6
Groups = list[dict[str, Any]]


def make_groups(config: BertConfig, device: torch.device) -> Groups:
    """The two groups of BERT's parameters, with weights and gradients as in training, and the
    `pieces` that kernels step.
    """
    with torch.device("meta"):
        groups = parameter_groups(BertForPreTraining(config), WEIGHT_DECAY)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: torch.Size, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    for group in groups:
        group["params"] = [nn.Parameter(draw(meta.shape, 0.02)) for meta in group["params"]]
        for parameter in group["params"]:
            parameter.grad = draw(parameter.shape, 1e-3)
        weights = [parameter.detach().view(-1) for parameter in group["params"]]
        gradients = [parameter.grad.view(-1) for parameter in group["params"]]
        moments = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        group["pieces"] = Pieces(weights, gradients, *moments)
    return groups


def for_torch(groups: Groups) -> Groups:
    """The groups as optimizers take them; each adds keys of its own."""
    return [{key: group[key] for key in ("name", "params", "weight_decay")} for group in groups]


class Kernel:
    """An implementation of LAMB's arithmetic, driven as an optimizer would."""

    def __init__(self, name: str, groups: Groups, *, local: bool, block: int | None = None) -> None:
        """Step through parameters at once where `local`, else in two passes as under ZeRO."""
        self.implementation = lamb.implementation(name)
        self.is_local, self.block = local, block or lamb.BLOCK
        self.groups, self.steps = groups, 0

    def step(self) -> None:
        """One step."""
        self.steps += 1
        lamb.BLOCK = self.block
        corrections = (1 - 0.9**self.steps, 1 - 0.999**self.steps)
        for group in self.groups:
            pieces, weight_decay = group["pieces"], group["weight_decay"]
            rates = Rates(0.9, 0.999, 1e-6, weight_decay, *corrections, self.steps)
            scaling = Scaling(LR, adapts=weight_decay > 0)
            if self.is_local:
                self.implementation.step_local(pieces, rates, scaling)
            else:
                squares = self.implementation.update_moments(pieces, rates)
                self.implementation.apply(pieces, rates, lamb.scales(squares, scaling))


Contender = Callable[[Groups], Any]  # makes an optimizer


def own(device: torch.device, blocks: Sequence[int]) -> dict[str, Contender]:
    """Our ways to take LAMB's step; the first is what the others must equal."""
    found: dict[str, Contender] = {
        "plain": lambda groups: Kernel("plain", groups, local=True),
        "zerobert.optim.Lamb": lambda groups: Lamb(for_torch(groups), lr=LR),
    }
    for fast in ("blocked",) if device.type == "cpu" else ("triton", "apex"):
        try:
            lamb.choose(device, fast)
        except ZerobertError as error:
            print(f"{fast}: {error}", file=sys.stderr)
            continue
        ways = {fast: True, f"{fast}, two passes": False}
        if fast == "apex":  # does all at once
            del ways["apex, two passes"]
        for way, local in ways.items():
            found[way] = lambda groups, fast=fast, local=local: Kernel(fast, groups, local=local)
    for block in blocks:
        found[f"blocked, {block}"] = lambda groups, block=block: Kernel(
            "blocked", groups, local=True, block=block
        )
    return found


def peers(device: torch.device, *, deepspeed: bool) -> dict[str, Contender]:
    """Other people's optimizers."""

    def adamw(**way: bool) -> Contender:
        return lambda groups: torch.optim.AdamW(for_torch(groups), lr=LR, **way)

    found = {"AdamW fused": adamw(fused=True), "AdamW foreach": adamw(foreach=True)}
    if device.type != "cuda":
        return found
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError:
        print("apex is not installed", file=sys.stderr)
    else:
        found["apex FusedLAMB"] = lambda groups: FusedLAMB(for_torch(groups), lr=LR)
        found["apex FusedAdam"] = lambda groups: FusedAdam(for_torch(groups), lr=LR)
    if deepspeed:
        from deepspeed.ops.adam import FusedAdam as DeepSpeedAdam
        from deepspeed.ops.lamb import FusedLamb

        found["DeepSpeed FusedLamb"] = lambda groups: FusedLamb(for_torch(groups), lr=LR)
        found["DeepSpeed FusedAdam"] = lambda groups: DeepSpeedAdam(for_torch(groups), lr=LR)
    return found


def check_equal(
    config: BertConfig, device: torch.device, blocks: Sequence[int], failed: dict[str, str]
) -> None:
    """Weights after some steps of each of ours.

    Args:
        failed: contender -> why; those are added that fail, or are further from plain's than sums
            in another order explain.
    """
    (_, plain), *others = own(device, blocks).items()
    wanted = stepped(plain, config, device)
    for name, make in others:
        with measure.noting(name, failed):
            for mine, true in zip(stepped(make, config, device), wanted, strict=True):
                error = ((mine - true).norm() / true.norm()).item()
                if not error <= TOLERANCE:
                    raise ValueError(
                        f"weights of shape {tuple(true.shape)} are {error:.1e} off plain's"
                    )


def stepped(make: Contender, config: BertConfig, device: torch.device) -> list[Tensor]:
    """The weights after some steps."""
    groups = make_groups(config, device)
    optimizer = make(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    gradients = [parameter.grad.clone() for parameter in parameters]
    for _ in range(STEPS_CHECKED):
        torch._foreach_copy_([parameter.grad for parameter in parameters], gradients)
        optimizer.step()  # apex's writes over its gradients
    return [parameter.detach() for parameter in parameters]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all contenders in turns, and a bare pass through memory and a copy among them; what is
    known after each round.
    """
    device = torch.device(arguments.device)
    config = BertConfig(**SIZES[arguments.size])
    failed: dict[str, str] = {}
    check_equal(config, device, arguments.blocks, failed)
    print(f"weights are equal, except: {failed or 'none'}", file=sys.stderr)
    groups = make_groups(config, device)
    num_elements = sum(parameter.numel() for group in groups for parameter in group["params"])
    makers = {
        **own(device, arguments.blocks),
        **peers(device, deepspeed=arguments.deepspeed),
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in makers.items():
        if name not in failed:
            with measure.noting(name, failed):
                steps[name] = make(groups).step
    # In place, because a copy to elsewhere also reads what it overwrites on most CPUs.
    memory = torch.randn(num_elements, device=device)
    steps["pass"] = memory.neg_
    steps["copy"] = functools.partial(torch.empty_like(memory).copy_, memory)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name, step in list(steps.items()):
            with measure.noting(name, failed):
                synchronize(device)
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    step()
                synchronize(device)
                times[name].append((time.perf_counter() - started) / arguments.steps)
            if name in failed:
                del steps[name], times[name]
        if number:
            seconds = {name: runs[1:] for name, runs in times.items()}
            moved = 2 * memory.nbytes
            yield {
                "num_elements": num_elements,
                "bytes_per_s": moved / statistics.median(seconds.pop("pass")),
                "copy_bytes_per_s": moved / statistics.median(seconds.pop("copy")),
                "seconds": seconds,
                "failed": failed,
            }


def tell(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The table; its ratios are those of the medians."""
    num_bytes, bytes_per_s = FLOOR_BYTES * figures["num_elements"], figures["bytes_per_s"]
    floor_s = num_bytes / bytes_per_s
    seconds = {name: statistics.median(runs) for name, runs in figures["seconds"].items()}
    adamw = seconds.get("AdamW fused", math.nan)
    rows = [
        (
            name,
            measure.spread([1e3 * second for second in runs]),
            f"{num_bytes / seconds[name] / 1e9:.1f}",
            f"{seconds[name] / floor_s:.2f}",
            f"{seconds[name] / adamw:.2f}",
            f"{seconds['plain'] / seconds[name]:.2f}",
        )
        for name, runs in figures["seconds"].items()
    ]
    header = ("", "ms", "GB/s", "x floor", "x AdamW fused", "plain / it")
    note = (
        f"{figures['num_elements'] / 1e6:.1f} million parameters. The floor is the time in which "
        f"the {FLOOR_BYTES} bytes that no step can do without move at the "
        f"{bytes_per_s / 1e9:.1f} GB/s of a bare pass through memory in place: "
        f"{1e3 * floor_s:.2f} ms. GB/s counts these bytes alone. A copy to elsewhere runs at "
        f"{figures['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written."
    )
    lost = measure.tell_failed(figures["failed"])
    return f"## {arguments.size}\n\n{measure.table(header, rows)}\n\n{note}{lost}"


def main(words: Sequence[str] | None = None) -> None:
    """Run one or more sizes, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", nargs="+", choices=list(SIZES), default=["base", "large"])
    add("--rounds", type=int, default=7)
    add("--steps", type=int, help="in a row of each contender (default: 1; on CUDA 20)")
    add("--blocks", type=int, nargs="*", default=[], help="sizes of `blocked`'s blocks to compare")
    add("--deepspeed", action="store_true", help="DeepSpeed's fused optimizers; needs nvcc")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="the smallest model, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.rounds = ["tiny"], 1
    if arguments.steps is None:  # one of a GPU's is over before the next is launched
        arguments.steps = 20 if arguments.device.startswith("cuda") else 1
    sections: dict[str, str] = {}
    figures: dict[str, Any] = {}
    for size in arguments.size:
        one = argparse.Namespace(**{**vars(arguments), "size": size})
        for figures[size] in run(one):
            sections[size] = tell(figures[size], one)
            if arguments.hardware:
                measure.write_report(
                    "optimizer_step",
                    title="Optimizer step",
                    command=measure.command("optimizer_step.py", words),
                    sections=list(sections.values()),
                    figures=figures,
                    slug=arguments.hardware,
                    arguments=arguments,
                )
        print(f"{sections[size]}\n", flush=True)
    if any(found["failed"] for found in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
