"""What DeepSpeed would get wrong in silence is refused by name; its keys are those it reads."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor import config as monitor_config
from deepspeed.runtime import precision_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero import offload_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from zerobert import served
from zerobert.config import load_json
from zerobert.errors import ConfigError

FP16 = {"fp16": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}}
ZERO_1 = {"zero_optimization": {"stage": 1}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast in float16 .*bfloat16",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}},
            "torch_autocast in float16",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients .*remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device: wanted "cpu" or "none", got \'nvme\'',
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs zero_optimization.stage 1",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs zero_optimization.stage 3",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.3},
                }
            },
            "offload_optimizer.ratio is not served",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "is not served"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "wanted an object"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "cpu_offload is not served"),
        ({"zero_optimization": {"stage": 4}}, "wanted 0, 1, 2 or 3, got 4"),
        *[
            ({section: {}}, f"{section}: this section is not served")
            for section in ("aio", "checkpoint")
        ],
        (
            {"gradient_allreduce_op": "sum"},
            "gradient_allreduce_op: wanted \"mean\", got 'sum', .* larger by the number of ranks",
        ),
        (
            {
                "zero_optimization": {"stage": 3, "reduce_scatter": False},
                "gradient_predivide_factor": 2.0,
            },
            "gradient_predivide_factor scales .* wrongly at ZeRO stage 3",
        ),
        *[
            ({section: {"enabled": True, name: True}}, f"{section}.{name} is not served")
            for section, name in (
                ("bf16", "bf16_master_weights_and_grads"),
                ("bf16", "bf16_optimizer_states"),
                ("fp16", "fp16_master_weights_and_grads"),
            )
        ],
        *[
            ({"zero_optimization": {"stage": stage, name: value}}, f"{name} is not served")
            for stage, name, value in (
                (1, "legacy_stage1", True),
                (3, "mics_shard_size", 1),
                (3, "mics_hierarchical_params_gather", True),
                (3, "stage3_module_granularity_threshold", 1000),
            )
        ],
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "compute_grad_norm: false is not served",
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": True,
            },
            "zero_force_ds_cpu_optimizer: true is not served",
        ),
        *[
            (section | AUTOCAST, f"{name} and torch_autocast are enabled together")
            for name, section in (("fp16", FP16), ("bf16", BF16))
        ],
        (FP16 | BF16, "fp16 and bf16 are enabled together"),
        *[
            (
                section | {"data_types": {"grad_accum_dtype": name}, **ZERO_1},
                f"grad_accum_dtype: wanted {wanted}, got '{name}'",
            )
            for section, name, wanted in (
                ({}, "fp64", '"fp32"'),
                ({}, "bf16", '"fp32"'),
                (BF16, "fp64", '"fp32" or "bf16"'),
                (BF16, "fp16", '"fp32" or "bf16"'),
                (FP16, "int8", '"fp32" or "fp16"'),
            )
        ],
        ({"fp16": {"enabled": True, "hysteresis": 0}}, "fp16.hysteresis: wanted .* from 1 on"),
    ],
)
def test_each_setting_is_refused_by_name(ds_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        served.check(ds_config)


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3}},
        {"fp16": {"enabled": False}},
        FP16,
        BF16,
        FP16 | {"zero_optimization": {"stage": 1}},
        BF16 | {"zero_optimization": {"stage": 2}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 1, "round_robin_gradients": False}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": None, "cpu_offload": False}},
        {"timers": {"throughput": {"enabled": False}}, "tensorboard": {"enabled": False}},
        {"steps_per_print": 10, "prescale_gradients": False},
        {"steps_per_print": None, "zero_optimization": {"reduce_bucket_size": 5e8}},
        {"gradient_allreduce_op": "mean", "gradient_predivide_factor": 2.0},
        {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 1.0},
        {"fp16": {"enabled": False}} | AUTOCAST,
    ],
)
def test_what_is_served_passes(ds_config: dict[str, Any]) -> None:
    served.check(ds_config)


def test_precision_is_that_of_the_weights() -> None:
    assert served.precision({}) == "fp32"
    assert served.precision({"fp16": {"enabled": False}, **BF16}) == "bf16"
    assert served.precision(FP16) == "fp16"
    assert served.precision({"torch_autocast": {"enabled": True}}) == "fp32"


@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_one_rank_in_fp32_shares_nothing_out(asked: int) -> None:
    zero = {"stage": asked, "offload_param": {"device": "none"}}
    assert served.stage({"zero_optimization": zero}, 1) == 0
    assert served.stage({"zero_optimization": zero}, 2) == asked
    assert served.stage({"zero_optimization": zero} | BF16, 1) == asked
    assert served.stage({"zero_optimization": {**zero, "offload_optimizer": None}}, 1) == 0
    offloaded = {**zero, "offload_optimizer": {"device": "cpu"}}
    assert served.stage({"zero_optimization": offloaded}, 1) == asked


def test_what_is_computed_in_may_be_less_than_the_weights() -> None:
    autocast = {"enabled": True, "dtype": "bfloat16"}
    assert served.computes_in({"torch_autocast": autocast}) == "bf16"
    assert served.computes_in({"torch_autocast": {"enabled": False}}) == "fp32"
    assert served.computes_in(FP16) == "fp16"
    assert served.computes_in({}) == "fp32"


def _constants() -> set[str]:
    """Every string in the sources where DeepSpeed says which keys it reads."""

    def sources() -> Iterator[Path]:
        for path in Path(deepspeed.__file__).parent.rglob("*.py"):
            if path.name in ("config.py", "constants.py"):
                yield path

    return {
        node.value
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_top_level_key_is_one_that_deepspeed_reads() -> None:
    known = _constants()
    assert served.TOP_LEVEL_KEYS - known == set()
    assert "grad_clippping" not in known
    assert "train_batchsize" not in known


def test_every_key_of_a_section_is_one_that_deepspeed_reads() -> None:
    # Of earlier versions, refused by name.
    gone = {"mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param"}
    models: dict[str, type[DeepSpeedConfigModel]] = {
        "bf16": precision_config.DeepSpeedBF16Config,
        "comet": monitor_config.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": monitor_config.CSVConfig,
        "fp16": precision_config.DeepSpeedFP16Config,
        "tensorboard": monitor_config.TensorBoardConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "wandb": monitor_config.WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
    }
    for name, model in models.items():
        fields = {field.alias or key for key, field in model.model_fields.items()}
        assert served.SECTION_KEYS[name] - gone == fields, name
    known = _constants()
    for name in set(served.SECTION_KEYS) - set(models):
        assert served.SECTION_KEYS[name] <= known, name


@pytest.mark.parametrize("name", served.SECTION_KEYS)
def test_a_misspelt_key_of_a_section_is_named(name: str) -> None:
    outer, _, inner = name.partition(".")
    misspelt = {"enabld": True}
    with pytest.raises(ConfigError, match=f"{name}: unknown key 'enabld'"):
        served.check({outer: {inner: misspelt} if inner else misspelt})


def test_the_recipes_have_known_keys_only(repository: Path) -> None:
    recipes = sorted((repository / "ds_configs").glob("*.json"))
    assert recipes
    for path in recipes:
        raw = load_json(path)
        assert set(raw) - {"bert"} <= served.TOP_LEVEL_KEYS, path.name
        served.check({key: value for key, value in raw.items() if key != "bert"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fp16": True}, "fp16: wanted an object"),
        ({"bf16": None}, "bf16: wanted an object"),
        ({"timers": {"throughput": None}}, "timers.throughput: wanted an object"),
        ({"zero_optimization": 1}, "zero_optimization: wanted an object"),
        ({"bf16": {"enabled": "False"}}, "bf16.enabled: wanted true or false, got 'False'"),
        ({"zero_optimization": {"stage": "1"}}, "stage: wanted a number, got '1'"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast in float16"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "torch_autocast in float16"),
    ],
)
def test_a_section_of_the_wrong_kind_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        served.check(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gradient_clipping": "auto"}, 'gradient_clipping is "auto"'),
        ({"fp16": {"enabled": "auto"}}, 'fp16.enabled is "auto"'),
        *[
            (
                {"zero_optimization": {"reduce_bucket_size": size}},
                "zero_optimization.reduce_bucket_size: wanted a number of values from 1 on",
            )
            for size in ("500000000", None, -1, True)
        ],
        ({"data_types": {"param_dtype": "fp32"}}, "data_types.param_dtype is not served"),
        ({"steps_per_print": 0}, "steps_per_print: wanted a whole number from 1 on, got 0"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: wanted a number above 0"),
        ({"prescale_gradients": "no"}, "prescale_gradients: wanted true or false, got 'no'"),
        ({"wandb": {"enabled": True}}, "wandb: DeepSpeed's monitors .* --tracker wandb"),
        ({"gradient_clipping": -1}, "gradient_clipping: wanted a number from 0 on"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: wanted a number from 0 on"),
        (
            {"activation_checkpointing": {}},
            "activation_checkpointing: DeepSpeed's key would do nothing here",
        ),
        ({"seed": 7}, "seed: .*give --seed"),
    ],
)
def test_what_would_fail_late_or_do_nothing_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        served.check(config)
