"""What making shards costs: ours beside NVIDIA's script, more workers, larger corpora, a real dump.

    python benchmarks/data_preparation.py --nvidia FOLDER

FOLDER has create_pretraining_data.py (DeepLearningExamples/PyTorch/LanguageModeling/BERT), and what
it imports is installed: pip install six boto3 requests. Without it only ours runs. `--text` is a
folder of sentences that `data_prep text` wrote; without it the demo's Wikipedia dump is the text,
over and over.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from demo import sources  # noqa: E402
from zerobert.manifest import read_manifest  # noqa: E402

ROW_FLAGS = (
    *("--max_seq_length", "128", "--max_predictions_per_seq", "20", "--masked_lm_prob", "0.15"),
    *("--short_seq_prob", "0.1", "--dupe_factor", "5", "--random_seed", "12345"),
)
# NVIDIA's tokeniser and the tokenizers library read these alike, so that all arrays must be equal.
AGREED = re.compile(r"[\n -~\u00a1-\u024f\u2010-\u2027]*")
MB = 1_000_000


class Bench:
    """The texts, the vocabulary and the commands that are measured."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        """Make what every part needs."""
        self.scratch = scratch
        self.nvidia: Path | None = arguments.nvidia
        self.rounds = 1 if arguments.quick else arguments.rounds
        self.sizes_mb = (1, 2) if arguments.quick else (10, 40, 160)
        self.dump = sources.fetch(sources.WIKI, scratch / "sources")
        if arguments.text is None:
            self.text_name = "the demo's dump of the English Wikipedia, repeated"
            self.extract("text", workers=1)
            self.texts = scratch / "text"
        else:
            self.text_name, self.texts = arguments.text_name, arguments.text
        self.vocab = arguments.vocab_file or scratch / "vocab.txt"
        if arguments.vocab_file is None:
            self.train_vocabulary()

    def prep(self, *words: object, env: dict[str, str] | None = None) -> measure.Cost:
        """Run one command of `python -m data_prep`."""
        command = [sys.executable, str(ROOT / "data_prep" / "__main__.py"), *map(str, words)]
        return measure.run(command, env)

    def fresh(self, name: str) -> Path:
        """A path in the scratch folder where nothing is."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def extract(self, name: str, workers: int) -> measure.Cost:
        """The dump as sentences."""
        out = self.fresh(name)
        return self.prep("text", "--input", self.dump, "--output_dir", out, "--workers", workers)

    def train_vocabulary(self) -> measure.Cost:
        """A vocabulary of BERT's size, from the text."""
        out = self.scratch / "vocab.txt"
        return self.prep("vocab", "--input_dir", self.texts, "--output", out)

    def slice_of(self, size_mb: int) -> Path:
        """A folder with one file of so much text, of lines that both tokenisers read alike."""
        folder = self.scratch / f"slice_{size_mb}"
        if not folder.is_dir():
            folder.mkdir()
            files = itertools.cycle(sorted(self.texts.glob("*.txt")))
            with open(folder / "text.txt", "w", encoding="utf-8") as out:
                for path in files:
                    with open(path, encoding="utf-8") as lines:
                        out.writelines(line for line in lines if AGREED.fullmatch(line))
                        if out.tell() > size_mb * MB:
                            break
                out.truncate(size_mb * MB)
        return folder

    def ours(self, text: Path, out: Path, *, env: dict[str, str] | None = None) -> measure.Cost:
        """Our `instances` command."""
        flags = ("--vocab_file", self.vocab, "--input_file", text, "--output_file", out)
        return self.prep("instances", *flags, *ROW_FLAGS, env=env)

    def theirs(self, text: Path, out: Path) -> measure.Cost:
        """NVIDIA's script."""
        assert self.nvidia is not None
        command = [
            sys.executable,
            str(self.nvidia / "create_pretraining_data.py"),
            "--do_lower_case",
        ]
        command += ["--vocab_file", str(self.vocab), "--bert_model", "bert-base-uncased"]
        command += ["--input_file", str(text), "--output_file", str(out), *ROW_FLAGS]
        return measure.run(command, {"OMP_NUM_THREADS": "1"})

    def shards(self, text: Path, *, num_shards: int, workers: int) -> measure.Cost:
        """Our `shards` command, from nothing."""
        flags = ("--vocab_file", self.vocab, "--input_dir", text, "--output_dir", self.fresh("out"))
        split = ("--n_training_shards", num_shards, "--n_test_shards", 0)
        return self.prep("shards", *flags, *split, *ROW_FLAGS, "--workers", workers)


def single_file(bench: Bench) -> tuple[str, dict[str, Any]]:
    """One process on one file, ours and theirs in turns; their arrays must be equal."""
    size = bench.sizes_mb[0]
    text = bench.slice_of(size) / "text.txt"
    out = {name: bench.scratch / f"{name}.hdf5" for name in ("zerobert", "NVIDIA")}
    contenders: dict[str, Callable[[], measure.Cost]] = {
        "zerobert": lambda: bench.ours(text, out["zerobert"])
    }
    if bench.nvidia is not None:
        contenders["NVIDIA"] = lambda: bench.theirs(text, out["NVIDIA"])
    costs = measure.interleaved(contenders, rounds=bench.rounds)
    if bench.nvidia is not None:
        check_equal(out["zerobert"], out["NVIDIA"])
    rows, figures = [], {}
    slowest = measure.median([cost.cpu_s for cost in costs[list(costs)[-1]]])
    for name, runs in costs.items():
        with h5py.File(out[name]) as file:
            num_rows = len(file["input_ids"])
        cpu = [cost.cpu_s for cost in runs]
        peak = max(cost.peak_mb for cost in runs)
        row_bytes = out[name].stat().st_size / num_rows
        ratio = slowest / measure.median(cpu)
        figures[name] = {"cpu_s": cpu, "peak_mb": peak, "row_bytes": row_bytes, "ratio": ratio}
        rows.append(
            (name, measure.spread(cpu), f"{ratio:.1f}", f"{peak:.0f}", num_rows, f"{row_bytes:.0f}")
        )
    header = ("", "CPU-s, start-up included", "x", "peak MB", "rows", "bytes a row")
    same = "All six arrays of both are equal." if bench.nvidia else ""
    said = f"## One file of {size} MB, one process\n\n{measure.table(header, rows)}\n\n{same}"
    return said, {"single_file": figures}


def check_equal(one: Path, other: Path) -> None:
    """Hold two shards against each other.

    Raises:
        ValueError: an array differs.
    """
    with h5py.File(one) as ours, h5py.File(other) as theirs:
        for name in theirs:
            if not np.array_equal(ours[name][()], theirs[name][()]):
                raise ValueError(f"{name} differs between {one} and {other}")


def first_run(bench: Bench) -> tuple[str, dict[str, Any]]:
    """What compiling costs the first time, on the smallest text."""
    text = bench.slice_of(1) / "text.txt"
    out = bench.scratch / "first.hdf5"
    empty = {"XDG_CACHE_HOME": str(bench.fresh("cache"))}
    first, later = (bench.ours(text, out, env=empty) for _ in range(2))
    said = (
        f"## Compiling\n\n1 MB of text: the first run on a machine takes {first.wall_s:.1f} s, a "
        f"later one {later.wall_s:.1f} s; the difference is the C compiler."
    )
    return said, {"first_run_s": first.wall_s, "later_run_s": later.wall_s}


def more_workers(bench: Bench) -> tuple[str, dict[str, Any]]:
    """Shards with one worker and with two, in turns; beside them what the machine's cores give."""
    size = bench.sizes_mb[-1]
    text = bench.slice_of(size)
    single = bench.slice_of(bench.sizes_mb[0]) / "text.txt"

    def at_once(count: int) -> measure.Cost:
        """The same single-process command so many times at once, each for itself."""
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            outs = [bench.scratch / f"at_once_{number}.hdf5" for number in range(count)]
            costs = list(threads.map(functools.partial(bench.ours, single), outs))
        return dataclasses.replace(costs[0], wall_s=time.monotonic() - started)

    costs = measure.interleaved(
        {
            f"workers {workers}": functools.partial(
                bench.shards, text, num_shards=16, workers=workers
            )
            for workers in (1, 2)
        }
        | {f"at once {count}": functools.partial(at_once, count) for count in (1, 2)},
        rounds=bench.rounds,
    )
    times = {name: [cost.wall_s for cost in runs] for name, runs in costs.items()}
    walls = {name: times[name] for name in ("workers 1", "workers 2")}
    alone, together = (measure.median(times[f"at once {count}"]) for count in (1, 2))
    ceiling = 2 * alone / together
    medians = [measure.median(values) for values in walls.values()]
    rows = [
        (
            name,
            measure.spread(values),
            f"{medians[0] / measure.median(values):.2f}",
            f"{size / measure.median(values):.1f}",
        )
        for name, values in walls.items()
    ]
    said = measure.table(("", "wall s", "x", "MB/s of text"), rows) + (
        f"\n\nThe machine's own limit: two single-process commands at once, which share nothing, "
        f"do {ceiling:.2f} times the work of one in the same time."
    )
    return f"## {size} MB into 16 shards\n\n{said}", {"wall_s": times, "ceiling": ceiling}


def larger_corpora(bench: Bench) -> tuple[str, dict[str, Any]]:
    """Peak memory while the corpus grows and its shards stay as large."""
    rows, peaks = [], {}
    for size in (*bench.sizes_mb, 2 * bench.sizes_mb[-1]):
        num_shards = max(1, 2 * size // bench.sizes_mb[0])
        cost = bench.shards(bench.slice_of(size), num_shards=num_shards, workers=1)
        peaks[size] = cost.peak_mb
        (folder,) = bench.scratch.glob("out/hdf5_*/*")
        largest = max(file.num_rows or 0 for file in read_manifest(folder).files.values())
        rows.append((size, num_shards, largest, f"{cost.peak_mb:.0f}", f"{cost.cpu_s:.1f}"))
    said = measure.table(
        ("MB of text", "shards", "rows of the largest", "peak MB", "CPU-s"), rows
    ) + (
        "\n\nText is tokenised in pieces of 16 MB, of which 10 MB are less than one; memory then "
        "follows the largest shard: whole documents, books among them, go where their hashes say."
    )
    return f"## Shards of one size, one worker\n\n{said}", {"peak_mb": peaks}


def real_dump(bench: Bench) -> tuple[str, dict[str, Any]]:
    """The three commands on a Wikipedia dump."""
    costs = {"text": bench.extract("dump_text", workers=2)}
    texts = bench.scratch / "dump_text"
    vocab = bench.scratch / "dump_vocab.txt"
    costs["vocab"] = bench.prep("vocab", "--input_dir", texts, "--output", vocab)
    costs["shards"] = bench.shards(texts, num_shards=4, workers=2)
    size = bench.dump.stat().st_size / MB
    text_size = read_manifest(texts).summary["bytes"] / MB
    rows = [
        (name, f"{cost.cpu_s:.1f}", f"{cost.wall_s:.1f}", f"{cost.peak_mb:.0f}")
        for name, cost in costs.items()
    ]
    said = measure.table(("command", "CPU-s", "wall s", "peak MB"), rows)
    title = f"## A dump of {size:.1f} MB (bz2), {text_size:.1f} MB of text, two workers"
    return f"{title}\n\n{said}", {name: vars(cost) for name, cost in costs.items()}


PARTS = (single_file, first_run, more_workers, larger_corpora, real_dump)


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, help="folder of sentences")
    parser.add_argument(
        "--text_name", default="text of the user's", help="what the report calls it"
    )
    parser.add_argument("--vocab_file", type=Path, help="default: trained on the text")
    parser.add_argument("--nvidia", type=Path, help="folder with create_pretraining_data.py")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--hardware", default="cpu", help="a word for the report's name")
    parser.add_argument("--quick", action="store_true", help="small texts, one round")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="this work has no other")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        sections, figures = [f"Text: {bench.text_name}."], {}
        for part in PARTS:
            said, found = part(bench)
            print(f"{said}\n", flush=True)
            sections.append(said)
            figures |= found
            path = measure.write_report(
                "data_preparation",
                title="Data preparation",
                command=measure.command("data_preparation.py", words),
                sections=sections,
                figures=figures,
                slug=arguments.hardware,
                arguments=arguments,
            )
    print(f"-> {path}")


if __name__ == "__main__":
    main()
