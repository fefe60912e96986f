"""The benchmarks that a CPU can run, in under a quarter of an hour: `bash launch.sh bench`.

Each writes its dated report beside this script, named after `--hardware`; what it says goes into
`runs/bench/`. `data_preparation.py` and `finetuning.py` take part where their data is given.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_all import Command, run, script  # noqa: E402


def commands(arguments: argparse.Namespace) -> list[Command]:
    """What to run, the quickest first."""
    common = ("--device", arguments.device, "--hardware", arguments.hardware)
    common += ("--quick",) if arguments.quick else ()
    found = [
        script(
            "optimizer_step", 120, "optimizer_step.py", "--size", "base", "--rounds", "3", *common
        ),
        script("loader", 180, "loader.py", "--rounds", "3", *common),
        script(
            "train_step",
            240,
            "train_step.py",
            *("--size", "mini", "--fill", "0.9", "--micro_batch", "8", "--rounds", "3", *common),
        ),
        script(
            "engine_overhead",
            150,
            "engine_overhead.py",
            *("--size", "small", "--micro_batch", "8", "--accumulation", "4"),
            *("--rounds", "3", *common),
        ),
    ]
    if arguments.glue_dir:
        found.append(
            script(
                "finetuning",
                330,
                "finetuning.py",
                *("--data_dir", str(arguments.glue_dir), "--sentences", "256"),
                *("--rounds", "2", *common),
            )
        )
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run them all; 1 where one failed or took too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--hardware", default="local", help="a word for the reports' names (default: local)")
    add("--device", default="cpu", help="default: cpu")
    add("--glue_dir", type=Path, help="GLUE's folder with SST-2, for finetuning.py")
    add("--output_dir", type=Path, default=ROOT / "runs" / "bench")
    add("--quick", action="store_true", help="the smallest models, once: does everything start?")
    arguments = parser.parse_args(words)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    summary = arguments.output_dir / "summary.jsonl"
    summary.unlink(missing_ok=True)
    for command in commands(arguments):
        run(command, arguments.output_dir, command.limit_s)
    ended = [json.loads(line) for line in summary.read_text(encoding="utf-8").splitlines()]
    print(f"reports: {ROOT / 'benchmarks'}/*_{arguments.hardware}_*.md")
    return int(any(line["code"] for line in ended))


if __name__ == "__main__":
    sys.exit(main())
