import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune import loop
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
SETTINGS = loop.Settings(
    batch_size=4,
    learning_rate=1e-2,
    num_epochs=2,
    max_steps=None,
    schedule=ScheduleConfig(warmup_proportion=0.1),
    weight_decay=0.01,
    adam_epsilon=1e-6,
    max_grad_norm=1.0,
    logging_steps=1,
    save_steps=None,
    seed=3,
    precision="fp32",
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_split(num_examples: int = 10, *, regression: bool = False) -> loop.Encoded:
    generator = np.random.default_rng(5)
    input_ids = [
        generator.integers(5, 50, generator.integers(3, 20)).tolist() for _ in range(num_examples)
    ]
    labels = np.array([ids[0] % 2 for ids in input_ids])
    return loop.Encoded(
        input_ids=input_ids,
        segment_ids=[[0] * len(ids) for ids in input_ids],
        labels=labels.astype(np.float32 if regression else np.int64),
        max_seq_length=32,
    )


def make_model(num_labels: int = 2, **changes) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(dataclasses.replace(CONFIG, **changes), num_labels)


def run(settings: loop.Settings, num_examples: int = 10) -> tuple[dict, list[tuple[int, bool]]]:
    model = make_model()
    stops = list(loop.train(model, make_split(num_examples), settings, CPU))
    return model.state_dict(), stops


def test_every_example_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 99, 1003)
    batches = loop.epoch_batches(lengths, batch_size=8, seed=1, epoch=0)
    assert len(batches) == math.ceil(1003 / 8)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert sorted(map(len, batches)) == [3, *[8] * 125]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(100)

    def order(seed: int, epoch: int) -> list[int]:
        batches = loop.epoch_batches(lengths, batch_size=8, seed=seed, epoch=epoch)
        return np.concatenate(batches).tolist()

    first = order(1, 0)
    np.random.seed(9)  # a global seed must not matter
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_batches_are_of_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 4000)
    batches = loop.epoch_batches(lengths, batch_size=10, seed=0, epoch=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()  # unsorted batches of ten would be padded by 80 %


@pytest.mark.parametrize(("longest", "width"), [(3, 8), (8, 8), (9, 16), (20, 20)])
def test_width_is_a_multiple_of_eight_within_the_limit(longest: int, width: int) -> None:
    split = loop.Encoded(
        input_ids=[[7] * 3, [9] * longest],
        segment_ids=[[0, 0, 1], [0] * longest],
        labels=None,
        max_seq_length=20,
    )
    ids, mask, segments = loop.make_batch(split, np.array([1, 0]), CPU)
    assert ids.shape == mask.shape == segments.shape == (2, width)
    assert ids[1].tolist() == [7] * 3 + [0] * (width - 3)
    assert mask.sum(1).tolist() == [longest, 3]
    assert segments[1].tolist() == [0, 0, 1] + [0] * (width - 3)


def test_encode_cuts_pairs_and_marks_segments() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "b"], do_lower_case=True)
    examples = Examples(
        source="x", version="", first=["a a a a", "a"], second=["b", "b"], labels=None
    )
    split = loop.encode(examples, tokenizer, max_seq_length=6)
    assert split.input_ids == [[2, 5, 5, 3, 6, 3], [2, 5, 3, 6, 3]]
    assert split.segment_ids == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert split.lengths().tolist() == [6, 5]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    classes = loop.loss_sum(logits, torch.tensor([0, 1]))
    assert classes.item() == pytest.approx(math.log(1 + math.e**2) + math.log(2))
    scores = loop.loss_sum(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.5]))
    assert scores.item() == 4.25


def test_logits_come_in_the_splits_order_and_do_not_depend_on_the_batch() -> None:
    model, split = make_model(), make_split(150)  # more than one evaluation batch
    together = loop.predict(model, split, "fp32", CPU)
    for i in (0, 70, 149):
        ids = torch.tensor([split.input_ids[i]])
        alone = model(ids, torch.ones_like(ids), torch.zeros_like(ids))
        np.testing.assert_allclose(together[i], alone[0].detach().numpy(), atol=1e-6)


def test_evaluation_loss_is_the_mean_over_examples() -> None:
    split = make_split(7)
    logits = loop.predict(make_model(), split, "fp32", CPU)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(split.labels))
    assert loop.mean_loss(logits, split.labels) == pytest.approx(expected.item(), rel=1e-12)


def test_training_is_that_of_a_plain_loop(capsys) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=4)
    split, no_dropout = (
        make_split(),
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    ours, plain = make_model(**no_dropout), make_model(**no_dropout)
    assert list(loop.train(ours, split, settings, CPU)) == [(3, False), (4, False)]

    named = list(plain.named_parameters())
    undecayed = [p for name, p in named if "LayerNorm" in name or name.endswith("bias")]
    decayed = [p for name, p in named if "LayerNorm" not in name and not name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": undecayed, "weight_decay": 0.0}],
        eps=1e-6,
    )
    batches = [
        batch
        for epoch in (0, 1)
        for batch in loop.epoch_batches(split.lengths(), batch_size=4, seed=3, epoch=epoch)
    ]
    losses = []
    for step, batch in enumerate(batches[:4]):
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
    assert run(dataclasses.replace(SETTINGS, **changes))[1] == stops


def test_bf16_trains_close_to_fp32(capsys) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        run(dataclasses.replace(SETTINGS, precision=precision, max_steps=1))
        losses.append(float(re.search(r"loss: ([\d.]+)", capsys.readouterr().out)[1]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_regression_trains_towards_the_scores() -> None:
    model, split = make_model(num_labels=1), make_split(regression=True)
    before = loop.mean_loss(loop.predict(model, split, "fp32", CPU), split.labels)
    list(loop.train(model, split, dataclasses.replace(SETTINGS, num_epochs=15), CPU))
    after = loop.mean_loss(loop.predict(model, split, "fp32", CPU), split.labels)
    assert after < 0.5 * before


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = make_model()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 1: lower --learning"):
        list(loop.train(model, make_split(), SETTINGS, CPU))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("num_epochs", 0.0),
        ("max_steps", 0),
        ("save_steps", -5),
        ("logging_steps", 0),
        ("weight_decay", -0.1),
        ("layer_decay", 0.0),
        ("layer_decay", 1.5),
        ("learning_rate", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--.*{name}: wanted .* got {value}"):
        dataclasses.replace(SETTINGS, **{name: value})
