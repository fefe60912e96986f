"""One task, from its files and a pretrained model to a fine-tuned model with its score."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from finetune import batches, data, loop, metrics, output, report
from finetune.data import Examples, Labels
from finetune.tasks import Split, Task
from zerobert import checkpoint, distributed, manifest, training_state
from zerobert.checkpoint import ModelFolder
from zerobert.device import this_device
from zerobert.ds_config import check_same_run, flatten
from zerobert.engine import Engine, computes_in
from zerobert.errors import ConfigError
from zerobert.model import BertForSequenceClassification, num_parameters
from zerobert.signals import StopRequest
from zerobert.tokenizer import WordPieceTokenizer
from zerobert.training_state import StateReader

_BEST_NAME = "best.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A task with its data read and encoded and the model to start from: what every seed shares."""

    task: Task
    folder: ModelFolder
    tokenizer: WordPieceTokenizer
    random_init: bool
    train: batches.Encoded | None
    dev: tuple[batches.Encoded, ...]
    test: tuple[batches.Encoded, ...]
    dev_examples: tuple[Examples, ...]
    versions: dict[str, str]
    max_seq_length: int


def prepare(
    task: Task,
    *,
    model: str,
    random_init: bool,
    data_dir: Path | None,
    max_seq_length: int | None,
    do_predict: bool,
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
    length = min(batches.SEQ_LENGTH, limit) if max_seq_length is None else max_seq_length
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

    def encode(examples: Examples) -> batches.Encoded:
        return batches.encode(examples, tokenizer, max_seq_length=length)

    train = encode(read(task.train)) if task.train else None
    dev_examples = tuple(read(split) for split in task.dev)
    needs_test = do_predict or not task.train
    return Job(
        task=task,
        folder=folder,
        tokenizer=tokenizer,
        random_init=random_init and task.train is not None,
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
    if len(seeds) == 1 or not job.train:
        return run(job, _with_seed(settings, seeds[0]), out, stop, resumes=resumes)
    reuses = resumes and not manifest.is_complete(out)  # else all seeds came to their end
    results = []
    for seed in seeds:
        folder, own = out / f"seed_{seed}", _with_seed(settings, seed)
        done = finished(job, own, [seed], folder) if reuses else None
        if done is not None:
            print(f"{job.task.name}: seed {seed} is finished in {folder}")
        results.append(done or run(job, own, folder, stop, resumes=resumes))
    result = metrics.summarize_seeds(results)
    with distributed.one_voice():
        if distributed.is_main():
            _keep_seed(out, result, seeds)
    return result


def _with_seed(settings: loop.Settings, seed: int) -> loop.Settings:
    return dataclasses.replace(settings, seed=seed)


def _keep_seed(out: Path, result: Mapping[str, Any], seeds: Sequence[int]) -> None:
    best = out / f"seed_{result['seed']}"
    record = manifest.read_manifest(best)
    with output.replacing(
        out, config=record.config, inputs=record.inputs, keep=[f"seed_{seed}" for seed in seeds]
    ) as staging:
        with manifest.writing(staging):
            for name in record.files:
                shutil.copy2(best / name, staging / name)
        manifest.write_json(staging / output.RESULT_NAME, result)


def finished(
    job: Job, settings: loop.Settings, seeds: Sequence[int], out: Path
) -> dict[str, Any] | None:
    """The result of an earlier run of the same settings and inputs, where it came to its end."""
    if not manifest.is_complete(out) or not (out / output.RESULT_NAME).is_file():
        return None
    wanted = list(seeds) if job.train else [seeds[0]]
    record = manifest.read_manifest(out)
    runs = [_jsonable(_source(job, _with_seed(settings, seed))) for seed in wanted]
    if record.config.get("run") not in runs or record.inputs != job.versions:
        return None
    result: dict[str, Any] = json.loads((out / output.RESULT_NAME).read_text(encoding="utf-8"))
    return result if [one["seed"] for one in result.get("all", [result])] == wanted else None


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
    ranks = distributed.world_size()
    place = f"{this_device().type}" + (f" x {ranks}" if ranks > 1 else "")
    print(f"{job.task.name}: from {start} to {out}, seed {settings.seed}, on {place}")
    torch.manual_seed(settings.seed)
    model = BertForSequenceClassification(job.folder.config, job.task.num_outputs, settings.kernels)
    if not job.random_init:
        _load_start(job, model)
    progress = Progress()
    if job.train:
        progress = _train(job, model, settings, out, stop, resumes=resumes)
        model = BertForSequenceClassification(
            job.folder.config, job.task.num_outputs, settings.kernels
        )
        with distributed.one_voice():
            model.load_state_dict(_kept_weights(out / output.STATE_NAME))
    forward = batches.plain_forward(model, computes_in(settings.deepspeed), this_device())
    evaluation = progress.kept
    if evaluation is None:
        evaluation = evaluate(job, forward, progress.kept_step)
    predictions = [batches.predict(forward, encoded, this_device()) for encoded in job.test]
    elapsed_s = progress.elapsed_s + time.perf_counter() - started
    result = _describe(job, model, settings, progress, evaluation, elapsed_s)
    with distributed.one_voice():
        if distributed.is_main():
            with output.replacing(
                out,
                config={"run": _source(job, settings), "step": progress.kept_step},
                inputs=job.versions,
                keep=[f"step_{step}" for step in progress.saved_steps],
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
                _write_predictions(job, predictions, staging)
                _write_report(job, settings, evaluation, result, staging / report.REPORT_NAME)
                manifest.write_json(staging / output.RESULT_NAME, result)
    return result


def _load_start(job: Job, model: BertForSequenceClassification) -> None:
    """The weights to start from; a classifier only where it answers with the same labels."""
    task, folder = job.task, job.folder
    answers_alike = folder.labels == task.label_names and folder.is_regression == task.is_regression
    new = checkpoint.load_weights(model, folder, with_task_head=answers_alike)
    if "classifier.weight" not in new:
        print(f"{task.name}: the classifier of {folder.path} is trained on")


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a training has come.

    Attributes:
        saved_steps: of the `step_<n>` folders.
        kept_step: of the model that is kept: the best one or the last.
        kept: its evaluation; None where that was not done in this process.
        num_worse: evaluations in a row without a better value.
    """

    step: int = 0
    elapsed_s: float = 0.0
    saved_steps: list[int] = dataclasses.field(default_factory=list)
    kept_step: int = 0
    best_value: float | None = None
    num_worse: int = 0
    kept: "Evaluation | None" = None


def _train(
    job: Job,
    model: BertForSequenceClassification,
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
    assert job.train is not None
    started = time.perf_counter()
    engine = loop.start_engine(model, settings)
    folder = out / output.STATE_NAME
    progress = Progress()
    with distributed.one_voice():
        saved = _find_state(job, settings, folder) if resumes else None
    if saved is not None:
        with distributed.one_voice():
            engine.restore(StateReader(folder))
        progress = Progress(**saved)
        print(f"{job.task.name}: going on from step {progress.step}, saved in {folder}")
    before_s = progress.elapsed_s

    def is_spent() -> bool:
        return settings.patience is not None and progress.num_worse >= settings.patience

    reviews = loop.train(engine, job.train, settings, stop, first_step=progress.step)
    for review in reviews if not is_spent() else ():
        progress.step = review.step
        evaluation = None
        if not review.exit_code:
            engine.train(False)
            evaluation = evaluate(job, engine.forward, review.step)
            _judge(job, settings, progress, evaluation)
        progress.elapsed_s = before_s + time.perf_counter() - started
        _save(job, settings, engine, progress, review, evaluation, folder)
        if review.exit_code:
            print(f"stopped at step {review.step}: the same command goes on from there", flush=True)
            raise SystemExit(review.exit_code)
        if is_spent():
            print(
                f"step {progress.step}: no better {job.task.metrics[0]} in the last "
                f"{progress.num_worse} evaluations; that of step {progress.kept_step} is kept",
                flush=True,
            )
            break
    engine.close()
    return progress


def _judge(job: Job, settings: loop.Settings, progress: Progress, evaluation: "Evaluation") -> None:
    """Note whether this is the model to keep."""
    value = evaluation.metrics[job.task.metrics[0]]
    is_better = progress.best_value is None or value > progress.best_value
    progress.num_worse = 0 if is_better else progress.num_worse + 1
    if is_better:
        progress.best_value = value
    if is_better or not settings.keeps_best:
        progress.kept_step, progress.kept = progress.step, evaluation


def _save(
    job: Job,
    settings: loop.Settings,
    engine: Engine,
    progress: Progress,
    review: loop.Review,
    evaluation: "Evaluation | None",
    folder: Path,
) -> None:
    """The state to go on from, with the weights that are kept, and `step_<n>` where asked for."""
    if not settings.keeps_best:
        progress.kept_step = progress.step
    saves_model = review.saves and evaluation is not None
    if saves_model:
        progress.saved_steps.append(review.step)

    def finish(reader: StateReader, staging: Path) -> None:
        weights = dict(reader.weights())
        if saves_model:
            assert evaluation is not None
            _save_step(job, weights, settings, evaluation, folder.parent / f"step_{review.step}")
        if settings.keeps_best:
            with manifest.writing(staging):
                if progress.kept_step == progress.step:
                    save_file(weights, staging / _BEST_NAME)
                elif (folder / _BEST_NAME).is_file():
                    shutil.copy2(folder / _BEST_NAME, staging / _BEST_NAME)

    noted = {
        field.name: getattr(progress, field.name)
        for field in dataclasses.fields(progress)
        if field.name != "kept"
    }
    training_state.write_state(
        folder,
        engine.snapshot(),
        config={"run": _source(job, settings), "progress": noted},
        inputs=job.versions,
        finish=finish,
    )


def _find_state(job: Job, settings: loop.Settings, folder: Path) -> dict[str, Any] | None:
    """What was noted of a training that did not come to its end, its files verified.

    Raises:
        ConfigError: it was of other settings or inputs.
        ManifestError: the state is damaged.
    """
    if not manifest.is_complete(folder):
        return None
    record = manifest.verify_folder(folder)
    before, now = (
        {**flatten(run), **inputs}
        for run, inputs in (
            (record.config["run"], record.inputs),
            (_jsonable(_source(job, settings)), job.versions),
        )
    )
    check_same_run(before, now, str(folder))
    progress: dict[str, Any] = record.config["progress"]
    return progress


def _kept_weights(folder: Path) -> dict[str, torch.Tensor]:
    best = folder / _BEST_NAME
    return load_file(best) if best.is_file() else dict(StateReader(folder).weights())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on the main dev set, and the metrics and the logits NC of all of them."""

    loss: float | None
    metrics: dict[str, float]
    logits: tuple[npt.NDArray[np.float32], ...] = ()


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
        logits_NC = batches.predict(forward, encoded, this_device())
        logits.append(logits_NC)
        losses.append(batches.mean_loss(logits_NC, labels))
        loop.check_finite(losses[-1], step)
        split_scores = metrics.score(job.task, labels, metrics.answers(job.task, logits_NC))
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


def _write_predictions(
    job: Job, predictions: Sequence[npt.NDArray[np.float32]], folder: Path
) -> None:
    for split, logits_NC in zip(job.task.test, predictions, strict=False):
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
    weights: Mapping[str, torch.Tensor],
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
    job: Job,
    model: BertForSequenceClassification,
    settings: loop.Settings,
    progress: Progress,
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
        "steps": progress.step,
        "kept_step": progress.kept_step,
        "model": {
            "path": str(job.folder.path),
            "sha256": job.versions["model"],
            "vocabulary_sha256": job.tokenizer.sha256,
            "num_parameters": num_parameters(model),
            "random_init": job.random_init,
        },
        "wall_s": round(wall_s, 3),
    }


def _source(job: Job, settings: loop.Settings) -> dict[str, Any]:
    """All that decides what comes out, except the inputs."""
    chosen = dataclasses.asdict(settings)
    for name in ("logging_steps", "save_steps"):
        del chosen[name]
    return {
        "task": job.task.name,
        "model": str(job.folder.path),
        "random_init": job.random_init,
        "max_seq_length": job.max_seq_length,
        "processes": distributed.world_size(),
        "settings": chosen,
    }


def _jsonable(value: Any) -> Any:
    """As it will be read back from a file."""
    return json.loads(json.dumps(value))


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
