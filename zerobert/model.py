"""The whole of BERT: embeddings, encoder, pooler, pretraining and classification heads, losses.

Parameters carry Hugging Face's names, so a state dict needs no translation, with one difference:
the decoder that is tied to the word embeddings is not a parameter of its own here.

Shapes: B batch, S sequence, H hidden, N heads, D head width, I intermediate, P predictions,
V vocabulary, C classes. Source of the architecture: Devlin et al. 2018 (arXiv:1810.04805).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerobert.config import BertConfig
from zerobert.kernels import Kernels, attention

IGNORED_LABEL = -1


class Embeddings(nn.Module):
    """Word + position + segment embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, hidden, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids_BS: Tensor, segment_ids_BS: Tensor) -> Tensor:
        positions_SH = self.position_embeddings.weight[: input_ids_BS.shape[1]]
        x_BSH = self.word_embeddings(input_ids_BS) + self.token_type_embeddings(segment_ids_BS)
        out_BSH: Tensor = self.dropout(self.LayerNorm(x_BSH + positions_SH))
        return out_BSH


class SelfAttention(nn.Module):
    """Multi-head attention up to the mixed values, before the output projection."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.kernel = kernels.attention
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, x_BSH: Tensor, keep_B11S: Tensor) -> Tensor:
        q_BNSD, k_BNSD, v_BNSD = (
            project(x_BSH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        name, _ = attention.choose(self.kernel, x_BSH.device, q_BNSD.dtype)
        attend = attention.IMPLEMENTATIONS[name]
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(q_BNSD, k_BNSD, v_BNSD, keep_B11S, dropout_p).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """Project, drop out, add to the residual, normalise: the end of both halves of a layer."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual_BSH: Tensor) -> Tensor:
        out_BSH: Tensor = self.LayerNorm(residual_BSH + self.dropout(self.dense(x)))
        return out_BSH


class Layer(nn.Module):
    """One post-LN encoder layer."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        # The nesting is Hugging Face's: `attention.self.query`, `attention.output.dense`, ...
        self.attention = nn.ModuleDict(
            {
                "self": SelfAttention(config, kernels),
                "output": Residual(config, config.hidden_size),
            }
        )
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = Residual(config, config.intermediate_size)

    def forward(self, x_BSH: Tensor, keep_B11S: Tensor) -> Tensor:
        mixed_BSH = self.attention["self"](x_BSH, keep_B11S)
        x_BSH = self.attention["output"](mixed_BSH, x_BSH)
        wide_BSI = F.gelu(self.intermediate["dense"](x_BSH))
        out_BSH: Tensor = self.output(wide_BSI, x_BSH)
        return out_BSH


class Encoder(nn.Module):
    """All layers, one after another."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        layers = [Layer(config, kernels) for _ in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(layers)

    def forward(self, x_BSH: Tensor, keep_B11S: Tensor) -> Tensor:
        for layer in self.layer:
            x_BSH = layer(x_BSH, keep_B11S)
        return x_BSH


class Bert(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, kernels)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(
        self, input_ids_BS: Tensor, input_mask_BS: Tensor, segment_ids_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output BSH, and the pooled [CLS] output BH."""
        keep_B11S = input_mask_BS.bool()[:, None, None, :]
        x_BSH = self.embeddings(input_ids_BS, segment_ids_BS)
        x_BSH = self.encoder(x_BSH, keep_B11S)
        return x_BSH, torch.tanh(self.pooler["dense"](x_BSH[:, 0]))


class MaskedLmHead(nn.Module):
    """Transform, then the decoder tied to the word embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings_VH: Tensor) -> Tensor:
        x = self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))
        return F.linear(x, word_embeddings_VH, self.bias)


class PretrainingLosses(NamedTuple):
    """Sums over a micro-batch; whoever knows the global batch divides them.

    `mlm_correct` and `nsp_correct` are counted in evaluation only.
    """

    mlm_loss_sum: Tensor
    nsp_loss_sum: Tensor
    mlm_correct: Tensor | None
    nsp_correct: Tensor | None


class BertForPreTraining(nn.Module):
    """BERT with the masked-LM and next-sentence heads."""

    def __init__(self, config: BertConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, kernels or Kernels())
        self.cls = nn.ModuleDict(
            {
                "predictions": MaskedLmHead(config),
                "seq_relationship": nn.Linear(config.hidden_size, 2),
            }
        )
        initialize(self, config.initializer_range)

    def logits(
        self, input_ids_BS: Tensor, input_mask_BS: Tensor, segment_ids_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masked-LM logits of every position BSV, and next-sentence logits B2."""
        x_BSH, pooled_BH = self.bert(input_ids_BS, input_mask_BS, segment_ids_BS)
        logits_BSV = self.cls["predictions"](x_BSH, self.bert.embeddings.word_embeddings.weight)
        return logits_BSV, self.cls["seq_relationship"](pooled_BH)

    def forward(
        self,
        input_ids: Tensor,
        input_mask: Tensor,
        segment_ids: Tensor,
        masked_lm_positions: Tensor,
        masked_lm_ids: Tensor,
        next_sentence_labels: Tensor,
    ) -> PretrainingLosses:
        """The losses of a batch under the names of the shards' datasets.

        The vocabulary projection, the largest matrix product of a small model, runs on the P masked
        rows only. A position of 0 is padding of the list of predictions.
        """
        x_BSH, pooled_BH = self.bert(input_ids, input_mask, segment_ids)
        index_BPH = masked_lm_positions[..., None].expand(-1, -1, x_BSH.shape[-1])
        masked_BPH = x_BSH.gather(1, index_BPH)
        logits_BPV = self.cls["predictions"](
            masked_BPH, self.bert.embeddings.word_embeddings.weight
        )
        labels_BP = masked_lm_ids.masked_fill(masked_lm_positions == 0, IGNORED_LABEL)
        nsp_logits_B2 = self.cls["seq_relationship"](pooled_BH)
        return PretrainingLosses(
            mlm_loss_sum=F.cross_entropy(
                logits_BPV.flatten(0, 1).float(),
                labels_BP.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            ),
            nsp_loss_sum=F.cross_entropy(
                nsp_logits_B2.float(), next_sentence_labels, reduction="sum"
            ),
            mlm_correct=None if self.training else (logits_BPV.argmax(-1) == labels_BP).sum(),
            nsp_correct=None
            if self.training
            else (nsp_logits_B2.argmax(-1) == next_sentence_labels).sum(),
        )


class BertForSequenceClassification(nn.Module):
    """BERT with a classifier on the pooled output; one label means regression."""

    def __init__(self, config: BertConfig, num_labels: int, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, kernels or Kernels())
        dropout_p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout_p is None else dropout_p)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialize(self, config.initializer_range)

    def forward(
        self, input_ids_BS: Tensor, input_mask_BS: Tensor, segment_ids_BS: Tensor
    ) -> Tensor:
        """Logits BC."""
        _, pooled_BH = self.bert(input_ids_BS, input_mask_BS, segment_ids_BS)
        logits_BC: Tensor = self.classifier(self.dropout(pooled_BH))
        return logits_BC


@torch.no_grad()
def initialize(model: nn.Module, std: float) -> None:
    """Draw all weights anew from torch's global generator: matrices from N(0, std^2), biases 0.

    Source: google-research/bert modeling.py draws from a normal cut off at 2 std; this follows
    Hugging Face's and NVIDIA's plain normal.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()


def num_parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_flops_per_sequence(config: BertConfig, seq_length: int, max_predictions: int) -> float:
    """Floating-point operations of one sequence's forward and backward pass, matrix products only.

    Both passes together cost three times the forward pass; a multiply-add counts as two.
    """
    S, P, V = seq_length, max_predictions, config.vocab_size
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    layer = 2 * S * (4 * H * H + 2 * H * I) + 4 * S * S * H
    heads = 2 * P * (H * H + H * V) + 2 * H * H
    return 3.0 * (config.num_hidden_layers * layer + heads)
