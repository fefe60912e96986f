"""The whole of BERT: embeddings, encoder, pooler, the heads of pretraining and of tasks, losses.

Parameters carry Hugging Face's names, so a state dict needs no translation, with one difference:
the decoder that is tied to the word embeddings is not a parameter of its own here.

Tokens come in rows of B x S, or packed, T of them, without the padding between rows: all but the
embeddings, attention and what picks tokens out works on any leading axes.

Shapes: B batch, S sequence, T packed tokens, X either B x S or T, H hidden, N heads, D head width,
I intermediate, P predictions, R masked positions, V vocabulary, C classes. Source of the
architecture: Devlin et al. 2018 (arXiv:1810.04805).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerobert import kernels as choices
from zerobert.config import BertConfig
from zerobert.kernels import Kernels, Ops, dropout
from zerobert.kernels.attention import Layout, Packing
from zerobert.kernels.cross_entropy import IGNORED_LABEL, chunks
from zerobert.packing import NUM_SHAPES, pack

# Matrix products are at full speed where every side is a multiple of this.
_VOCAB_MULTIPLE = 8


class Embeddings(nn.Module):
    """Word + position + segment embeddings, normalised.

    The word embeddings have rows of zeros after the last word, which nothing reads and no gradient
    reaches; state dicts are without them.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.vocab_size = config.vocab_size
        num_rows = -(-config.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
        self.word_embeddings = nn.Embedding(num_rows, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob
        self.register_state_dict_post_hook(_without_padding)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_padding)  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids_BS: Tensor, segment_ids_BS: Tensor, packing: Packing | None, ops: Ops
    ) -> Tensor:
        """The tokens' vectors, XH."""
        if packing is None:
            ids_X, segments_X = input_ids_BS, segment_ids_BS
            positions_XH = self.position_embeddings.weight[: ids_X.shape[1]]
        else:
            ids_X = input_ids_BS.flatten()[packing.places_T]
            segments_X = segment_ids_BS.flatten()[packing.places_T]
            positions_XH = self.position_embeddings(packing.places_T % input_ids_BS.shape[1])
        x_XH = self.word_embeddings(ids_X) + self.token_type_embeddings(segments_X) + positions_XH
        return _drop(self, ops.normalize(x_XH, self.LayerNorm))


def _without_padding(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    name = f"{prefix}word_embeddings.weight"
    state[name] = state[name][: module.vocab_size]


def _with_padding(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    name = f"{prefix}word_embeddings.weight"
    if name in state and len(state[name]) == module.vocab_size:
        missing = len(module.word_embeddings.weight) - module.vocab_size
        state[name] = F.pad(state[name], (0, 0, 0, missing))


def _drop(module: Any, x: Tensor) -> Tensor:
    """Drop out with the module's probability, in training only."""
    return dropout.drop(x, module.dropout_p) if module.training else x


class SelfAttention(nn.Module):
    """Multi-head attention up to the mixed values, before the output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, x_XH: Tensor, layout: Layout, ops: Ops) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        q_XND, k_XND, v_XND = self._projected(x_XH, is_fused=ops.fuses_projections)
        return ops.attend(q_XND, k_XND, v_XND, layout, dropout_p).flatten(-2)

    def _projected(self, x_XH: Tensor, *, is_fused: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values, each XND."""
        parts = (self.query, self.key, self.value)
        heads = (*x_XH.shape[:-1], self.num_heads, -1)
        if not is_fused:
            return tuple(part(x_XH).view(heads) for part in parts)
        # The parameters stay apart: so they are in checkpoints, and so trust ratios are theirs.
        weight_3HxH = torch.cat([part.weight for part in parts])
        bias_3H = torch.cat([part.bias for part in parts])
        qkv_X3H = F.linear(x_XH, weight_3HxH, bias_3H)
        return tuple(part_XH.view(heads) for part_XH in qkv_X3H.chunk(3, dim=-1))


class Residual(nn.Module):
    """The end of both halves of a layer: project, drop out, add to the residual, normalise.

    With pre-LN the norm is applied at the beginning of the half instead, by the layer.
    """

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.is_pre_norm = config.layer_norm_position == "pre"
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual_XH: Tensor, ops: Ops) -> Tensor:
        if self.is_pre_norm:
            return residual_XH + _drop(self, self.dense(x))
        dropout_p = self.dropout_p if self.training else 0.0
        return ops.normalize(x, self.LayerNorm, residual_XH, dropout_p, self.dense)


class Layer(nn.Module):
    """One encoder layer: attention, then a feed-forward network of one wide layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.is_pre_norm = config.layer_norm_position == "pre"
        # The nesting is Hugging Face's: `attention.self.query`, `attention.output.dense`, ...
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": Residual(config, config.hidden_size)}
        )
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = Residual(config, config.intermediate_size)

    def forward(self, x_XH: Tensor, layout: Layout, ops: Ops) -> Tensor:
        mix, narrow = cast(Residual, self.attention["output"]), self.output
        read_XH = ops.normalize(x_XH, mix.LayerNorm) if self.is_pre_norm else x_XH
        x_XH = mix(self.attention["self"](read_XH, layout, ops), x_XH, ops)
        read_XH = ops.normalize(x_XH, narrow.LayerNorm) if self.is_pre_norm else x_XH
        wide_XI = ops.gelu(read_XH, cast(nn.Linear, self.intermediate["dense"]))
        out_XH: Tensor = narrow(wide_XI, x_XH, ops)
        return out_XH


class Encoder(nn.Module):
    """All layers, one after another; with pre-LN a last norm."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.is_checkpointed = kernels.activation_checkpointing
        if config.layer_norm_position == "pre":
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # For training alone: the batches of evaluation have many shapes, and few steps.
        self.compiled = [_compiled(layer) for layer in self.layer] if kernels.compile else None

    def forward(self, x_XH: Tensor, layout: Layout, ops: Ops) -> Tensor:
        for run in self.compiled if self.compiled and self.training else self.layer:
            if self.is_checkpointed and self.training:
                x_XH = checkpoint(run, x_XH, layout, ops, use_reentrant=False)
            else:
                x_XH = run(x_XH, layout, ops)
        return ops.normalize(x_XH, self.LayerNorm) if hasattr(self, "LayerNorm") else x_XH


def _compiled(layer: nn.Module) -> Callable[[Tensor, Layout, Ops], Tensor]:
    """A layer through torch.compile, for as many shapes as packing gives; all layers share them."""
    from torch._dynamo import config  # here: to load the compiler takes seconds

    config.recompile_limit = max(config.recompile_limit, 4 * NUM_SHAPES)
    compiled: Callable[[Tensor, Layout, Ops], Tensor] = torch.compile(
        layer.forward, dynamic=False, fullgraph=True
    )
    return compiled


class Encoded(NamedTuple):
    """The encoder's output.

    Attributes:
        x_XH: every token's vector.
        starts_B: where each row's [CLS] is among the tokens, counted without the axes of `X`.
    """

    x_XH: Tensor
    starts_B: Tensor

    def at(self, positions_BP: Tensor) -> Tensor:
        """The vectors at some positions of each row, BPH."""
        return self.x_XH.flatten(0, -2)[self.starts_B[:, None] + positions_BP]

    @property
    def first_BH(self) -> Tensor:
        """The vectors of [CLS]."""
        return self.x_XH.flatten(0, -2)[self.starts_B]


class Bert(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: BertConfig, kernels: Kernels, *, pooler: bool = True) -> None:
        super().__init__()
        self.kernels = kernels
        self.dropout_p = config.attention_probs_dropout_prob
        self.hidden_size = config.hidden_size
        self.head_width = config.hidden_size // config.num_attention_heads
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, kernels)
        if pooler:
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.pooler = nn.ModuleDict({"dense": dense})

    def forward(
        self,
        input_ids_BS: Tensor,
        input_mask_BS: Tensor,
        segment_ids_BS: Tensor,
        packing: Packing | None = None,
    ) -> Encoded:
        """The last layer's output; with a packing, of tokens alone."""
        num_rows, row_length = input_ids_BS.shape
        starts_B = (
            torch.arange(0, num_rows * row_length, row_length, device=input_ids_BS.device)
            if packing is None
            else packing.cu_seqlens[:num_rows].long()
        )
        ops = self.ops()
        x_XH = self.embeddings(input_ids_BS, segment_ids_BS, packing, ops)
        layout = Layout(input_mask_BS.bool(), packing)
        return Encoded(self.encoder(x_XH, layout, ops), starts_B)

    def packing(
        self, input_mask_BS: Tensor, places: Tensor | None, cu_seqlens: Tensor | None
    ) -> Packing | None:
        """The packing of a batch, where padding is to be left out.

        Args:
            places, cu_seqlens: what the batch brought along; where they are None a GPU is waited
                for.
        """
        if self.kernels.num_shapes is None:
            return None
        if places is not None and cu_seqlens is not None:
            return Packing(places, cu_seqlens)
        packing = pack(input_mask_BS, self.kernels.num_shapes)
        return Packing(*(part.to(input_mask_BS.device) for part in packing))

    def ops(self) -> Ops:
        """The implementations for the device and precision that the weights are in now."""
        weight = self.embeddings.word_embeddings.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        dropout_p = self.dropout_p if self.training else 0.0
        return choices.select(
            *(self.kernels, device, dtype),
            dropout_p=dropout_p,
            head_width=self.head_width,
            hidden_size=self.hidden_size,
        )

    def pool(self, encoded: Encoded) -> Tensor:
        """The pooled [CLS], BH."""
        return torch.tanh(self.pooler["dense"](encoded.first_BH))


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

    def transformed(self, x_XH: Tensor, ops: Ops) -> Tensor:
        """What the decoder reads."""
        wide_XH = ops.gelu(x_XH, cast(nn.Linear, self.transform["dense"]))
        return ops.normalize(wide_XH, cast(nn.LayerNorm, self.transform["LayerNorm"]))

    def bias_of(self, word_embeddings_VH: Tensor) -> Tensor:
        """The decoder's bias: for rows that pad the vocabulary one that no word has."""
        return F.pad(self.bias, (0, len(word_embeddings_VH) - len(self.bias)), value=float("-inf"))


class PretrainingLosses(NamedTuple):
    """Sums over a micro-batch; whoever knows the global batch divides them.

    What is correct is counted in evaluation only.

    Attributes:
        nsp_rows: rows with a next-sentence label: none where there is no head for it.
    """

    mlm_loss_sum: Tensor
    nsp_loss_sum: Tensor
    mlm_correct: Tensor | None
    nsp_correct: Tensor | None
    nsp_rows: Tensor | None


class BertForPreTraining(nn.Module):
    """BERT with the masked-LM and next-sentence heads.

    Args:
        nsp: False for masked words alone: there is no pooler and no next-sentence head.
    """

    def __init__(
        self, config: BertConfig, kernels: Kernels | None = None, *, nsp: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.has_nsp = nsp
        self.bert = Bert(config, kernels or Kernels(), pooler=nsp)
        self.cls = nn.ModuleDict({"predictions": MaskedLmHead(config)})
        if nsp:
            self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)
        initialize(self, config.initializer_range)

    @property
    def mlm_head(self) -> MaskedLmHead:
        """What turns vectors into words."""
        return cast(MaskedLmHead, self.cls["predictions"])

    def logits(
        self, input_ids_BS: Tensor, input_mask_BS: Tensor, segment_ids_BS: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Masked-LM logits of every position BSV, and next-sentence logits B2."""
        encoded = self.bert(input_ids_BS, input_mask_BS, segment_ids_BS)
        return self._word_logits(encoded.x_XH), self._nsp_logits(encoded)

    def _word_logits(self, x_XH: Tensor) -> Tensor:
        words_VH, head = self.bert.embeddings.word_embeddings.weight, self.mlm_head
        logits_XV = F.linear(
            head.transformed(x_XH, self.bert.ops()), words_VH, head.bias_of(words_VH)
        )
        return logits_XV[..., : self.config.vocab_size]

    def _nsp_logits(self, encoded: Encoded) -> Tensor | None:
        if not self.has_nsp:
            return None
        logits_B2: Tensor = self.cls["seq_relationship"](self.bert.pool(encoded))
        return logits_B2

    def forward(
        self,
        input_ids: Tensor,
        input_mask: Tensor,
        segment_ids: Tensor,
        masked_lm_positions: Tensor,
        masked_lm_ids: Tensor,
        next_sentence_labels: Tensor,
        places: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PretrainingLosses:
        """The losses of a batch under the names of the shards' datasets.

        The vocabulary projection, the largest matrix product of a small model, runs on the masked
        rows only. A position of 0 is padding of the list of predictions.

        Args:
            places, cu_seqlens: the batch's packing; see `Bert.packing`.
        """
        packing = self.bert.packing(input_mask, places, cu_seqlens)
        encoded = self.bert(input_ids, input_mask, segment_ids, packing)
        x_RH = encoded.at(masked_lm_positions).flatten(0, 1)
        labels_R = masked_lm_ids.masked_fill(masked_lm_positions == 0, IGNORED_LABEL).flatten()
        if labels_R.device.type == "cpu":  # elsewhere this would wait for the device
            is_asked_R = labels_R != IGNORED_LABEL
            x_RH, labels_R = x_RH[is_asked_R], labels_R[is_asked_R]
        mlm_loss, mlm_correct = self._mlm(x_RH, labels_R)
        nsp_loss, nsp_correct, nsp_rows = self._nsp(encoded, next_sentence_labels)
        return PretrainingLosses(mlm_loss, nsp_loss, mlm_correct, nsp_correct, nsp_rows)

    def _mlm(self, x_RH: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor | None]:
        words_VH, head = self.bert.embeddings.word_embeddings.weight, self.mlm_head
        if not self.training:
            loss = x_RH.new_zeros((), dtype=torch.float32)
            correct = labels_R.new_zeros(())
            for rows in chunks(x_RH, words_VH):  # a batch trains without ever holding all logits
                logits_CV, labels_C = self._word_logits(x_RH[rows]).float(), labels_R[rows]
                loss += F.cross_entropy(
                    logits_CV, labels_C, ignore_index=IGNORED_LABEL, reduction="sum"
                )
                correct += (logits_CV.argmax(-1) == labels_C).sum()
            return loss, correct
        ops = self.bert.ops()
        x_RH = head.transformed(x_RH, ops)
        return ops.cross_entropy(x_RH, words_VH, head.bias_of(words_VH), labels_R), None

    def _nsp(
        self, encoded: Encoded, labels_B: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits_B2 = self._nsp_logits(encoded)
        if logits_B2 is None:
            none = encoded.x_XH.new_zeros((), dtype=torch.float32)
            return none, none, none
        loss = F.cross_entropy(logits_B2.float(), labels_B, reduction="sum")
        if self.training:
            return loss, None, None
        rows = torch.full((), len(labels_B), device=labels_B.device)
        return loss, (logits_B2.argmax(-1) == labels_B).sum(), rows


class BertForSequenceClassification(nn.Module):
    """BERT with a classifier on the pooled output; one label means regression."""

    def __init__(self, config: BertConfig, num_labels: int, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, kernels or Kernels())
        asked = config.classifier_dropout
        self.dropout_p = config.hidden_dropout_prob if asked is None else asked
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids_BS: Tensor,
        input_mask_BS: Tensor,
        segment_ids_BS: Tensor,
        places: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits BC; for the packing see `Bert.packing`."""
        packing = self.bert.packing(input_mask_BS, places, cu_seqlens)
        encoded = self.bert(input_ids_BS, input_mask_BS, segment_ids_BS, packing)
        logits_BC: Tensor = self.classifier(_drop(self, self.bert.pool(encoded)))
        return logits_BC


class BertForQuestionAnswering(nn.Module):
    """BERT that points at the first and the last token of an answer; there is no pooler."""

    def __init__(self, config: BertConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, kernels or Kernels(), pooler=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids_BS: Tensor,
        input_mask_BS: Tensor,
        segment_ids_BS: Tensor,
        places: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of an answer's start and of its end, BS each; padding has the least there are.

        So padding has no part in the softmax, and the width of a batch does not matter. Hugging
        Face and google-research/bert let it have one.
        """
        packing = self.bert.packing(input_mask_BS, places, cu_seqlens)
        encoded = self.bert(input_ids_BS, input_mask_BS, segment_ids_BS, packing)
        logits_X2: Tensor = self.qa_outputs(encoded.x_XH)
        if packing is not None:
            nowhere = logits_X2.new_zeros(input_mask_BS.numel(), 2)
            logits_X2 = nowhere.index_copy(0, packing.places_T, logits_X2)
        is_padding_BS1 = input_mask_BS[..., None] == 0
        logits_BS2 = logits_X2.view(*input_mask_BS.shape, 2)
        logits_BS2 = logits_BS2.masked_fill(is_padding_BS1, torch.finfo(logits_BS2.dtype).min)
        start_BS, end_BS = logits_BS2.unbind(-1)
        return start_BS, end_BS


def span_loss(start_BS: Tensor, end_BS: Tensor, starts_B: Tensor, ends_B: Tensor) -> Tensor:
    """The summed loss of answers' starts and ends, in nats: of each row the mean of the two.

    Args:
        starts_B, ends_B: where the answer is; what lies beyond the row's end adds nothing, and
            what lies before its beginning counts as [CLS].

    Source: Devlin et al. 2018, section 4.2; the limits are those of Hugging Face's
    BertForQuestionAnswering.
    """
    beyond = start_BS.shape[1]
    losses = [
        F.cross_entropy(
            logits_BS.float(), at_B.clamp(0, beyond), ignore_index=beyond, reduction="sum"
        )
        for logits_BS, at_B in ((start_BS, starts_B), (end_BS, ends_B))
    ]
    return (losses[0] + losses[1]) / 2


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
    for module in model.modules():
        if isinstance(module, Embeddings):
            words = module.word_embeddings
            words.weight[words.padding_idx].zero_()
            words.weight[module.vocab_size :].zero_()


def num_parameters(model: nn.Module) -> int:
    """The number of values that a checkpoint holds."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def training_flops_per_sequence(config: BertConfig, seq_length: int, max_predictions: int) -> float:
    """Floating-point operations of one sequence's forward and backward pass, matrix products only.

    Both passes together cost three times the forward pass; a multiply-add counts as two.
    """
    S, P, V = seq_length, max_predictions, config.vocab_size
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    layer = 2 * S * (4 * H * H + 2 * H * I) + 4 * S * S * H
    heads = 2 * P * (H * H + H * V) + 2 * H * H
    return 3.0 * (config.num_hidden_layers * layer + heads)
