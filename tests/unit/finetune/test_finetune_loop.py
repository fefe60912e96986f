import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune import batches, loop
from finetune.data import Examples
from zerobert.config import BertConfig
from zerobert.errors import ConfigError, TrainingDivergedError
from zerobert.model import BertForSequenceClassification
from zerobert.schedule import ScheduleConfig
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

CPU = torch.device("cpu")
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def deepspeed(**changes) -> dict:
    params = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-6}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {**params, **changes.pop("params", {})}},
        **changes,
    }


SETTINGS = loop.Settings(
    deepspeed=deepspeed(),
    num_epochs=2,
    max_steps=None,
    schedule=ScheduleConfig(warmup_proportion=0.1),
    logging_steps=1,
    save_steps=None,
    seed=3,
)
pytestmark = pytest.mark.usefixtures("group")


class NobodyStops:
    """What the loop asks whether a signal came."""

    exit_code = 0


def make_split(num_examples: int = 10, *, regression: bool = False) -> batches.Encoded:
    generator = np.random.default_rng(5)
    input_ids = [
        generator.integers(5, 50, generator.integers(3, 20)).tolist() for _ in range(num_examples)
    ]
    labels = np.array([ids[0] % 2 for ids in input_ids])
    return batches.Encoded(
        input_ids=input_ids,
        segment_ids=[[0] * len(ids) for ids in input_ids],
        labels=labels.astype(np.float32 if regression else np.int64),
        max_seq_length=32,
    )


def make_model(num_labels: int = 2, **changes) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(dataclasses.replace(CONFIG, **changes), num_labels)


def train(model, split, settings, stop=None, first_step=0) -> list[loop.Review]:
    engine = loop.start_engine(model, settings)
    return list(loop.train(engine, split, settings, stop or NobodyStops(), first_step=first_step))


def predict(model, split) -> np.ndarray:
    return batches.predict(batches.plain_forward(model, "fp32", CPU), split, CPU)


def run(settings: loop.Settings, num_examples: int = 10) -> tuple[dict, list[loop.Review]]:
    model = make_model()
    reviews = train(model, make_split(num_examples), settings)
    return model.state_dict(), reviews


def logged_losses(capsys) -> list[float]:
    return [float(x) for x in re.findall(r"loss: ([\d.]+)", capsys.readouterr().out)]


def test_every_example_once_an_epoch() -> None:
    found = batches.epoch_batches(1003, batch_size=8, seed=1, epoch=0)
    assert len(found) == math.ceil(1003 / 8)
    assert sorted(np.concatenate(found).tolist()) == list(range(1003))
    assert list(map(len, found)) == [*[8] * 125, 3]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        found = batches.epoch_batches(100, batch_size=8, seed=seed, epoch=epoch)
        return np.concatenate(found).tolist()

    first = order(1, 0)
    np.random.seed(9)  # a global seed must not matter
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("longest", "width"), [(3, 8), (8, 8), (9, 16), (20, 20)])
def test_width_is_a_multiple_of_eight_within_the_limit(longest: int, width: int) -> None:
    split = batches.Encoded(
        input_ids=[[7] * 3, [9] * longest],
        segment_ids=[[0, 0, 1], [0] * longest],
        labels=None,
        max_seq_length=20,
    )
    ids, mask, segments, places, _ = split.inputs(np.array([1, 0]), CPU).values()
    assert len(places) >= longest + 3
    assert ids.shape == mask.shape == segments.shape == (2, width)
    assert ids[1].tolist() == [7] * 3 + [0] * (width - 3)
    assert mask.sum(1).tolist() == [longest, 3]
    assert segments[1].tolist() == [0, 0, 1] + [0] * (width - 3)


def test_encode_cuts_pairs_and_marks_segments() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "b"], do_lower_case=True)
    examples = Examples(
        source="x", version="", first=["a a a a", "a"], second=["b", "b"], labels=None
    )
    split = batches.encode(examples, tokenizer, max_seq_length=6)
    assert split.input_ids == [[2, 5, 5, 3, 6, 3], [2, 5, 3, 6, 3]]
    assert split.segment_ids == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert split.lengths().tolist() == [6, 5]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    classes = batches.loss_sum(logits, torch.tensor([0, 1]))
    assert classes.item() == pytest.approx(math.log(1 + math.e**2) + math.log(2))
    scores = batches.loss_sum(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.5]))
    assert scores.item() == 4.25


def test_logits_come_in_the_splits_order_and_do_not_depend_on_the_batch() -> None:
    model, split = make_model(), make_split(150)  # more than one evaluation batch
    together = predict(model, split)
    for i in (0, 70, 149):
        ids = torch.tensor([split.input_ids[i]])
        alone = model(ids, torch.ones_like(ids), torch.zeros_like(ids))
        np.testing.assert_allclose(together[i], alone[0].detach().numpy(), atol=1e-6)


def test_evaluation_loss_is_the_mean_over_examples() -> None:
    split = make_split(7)
    logits = predict(make_model(), split)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(split.labels))
    assert batches.mean_loss(logits, split.labels) == pytest.approx(expected.item(), rel=1e-12)


def test_training_is_that_of_a_plain_loop(capsys) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=4)
    split = make_split()
    ours, plain = make_model(**NO_DROPOUT), make_model(**NO_DROPOUT)
    assert [review.step for review in train(ours, split, settings)] == [3, 4]

    named = list(plain.named_parameters())
    undecayed = [p for name, p in named if "LayerNorm" in name or name.endswith("bias")]
    decayed = [p for name, p in named if "LayerNorm" not in name and not name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": undecayed, "weight_decay": 0.0}],
        eps=1e-6,
    )
    order = [
        batch
        for epoch in (0, 1)
        for batch in batches.epoch_batches(len(split), batch_size=4, seed=3, epoch=epoch)
    ]
    losses = []
    for step, batch in enumerate(order[:4]):
        loss = torch.stack(
            [
                F.cross_entropy(
                    plain(ids, torch.ones_like(ids), torch.zeros_like(ids))[0],
                    torch.tensor(split.labels[i]),
                )
                for i in batch
                if (ids := torch.tensor([split.input_ids[i]])) is not None
            ]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)  # a tenth of four steps is no warm-up
        optimizer.step()
        losses.append(loss.item())

    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=name)
    logged = [float(x) for x in re.findall(r"loss: ([\d.]+)", capsys.readouterr().out)]
    assert logged == pytest.approx(losses, abs=2e-5)


def test_log_lines_have_paddlenlps_form(capsys) -> None:
    run(dataclasses.replace(SETTINGS, logging_steps=2))
    lines = capsys.readouterr().out.splitlines()
    form = (
        r"global step (\d+), epoch: (\d+), batch: (\d+), loss: \d+\.\d{6}, speed: \d+\.\d\d step/s"
    )
    found = [re.fullmatch(form, line).groups() for line in lines]
    assert found == [("2", "0", "2"), ("4", "1", "1"), ("6", "1", "3")]


def test_layer_decay_lowers_the_rate_of_each_layer_below_the_head() -> None:
    seen: list[dict[str, float]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(note)
    try:
        run(dataclasses.replace(SETTINGS, max_steps=2, layer_decay=0.5))
    finally:
        handle.remove()
    # One layer: embeddings, layer, pooler and head; the second step is half way down.
    for rates, rate in zip(seen, [1e-2, 0.5e-2], strict=True):
        for kind in ("decay", "no_decay"):
            got = [rates[f"{kind}_{depth}"] for depth in range(3)]
            assert got == pytest.approx([rate / 4, rate / 2, rate])


def test_same_seed_same_weights() -> None:
    (first, _), (again, _) = run(SETTINGS), run(SETTINGS)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_micro_batches_add_up_to_the_batch() -> None:
    """An epoch's last batch of 2 is cut into 4 micro-batches, two of which have nothing."""
    weights = []
    for micro, accumulation in ((4, 1), (1, 4)):
        model = make_model(**NO_DROPOUT)
        keys = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
        }
        train(model, make_split(), dataclasses.replace(SETTINGS, deepspeed=deepspeed(**keys)))
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, at DeepSpeed's collectives
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loop_trains_alike_at_each_stage(stage: int, capsys) -> None:
    losses = []
    for chosen in (0, stage):
        settings = dataclasses.replace(
            SETTINGS, deepspeed=deepspeed(zero_optimization={"stage": chosen})
        )
        train(make_model(**NO_DROPOUT), make_split(), settings)
        losses.append(logged_losses(capsys))
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_micro_step_waits_for_the_device(precision: str, stage: int, monkeypatch) -> None:
    zero = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
    low = {} if precision == "fp32" else {precision: {"enabled": True}}
    settings = dataclasses.replace(SETTINGS, deepspeed=deepspeed(**zero, **low))
    engine, split, waits = loop.start_engine(make_model(), settings), make_split(16), []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(None))
    for step in range(1, 4):  # DeepSpeed's timers begin after two steps
        loop.train_step(engine, split, np.arange(16), 1e-3, 0, step)
    assert not waits
    engine.close()


def test_lamb_trains_too(capsys) -> None:
    lamb = deepspeed()
    lamb["optimizer"]["type"] = "Lamb"
    losses = []
    for keys in (lamb, deepspeed()):
        train(make_model(), make_split(), dataclasses.replace(SETTINGS, deepspeed=keys))
        losses.append(logged_losses(capsys))
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


def test_a_signal_ends_the_training_after_its_step() -> None:
    stop = NobodyStops()
    engine = loop.start_engine(make_model(), SETTINGS)
    reviews = []
    for review in loop.train(engine, make_split(40), SETTINGS, stop):
        reviews.append((review.step, review.exit_code, review.is_due))
        stop.exit_code = 143
    assert reviews == [(10, 0, True), (11, 143, False)]


def test_a_later_start_goes_on_with_the_same_batches(capsys) -> None:
    """From the same weights, at a rate of nearly nothing, a step's loss tells its batch."""
    still = dataclasses.replace(SETTINGS, deepspeed=deepspeed(params={"lr": 1e-12}))
    train(make_model(**NO_DROPOUT), make_split(), still)
    whole = logged_losses(capsys)
    train(make_model(**NO_DROPOUT), make_split(), still, first_step=2)
    assert logged_losses(capsys) == whole[2:]


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, [(3, False), (6, False)]),
        ({"save_steps": 2}, [(2, True), (4, True), (6, True)]),
        ({"save_steps": 4}, [(4, True), (6, False)]),
        ({"max_steps": 1}, [(1, False)]),
        ({"num_epochs": 0.5}, [(2, False)]),
    ],
)
def test_stops_for_reviews(changes: dict, stops: list) -> None:
    reviews = run(dataclasses.replace(SETTINGS, **changes))[1]
    assert [(review.step, review.saves) for review in reviews] == stops


def test_when_models_are_compared_is_part_of_the_run_where_the_best_is_kept() -> None:
    often = dataclasses.replace(SETTINGS, save_steps=2)
    assert often.deciding() == SETTINGS.deciding()
    for choosing in ({"keeps_best": True}, {"patience": 3}):
        one, other = (dataclasses.replace(each, **choosing) for each in (SETTINGS, often))
        assert one.deciding() != other.deciding()


def test_bf16_trains_close_to_fp32(capsys) -> None:
    losses = []
    for sections in ({}, BF16):
        run(dataclasses.replace(SETTINGS, deepspeed=deepspeed(**sections), max_steps=1))
        losses += logged_losses(capsys)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_regression_trains_towards_the_scores() -> None:
    model, split = make_model(num_labels=1), make_split(regression=True)
    before = batches.mean_loss(predict(model, split), split.labels)
    train(model, split, dataclasses.replace(SETTINGS, num_epochs=15))
    after = batches.mean_loss(predict(model, split), split.labels)
    assert after < 0.5 * before


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = make_model()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 1: lower --learning"):
        train(model, make_split(), SETTINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0.0),
        ("num_epochs", math.inf),
        ("seed", 2**63),
        ("max_steps", 0),
        ("save_steps", -5),
        ("logging_steps", 0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.5),
        ("patience", 0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    flag = {"num_epochs": "num_train_epochs"}.get(name, name)
    with pytest.raises(ConfigError, match=f"--.*{flag}: wanted .* got {value}"):
        dataclasses.replace(SETTINGS, **{name: value})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"--learning_rate: wanted above 0, got {rate}"):
        dataclasses.replace(SETTINGS, deepspeed=deepspeed(params={"lr": rate}))
