"""One task, from its files and a pretrained model to a fine-tuned model with its score."""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune import data, loop, metrics, output, report
from finetune.data import Examples, Labels
from finetune.tasks import Split, Task
from zerobert import checkpoint, manifest
from zerobert.checkpoint import ModelFolder
from zerobert.errors import ConfigError
from zerobert.model import BertForSequenceClassification, num_parameters
from zerobert.tokenizer import WordPieceTokenizer

SEQ_LENGTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A task with its data read and encoded and the model to start from: what every seed shares."""

    task: Task
    folder: ModelFolder
    tokenizer: WordPieceTokenizer
    random_init: bool
    device: torch.device
    train: loop.Encoded | None
    dev: tuple[loop.Encoded, ...]
    test: tuple[loop.Encoded, ...]
    dev_examples: tuple[Examples, ...]
    max_seq_length: int
    versions: dict[str, str]


def prepare(
    task: Task,
    *,
    model: str,
    random_init: bool,
    data_dir: Path | None,
    max_seq_length: int | None,
    do_predict: bool,
    device: torch.device,
) -> Job:
    """Open the model and read the data; every fault of the input shows here, before any training.

    Args:
        max_seq_length: None for 128, or less where the model was made for less.

    Raises:
        ZerobertError: the model or the data can't be used.
    """
    folder = checkpoint.open_model(model)
    tokenizer = checkpoint.load_tokenizer(folder)
    limit = folder.config.max_position_embeddings
    length = min(SEQ_LENGTH, limit) if max_seq_length is None else max_seq_length
    if length > limit:
        raise ConfigError(f"--max_seq_length {length}: {folder.path} was made for at most {limit}")
    if task.trained_on and folder.labels != task.label_names:
        raise ConfigError(
            f"{task.name} has no training set: a model fine-tuned on {task.trained_on} answers it, "
            f"and {folder.path} is none; fine-tune on {task.trained_on} and give its output folder"
        )
    where = data.choose_folder(task, data_dir) if task.folders else Path()
    versions = {"model": _model_version(folder.path), "vocabulary": tokenizer.sha256}

    def read(split: Split) -> Examples:
        examples = data.load_split(task, split, where)
        versions[examples.source] = examples.version
        print(f"{task.name}: {len(examples)} examples from {examples.source}")
        return examples

    def encode(examples: Examples) -> loop.Encoded:
        return loop.encode(examples, tokenizer, max_seq_length=length)

    train = encode(read(task.train)) if task.train else None
    dev_examples = tuple(read(split) for split in task.dev)
    needs_test = do_predict or not task.train
    return Job(
        task=task,
        folder=folder,
        tokenizer=tokenizer,
        random_init=random_init and task.train is not None,
        device=device,
        train=train,
        dev=tuple(encode(examples) for examples in dev_examples),
        test=tuple(encode(read(split)) for split in task.test) if needs_test else (),
        dev_examples=dev_examples,
        max_seq_length=length,
        versions=versions,
    )


def _model_version(path: Path) -> str:
    weights = [path / checkpoint.WEIGHTS_NAME, path / "pytorch_model.bin"]
    return next((manifest.sha256_file(file) for file in weights if file.is_file()), "")


def run_seeds(job: Job, settings: loop.Settings, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Fine-tune with each seed into `out/seed_<s>` and copy the best into `out`.

    One seed is fine-tuned in `out` itself. A task without a training set has nothing to seed.

    Raises:
        TrainingDivergedError: the loss of a run is no longer finite.
        DataError: something can't be written.
    """
    if len(seeds) == 1 or not job.train:
        return run(job, dataclasses.replace(settings, seed=seeds[0]), out)
    results = [
        run(job, dataclasses.replace(settings, seed=seed), out / f"seed_{seed}") for seed in seeds
    ]
    result = metrics.summarize_seeds(results)
    best = out / f"seed_{result['seed']}"
    record = manifest.read_manifest(best)
    with output.replacing(
        out, config=record.config, inputs=record.inputs, keep=[f"seed_{seed}" for seed in seeds]
    ) as staging:
        with manifest.writing(staging):
            for name in record.files:
                shutil.copy2(best / name, staging / name)
        manifest.write_json(staging / output.RESULT_NAME, result)
    return result


def run(job: Job, settings: loop.Settings, out: Path) -> dict[str, Any]:
    """Fine-tune once and write the model, its `result.json` and, where asked for, its predictions.

    Returns:
        What `result.json` says.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = BertForSequenceClassification(job.folder.config, job.task.num_outputs)
    if not job.random_init:
        checkpoint.load_weights(model, job.folder)
    model.to(job.device)
    start = "random weights" if job.random_init else str(job.folder.path)
    print(f"{job.task.name}: from {start} to {out}, seed {settings.seed}, on {job.device}")

    step, evaluation, saved = 0, Evaluation(loss=None, metrics={}), []
    if job.train:
        for step, saves in loop.train(model, job.train, settings, job.device):
            evaluation = evaluate(job, model, settings.precision, step)
            if saves:
                saved.append(f"step_{step}")
                _save_step(job, model, settings, step, evaluation, out / saved[-1])

    result = _describe(job, model, settings, step, evaluation, time.perf_counter() - started)
    with output.replacing(
        out, config=_source(job, settings, step), inputs=job.versions, keep=saved
    ) as staging:
        checkpoint.write_model_files(
            staging,
            model.state_dict(),
            job.folder.config,
            job.tokenizer,
            card=_card(job, settings, evaluation),
            labels=job.task.label_names,
            is_regression=job.task.is_regression,
        )
        _write_predictions(job, model, settings.precision, staging)
        _write_report(job, settings, evaluation, result, staging / report.REPORT_NAME)
        manifest.write_json(staging / output.RESULT_NAME, result)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on the main dev set, and the metrics and the logits NC of all of them."""

    loss: float | None
    metrics: dict[str, float]
    logits: tuple[npt.NDArray[np.float32], ...] = ()


def evaluate(
    job: Job, model: BertForSequenceClassification, precision: loop.Precision, step: int
) -> Evaluation:
    """Score the model on every dev set and print PaddleNLP's line.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    losses: list[float] = []
    scores: dict[str, float] = {}
    logits: list[npt.NDArray[np.float32]] = []
    for split, encoded in zip(job.task.dev, job.dev, strict=True):
        labels = _labels(encoded)
        logits_NC = loop.predict(model, encoded, precision, job.device)
        logits.append(logits_NC)
        losses.append(loop.mean_loss(logits_NC, labels))
        loop.check_finite(losses[-1], step)
        split_scores = metrics.score(job.task, labels, metrics.answers(job.task, logits_NC))
        scores |= {name + split.suffix: value for name, value in split_scores.items()}
    shown = ", ".join(
        f"{name.replace('accuracy', 'accu')}: {value:f}" for name, value in scores.items()
    )
    print(f"eval loss: {losses[0]:f}, {shown}", flush=True)
    return Evaluation(loss=losses[0], metrics=scores, logits=tuple(logits))


def _labels(encoded: loop.Encoded) -> Labels:
    assert encoded.labels is not None
    return encoded.labels


def _majority(job: Job) -> float | None:
    """The task's value for a model that answers the training set's commonest class every time."""
    if job.train is None or not job.dev:
        return None
    scores = metrics.majority_scores(job.task, _labels(job.train), _labels(job.dev[0]))
    return scores[job.task.metrics[0]]


def _write_predictions(
    job: Job, model: BertForSequenceClassification, precision: loop.Precision, folder: Path
) -> None:
    for split, encoded in zip(job.task.test, job.test, strict=False):
        logits_NC = loop.predict(model, encoded, precision, job.device)
        given = metrics.answers(job.task, logits_NC)
        metrics.write_predictions(folder / f"{split.submission}.tsv", job.task, given)


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
    model: BertForSequenceClassification,
    settings: loop.Settings,
    step: int,
    evaluation: Evaluation,
    folder: Path,
) -> None:
    checkpoint.save_model(
        folder,
        model.state_dict(),
        job.folder.config,
        job.tokenizer,
        card=_card(job, settings, evaluation),
        labels=job.task.label_names,
        is_regression=job.task.is_regression,
        source=_source(job, settings, step),
        inputs=job.versions,
    )


def _describe(
    job: Job,
    model: BertForSequenceClassification,
    settings: loop.Settings,
    step: int,
    evaluation: Evaluation,
    wall_s: float,
) -> dict[str, Any]:
    """What `result.json` says."""
    return {
        "task": job.task.name,
        "metric": job.task.metrics[0],
        "value": evaluation.metrics.get(job.task.metrics[0]),
        "metrics": evaluation.metrics,
        "majority_baseline": _majority(job),
        "eval_loss": evaluation.loss,
        "num_eval_samples": len(job.dev[0]) if job.dev else 0,
        "seed": settings.seed,
        "steps": step,
        "model": {
            "path": str(job.folder.path),
            "sha256": job.versions["model"],
            "vocabulary_sha256": job.tokenizer.sha256,
            "num_parameters": num_parameters(model),
            "random_init": job.random_init,
        },
        "wall_s": round(wall_s, 3),
    }


def _source(job: Job, settings: loop.Settings, step: int) -> dict[str, Any]:
    return {
        "task": job.task.name,
        "model": str(job.folder.path),
        "random_init": job.random_init,
        "step": step,
        "max_seq_length": job.max_seq_length,
        "settings": dataclasses.asdict(settings),
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
            "batch size": settings.batch_size,
            "epochs": settings.num_epochs,
            "seed": settings.seed,
        },
    )
