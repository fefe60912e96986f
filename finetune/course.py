"""A training from its first step to the model that is kept, over all that may end it in between.

Until it has come to its end `OUT/state/` holds what it takes to go on, and the weights that are
kept. What it is that is learnt, a task on sentences or on questions, is for a `Course` to say.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune import loop, output
from finetune.batches import Split, Stopped, plain_forward
from zerobert import distributed, manifest, training_state
from zerobert.device import this_device
from zerobert.ds_config import check_same_run, flatten
from zerobert.engine import Engine
from zerobert.errors import CheckpointError, exit_code
from zerobert.served import computes_in
from zerobert.signals import StopRequest
from zerobert.training_state import StateReader

_BEST_NAME = "best.safetensors"

Weights = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on the main dev set, and the metrics and the logits NC of all of them."""

    loss: float | None
    metrics: dict[str, float]
    logits: tuple[npt.NDArray[np.float32], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What is learnt, and how a model is judged.

    Attributes:
        name: of the task.
        metric: the one that the best model is the best by.
        source: all that decides what comes out, except the inputs, as it will be read from a file.
        inputs: name -> sha256.
        evaluate: scores a model's forward at a step; collective.
        save_step: writes a model on the way, its weights and evaluation, into a folder.
        new_model: of random weights.
        load_start: gives a model the weights that the training starts from.
    """

    name: str
    metric: str
    train: Split
    source: Mapping[str, Any]
    inputs: Mapping[str, str]
    evaluate: Callable[[Callable[..., Any], int], Evaluation]
    save_step: Callable[[Weights, Evaluation, Path], None]
    new_model: Callable[[], nn.Module]
    load_start: Callable[[nn.Module], None]


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a training has come.

    Attributes:
        saved_steps: of the `step_<n>` folders.
        kept_step: of the model that is kept: the best one or the last.
        kept: its evaluation; None where that was not done in this process.
        num_worse: evaluations in a row without a better value.
        owes_review: the step is one to be evaluated at, and a signal came before that.
        elapsed_s: of training and evaluation; `earlier_s` of it in processes before this one.
    """

    step: int = 0
    elapsed_s: float = 0.0
    earlier_s: float = 0.0
    saved_steps: list[int] = dataclasses.field(default_factory=list)
    kept_step: int = 0
    best_value: float | None = None
    num_worse: int = 0
    owes_review: bool = False
    kept: Evaluation | None = None


def announce(name: str, start: str, out: Path, seed: int) -> None:
    """Print what is about to be trained."""
    ranks = distributed.world_size()
    place = this_device().type + (f" x {ranks}" if ranks > 1 else "")
    print(f"{name}: from {start} to {out}, seed {seed}, on {place}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The model that is kept, on this process's device, and how it was come by."""

    model: nn.Module
    forward: Callable[..., Any]
    progress: Progress
    evaluation: Evaluation


def as_it_is(
    model: nn.Module,
    settings: loop.Settings,
    evaluate: Callable[[Callable[..., Any], int], Evaluation],
) -> Outcome:
    """The outcome where nothing is to be trained; collective."""
    forward = plain_forward(model, computes_in(settings.deepspeed), this_device())
    evaluation = evaluate(forward, 0)
    return Outcome(model=model, forward=forward, progress=Progress(), evaluation=evaluation)


def run(
    course: Course, settings: loop.Settings, out: Path, stop: StopRequest, *, resumes: bool
) -> Outcome:
    """Train, and have the model that is kept; collective.

    Args:
        out: the output folder.
        resumes: go on from what a training of the same settings left there.

    Raises:
        TrainingDivergedError: the loss is no longer finite.
        DataError: something can't be written.
        SystemExit: a signal asked to end; the state is saved.
    """
    torch.manual_seed(settings.seed)
    model = course.new_model()
    with distributed.one_voice():
        course.load_start(model)
    progress = train(course, model, settings, out, stop, resumes=resumes)
    model = course.new_model()
    with distributed.one_voice():
        model.load_state_dict(_kept_weights(settings, out / output.STATE_NAME))
    forward = plain_forward(model, computes_in(settings.deepspeed), this_device())
    evaluation = progress.kept or course.evaluate(forward, progress.kept_step)
    return Outcome(model=model, forward=forward, progress=progress, evaluation=evaluation)


def train(
    course: Course,
    model: nn.Module,
    settings: loop.Settings,
    out: Path,
    stop: StopRequest,
    *,
    resumes: bool,
) -> Progress:
    """Train to the end, leaving the state with the weights that are kept; collective.

    Raises:
        SystemExit: a signal asked to end; the state is saved.
    """
    started = time.perf_counter()
    engine = loop.start_engine(model, settings)
    folder = out / output.STATE_NAME
    progress = Progress()
    with distributed.one_voice():
        saved = _find_state(course, folder) if resumes else None
    if saved is not None:
        with distributed.one_voice():
            engine.restore(StateReader(folder))
        progress = Progress(**saved)
        progress.earlier_s = progress.elapsed_s
        print(f"{course.name}: going on from step {progress.step}, saved in {folder}")
    elif distributed.is_main():
        output.discard_state(out)
    for review in _reviews(course, settings, engine, progress, stop):
        progress.step = review.step
        evaluation = None
        if not review.exit_code:
            engine.train(False)
            try:
                evaluation = course.evaluate(engine.forward, review.step)
            except Stopped as stopped:  # the step itself is done
                review = dataclasses.replace(review, exit_code=exit_code(stopped))
            else:
                _judge(course, settings, progress, evaluation)
        progress.owes_review = review.is_due and review.exit_code != 0
        progress.elapsed_s = progress.earlier_s + time.perf_counter() - started
        _save(course, settings, engine, progress, review, evaluation, folder)
        if review.exit_code:
            print(f"stopped at step {review.step}: the same command goes on from there", flush=True)
            raise SystemExit(review.exit_code)
    if _is_spent(settings, progress):
        print(
            f"step {progress.step}: no better {course.metric} in the last {progress.num_worse} "
            f"evaluations; that of step {progress.kept_step} is kept",
            flush=True,
        )
    engine.close()
    return progress


def _reviews(
    course: Course, settings: loop.Settings, engine: Engine, progress: Progress, stop: StopRequest
) -> Iterator[loop.Review]:
    """The moments to look at the model, until there are no steps or there is no patience left."""
    if progress.owes_review:
        saves = settings.save_steps is not None and progress.step % settings.save_steps == 0
        yield loop.Review(step=progress.step, saves=saves)
    steps = loop.train(engine, course.train, settings, stop, first_step=progress.step)
    while not _is_spent(settings, progress) and (review := next(steps, None)) is not None:
        yield review


def _is_spent(settings: loop.Settings, progress: Progress) -> bool:
    return settings.patience is not None and progress.num_worse >= settings.patience


def _judge(
    course: Course, settings: loop.Settings, progress: Progress, evaluation: Evaluation
) -> None:
    """Note whether this is the model to keep."""
    value = evaluation.metrics[course.metric]
    is_better = progress.best_value is None or value > progress.best_value
    progress.num_worse = 0 if is_better else progress.num_worse + 1
    if is_better:
        progress.best_value = value
    if is_better or not settings.keeps_best:
        progress.kept_step, progress.kept = progress.step, evaluation


def _save(
    course: Course,
    settings: loop.Settings,
    engine: Engine,
    progress: Progress,
    review: loop.Review,
    evaluation: Evaluation | None,
    folder: Path,
) -> None:
    """The state to go on from, with the weights that are kept, and `step_<n>` where asked for."""
    if not settings.keeps_best:
        progress.kept_step = progress.step
    saves_model = review.saves and evaluation is not None
    if saves_model:
        progress.saved_steps.append(review.step)

    def finish(reader: StateReader, staging: Path) -> None:
        if saves_model:
            assert evaluation is not None
            place = folder.parent / f"step_{review.step}"
            course.save_step(dict(reader.weights()), evaluation, place)
        if settings.keeps_best:
            with manifest.writing(staging):
                if progress.kept_step == progress.step:
                    training_state.save_tensors(dict(reader.weights()), staging / _BEST_NAME)
                elif progress.best_value is not None:
                    shutil.copy2(folder / _BEST_NAME, staging / _BEST_NAME)

    noted = {
        field.name: getattr(progress, field.name)
        for field in dataclasses.fields(progress)
        if field.name not in ("kept", "earlier_s")
    }
    training_state.write_state(
        folder,
        engine.snapshot(),
        config={"run": course.source, "progress": noted},
        inputs=course.inputs,
        finish=finish,
    )


def _find_state(course: Course, folder: Path) -> dict[str, Any] | None:
    """What was noted of a training that did not come to its end, its files verified.

    Raises:
        ConfigError: it was of other settings or inputs.
        ManifestError: the state is damaged.
    """
    if not manifest.is_complete(folder):
        return None
    check_state(course.source, course.inputs, folder)
    progress: dict[str, Any] = manifest.verify_folder(folder).config["progress"]
    return progress


def check_state(source: Mapping[str, Any], inputs: Mapping[str, str], folder: Path) -> None:
    """Hold the state of a training that did not come to its end, if there is one, against this one.

    Args:
        source, inputs: see `Course`.

    Raises:
        ConfigError: it was of other settings or inputs.
    """
    if manifest.is_complete(folder):
        record = manifest.read_manifest(folder)
        before = {**flatten(record.config["run"]), **record.inputs}
        check_same_run(before, {**flatten(source), **inputs}, str(folder))


def _kept_weights(settings: loop.Settings, folder: Path) -> dict[str, torch.Tensor]:
    if not settings.keeps_best:
        return dict(StateReader(folder).weights())
    try:
        return load_file(folder / _BEST_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _BEST_NAME} can't be read: {error}") from error


def jsonable(value: Any) -> Any:
    """As it will be read back from a file."""
    return json.loads(json.dumps(value))
