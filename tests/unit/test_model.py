"""Our BERT against Hugging Face's, and what must hold of any BERT."""

import dataclasses
import math
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

from zerobert.config import BertConfig
from zerobert.kernels import Kernels, cross_entropy
from zerobert.kernels.attention import Layout
from zerobert.model import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    num_parameters,
    span_loss,
    training_flops_per_sequence,
)
from zerobert.packing import NUM_SHAPES, pack

KINDS = ("weight", "bias")

CONFIG = BertConfig(
    vocab_size=101,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=32,
)


def _twins(config: BertConfig = CONFIG) -> tuple[BertForPreTraining, torch.nn.Module]:
    torch.manual_seed(0)
    ours = BertForPreTraining(config)
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(**dataclasses.asdict(config), attn_implementation="eager")
    )
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms must matter too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    return ours, theirs


def _batch(num_rows: int = 5, seq_length: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    lengths = draw(seq_length, num_rows).clamp(min=8)
    mask = (torch.arange(seq_length) < lengths[:, None]).long()
    positions = torch.tensor([[1, 3, 5, 0], [2, 4, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4], [6, 7, 0, 0]])
    return {
        "input_ids": draw(CONFIG.vocab_size, num_rows, seq_length) * mask,
        "input_mask": mask,
        "segment_ids": (torch.arange(seq_length) > 9).long() * mask,
        "masked_lm_positions": positions,
        "masked_lm_ids": draw(CONFIG.vocab_size, num_rows, 4) * (positions > 0),
        "next_sentence_labels": torch.tensor([0, 1, 1, 0, 1]),
    }


def _labels(batch: dict[str, Tensor]) -> Tensor:
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (positions, ids) in enumerate(
        zip(batch["masked_lm_positions"], batch["masked_lm_ids"], strict=True)
    ):
        labels[row, positions[positions > 0]] = ids[positions > 0]
    return labels


def test_logits_losses_and_gradients_equal_hugging_face() -> None:
    ours, theirs = _twins()
    ours.eval(), theirs.eval()
    batch = _batch()
    wanted = theirs(
        input_ids=batch["input_ids"],
        attention_mask=batch["input_mask"],
        token_type_ids=batch["segment_ids"],
        labels=_labels(batch),
        next_sentence_label=batch["next_sentence_labels"],
    )
    mlm_BSV, nsp_B2 = ours.logits(batch["input_ids"], batch["input_mask"], batch["segment_ids"])
    torch.testing.assert_close(mlm_BSV, wanted.prediction_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(nsp_B2, wanted.seq_relationship_logits, atol=1e-5, rtol=0)

    got = ours(**batch)
    num_masked = int((batch["masked_lm_positions"] > 0).sum())
    loss = got.mlm_loss_sum / num_masked + got.nsp_loss_sum / 5
    torch.testing.assert_close(loss, wanted.loss, atol=1e-5, rtol=0)

    loss.backward()
    wanted.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted_grad = gradients[name]
        got_grad, padding = parameter.grad[: len(wanted_grad)], parameter.grad[len(wanted_grad) :]
        torch.testing.assert_close(got_grad, wanted_grad, atol=1e-5, rtol=0, msg=name)
        assert not padding.any()


def test_fifty_steps_of_training_follow_hugging_face() -> None:
    ours, theirs = _twins(
        dataclasses.replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    batch = _batch()
    num_masked = int((batch["masked_lm_positions"] > 0).sum())
    labels = _labels(batch)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    for _ in range(50):
        sums = ours(**batch)
        our_loss = sums.mlm_loss_sum / num_masked + sums.nsp_loss_sum / 5
        their_loss = theirs(
            input_ids=batch["input_ids"],
            attention_mask=batch["input_mask"],
            token_type_ids=batch["segment_ids"],
            labels=labels,
            next_sentence_label=batch["next_sentence_labels"],
        ).loss
        for loss, optimizer in zip((our_loss, their_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(our_loss.item() - their_loss.item()) < 1e-4
    assert our_loss.item() < 1.0  # it did learn


def test_classifier_equals_hugging_face() -> None:
    torch.manual_seed(0)
    ours = BertForSequenceClassification(CONFIG, num_labels=3).eval()
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(**dataclasses.asdict(CONFIG), num_labels=3)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    batch = _batch()
    got = ours(batch["input_ids"], batch["input_mask"], batch["segment_ids"])
    wanted = theirs(
        input_ids=batch["input_ids"],
        attention_mask=batch["input_mask"],
        token_type_ids=batch["segment_ids"],
    ).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("attention", "hidden"), [(0.3, 0.0), (0.0, 0.3)], ids=["of attention", "of values"]
)
def test_dropout_moves_logits_as_far_as_hugging_face_s(attention: float, hidden: float) -> None:
    """Each kind of dropout where BERT has it, and nowhere else: the logits' means and variances
    over many masks are the same.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, attention_probs_dropout_prob=attention, hidden_dropout_prob=hidden
    )
    ours = BertForSequenceClassification(config, num_labels=3)
    with torch.no_grad():
        for parameter in ours.parameters():  # at 0.02 attention is too even to matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(**dataclasses.asdict(config), num_labels=3)
    )
    theirs.load_state_dict(ours.state_dict())
    inputs = [_batch()[name].repeat(200, 1) for name in ("input_ids", "input_mask", "segment_ids")]
    names = ("input_ids", "attention_mask", "token_type_ids")

    def drawn(logits: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Means and variances, [5, 3], of 1,600 draws each."""
        with torch.no_grad():
            draws = torch.cat([logits().view(200, 5, 3) for _ in range(8)])
        return draws.mean(0), draws.var(0)

    mean, variance = drawn(lambda: ours.train()(*inputs))
    wanted, spread = drawn(lambda: theirs.train()(**dict(zip(names, inputs, strict=True))).logits)
    assert ((mean - wanted).abs() < 4.5 * ((variance + spread) / 1600).sqrt()).all()
    assert (variance / spread).mean().item() == pytest.approx(1, abs=0.08)


def _question_twins(kernels: Kernels) -> tuple[BertForQuestionAnswering, torch.nn.Module]:
    torch.manual_seed(0)
    ours = BertForQuestionAnswering(CONFIG, kernels).eval()
    theirs = transformers.BertForQuestionAnswering(
        transformers.BertConfig(**dataclasses.asdict(CONFIG), attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kernels", [Kernels(packing=False), Kernels()], ids=["padded", "packed"])
def test_question_answering_equals_hugging_face(kernels: Kernels) -> None:
    """Theirs sees each row alone and without padding, which has a part in their softmax."""
    ours, theirs = _question_twins(kernels)
    batch = _batch()
    ids, mask, segments = batch["input_ids"], batch["input_mask"], batch["segment_ids"]
    lengths = mask.sum(1)
    assert (lengths < ids.shape[1]).any()
    starts, ends = torch.tensor([0, 3, 7, 2, 1]), torch.tensor([0, 6, 7, 5, 1])
    got_BS = ours(ids, mask, segments)
    least = torch.finfo(torch.float32).min
    theirs_sum = torch.zeros(())
    for row, length in enumerate(lengths):
        alone = (slice(row, row + 1), slice(0, length))
        wanted = theirs(
            input_ids=ids[alone],
            token_type_ids=segments[alone],
            start_positions=starts[row : row + 1],
            end_positions=ends[row : row + 1],
        )
        for got, logits in zip(got_BS, (wanted.start_logits, wanted.end_logits), strict=True):
            torch.testing.assert_close(got[alone], logits, atol=1e-5, rtol=0)
            assert (got[row, length:] == least).all()
        theirs_sum = theirs_sum + wanted.loss
    loss = span_loss(*got_BS, starts, ends)
    torch.testing.assert_close(loss, theirs_sum, atol=1e-5, rtol=0)

    loss.backward()
    theirs_sum.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        got_grad = parameter.grad[: len(gradients[name])]
        torch.testing.assert_close(got_grad, gradients[name], atol=1e-5, rtol=0, msg=name)


def test_question_answering_of_full_rows_is_hugging_face_s_batch() -> None:
    ours, theirs = _question_twins(Kernels())
    ids = _batch()["input_ids"].clamp(min=1)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    # A row in the middle has an answer that ends beyond it.
    starts, ends = torch.tensor([0, 3, 20, 23, 1]), torch.tensor([0, 6, 24, 23, 1])
    wanted = theirs(input_ids=ids, start_positions=starts, end_positions=ends)
    start_BS, end_BS = ours(ids, ones, zeros)
    torch.testing.assert_close(start_BS, wanted.start_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(end_BS, wanted.end_logits, atol=1e-5, rtol=0)
    starts_loss = span_loss(start_BS, start_BS, starts, starts)
    ends_loss = span_loss(end_BS, end_BS, ends, ends)
    torch.testing.assert_close(
        (starts_loss / 5 + ends_loss / 4) / 2, wanted.loss, atol=1e-5, rtol=0
    )
    both = span_loss(start_BS, end_BS, starts, ends)
    torch.testing.assert_close(both, (starts_loss + ends_loss) / 2, atol=1e-5, rtol=0)


def test_span_loss_by_hand() -> None:
    start_BS = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), 0.0, 0.0]])
    end_BS = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.log(5), 0.0]])
    # Row 0: ln 4 and, beyond the row, nothing. Row 1: ln(6 / 3) and ln(8 / 5).
    loss = span_loss(start_BS, end_BS, torch.tensor([-1, 1]), torch.tensor([9, 2]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2) + math.log(1.6)) / 2)


def test_evaluation_counts_correct_predictions() -> None:
    model = BertForPreTraining(CONFIG).eval()
    batch = _batch()
    mlm_BSV, nsp_B2 = model.logits(batch["input_ids"], batch["input_mask"], batch["segment_ids"])
    labels = _labels(batch)
    got = model(**batch)
    assert got.mlm_correct == (mlm_BSV.argmax(-1) == labels).sum()
    assert got.nsp_correct == (nsp_B2.argmax(-1) == batch["next_sentence_labels"]).sum()
    assert model.train()(**batch).mlm_correct is None


def test_evaluation_in_parts_counts_the_same(monkeypatch) -> None:
    model, batch = BertForPreTraining(CONFIG).eval(), _batch()
    whole = model(**batch)
    monkeypatch.setattr(cross_entropy, "_CHUNK_VALUES", 2 * CONFIG.vocab_size)
    parts = model(**batch)
    assert parts.mlm_correct == whole.mlm_correct
    assert parts.mlm_loss_sum.item() == pytest.approx(whole.mlm_loss_sum.item(), rel=1e-6)


def test_what_padding_holds_does_not_matter() -> None:
    model = BertForPreTraining(CONFIG).eval()
    batch = _batch()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["input_mask"].bool(), 77)}
    torch.testing.assert_close(model(**batch), model(**other))


def _losses_and_gradients(
    kernels: Kernels, batch: dict[str, Tensor], **changes: object
) -> list[Tensor]:
    """Of a model without dropout, in training mode."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes
    )
    model = BertForPreTraining(config, kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.bert.embeddings.word_embeddings.weight[CONFIG.vocab_size :] = 0
    losses = model(**batch)
    (losses.mlm_loss_sum / 12 + losses.nsp_loss_sum / 5).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [losses.mlm_loss_sum, losses.nsp_loss_sum, *gradients]


@pytest.mark.parametrize("position", ["post", "pre"])
@pytest.mark.parametrize(
    "kernels",
    [
        Kernels(attention="plain"),
        Kernels(attention="sdpa"),
        Kernels(projections="fused"),
        Kernels(cross_entropy="chunked"),
        Kernels(activation_checkpointing=True),
        Kernels(packing=False),
        Kernels(),
    ],
    ids=[
        "plain attention",
        "sdpa",
        "fused projections",
        "chunked",
        "checkpointed",
        "padded",
        "auto",
    ],
)
def test_no_kernel_changes_losses_or_gradients(kernels: Kernels, position: str) -> None:
    batch = _batch()
    plain = Kernels(packing=False, attention="plain", layer_norm="torch")
    wanted = _losses_and_gradients(plain, batch, layer_norm_position=position)
    got = _losses_and_gradients(kernels, batch, layer_norm_position=position)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_may_bring_its_packing_along() -> None:
    batch = _batch()
    packing = pack(batch["input_mask"])
    wanted = _losses_and_gradients(Kernels(packing=False), batch)
    brought = {**batch, "places": packing.places_T, "cu_seqlens": packing.cu_seqlens}
    got = _losses_and_gradients(Kernels(), brought)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_checkpointed_layers_drop_out_the_same_values_again() -> None:
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = BertForPreTraining(CONFIG, Kernels(activation_checkpointing=is_checkpointed))
        torch.manual_seed(1)
        losses = model(**_batch())
        losses.mlm_loss_sum.backward()
        words = model.bert.embeddings.word_embeddings.weight
        results.append((losses.mlm_loss_sum, words.grad))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_pre_norm_is_the_published_formula() -> None:
    """Xiong et al. 2020 (arXiv:2002.04745), figure 1b, by torch's own layer."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, layer_norm_position="pre")
    model = BertForPreTraining(config, Kernels(packing=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    layer = model.bert.encoder.layer[0]
    theirs = torch.nn.TransformerEncoderLayer(
        *(config.hidden_size, config.num_attention_heads, config.intermediate_size),
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=True,
    ).eval()
    mine = layer.state_dict()
    attention = [f"attention.self.{part}" for part in ("query", "key", "value")]
    pairs = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    state = {f"{to}.{kind}": mine[f"{of}.{kind}"] for to, of in pairs.items() for kind in KINDS}
    for kind in KINDS:
        state[f"self_attn.in_proj_{kind}"] = torch.cat(
            [mine[f"{part}.{kind}"] for part in attention]
        )
    theirs.load_state_dict(state)
    x = torch.randn(5, 24, config.hidden_size)
    keep = _batch()["input_mask"].bool()
    with torch.enable_grad():  # torch's inference kernel computes another formula's shortcut
        wanted = theirs(x.requires_grad_(), src_key_padding_mask=~keep)
    got = layer(x, Layout(keep, None), model.bert.ops())
    torch.testing.assert_close(got[keep], wanted[keep], atol=1e-5, rtol=1e-5)
    assert "bert.encoder.LayerNorm.weight" in model.state_dict()


def test_without_nsp_there_is_no_head_for_it() -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG, nsp=False)
    assert not [name for name in model.state_dict() if "pooler" in name or "seq_rel" in name]
    losses = model(**_batch())
    assert losses.nsp_loss_sum.item() == 0
    losses.mlm_loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    counted = model.eval()(**_batch())
    assert counted.nsp_rows.item() == 0
    assert counted.mlm_correct is not None


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of which there are many
def test_compiled_layers_compute_the_same_without_a_graph_break() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ here")
    batch = _batch()
    wanted = _losses_and_gradients(Kernels(), batch)
    before = counters["stats"]["unique_graphs"]
    got = _losses_and_gradients(Kernels(compile=True), batch)  # fullgraph: a break is an error
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    # All layers share what is compiled for a shape, and there is room for every shape.
    assert counters["stats"]["unique_graphs"] - before == 1
    assert torch._dynamo.config.recompile_limit >= NUM_SHAPES


def test_base_has_the_published_size() -> None:
    base = BertConfig()
    with torch.device("meta"):
        model = BertForPreTraining(base)
    # 109.48 M of BERT-base, the masked-LM transform and the next-sentence head.
    assert num_parameters(model) == 110_106_428
    assert training_flops_per_sequence(base, 128, 20) == pytest.approx(69.9e9, rel=2e-3)


def test_initial_weights_have_bert_s_spread() -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.from_size({"size": "mini", "vocab_size": 1000}, "test"))
    weight = model.bert.encoder.layer[0].intermediate["dense"].weight
    assert abs(weight.std().item() - 0.02) < 4 * 0.02 / (2 * weight.numel()) ** 0.5
    assert not model.bert.embeddings.word_embeddings.weight[0].any()
    assert not model.cls["seq_relationship"].bias.any()
