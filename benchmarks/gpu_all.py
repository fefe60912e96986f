"""Everything that only a CUDA GPU can show, in parts of some nine minutes each.

    python benchmarks/gpu_all.py --part 1 --output_dir results --hardware h100

The most valuable comes first. Each command of a part has a limit of its own; what it says goes to
a file of its own as it is said, and a line on how it ended into `summary.jsonl`, so that nothing
is lost where a part is cut off. A command that fails does not end the part. Reports land beside
this script, and copies of them in the output folder.

    1   the doctor's table, and the tests that need a GPU: kernels beside their plain twins, every
        ZeRO stage in fp32, bf16 and fp16 beside float64, states that go on
    2   training steps at length 128 beside the peers'
    3   the same at 512
    4   the optimizer's step beside apex's and torch's, what the engine costs
    5   the loader beside NVIDIA's; pretraining end to end at each stage, in bf16 and fp16: the
        loader must keep up
    6   where the time goes: a profile of the best configuration
    7   fine-tuning beside Hugging Face's Trainer
    8   a real run of `ds_configs/h100_20min.json`, from text to scores; parts 9 to 13 go on where
        the one before ended
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PART_S = 530
GRACE_S = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What to run, for how long at most, and what its log is called."""

    name: str
    words: tuple[str, ...]
    limit_s: int


def python(name: str, limit_s: int, *words: str) -> Command:
    """A command of this Python."""
    return Command(name=name, words=(sys.executable, *words), limit_s=limit_s)


def script(name: str, limit_s: int, *words: str) -> Command:
    """A benchmark of this folder."""
    return python(name, limit_s, str(Path("benchmarks", words[0])), *words[1:])


def parts(arguments: argparse.Namespace) -> dict[int, list[Command]]:
    """The commands of each part."""
    hardware = ("--hardware", arguments.hardware)
    device = ("--device", arguments.device)
    quick = ("--quick",) if arguments.quick else ()
    common = (*device, *hardware, *quick)
    is_cpu = arguments.device == "cpu"
    low = arguments.precision or ("fp32" if is_cpu else "bf16")
    compiled = () if is_cpu else ("--compile",)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs")

    def step(length: int, size: str, micro_batch: int) -> Command:
        rows = 2 if arguments.quick else micro_batch
        shape = ("--size", size, "--seq_length", str(length), "--micro_batch", str(rows))
        name = f"{arguments.hardware}_{size}"
        return script(
            f"train_step_{size}_{length}",
            260,
            "train_step.py",
            *("--dtype", low, *shape, "--accumulation", "1", "--rounds", "5", *compiled),
            *("--fill", "0.9", *device, "--hardware", name, *quick),
        )

    def whole(precisions: Sequence[str], limit_s: int, *words: str) -> Command:
        flags = ("--size", "base", "--precision", *precisions, *words, *common)
        return script("end_to_end", limit_s, "end_to_end.py", *flags)

    precisions = (low,) if is_cpu else (low, "fp16")
    return {
        1: [
            python("doctor", 60, "zerobert/doctor.py"),
            python("tests_kernels", 180, *tests, "tests/unit/kernels"),
            python("tests_exactness", 240, *tests, "tests/unit/test_exactness.py"),
            python("tests_states", 150, *tests, "tests/unit/test_training_state.py"),
            python("tests_device", 60, *tests, "tests/unit/test_device.py"),
        ],
        2: [step(128, "base", 64), step(128, "large", 64)],
        3: [step(512, "base", 16), step(512, "large", 16)],
        4: [
            script("optimizer_step", 240, "optimizer_step.py", "--size", "base", "large", *common),
            script(
                "engine_overhead",
                240,
                "engine_overhead.py",
                *("--dtype", low, "--stage", "0", "1", "2", "3"),
                *("--micro_batch", "2" if arguments.quick else "64", *common),
            ),
        ],
        5: [
            script("loader", 120, "loader.py", "--rounds", "3", *common),
            whole(
                precisions,
                400,
                *("--batch", "512", "--micro_batch", "64", "--steps", "40"),
            ),
        ],
        6: [
            script(
                "profile_step",
                300,
                "profile_step.py",
                *("--size", "base", "--dtype", low, *common),
            )
        ],
        7: [
            script(
                "finetuning",
                400,
                "finetuning.py",
                *("--data_dir", str(arguments.glue_dir), "--sentences", "12800"),
                *("--precision", low, *common),
            )
        ],
        **{number: [_real_run(arguments, low)] for number in range(8, 14)},
    }


def _real_run(arguments: argparse.Namespace, low: str) -> Command:
    recipe = "bert_tiny_cpu" if arguments.device == "cpu" else "h100_20min"
    return script(
        "real_run",
        PART_S,
        "real_run.py",
        *("--text", *map(str, arguments.text), "--glue_dir", str(arguments.glue_dir)),
        *("--deepspeed_config", f"ds_configs/{recipe}.json", "--hardware", arguments.hardware),
        *("--output_dir", str(arguments.output_dir / "real"), "--limit_s", str(PART_S - 40)),
        *("--precision", low),
        *("--device", arguments.device, *(("--quick",) if arguments.quick else ())),
    )


def run(command: Command, folder: Path, limit_s: float) -> None:
    """Run one command, and write how it ended; what it started ends with it."""
    started = time.monotonic()
    log = folder / f"{command.name}.log"
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command.words)}\n")
        file.flush()
        process = subprocess.Popen(
            command.words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = "cut off"
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)  # a training saves
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started
    line = {"command": command.name, "code": code, "seconds": round(seconds, 1)}
    with (folder / "summary.jsonl").open("a", encoding="utf-8") as summary:
        summary.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    print("\n".join(f"    {words}" for words in tail), flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 where a command failed or there was no time for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--part", type=int, nargs="+", default=[1])
    add("--output_dir", type=Path, default=ROOT / "runs" / "gpu_all")
    add("--hardware", default="gpu", help="a word for the reports' names")
    add("--device", default="cuda")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16, on a CPU fp32")
    add("--glue_dir", type=Path, default=Path("data/glue"), help="of parts 7 and on")
    add("--text", type=Path, nargs="+", default=[Path("data/raw")], help="of the real run")
    add("--only", help="commands whose name contains this")
    add("--quick", action="store_true", help="the smallest models: does everything start?")
    arguments = parser.parse_args(words)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    before = set(reports())
    for number in arguments.part:
        ends = time.monotonic() + PART_S
        for command in parts(arguments)[number]:
            left_s = ends - time.monotonic()
            if (not arguments.only or arguments.only in command.name) and left_s > 0:
                run(command, arguments.output_dir, min(command.limit_s, left_s))
            for path in set(reports()) - before:
                shutil.copy2(path, arguments.output_dir)
    summary = (arguments.output_dir / "summary.jsonl").read_text(encoding="utf-8")
    return int(any(json.loads(line)["code"] for line in summary.splitlines()))


def reports() -> list[Path]:
    """The dated reports beside this script."""
    return [*Path(__file__).parent.glob("*_20*.md"), *Path(__file__).parent.glob("*_20*.json")]


if __name__ == "__main__":
    sys.exit(main())
