"""The order of samples as a pure function of (shards, seed, position), and batches cut from it.

Sample number `i` of a run is row `i % rows` of epoch `i // rows`. An epoch visits every row once,
window by window: the shards, in an order drawn for that epoch, are taken together until they fill a
window, and the rows of a window are shuffled. No rank, worker or event has a say in it, so a run is
resumed by knowing how many samples it has seen.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zerobert.errors import ConfigError
from zerobert.packing import pack
from zerobert.shards import ShardInfo, check_values, read_shard

Arrays = dict[str, npt.NDArray[Any]]
_PURPOSE_SHARDS, _PURPOSE_ROWS, _PURPOSE_DROPOUT = 1, 2, 3
# Shards are shuffled together until their rows are this many: about 0.1 GB at length 128.
_WINDOW_ROWS = 1 << 17

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which row each sample of a run is; rows are numbered over all shards, in the shards' order.

    Attributes:
        window_rows: shards are shuffled together until their rows reach this number.
    """

    rows_of_shards: tuple[int, ...]
    seed: int
    window_rows: int = _WINDOW_ROWS

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.rows_of_shards)

    def locate(self, first: int, count: int) -> Rows:
        """The rows of the samples `first` to `first + count`, in order."""
        parts = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, position = divmod(first, self.num_rows)
            ends = self._window_ends(epoch)
            window = int(np.searchsorted(ends, position, side="right"))
            rows = self._window(epoch, window)
            start = position - (int(ends[window]) - len(rows))
            parts.append(rows[start : start + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _windows(self, epoch: int) -> list[list[int]]:
        """The shards of each window, in an order drawn for the epoch."""
        generator = np.random.default_rng([self.seed, _PURPOSE_SHARDS, epoch])
        windows: list[list[int]] = [[]]
        filled = 0
        for shard in generator.permutation(len(self.rows_of_shards)).tolist():
            if filled >= self.window_rows:
                windows.append([])
                filled = 0
            windows[-1].append(shard)
            filled += self.rows_of_shards[shard]
        return windows

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _window_ends(self, epoch: int) -> Rows:
        sizes = [
            sum(self.rows_of_shards[shard] for shard in shards) for shards in self._windows(epoch)
        ]
        return np.cumsum(np.array(sizes, dtype=np.int64))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _window(self, epoch: int, window: int) -> Rows:
        """The rows of a window's shards, shuffled."""
        starts = np.cumsum([0, *self.rows_of_shards])
        shards = self._windows(epoch)[window]
        rows = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in shards])
        generator = np.random.default_rng([self.seed, _PURPOSE_ROWS, epoch, window])
        return generator.permutation(rows).astype(np.int64)


class ShardReader:
    """Rows by number; the shards of the last two windows stay decoded (and checked) in memory."""

    def __init__(self, shards: Sequence[ShardInfo], vocab_size: int) -> None:
        self._shards = shards
        self._vocab_size = vocab_size
        self._starts = np.cumsum([0, *(shard.num_rows for shard in shards)])
        largest = max(shard.num_rows for shard in shards)
        self._capacity_rows = 2 * (_WINDOW_ROWS + largest)
        self._decoded: collections.OrderedDict[int, Arrays] = collections.OrderedDict()

    def gather(self, rows: Rows) -> Arrays:
        """The rows of these numbers, in this order.

        Raises:
            ShardFormatError: a shard can't be decoded or holds values out of range.
        """
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        gathered: Arrays = {}
        for shard in np.unique(owners).tolist():
            places = np.flatnonzero(owners == shard)
            for name, array in self._shard(shard).items():
                if name not in gathered:
                    gathered[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                gathered[name][places] = array[rows[places] - self._starts[shard]]
        return gathered

    def _shard(self, index: int) -> Arrays:
        if index not in self._decoded:
            kept = self._shards[index].num_rows + sum(
                self._shards[other].num_rows for other in self._decoded
            )
            while self._decoded and kept > self._capacity_rows:
                oldest, _ = self._decoded.popitem(last=False)
                kept -= self._shards[oldest].num_rows
            path = self._shards[index].path
            arrays = read_shard(path)
            check_values(arrays, vocab_size=self._vocab_size, where=str(path))
            self._decoded[index] = arrays
        self._decoded.move_to_end(index)
        return self._decoded[index]


def to_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Rows as int64 tensors, under the datasets' names."""
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's share of a global batch.

    Attributes:
        micro_batches: one dict of tensors for each micro-step, with the places of its tokens where
            padding is to be left out.
        first_samples: the number of the first sample of each, which seeds its dropout.
        num_masked: masked positions in this share.
        num_tokens: its tokens, padding not counted.
    """

    micro_batches: tuple[dict[str, Tensor], ...]
    first_samples: tuple[int, ...]
    num_masked: int
    num_tokens: int


class StepLoader:
    """Makes this rank's batches of a run, the next one while the present one is trained on.

    A global batch is cut into consecutive slices by rank, then by micro-step, so that any number of
    ranks sees the same micro-batches as one.
    """

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        *,
        seed: int,
        vocab_size: int,
        global_samples: int,
        micro_samples: int,
        rank: int,
        world_size: int,
        packing: bool = False,
    ) -> None:
        self.order = SampleOrder(
            rows_of_shards=tuple(shard.num_rows for shard in shards), seed=seed
        )
        self._reader = ShardReader(shards, vocab_size)
        self._global_samples = global_samples
        self._micro_samples = micro_samples
        self._rank_samples = global_samples // world_size
        self._rank = rank
        self._packing = packing

    def steps(self, first_sample: int) -> Iterator[StepBatch]:
        """The batches from a position on, without end.

        Raises:
            ShardFormatError: a shard can't be decoded or holds values out of range.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead: Future[StepBatch] = pool.submit(self.load, first_sample)
            while True:
                batch = ahead.result()
                first_sample += self._global_samples
                ahead = pool.submit(self.load, first_sample)
                yield batch

    def load(self, first_sample: int) -> StepBatch:
        """This rank's share of the global batch that starts at a sample."""
        start = first_sample + self._rank * self._rank_samples
        rows = self._reader.gather(self.order.locate(start, self._rank_samples))
        tensors = to_tensors(rows)
        offsets = range(0, self._rank_samples, self._micro_samples)
        return StepBatch(
            micro_batches=tuple(self._micro_batch(tensors, i) for i in offsets),
            first_samples=tuple(start + i for i in offsets),
            num_masked=int(np.count_nonzero(rows["masked_lm_positions"])),
            num_tokens=int(np.count_nonzero(rows["input_mask"])),
        )

    def _micro_batch(self, tensors: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        stop = start + self._micro_samples
        batch = {name: tensor[start:stop] for name, tensor in tensors.items()}
        if self._packing:
            packing = pack(batch["input_mask"])
            batch.update(places=packing.places_T, cu_seqlens=packing.cu_seqlens)
        return batch


def dropout_seed(seed: int, first_sample: int) -> int:
    """The seed of the dropout of the micro-batch that starts with a sample: equal on any rank."""
    key = f"{seed}/{_PURPOSE_DROPOUT}/{first_sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def evaluation_batches(
    shards: Sequence[ShardInfo],
    *,
    num_rows: int,
    batch_samples: int,
    vocab_size: int,
    rank: int,
    world_size: int,
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of held-out rows, spread evenly over all shards; shares may differ.

    Args:
        num_rows: rows on all ranks together; 0 for all there are.
    """
    reader = ShardReader(shards, vocab_size)
    total = sum(shard.num_rows for shard in shards)
    wanted = min(num_rows, total) if num_rows else total
    chosen = np.linspace(0, total, wanted, endpoint=False).astype(np.int64)
    for index, first in enumerate(range(0, wanted, batch_samples)):
        if index % world_size == rank:
            yield to_tensors(reader.gather(chosen[first : first + batch_samples]))


def fingerprint(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """What a resumed run must find unchanged in its data: the shards' names, rows and shape.

    Raises:
        ConfigError: there is no row at all.
    """
    if not sum(shard.num_rows for shard in shards):
        raise ConfigError("the training shards have no rows; make them again")
    names = "\n".join(f"{shard.path.name} {shard.num_rows}" for shard in shards)
    return {
        "shards": len(shards),
        "rows": sum(shard.num_rows for shard in shards),
        "seq_length": shards[0].seq_length,
        "max_predictions": shards[0].max_predictions,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
