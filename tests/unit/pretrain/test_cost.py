"""The cost model: its counts by hand, and on published runs the errors that docs/scaling.md has."""

import dataclasses
import os
from pathlib import Path

import pytest

from pretrain import cost, plan
from tests.conftest import REPOSITORY
from zerobert.config import SIZES, BertConfig
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
    assert per_parameter == pytest.approx([16, 4 + 12 / 64, 2 + 14 / 64, 16 / 64])


def test_a_step_by_hand() -> None:
    step = cost.time_step(RUN, micro_samples=64)
    assert (step.micro_samples, step.accumulation_steps) == (64, 16)
    assert step.matmul_s == pytest.approx(1024 * 240.7e9 / (0.64 * 312e12), rel=2e-3)
    moved = 2 * (128 * 24 * 54 * 1024 + 5 * 20 * 30528)
    assert step.memory_s == pytest.approx(1024 * moved / (0.9 * 2.039e12))
    parameters = cost.num_parameters(LARGE)
    assert step.optimizer_s == pytest.approx(42 * parameters / (0.9 * 2.039e12))
    inside, between = 7 / 8 / (0.8 * 300e9), 7 / 8 / (0.8 * 200e9)
    assert step.communication_s == pytest.approx(4 * parameters * (inside + between))
    assert step.seconds == pytest.approx(
        step.matmul_s + step.memory_s + step.optimizer_s + step.communication_s
    )
    assert step.limit == "matrix products"


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
    with pytest.raises(ConfigError, match="65536 can't be shared among 48 GPUs evenly"):
        cost.largest_micro_batch(with_stage(0, num_gpus=48))
    small = dataclasses.replace(cost.GPUS["a100"], memory_bytes=4e9)
    with pytest.raises(ConfigError, match=r"weights, gradients and optimizer take 5\.4 GB of 4"):
        cost.largest_micro_batch(with_stage(0, gpu=small))


def published_table() -> str:
    lines = ["| who | what | published | reckoned | error |", "|---|---|---|---|---|"]
    for run in cost.published_runs():
        form = ",.0f" if run.published > 60 else ".1f"
        figures = f"{run.published:{form}} {run.unit} | {run.modelled:{form}} {run.unit}"
        lines.append(f"| {run.who} | {run.what} | {figures} | {100 * run.error:+.0f} % |")
    return "\n".join(lines) + "\n"


def test_published_runs_are_met_and_the_document_says_how_closely() -> None:
    """With ZEROBERT_WRITE_TABLE set, the table goes to docs/scaling.md."""
    errors = {f"{run.who} {run.what}": run.error for run in cost.published_runs()}
    assert len(errors) == 8
    assert max(map(abs, errors.values())) < 0.25, errors
    text = DOCUMENT.read_text(encoding="utf-8")
    table = published_table()
    if os.environ.get("ZEROBERT_WRITE_TABLE"):
        head = text.partition("| who | what | published |")[0]
        DOCUMENT.write_text(head + table, encoding="utf-8")
    assert table in DOCUMENT.read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "tpu"), "--gpu: wanted one of v100, a100, h100, h200, b200, got 'tpu'"),
        (("--num_gpus", "0"), "--num_gpus: wanted 1 or more, got 0"),
        (("--num_gpus", "7"), "choose a train_batch_size that is a multiple of 7"),
        (("--fill", "1.5"), "--fill: wanted above 0, at most 1, got 1.5"),
        (("--model", "bert_huge"), "--model.size: wanted one of tiny"),
        (("--machine_gbit", "-1"), "--machine_gbit: wanted above 0"),
        (("--deepspeed_config", "x.json"), "x.json: no such file"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tables(*flags)
