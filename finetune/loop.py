"""Training and evaluation of a sentence classifier; `train` reads from top to bottom.

Shapes: B batch, S sequence, C classes, N examples.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data import Examples, Labels
from zerobert import schedule
from zerobert.errors import ConfigError, TrainingDivergedError
from zerobert.optim import parameter_groups
from zerobert.tokenizer import WordPieceTokenizer

_BUCKET_BATCHES = 50
_LENGTH_MULTIPLE = 8  # widths that tensor cores like
_EVAL_BATCH_SIZE = 64

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Args:
        max_steps: ends the run, and the schedule, before `num_epochs` do; None for no limit.
        layer_decay: what the rate is multiplied by from each layer to the one below it; None for
            one rate.
        save_steps: evaluate and save every so many steps; None to evaluate after each epoch.
    """

    batch_size: int
    learning_rate: float
    num_epochs: float
    max_steps: int | None
    schedule: schedule.ScheduleConfig
    layer_decay: float | None = None
    weight_decay: float
    adam_epsilon: float
    max_grad_norm: float
    logging_steps: int
    save_steps: int | None
    seed: int
    precision: Precision

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "num_epochs", "logging_steps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name}: wanted above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "adam_epsilon", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name}: wanted 0 or more, got {getattr(self, name)}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"--layer_decay: wanted above 0, at most 1, got {self.layer_decay}")
        for name in ("max_steps", "save_steps"):
            if (steps := getattr(self, name)) is not None and steps < 1:
                raise ConfigError(f"--{name}: wanted 1 or more, got {steps}")

    def count_steps(self, num_examples: int) -> int:
        """The length of the run in steps."""
        steps = math.ceil(self.num_epochs * math.ceil(num_examples / self.batch_size))
        return min(steps, self.max_steps) if self.max_steps else steps


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
    lengths_N: npt.NDArray[np.int64], *, batch_size: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The examples of each batch of an epoch: a pure function of (seed, epoch).

    The shuffled examples are sorted by length within buckets of many batches, so that a batch needs
    little padding; the order of a bucket's batches is drawn anew.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths_N))
    batches = []
    for bucket in _cut(order, _BUCKET_BATCHES * batch_size):
        bucket = bucket[np.argsort(lengths_N[bucket], kind="stable")]
        in_bucket = _cut(bucket, batch_size)
        batches += [in_bucket[i] for i in generator.permutation(len(in_bucket))]
    return batches


def _cut(items: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def make_batch(
    split: Encoded, indices: npt.NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and segment ids BS, padded to the longest of the batch."""
    longest = max(len(split.input_ids[i]) for i in indices)
    width = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, split.max_seq_length)
    ids, mask, segments = (np.zeros((len(indices), width), dtype=np.int64) for _ in range(3))
    for row, i in enumerate(indices):
        length = len(split.input_ids[i])
        ids[row, :length] = split.input_ids[i]
        segments[row, :length] = split.segment_ids[i]
        mask[row, :length] = 1
    return (
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        torch.from_numpy(segments).to(device),
    )


def loss_sum(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The summed loss: cross-entropy for classes (integers), squared error for scores (floats)."""
    if labels_B.is_floating_point():
        return F.mse_loss(logits_BC[:, 0], labels_B, reduction="sum")
    return F.cross_entropy(logits_BC, labels_B, reduction="sum")


def train(
    model: nn.Module,
    examples: Encoded,
    settings: Settings,
    device: torch.device,
) -> Iterator[tuple[int, bool]]:
    """Train the model, stopping wherever it should be looked at.

    Yields:
        The step, and whether the model is to be saved: every `save_steps` (True) or, without them,
        after every epoch (False), and after the last step in any case.

    Raises:
        TrainingDivergedError: the loss is no longer a finite number.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, settings.layer_decay),
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
    )
    total_steps = settings.count_steps(len(examples))
    recent: list[Tensor] = []
    started = time.perf_counter()
    model.train()
    batches = itertools.islice(_all_batches(examples, settings), total_steps)
    for step, (epoch, number, ends_epoch, indices) in enumerate(batches, start=1):
        rate = settings.learning_rate * schedule.factor(
            settings.schedule, step - 1, total=total_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        loss = _mean_loss(model, examples, indices, settings.precision, device)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()

        recent.append(loss.detach())
        if step % settings.logging_steps == 0 or step == total_steps:
            mean_loss = torch.stack(recent).mean().item()  # waits for the GPU: only on log steps
            check_finite(mean_loss, step)
            speed = len(recent) / (time.perf_counter() - started)
            print(
                f"global step {step}, epoch: {epoch}, batch: {number}, loss: {mean_loss:f}, "
                f"speed: {speed:.2f} step/s",
                flush=True,
            )
            recent.clear()
            started = time.perf_counter()
        saves = settings.save_steps is not None and step % settings.save_steps == 0
        is_epoch_review = ends_epoch and settings.save_steps is None
        if saves or is_epoch_review or step == total_steps:
            paused = time.perf_counter()
            yield step, saves
            model.train()
            started += time.perf_counter() - paused


def _all_batches(
    examples: Encoded, settings: Settings
) -> Iterator[tuple[int, int, bool, npt.NDArray[np.int64]]]:
    """Epoch from 0, batch from 1, whether it is the epoch's last, and its examples; without end."""
    lengths_N = examples.lengths()
    for epoch in itertools.count():
        batches = epoch_batches(
            lengths_N, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch
        )
        for number, indices in enumerate(batches, start=1):
            yield epoch, number, number == len(batches), indices


def _mean_loss(
    model: nn.Module,
    examples: Encoded,
    indices: npt.NDArray[np.int64],
    precision: Precision,
    device: torch.device,
) -> Tensor:
    assert examples.labels is not None
    with _autocast(device, precision):
        logits_BC = model(*make_batch(examples, indices, device))
    labels_B = torch.from_numpy(examples.labels[indices]).to(device)
    return loss_sum(logits_BC.float(), labels_B) / len(indices)


def check_finite(loss: float, step: int) -> None:
    """Stop a run that can't be saved.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    if not math.isfinite(loss):
        raise TrainingDivergedError(
            f"the loss is {loss} at step {step}: lower --learning_rate or raise --warmup_proportion"
        )


def _autocast(
    device: torch.device, precision: Precision
) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def predict(
    model: nn.Module, examples: Encoded, precision: Precision, device: torch.device
) -> npt.NDArray[np.float32]:
    """The logits NC of every example, in the split's own order."""
    model.eval()
    logits: list[npt.NDArray[np.float32]] = []
    order = np.argsort(examples.lengths(), kind="stable")
    for indices in _cut(order, _EVAL_BATCH_SIZE):
        with _autocast(device, precision):
            logits_BC = model(*make_batch(examples, indices, device))
        logits.append(logits_BC.float().cpu().numpy())
    logits_NC = np.concatenate(logits)
    in_order_NC = np.empty_like(logits_NC)
    in_order_NC[order] = logits_NC
    return in_order_NC


def mean_loss(logits_NC: npt.NDArray[np.float32], labels_N: Labels) -> float:
    """The mean loss over a whole split, exact whatever the batches were."""
    labels = torch.from_numpy(labels_N)
    total = loss_sum(
        torch.from_numpy(logits_NC).double(),
        labels.double() if labels.is_floating_point() else labels,
    )
    return total.item() / len(labels_N)
