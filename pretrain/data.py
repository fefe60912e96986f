"""Batches from shards: each rank decodes its own rows, ahead of their use.

`pretrain/order.py` says which rows; here they are read, checked and cut into micro-batches.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.masking import Masking, mask_afresh
from pretrain.order import ORDER_VERSION, Piece, Rows, SampleOrder, Window, rows_of_block
from zerobert.errors import ConfigError, ShardFormatError
from zerobert.manifest import MANIFEST_NAME, is_complete, sha256_file
from zerobert.packing import pack
from zerobert.shards import ShardInfo, check_values, empty_arrays, read_rows

Arrays = dict[str, npt.NDArray[Any]]
# Inflating is most of the work, and does not hold Python's lock.
_DECODING_THREADS = 2
_PURPOSE_DROPOUT = 3


def read_window(shards: Sequence[ShardInfo], pieces: Sequence[Piece], vocab_size: int) -> Arrays:
    """A window's rows as they are listed; values are checked.

    Raises:
        ShardFormatError: a shard can't be decoded or holds values out of range.
    """
    ends = np.cumsum([piece.num_rows for piece in pieces]).tolist()
    window = empty_arrays(shards[pieces[0].shard], ends[-1])
    parts = [
        {name: array[end - piece.num_rows : end] for name, array in window.items()}
        for piece, end in zip(pieces, ends, strict=True)
    ]
    by_shard: dict[int, dict[int, Arrays]] = collections.defaultdict(dict)
    for piece, part in zip(pieces, parts, strict=True):
        by_shard[piece.shard][piece.first_row] = part
    for number, wanted in by_shard.items():
        read_rows(shards[number], wanted)
    try:
        check_values(window, vocab_size=vocab_size, where="a window")
    except ShardFormatError:  # in which row of which file?
        for piece, part in zip(pieces, parts, strict=True):
            where, first_row = str(shards[piece.shard].path), piece.first_row
            check_values(part, vocab_size=vocab_size, where=where, first_row=first_row)
        raise
    return window


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Held:
    """A window that is decoded, or about to be, and which of its rows its samples are."""

    window: Window
    rows: Rows
    decoded: "Future[Arrays]"

    @property
    def end(self) -> int:
        return self.window.first + self.window.num_rows


class _Lane:
    """A lane's windows: the one in use and, from some samples before its end on, the next."""

    def __init__(self, lane: int, order: SampleOrder, decode: Callable[[Window], _Held]) -> None:
        self._lane, self._order, self._decode = lane, order, decode
        window_rows = min(order.window_rows, order.num_rows // order.num_lanes)
        self._ahead = max(order.lane_samples(lane), window_rows // 4)
        self._windows: collections.deque[_Held] = collections.deque()

    def request(self, index: int, count: int) -> None:
        """Have the samples from an index on decoded, and some more."""
        end = index + count + self._ahead
        while not self._windows or self._windows[-1].end < end:
            first = self._windows[-1].end if self._windows else index
            self._windows.append(self._decode(self._order.window(self._lane, first)))

    def take(self, index: int, count: int, room: Arrays, done: int) -> int:
        """Put requested samples into arrays from row `done` on; returns the row behind them."""
        for held in self._windows:
            start = index - held.window.first
            rows = held.rows[start : start + count]
            for name, array in held.decoded.result().items() if len(rows) else ():
                np.take(array, rows, axis=0, out=room[name][done : done + len(rows)], mode="clip")
            done, index, count = done + len(rows), index + len(rows), count - len(rows)
        return done

    def drop(self, index: int) -> None:
        """Let go of what lies before an index."""
        while self._windows and self._windows[0].end <= index:
            self._windows.popleft()


class MicroBatches(Sequence[dict[str, Tensor]]):
    """A rank's rows cut into micro-batches, each made int64 tensors when it is asked for.

    Until then they take a quarter of the memory, and what is made one by one stays in the cache.
    """

    def __init__(self, rows: Arrays, micro_samples: int, *, num_shapes: int | None) -> None:
        """Pack each, where `num_shapes` is given; see `zerobert.packing.pack`."""
        self._rows, self._micro_samples = rows, micro_samples
        masks = torch.split(torch.from_numpy(rows["input_mask"]), micro_samples)
        self._num = len(masks)
        self._packings = None
        if num_shapes is not None:
            self._packings = [pack(mask, num_shapes) for mask in masks]

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: Any) -> Any:
        """The micro-batch of a number, from 0 on."""
        if not 0 <= index < self._num:
            raise IndexError(index)
        start = index * self._micro_samples
        stop = start + self._micro_samples
        batch = to_tensors({name: array[start:stop] for name, array in self._rows.items()})
        if self._packings is not None:
            packing = self._packings[index]
            batch.update(places=packing.places_T, cu_seqlens=packing.cu_seqlens)
        return batch


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

    micro_batches: Sequence[dict[str, Tensor]]
    first_samples: tuple[int, ...]
    num_masked: int
    num_tokens: int


class StepLoader:
    """Makes this rank's batches of a run, the next one while the present one is trained on.

    A global batch is cut into consecutive slices by rank, then by micro-step, so that any number of
    ranks sees the same micro-batches as one. A rank holds the windows of its lanes and the next
    ones of those that end soon, whatever the number and the sizes of the shards.

    Args:
        masking: masks are drawn afresh; None for those of the shards.
    """

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        order: SampleOrder,
        *,
        vocab_size: int,
        micro_samples: int,
        rank: int,
        world_size: int,
        masking: Masking | None = None,
        num_shapes: int | None = None,
    ) -> None:
        self.order = order
        self._shards = shards
        self._vocab_size = vocab_size
        self._micro_samples = micro_samples
        self._rank_samples = order.global_samples // world_size
        self._rank = rank
        self._masking = masking
        self._num_shapes = num_shapes

    def steps(self, first_sample: int) -> Iterator[StepBatch]:
        """The batches from a sample on, without end.

        Raises:
            ShardFormatError: a shard can't be decoded or holds values out of range.
        """
        decoders = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decoder")
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        lanes = [
            _Lane(lane, self.order, functools.partial(self._submit, decoders))
            for lane in range(self.order.num_lanes)
        ]
        start = first_sample + self._rank * self._rank_samples
        try:
            ahead = loader.submit(self._load, lanes, start)
            while True:
                batch = ahead.result()
                start += self.order.global_samples
                ahead = loader.submit(self._load, lanes, start)
                yield batch
        finally:
            decoders.shutdown(cancel_futures=True)  # first: the other may wait for one of them
            loader.shutdown(cancel_futures=True)

    def _submit(self, decoders: ThreadPoolExecutor, window: Window) -> _Held:
        work = (self._shards, self.order.pieces(window), self._vocab_size)
        decoded = decoders.submit(read_window, *work)
        return _Held(window=window, rows=self.order.shuffle(window), decoded=decoded)

    def _load(self, lanes: Sequence[_Lane], start: int) -> StepBatch:
        """This rank's share of a global batch, which starts at a sample."""
        runs = list(self.order.runs(start, self._rank_samples))
        for lane, index, count in runs:
            lanes[lane].request(index, count)
        rows = empty_arrays(self._shards[0], self._rank_samples)
        done = 0
        for lane, index, count in runs:
            done = lanes[lane].take(index, count, rows, done)
        for lane, index, count in runs:
            lanes[lane].drop(index + count)
        if self._masking is not None:
            rows = mask_afresh(rows, start, self._masking)
        return StepBatch(
            micro_batches=MicroBatches(rows, self._micro_samples, num_shapes=self._num_shapes),
            first_samples=tuple(range(start, start + self._rank_samples, self._micro_samples)),
            num_masked=int(np.count_nonzero(rows["masked_lm_positions"])),
            num_tokens=int(np.count_nonzero(rows["input_mask"])),
        )


def to_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Rows as int64 tensors, under the datasets' names."""
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


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
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """This rank's share of held-out rows, spread evenly over all shards.

    Every rank gets as many batches: one that has fewer gets its last one again, marked False, which
    is not to be counted. (Under ZeRO-3 all ranks take part in each forward pass.)

    Args:
        num_rows: rows on all ranks together; 0 for all there are.
    """
    starts = np.cumsum([0, *(shard.num_rows for shard in shards)])
    total = int(starts[-1])
    wanted = min(num_rows, total) if num_rows else total
    chosen = np.linspace(0, total, wanted, endpoint=False).astype(np.int64)

    @functools.lru_cache(maxsize=2)  # a block may be in two batches
    def read(owner: int, block: int) -> Arrays:
        shard = shards[owner]
        first = block * rows_of_block(shard)
        num_rows = min(rows_of_block(shard), shard.num_rows - first)
        return read_window(shards, [Piece(owner, first, num_rows)], vocab_size)

    # Batches that follow each other, so that a block is read by one rank, or by two at an edge.
    firsts = range(0, wanted, batch_samples)
    mine = firsts[rank * len(firsts) // world_size : (rank + 1) * len(firsts) // world_size]
    for number in range(-(-len(firsts) // world_size)):
        is_own = number < len(mine)
        first = mine[number] if is_own else (mine or firsts)[-1]
        rows = chosen[first : first + batch_samples]
        parts: list[Arrays] = []
        owners = np.searchsorted(starts, rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            blocks, places = np.divmod(
                rows[owners == owner] - starts[owner], rows_of_block(shards[owner])
            )
            for block in np.unique(blocks).tolist():
                picked = places[blocks == block]
                parts.append({name: array[picked] for name, array in read(owner, block).items()})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        batch = to_tensors(arrays)
        packing = pack(batch["input_mask"])
        batch.update(places=packing.places_T, cu_seqlens=packing.cu_seqlens)
        yield batch, is_own


def fingerprint(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """What a resumed run must find unchanged in its data: the shards' names, rows and shape, what
    their folders' manifests say of the contents, and all else that their order depends on.

    Raises:
        ConfigError: there is no row at all.
    """
    if not sum(shard.num_rows for shard in shards):
        raise ConfigError("the training shards have no rows; make them again")
    names = "\n".join(
        f"{shard.path.name} {shard.num_rows} {rows_of_block(shard)}" for shard in shards
    )
    folders = dict.fromkeys(shard.path.parent for shard in shards)
    manifests = [folder / MANIFEST_NAME for folder in folders if is_complete(folder)]
    made = "\n".join(sha256_file(path) for path in manifests)  # so the data may be moved
    return {
        "shards": len(shards),
        "rows": sum(shard.num_rows for shard in shards),
        "seq_length": shards[0].seq_length,
        "max_predictions": shards[0].max_predictions,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "manifests_sha256": hashlib.sha256(made.encode()).hexdigest(),
        "order": ORDER_VERSION,
    }
