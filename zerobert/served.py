"""Which of DeepSpeed's settings are served, and what those of precision mean.

What DeepSpeed would compute wrongly without a word is refused here by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from zerobert.config import check_keys
from zerobert.errors import ConfigError
from zerobert.optim import LambParams

_PRECISIONS = ("fp16", "bf16", "torch_autocast")
# States are kept and read by ours, and nothing lies on NVMe.
_UNSERVED = ("aio", "autotuning", "checkpoint", "compile", "data_efficiency")
_DONE_ELSEWHERE = {
    "activation_checkpointing": 'set "bert": {"kernels": {"activation_checkpointing": true}}',
    "dataloader_drop_last": "remove it: no row is ever dropped",
    "seed": 'set "bert": {"run": {"seed": ...}} or give --seed',
}
# They would be told the learning rate alone.
_MONITORS = ("comet", "csv_monitor", "tensorboard", "wandb")
_UNSERVED_TYPES = ("buffer_dtype", "keep_in_fp32_modules", "param_dtype")
_BOOLEANS = (
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# Parts of ZeRO that round what is sent, place shards in another way or replace the optimizer.
_UNSERVED_ZERO = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zeropp_loco_param",
    "zenflow",
    "cpu_offload",
    "cpu_offload_param",
    "legacy_stage1",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "stage3_module_granularity_threshold",
)
_LOWEST_OFFLOAD_STAGES = {"offload_optimizer": 1, "offload_param": 3}
# They keep the masters or the moments in 16 bits.
_ROUNDED_STATE = {
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "fp16": ("fp16_master_weights_and_grads",),
}
_BFLOAT16_NAMES = ("bfloat16", "bf16", "torch.bfloat16")
# DeepSpeed's names of what gradients are added up in.
_DTYPES = {
    **dict.fromkeys(_BFLOAT16_NAMES, "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
}
# The keys of DeepSpeed's sections; half of them it reads without a look at what else is there.
SECTION_KEYS: dict[str, frozenset[str]] = {
    name: frozenset(keys.split())
    for name, keys in {
        "bf16": "enabled immediate_grad_update check_grad_overflow "
        "bf16_master_weights_and_grads bf16_optimizer_states",
        "comet": "enabled samples_log_interval project workspace api_key experiment_name "
        "experiment_key online mode",
        "comms_logger": "enabled prof_all prof_ops verbose debug",
        "csv_monitor": "enabled output_path job_name",
        "data_types": f"grad_accum_dtype {' '.join(_UNSERVED_TYPES)}",
        "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules "
        "detailed output_file",
        "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
        "consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads",
        "tensorboard": "enabled output_path job_name",
        "timers": "throughput",
        "timers.throughput": "enabled synchronized",
        "torch_autocast": "enabled dtype lower_precision_safe_modules",
        "wandb": "enabled group team project",
        "zero_optimization": (
            "allgather_bucket_size allgather_partitions compute_grad_norm "
            "contiguous_gradients cpu_offload_use_pin_memory elastic_checkpoint "
            "enable_sanity_checks ignore_unused_parameters leaf_module "
            "load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear "
            "offload_optimizer offload_param overlap_comm override_module_apply "
            "parameter_alignment pipeline_loading_checkpoint reduce_bucket_size "
            "reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage "
            "stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save "
            "stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters "
            "stage3_max_reuse_distance stage3_model_persistence_threshold "
            "stage3_param_persistence_threshold stage3_prefetch_bucket_size "
            "stage3_use_all_reduce_for_fetch_params sub_group_size "
            "use_multi_rank_bucket_allreduce zero_hpz_partition_size "
            f"{' '.join(_UNSERVED_ZERO)}"
        ),
        "zero_optimization.offload_optimizer": "device nvme_path buffer_count pin_memory "
        "pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc",
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size "
        "max_in_cpu pin_memory",
    }.items()
}
# DeepSpeed's top-level keys for training. It accepts others in silence, misspelt ones too.
TOP_LEVEL_KEYS = frozenset(
    (
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "seed",
        "steps_per_print",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    )
)


def precision(ds_config: Mapping[str, Any]) -> str:
    """`fp16`, `bf16` or `fp32`: what the weights of the forward pass are kept in."""
    for name in ("fp16", "bf16"):
        if ds_config.get(name, {}).get("enabled", False):
            return name
    return "fp32"


def stage(ds_config: Mapping[str, Any], ranks: int) -> int:
    """The ZeRO stage that so many ranks train at: the configuration's, or 0 for one rank in fp32,
    where a higher one shares nothing out, and keeps a second copy of weights and gradients.
    """
    zero = ds_config.get("zero_optimization", {})
    asked: int = zero.get("stage", 0)
    is_offloaded = any(offloads_to(zero, name) != "none" for name in _LOWEST_OFFLOAD_STAGES)
    return 0 if ranks == 1 and precision(ds_config) == "fp32" and not is_offloaded else asked


def bucket_values(num_parameters: int) -> int:
    """How many gradients are gathered before they are sent, where the JSON does not say it: as many
    as in DeepSpeed's default, which would take their memory where a model has fewer, too.
    """
    return min(num_parameters, 500_000_000)


def offloads_to(zero: Mapping[str, Any], name: str) -> str:
    """The device that an offload section of `zero_optimization` names."""
    return str((zero.get(name) or {}).get("device", "none"))


def computes_in(ds_config: Mapping[str, Any]) -> str:
    """`fp16`, `bf16` or `fp32`: what the matrix products of the forward pass are computed in."""
    autocast = ds_config.get("torch_autocast", {})
    if autocast.get("enabled", False):
        return "bf16" if autocast.get("dtype") in _BFLOAT16_NAMES else "fp16"
    return precision(ds_config)


def check(ds_config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would compute wrongly without a word, and what is not served here yet.

    Raises:
        ConfigError: names the setting and what to choose instead.
    """
    _check_types(ds_config)
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    autocast = ds_config.get("torch_autocast", {})
    if autocast.get("enabled", False) and autocast.get("dtype") not in _BFLOAT16_NAMES:
        # At stage >= 1 the gradients are clipped while still scaled, an overflow never lowers the
        # scale, and where it grows, groups after the first are unscaled by another one.
        raise ConfigError(
            "torch_autocast in float16 (its default) clips scaled gradients in this DeepSpeed; "
            'use the fp16 section, or torch_autocast with "dtype": "bfloat16"'
        )
    if zero.get("round_robin_gradients", False):
        raise ConfigError(
            "zero_optimization.round_robin_gradients exports wrong weights in this DeepSpeed; "
            "remove it"
        )
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage: wanted 0, 1, 2 or 3, got {stage}")
    for name in _UNSERVED_ZERO:
        if zero.get(name):
            raise ConfigError(f"zero_optimization.{name} is not served; remove it")
    for name, lowest in _LOWEST_OFFLOAD_STAGES.items():
        _check_offload(zero.get(name) or {}, f"zero_optimization.{name}", stage, lowest)
    if not zero.get("compute_grad_norm", True):
        raise ConfigError("zero_optimization.compute_grad_norm: false is not served; remove it")
    if ds_config.get("zero_force_ds_cpu_optimizer", False):
        raise ConfigError(
            "zero_force_ds_cpu_optimizer: true is not served, the optimizer is torch's or ours; "
            "remove it"
        )
    _check_averaging(ds_config, stage)
    _check_precision(ds_config)


def check_lamb_kernel(kernel: str, ds_config: Mapping[str, Any], params: object) -> None:
    """Refuse a kernel for LAMB that can't serve a configuration.

    Args:
        kernel: `bert.kernels.lamb`.
        params: the optimizer's.

    Raises:
        ConfigError: names both, and what to choose instead.
    """
    zero = ds_config.get("zero_optimization", {})
    is_sharded = zero.get("stage", 0) > 0
    is_offloaded = offloads_to(zero, "offload_optimizer") != "none"
    if kernel == "apex" and is_sharded:
        raise ConfigError(
            "bert.kernels.lamb 'apex' takes whole parameters, which ZeRO stage 1 and above cut up; "
            "choose 'auto', or stage 0"
        )
    if kernel == "apex" and isinstance(params, LambParams):
        for name in ("min_coeff", "max_coeff"):
            if getattr(params, name) is not None:
                raise ConfigError(
                    f"bert.kernels.lamb 'apex' knows no optimizer.params.{name}; remove it, or "
                    "choose 'auto'"
                )
    if kernel == "triton" and is_sharded and is_offloaded:
        raise ConfigError(
            "bert.kernels.lamb 'triton' runs on CUDA, and zero_optimization.offload_optimizer puts "
            "the optimizer on the CPU; choose 'auto', or remove the offload"
        )


def _check_averaging(ds_config: Mapping[str, Any], stage: int) -> None:
    """The shares of the ranks are made so that DeepSpeed's mean over the ranks is the gradient."""
    if (op := ds_config.get("gradient_allreduce_op", "mean")) != "mean":
        raise ConfigError(
            f'gradient_allreduce_op: wanted "mean", got {op!r}, which makes gradients larger by '
            "the number of ranks; remove it"
        )
    if stage == 3 and ds_config.get("gradient_predivide_factor", 1.0) != 1.0:
        raise ConfigError(
            "gradient_predivide_factor scales the gradients wrongly at ZeRO stage 3 in this "
            "DeepSpeed; remove it"
        )


def _check_precision(ds_config: Mapping[str, Any]) -> None:
    for section, names in _ROUNDED_STATE.items():
        for name in names:
            if ds_config.get(section, {}).get(name, False):
                raise ConfigError(
                    f"{section}.{name} is not served: weights and moments are kept in fp32; "
                    "remove it"
                )
    accumulates_in, low = grad_accum_dtype(ds_config), precision(ds_config)
    if accumulates_in not in (None, "fp32", low):
        wanted = '"fp32"' if low == "fp32" else f'"fp32" or "{low}"'
        raise ConfigError(f"data_types.grad_accum_dtype: wanted {wanted}, got {accumulates_in!r}")
    enabled = [name for name in _PRECISIONS if ds_config.get(name, {}).get("enabled", False)]
    if len(enabled) > 1:
        raise ConfigError(f"{' and '.join(enabled)} are enabled together; remove all but one")
    hysteresis = ds_config.get("fp16", {}).get("hysteresis", 1)
    if type(hysteresis) is not int or hysteresis < 1:
        raise ConfigError(
            f"fp16.hysteresis: wanted a whole number from 1 on, got {hysteresis!r}, at which an "
            "overflow would never lower the loss scale"
        )


def _check_offload(section: Mapping[str, Any], where: str, stage: int, lowest_stage: int) -> None:
    device = section.get("device", "none")
    if device == "none":
        return
    if device != "cpu":
        raise ConfigError(f'{where}.device: wanted "cpu" or "none", got {device!r}')
    if stage < lowest_stage:
        raise ConfigError(f"{where} needs zero_optimization.stage {lowest_stage} or more")
    for name in ("ratio", "super_offload"):
        if section.get(name, 1) not in (1, False):
            raise ConfigError(f"{where}.{name} is not served; remove it")


def _check_types(ds_config: Mapping[str, Any]) -> None:
    """DeepSpeed would meet a section of the wrong type with a traceback, and "False" is true."""
    if name := _find_auto(ds_config, ""):
        raise ConfigError(
            f'{name} is "auto", which only the Trainer of Hugging Face fills in; give a value'
        )
    for name, remedy in _DONE_ELSEWHERE.items():
        if name in ds_config:
            raise ConfigError(f"{name}: DeepSpeed's key would do nothing here; {remedy}")
    for name in _UNSERVED:
        if name in ds_config:
            raise ConfigError(f"{name}: this section is not served and would do nothing; remove it")
    clipping = ds_config.get("gradient_clipping", 0.0)
    if type(clipping) not in (int, float) or not 0 <= clipping < math.inf:
        raise ConfigError(f"gradient_clipping: wanted a number from 0 on, got {clipping!r}")
    factor = ds_config.get("gradient_predivide_factor", 1.0)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise ConfigError(f"gradient_predivide_factor: wanted a number above 0, got {factor!r}")
    steps = ds_config.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ConfigError(f"steps_per_print: wanted a whole number from 1 on, got {steps!r}")
    for name in _BOOLEANS:
        if not isinstance(ds_config.get(name, False), bool):
            raise ConfigError(f"{name}: wanted true or false, got {ds_config[name]!r}")
    for name in ("optimizer", *SECTION_KEYS):
        _check_section(ds_config, name)
    for name in _MONITORS:
        if ds_config.get(name, {}).get("enabled", False):
            raise ConfigError(
                f"{name}: DeepSpeed's monitors are not served; remove the section: a run has a "
                "page of its own, report.html, and pretraining --tracker wandb"
            )
    zero = ds_config.get("zero_optimization", {})
    stage, bucket = zero.get("stage", 0), zero.get("reduce_bucket_size", 1)
    if type(stage) is not int:
        raise ConfigError(f"zero_optimization.stage: wanted a number, got {stage!r}")
    if type(bucket) not in (int, float) or not 1 <= bucket < math.inf:
        raise ConfigError(
            f"zero_optimization.reduce_bucket_size: wanted a number of values from 1 on, got "
            f"{bucket!r}"
        )
    for name in _UNSERVED_TYPES:
        if name in ds_config.get("data_types", {}):
            raise ConfigError(f"data_types.{name} is not served; remove it")


def _check_section(ds_config: Mapping[str, Any], name: str) -> None:
    """The kind of a section, its keys, and whether it is switched on by a word that is neither."""
    section: Any = ds_config
    for key in name.split("."):
        section = section.get(key, {})
        if section is None and name.startswith("zero_optimization."):  # DeepSpeed's default
            return
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name}: wanted an object {{...}}, got {section!r}")
    if name in SECTION_KEYS:
        check_keys(section, SECTION_KEYS[name], name)
    if not isinstance(section.get("enabled", False), bool):
        raise ConfigError(f"{name}.enabled: wanted true or false, got {section['enabled']!r}")


def _find_auto(value: Any, name: str) -> str | None:
    """The first key whose value is "auto"."""
    if isinstance(value, Mapping):
        found = (_find_auto(item, f"{name}.{key}" if name else key) for key, item in value.items())
        return next((key for key in found if key is not None), None)
    return name if value == "auto" else None


def grad_accum_dtype(ds_config: Mapping[str, Any]) -> str | None:
    """What gradients of many micro-steps are added up in, None for DeepSpeed's choice: in bf16 it
    would be bf16, whose 8 bits lose them.
    """
    default = "fp32" if precision(ds_config) == "bf16" else None
    asked = ds_config.get("data_types", {}).get("grad_accum_dtype")
    return default if asked is None else _DTYPES.get(asked, str(asked))
