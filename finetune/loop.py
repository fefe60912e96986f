"""Training on DeepSpeed's engine, on any number of ranks; `train` reads from top to bottom."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.batches import Indices, Split, epoch_batches, stop_code
from zerobert import distributed, schedule
from zerobert.engine import Engine
from zerobert.errors import ConfigError, TrainingDivergedError
from zerobert.kernels import Kernels
from zerobert.optim import build_optimizer, optimizer_config
from zerobert.signals import StopRequest


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
        for name, flag in (
            ("learning_rate", "learning_rate"),
            ("num_epochs", "num_train_epochs"),
            ("logging_steps", "logging_steps"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{flag}: wanted above 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed: wanted 0 to 2^63 - 1, got {self.seed}")
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

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        chosen = dataclasses.asdict(self)
        del chosen["logging_steps"]
        if not self.keeps_best and self.patience is None:
            del chosen["save_steps"]  # else it says between which models there is a choice
        return chosen

    def count_steps(self, num_examples: int, batch_size: int) -> int:
        """The length of the run in steps."""
        steps = math.ceil(self.num_epochs * math.ceil(num_examples / batch_size))
        return min(steps, self.max_steps) if self.max_steps else steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """A moment of the training at which the model should be looked at.

    Attributes:
        saves: the model is to be kept as it is, as `save_steps` asks.
        exit_code: of a signal that asks to end; 0 for none.
        is_due: it would be so without the signal, too.
    """

    step: int
    saves: bool
    exit_code: int = 0
    is_due: bool = True


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
        _all_batches(len(examples), batch_size, settings.seed), first_step, total_steps
    )
    for step, (epoch, number, ends_epoch, indices) in enumerate(batches, start=first_step + 1):
        # As in DeepSpeed, a step that an overflow left out does not move the schedule.
        rate = settings.learning_rate * schedule.factor(
            settings.schedule, step - 1 - engine.skipped_steps, total=total_steps
        )
        recent.append(train_step(engine, examples, indices, rate, settings.seed, step))
        exit_code = stop_code(stop)
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
        is_due = saves or is_epoch_review or step == total_steps
        if is_due or exit_code:
            paused = time.perf_counter()
            yield Review(step=step, saves=saves, exit_code=exit_code, is_due=is_due)
            if exit_code:
                return
            engine.train()
            started += time.perf_counter() - paused


def _all_batches(
    num_examples: int, batch_size: int, seed: int
) -> Iterator[tuple[int, int, bool, Indices]]:
    """Epoch from 0, batch from 1, whether it is the epoch's last, and its examples; without end."""
    for epoch in itertools.count():
        batches = epoch_batches(num_examples, batch_size=batch_size, seed=seed, epoch=epoch)
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
