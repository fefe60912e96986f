"""Where a training step's time goes: matrix products, attention, everything else, and idling.

    python benchmarks/profile_step.py --size base --device cuda --kernels compile=true

Profiles steps of our model as `train_step.py` runs them, and counts the device's kernels by what
they do. Kernels are chosen as in training; `--kernels` insists. On CUDA what no kernel covers is
idle time; on CPU the operators' own time is counted.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, train_step  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.kernels import Kernels  # noqa: E402
from zerobert.model import BertForPreTraining  # noqa: E402

# The first that a kernel's or an operator's name matches.
CATEGORIES = {
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|cublas|cutlass|nvjet|addmm|::mm\b|bmm|linear|matmul",
    "optimizer": r"adam|multi_tensor|foreach|lamb(?!da)",
    "layer norm": r"layer_?norm|gammabeta",
    "softmax and loss": r"softmax|nll|cross_entropy",
    "copies": r"memcpy|memset|copy|cat|index|gather|scatter|fill|zero_",
    "element by element": "",
}


def category(name: str) -> str:
    """What a kernel is counted as."""
    return next(title for title, words in CATEGORIES.items() if re.search(words, name.lower()))


def run(arguments: argparse.Namespace) -> tuple[dict[str, float], list[tuple[str, float]], float]:
    """Seconds a step by category, the longest kernels, and the wall time of a step."""
    config, device = BertConfig(**SIZES[arguments.size]), torch.device(arguments.device)
    kernels = Kernels(**dict(arguments.kernels))
    torch.manual_seed(0)
    contender = train_step.Contender(
        train_step.Ours(BertForPreTraining(config, kernels)).to(device),
        train_step.DTYPES[arguments.dtype],
        masters=True,
        num_shapes=kernels.num_shapes,
    )
    shape = (arguments.micro_batch, arguments.seq_length, 0.9)
    batches = [train_step.make_batch(config, *shape, seed) for seed in range(2)]
    for _ in range(3):  # warm-up, compilation
        contender.step(batches, device)
    train_step.synchronize(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    started = time.perf_counter()
    for _ in range(arguments.steps):
        contender.step(batches, device)
    train_step.synchronize(device)
    wall_s = (time.perf_counter() - started) / arguments.steps
    with profile(activities=activities) as profiler:
        for _ in range(arguments.steps):
            contender.step(batches, device)
        train_step.synchronize(device)
    spent: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    longest = []
    for event in profiler.key_averages():
        seconds = own_s(event, device) / arguments.steps
        if seconds > 0:
            spent[category(event.key)] += seconds
            longest.append((event.key, seconds))
    longest.sort(key=lambda pair: -pair[1])
    return spent, longest[:15], wall_s


def own_s(event: Any, device: torch.device) -> float:
    """The time of a kernel on CUDA, of an operator itself on CPU.

    What the optimizer calls its step appears among CUDA's events as well, as long as its kernels.
    """
    if device.type == "cpu":
        return float(event.self_cpu_time_total) / 1e6
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
    is_kernel = is_kernel and not getattr(event, "is_user_annotation", False)  # torch >= 2.6
    return float(event.self_device_time_total) / 1e6 if is_kernel else 0.0


def tell(
    found: tuple[dict[str, float], list[tuple[str, float]], float], arguments: argparse.Namespace
) -> str:
    """The tables."""
    spent, longest, wall_s = found
    idle = {"idle": max(0.0, wall_s - sum(spent.values()))} if arguments.device == "cuda" else {}
    shares = [
        (name, f"{1e3 * seconds:.2f}", f"{seconds / wall_s:.1%}")
        for name, seconds in {**spent, **idle}.items()
    ]
    names = [(f"`{name[:90]}`", f"{1e3 * seconds:.2f}") for name, seconds in longest]
    kernels = "".join(f", {key}={value}".lower() for key, value in arguments.kernels)
    what = f"{arguments.size}, {arguments.dtype}{kernels}"
    batch = f"2 x {arguments.micro_batch} rows of {arguments.seq_length}"
    return "\n\n".join(
        [
            f"## {what}, {batch}: {1e3 * wall_s:.2f} ms a step",
            measure.table(("", "ms", "share"), shares),
            measure.table(("the longest", "ms"), names),
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Profile one configuration, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="base")
    add("--dtype", choices=list(train_step.DTYPES))
    add("--seq_length", type=int, choices=[128, 512], default=128)
    add("--micro_batch", type=int, default=64)
    add("--steps", type=int, default=5)
    add(
        "--kernels",
        type=train_step.kernel_setting,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of a configuration's `kernels`",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="the smallest model")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.micro_batch = "tiny", 4
    arguments.dtype = arguments.dtype or ("fp32" if arguments.device == "cpu" else "bf16")
    found = run(arguments)
    section = tell(found, arguments)
    print(section)
    if arguments.hardware:
        path = measure.write_report(
            "profile_step",
            title="Where a training step's time goes",
            command=measure.command("profile_step.py", words),
            sections=[section],
            figures={"seconds": found[0], "longest": dict(found[1]), "wall_s": found[2]},
            slug=arguments.hardware,
            arguments=arguments,
        )
        print(f"-> {path}")


if __name__ == "__main__":
    main()
