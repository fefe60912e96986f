"""The order of samples: a pure function of shards, seed, global batch and position.

An epoch lists all rows once, block by block: a block is a stretch of one shard that is decoded as
one, and the blocks of all shards are shuffled together. The list is cut into lanes, as long as each
other, and a lane into windows of a few blocks; the rows of a window are shuffled. A global batch
takes its first samples from the first lane, the next ones from the second, and so on, so a rank's
slice of every batch comes from a few lanes of its own: it decodes those, and no other rank does.

Neither ranks nor events have a say in it. The lanes are the same for any number of ranks (where
one ends inside of a lane, two read that lane), epochs follow each other without a break, and a
sample's row is found without going through those before it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from zerobert.shards import ShardInfo

# A change of anything below that moves a sample needs another number here: a run is not resumed
# under another order.
ORDER_VERSION = 2
_PURPOSE_BLOCKS, _PURPOSE_ROWS = 1, 2
# Enough for each of 64 ranks to have a lane of its own. A lane gives so many samples to a batch,
# which is then put together from few pieces, and has so many blocks in an epoch: its ends cut two.
_MAX_LANES, _MIN_LANE_SAMPLES, _MIN_LANE_BLOCKS = 64, 16, 4
# In places of sequences, padding too, so that memory is the same for any length of rows: what is
# shuffled together over all lanes (0.12 GB), and the least of a shard that a file is opened for.
_PLACES_IN_PLAY, _PLACES_OF_BLOCK = 1 << 24, 1 << 17
# Taller chunks are inflated several times, so that no shard decides on the memory.
_MAX_PLACES_OF_BLOCK = 1 << 20

Rows = npt.NDArray[np.int64]


class Run(NamedTuple):
    """Samples that follow each other in a batch and in a lane, which counts over all epochs."""

    lane: int
    first: int
    num_samples: int


class Window(NamedTuple):
    """What is shuffled as one: the places `start` to before `stop` of an epoch's list of rows.

    `first` is the index in its lane of the sample that it begins with.
    """

    epoch: int
    lane: int
    first: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Its length."""
        return self.stop - self.start


class Piece(NamedTuple):
    """Rows that follow each other in a shard."""

    shard: int
    first_row: int
    num_rows: int


class _Epoch(NamedTuple):
    blocks: Rows  # in the order of the list
    ends: Rows  # where each of them ends in the list
    lane_indices: Rows  # by lane: the index of its first sample in this epoch
    lane_starts: Rows  # by lane: where it starts in the list
    cuts: Rows  # where windows start, and the end


# Compared by identity: an order is a key of its own caches.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleOrder:
    """Which row each sample of a run is; rows are numbered over all shards, in the shards' order.

    Attributes:
        rows_of_blocks: by shard, the rows of its blocks but the last.
        window_rows: a window ends with the block that brings it to this number.
    """

    rows_of_shards: tuple[int, ...]
    rows_of_blocks: tuple[int, ...]
    seed: int
    global_samples: int
    num_lanes: int
    window_rows: int

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self._shard_starts[-1])

    def lane_samples(self, lane: int) -> int:
        """What a lane gives to every global batch."""
        return self._lane_slot(lane + 1) - self._lane_slot(lane)

    def runs(self, first: int, count: int) -> Iterator[Run]:
        """The samples `first` to `first + count`, cut where the lane changes."""
        end = first + count
        while first < end:
            slot = first % self.global_samples
            lane = slot * self.num_lanes // self.global_samples
            length = min(self._lane_slot(lane + 1) - slot, end - first)
            yield Run(lane, self._num_before(lane, first), length)
            first += length

    def window(self, lane: int, index: int) -> Window:
        """The window of a lane's sample."""
        batch, offset = divmod(index, self.lane_samples(lane))
        sample = batch * self.global_samples + self._lane_slot(lane) + offset
        number = sample // self.num_rows
        epoch = self._epoch(number)
        place = int(epoch.lane_starts[lane] + index - epoch.lane_indices[lane])
        cut = int(np.searchsorted(epoch.cuts, place, side="right"))
        start, stop = (int(at) for at in epoch.cuts[cut - 1 : cut + 1])
        return Window(number, lane, index - (place - start), start, stop)

    def pieces(self, window: Window) -> list[Piece]:
        """A window's rows as they are listed, unshuffled."""
        epoch = self._epoch(window.epoch)
        first, last = np.searchsorted(epoch.ends, (window.start, window.stop - 1), side="right")
        pieces = []
        for number in range(first, last + 1):
            block, end = int(epoch.blocks[number]), int(epoch.ends[number])
            shard = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
            first_row = (block - int(self._first_blocks[shard])) * self.rows_of_blocks[shard]
            start = end - int(self._block_sizes[block])
            skipped = max(window.start - start, 0)
            num_rows = min(window.stop, end) - start - skipped
            pieces.append(Piece(shard, first_row + skipped, num_rows))
        return pieces

    def shuffle(self, window: Window) -> Rows:
        """For each of a window's samples, which of its rows as they are listed it is."""
        key = [self.seed, _PURPOSE_ROWS, window.epoch, window.start]
        places = np.random.default_rng(key).permutation(window.num_rows)  # of the listed rows
        rows = np.empty_like(places)
        rows[places] = np.arange(window.num_rows)
        return rows

    def locate(self, first: int, count: int) -> Rows:
        """The rows of the samples `first` to `first + count`, in order."""
        found = [np.empty(0, dtype=np.int64)]
        for lane, start, length in self.runs(first, count):
            index, end = start, start + length
            while index < end:
                window = self.window(lane, index)
                found.append(self._rows(window)[index - window.first : end - window.first])
                index += len(found[-1])
        return np.concatenate(found)

    @functools.lru_cache(maxsize=_MAX_LANES)  # noqa: B019 - an order lives as long as its run
    def _rows(self, window: Window) -> Rows:
        listed = np.concatenate(
            [
                np.arange(first_row, first_row + num_rows) + self._shard_starts[shard]
                for shard, first_row, num_rows in self.pieces(window)
            ]
        )
        return listed[self.shuffle(window)]

    def _lane_slot(self, lane: int) -> int:
        """The first of a global batch's samples that a lane gives."""
        return -(-lane * self.global_samples // self.num_lanes)

    def _num_before(self, lane: int, sample: int) -> int:
        """A lane's samples before this one of the run."""
        batch, slot = divmod(sample, self.global_samples)
        begun = min(max(slot - self._lane_slot(lane), 0), self.lane_samples(lane))
        return batch * self.lane_samples(lane) + begun

    @functools.cached_property
    def _shard_starts(self) -> Rows:
        return np.cumsum([0, *self.rows_of_shards], dtype=np.int64)

    @functools.cached_property
    def _first_blocks(self) -> Rows:
        sizes = zip(self.rows_of_shards, self.rows_of_blocks, strict=True)
        return np.cumsum([0, *(-(-rows // block) for rows, block in sizes)], dtype=np.int64)

    @functools.cached_property
    def _block_sizes(self) -> Rows:
        rows, block = np.array(self.rows_of_shards), np.array(self.rows_of_blocks)
        counts = np.diff(self._first_blocks)
        sizes = np.repeat(block, counts)
        sizes[self._first_blocks[1:] - 1] = rows - (counts - 1) * block
        return sizes.astype(np.int64)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lanes do not leave an epoch all at once
    def _epoch(self, number: int) -> _Epoch:
        key = [self.seed, _PURPOSE_BLOCKS, number]
        blocks = np.random.default_rng(key).permutation(len(self._block_sizes)).astype(np.int64)
        ends = np.cumsum(self._block_sizes[blocks])
        indices = np.array(
            [
                [self._num_before(lane, sample) for lane in range(self.num_lanes)]
                for sample in (number * self.num_rows, (number + 1) * self.num_rows)
            ]
        )
        starts = np.cumsum([0, *(indices[1] - indices[0])])
        # Lanes come to the end of a window one after the other, not all in the same step.
        cuts = [starts]
        for lane in range(self.num_lanes):
            early = self.window_rows * (lane + 1) // self.num_lanes
            wanted = np.arange(starts[lane] + early, starts[lane + 1], self.window_rows)
            cuts.append(np.minimum(ends[np.searchsorted(ends, wanted)], starts[lane + 1]))
        return _Epoch(blocks, ends, indices[0], starts, np.unique(np.concatenate(cuts)))


def sample_order(shards: Sequence[ShardInfo], *, seed: int, global_samples: int) -> SampleOrder:
    """The order of a run over these shards."""
    seq_length = shards[0].seq_length
    rows_of_blocks = tuple(map(rows_of_block, shards))
    num_blocks = sum(
        -(-shard.num_rows // rows) for shard, rows in zip(shards, rows_of_blocks, strict=True)
    )
    num_lanes = min(_MAX_LANES, global_samples // _MIN_LANE_SAMPLES, num_blocks // _MIN_LANE_BLOCKS)
    num_lanes = 1 << (max(1, num_lanes).bit_length() - 1)  # a power of two, as ranks usually are
    return SampleOrder(
        rows_of_shards=tuple(shard.num_rows for shard in shards),
        rows_of_blocks=rows_of_blocks,
        seed=seed,
        global_samples=global_samples,
        num_lanes=num_lanes,
        window_rows=max(1, _PLACES_IN_PLAY // seq_length // num_lanes),
    )


def rows_of_block(shard: ShardInfo) -> int:
    """Whole chunks: no row is inflated twice, and no file is opened for a few rows."""
    wanted = max(1, _PLACES_OF_BLOCK // shard.seq_length)
    most = max(1, _MAX_PLACES_OF_BLOCK // shard.seq_length)
    return min(-(-wanted // shard.chunk_rows) * shard.chunk_rows, most)
