"""The benchmarks that a CPU can run, in under a quarter of an hour: `bash launch.sh bench`.

Each writes its dated report beside this script (with `--quick` into `runs/quick/`), named after
`--hardware`; copies of them and what each says go into `runs/bench/`. Optimizer, loader, training
step in fp32, engine and pretraining end to end take part always, the step in bf16 where the
processor has instructions for it, `finetuning.py` where `--glue_dir` gives its data, and
`data_preparation.py` where `--text` does.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu_all import Command, run, script  # noqa: E402
from zerobert.device import slow_precision  # noqa: E402

LIMIT_S = 900.0


def commands(arguments: argparse.Namespace) -> list[Command]:
    """What to run, the quickest first; their limits are shares of a quarter of an hour."""
    common = ("--device", arguments.device, "--hardware", arguments.hardware)
    common += ("--quick",) if arguments.quick else ()

    def train_step(dtype: str) -> Command:
        # As the README's rows have it; one micro-batch, and those it names beside ours.
        return script(
            f"train_step_{dtype}",
            140,
            "train_step.py",
            *("--size", "base", "--dtype", dtype, "--fill", "0.9", "--micro_batch", "8"),
            *("--accumulation", "1", "--rounds", "3"),
            *("--only", "Hugging Face sdpa", "NVIDIA", "zerobert", *common),
        )

    found = [
        script(
            "optimizer_step", 90, "optimizer_step.py", "--size", "base", "--rounds", "3", *common
        ),
        script("loader", 110, "loader.py", "--rounds", "3", *common),
        train_step("fp32"),
        *([] if slow_precision(torch.device(arguments.device), "bf16") else [train_step("bf16")]),
        script(
            "engine_overhead",
            110,
            "engine_overhead.py",
            *("--size", "base", "--rounds", "3", *common),
        ),
        script(
            "end_to_end",
            90,
            "end_to_end.py",
            *("--size", "mini", "--stage", "0", "1", "--batch", "32", *common),
        ),
    ]
    if arguments.glue_dir:
        found.append(
            script(
                "finetuning",
                110,
                "finetuning.py",
                *("--data_dir", str(arguments.glue_dir), "--sentences", "256"),
                *("--rounds", "2", *common),
            )
        )
    if arguments.text:
        nvidia = ("--nvidia", str(arguments.nvidia)) if arguments.nvidia else ()
        text = ("--text", str(arguments.text), "--rounds", "1", *nvidia)
        found.append(script("data_preparation", 110, "data_preparation.py", *text, *common))
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run them all; 1 where one failed or took too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--hardware", default="local", help="a word for the reports' names (default: local)")
    add("--device", default="cpu", help="default: cpu")
    add("--glue_dir", type=Path, help="GLUE's folder with SST-2, for finetuning.py")
    add("--text", type=Path, help="a folder of sentences, for data_preparation.py")
    add("--nvidia", type=Path, help="a folder with NVIDIA's create_pretraining_data.py, beside it")
    add("--output_dir", type=Path, default=ROOT / "runs" / "bench")
    add("--quick", action="store_true", help="the smallest models, once: does everything start?")
    arguments = parser.parse_args(words)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    left, ends_at = commands(arguments), time.monotonic() + LIMIT_S
    codes = []
    while left:  # what one does not need of its time, those behind it have
        share = (ends_at - time.monotonic()) / sum(each.limit_s for each in left)
        command = left.pop(0)
        codes.append(run(command, arguments.output_dir, share * command.limit_s))
    print(f"reports: {arguments.output_dir}/*_{arguments.hardware}_*.md, and beside the others in")
    print("benchmarks/, from where `python benchmarks/readme.py` takes the README's figures")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
