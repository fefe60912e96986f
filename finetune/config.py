"""The settings of a run: the task's own, then a DeepSpeed JSON, then flags."""

import argparse
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from finetune.loop import Settings
from zerobert import distributed, served
from zerobert.config import check_keys, from_dict, load_json
from zerobert.ds_config import batch_sizes, clipping, override
from zerobert.errors import ConfigError
from zerobert.kernels import Kernels
from zerobert.optim import optimizer_config
from zerobert.schedule import ScheduleConfig

# fp32 weights, matrix products in bf16: what a bf16 run of Hugging Face's Trainer does.
_BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
# Source: google-research/bert run_classifier.py and optimization.py.
_WEIGHT_DECAY, _EPSILON = 0.01, 1e-6
_BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertSection:
    """The JSON's `"bert"` section, as far as fine-tuning has one."""

    kernels: Kernels = dataclasses.field(default_factory=Kernels)


@contextlib.contextmanager
def one_process_speaks(args: argparse.Namespace) -> Iterator[None]:
    """Let rank 0 print for all, and say what a run's flags don't find here."""
    # Without network it would print ten lines of retries before our one.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if not distributed.is_main():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        if (args.n_gpu == 1 or args.device == "gpu") and not torch.cuda.is_available():
            print("this machine has no CUDA device; running on the CPU")
        yield


def choose_settings(
    args: argparse.Namespace,
    seed: int,
    *,
    batch_size: int,
    learning_rate: float,
    num_epochs: float,
) -> Settings:
    """The flags of `finetune.flags` and the JSON, and where neither says anything these defaults.

    Raises:
        ConfigError: a value is out of range.
    """
    deepspeed, kernels = deepspeed_config(args, batch_size, learning_rate)
    epochs = args.num_train_epochs
    return Settings(
        deepspeed=deepspeed,
        kernels=kernels,
        num_epochs=num_epochs if epochs is None else epochs,
        max_steps=None if args.max_steps == -1 else args.max_steps,
        schedule=ScheduleConfig(
            # PaddleNLP's and Hugging Face's 0, their defaults, leave it to the proportion.
            warmup_steps=args.warmup_steps or None,
            warmup_proportion=args.warmup_proportion,
        ),
        layer_decay=args.layer_decay,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        seed=seed,
        keeps_best=args.load_best_model_at_end or args.early_stopping_patience is not None,
        patience=args.early_stopping_patience,
    )


def deepspeed_config(
    args: argparse.Namespace, batch_size: int, learning_rate: float
) -> tuple[dict[str, Any], Kernels]:
    """All of DeepSpeed's keys that the run is to have, and the kernels.

    Raises:
        ConfigError: a key, a value or a combination that can't be served.
    """
    where = args.deepspeed_config or "flags"
    raw = load_json(args.deepspeed_config) if args.deepspeed_config else {}
    section = from_dict(BertSection, raw.pop("bert", {}), f"{where}: bert")
    check_keys(raw, served.TOP_LEVEL_KEYS, str(where))
    if "scheduler" in raw:
        raise ConfigError(
            f"{where}: scheduler: fine-tuning's rate rises and then falls in a line; use "
            "--warmup_proportion or --warmup_steps and remove the section"
        )
    ds = override(_without_auto(raw), args, bf16=_BF16)
    if not any(name in ds for name in _BATCH_KEYS[:2]):
        ds["train_micro_batch_size_per_gpu"] = batch_size
    sizes = batch_sizes(ds, distributed.world_size())
    ds["train_micro_batch_size_per_gpu"] = sizes.micro_samples
    ds["gradient_accumulation_steps"] = sizes.accumulation_steps
    asked = {"type": "AdamW", **ds.get("optimizer", {})}
    defaults = {"lr": learning_rate, "weight_decay": _WEIGHT_DECAY, "eps": _EPSILON}
    asked["params"] = {**defaults, **asked.get("params", {})}
    optimizer = optimizer_config(asked, f"{where}: optimizer")
    if optimizer.params.eps == 0:
        raise ConfigError(
            "--adam_epsilon: wanted above 0, got 0: a weight without a gradient, as of words that "
            "no text has, would become NaN; leave it out for 1e-6"
        )
    ds["gradient_clipping"] = clipping(ds, optimizer.params.max_grad_norm)
    ds["optimizer"] = {"type": optimizer.type, "params": asked["params"]}
    served.check(ds)
    served.check_lamb_kernel(section.kernels.lamb, ds, optimizer.params)
    if section.kernels.compile:
        raise ConfigError(
            f"{where}: bert.kernels.compile: the batches of fine-tuning have many shapes, and each "
            "would be compiled; remove it"
        )
    return ds, section.kernels


def _without_auto(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a file for the Trainer of Hugging Face lets flags decide: ours do, too."""
    flagged = ("gradient_clipping", "optimizer", "fp16", "bf16", *_BATCH_KEYS)

    def kept(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: kept(item) for key, item in value.items() if item != "auto"}

    return {
        key: kept(value) if key in flagged else value
        for key, value in raw.items()
        if not (key in flagged and value == "auto")
    }
