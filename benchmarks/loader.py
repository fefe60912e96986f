"""What batches from shards cost: ours beside NVIDIA's loader, over both layouts of shards.

    python benchmarks/loader.py --input_dir hdf5/brown --hardware epyc2

NVIDIA's loader is restated from DeepLearningExamples/PyTorch/LanguageModeling/BERT, as it was while
it read HDF5: a file at a time is decoded whole, the next one in the background; its rows are drawn
in a random order, made int64 tensors one by one, and put together by torch's DataLoader. Before
anything is timed, both must give the same batches for the same rows.

A round of a contender starts where a run would be and takes all that a run pays: reading,
inflating, shuffling, checking, cutting, and the copy to the device. All take turns within one
process.
"""

import argparse
import contextlib
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, peers, train_step  # noqa: E402
from pretrain.data import StepLoader  # noqa: E402
from pretrain.masking import Masking, num_predictions  # noqa: E402
from pretrain.order import sample_order  # noqa: E402
from zerobert.config import BertConfig  # noqa: E402
from zerobert.shards import (  # noqa: E402
    DTYPES,
    ShardInfo,
    describe_shard,
    find_shards,
    read_shard,
    write_shard,
)

VOCAB_SIZE = 30522
NUM_SHARDS = 4
BATCH, GLOBAL_BATCH = 64, 4096
NVIDIA_WORKERS = 4  # as its script sets them
MANY_SHARDS = 10_000
Arrays = Mapping[str, Any]


class NvidiaDataset(Dataset[list[Tensor]]):
    """A file's rows, decoded whole, one at a time as five int64 tensors."""

    def __init__(self, path: Path, max_predictions: int) -> None:
        with h5py.File(path, "r") as file:
            self.arrays = [np.asarray(file[name][:]) for name in DTYPES]
        self.max_predictions = max_predictions

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, row: int) -> list[Tensor]:
        ids, mask, segments, positions, answers, label = (
            torch.from_numpy(np.asarray(array[row].astype(np.int64))) for array in self.arrays
        )
        labels = torch.ones(ids.shape, dtype=torch.long) * -1
        end = self.max_predictions
        empty = (positions == 0).nonzero()
        if len(empty) != 0:
            end = empty[0].item()
        labels[positions[:end]] = answers[:end]
        return [ids, segments, mask, labels, label]


def nvidia(shards: Sequence[ShardInfo], num_workers: int) -> Iterator[list[Tensor]]:
    """Batch after batch, the next file read in the background."""
    files = random.Random(0).sample(list(shards), len(shards))

    def read(shard: ShardInfo) -> NvidiaDataset:
        return NvidiaDataset(shard.path, shard.max_predictions)

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[NvidiaDataset] = pool.submit(read, files[0])
        for shard in itertools.islice(itertools.cycle(files), 1, None):
            dataset = ahead.result()
            ahead = pool.submit(read, shard)
            sampler = RandomSampler(dataset)
            batches = DataLoader(
                dataset, sampler=sampler, batch_size=BATCH, num_workers=num_workers
            )
            yield from batches


def ours(
    shards: Sequence[ShardInfo],
    *,
    rank: int = 0,
    world_size: int = 1,
    masking: Masking | None = None,
    first_step: int | None = None,
) -> Iterator[list[Tensor]]:
    """Our batches from the middle of an epoch on."""
    order = sample_order(shards, seed=1, global_samples=GLOBAL_BATCH)
    loader = StepLoader(
        shards,
        order,
        vocab_size=VOCAB_SIZE,
        micro_samples=BATCH,
        rank=rank,
        world_size=world_size,
        masking=masking,
    )
    if first_step is None:
        first_step = order.num_rows // 2 // GLOBAL_BATCH
    with contextlib.closing(loader.steps(first_step * GLOBAL_BATCH)) as steps:  # type: ignore
        for step in steps:
            for batch in step.micro_batches:
                yield list(batch.values())


def make_rows(num_rows: int) -> Arrays:
    """Rows of words as frequent as words are: the n-th drawn in proportion to 1 / n."""
    batch = train_step.make_batch(BertConfig(), num_rows, 128, 0.9, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    generator = np.random.default_rng(0)
    for name in ("input_ids", "masked_lm_ids"):
        ranks = np.exp(generator.random(arrays[name].shape) * np.log(VOCAB_SIZE - 1000))
        arrays[name] = (999 + ranks).astype(np.int64) * (arrays[name] > 0)
    return {name: arrays[name].astype(dtype) for name, dtype in DTYPES.items()}


def write_layouts(folder: Path, rows: Arrays) -> dict[str, list[ShardInfo]]:
    """Shards of equal rows as we write them, and as h5py does that NVIDIA's script leaves to choose
    the chunks.
    """
    layouts: dict[str, list[ShardInfo]] = {"own": [], "NVIDIA's": []}
    size = len(rows["input_ids"]) // NUM_SHARDS
    for number in range(NUM_SHARDS):
        part = {name: array[number * size : (number + 1) * size] for name, array in rows.items()}
        paths = [folder / f"{layout}_training_{number}.hdf5" for layout in ("own", "nvidia")]
        write_shard(paths[0], part)
        with h5py.File(paths[1], "w") as file:
            for name, array in part.items():
                file.create_dataset(name, data=array, compression="gzip")
        for layout, path in zip(layouts.values(), paths, strict=True):
            layout.append(describe_shard(path))
    return layouts


def check_equal(shards: Sequence[ShardInfo], *, rank: int = 0, world_size: int = 1) -> None:
    """A global batch of ours against NVIDIA's tensors for the same rows.

    Raises:
        ValueError: they differ.
    """
    order = sample_order(shards, seed=1, global_samples=GLOBAL_BATCH)
    loader = StepLoader(
        shards,
        order,
        vocab_size=VOCAB_SIZE,
        micro_samples=BATCH,
        rank=rank,
        world_size=world_size,
    )
    datasets = [NvidiaDataset(shard.path, shard.max_predictions) for shard in shards]
    starts = np.cumsum([0, *map(len, datasets)])
    share = GLOBAL_BATCH // world_size
    rows = iter(order.locate(rank * share, share).tolist())
    with contextlib.closing(loader.steps(0)) as steps:  # type: ignore[type-var]
        step = next(steps)
    for batch in step.micro_batches:
        owners = [
            (row, int(np.searchsorted(starts, row, side="right")) - 1)
            for row in itertools.islice(rows, BATCH)
        ]
        theirs = torch.utils.data.default_collate(
            [datasets[owner][row - int(starts[owner])] for row, owner in owners]
        )
        mine = [batch[name] for name in ("input_ids", "segment_ids", "input_mask")]
        mine += [peers.full_labels(batch, ignored=-1), batch["next_sentence_labels"]]
        for got, wanted in zip(mine, theirs, strict=True):
            if got.dtype != wanted.dtype or not torch.equal(got, wanted):
                raise ValueError("the batches are not NVIDIA's")


def contenders(
    layouts: Mapping[str, Sequence[ShardInfo]],
) -> dict[str, tuple[Callable[[], Iterator[list[Tensor]]], bool]]:
    """By name: what makes batches, and whether it is NVIDIA's."""
    fresh = Masking(
        seed=1,
        masked_lm_prob=0.15,
        max_predictions=num_predictions(128, 0.15),
        vocab_size=VOCAB_SIZE,
        cls_id=101,
        sep_id=102,
        mask_id=103,
        continues_V=None,
    )
    found: dict[str, tuple[Callable[[], Iterator[list[Tensor]]], bool]] = {}
    for name, shards in layouts.items():
        for workers in (0, NVIDIA_WORKERS):
            found[f"{name} shards: NVIDIA, {workers} workers"] = (
                lambda shards=shards, workers=workers: nvidia(shards, workers),
                True,
            )
        found[f"{name} shards: zerobert"] = (lambda shards=shards: ours(shards), False)
        found[f"{name} shards: zerobert, rank 1 of 4"] = (
            lambda shards=shards: ours(shards, rank=1, world_size=4),
            False,
        )
    shards = layouts["own"]
    found["own shards: zerobert, fresh masks"] = (lambda: ours(shards, masking=fresh), False)
    return found


def clock(
    make: Callable[[], Iterator[list[Tensor]]], num_samples: int, device: torch.device
) -> dict[str, float]:
    """Seconds to the first batch, and per sample from then on: of the clock, and of all cores."""

    def take() -> int:
        moved = [tensor.to(device) for tensor in next(batches)]
        return len(moved[0])

    started = time.perf_counter()
    batches = make()
    take()
    first_s = time.perf_counter() - started
    started, used = time.perf_counter(), cpu_s()
    done = 0
    while done < num_samples:
        done += take()
    seconds = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return {"first_s": first_s, "rate": done / seconds, "cpu_us": 1e6 * (cpu_s() - used) / done}


def cpu_s() -> float:
    """Of this process and of the workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def start_s(shard: ShardInfo) -> float:
    """Seconds to the first batch far into an epoch of very many shards."""
    started = time.perf_counter()
    batches = ours([shard] * MANY_SHARDS, rank=1, world_size=4)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    return time.perf_counter() - started


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Write the shards, check, and time all in turns; what is known after each round."""
    if arguments.input_dir:
        parts = [read_shard(shard.path) for shard in find_shards([arguments.input_dir], "training")]
        rows: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}
    else:
        rows = make_rows(arguments.rows)
    figures: dict[str, Any] = {"rows": len(rows["input_ids"]), "runs": {}, "start_s": []}
    with tempfile.TemporaryDirectory() as folder:
        layouts = write_layouts(Path(folder), rows)
        for shards in layouts.values():
            check_equal(shards)
            check_equal(shards, rank=1, world_size=4)
        print("batches are equal", file=sys.stderr)
        for number in range(arguments.rounds):
            for name, (make, is_nvidia) in contenders(layouts).items():
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                # NVIDIA's pays for a file's start once a file: a round of it is a whole file.
                num_samples = layouts["own"][0].num_rows if is_nvidia else arguments.samples
                figures["runs"].setdefault(name, []).append(
                    clock(make, num_samples, torch.device(arguments.device))
                )
            figures["start_s"].append(start_s(layouts["own"][0]))
            yield figures


def tell(figures: Mapping[str, Any]) -> list[str]:
    """The table, and what else there is to say."""
    rates = {
        name: statistics.median(one["rate"] for one in runs)
        for name, runs in figures["runs"].items()
    }
    cpu = {
        name: statistics.median(one["cpu_us"] for one in runs)
        for name, runs in figures["runs"].items()
    }
    rows = []
    for name, runs in figures["runs"].items():
        theirs = [peer for peer in rates if "NVIDIA, " in peer and peer[:6] == name[:6]]
        best = max(rates[peer] for peer in theirs)
        least = min(cpu[peer] for peer in theirs)
        rows.append(
            (
                name,
                measure.spread([one["rate"] / 1e3 for one in runs]),
                f"{rates[name] / best:.1f}",
                f"{cpu[name]:.2f}",
                f"{least / cpu[name]:.1f}",
                f"{statistics.median(one['first_s'] for one in runs):.2f}",
            )
        )
    header = (
        "",
        "thousand samples/s",
        "x NVIDIA's best",
        "CPU us a sample",
        "NVIDIA's least / it",
        "s to the first batch",
    )
    note = (
        f"{figures['rows']:,} rows of 128 in {NUM_SHARDS} shards, batches of {BATCH}, global "
        f"batches of {GLOBAL_BATCH}. As rank 1 of 4, NVIDIA's loader does for a sample what it "
        "does alone: every rank has files of its own. Its reading of a file falls before the "
        "first batch, and that of the next one beside a file's batches. Ours starts in the middle "
        f"of an epoch; with {MANY_SHARDS:,} shards of this size rank 1 of 4 has its first batch "
        f"after {measure.spread(figures['start_s'])} s."
    )
    return [measure.table(header, rows), note]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--input_dir", type=Path, help="real shards to take the rows from; else random words")
    add("--rows", type=int, default=100_000, help="random rows")
    add("--rounds", type=int, default=5)
    add("--samples", type=int, default=200_000, help="that ours makes in a round")
    add("--device", default="cpu", help="where the batches are copied to")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="few rows, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.samples = 4 * 3000, 1, 30_000
    torch.set_num_threads(1)
    for figures in run(arguments):
        sections = tell(figures)
        if arguments.hardware:
            measure.write_report(
                "loader",
                title="Loader",
                command=measure.command("loader.py", words),
                sections=[f"h5py {h5py.__version__}.", *sections],
                figures=figures,
                slug=arguments.hardware,
                arguments=arguments,
            )
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
