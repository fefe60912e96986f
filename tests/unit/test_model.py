"""Our BERT against Hugging Face's, and what must hold of any BERT."""

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor

from zerobert.config import BertConfig
from zerobert.kernels import Kernels, attention
from zerobert.model import (
    BertForPreTraining,
    BertForSequenceClassification,
    num_parameters,
    training_flops_per_sequence,
)

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
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0, msg=name)


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


def test_evaluation_counts_correct_predictions() -> None:
    model = BertForPreTraining(CONFIG).eval()
    batch = _batch()
    mlm_BSV, nsp_B2 = model.logits(batch["input_ids"], batch["input_mask"], batch["segment_ids"])
    labels = _labels(batch)
    got = model(**batch)
    assert got.mlm_correct == (mlm_BSV.argmax(-1) == labels).sum()
    assert got.nsp_correct == (nsp_B2.argmax(-1) == batch["next_sentence_labels"]).sum()
    assert model.train()(**batch).mlm_correct is None


def test_what_padding_holds_does_not_matter() -> None:
    model = BertForPreTraining(CONFIG).eval()
    batch = _batch()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["input_mask"].bool(), 77)}
    torch.testing.assert_close(model(**batch), model(**other))


@pytest.mark.parametrize("dropout_p", [0.0])
def test_attention_twins_agree_in_value_and_gradient(dropout_p: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
    keep = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    keep[1, ..., 9:] = False
    results = {}
    for name, attend in attention.IMPLEMENTATIONS.items():
        out = attend(*inputs, keep, dropout_p)
        results[name] = (out, torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(results["plain"], results["sdpa"], atol=1e-5, rtol=1e-5)


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(2, 4, 4, 64, 8)  # equal scores: every weight is 1/64
    v = torch.ones(4, 4, 64, 8)
    keep = torch.ones(4, 1, 1, 64, dtype=torch.bool)
    for attend in attention.IMPLEMENTATIONS.values():
        out = attend(q, k, v, keep, 0.1)
        # 1024 means over 64 Bernoulli draws: sigma = sqrt(.1/.9/64)/sqrt(1024)
        assert abs(out[..., 0].mean().item() - 1) < 4 * (0.1 / 0.9 / 64 / 1024) ** 0.5
        assert out.std() > 0


def test_kernels_are_chosen_by_name() -> None:
    batch = _batch()
    torch.manual_seed(0)
    plain = BertForPreTraining(CONFIG, Kernels(attention="plain")).eval()
    torch.manual_seed(0)
    sdpa = BertForPreTraining(CONFIG, Kernels(attention="sdpa")).eval()
    torch.testing.assert_close(plain(**batch), sdpa(**batch))


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
