"""Training and evaluation on DeepSpeed's engine, of any number of ranks; `train` reads from top to
bottom.

Shapes: B batch, S sequence, C classes, N examples.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data import Examples, Labels
from zerobert import distributed, schedule, signals
from zerobert.engine import Engine, computes_in
from zerobert.errors import ConfigError, TrainingDivergedError
from zerobert.kernels import Kernels
from zerobert.optim import build_optimizer, optimizer_config
from zerobert.signals import StopRequest
from zerobert.tokenizer import WordPieceTokenizer

_BUCKET_BATCHES = 50
_LENGTH_MULTIPLE = 8  # widths that tensor cores like
_EVAL_BATCH_SIZE = 64

Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Args:
        deepspeed: DeepSpeed's keys, the optimizer, its peak rate, batch sizes and precision among
            them; see `finetune.config`.
        max_steps: ends the run, and the schedule, before `num_epochs` do; None for no limit.
        layer_decay: what the rate is multiplied by from each layer to the one below it; None for
            one rate.
        save_steps: evaluate and save every so many steps; None to evaluate after each epoch.
        keeps_best: the model of the best evaluation is kept, not the last one.
        patience: end after so many evaluations in a row without a better one; None for never.
    """

    deepspeed: Mapping[str, Any]
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    num_epochs: float
    max_steps: int | None
    schedule: schedule.ScheduleConfig
    layer_decay: float | None = None
    logging_steps: int
    save_steps: int | None
    seed: int
    keeps_best: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_epochs", "logging_steps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name}: wanted above 0, got {getattr(self, name)}")
        if not self.seed >= 0:
            raise ConfigError(f"--seed: wanted 0 or more, got {self.seed}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"--layer_decay: wanted above 0, at most 1, got {self.layer_decay}")
        for name, flag in (
            ("max_steps", "max_steps"),
            ("save_steps", "save_steps"),
            ("patience", "early_stopping_patience"),
        ):
            if (steps := getattr(self, name)) is not None and steps < 1:
                raise ConfigError(f"--{flag}: wanted 1 or more, got {steps}")

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        return float(self.deepspeed["optimizer"]["params"]["lr"])

    def count_steps(self, num_examples: int, batch_size: int) -> int:
        """The length of the run in steps."""
        steps = math.ceil(self.num_epochs * math.ceil(num_examples / batch_size))
        return min(steps, self.max_steps) if self.max_steps else steps


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
        """Ids, mask and segment ids BS, padded to the longest of the batch."""
        longest = max(len(self.input_ids[i]) for i in indices)
        width = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.max_seq_length)
        names = ("input_ids_BS", "input_mask_BS", "segment_ids_BS")
        ids, mask, segments = arrays = np.zeros((3, len(indices), width), dtype=np.int64)
        for row, i in enumerate(indices):
            length = len(self.input_ids[i])
            ids[row, :length] = self.input_ids[i]
            segments[row, :length] = self.segment_ids[i]
            mask[row, :length] = 1
        tensors = (torch.from_numpy(array).to(device) for array in arrays)
        return dict(zip(names, tensors, strict=True))

    def loss_sum(self, outputs: Tensor, indices: Indices) -> Tensor:
        """Cross-entropy, or the squared error of scores."""
        assert self.labels is not None
        return loss_sum(outputs.float(), torch.from_numpy(self.labels[indices]).to(outputs.device))


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


def loss_sum(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The summed loss: cross-entropy for classes (integers), squared error for scores (floats)."""
    if labels_B.is_floating_point():
        return F.mse_loss(logits_BC[:, 0], labels_B, reduction="sum")
    return F.cross_entropy(logits_BC, labels_B, reduction="sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """A moment of the training at which the model should be looked at.

    Attributes:
        saves: the model is to be kept as it is, as `save_steps` asks.
        exit_code: of a signal that asks to end; 0 for none.
    """

    step: int
    saves: bool
    exit_code: int = 0


def start_engine(model: nn.Module, settings: Settings) -> Engine:
    """The engine that trains a model; collective.

    Raises:
        ConfigError: it can't be served so.
    """
    config = optimizer_config(settings.deepspeed["optimizer"], "optimizer")
    optimizer = build_optimizer(
        model, config, settings.kernels.lamb, layer_decay=settings.layer_decay
    )
    return Engine(model, optimizer, settings.deepspeed)


def train(
    engine: Engine, examples: Split, settings: Settings, stop: StopRequest, *, first_step: int = 0
) -> Iterator[Review]:
    """Train the model, stopping wherever it should be looked at; collective.

    The batches, and so the run, are a pure function of the seed and the step.

    Args:
        first_step: the steps that were done before.

    Yields:
        Every `save_steps` or, without them, after every epoch; after the last step; and when a
        signal asks to end, which is the last.

    Raises:
        TrainingDivergedError: the loss is no longer a finite number.
    """
    batch_size = engine.global_batch_samples
    total_steps = settings.count_steps(len(examples), batch_size)
    recent: list[Tensor] = []
    started = time.perf_counter()
    engine.train()
    batches = itertools.islice(
        _all_batches(examples.lengths(), batch_size, settings.seed), first_step, total_steps
    )
    for step, (epoch, number, ends_epoch, indices) in enumerate(batches, start=first_step + 1):
        # As in DeepSpeed, a step that an overflow left out does not move the schedule.
        rate = settings.learning_rate * schedule.factor(
            settings.schedule, step - 1 - engine.skipped_steps, total=total_steps
        )
        recent.append(train_step(engine, examples, indices, rate, settings.seed, step))
        exit_code = signals.agreed_code(distributed.all_reduce_sum(signals.flags(stop)))
        is_last = step == total_steps or exit_code != 0
        if step % settings.logging_steps == 0 or is_last:
            here = torch.stack(recent).mean().item()  # waits for the GPU: only on log steps
            (mean_loss,) = distributed.all_reduce_sum([here])
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
        if saves or is_epoch_review or is_last:
            paused = time.perf_counter()
            yield Review(step=step, saves=saves, exit_code=exit_code)
            if exit_code:
                return
            engine.train()
            started += time.perf_counter() - paused


def _all_batches(
    lengths_N: npt.NDArray[np.int64], batch_size: int, seed: int
) -> Iterator[tuple[int, int, bool, Indices]]:
    """Epoch from 0, batch from 1, whether it is the epoch's last, and its examples; without end."""
    for epoch in itertools.count():
        batches = epoch_batches(lengths_N, batch_size=batch_size, seed=seed, epoch=epoch)
        for number, indices in enumerate(batches, start=1):
            yield epoch, number, number == len(batches), indices


def train_step(
    engine: Engine, examples: Split, indices: Indices, rate: float, seed: int, step: int
) -> Tensor:
    """One step on the mean loss of a batch, of which each rank has its share; collective.

    Returns:
        This rank's part of the mean.
    """
    rank = distributed.rank()
    mine = indices[rank :: distributed.world_size()]
    total = torch.zeros((), device=engine.device)
    for micro, part in enumerate(np.array_split(mine, engine.accumulation_steps)):
        torch.manual_seed(_dropout_seed(seed, step, rank, micro))
        # An epoch's last batch may be too small for all: who has nothing adds nothing.
        chosen, weight = (part, 1.0) if len(part) else (indices[:1], 0.0)
        outputs = engine.forward(**examples.inputs(chosen, engine.device))
        loss = examples.loss_sum(outputs, chosen) * (weight / len(indices))
        engine.backward(loss)
        engine.step(rate)
        total += loss.detach()
    return total


def _dropout_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_finite(loss: float, step: int) -> None:
    """Stop a run that can't be saved.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    if not math.isfinite(loss):
        raise TrainingDivergedError(
            f"the loss is {loss} at step {step}: lower --learning_rate or raise --warmup_proportion"
        )


def plain_forward(
    model: nn.Module, settings_deepspeed: Mapping[str, Any], device: torch.device
) -> Callable[..., Tensor]:
    """A model that is on no engine, computing in the precision of one."""
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(computes_in(settings_deepspeed))
    model.to(device).eval()

    def forward(**inputs: Tensor) -> Tensor:
        is_low = low is not None
        with torch.autocast(device.type, low, enabled=True) if is_low else contextlib.nullcontext():
            outputs: Tensor = model(**inputs)
            return outputs

    return forward


@torch.no_grad()
def predict(
    forward: Callable[..., Tensor], examples: Split, device: torch.device
) -> npt.NDArray[np.float32]:
    """What a model answers to every example, N..., in the split's own order; collective.

    The ranks share the batches, which are the same at any number of ranks, and each gets all the
    answers.

    Args:
        forward: a model in evaluation.
    """
    order = np.argsort(examples.lengths(), kind="stable")
    batches = _cut(order, _EVAL_BATCH_SIZE)
    rank, ranks = distributed.rank(), distributed.world_size()
    mine: list[npt.NDArray[np.float32]] = []
    for first in range(0, len(batches), ranks):
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
