"""Everything that only a CUDA GPU can show, in parts of less than nine minutes each.

    python benchmarks/gpu_all.py --part 1 --output_dir results --hardware h100

The most valuable comes first. Each command of a part has a limit of its own; what it says goes to
a file of its own as it is said, and a line on how it ended into `summary.jsonl`, so that nothing
is lost where a part is cut off. A command that fails does not end the part. Reports land beside
this script (with `--quick` in runs/quick), and copies of them in the output folder, while the
commands run.

    1   the doctor's table, and the tests that need a GPU: kernels beside their plain twins, every
        ZeRO stage in fp32, bf16 and fp16 beside float64, states that go on
    2   training steps at length 128 beside the peers', matrix products, the copy rate, the roofline
    3   the same at 512
    4   the optimizer's step beside apex's, DeepSpeed's and torch's; what the engine costs
    5   the loader beside NVIDIA's; pretraining end to end at each stage, in bf16 and fp16, then
        large and at 512: the wait for data must stay under 1 %
    6   where the time goes: profiles with the kernels chosen, compiled, and at 512
    7   fine-tuning beside Hugging Face's Trainer
    8   each kernel's ways at 128 and 512, and steps without dropout
    9   what torch.compile makes of ours and of Hugging Face's
    10  a real run of `ds_configs/h100_20min.json`, from text to scores; parts 11 to 13 go on where
        the one before ended, as does each that is called again. Exit code 3 says that it goes on.
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
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
QUICK = ROOT / "runs" / "quick"  # as in measure.py, which this script need not load
# With the grace that a training has to save, a part ends within nine minutes.
PART_S, GRACE_S = 480, 30
POLL_S = 5
GOES_ON = 3  # the exit code of what was ended in time and goes on with the next call
# Of a micro-batch, by size and length: what fits beside the weights of all contenders.
ROWS = {("base", 128): 256, ("base", 512): 64, ("large", 128): 64, ("large", 512): 16}
COMPILED = ("Hugging Face sdpa", "Hugging Face sdpa, compiled", "zerobert", "zerobert, compiled")
# Each differs from what `auto` takes on CUDA, or names one of its choices beside the others.
WAYS = (
    "attention=sdpa",
    "attention=varlen",
    "projections=separate",
    "cross_entropy=plain",
    "layer_norm=triton",
    "layer_norm=auto",
)


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
    """The commands of each part; their limits add up to what a part may take."""
    hardware = ("--hardware", arguments.hardware)
    device = ("--device", arguments.device)
    quick = ("--quick",) if arguments.quick else ()
    common = (*device, *hardware, *quick)
    is_cpu = arguments.device == "cpu"
    low = arguments.precision or ("fp32" if is_cpu else "bf16")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", "-rs")

    def step(length: int, size: str, limit_s: int, *words: str, what: str = "") -> Command:
        rows = 2 if arguments.quick else ROWS[size, length]
        shape = ("--size", size, "--seq_length", str(length), "--micro_batch", str(rows))
        name = f"{size}_{what}" if what else size
        return script(
            f"train_step_{name}_{length}",
            limit_s,
            "train_step.py",
            *("--dtype", low, *shape, "--accumulation", "1", "--rounds", "5", "--fill", "0.9"),
            *("--steps", "1" if is_cpu else "5"),
            *(*words, *device, "--hardware", f"{arguments.hardware}_{name}", *quick),
        )

    def whole(name: str, limit_s: int, length: int, size: str, *words: str) -> Command:
        rows = ROWS[size, length]
        shape = ("--size", size, "--seq_length", str(length), "--micro_batch", str(rows))
        slug = (*device, "--hardware", f"{arguments.hardware}_{name}", *quick)
        wait = () if arguments.quick else ("--most_wait", "0.01")
        flags = (*shape, "--batch", str(2**16 // length), "--steps", "40", *words, *wait, *slug)
        return script(f"end_to_end_{name}", limit_s, "end_to_end.py", *flags)

    def profile(name: str, limit_s: int, length: int, *words: str) -> Command:
        rows = ("--seq_length", str(length), "--micro_batch", str(ROWS["base", length]))
        slug = (*device, "--hardware", f"{arguments.hardware}_{name}", *quick)
        flags = ("--size", "base", "--dtype", low, *rows, *words, *slug)
        return script(f"profile_{name}", limit_s, "profile_step.py", *flags)

    def optimizer(name: str, limit_s: int, *words: str) -> Command:
        flags = (*words, *device, "--hardware", f"{arguments.hardware}{name}", *quick)
        return script(f"optimizer_step{name}", limit_s, "optimizer_step.py", *flags)

    precisions = (low,) if is_cpu else (low, "fp16")
    compiled = ("--compile", "--only", *COMPILED)
    ways = [word for settings in WAYS for word in ("--kernels", *settings.split())]
    deepspeed = () if is_cpu else ("--deepspeed",)
    model = ("--model_name_or_path", arguments.model_name_or_path)
    return {
        1: [
            python("doctor", 40, "zerobert/doctor.py"),
            python("tests_kernels", 140, *tests, "tests/unit/kernels"),
            python("tests_exactness", 180, *tests, "tests/unit/test_exactness.py"),
            python("tests_states", 80, *tests, "tests/unit/test_training_state.py"),
            python("tests_device", 40, *tests, "tests/unit/test_device.py"),
        ],
        2: [step(128, "base", 210), step(128, "large", 270)],
        3: [step(512, "base", 210), step(512, "large", 270)],
        4: [
            optimizer("", 140, "--size", "base", "large"),
            script(
                "engine_overhead",
                180,
                "engine_overhead.py",
                *("--dtype", low, "--stage", "0", "1", "2", "3"),
                *("--micro_batch", "2" if arguments.quick else "64", *common),
            ),
            # Last, because nvcc takes minutes where it is there at all.
            optimizer("_deepspeed", 120, "--size", "base", *deepspeed),
            python("tests_built", 40, *tests[:-2], "gpu and slow", "tests/unit/kernels"),
        ],
        5: [
            script("loader", 70, "loader.py", "--rounds", "3", *common),
            whole("base_128", 250, 128, "base", "--precision", *precisions),
            whole("large_128", 80, 128, "large", "--precision", low, "--stage", "1"),
            whole("large_512", 80, 512, "large", "--precision", low, "--stage", "1"),
        ],
        6: [
            profile("128", 120, 128),
            profile("512", 120, 512),
            profile("compiled_128", 240, 128, "--kernels", "compile=true"),
        ],
        7: [
            script(
                "finetuning",
                450,
                "finetuning.py",
                *("--data_dir", str(arguments.glue_dir), "--sentences", "12800"),
                *(model if arguments.model_name_or_path else ()),
                *("--precision", low, *common),
            )
        ],
        8: [
            step(128, "base", 180, *ways, what="kernels"),
            step(512, "base", 180, *ways, what="kernels"),
            step(128, "base", 120, "--dropout", "0", what="no_dropout"),
        ],
        9: [
            step(128, "base", 240, *compiled, what="compiled"),
            step(512, "base", 240, *compiled, what="compiled"),
        ],
        **{number: [_real_run(arguments, low)] for number in range(10, 14)},
    }


def _real_run(arguments: argparse.Namespace, low: str) -> Command:
    recipe = "bert_tiny_cpu" if arguments.device == "cpu" else "h100_20min"
    return script(
        "real_run",
        PART_S,
        "real_run.py",
        *("--text", *map(str, arguments.text), "--glue_dir", str(arguments.glue_dir)),
        *("--deepspeed_config", f"ds_configs/{recipe}.json", "--hardware", arguments.hardware),
        *("--output_dir", str(arguments.output_dir / "real"), "--limit_s", str(PART_S - 30)),
        *("--precision", low),
        *("--device", arguments.device, *(("--quick",) if arguments.quick else ())),
    )


def run(command: Command, folder: Path, limit_s: float, prefix: str = "") -> int | str:
    """Run one command, and write how it ended; what it started ends with it.

    Returns:
        Its exit code, or that it was cut off.
    """
    started, began = time.monotonic(), time.time()
    log = folder / f"{prefix}{command.name}.log"
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command.words)}\n")
        file.flush()
        process = subprocess.Popen(
            command.words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = _wait(process, limit_s, lambda: keep_reports(folder, began))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    keep_reports(folder, began)
    seconds = time.monotonic() - started
    line = {"command": f"{prefix}{command.name}", "code": code, "seconds": round(seconds, 1)}
    with (folder / "summary.jsonl").open("a", encoding="utf-8") as summary:
        summary.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    print("\n".join(f"    {words}" for words in tail), flush=True)
    return code


def _wait(
    process: subprocess.Popen[bytes], limit_s: float, meanwhile: Callable[[], None]
) -> int | str:
    """How a command ended; at its limit it is told to, and has a moment to save."""
    ends = time.monotonic() + limit_s
    while (left_s := ends - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left_s, POLL_S))
        meanwhile()
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    return "cut off"


def keep_reports(folder: Path, since: float) -> None:
    """Copy the reports that were written since a moment, as they are now."""
    for path in (*HERE.glob("*_20*.*"), *QUICK.glob("*_20*.*")):
        if path.suffix in (".md", ".json", ".html") and path.stat().st_mtime >= since:
            shutil.copy2(path, folder)


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 where a command failed or was cut off, 3 where one goes
    on with the next call.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--part", type=int, nargs="+", default=[1])
    add("--output_dir", type=Path, default=ROOT / "runs" / "gpu_all")
    add("--hardware", default="gpu", help="a word for the reports' names")
    add("--device", default="cuda")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16, on a CPU fp32")
    add("--glue_dir", type=Path, default=Path("data/glue"), help="of part 7 and the real run")
    add("--text", type=Path, nargs="+", default=[Path("data/raw")], help="of the real run")
    add("--model_name_or_path", help="of part 7; default: that of finetuning.py")
    add("--only", help="commands whose name contains this")
    add("--quick", action="store_true", help="the smallest models: does everything start?")
    arguments = parser.parse_args(words)
    known = parts(arguments)
    if unknown := sorted(set(arguments.part) - known.keys()):
        parser.error(f"--part {unknown[0]}: there are parts 1 to {max(known)}")
    due = {
        number: [
            command
            for command in known[number]
            if not arguments.only or arguments.only in command.name
        ]
        for number in arguments.part
    }
    if not any(due.values()):
        names = [command.name for number in arguments.part for command in known[number]]
        parser.error(f"--only {arguments.only}: these parts have {', '.join(names)}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    codes: list[int | str] = []
    for number, commands in due.items():
        ends = time.monotonic() + PART_S
        for command in commands:
            # What a command leaves of its limit is not lost: the last one may take it all.
            left_s = ends - time.monotonic()
            if left_s <= 0:
                print(f"{command.name}: no time is left for it", file=sys.stderr)
                codes.append("not run")
                continue
            limit_s = left_s if command is commands[-1] else min(command.limit_s, left_s)
            codes.append(run(command, arguments.output_dir, limit_s, f"part{number}_"))
    if any(code not in (0, GOES_ON) for code in codes):
        return 1
    return GOES_ON if GOES_ON in codes else 0


if __name__ == "__main__":
    # Where this is cut off itself, what it started must not go on beside what comes next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))
    sys.exit(main())
