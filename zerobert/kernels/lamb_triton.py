"""LAMB by one Triton kernel that goes over all pieces in a single launch.

The pieces are cut into chunks. A list of items, each "update this chunk" or "apply this chunk", is
worked off in order by programs that draw the next item's number from a counter. Whichever program
updates a piece's last chunk adds up the sums of all its chunks and sets its scale; items that apply
the piece wait for that. They come soon after in the list, the last chunk first, so that most of
what they read is still in the L2 cache. A step then moves little more than the 28 bytes an element
that no LAMB can do without (read w, g, m, v; write w, m, v); two passes through memory move 40.

An item waits only for items before it in the list, and updates wait for nothing: in whatever order
a device starts programs, and however few of them, they come to an end. The sums are added up in one
order whichever program does it: equal inputs give equal bits.

It compiles for Hopper, and Triton's interpreter holds it against its plain twin. It has not run on
a device yet; the constants are chosen by reckoning.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zerobert.kernels.lamb import Implementation, Pieces, Rates, Scaling

CHUNK = 2048  # elements of an item
NUM_WARPS = 8
# Enough programs to keep memory busy, and no more: what they have in hand fills the cache too.
PROGRAMS_PER_PROCESSOR = 3

# The columns of the table of pieces.
_W, _G, _M, _V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # addresses
_LENGTH = tl.constexpr(4)
_FIRST, _CHUNKS = tl.constexpr(5), tl.constexpr(6)  # its chunks among those of all pieces
_COLUMNS = tl.constexpr(7)

_PARTIALS = tl.constexpr(1024)  # sums of chunks that are added up at a time


@triton.jit  # type: ignore[untyped-decorator]
def _pointers(
    row: tl.tensor,
    column: tl.tensor,
    offsets: tl.tensor,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    start = tl.load(row + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # then 16 bytes are read and written at a time
        start = tl.multiple_of(start, 16)
    return start + offsets


@triton.jit  # type: ignore[untyped-decorator]
def _offsets(
    row: tl.tensor,
    chunk: tl.tensor,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    length = tl.load(row + _LENGTH)
    if ALIGNED:
        length = tl.multiple_of(length, 4)
    offsets = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    return offsets, offsets < length


@triton.jit  # type: ignore[untyped-decorator]
def _direction(
    w: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
) -> tl.tensor:
    return step * tl.div_rn(m, tl.sqrt_rn(v) + eps) + weight_decay * w


@triton.jit  # type: ignore[untyped-decorator]
def _update(
    row: tl.tensor,
    chunk: tl.tensor,
    partials: tl.tensor,
    rise1: tl.tensor,
    beta2: tl.tensor,
    rise2: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Move a chunk's moments; store its sums of squares of weights and update."""
    offsets, is_inside = _offsets(row, chunk, ALIGNED, CHUNK)
    to_m = _pointers(row, _M, offsets, ALIGNED)
    to_v = _pointers(row, _V, offsets, ALIGNED)
    # No gradient is read twice: let it be the first to leave the cache.
    g = tl.load(_pointers(row, _G, offsets, ALIGNED), is_inside, 0.0, eviction_policy="evict_first")
    w = tl.load(_pointers(row, _W, offsets, ALIGNED), is_inside, 0.0, cache_modifier=".cg")
    m = tl.load(to_m, is_inside, 0.0, cache_modifier=".cg")
    v = tl.load(to_v, is_inside, 0.0, cache_modifier=".cg")
    m += rise1 * (g - m)
    v = beta2 * v + rise2 * g * g
    tl.store(to_m, m, is_inside)
    tl.store(to_v, v, is_inside)
    u = _direction(w, m, v, step, eps, weight_decay)
    to_sums = partials + 2 * (tl.load(row + _FIRST) + chunk)
    tl.store(to_sums, tl.sum(w * w))
    tl.store(to_sums + 1, tl.sum(u * u))


@triton.jit  # type: ignore[untyped-decorator]
def _apply(
    row: tl.tensor,
    chunk: tl.tensor,
    scale: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    offsets, is_inside = _offsets(row, chunk, ALIGNED, CHUNK)
    to_w = _pointers(row, _W, offsets, ALIGNED)
    w = tl.load(to_w, is_inside, 0.0, cache_modifier=".cg")
    m = tl.load(_pointers(row, _M, offsets, ALIGNED), is_inside, 0.0, cache_modifier=".cg")
    v = tl.load(_pointers(row, _V, offsets, ALIGNED), is_inside, 0.0, cache_modifier=".cg")
    tl.store(to_w, w - scale * _direction(w, m, v, step, eps, weight_decay), is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(
    row: tl.tensor,
    partials: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The sums of squares of a whole piece, always in the same order."""
    num_chunks = tl.load(row + _CHUNKS)
    to_sums = partials + 2 * tl.load(row + _FIRST)
    weight_squares = tl.zeros([_PARTIALS], tl.float64)
    update_squares = tl.zeros([_PARTIALS], tl.float64)
    for start in range(0, num_chunks, _PARTIALS):
        places = start + tl.arange(0, _PARTIALS)
        is_inside = places < num_chunks
        to_pair = to_sums + 2 * places
        weight_squares += tl.load(to_pair, is_inside, 0.0, cache_modifier=".cg").to(tl.float64)
        update_squares += tl.load(to_pair + 1, is_inside, 0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(weight_squares).to(tl.float32), tl.sum(update_squares).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(
    weight_square: tl.tensor,
    update_square: tl.tensor,
    lr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
) -> tl.tensor:
    """The rule of `lamb.scales`."""
    has_ratio = (weight_square > 0) & (update_square > 0)
    ratio = tl.sqrt_rn(tl.div_rn(weight_square, tl.where(has_ratio, update_square, 1.0)))
    ratio = tl.minimum(tl.maximum(ratio, low), high)
    return lr * tl.where(has_ratio, ratio, 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _work(
    items: tl.tensor,
    num_items: tl.tensor,
    table: tl.tensor,
    drawn: tl.tensor,
    finished: tl.tensor,
    partials: tl.tensor,
    squares: tl.tensor,
    scales: tl.tensor,
    rise1: tl.tensor,
    beta2: tl.tensor,
    rise2: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    lr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    ADAPTS: tl.constexpr,
    WAITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Work off a list of items.

    Args:
        items: int32 [num_items, 2]: a piece, or -1 - piece where it is to be applied; its chunk.
        table: int64 [pieces, columns].
        drawn: int32 [1], 0 at first: the number of the next item.
        finished: int32 [pieces], 0 at first: chunks updated, and 1 when the scale is known.
        partials: fp32 [chunks of all pieces, 2].
        squares: fp32 [pieces, 2], written by the last update of a piece.
        scales: fp32 [pieces], likewise; given where there are no updates.
        ADAPTS: scale by the trust ratio.
        WAITS: scales are not given.
        ALIGNED: every address is a multiple of 16 bytes, and every length of 4.
    """
    item = tl.atomic_add(drawn, 1)
    while item < num_items:
        piece = tl.load(items + 2 * item)
        chunk = tl.load(items + 2 * item + 1)
        if piece >= 0:
            row = table + piece * _COLUMNS
            _update(
                row, chunk, partials, rise1, beta2, rise2, step, eps, weight_decay, ALIGNED, CHUNK
            )
            tl.debug_barrier()  # all threads have written before one of them says so
            before = tl.atomic_add(finished + piece, 1, sem="acq_rel")
            if before + 1 == tl.load(row + _CHUNKS):
                weight_square, update_square = _add_up(row, partials)
                tl.store(squares + 2 * piece, weight_square)
                tl.store(squares + 2 * piece + 1, update_square)
                scale = lr
                if ADAPTS:
                    scale = _scale(weight_square, update_square, lr, low, high)
                tl.store(scales + piece, scale)
                tl.debug_barrier()
                tl.atomic_add(finished + piece, 1, sem="release")
        else:
            piece = -1 - piece
            row = table + piece * _COLUMNS
            if WAITS:
                num_chunks = tl.load(row + _CHUNKS)
                while tl.atomic_add(finished + piece, 0, sem="acquire") <= num_chunks:
                    pass
            scale = tl.load(scales + piece, cache_modifier=".cg")
            _apply(row, chunk, scale, step, eps, weight_decay, ALIGNED, CHUNK)
        item = tl.atomic_add(drawn, 1)


def update_moments(pieces: Pieces, rates: Rates) -> Tensor:
    """See `lamb.Implementation`."""
    return _launch(pieces, rates, Scaling(lr=0.0), updates=True, applies=False)


def apply(pieces: Pieces, rates: Rates, scales: Tensor) -> None:
    """See `lamb.Implementation`."""
    _launch(pieces, rates, Scaling(lr=0.0), updates=False, applies=True, scales=scales)


def step_local(pieces: Pieces, rates: Rates, scaling: Scaling) -> None:
    """See `lamb.Implementation`."""
    _launch(pieces, rates, scaling, updates=True, applies=True)


IMPLEMENTATION = Implementation(update_moments, apply, step_local)


def _launch(
    pieces: Pieces,
    rates: Rates,
    scaling: Scaling,
    *,
    updates: bool,
    applies: bool,
    scales: Tensor | None = None,
) -> Tensor:
    """Run `_work` over all pieces; returns their squares."""
    device = pieces.weights[0].device
    lengths = tuple(weight.numel() for weight in pieces.weights)
    num_programs = _num_programs(device)
    items = _items(lengths, updates, applies, num_programs, device)
    addresses = tuple(tensor.data_ptr() for tensors in pieces for tensor in tensors)
    counters = torch.zeros(1 + len(lengths), dtype=torch.int32, device=device)
    num_chunks = sum(-(-length // CHUNK) for length in lengths)
    partials = torch.empty(num_chunks, 2, device=device)
    squares = torch.empty(len(lengths), 2, device=device)
    table, is_aligned = _table(addresses, lengths, device)
    if scales is None:
        scales = torch.empty(len(lengths), device=device)
    root2 = math.sqrt(rates.correction2)
    _work[(num_programs,)](
        items,
        len(items),
        table,
        counters[:1],
        counters[1:],
        partials,
        squares,
        scales,
        1 - rates.beta1,
        rates.beta2,
        1 - rates.beta2,
        root2 / rates.correction1,
        rates.eps * root2,
        float(rates.weight_decay),
        float(scaling.lr),  # an int of 0 or 1 would be compiled in
        -math.inf if scaling.min_coeff is None else float(scaling.min_coeff),
        math.inf if scaling.max_coeff is None else float(scaling.max_coeff),
        ADAPTS=scaling.adapts,
        WAITS=updates,
        ALIGNED=is_aligned,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )
    return squares


def _num_programs(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter runs one after another
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * PROGRAMS_PER_PROCESSOR


@functools.lru_cache(maxsize=16)
def _items(
    lengths: tuple[int, ...], updates: bool, applies: bool, lag: int, device: torch.device
) -> Tensor:
    """The list of items for `_work`.

    Args:
        lag: how many updates of other pieces come before a piece is applied, which keeps programs
            from waiting for its last updates and for the sums.
    """
    counts = torch.tensor([-(-length // CHUNK) for length in lengths])
    ends = counts.cumsum(0)
    pieces = torch.arange(len(lengths)).repeat_interleave(counts)
    places = torch.arange(len(pieces))
    chunks = places - (ends - counts)[pieces]
    update = torch.stack([pieces, chunks], dim=1)
    apply = torch.stack([-1 - pieces, counts[pieces] - 1 - chunks], dim=1)
    if not (updates and applies):
        return (update if updates else apply).int().to(device)
    # The update at place p has key p; a piece is applied `lag` updates after its last one.
    keys = torch.cat([places, ends[pieces] - 1 + lag])
    items = torch.cat([update, apply])[keys.argsort(stable=True)]
    return items.int().to(device)


@functools.lru_cache(maxsize=16)
def _table(
    addresses: tuple[int, ...], lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, bool]:
    """The table of pieces for `_work`, and whether all are aligned; new when a tensor has moved.

    Args:
        addresses: of all weights, then of all gradients, and so on.
    """
    counts = torch.tensor([-(-length // CHUNK) for length in lengths])
    firsts = counts.cumsum(0) - counts
    columns = torch.tensor([*addresses, *lengths]).view(5, -1)
    is_aligned = bool((columns[:4] % 16 == 0).all() and (columns[4] % 4 == 0).all())
    table = torch.stack([*columns, firsts, counts], dim=1)
    if device.type == "cuda":  # a copy from pinned memory waits for nothing
        table = table.pin_memory()
    return table.to(device, non_blocking=True), is_aligned
