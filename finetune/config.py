"""The settings of a run: the task's own, then a DeepSpeed JSON, then flags."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune.tasks import Task
from zerobert import distributed, engine
from zerobert.config import check_keys, from_dict, load_json
from zerobert.ds_config import batch_sizes, clipping, override
from zerobert.errors import ConfigError
from zerobert.kernels import Kernels
from zerobert.optim import optimizer_config

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


def deepspeed_config(args: argparse.Namespace, task: Task) -> tuple[dict[str, Any], Kernels]:
    """All of DeepSpeed's keys that the run is to have, and the kernels.

    Raises:
        ConfigError: a key, a value or a combination that can't be served.
    """
    where = args.deepspeed_config or "flags"
    raw = load_json(args.deepspeed_config) if args.deepspeed_config else {}
    section = from_dict(BertSection, raw.pop("bert", {}), f"{where}: bert")
    check_keys(raw, engine.TOP_LEVEL_KEYS, str(where))
    if "scheduler" in raw:
        raise ConfigError(
            f"{where}: scheduler: fine-tuning's rate rises and then falls in a line; use "
            "--warmup_proportion or --warmup_steps and remove the section"
        )
    ds = override(_without_auto(raw), args, bf16=_BF16)
    if not any(name in ds for name in _BATCH_KEYS[:2]):
        ds["train_micro_batch_size_per_gpu"] = task.batch_size
    sizes = batch_sizes(ds, distributed.world_size())
    ds["train_micro_batch_size_per_gpu"] = sizes.micro_samples
    ds["gradient_accumulation_steps"] = sizes.accumulation_steps
    asked = {"type": "AdamW", **ds.get("optimizer", {})}
    defaults = {"lr": task.learning_rate, "weight_decay": _WEIGHT_DECAY, "eps": _EPSILON}
    asked["params"] = {**defaults, **asked.get("params", {})}
    optimizer = optimizer_config(asked, f"{where}: optimizer")
    ds["gradient_clipping"] = clipping(ds, optimizer.params.max_grad_norm)
    ds["optimizer"] = {"type": optimizer.type, "params": asked["params"]}
    engine.check_served(ds)
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
