"""The largest micro-batch that a device has memory for: `--auto_micro_batch`.

A GPU is given larger and larger ones, with as much memory taken away as the state of the training
will hold, until it has too little. On a CPU, where too much ends the process, two small ones are
run forward, and what a sequence takes is the difference between them.
"""

import dataclasses
import functools
import gc
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerobert.config import BertConfig
from zerobert.errors import ConfigError
from zerobert.kernels import Kernels
from zerobert.model import BertForPreTraining, PretrainingLosses

# Allocators round up and fragment; communication and libraries want some too.
_USABLE = 0.9
_PROBES = (2, 4)
_CGROUP = Path("/sys/fs/cgroup")
_ADVICE = 'try "kernels": {"activation_checkpointing": true}, a higher ZeRO stage or shorter rows'


def largest_micro_batch(
    build: Callable[[], BertForPreTraining],
    *,
    dtype: torch.dtype,
    seq_length: int,
    max_predictions: int,
    rank_samples: int,
    state_bytes: float,
    device: torch.device,
) -> int:
    """The largest divisor of a rank's share of the global batch that fits.

    Args:
        build: makes the model in the precision of its weights, on the CPU.
        dtype: what it computes in, which autocast can make another.
        state_bytes: what weights, gradients and optimizer will hold.

    Raises:
        ConfigError: not even one sequence fits.
    """
    model = build().to(device).train()
    kind: dict[str, Any] = {
        "dtype": dtype,
        "seq_length": seq_length,
        "max_predictions": max_predictions,
    }
    divisors = [size for size in range(1, rank_samples + 1) if rank_samples % size == 0]
    if device.type == "cuda":
        # The model and its gradients are there while it is tried.
        own = 2 * sum(parameter.nbytes for parameter in model.parameters())
        spare = (1 - _USABLE) * torch.cuda.get_device_properties(device).total_memory
        run = functools.partial(_run, model, **kind)
        found = largest_that_runs(divisors, run, max(state_bytes - own, 0) + spare, device)
        del model, run
        release(device)
        if found is None:
            raise ConfigError(
                f"--auto_micro_batch: one sequence does not fit beside {state_bytes / 2**30:.1f} "
                f"GiB of weights, gradients and optimizer; {_ADVICE}"
            )
        return found
    low, high = (_step_bytes(model, probe, **kind) for probe in _PROBES)
    del model
    release(device)
    each = max(high - low, 1) / (_PROBES[1] - _PROBES[0])
    fixed = max(low - _PROBES[0] * each, 0)
    room = _USABLE * free_bytes(device) - state_bytes - fixed
    fitting = [size for size in divisors if size * each <= room]
    if not fitting:
        raise ConfigError(
            f"--auto_micro_batch: a sequence takes {each / 2**20:.0f} MiB beside "
            f"{state_bytes / 2**30:.1f} GiB of weights, gradients and optimizer, which is more "
            f"than the {free_bytes(device) / 2**30:.1f} GiB there are; {_ADVICE}"
        )
    return fitting[-1]


def largest_that_runs(
    sizes: Sequence[int], run: Callable[[int], None], reserved_bytes: float, device: torch.device
) -> int | None:
    """The last of ascending sizes that there is memory for; None where even the first is too large.

    Args:
        run: a forward and a backward pass.
        reserved_bytes: memory that is taken away meanwhile.
    """
    found = None
    try:
        reserved = torch.empty(int(reserved_bytes), dtype=torch.uint8, device=device)
        for size in sizes:
            run(size)
            found = size
        del reserved
    except torch.OutOfMemoryError:
        pass
    return found


def _run(model: BertForPreTraining, num_rows: int, **kind: Any) -> None:
    """A forward and a backward pass."""
    _forward(model, num_rows, **kind).backward()  # type: ignore[no-untyped-call]


def _step_bytes(model: BertForPreTraining, num_rows: int, **kind: Any) -> int:
    """What a forward pass keeps for the way back, beside the weights."""
    saved: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _forward(model, num_rows, **kind)
    return sum(saved.values())


def _forward(
    model: BertForPreTraining,
    num_rows: int,
    *,
    dtype: torch.dtype,
    seq_length: int,
    max_predictions: int,
) -> Tensor:
    weights = next(model.parameters())
    batch = full_batch(num_rows, seq_length, max_predictions, model.config.vocab_size)
    batch = {name: tensor.to(weights.device) for name, tensor in batch.items()}
    with torch.autocast(weights.device.type, dtype, enabled=dtype != weights.dtype):
        losses: PretrainingLosses = model(**batch)
    return losses.mlm_loss_sum + losses.nsp_loss_sum


def full_batch(
    num_rows: int, seq_length: int, max_predictions: int, vocab_size: int
) -> dict[str, Tensor]:
    """Rows without padding: the largest that there can be."""
    ids = torch.randint(1, vocab_size, (num_rows, seq_length))
    # Shards may have room for as many predictions as tokens, or for more.
    positions = torch.arange(1, max_predictions + 1).clamp(max=seq_length - 1)
    return {
        "input_ids": ids,
        "input_mask": torch.ones_like(ids),
        "segment_ids": torch.zeros_like(ids),
        "masked_lm_positions": positions.expand(num_rows, -1),
        "masked_lm_ids": torch.ones(num_rows, max_predictions, dtype=torch.int64),
        "next_sentence_labels": torch.zeros(num_rows, dtype=torch.int64),
    }


def free_bytes(device: torch.device, cgroup: Path = _CGROUP) -> float:
    """Memory that a rank may take: the device's, or its share of this machine's or container's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (available,) = (line for line in lines if line.startswith("MemAvailable:"))
        free = float(available.split()[1]) * 1024
    except (OSError, ValueError):
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, _container_bytes(cgroup)) / ranks


def _container_bytes(cgroup: Path) -> float:
    """What a container's limit leaves; no end without one.

    Source: the kernel's cgroup-v2: files that were read count as used, `inactive_file` makes room.
    """
    try:
        limit = (cgroup / "memory.max").read_text(encoding="utf-8").strip()
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        lines = (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()
        stat = dict(line.split() for line in lines)
        return math.inf if limit == "max" else int(limit) - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf


def release(device: torch.device) -> None:
    """Give back what no tensor holds any more, and forget what the most was."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def builder(
    config: BertConfig, kernels: Kernels, *, nsp: bool, dtype: torch.dtype
) -> Callable[[], BertForPreTraining]:
    """What makes the model to probe; not compiled, which would take as long as the training."""
    plain = dataclasses.replace(kernels, compile=False)
    return lambda: BertForPreTraining(config, plain, nsp=nsp).to(dtype)
