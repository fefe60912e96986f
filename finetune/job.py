"""One task, from its files and a pretrained model to a fine-tuned model with its score."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune import batches, course, data, loop, metrics, output, report
from finetune.course import Evaluation, Weights, jsonable
from finetune.data import Examples, Labels
from finetune.tasks import Split, Task
from zerobert import checkpoint, distributed, manifest
from zerobert.checkpoint import ModelFolder
from zerobert.device import this_device
from zerobert.errors import ConfigError
from zerobert.model import BertForSequenceClassification, num_parameters
from zerobert.served import computes_in
from zerobert.signals import StopRequest
from zerobert.tokenizer import WordPieceTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A task with its data read and encoded and the model to start from: what every seed shares.

    Attributes:
        versions: source -> sha256 of all that the model comes from.
        test_versions: of the test sets that are to be answered.
        stop: asked between the batches of evaluations.
    """

    task: Task
    folder: ModelFolder
    tokenizer: WordPieceTokenizer
    random_init: bool
    train: batches.Encoded | None
    dev: tuple[batches.Encoded, ...]
    test: tuple[batches.Encoded, ...]
    dev_examples: tuple[Examples, ...]
    versions: dict[str, str]
    test_versions: dict[str, str]
    max_seq_length: int
    stop: StopRequest | None


def prepare(
    task: Task,
    *,
    model: str,
    random_init: bool,
    data_dir: Path | None,
    max_seq_length: int | None,
    do_predict: bool,
    stop: StopRequest | None = None,
) -> Job:
    """Open the model and read the data; every fault of the input shows here, before any training;
    collective.

    Args:
        max_seq_length: None for 128, or less where the model was made for less.
        stop: asked between the splits, too.

    Raises:
        ZerobertError: the model or the data can't be used.
        SystemExit: a signal asked to end.
    """
    with distributed.one_voice():
        folder = checkpoint.open_model(model)
        tokenizer = checkpoint.load_tokenizer(folder)
        length = batches.choose_length(folder, max_seq_length, batches.SEQ_LENGTH)
        _check_labels(task, folder)
        where = data.choose_folder(task, data_dir) if task.folders else Path()
        task = data.with_labelled(task, where)
        versions = {"model": checkpoint.version(folder.path), "vocabulary": tokenizer.sha256}
    test_versions: dict[str, str] = {}

    def read(split: Split, noted: dict[str, str]) -> tuple[Examples, batches.Encoded]:
        with distributed.one_voice():
            examples = data.load_split(task, split, where)
            noted[examples.source] = examples.version
            print(f"{task.name}: {len(examples)} examples from {examples.source}")
            encoded = batches.encode(examples, tokenizer, max_seq_length=length)
        batches.end_if_asked(stop)
        return examples, encoded

    train = read(task.train, versions)[1] if task.train else None
    dev = [read(split, versions) for split in task.dev]
    return Job(
        task=task,
        folder=folder,
        tokenizer=tokenizer,
        random_init=random_init and task.train is not None,
        train=train,
        dev=tuple(encoded for _, encoded in dev),
        test=tuple(read(split, test_versions)[1] for split in _tests(task, do_predict)),
        dev_examples=tuple(examples for examples, _ in dev),
        max_seq_length=length,
        versions=versions,
        test_versions=test_versions,
        stop=stop,
    )


def _tests(task: Task, do_predict: bool) -> Sequence[Split]:
    """The test sets that are answered: of a task that can't be trained on there is nothing else."""
    return task.test if do_predict or not task.train else ()


def prediction_names(task: Task, do_predict: bool) -> list[str]:
    """The names of the files with the answers to the test sets."""
    return [f"{split.submission}.tsv" for split in _tests(task, do_predict)]


def _check_labels(task: Task, folder: ModelFolder) -> None:
    if task.trained_on and folder.labels != task.label_names:
        raise ConfigError(
            f"{task.name} has no training set: a model fine-tuned on {task.trained_on} answers it, "
            f"and {folder.path} is none; fine-tune on {task.trained_on} and give its output folder"
        )


def run_seeds(
    job: Job,
    settings: loop.Settings,
    seeds: Sequence[int],
    out: Path,
    stop: StopRequest,
    *,
    resumes: bool,
) -> dict[str, Any]:
    """Fine-tune with each seed into `out/seed_<s>` and copy the best into `out`; collective.

    One seed is fine-tuned in `out` itself. A task without a training set has nothing to seed.

    Args:
        resumes: go on from what a run with the same settings left when it was ended.

    Raises:
        TrainingDivergedError: the loss of a run is no longer finite.
        DataError: something can't be written.
        SystemExit: a signal asked to end.
    """
    if resumes:  # before one of them is trained anew
        with distributed.one_voice():
            check_states(job, settings, seeds, out)
    if len(seeds) == 1 or not job.train:
        return run(job, _with_seed(settings, seeds[0]), out, stop, resumes=resumes)
    reuses = resumes and finished(job, settings, seeds, out) is None
    results = []
    for seed in seeds:
        batches.end_if_asked(stop)
        folder, own = out / f"seed_{seed}", _with_seed(settings, seed)
        with distributed.one_voice():
            if distributed.is_main():
                output.finish_replacement(folder)
        done = finished(job, own, [seed], folder) if reuses else None
        if done is not None:
            print(f"{job.task.name}: seed {seed} is finished in {folder}")
            if distributed.is_main():
                output.discard_spent_state(folder)
            answer_tests(job, own, folder)
        results.append(done or run(job, own, folder, stop, resumes=resumes))
    result = metrics.summarize_seeds(results)
    with distributed.one_voice():
        if distributed.is_main():
            _keep_seed(out, result, seeds)
    return result


def check_states(job: Job, settings: loop.Settings, seeds: Sequence[int], out: Path) -> None:
    """Refuse a folder with the state of another training, which would be written over.

    Raises:
        ConfigError: names what differs.
    """
    own = jsonable(_source(job, settings))
    if job.train and len(seeds) > 1:
        own["settings"]["seed"] = list(seeds)  # none of them is trained in `out` itself
        for seed in seeds:
            state = out / f"seed_{seed}" / output.STATE_NAME
            source = jsonable(_source(job, _with_seed(settings, seed)))
            course.check_state(source, job.versions, state)
    course.check_state(own, job.versions, out / output.STATE_NAME)


def _with_seed(settings: loop.Settings, seed: int) -> loop.Settings:
    return dataclasses.replace(settings, seed=seed)


def _keep_seed(out: Path, result: Mapping[str, Any], seeds: Sequence[int]) -> None:
    with _copied(
        out / f"seed_{result['seed']}", out, keep=[f"seed_{seed}" for seed in seeds]
    ) as staging:
        manifest.write_json(staging / output.RESULT_NAME, result)


@contextlib.contextmanager
def _copied(source: Path, out: Path, *, keep: Collection[str], **noted: Any) -> Iterator[Path]:
    """Yield a folder with a finished model's files, which then become those of `out`."""
    record = manifest.read_manifest(source)
    with output.replacing(
        out, config={**record.config, **noted}, inputs=record.inputs, keep=keep
    ) as staging:
        with manifest.writing(staging):
            for name in record.files:
                shutil.copy2(source / name, staging / name)
        yield staging


def finished(
    job: Job, settings: loop.Settings, seeds: Sequence[int], out: Path
) -> dict[str, Any] | None:
    """The result of an earlier run of the same settings and inputs, where it came to its end."""
    if not manifest.is_complete(out) or not (out / output.RESULT_NAME).is_file():
        return None
    wanted = list(seeds) if job.train else [seeds[0]]
    record = manifest.read_manifest(out)
    runs = [jsonable(_source(job, _with_seed(settings, seed))) for seed in wanted]
    if record.config.get("run") not in runs or record.inputs != job.versions:
        return None
    result: dict[str, Any] = json.loads((out / output.RESULT_NAME).read_text(encoding="utf-8"))
    return result if [one["seed"] for one in result.get("all", [result])] == wanted else None


def answer_tests(job: Job, settings: loop.Settings, out: Path) -> None:
    """Add the predictions that are asked for to a finished model that has none; collective."""
    noted = manifest.read_manifest(out).config
    if not job.test or noted.get("tests") == job.test_versions:
        return
    model = _new_model(job, settings)
    with distributed.one_voice():
        checkpoint.load_weights(model, checkpoint.open_model(str(out)))
    forward = batches.plain_forward(model, computes_in(settings.deepspeed), this_device())
    predictions = _predict(job, forward)
    with distributed.one_voice():
        if distributed.is_main():
            keep = noted.get("folders", ())
            with _copied(out, out, keep=keep, tests=job.test_versions) as staging:
                _write_predictions(job, predictions, staging)


def run(
    job: Job, settings: loop.Settings, out: Path, stop: StopRequest, *, resumes: bool
) -> dict[str, Any]:
    """Fine-tune once and write the model, its `result.json` and, where asked for, its predictions;
    collective.

    Returns:
        What `result.json` says.
    """
    started = time.perf_counter()
    start = "random weights" if job.random_init else str(job.folder.path)
    output.announce_replacement(out)
    course.announce(job.task.name, start, out, settings.seed)
    if job.train:
        made = course.run(_course(job, settings), settings, out, stop, resumes=resumes)
    else:
        made = _as_it_is(job, settings)
    predictions = _predict(job, made.forward)
    progress, evaluation = made.progress, made.evaluation
    wall_s = progress.earlier_s + time.perf_counter() - started
    result = _describe(job, settings, made, wall_s)
    with distributed.one_voice():
        if distributed.is_main():
            with output.replacing(
                out,
                config={
                    "run": _source(job, settings),
                    "step": progress.kept_step,
                    "tests": job.test_versions,
                },
                inputs=job.versions,
                keep=[f"step_{step}" for step in progress.saved_steps],
            ) as staging:
                checkpoint.write_model_files(
                    staging,
                    made.model.state_dict(),
                    job.folder.config,
                    job.tokenizer,
                    card=_card(job, settings, evaluation),
                    labels=job.task.label_names,
                    is_regression=job.task.is_regression,
                )
                _write_predictions(job, predictions, staging)
                _write_report(job, settings, evaluation, result, staging / report.REPORT_NAME)
                manifest.write_json(staging / output.RESULT_NAME, result)
    return result


def _as_it_is(job: Job, settings: loop.Settings) -> course.Outcome:
    """The model of a task that has nothing to train on."""
    model = _new_model(job, settings)
    _load_start(job, model)
    return course.as_it_is(model, settings, lambda forward, step: evaluate(job, forward, step))


def _new_model(job: Job, settings: loop.Settings) -> BertForSequenceClassification:
    return BertForSequenceClassification(job.folder.config, job.task.num_outputs, settings.kernels)


def _load_start(job: Job, model: nn.Module) -> None:
    """The weights to start from; a classifier only where it answers with the same labels."""
    if job.random_init:
        return
    task, folder = job.task, job.folder
    answers_alike = folder.labels == task.label_names and folder.is_regression == task.is_regression
    new = checkpoint.load_weights(model, folder, with_task_head=answers_alike)
    if "classifier.weight" not in new and task.train:
        print(f"{task.name}: the classifier of {folder.path} is trained on")
    if any(name.startswith("bert.pooler.") for name in new):
        print(f"{task.name}: the pooler is new: {folder.path} has none")


def _course(job: Job, settings: loop.Settings) -> course.Course:
    assert job.train is not None

    def save_step(weights: Weights, evaluation: Evaluation, folder: Path) -> None:
        _save_step(job, weights, settings, evaluation, folder)

    return course.Course(
        name=job.task.name,
        metric=job.task.metrics[0],
        train=job.train,
        source=jsonable(_source(job, settings)),
        inputs=job.versions,
        evaluate=lambda forward, step: evaluate(job, forward, step),
        save_step=save_step,
        new_model=lambda: _new_model(job, settings),
        load_start=lambda model: _load_start(job, model),
    )


def evaluate(job: Job, forward: Callable[..., torch.Tensor], step: int) -> Evaluation:
    """Score a model on every dev set and print PaddleNLP's line; collective.

    Args:
        forward: see `batches.predict`.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    if not job.dev:
        return Evaluation(loss=None, metrics={})
    losses: list[float] = []
    scores: dict[str, float] = {}
    logits: list[npt.NDArray[np.float32]] = []
    for split, encoded in zip(job.task.dev, job.dev, strict=True):
        labels = _labels(encoded)
        logits_NC = batches.predict(forward, encoded, this_device(), job.stop)
        logits.append(logits_NC)
        losses.append(batches.mean_loss(logits_NC, labels))
        loop.check_finite(losses[-1], step)
        split_scores = metrics.score(job.task, labels, metrics.rated(job.task, logits_NC))
        scores |= {name + split.suffix: value for name, value in split_scores.items()}
    shown = ", ".join(
        f"{name.replace('accuracy', 'accu')}: {value:f}" for name, value in scores.items()
    )
    print(f"eval loss: {losses[0]:f}, {shown}", flush=True)
    return Evaluation(loss=losses[0], metrics=scores, logits=tuple(logits))


def _labels(encoded: batches.Encoded) -> Labels:
    assert encoded.labels is not None
    return encoded.labels


def _majority(job: Job) -> float | None:
    """The task's value for a model that answers the training set's commonest class every time."""
    if job.train is None or not job.dev:
        return None
    scores = metrics.majority_scores(job.task, _labels(job.train), _labels(job.dev[0]))
    return scores[job.task.metrics[0]]


def _predict(job: Job, forward: Callable[..., torch.Tensor]) -> list[npt.NDArray[np.float32]]:
    return [batches.predict(forward, split, this_device(), job.stop) for split in job.test]


def _write_predictions(
    job: Job, predictions: Sequence[npt.NDArray[np.float32]], folder: Path
) -> None:
    names = prediction_names(job.task, do_predict=bool(predictions))
    for name, logits_NC in zip(names, predictions, strict=True):
        metrics.write_predictions(folder / name, job.task, metrics.answers(job.task, logits_NC))


def _write_report(
    job: Job,
    settings: loop.Settings,
    evaluation: Evaluation,
    result: dict[str, Any],
    path: Path,
) -> None:
    """The model's page; a task without dev sets has none."""
    if not job.dev:
        return
    dev = [
        report.DevSet(examples=examples, logits_NC=logits_NC, suffix=split.suffix)
        for split, examples, logits_NC in zip(
            job.task.dev, job.dev_examples, evaluation.logits, strict=True
        )
    ]
    report.write_report(
        path,
        job.task,
        dev,
        train_labels=_labels(job.train) if job.train else None,
        title=f"{job.task.name}, seed {settings.seed}",
        settings={
            "model": result["model"],
            "steps": result["steps"],
            "max_seq_length": job.max_seq_length,
            **dataclasses.asdict(settings),
            "inputs": job.versions,
        },
    )


def _save_step(
    job: Job,
    weights: Weights,
    settings: loop.Settings,
    evaluation: Evaluation,
    folder: Path,
) -> None:
    step = int(folder.name.removeprefix("step_"))
    checkpoint.save_model(
        folder,
        weights,
        job.folder.config,
        job.tokenizer,
        card=_card(job, settings, evaluation),
        labels=job.task.label_names,
        is_regression=job.task.is_regression,
        source={"run": _source(job, settings), "step": step},
        inputs=job.versions,
    )


def _describe(
    job: Job, settings: loop.Settings, made: course.Outcome, wall_s: float
) -> dict[str, Any]:
    """What `result.json` says."""
    evaluation = made.evaluation
    return {
        "task": job.task.name,
        "metric": job.task.metrics[0],
        "value": evaluation.metrics.get(job.task.metrics[0]),
        "metrics": evaluation.metrics,
        "majority_baseline": _majority(job),
        "eval_loss": evaluation.loss,
        "num_eval_samples": len(job.dev[0]) if job.dev else 0,
        "seed": settings.seed,
        "steps": made.progress.step,
        "kept_step": made.progress.kept_step,
        "model": {
            "path": str(job.folder.path),
            "sha256": job.versions["model"],
            "vocabulary_sha256": job.tokenizer.sha256,
            "num_parameters": num_parameters(made.model),
            "random_init": job.random_init,
        },
        "wall_s": round(wall_s, 3),
    }


def _source(job: Job, settings: loop.Settings) -> dict[str, Any]:
    """All that decides what comes out, except the inputs."""
    return {
        "task": job.task.name,
        "text_columns": job.task.text_columns,
        "label_column": job.task.label_column,
        "model": str(job.folder.path),
        "random_init": job.random_init,
        "max_seq_length": job.max_seq_length,
        "processes": distributed.world_size(),
        "settings": settings.deciding(),
    }


def _card(job: Job, settings: loop.Settings, evaluation: Evaluation) -> str:
    facts = {name: f"{value:.4f}" for name, value in evaluation.metrics.items()}
    start = "random weights" if job.random_init else job.folder.path.name
    return checkpoint.model_card(
        title=f"BERT fine-tuned on {job.task.name}",
        facts={
            "task": job.task.name,
            "fine-tuned from": start,
            **facts,
            "learning rate": settings.learning_rate,
            "epochs": settings.num_epochs,
            "seed": settings.seed,
        },
    )
