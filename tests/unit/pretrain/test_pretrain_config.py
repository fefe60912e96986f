"""Defaults, JSON and flags in that order; batch sizes; what makes a run this run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import (
    KNOWN_NAMES,
    PretrainConfig,
    RunConfig,
    identity,
    resolve,
    resolved_json,
    total_steps,
    with_micro_batch,
)
from pretrain.run import parse_args
from zerobert import checkpoint
from zerobert.config import BertConfig
from zerobert.ds_config import BatchSizes, batch_sizes, check_same_run
from zerobert.errors import ConfigError
from zerobert.model import BertForPreTraining
from zerobert.optim import AdamWParams, LambParams
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer


def resolved(folder: Path, raw: dict[str, Any], *flags: str) -> PretrainConfig:
    path = folder / "mine.json"
    path.write_text(json.dumps(raw))
    return resolve(parse_args(["--deepspeed_config", str(path), *flags]))


def make_model_folder(folder: Path, *, rows: int = 7) -> BertConfig:
    vocab = [*SPECIAL_TOKENS, "a", "b"]
    config = BertConfig.from_size(
        {"size": "tiny", "vocab_size": rows, "hidden_dropout_prob": 0.0}, "test"
    )
    checkpoint.save_model(
        folder,
        BertForPreTraining(config).state_dict(),
        config,
        WordPieceTokenizer(vocab, do_lower_case=True),
        card="",
        source={},
        inputs={},
    )
    return config


def test_a_plain_deepspeed_file_is_bert_base_with_defaults(tmp_path: Path) -> None:
    got = resolved(tmp_path, {"train_micro_batch_size_per_gpu": 8})
    assert got.name == "mine"
    # DeepSpeed clips at 1.0 where a file says nothing: the resolved one says it.
    assert got.deepspeed == {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1.0}
    assert got.bert.run == RunConfig()
    assert got.bert.data.input_dir == ("data/shards",)
    assert got.bert.tracking.tracker == ("none",)
    assert got.optimizer.type == "AdamW"
    assert got.init_from is None
    assert got.model(1000) == BertConfig(vocab_size=1000)


def test_flags_win_over_the_json_which_wins_over_defaults(tmp_path: Path) -> None:
    raw = {
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "bert": {
            "data": {"input_dir": ["a"], "eval_dir": "e"},
            "schedule": {"warmup_proportion": 0.5, "warmup_steps": 4},
            "run": {"max_steps": 5, "logging_steps": 3, "seed": 9},
            "tracking": {"tracker": ["wandb"], "project": "p"},
        },
    }
    without = resolved(tmp_path, raw)
    assert (without.bert.run.max_steps, without.bert.run.logging_steps) == (5, 3)
    assert (without.bert.run.seed, without.bert.run.save_steps) == (9, 1000)
    assert without.bert.schedule.warmup_steps == 4
    assert without.optimizer.params == LambParams(lr=1e-3, weight_decay=0.1)

    flags = "--max_steps 7 --seed 0 --eval_steps 0 --warmup_steps 6 --input_dir b --input_dir c"
    flags += " --eval_dir f --tracker none --learning_rate 0.25 --num_train_epochs 1e5"
    flags += " --vocab_file v.txt --save_steps 11 --eval_rows 12"
    got = resolved(tmp_path, raw, *flags.split())
    assert (got.bert.run.max_steps, got.bert.run.logging_steps) == (7, 3)
    assert (got.bert.run.seed, got.bert.run.eval_steps) == (0, 0)
    assert (got.bert.run.save_steps, got.bert.run.eval_rows) == (11, 12)
    assert got.bert.run.num_train_epochs == 1e5
    assert got.bert.schedule.warmup_steps == 6
    assert got.bert.schedule.warmup_proportion == 0.5
    assert list(got.bert.data.input_dir) == ["b", "c"]
    assert (got.bert.data.eval_dir, got.bert.data.vocab_file) == ("f", "v.txt")
    assert (list(got.bert.tracking.tracker), got.bert.tracking.project) == (["none"], "p")
    assert got.optimizer.params == LambParams(lr=0.25, weight_decay=0.1)


def test_paddlenlp_s_command_overrides_its_recipe() -> None:
    flags = "--model_type bert --model_name_or_path bert-large-uncased --batch_size 56"
    flags += " --max_predictions_per_seq 20 --learning_rate 3e-4 --weight_decay 1e-2"
    flags += " --adam_epsilon 1e-6 --warmup_steps 77 --num_train_epochs 3 --input_dir data/"
    flags += " --output_dir out --logging_steps 1 --save_steps 20 --max_steps 99 --n_gpu 1"
    got = resolve(parse_args(flags.split()))
    assert got.name == "paddle_base"
    assert got.optimizer.type == "AdamW"
    assert got.optimizer.params == AdamWParams(lr=3e-4, eps=1e-6, weight_decay=0.01)
    assert batch_sizes(got.deepspeed, 4) == BatchSizes(
        global_samples=224, micro_samples=56, accumulation_steps=1
    )
    assert got.bert.schedule.warmup_steps == 77
    assert got.bert.run.max_steps == 99
    assert got.model(30522).hidden_size == 1024
    assert got.init_from is None


# Source: PaddleNLP, examples/language_model/bert/README.md, pre-training on a GPU: what follows
# `python -m paddle.distributed.launch --gpus "0" run_pretrain.py`.
PADDLE_COMMAND = """
    --model_type bert
    --model_name_or_path bert-base-uncased
    --max_predictions_per_seq 20
    --batch_size 32
    --learning_rate 1e-4
    --weight_decay 1e-2
    --adam_epsilon 1e-6
    --warmup_steps 10000
    --num_train_epochs 3
    --input_dir data/
    --output_dir pretrained_models/
    --logging_steps 1
    --save_steps 20000
    --max_steps 1000000
    --device gpu
    --use_amp False
"""


def test_paddlenlp_s_documented_command_is_its_recipe() -> None:
    args = parse_args(PADDLE_COMMAND.split())
    got = resolve(args)
    assert (args.output_dir, list(got.bert.data.input_dir)) == ("pretrained_models/", ["data/"])
    assert got.model(30522) == BertConfig()
    assert got.optimizer.params == AdamWParams(lr=1e-4, eps=1e-6, weight_decay=0.01)
    assert got.deepspeed["gradient_clipping"] == 0.0
    assert not {"fp16", "bf16"} & set(got.deepspeed)
    run = got.bert.run
    assert (run.logging_steps, run.save_steps, run.num_train_epochs) == (1, 20000, 3.0)
    rates = [got.rate(step, 0.0, total_steps=10**6) for step in (0, 9_999, 504_999, 999_999)]
    assert rates == pytest.approx([1e-8, 1e-4, 0.5e-4, 0], abs=1e-18)


@pytest.mark.parametrize(
    ("flags", "fp16"),
    [
        ("--use_amp True", {"enabled": True, "initial_scale_power": 15}),
        (
            "--use_amp 1 --scale_loss 1024 --amp_level O2",
            {"enabled": True, "initial_scale_power": 10},
        ),
        (
            "--use_amp yes --precision fp16 --scale_loss 1",
            {"enabled": True, "initial_scale_power": 0},
        ),
        ("--precision fp16 --scale_loss 2", {"enabled": True, "initial_scale_power": 1}),
        ("--use_amp False --scale_loss 1024", None),
        ("--scale_loss 1024", None),
        ("--use_amp off --precision fp32", None),
    ],
)
def test_paddlenlp_s_mixed_precision(flags: str, fp16: dict[str, Any] | None) -> None:
    got = resolve(parse_args(flags.split()))
    assert got.deepspeed.get("fp16") == fp16


def test_paddlenlp_s_amp_flag_replaces_the_json_s_precision(tmp_path: Path) -> None:
    raw = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    got = resolved(tmp_path, raw, "--use_amp", "true").deepspeed
    assert got["fp16"] == {"enabled": True, "initial_scale_power": 15}
    assert not {"bf16", "data_types"} & set(got)
    assert not {"bf16", "fp16"} & set(resolved(tmp_path, raw, "--use_amp", "n").deepspeed)


def test_paddlenlp_s_gradient_norm_is_the_clipping(tmp_path: Path) -> None:
    assert resolve(parse_args(["--max_grad_norm", "0.5"])).deepspeed["gradient_clipping"] == 0.5
    raw = {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 2.0}}}
    got = resolved(tmp_path, raw, "--max_grad_norm", "0")
    assert got.deepspeed["gradient_clipping"] == 0.0


def test_paddlenlp_s_static_graph_is_compilation() -> None:
    assert resolve(parse_args(["--to_static", "True"])).bert.kernels.compile
    assert not resolve(
        parse_args(["--to_static", "no", "--fuse_transformer", "1"])
    ).bert.kernels.compile


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_amp True --precision bf16", "--use_amp True is fp16, --precision says bf16: leave"),
        ("--use_amp False --precision fp16", "--use_amp False is fp32, --precision says fp16"),
        ("--use_amp maybe", "--use_amp: wanted true or false, got 'maybe'"),
        ("--use_amp 1 --scale_loss 1000", "--scale_loss: wanted a power of 2 from 1 on, got 1000"),
        ("--scale_loss 0", "--scale_loss: wanted a power of 2 from 1 on, got 0"),
        ("--device xpu", "--device.*'xpu'.*cpu.*gpu"),
        ("--device gpu --n_gpu 0", "--device gpu and --n_gpu 0, which is the CPU, contradict"),
        ("--profiler_options batch_range=[1,2]", "--profiler_options: use --profile"),
        ("--model_type ernie", "--model_type.*'ernie'"),
        ("--max_grad_norm -1", "gradient_clipping: wanted a number from 0 on, got -1.0"),
    ],
)
def test_what_paddlenlp_has_and_is_not_served_is_one_line(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        resolve(parse_args(flags.split()))
    assert "\n" not in str(raised.value)


def test_batch_size_is_the_micro_batch_without_accumulation(tmp_path: Path) -> None:
    raw = {"train_batch_size": 64, "gradient_accumulation_steps": 4, "gradient_clipping": 0.0}
    assert resolved(tmp_path, raw, "--batch_size", "3").deepspeed == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


def test_apex_name_of_the_clipping_is_served(tmp_path: Path) -> None:
    raw = {"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 0.7}}}
    assert resolved(tmp_path, raw).deepspeed["gradient_clipping"] == 0.7


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_replaces_every_precision_section(tmp_path: Path, precision: str) -> None:
    raw = {
        "fp16": {"enabled": True, "initial_scale_power": 20},
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.5,
    }
    wanted: dict[str, Any] = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}
    if precision != "fp32":
        wanted[precision] = {"enabled": True}
    assert resolved(tmp_path, raw, "--precision", precision).deepspeed == wanted


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_a_known_name_is_an_architecture_with_random_weights(tmp_path: Path, name: str) -> None:
    got = resolved(tmp_path, {"bert": {"model": {"size": "tiny"}}}, "--model_name_or_path", name)
    assert got.init_from is None
    layers = 24 if "large" in name else 12
    assert got.model(30522).num_hidden_layers == layers
    raw = {"bert": {"model": {"hidden_size": 32, "hidden_dropout_prob": 0.3}}}
    model = resolved(tmp_path, raw, "--model_name_or_path", name).model(30522)
    assert (model.num_hidden_layers, model.hidden_dropout_prob) == (layers, 0.3)
    assert model.hidden_size > 32


def test_an_unknown_name_is_refused_with_the_way_to_a_hub_model() -> None:
    with pytest.raises(ConfigError, match=r"'roberta-base' is neither a folder .*--init_from"):
        resolve(parse_args(["--model_name_or_path", "roberta-base"]))


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--init_from"])
def test_a_folder_is_weights_and_architecture(tmp_path: Path, flag: str) -> None:
    config = make_model_folder(tmp_path / "model")
    got = resolve(parse_args([flag, str(tmp_path / "model")]))
    assert got.init_from is not None
    assert got.init_from.path == tmp_path / "model"
    assert got.model(7) == config
    with pytest.raises(ConfigError, match="made for 7 words, the shards' vocabulary has 8"):
        got.model(8)


def test_weights_padded_to_a_multiple_go_on_with_their_rows(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "model", rows=16)
    raw = {"bert": {"model": {"size": "tiny", "hidden_dropout_prob": 0.2}}}
    got = resolved(tmp_path, raw, "--init_from", str(tmp_path / "model")).model(7)
    assert (got.vocab_size, got.hidden_dropout_prob) == (16, 0.2)


def test_the_vocabulary_decides_its_size(tmp_path: Path) -> None:
    got = resolved(tmp_path, {"bert": {"model": {"size": "tiny", "vocab_size": 100}}})
    assert got.model(100).vocab_size == 100
    with pytest.raises(ConfigError, match=r"bert.model.vocab_size is 100, .* has 101 words"):
        got.model(101)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"grad_clippping": 1.0}, r"mine\.json: unknown key 'grad_clippping' \(did you mean"),
        ({"bert": {"shedule": {}}}, r"mine\.json: bert: unknown key 'shedule'.*'schedule'"),
        ({"bert": {"run": {"max_step": 1}}}, r"bert\.run: unknown key 'max_step'.*'max_steps'"),
        ({"bert": {"data": {"inputdir": []}}}, r"bert\.data: unknown key 'inputdir'"),
        ({"bert": {"data": {"masked_lm_prob": 0.3}}}, r'bert\.data: .*add "masking": "dynamic"'),
        ({"bert": {"data": {"whole_word_mask": True}}}, r'bert\.data: .*add "masking": "dynamic"'),
        (
            {"bert": {"data": {"masking": "dynamic", "masked_lm_prob": 15.0}}},
            r"bert\.data: masked_lm_prob: wanted between 0 and 1, got 15",
        ),
        ({"bert": {"data": {"masking": "fresh"}}}, r"bert\.data\.masking: wanted one of"),
        ({"bert": {"run": {"max_steps": "7"}}}, r"bert\.run\.max_steps: wanted int, got '7'"),
        ({"bert": {"run": {"max_steps": 0}}}, r"bert\.run: max_steps: wanted above 0, got 0"),
        ({"bert": {"run": {"save_steps": 0}}}, r"bert\.run: save_steps: wanted at least 1, got 0"),
        ({"bert": {"run": {"eval_rows": -1}}}, r"bert\.run: eval_rows: wanted at least 0"),
        ({"bert": {"tracking": {"tracker": ["mlflow"]}}}, r"tracker\[0\]: wanted one of 'none'"),
        ({"bert": {"kernels": {"attention": "fast"}}}, r"bert\.kernels\.attention: wanted one of"),
        ({"bert": None}, r"mine\.json: bert: wanted an object"),
        ({"optimizer": {"type": "SGD"}}, r"optimizer\.type: wanted Lamb or AdamW, got 'SGD'"),
        ({"optimizer": {"type": "Lamb", "params": {"learning_rate": 1}}}, "'learning_rate'"),
        (
            {
                "gradient_clipping": 0.5,
                "optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1.0}},
            },
            "they are the same thing; give one",
        ),
        (
            {"zero_optimization": {"stage": 3}, "bert": {"kernels": {"compile": True}}},
            "bert.kernels.compile does not go with ZeRO stage 3",
        ),
        (
            {"zero_optimization": {"stage": 1}, "bert": {"kernels": {"lamb": "apex"}}},
            "bert.kernels.lamb 'apex' takes whole parameters",
        ),
        *[
            (
                {
                    "optimizer": {"type": "Lamb", "params": {name: 0.5}},
                    "bert": {"kernels": {"lamb": "apex"}},
                },
                f"bert.kernels.lamb 'apex' knows no optimizer.params.{name}",
            )
            for name in ("min_coeff", "max_coeff")
        ],
        (
            {
                "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
                "bert": {"kernels": {"lamb": "triton"}},
            },
            "bert.kernels.lamb 'triton' runs on CUDA, and zero_optimization.offload_optimizer",
        ),
        ({"scheduler": {"type": "OneCycle"}}, r"mine\.json: scheduler\.type: OneCycle is not"),
        (
            {"scheduler": {"type": "WarmupLR"}, "bert": {"schedule": {}}},
            'has DeepSpeed\'s "scheduler" section and bert.schedule: remove one',
        ),
        (
            {"bert": {"schedule": {"by": "time"}, "run": {"max_steps": 5}}},
            "goes by time needs to know how long: give --max_train_s",
        ),
        (
            {"bert": {"run": {"max_train_s": 60}}},
            "max_train_s alone .* the schedule goes by steps: give --schedule_by time, or",
        ),
        ({"bert": {"run": {"max_samples": 0}}}, "max_samples: wanted above 0, got 0"),
    ],
)
def test_each_mistake_in_the_json_is_named(
    tmp_path: Path, raw: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(tmp_path, raw)


def test_a_misspelt_key_of_the_model_is_named(tmp_path: Path) -> None:
    got = resolved(tmp_path, {"bert": {"model": {"size": "tiny", "hidden_dropout": 0.0}}})
    with pytest.raises(ConfigError, match=r"bert\.model: unknown key 'hidden_dropout'.*_prob'"):
        got.model(100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "0"], "max_steps: wanted above 0, got 0"),
        (["--num_train_epochs", "-1"], "num_train_epochs: wanted above 0, got -1.0"),
        (["--num_train_epochs", "inf"], "num_train_epochs: wanted above 0, got inf"),
        (["--num_train_epochs", "nan"], "num_train_epochs: wanted above 0, got nan"),
        (["--logging_steps", "0"], "logging_steps: wanted at least 1, got 0"),
        (["--seed", "-1"], "seed: wanted at least 0, got -1"),
        (["--warmup_steps", "-5"], "warmup_steps: wanted at least 0, got -5"),
        (["--learning_rate", "-1"], "lr: wanted a number from 0 on, got -1"),
        (["--max_train_s", "nan"], "max_train_s: wanted above 0, got nan"),
        (["--schedule_by", "time"], "warmup_steps: this schedule goes by time"),
    ],
)
def test_each_mistake_in_the_flags_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(parse_args(flags))


@pytest.mark.parametrize(
    "flags", [["--max_stepz", "5"], ["--precision", "int8"], ["--tracker", "x"], ["stray"]]
)
def test_a_wrong_flag_is_one_line(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"see pretrain/run\.py --help$"):
        parse_args(flags)


@pytest.mark.parametrize(
    ("keys", "world_size", "sizes"),
    [
        ({"total": 64, "micro": 8, "steps": 4}, 2, (64, 8, 4)),
        ({"total": 64, "micro": 8}, 2, (64, 8, 4)),
        ({"total": 64, "steps": 4}, 2, (64, 8, 4)),
        ({"micro": 8, "steps": 4}, 2, (64, 8, 4)),
        ({"total": 64}, 2, (64, 32, 1)),
        ({"micro": 8}, 2, (16, 8, 1)),
        ({"total": 1}, 1, (1, 1, 1)),
    ],
)
def test_two_batch_keys_fix_the_third(
    keys: dict[str, int], world_size: int, sizes: tuple[int, int, int]
) -> None:
    assert dataclasses.astuple(batch_sizes(batch_keys(keys), world_size)) == sizes


def batch_keys(short: dict[str, Any]) -> dict[str, Any]:
    names = {
        "total": "train_batch_size",
        "micro": "train_micro_batch_size_per_gpu",
        "steps": "gradient_accumulation_steps",
    }
    return {names[name]: value for name, value in short.items()}


@pytest.mark.parametrize(
    ("keys", "world_size", "message"),
    [
        ({}, 1, "give train_batch_size and train_micro_batch_size_per_gpu"),
        ({"steps": 2}, 1, "give train_batch_size and train_micro_batch_size_per_gpu"),
        ({"micro": 0}, 1, "wanted whole numbers above 0, got 0"),
        ({"total": "auto", "micro": 2}, 1, "wanted whole numbers above 0, got 'auto'"),
        ({"total": 64.0, "micro": 2}, 1, "wanted whole numbers above 0, got 64.0"),
        ({"total": 64, "micro": True}, 1, "wanted whole numbers above 0, got True"),
        (
            {"total": 64, "micro": 12},
            2,
            "train_batch_size 64 is not micro-batch 12 x accumulation 2 x 2 processes; choose a "
            "train_micro_batch_size_per_gpu that divides 32",
        ),
        ({"total": 64, "micro": 128}, 1, "that divides 64"),
        ({"total": 64, "micro": 8, "steps": 3}, 2, "accumulation 3 x 2 processes"),
        ({"total": 64, "micro": 8}, 3, "choose a train_batch_size that is a multiple of 3"),
        ({"total": 1}, 2, "choose a train_batch_size that is a multiple of 2"),
        ({"total": 8, "steps": 16}, 1, "train_batch_size 8 is not micro-batch 1 x accumulation 16"),
    ],
)
def test_batch_sizes_that_do_not_multiply_are_refused(
    keys: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        batch_sizes(batch_keys(keys), world_size)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2.0}, 21),  # 200 rows in batches of 10, and one that straddles
        ({"num_train_epochs": 0.01}, 1),
        ({"max_steps": 7, "num_train_epochs": 1e5}, 7),
        ({"max_steps": 1000, "num_train_epochs": 2.0}, 21),
        ({"num_train_epochs": 1e5}, 1_010_000),
        ({"max_samples": 70}, 7),
        ({"max_samples": 71, "max_steps": 9}, 8),
        ({"max_train_s": 60.0}, None),
        ({"max_train_s": 60.0, "max_steps": 9}, 9),
    ],
)
def test_the_earliest_limit_ends_the_run(limits: dict[str, Any], steps: int | None) -> None:
    assert total_steps(RunConfig(**limits), num_rows=101, global_samples=10) == steps


def test_no_limit_at_all_is_a_question() -> None:
    with pytest.raises(ConfigError, match=r"how long\? give --max_steps, --num_train_epochs,"):
        total_steps(RunConfig(), num_rows=100, global_samples=10)


def test_paddlenlp_s_minus_one_is_no_limit() -> None:
    got = resolve(parse_args(["--max_steps", "-1", "--num_train_epochs", "2"]))
    assert (got.bert.run.max_steps, got.bert.run.num_train_epochs) == (None, 2.0)


def test_initial_weights_keep_their_architecture(tmp_path: Path) -> None:
    config = make_model_folder(tmp_path / "model")

    def model(section: dict[str, Any]) -> BertConfig:
        flags = ["--init_from", str(tmp_path / "model")]
        return resolved(tmp_path, {"bert": {"model": section}}, *flags).model(7)

    assert model({}) == config
    changed = model({"size": "tiny", "hidden_dropout_prob": 0.2})
    assert changed == dataclasses.replace(config, hidden_dropout_prob=0.2)
    free = {"attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.3}  # and no size
    assert model(free) == dataclasses.replace(config, **free)
    assert model({"layer_norm_eps": 1e-12, "hidden_size": 128, "vocab_size": 7}) == config
    for section, words in (
        ({"size": "base"}, "hidden_size 768"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"pad_token_id": 3}, "pad_token_id 3"),
        ({"vocab_size": 6}, "vocab_size 6"),
    ):
        with pytest.raises(ConfigError, match=f"asks for .*{words}"):
            model(section)


def identity_of(
    config: PretrainConfig, world_size: int = 1, steps: int | None = 50, rows: int = 10
) -> dict[str, Any]:
    """As it is read back from a saved state."""
    flat = identity(
        resolved_json(config, config.model(100)),
        steps=steps,
        sizes=batch_sizes(config.deepspeed, world_size),
        data={"rows": rows, "vocab_sha256": "ab"},
    )
    return dict(json.loads(json.dumps(flat)))


BASE: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}},
    "bert": {"model": {"size": "tiny"}, "run": {"max_steps": 50}},
}


@pytest.mark.parametrize(
    ("batch", "world_size", "found", "accumulation"),
    [
        ({}, 1, 16, 2),
        ({}, 16, None, 1),  # fewer for each than the micro-batch that the JSON names
        ({"gradient_accumulation_steps": 8}, 2, 2, 8),
        ({"train_batch_size": None, "gradient_accumulation_steps": 4}, 2, 8, 2),
        ({"train_batch_size": None, "gradient_accumulation_steps": 4}, 2, None, 1),
    ],
)
def test_the_micro_batch_that_is_found_keeps_the_global_batch(
    tmp_path: Path, batch: dict[str, Any], world_size: int, found: int | None, accumulation: int
) -> None:
    raw = {name: value for name, value in {**BASE, **batch}.items() if value is not None}
    config = with_micro_batch(resolved(tmp_path, raw), found, world_size)
    got = batch_sizes(config.deepspeed, world_size)
    assert (got.global_samples, got.accumulation_steps) == (32, accumulation)
    assert found is None or got.micro_samples == found


@pytest.mark.parametrize(
    "flags",
    [
        "--logging_steps 3 --save_steps 4 --eval_steps 5 --eval_rows 6",
        "--tracker wandb",
        "--input_dir elsewhere --eval_dir there --vocab_file v.txt",
        "--max_steps 50 --num_train_epochs 1e5",
        "--max_train_s 60",
        "--max_samples 1600",
    ],
)
def test_a_resumed_run_may_change_this(tmp_path: Path, flags: str) -> None:
    before = identity_of(resolved(tmp_path, BASE))
    check_same_run(before, identity_of(resolved(tmp_path, BASE, *flags.split())), "state_3")


@pytest.mark.parametrize(
    "rate",
    [
        {"bert": {**BASE["bert"], "schedule": {"name": "constant", "warmup_steps": 5}}},
        {"bert": {**BASE["bert"], "schedule": {"name": "constant"}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}},
    ],
)
def test_a_rate_that_no_length_changes_can_be_trained_on(
    tmp_path: Path, rate: dict[str, Any]
) -> None:
    config = resolved(tmp_path, {**BASE, **rate})
    check_same_run(identity_of(config, steps=50), identity_of(config, steps=80), "state_3")


def test_a_warm_up_that_is_a_share_of_the_run_fixes_its_length(tmp_path: Path) -> None:
    schedule = {"name": "constant", "warmup_proportion": 0.1}
    config = resolved(tmp_path, {**BASE, "bert": {**BASE["bert"], "schedule": schedule}})
    with pytest.raises(ConfigError, match="total_steps was 50, is 80"):
        check_same_run(identity_of(config, steps=50), identity_of(config, steps=80), "state_3")


def test_a_resumed_run_may_change_processes_and_zero_stage(tmp_path: Path) -> None:
    before = identity_of(resolved(tmp_path, BASE))
    other = {**BASE, "zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}
    other["train_micro_batch_size_per_gpu"] = 8
    check_same_run(before, identity_of(resolved(tmp_path, other), world_size=4), "state_3")


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, "--learning_rate 2e-3", "optimizer.params.lr was 0.001, is 0.002"),
        ({}, "--seed 7", "bert.run.seed was 42, is 7"),
        ({}, "--warmup_steps 7", "bert.schedule.warmup_steps was None, is 7"),
        ({}, "--batch_size 8", "train_batch_size was 32, is 8"),
        ({}, "--precision bf16", "bf16.enabled was None, is True"),
        ({"gradient_clipping": 0.5}, "", "gradient_clipping was 1.0, is 0.5"),
        ({"bert": {"model": {"size": "mini"}}}, "", "bert.model.hidden_size was 128, is 256"),
        (
            {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "betas": [0.9, 0.98]}}},
            "",
            r"optimizer.params.betas was \[0.9, 0.99\], is \[0.9, 0.98\]",
        ),
    ],
)
def test_a_resumed_run_must_agree_in_this(
    tmp_path: Path, changes: dict[str, Any], flags: str, message: str
) -> None:
    before = identity_of(resolved(tmp_path, BASE))
    now = identity_of(resolved(tmp_path, {**BASE, **changes}, *flags.split()))
    with pytest.raises(ConfigError, match=f"state_3 is of a run with other settings: .*{message}"):
        check_same_run(before, now, "state_3")


def test_another_length_or_other_data_is_another_run(tmp_path: Path) -> None:
    config = resolved(tmp_path, BASE)
    with pytest.raises(ConfigError, match="total_steps was 50, is 60"):
        check_same_run(identity_of(config), identity_of(config, steps=60), "s")
    with pytest.raises(ConfigError, match=r"data\.rows was 10, is 11"):
        check_same_run(identity_of(config), identity_of(config, rows=11), "s")
    with pytest.raises(ConfigError, match=r"vocabulary was aaaaaaaaaaaa\.\.\., is None"):
        check_same_run({"vocabulary": "a" * 64}, {}, "s")


def test_by_time_the_budget_makes_the_run_and_its_steps_do_not(tmp_path: Path) -> None:
    raw = {**BASE, "bert": {"model": {"size": "tiny"}, "schedule": {"by": "time"}}}
    before = identity_of(resolved(tmp_path, raw, "--max_train_s", "60"), steps=None)
    check_same_run(
        before,
        identity_of(resolved(tmp_path, raw, "--max_train_s", "60", "--max_steps", "9"), steps=9),
        "state_3",
    )
    with pytest.raises(ConfigError, match=r"max_train_s was 60\.0, is 90\.0"):
        check_same_run(before, identity_of(resolved(tmp_path, raw, "--max_train_s", "90")), "s")
    other = resolved(
        tmp_path, raw, "--max_train_s", "60", "--max_steps", "9", "--schedule_by=steps"
    )
    with pytest.raises(ConfigError, match=r"bert\.schedule\.by was 'time', is 'steps'"):
        check_same_run(before, identity_of(other), "s")


SCHEDULED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_max_lr": 1e-2},
    },
    "bert": {"run": {"max_steps": 12}},
}


def test_deepspeed_s_scheduler_sets_the_rate(tmp_path: Path) -> None:
    scheduled = {**SCHEDULED["scheduler"]["params"], "warmup_type": "linear"}
    raw = {**SCHEDULED, "scheduler": {"type": "WarmupDecayLR", "params": scheduled}}
    config = resolved(tmp_path, raw)
    rates = [config.rate(step, 99.0, total_steps=12) for step in range(12)]
    # The peak is the scheduler's, not the optimizer's.
    wanted = [0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates == pytest.approx([1e-2 * share for share in wanted])
    # Its lengths are its own: the run may be of any.
    assert resolved(tmp_path, raw, "--max_train_s", "60", "--max_steps", "-1").scheduler


def test_deepspeed_s_scheduler_runs_again_and_is_part_of_the_run(tmp_path: Path) -> None:
    config = resolved(tmp_path, SCHEDULED)
    again = resolved(tmp_path, resolved_json(config, config.model(100)))
    assert again.scheduler == config.scheduler
    before = identity_of(config)
    check_same_run(before, identity_of(again), "s")
    longer = {**SCHEDULED["scheduler"]["params"], "total_num_steps": 20}
    changed = {**SCHEDULED, "scheduler": {"type": "WarmupDecayLR", "params": longer}}
    with pytest.raises(ConfigError, match=r"params.total_num_steps was 10, is 20"):
        check_same_run(before, identity_of(resolved(tmp_path, changed)), "s")


@pytest.mark.parametrize(
    "flags", ["--warmup_steps 5", "--learning_rate 1e-3", "--schedule_by steps"]
)
def test_flags_that_deepspeed_s_scheduler_would_overrule_are_refused(
    tmp_path: Path, flags: str
) -> None:
    flag = flags.split()[0]
    with pytest.raises(ConfigError, match=f'{flag}: the JSON\'s "scheduler" section decides that'):
        resolved(tmp_path, SCHEDULED, *flags.split())


def test_the_learning_rate_flag_is_the_peak_of_a_scheduler_that_names_none(tmp_path: Path) -> None:
    raw = {**SCHEDULED, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}
    config = resolved(tmp_path, raw, "--learning_rate", "0.5")
    assert config.rate(9, 0.0, total_steps=None) == 0.5
