"""What both stages read of a JSON with DeepSpeed's keys, and the flags that stand above it."""

import argparse
import copy
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from zerobert.errors import ConfigError

_PRECISION_SECTIONS = ("fp16", "bf16", "torch_autocast", "data_types")
_DEEPSPEED_CLIPPING = 1.0  # what it clips at where a file says nothing
_PADDLE_LOSS_SCALE = 2.0**15  # of its --use_amp where --scale_loss says nothing
_SHA256 = re.compile("[0-9a-f]{64}")
_BF16 = {"bf16": {"enabled": True}}


def override(
    raw: Mapping[str, Any], args: argparse.Namespace, *, bf16: Mapping[str, Any] = _BF16
) -> dict[str, Any]:
    """DeepSpeed's keys with what flags say put in their place.

    Args:
        args: the flags below, which both stages have; None is one that was not given.
        bf16: the sections that `--precision bf16` stands for.

    Raises:
        ConfigError: flags contradict each other, or one is out of range.
    """
    ds: dict[str, Any] = copy.deepcopy(dict(raw))
    precision = _precision_flag(args)
    if precision is not None:
        for name in _PRECISION_SECTIONS:
            ds.pop(name, None)
        ds |= {"fp32": {}, "bf16": bf16, "fp16": {"fp16": {"enabled": True}}}[precision]
    if args.scale_loss is not None:
        _set_loss_scale(ds, args.scale_loss)
    elif args.use_amp:
        _set_loss_scale(ds, _PADDLE_LOSS_SCALE)
    if args.max_grad_norm is not None:
        ds["gradient_clipping"] = args.max_grad_norm
        ds.get("optimizer", {}).get("params", {}).pop("max_grad_norm", None)
    if args.batch_size is not None:
        ds["train_micro_batch_size_per_gpu"] = args.batch_size
        ds.pop("train_batch_size", None)
        ds["gradient_accumulation_steps"] = 1
    flags = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "eps": args.adam_epsilon,
    }
    if given := {name: value for name, value in flags.items() if value is not None}:
        optimizer = ds.setdefault("optimizer", {"type": "AdamW"})
        optimizer["params"] = {**optimizer.get("params", {}), **given}
    return ds


def _precision_flag(args: argparse.Namespace) -> str | None:
    """What `--precision` or PaddleNLP's `--use_amp` asks for.

    Raises:
        ConfigError: they contradict each other.
    """
    precision: str | None = args.precision
    if args.use_amp is None:
        return precision
    amp = "fp16" if args.use_amp else "fp32"
    if precision not in (None, amp):
        raise ConfigError(
            f"--use_amp {args.use_amp} is {amp}, --precision says {precision}: leave one out"
        )
    return amp


def _set_loss_scale(ds: dict[str, Any], scale: float) -> None:
    """The first loss scale of fp16; other precisions have none, and PaddleNLP ignores it there.

    Raises:
        ConfigError: DeepSpeed can't start from it.
    """
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or exponent < 1:
        raise ConfigError(f"--scale_loss: wanted a power of 2 from 1 on, got {scale:g}")
    if ds.get("fp16", {}).get("enabled", False):
        ds["fp16"]["initial_scale_power"] = exponent - 1


def clipping(ds: Mapping[str, Any], max_grad_norm: float | None) -> Any:
    """The largest gradient norm, whichever of its two names it goes by.

    Raises:
        ConfigError: both are given, and differ.
    """
    if max_grad_norm is None:
        return ds.get("gradient_clipping", _DEEPSPEED_CLIPPING)
    if ds.get("gradient_clipping", max_grad_norm) != max_grad_norm:
        raise ConfigError(
            f"gradient_clipping is {ds['gradient_clipping']}, optimizer.params.max_grad_norm is "
            f"{max_grad_norm}: they are the same thing; give one"
        )
    return max_grad_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sequences of an optimizer step and how they are cut."""

    global_samples: int
    micro_samples: int
    accumulation_steps: int


def batch_sizes(ds: Mapping[str, Any], world_size: int) -> BatchSizes:
    """DeepSpeed's three batch keys on this many ranks; any two fix the third.

    Raises:
        ConfigError: they don't multiply, or none is given.
    """
    total, micro, accumulation = (
        ds.get(name)
        for name in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
    )
    for value in (total, micro, accumulation):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"batch sizes: wanted whole numbers above 0, got {value!r}")
    if total is None and micro is None:
        raise ConfigError("give train_batch_size and train_micro_batch_size_per_gpu")
    if micro is None:
        assert total is not None
        micro = max(1, total // (world_size * (accumulation or 1)))
    if accumulation is None:
        accumulation = total // (micro * world_size) if total is not None else 1
    if total is None:
        total = micro * accumulation * world_size
    if micro * accumulation * world_size != total:
        remedy = (
            f"train_batch_size that is a multiple of {world_size}"
            if total % world_size
            else f"train_micro_batch_size_per_gpu that divides {total // world_size}"
        )
        raise ConfigError(
            f"train_batch_size {total} is not micro-batch {micro} x accumulation {accumulation} x "
            f"{world_size} processes; choose a {remedy}"
        )
    return BatchSizes(global_samples=total, micro_samples=micro, accumulation_steps=accumulation)


def flatten(value: Any, prefix: str = "", *, leaving_out: Collection[str] = ()) -> dict[str, Any]:
    """Settings within settings as one level: `section.key` -> value."""
    if prefix in leaving_out:
        return {}
    if not isinstance(value, Mapping):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key, leaving_out=leaving_out)
    return flat


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to resume a run under other settings.

    Raises:
        ConfigError: names each setting that differs.
    """
    names = sorted(set(before) | set(now))
    changed = [
        f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{where} is of a run with other settings: {'; '.join(changed)}; use the settings it "
            "was started with, another --output_dir, or --resume never"
        )


def _shown(value: object) -> str:
    """As a message names it: of a checksum the beginning."""
    is_checksum = isinstance(value, str) and _SHA256.fullmatch(value)
    return f"{str(value)[:12]}..." if is_checksum else repr(value)
