"""Examples as a model reads them: encoded, batched, answered.

Shapes: B batch, S sequence, C classes, N examples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data import Examples, Labels
from zerobert import distributed, signals
from zerobert.checkpoint import ModelFolder
from zerobert.device import copied_to
from zerobert.errors import ConfigError
from zerobert.packing import pack
from zerobert.signals import StopRequest
from zerobert.tokenizer import WordPieceTokenizer

SEQ_LENGTH = 128  # where nobody says another
_LENGTH_MULTIPLE = 8  # widths that tensor cores like
_EVAL_BATCH_SIZE = 64

Indices = npt.NDArray[np.int64]


class Stopped(SystemExit):
    """A signal asked to end, between two batches of work that leaves nothing to be saved."""


def stop_code(stop: StopRequest) -> int:
    """The exit code that a signal to any of the ranks asks for, 0 for none; collective."""
    return signals.agreed_code(distributed.all_reduce_sum(signals.flags(stop)))


def end_if_asked(stop: StopRequest | None) -> None:
    """End where a signal asked for it; collective.

    Raises:
        Stopped: with the exit code.
    """
    if stop is not None and (code := stop_code(stop)):
        raise Stopped(code)


class Split(Protocol):
    """Examples that can be trained on and answered."""

    def __len__(self) -> int: ...

    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example, N."""
        ...

    def inputs(self, indices: Indices, device: torch.device) -> dict[str, Tensor]:
        """A batch, by the names of the model's arguments."""
        ...

    def loss_sum(self, outputs: Any, indices: Indices) -> Tensor:
        """The summed loss of what the model answers to that batch."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A split as the model reads it: unpadded ids [N][S] and labels [N] (None for a test set)."""

    input_ids: list[list[int]]
    segment_ids: list[list[int]]
    labels: Labels | None
    max_seq_length: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example, N."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    def inputs(self, indices: Indices, device: torch.device) -> dict[str, Tensor]:
        """Ids, mask and segment ids BS, padded to the longest of the batch; which are tokens."""
        longest = max(len(self.input_ids[i]) for i in indices)
        width = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.max_seq_length)
        names = ("input_ids_BS", "input_mask_BS", "segment_ids_BS")
        ids, mask, segments = arrays = np.zeros((3, len(indices), width), dtype=np.int64)
        for row, i in enumerate(indices):
            length = len(self.input_ids[i])
            ids[row, :length] = self.input_ids[i]
            segments[row, :length] = self.segment_ids[i]
            mask[row, :length] = 1
        tensors = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
        packing = pack(tensors["input_mask_BS"])
        tensors.update(places=packing.places_T, cu_seqlens=packing.cu_seqlens)
        return {name: copied_to(device, tensor) for name, tensor in tensors.items()}

    def loss_sum(self, outputs: Tensor, indices: Indices) -> Tensor:
        """Cross-entropy, or the squared error of scores."""
        assert self.labels is not None
        labels_B = copied_to(outputs.device, torch.from_numpy(self.labels[indices]))
        return loss_sum(outputs.float(), labels_B)


def choose_length(folder: ModelFolder, asked: int | None, usual: int) -> int:
    """The tokens of a row at most: as asked, else as usual or as many as the model knows.

    Raises:
        ConfigError: more than the model knows are asked for.
    """
    limit = folder.config.max_position_embeddings
    length = min(usual, limit) if asked is None else asked
    if length > limit:
        raise ConfigError(f"--max_seq_length {length}: {folder.path} was made for at most {limit}")
    return length


def encode(examples: Examples, tokenizer: WordPieceTokenizer, *, max_seq_length: int) -> Encoded:
    """Tokenise a split."""
    input_ids, segment_ids = tokenizer.encode_pairs(
        examples.first, examples.second, max_seq_length=max_seq_length
    )
    return Encoded(
        input_ids=input_ids,
        segment_ids=segment_ids,
        labels=examples.labels,
        max_seq_length=max_seq_length,
    )


def epoch_batches(
    num_examples: int, *, batch_size: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The examples of each batch of an epoch: a pure function of (seed, epoch).

    Drawn at random whatever their lengths: padding is left out anyhow, and sentences of like length
    are often of one source with labels of its own.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return _cut(order, batch_size)


def _cut(items: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def loss_sum(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The summed loss: cross-entropy for classes (integers), squared error for scores (floats)."""
    if labels_B.is_floating_point():
        return F.mse_loss(logits_BC[:, 0], labels_B, reduction="sum")
    return F.cross_entropy(logits_BC, labels_B, reduction="sum")


def plain_forward(model: nn.Module, precision: str, device: torch.device) -> Callable[..., Any]:
    """A model that is on no engine, in evaluation.

    Args:
        precision: `fp32`, `bf16` or `fp16`, of the matrix products.
    """
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    model.to(device).eval()

    def forward(**inputs: Tensor) -> Any:
        with torch.autocast(device.type, low, enabled=low is not None):
            return model(**inputs)

    return forward


@torch.no_grad()
def predict(
    forward: Callable[..., Tensor],
    examples: Split,
    device: torch.device,
    stop: StopRequest | None = None,
) -> npt.NDArray[np.float32]:
    """What a model answers to every example, N..., in the split's own order; collective.

    The ranks share the batches, which are the same at any number of ranks, and each gets all the
    answers.

    Args:
        forward: a model in evaluation.
        stop: asked before each batch.

    Raises:
        Stopped: a signal asked to end.
    """
    order = np.argsort(examples.lengths(), kind="stable")
    batches = _cut(order, _EVAL_BATCH_SIZE)
    rank, ranks = distributed.rank(), distributed.world_size()
    mine: list[npt.NDArray[np.float32]] = []
    for first in range(0, len(batches), ranks):
        end_if_asked(stop)
        # At the end a rank may repeat the last batch: under ZeRO-3 all take part in each.
        number = min(first + rank, len(batches) - 1)
        outputs = forward(**examples.inputs(batches[number], device))
        mine.append(outputs.float().cpu().numpy())
    answers = distributed.gather_object(mine)
    in_turn = np.concatenate([answers[i % ranks][i // ranks] for i in range(len(batches))])
    in_order = np.empty_like(in_turn)
    in_order[order] = in_turn
    return in_order


def mean_loss(logits_NC: npt.NDArray[np.float32], labels_N: Labels) -> float:
    """The mean loss over a whole split, exact whatever the batches were."""
    labels = torch.from_numpy(labels_N)
    total = loss_sum(
        torch.from_numpy(logits_NC).double(),
        labels.double() if labels.is_floating_point() else labels,
    )
    return total.item() / len(labels_N)
