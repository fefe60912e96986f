"""The cost model: its counts by hand, and on published runs the errors that docs/scaling.md has."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import cost, plan
from pretrain.published import published_runs
from tests.conftest import REPOSITORY
from zerobert.config import SIZES, BertConfig, load_json
from zerobert.errors import ConfigError
from zerobert.model import BertForPreTraining
from zerobert.model import num_parameters as counted

DOCUMENT = REPOSITORY / "docs" / "scaling.md"
LARGE = BertConfig.from_size({"size": "large", "vocab_size": 30528}, "large")
RUN = cost.Run(
    model=LARGE,
    gpu=cost.GPUS["a100"],
    num_gpus=64,
    global_samples=65536,
    seq_length=128,
    max_predictions=20,
    stage=0,
)


def with_stage(stage: int, **changes) -> cost.Run:
    return dataclasses.replace(RUN, stage=stage, **changes)


@pytest.mark.parametrize("size", ["tiny", "mini", "base"])
def test_parameters_are_those_of_the_model(size: str) -> None:
    config = BertConfig(**SIZES[size])
    assert cost.num_parameters(config) == counted(BertForPreTraining(config))


def test_states_shrink_with_the_stage() -> None:
    parameters = cost.num_parameters(LARGE)
    per_parameter = [cost.state_bytes(with_stage(stage)) / parameters for stage in range(4)]
    buffer = 2
    assert per_parameter == pytest.approx(
        [16, 4 + 12 / 64 + buffer, 2 + 14 / 64 + buffer, 16 / 64 + buffer]
    )


@pytest.mark.parametrize(
    ("stage", "zero", "values"),
    [
        (2, {"reduce_bucket_size": 1e8}, 1e8),
        (2, {"reduce_bucket_size": 1e8, "overlap_comm": True}, 2e8),
        (3, {"reduce_bucket_size": 1e8, "overlap_comm": True}, 1e8),
        (0, {"reduce_bucket_size": 1e8}, 0),
    ],
)
def test_the_buffer_of_gradients_is_counted(
    stage: int, zero: dict[str, Any], values: float
) -> None:
    without = cost.state_bytes(with_stage(stage, zero={"reduce_bucket_size": 0}))
    assert cost.state_bytes(with_stage(stage, zero=zero)) - without == pytest.approx(2 * values)


def test_a_step_by_hand() -> None:
    step = cost.time_step(with_stage(0, efficiency=0.8), micro_samples=64)
    assert (step.micro_samples, step.accumulation_steps) == (64, 16)
    assert step.matmul_s == pytest.approx(1024 * 240.7e9 / (0.8 * 0.64 * 312e12), rel=2e-3)
    bandwidth = 0.8 * 0.9 * 2.039e12
    moved = 2 * (128 * 24 * 54 * 1024 + 5 * 20 * 30528)
    assert step.memory_s == pytest.approx(1024 * moved / bandwidth)
    parameters = cost.num_parameters(LARGE)
    assert step.optimizer_s == pytest.approx(42 * parameters / bandwidth)
    inside, between = 7 / 8 / (0.8 * 300e9), 7 / 8 / (0.8 * 200e9)
    assert step.communication_s == pytest.approx(4 * parameters * (inside + between))
    assert step.seconds == pytest.approx(
        step.matmul_s + step.memory_s + step.optimizer_s + step.communication_s
    )
    assert step.limit == "matrix products"


def test_fp32_computes_at_its_own_rate_and_moves_and_sends_twice_the_bytes() -> None:
    low, half, high, tf32 = (
        cost.time_step(with_stage(0, precision=precision), micro_samples=64)
        for precision in ("bf16", "fp16", "fp32", "tf32")
    )
    assert high.matmul_s == pytest.approx(low.matmul_s * 312 / 19.5)
    assert tf32.matmul_s == pytest.approx(low.matmul_s * 2)
    assert high.memory_s == tf32.memory_s == pytest.approx(low.memory_s * 2)
    assert high.communication_s == pytest.approx(half.communication_s * 2)
    assert high.optimizer_s == pytest.approx(low.optimizer_s * 40 / 42)
    assert 1.8 < cost.sample_bytes(with_stage(0, precision="fp32")) / cost.sample_bytes(RUN) < 2
    # Autocast: products in 16 bits, but fp32 weights, which are sent so.
    cast = with_stage(0, precision="bf16", is_autocast=True)
    step = cost.time_step(cast, micro_samples=64)
    assert (step.matmul_s, step.communication_s) == (low.matmul_s, high.communication_s)
    assert cost.state_bytes(cast) == cost.state_bytes(with_stage(0, precision="fp32"))


def test_bf16_sends_gradients_in_fp32_where_they_are_sent_once() -> None:
    seconds = {
        (stage, precision): cost.time_step(
            with_stage(stage, precision=precision), micro_samples=64
        ).communication_s
        for stage in (0, 1, 2)
        for precision in ("fp16", "bf16")
    }
    ratios = [seconds[stage, "bf16"] / seconds[stage, "fp16"] for stage in (0, 1, 2)]
    assert ratios == pytest.approx([2, 1.5, 1])


def test_the_default_efficiency_is_the_goal_of_docs_and_slows_all_but_messages() -> None:
    whole, most = (
        cost.time_step(with_stage(0, efficiency=x), micro_samples=64) for x in (1, cost.EFFICIENCY)
    )
    assert most.communication_s == whole.communication_s
    for name in ("matmul_s", "memory_s", "optimizer_s"):
        assert getattr(most, name) == pytest.approx(getattr(whole, name) / cost.EFFICIENCY)
    goals = {("base", 128): 5400, ("base", 512): 1290, ("large", 128): 1730, ("large", 512): 420}
    for (size, length), goal in goals.items():
        run = with_stage(
            0,
            model=BertConfig.from_size({"size": size}, size),
            gpu=cost.GPUS["h100"],
            num_gpus=1,
            seq_length=length,
            max_predictions=20 if length == 128 else 80,
        )
        step = cost.time_step(run, micro_samples=64)
        assert run.global_samples / step.seconds == pytest.approx(goal, rel=0.03)


def test_one_gpu_sends_nothing() -> None:
    alone = with_stage(1, num_gpus=1, global_samples=1024)
    assert cost.time_step(alone, micro_samples=64).communication_s == 0


def test_what_is_sent_while_the_backward_pass_goes_on_costs_less() -> None:
    for stage in range(4):
        plain, hidden = (
            cost.time_step(with_stage(stage, overlaps=overlaps), micro_samples=64)
            for overlaps in (False, True)
        )
        assert 0 <= hidden.communication_s < plain.communication_s, stage


def test_more_stages_send_more() -> None:
    sent = [
        cost.time_step(with_stage(stage), micro_samples=64).communication_s for stage in range(4)
    ]
    assert sent[0] == sent[1] < sent[2] < sent[3]


def test_padding_left_out_is_time_saved() -> None:
    full, half = (cost.time_step(with_stage(0, fill=fill), micro_samples=64) for fill in (1.0, 0.5))
    assert half.matmul_s == full.matmul_s / 2
    assert cost.mfu(with_stage(0, fill=0.5), half) > cost.mfu(RUN, full)


def test_the_micro_batch_divides_the_share_and_fits() -> None:
    micro = cost.largest_micro_batch(RUN)
    assert 1024 % micro == 0
    room = 0.9 * 80e9 - cost.state_bytes(RUN)
    assert micro * cost.sample_bytes(RUN) <= room < 2 * micro * cost.sample_bytes(RUN)
    kept = cost.sample_bytes(with_stage(0, is_checkpointed=True))
    assert kept < cost.sample_bytes(RUN) / 5


def test_what_can_t_be_is_said() -> None:
    with pytest.raises(ConfigError, match=r"48 can't share .* 65,536 evenly; choose 32 or 64"):
        cost.largest_micro_batch(with_stage(0, num_gpus=48))
    small = dataclasses.replace(cost.GPUS["a100"], memory_bytes=4e9)
    with pytest.raises(ConfigError, match=r"weights, gradients and optimizer take 5\.4 GB of 4"):
        cost.largest_micro_batch(with_stage(0, gpu=small))


def published_table() -> str:
    lines = [
        "| who | what | published | roofline | error | plan | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in published_runs():
        form = ",.0f" if run.published > 60 else ".1f" if run.published > 5 else ".2f"
        roofline, planned = (f"{100 * error:+.0f} %" for error in run.errors)
        lines.append(
            f"| {run.who} | {run.what} | {run.published:{form}} {run.unit} | {run.roofline:{form}} "
            f"| {roofline} | {run.planned:{form}} | {planned} |"
        )
    return "\n".join(lines) + "\n"


def test_the_document_has_every_published_run_and_its_error() -> None:
    """With ZEROBERT_WRITE_TABLE set, the table goes to docs/scaling.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = published_table()
    if os.environ.get("ZEROBERT_WRITE_TABLE"):
        head, _, rest = text.partition("| who | what | published |")
        tail = rest.partition("\n\n")[2]
        DOCUMENT.write_text(f"{head}{table}\n{tail}", encoding="utf-8")
    assert table in DOCUMENT.read_text(encoding="utf-8")


def test_the_readme_s_range_is_that_of_the_published_runs() -> None:
    errors = {(run.who, run.what): run.errors[1] for run in published_runs()}
    assert len(errors) == 17
    half = {k: e for k, e in errors.items() if k[0].startswith("NVIDIA") and "512" in k[1]}
    rest = [error for name, error in errors.items() if name not in half]
    assert len(half) == 5
    assert all(-0.55 < error < -0.40 for error in half.values()), half
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = f"{-100 * min(rest):.0f} % slower to {100 * max(rest):.0f} % faster than published runs"
    assert found in readme


def tables(*flags: str) -> str:
    return "\n\n".join(plan.plan(plan.build_parser().parse_args(flags)))


def test_a_plan_of_a_recipe(tmp_path: Path) -> None:
    text = tables("--gpu", "a100", "--num_gpus", "256", "--price", "2")
    run = with_stage(1, num_gpus=256, model=dataclasses.replace(LARGE, vocab_size=30522))
    step = cost.time_step(run)
    assert f"sequences/s  {65536 / step.seconds:,.0f}, {256 / step.seconds:,.0f} a GPU" in text
    hours = 7038 * step.seconds / 3600
    assert f"time         {hours:,.1f} h, {hours * 256:,.0f} GPU-hours" in text or (
        f"time         {60 * hours:.1f} min, {hours * 256:,.0f} GPU-hours" in text
    )
    assert f"cost         {hours * 512:,.0f}" in text
    assert "limit        matrix products" in text
    by_time = tables("--deepspeed_config", str(REPOSITORY / "ds_configs" / "academic_24h.json"))
    assert "time         24.0 h, 192 GPU-hours" in by_time
    base = tables("--model", "bert_base", "--num_gpus", "1")
    assert "12 layers, hidden 768, 110 M" in base


def recipe(name: str) -> str:
    return str(REPOSITORY / "ds_configs" / name)


def changed(tmp_path: Path, **changes: object) -> str:
    """NVIDIA's first phase with other keys."""
    ds = load_json(Path(recipe("bert_large_phase1.json")))
    (tmp_path / "changed.json").write_text(json.dumps({**ds, **changes}))
    return str(tmp_path / "changed.json")


def test_a_plan_is_in_the_precision_of_the_recipe(tmp_path: Path) -> None:
    assert "989 TFLOP/s" in tables()
    plain = tables("--precision", "fp32")
    assert "precision   fp32\n" in plain
    assert "67 TFLOP/s" in plain
    of_recipe = tables("--deepspeed_config", recipe("paddle_base.json"))
    assert "precision   fp32\n" in of_recipe
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in tables("--precision", "tf32")
    cast = {"enabled": True, "dtype": "bfloat16"}
    json_of_cast = changed(tmp_path, fp16={"enabled": False}, torch_autocast=cast)
    text = tables("--deepspeed_config", json_of_cast)
    assert "precision   bf16, weights in fp32\n" in text


def test_a_plan_has_the_recipe_s_masks_and_length() -> None:
    assert "128 tokens, 100 % filled, 38 asked" in tables(
        "--deepspeed_config", recipe("mosaic_base.json")
    )
    for flags, rows in (
        (("--max_seq_length", "512"), "512 tokens, 100 % filled, 80 asked"),
        (("--max_seq_length", "256"), "256 tokens, 100 % filled, 38 asked"),
        (("--max_predictions_per_seq", "30"), "128 tokens, 100 % filled, 30 asked"),
    ):
        assert rows in tables(*flags)
    phase_2 = ("--deepspeed_config", recipe("bert_large_phase2.json"))
    assert "length      128 is assumed: a JSON does not know its shards; --max_seq_length N" in (
        tables(*phase_2)
    )
    assert "is assumed" not in tables(*phase_2, "--max_seq_length", "512")


def test_a_plan_computes_padding_where_it_is_not_left_out(tmp_path: Path) -> None:
    large = {"model": {"size": "large"}}
    padded = changed(tmp_path, bert={**large, "kernels": {"packing": False}})
    assert "128 tokens, 100 % filled" in tables("--deepspeed_config", padded, "--fill", "0.5")
    plain = changed(tmp_path, bert={**large, "kernels": {"attention": "plain"}})
    with pytest.raises(ConfigError, match=r"kernels\.attention: a plan knows fused attention"):
        tables("--deepspeed_config", plain)


def test_a_plan_of_little_is_not_nothing(tmp_path: Path) -> None:
    text = tables("--model", "bert_tiny", "--max_steps", "1", "--num_gpus", "1", "--price", "2")
    assert not re.search(r" 0(\.0*)?( |$)", text.partition("Training")[2])


def test_a_plan_goes_on_until_the_first_limit_that_is_known(tmp_path: Path) -> None:
    mosaic = tables("--deepspeed_config", recipe("mosaic_base.json"))
    assert "steps        70,000, 286,720,000 sequences" in mosaic
    epochs = changed(tmp_path, bert={"model": {"size": "large"}, "run": {"num_train_epochs": 40}})
    text = tables("--deepspeed_config", epochs)
    assert "40 epochs end it too, of rows that are not known here: --max_steps N" in text
    assert "steps        " not in text
    assert "steps        50, 3,276,800 sequences" in tables("--max_steps", "50")


def test_a_plan_has_all_memory_at_its_micro_batch() -> None:
    run = with_stage(2, num_gpus=8, gpu=cost.GPUS["h100"])
    run = dataclasses.replace(run, model=dataclasses.replace(LARGE, vocab_size=30522))
    micro = cost.largest_micro_batch(run)
    states, sample = cost.state_bytes(run), cost.sample_bytes(run)
    row = f"{states / 1e9:.2f} +{micro} +{(states + micro * sample) / 1e9:.2f} "
    assert re.search(rf"^ +2 +{row}", tables(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["large", "bert_large", "BERT-Large", "bert-large-uncased", "bert_large_cased"]
)
def test_a_model_s_known_names(name: str) -> None:
    assert "24 layers, hidden 1024, 336 M" in tables("--model", name)


def test_what_a_plan_does_not_cover_is_refused(tmp_path: Path) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="offload_optimizer: a plan does not know"):
        tables("--deepspeed_config", changed(tmp_path, zero_optimization=zero))
    none = {"stage": 1, "offload_optimizer": None}
    assert "GPU" in tables("--deepspeed_config", changed(tmp_path, zero_optimization=none))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "tpu"), "--gpu: wanted one of v100, a100, h100, h200, b200, got 'tpu'"),
        (("--num_gpus", "0"), "--num_gpus: wanted 1 or more, got 0"),
        (
            ("--num_gpus", "7"),
            "--num_gpus 7 can't share a global batch of 65,536 evenly; choose 4 or 8",
        ),
        (("--fill", "1.5"), "--fill: wanted above 0, at most 1, got 1.5"),
        (("--model", "bert_huge"), "--model: wanted one of bert_tiny, .* got 'bert_huge'"),
        (("--model", "bert_large_wwm_nonsense"), "--model: .* got 'bert_large_wwm_nonsense'"),
        (("--max_seq_length", "-5"), "--max_seq_length: wanted 1 or more, got -5"),
        (("--max_seq_length", "1024"), "wanted at most .* max_position_embeddings, 512, got 1024"),
        (("--max_predictions_per_seq", "0"), "--max_predictions_per_seq: wanted 1 or more, got 0"),
        (("--max_predictions_per_seq", "129"), "at most --max_seq_length, 128, got 129"),
        (("--max_steps", "-5"), "--max_steps: wanted 1 or more, got -5"),
        (("--price", "nan"), "--price: wanted a number from 0 on, got nan"),
        (("--fill", "nan"), "--fill: wanted above 0, at most 1, got nan"),
        (("--efficiency", "0"), "--efficiency: wanted above 0, at most 1, got 0"),
        (("--gpu", "v100", "--precision", "bf16"), "no matrix units for bf16; choose --precision"),
        (("--machine_gbit", "inf"), "--machine_gbit: wanted above 0, got inf"),
        (("--machine_gbit", "-1"), "--machine_gbit: wanted above 0"),
        (("--deepspeed_config", "x.json"), "x.json: no such file"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tables(*flags)
