"""BERT as others compute it, for comparison: NVIDIA's operations restated, Hugging Face's model.

NVIDIA: DeepLearningExamples/PyTorch/LanguageModeling/BERT/modeling.py. What matters for speed is as
there: three projections, attention by batched products with an additive mask of -10000, dropout by
torch, the vocabulary's projection on masked rows alone, logits of the padded vocabulary.

Shapes: B batch, S sequence, H hidden, N heads, D head width, P predictions, R masked positions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerobert.config import BertConfig
from zerobert.model import BertForPreTraining

Batch = dict[str, Tensor]


class NvidiaLayer(nn.Module):
    """One encoder layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value, self.attention_out = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )
        self.intermediate, self.out = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.attention_norm, self.out_norm = (
            nn.LayerNorm(hidden, eps=config.layer_norm_eps) for _ in range(2)
        )
        self.weights_dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BSH: Tensor, bias_B11S: Tensor) -> Tensor:
        """The next layer's input."""
        q_BNSD, k_BNSD, v_BNSD = (
            project(x_BSH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores_BNSS = q_BNSD @ k_BNSD.mT / math.sqrt(q_BNSD.shape[-1]) + bias_B11S
        weights_BNSS = self.weights_dropout(F.softmax(scores_BNSS, dim=-1))
        mixed_BSH = (weights_BNSS @ v_BNSD).transpose(1, 2).flatten(2)
        x_BSH = self.attention_norm(self.dropout(self.attention_out(mixed_BSH)) + x_BSH)
        wide = F.gelu(self.intermediate(x_BSH))
        out_BSH: Tensor = self.out_norm(self.dropout(self.out(wide)) + x_BSH)
        return out_BSH


class NvidiaBert(nn.Module):
    """The pretraining model, with a model's weights of ours."""

    def __init__(self, ours: BertForPreTraining) -> None:
        super().__init__()
        config, state = ours.config, ours.state_dict()
        self.words = nn.Parameter(ours.bert.embeddings.word_embeddings.weight.detach().clone())
        self.positions = nn.Parameter(state["bert.embeddings.position_embeddings.weight"].clone())
        self.segments = nn.Parameter(state["bert.embeddings.token_type_embeddings.weight"].clone())
        self.norm, self.transform_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(NvidiaLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler, self.transform = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2)
        )
        self.nsp = nn.Linear(config.hidden_size, 2)
        padded = len(self.words) - config.vocab_size
        self.bias = nn.Parameter(F.pad(state["cls.predictions.bias"], (0, padded), value=-1e4))
        for name, module in self._pairs().items():
            module.load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})

    def names(self) -> dict[str, str]:
        """What its parameters are called in our model."""
        ours: dict[Any, str] = {
            self.words: "bert.embeddings.word_embeddings.weight",
            self.positions: "bert.embeddings.position_embeddings.weight",
            self.segments: "bert.embeddings.token_type_embeddings.weight",
            self.bias: "cls.predictions.bias",
        }
        for name, module in self._pairs().items():
            ours |= {getattr(module, kind): f"{name}.{kind}" for kind in ("weight", "bias")}
        return {name: ours[parameter] for name, parameter in self.named_parameters()}

    def _pairs(self) -> dict[str, nn.Module]:
        """Our name of each module that has a weight and a bias."""
        pairs: dict[str, nn.Module] = {
            "bert.embeddings.LayerNorm": self.norm,
            "bert.pooler.dense": self.pooler,
            "cls.predictions.transform.dense": self.transform,
            "cls.predictions.transform.LayerNorm": self.transform_norm,
            "cls.seq_relationship": self.nsp,
        }
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, NvidiaLayer)
            prefix = f"bert.encoder.layer.{number}"
            for part in ("query", "key", "value"):
                pairs[f"{prefix}.attention.self.{part}"] = getattr(layer, part)
            pairs |= {
                f"{prefix}.attention.output.dense": layer.attention_out,
                f"{prefix}.attention.output.LayerNorm": layer.attention_norm,
                f"{prefix}.intermediate.dense": layer.intermediate,
                f"{prefix}.output.dense": layer.out,
                f"{prefix}.output.LayerNorm": layer.out_norm,
            }
        return pairs

    def forward(self, batch: Batch) -> Tensor:
        """The loss, both parts as means."""
        ids_BS = batch["input_ids"]
        bias_B11S = (1.0 - batch["input_mask"][:, None, None].to(self.words.dtype)) * -10000.0
        positions_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        x_BSH = F.embedding(ids_BS, self.words) + F.embedding(positions_BS, self.positions)
        x_BSH = x_BSH + F.embedding(batch["segment_ids"], self.segments)
        x_BSH = self.dropout(self.norm(x_BSH))
        for layer in self.layers:
            x_BSH = layer(x_BSH, bias_B11S)
        labels_BS = full_labels(batch, ignored=-1)
        rows_R = (labels_BS.flatten() != -1).nonzero().squeeze(1)
        x_RH = x_BSH.flatten(0, 1).index_select(0, rows_R)
        x_RH = self.transform_norm(F.gelu(self.transform(x_RH)))
        logits_RV = F.linear(x_RH, self.words, self.bias)
        mlm = F.cross_entropy(logits_RV.float(), labels_BS.flatten()[rows_R])
        nsp_logits_B2 = self.nsp(torch.tanh(self.pooler(x_BSH[:, 0])))
        return mlm + F.cross_entropy(nsp_logits_B2.float(), batch["next_sentence_labels"])


def full_labels(batch: Batch, *, ignored: int) -> Tensor:
    """The answers at their places in the rows, BS; `ignored` elsewhere."""
    positions_BP, ids_BP = batch["masked_lm_positions"], batch["masked_lm_ids"]
    labels_BS = torch.full_like(batch["input_ids"], ignored)
    labels_BS.scatter_(1, positions_BP, ids_BP.where(positions_BP > 0, ignored))
    labels_BS[:, 0] = ignored
    return labels_BS


class HuggingFaceBert(nn.Module):
    """`transformers.BertForPreTraining`, with a model's weights of ours."""

    def __init__(self, ours: BertForPreTraining, attention: str) -> None:
        super().__init__()
        import dataclasses

        import transformers

        settings = dataclasses.asdict(ours.config)
        config = transformers.BertConfig(**settings, attn_implementation=attention)
        self.model = transformers.BertForPreTraining(config)
        self.model.load_state_dict(ours.state_dict(), strict=False)
        self.model.tie_weights()

    def forward(self, batch: Batch) -> Tensor:
        """The loss, both parts as means."""
        loss: Tensor = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["input_mask"],
            token_type_ids=batch["segment_ids"],
            labels=full_labels(batch, ignored=-100),
            next_sentence_label=batch["next_sentence_labels"],
        ).loss
        return loss
