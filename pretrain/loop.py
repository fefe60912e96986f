"""The training loop and the evaluation: read it from top to bottom."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain import state as run_state
from pretrain.data import StepBatch, StepLoader, dropout_seed
from pretrain.guard import GuardConfig, SpikeGuard
from pretrain.progress import progress_line
from pretrain.state import Saver, TrainState
from zerobert import distributed, signals
from zerobert.device import copied_to, peak_memory_bytes
from zerobert.engine import Engine
from zerobert.errors import EXIT_USER, DataError, TrainingDivergedError
from zerobert.model import PretrainingLosses
from zerobert.signals import StopRequest
from zerobert.tracking import Tracker

_REMEDY = (
    "lower the learning rate or lengthen the warm-up, and start in another --output_dir, anew or "
    "from a model before it (--init_from)"
)
_WITHOUT_ROLLBACK = (
    'where a state was saved before, set "guard": {"action": "rollback"} in the JSON\'s "bert" '
    "section and run the same command again, which leaves out the samples that did it; else "
    + _REMEDY
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop itself uses of an experiment.

    Attributes:
        total_steps, max_train_s: the limit that is met first ends the run; None for no such limit.
        rate: the learning rate of an update, from the updates and the seconds before it.
        begins_elsewhere: the state that it begins from lies in another run's folder.
    """

    total_steps: int | None
    max_train_s: float | None
    logging_steps: int
    save_steps: int
    eval_steps: int
    seed: int
    rate: Callable[[int, float], float]
    rows_of_epoch: int
    flops_per_sequence: float
    nsp: bool = True
    peak_flops: float | None
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    begins_elsewhere: bool = False


@dataclasses.dataclass(kw_only=True)
class Window:
    """What has added up since the last log line; the losses stay on the device until then."""

    mlm_loss_sum: Tensor | float = 0.0
    nsp_loss_sum: Tensor | float = 0.0
    num_masked: float = 0.0
    samples: int = 0
    tokens: int = 0
    steps: int = 0
    lr: float = 0.0
    reader_s: float = 0.0
    started_s: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, losses: PretrainingLosses) -> None:
        """Add one micro-step's sums."""
        self.mlm_loss_sum = self.mlm_loss_sum + losses.mlm_loss_sum.detach()
        self.nsp_loss_sum = self.nsp_loss_sum + losses.nsp_loss_sum.detach()


HeldOut = Callable[[bool], Iterable[tuple[dict[str, Tensor], bool]]]


def train(
    engine: Engine,
    loader: StepLoader,
    held_out: HeldOut | None,
    state: TrainState,
    cfg: LoopConfig,
    saver: Saver,
    tracker: Tracker | None,
    stop: StopRequest,
    profiler: Any = None,
) -> int:
    """Train to the last step, to the end of the time, or until asked to stop; saves in each case.

    Where the guard is set to `rollback`, a training that goes wrong goes on from an earlier state
    behind the samples that it went wrong on.

    Args:
        held_out: gives this rank's held-out batches, all of them when called with True; None where
            there are none.
        tracker: rank 0's; None on the others.

    Returns:
        0, or the exit code of the signal that ended the run.

    Raises:
        TrainingDivergedError: the loss is not a finite number, or far above what it was.
        DataError: a save failed.
    """
    exit_code = agreed_exit_code(stop)
    if exit_code:  # asked to end before there was anything to save
        return exit_code
    num_rollbacks = 0
    while True:
        try:
            exit_code = train_on(
                engine, loader, held_out, state, cfg, saver, tracker, stop, profiler
            )
        except TrainingDivergedError as error:
            if cfg.guard.action == "stop":
                raise TrainingDivergedError(f"{error}; {_WITHOUT_ROLLBACK}") from error
            if num_rollbacks == cfg.guard.max_rollbacks:
                raise TrainingDivergedError(
                    f"{error}, after {num_rollbacks} rollbacks; {_REMEDY}"
                ) from error
            num_rollbacks += 1
            roll_back(engine, state, cfg, saver, tracker, error)
        else:
            saver.wait()
            return exit_code


def train_on(
    engine: Engine,
    loader: StepLoader,
    held_out: HeldOut | None,
    state: TrainState,
    cfg: LoopConfig,
    saver: Saver,
    tracker: Tracker | None,
    stop: StopRequest,
    profiler: Any,
) -> int:
    """`train`, as long as nothing goes wrong."""
    engine.train()
    exit_code = 0
    fault: DataError | SystemExit | None = None
    window, spikes = Window(), SpikeGuard(cfg.guard)
    saved_step = None if cfg.begins_elsewhere else state.step
    started_s = time.perf_counter() - state.elapsed_s
    last_step = math.inf if cfg.total_steps is None else cfg.total_steps
    budget_s = math.inf if cfg.max_train_s is None else cfg.max_train_s
    steps = loader.steps(state.position)
    with contextlib.closing(steps) as batches:  # type: ignore[type-var]
        while state.step < last_step and not exit_code:
            waited_s = time.perf_counter()
            batch: StepBatch | None = None
            try:
                batch = next(batches)
            except DataError as error:
                fault = error
            window.reader_s += time.perf_counter() - waited_s

            shared = share(batch, time.perf_counter() - started_s, stop)
            exit_code = shared.exit_code
            if batch is None or not shared.is_readable:
                fault = fault or SystemExit(EXIT_USER)  # the rank that it happened to tells
                break
            if shared.elapsed_s >= budget_s:
                state.elapsed_s = shared.elapsed_s
                break
            # As in DeepSpeed, a step that an overflow left out does not move the schedule.
            window.lr = cfg.rate(state.step - engine.skipped_steps, shared.elapsed_s)
            # Before the step: where it goes wrong, its samples are among those to be left out.
            state.advance(samples=engine.global_batch_samples, tokens=shared.num_tokens)
            train_step(engine, batch, shared, window, cfg.seed)
            state.elapsed_s = time.perf_counter() - started_s
            if profiler is not None:
                profiler.step()

            is_last = state.step == last_step
            if state.step % cfg.logging_steps == 0 or is_last or exit_code:
                loss = log(engine, window, state, cfg, tracker)  # waits for the device
                spikes.check(loss, state.step)
                window = Window()
            pause_s = time.perf_counter()
            saver.check()
            if state.step % cfg.save_steps == 0 or is_last or exit_code:
                check_finite(engine, window, state.step)
                saver.save(engine, state)
                saved_step = state.step
            is_review = cfg.eval_steps and state.step % cfg.eval_steps == 0
            if held_out and is_review and not is_last and not exit_code:
                try:
                    exit_code = evaluate(engine, held_out(False), state.step, tracker, stop)
                except (DataError, SystemExit) as error:  # the training is sound: it is saved
                    fault = error
                    break
            window.started_s += time.perf_counter() - pause_s
    # The time was over between two lines, or a signal came during an evaluation on the way.
    if window.steps:
        log(engine, window, state, cfg, tracker)
    if saved_step != state.step:
        check_finite(engine, window, state.step)
        saver.save(engine, state)
    if fault is not None:
        saver.wait()
        raise fault
    if held_out and not exit_code:
        exit_code = evaluate(engine, held_out(True), state.step, tracker, stop)
    return exit_code


def roll_back(
    engine: Engine,
    state: TrainState,
    cfg: LoopConfig,
    saver: Saver,
    tracker: Tracker | None,
    error: TrainingDivergedError,
) -> None:
    """Bring the engine and `state` back to where a state was saved, and skip what came after it;
    collective.

    Raises:
        TrainingDivergedError: there is no state to go back to.
    """
    wrong = dataclasses.replace(state)
    target = saver.go_back(wrong, cfg.guard.rollback_states, str(error))
    if target is None:
        raise TrainingDivergedError(f"{error}, and no state was saved before; {_REMEDY}") from error
    restored = run_state.restore(engine, target)
    restored.position = wrong.position
    # The time that was lost is spent all the same.
    restored.elapsed_s = wrong.elapsed_s
    for field in dataclasses.fields(state):
        setattr(state, field.name, getattr(restored, field.name))
    if tracker is not None:
        print(
            f"rolled back from step {wrong.step} to step {state.step}: {error}; the samples up to "
            f"number {wrong.position - 1} are left out",
            flush=True,
        )
        tracker.event(wrong.step, "rollback", to_step=state.step, reason=str(error))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What every rank knows before a step, and all know alike.

    Attributes:
        num_masked: masked positions of the global batch.
        num_tokens: its tokens, padding not counted.
        elapsed_s: seconds trained so far, by rank 0's clock: one rate and one end for all.
        exit_code: of a signal that any rank has received; 0 for none.
        is_readable: every rank has its part of the batch.
    """

    num_masked: float
    num_tokens: int
    elapsed_s: float
    exit_code: int
    is_readable: bool


def share(batch: StepBatch | None, elapsed_s: float, stop: StopRequest) -> Shared:
    """Add up what the ranks know; collective.

    Args:
        batch: None where this rank's part of it can't be read.
    """
    num_masked, num_tokens, num_unreadable, agreed_s, *flags = distributed.all_reduce_sum(
        [
            batch.num_masked if batch else 0,
            batch.num_tokens if batch else 0,
            float(batch is None),
            elapsed_s if distributed.is_main() else 0.0,
            *signals.flags(stop),
        ]
    )
    return Shared(
        num_masked=num_masked,
        num_tokens=int(num_tokens),
        elapsed_s=agreed_s,
        exit_code=signals.agreed_code(flags),
        is_readable=num_unreadable == 0,
    )


def train_step(engine: Engine, batch: StepBatch, shared: Shared, window: Window, seed: int) -> None:
    """One optimizer step over the global batch, at the window's learning rate.

    The masked-LM loss is the mean over all masked positions of the global batch, however it is cut
    into ranks and micro-steps; dropout depends on the samples alone.
    """
    for micro, first in zip(batch.micro_batches, batch.first_samples, strict=True):
        torch.manual_seed(dropout_seed(seed, first))
        losses = engine.forward(**{name: copied_to(engine.device, x) for name, x in micro.items()})
        mlm_share = losses.mlm_loss_sum / max(shared.num_masked, 1)
        nsp_share = losses.nsp_loss_sum / engine.global_batch_samples
        engine.backward(mlm_share + nsp_share)
        engine.step(window.lr)
        window.add(losses)
    window.num_masked += shared.num_masked
    window.samples += engine.global_batch_samples
    window.tokens += shared.num_tokens
    window.steps += 1


def log(
    engine: Engine,
    window: Window,
    state: TrainState,
    cfg: LoopConfig,
    tracker: Tracker | None,
) -> float:
    """Means over the window: to the console, metrics.jsonl and the trackers; collective.

    Returns:
        The mean loss.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    mlm_sum, nsp_sum = distributed.all_reduce_sum(
        [float(window.mlm_loss_sum), float(window.nsp_loss_sum)]
    )
    mlm_loss, nsp_loss = mlm_sum / max(window.num_masked, 1), nsp_sum / window.samples
    seconds = time.perf_counter() - window.started_s
    samples_per_s = window.samples / seconds
    flops_per_s = samples_per_s * cfg.flops_per_sequence / distributed.world_size()
    epoch, position = divmod(state.position, cfg.rows_of_epoch)
    metrics = {
        "samples": state.samples,
        "tokens": state.tokens,
        "epoch": state.position / cfg.rows_of_epoch,
        "elapsed_s": state.elapsed_s,
        "train/loss": mlm_loss + nsp_loss,
        "train/mlm_loss": mlm_loss,
        "train/nsp_loss": nsp_loss if cfg.nsp else None,
        "train/lr": window.lr,
        "train/grad_norm": engine.grad_norm,
        "train/loss_scale": engine.loss_scale,
        "train/skipped_steps": engine.skipped_steps,
        "perf/samples_per_s": samples_per_s,
        "perf/tokens_per_s": window.tokens / seconds,
        "perf/mfu": flops_per_s / cfg.peak_flops if cfg.peak_flops else None,
        "perf/data_wait_frac": window.reader_s / seconds,
        "perf/peak_memory_bytes": -distributed.all_reduce_min(-peak_memory_bytes(engine.device)),
    }
    if tracker is not None:
        print(
            f"global step: {state.step}, epoch: {epoch}, "
            f"batch: {position // engine.global_batch_samples}, loss: {mlm_loss + nsp_loss:f}, "
            f"avg_reader_cost: {window.reader_s / window.steps:.5f} sec, "
            f"avg_batch_cost: {seconds / window.steps:.5f} sec, "
            f"avg_samples: {window.samples / window.steps:.5f}, "
            f"ips: {samples_per_s:.5f} sequences/sec",
            flush=True,
        )
        line = progress_line(
            state.step,
            metrics,
            total_steps=cfg.total_steps,
            max_train_s=cfg.max_train_s,
            accuracy=tracker.latest("eval/mlm_accuracy"),
        )
        print(line, flush=True)
        tracker.log(state.step, metrics)
    check_finite(engine, window, state.step)
    return mlm_loss + nsp_loss


def check_finite(engine: Engine, window: Window, step: int) -> None:
    """Stop before weights that are no numbers are saved; collective.

    Raises:
        TrainingDivergedError: the loss is none.
    """
    here = float(window.mlm_loss_sum) + float(window.nsp_loss_sum)
    (total,) = distributed.all_reduce_sum([here])
    if not math.isfinite(total):
        raise TrainingDivergedError(f"the loss is no finite number at step {step}")


def agreed_exit_code(stop: StopRequest) -> int:
    """The exit code of a signal that any rank has received, 0 for none; collective."""
    return signals.agreed_code(distributed.all_reduce_sum(signals.flags(stop)))


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[tuple[dict[str, Tensor], bool]],
    step: int,
    tracker: Tracker | None,
    stop: StopRequest,
) -> int:
    """Log held-out losses and accuracies with exact counts over all ranks; collective.

    Args:
        batches: as many on every rank, each with whether it counts.

    Returns:
        0, or the exit code of a signal; nothing is logged of an evaluation that it cut short.

    Raises:
        DataError: a held-out row can't be read; SystemExit on the ranks that it did not happen to.
    """
    engine.train(False)
    sums = torch.zeros(7, dtype=torch.float64, device=engine.device)
    bar = tqdm(
        batches,
        desc="evaluate",
        leave=False,
        disable=not (distributed.is_main() and sys.stderr.isatty()),
    )
    remaining = iter(bar)
    while True:
        with distributed.one_voice():
            held_out = next(remaining, None)
        exit_code = agreed_exit_code(stop)
        if held_out is None or exit_code:
            break
        batch, counts = held_out
        inputs = {name: copied_to(engine.device, x) for name, x in batch.items()}
        losses = engine.evaluate(**inputs)
        masked = inputs["masked_lm_positions"].count_nonzero()
        num_rows = torch.full((), len(batch["input_ids"]), device=engine.device)
        parts: Sequence[Tensor] = [
            losses.mlm_loss_sum,
            losses.mlm_correct,
            masked,
            losses.nsp_loss_sum,
            losses.nsp_correct,
            losses.nsp_rows,
            num_rows,
        ]
        sums += counts * torch.stack([part.detach().double() for part in parts])
    bar.close()
    engine.train()
    *mlm, nsp_loss, nsp_correct, nsp_rows, rows = distributed.all_reduce_sum(sums.tolist())
    mlm_loss, mlm_correct, num_masked = mlm
    if exit_code or tracker is None:
        return exit_code
    metrics = {
        "eval/mlm_loss": mlm_loss / max(num_masked, 1),
        "eval/mlm_accuracy": mlm_correct / max(num_masked, 1),
        "eval/nsp_loss": nsp_loss / nsp_rows if nsp_rows else None,
        "eval/nsp_accuracy": nsp_correct / nsp_rows if nsp_rows else None,
        "eval/rows": int(rows),
    }
    tracker.log(step, metrics)
    nsp = f"nsp_accuracy: {nsp_correct / nsp_rows:f}, " if nsp_rows else ""
    print(
        f"eval step: {step}, mlm_loss: {metrics['eval/mlm_loss']:f}, "
        f"mlm_accuracy: {metrics['eval/mlm_accuracy']:f}, {nsp}rows: {rows:.0f}",
        flush=True,
    )
    return 0


def profile(output_dir: Path) -> Any:
    """A torch profiler of six steps after warm-up, that writes `trace.json` for chrome://tracing."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=2, active=6, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(output_dir / "trace.json")),
        record_shapes=True,
    )
