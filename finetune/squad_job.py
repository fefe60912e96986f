"""SQuAD, from its files and a pretrained model to a fine-tuned model with its scores."""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import batches, config, course, output, squad, squad_answers
from finetune.course import Evaluation, Weights, jsonable
from finetune.loop import Settings, check_finite
from finetune.squad import Features, Questions
from zerobert import checkpoint, distributed, manifest
from zerobert.checkpoint import ModelFolder, newest_model
from zerobert.device import slow_precision, this_device
from zerobert.errors import CheckpointError, ConfigError
from zerobert.model import BertForQuestionAnswering, num_parameters, span_loss
from zerobert.page import Table, format_table
from zerobert.served import computes_in
from zerobert.signals import StopRequest
from zerobert.tokenizer import WordPieceTokenizer

RUNS = Path("runs")
PREDICTIONS_NAME = "predictions.json"
# Source: Devlin et al. 2018, table 2, BERT-base.
PUBLISHED = {"exact_match": 80.8, "f1": 88.5}
# Source: Hugging Face, examples/pytorch/question-answering/README.md.
_BATCH_SIZE, _LEARNING_RATE, _NUM_EPOCHS = 12, 3e-5, 2.0
_METRIC = "f1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The data, read and cut into windows, and the model to start from."""

    folder: ModelFolder
    tokenizer: WordPieceTokenizer
    random_init: bool
    train: Features | None
    questions: Questions
    dev: Features
    num_best: int
    max_answer_length: int
    windows: dict[str, int]
    versions: dict[str, str]
    stop: StopRequest


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Fine-tune as the flags of `run_squad.py` say; collective.

    Returns:
        The exit code.

    Raises:
        ZerobertError: what the user can mend.
        SystemExit: a signal asked to end.
    """
    with config.one_process_speaks(args), contextlib.ExitStack() as held:
        with distributed.one_voice():
            settings = config.choose_settings(
                args,
                args.seed,
                batch_size=_BATCH_SIZE,
                learning_rate=_LEARNING_RATE,
                num_epochs=_NUM_EPOCHS,
            )
            model = args.model_name_or_path or str(newest_model(RUNS))
            out = args.output_dir or RUNS / "finetune" / "SQuAD"
            output.check_output(out, Path(model), [PREDICTIONS_NAME])
            if slow := slow_precision(this_device(), computes_in(settings.deepspeed)):
                print(f"warning: {slow}")
        job = prepare(args, model, stop)
        with distributed.one_voice():
            held.enter_context(output.claimed(out))
            held.enter_context(output.told(out))
        result = fine_tune(job, settings, out, stop, resumes=args.resume == "auto")
        rows = [
            (name, f"{100 * value:.2f}", f"{PUBLISHED[name]:.1f}")
            for name, value in result["metrics"].items()
        ]
        header = ("metric", "ours", "BERT-base, Devlin et al.")
        print(format_table(Table(title=f"SQuAD v1.1 ({out})", header=header, rows=rows)))
        print(f"answers, as the official script takes them: {out / PREDICTIONS_NAME}")
    return 0


def prepare(args: argparse.Namespace, model: str, stop: StopRequest) -> Job:
    """Open the model and read the data; every fault of the input shows here, before any training;
    collective.

    Raises:
        ZerobertError: the model or the data can't be used.
        SystemExit: a signal asked to end.
    """
    with distributed.one_voice():
        for name in ("n_best_size", "max_answer_length"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name}: wanted 1 or more, got {getattr(args, name)}")
        folder = checkpoint.open_model(model)
        tokenizer = checkpoint.load_tokenizer(folder)
        length = batches.choose_length(folder, args.max_seq_length, squad.MAX_SEQ_LENGTH)
        versions = {"model": checkpoint.version(folder.path), "vocabulary": tokenizer.sha256}
    windows = {
        "max_seq_length": length,
        "doc_stride": args.doc_stride,
        "max_query_length": args.max_query_length,
    }

    def read(path: Path, *, for_training: bool) -> tuple[Questions, Features]:
        split = squad.TRAIN if for_training else squad.DEV
        with distributed.one_voice():
            questions = squad.load_questions(split, path, for_training=for_training)
            features = squad.encode(questions, tokenizer, **windows)
        batches.end_if_asked(stop)
        versions[questions.source] = questions.version
        print(f"SQuAD: {len(questions)} questions from {questions.source}, {len(features)} windows")
        return questions, features

    train_path = args.train_file or args.data_dir / squad.TRAIN.files[0].name
    dev_path = args.predict_file or args.data_dir / squad.DEV.files[0].name
    is_asked_only = args.do_predict and not args.do_train
    train = None if is_asked_only else read(train_path, for_training=True)[1]
    questions, dev = read(dev_path, for_training=False)
    return Job(
        folder=folder,
        tokenizer=tokenizer,
        random_init=args.random_init and train is not None,
        train=train,
        questions=questions,
        dev=dev,
        num_best=args.n_best_size,
        max_answer_length=args.max_answer_length,
        windows=windows,
        versions=versions,
        stop=stop,
    )


def fine_tune(
    job: Job, settings: Settings, out: Path, stop: StopRequest, *, resumes: bool
) -> dict[str, Any]:
    """Fine-tune and write the model, its `result.json` and its answers to the dev set; collective.

    Returns:
        What `result.json` says.
    """
    started = time.perf_counter()
    start = "random weights" if job.random_init else str(job.folder.path)
    output.announce_replacement(out)
    course.announce("SQuAD", start, out, settings.seed)
    if resumes:
        with distributed.one_voice():
            source = jsonable(_source(job, settings))
            course.check_state(source, job.versions, out / output.STATE_NAME)
    if job.train:
        made = course.run(_course(job, job.train, settings), settings, out, stop, resumes=resumes)
    else:
        made = _as_it_is(job, settings)
    progress, evaluation = made.progress, made.evaluation
    given = _answers(job, evaluation.logits[0])
    result = {
        "task": "SQuAD",
        "metric": _METRIC,
        "value": evaluation.metrics[_METRIC],
        "metrics": evaluation.metrics,
        "eval_loss": evaluation.loss,
        "num_eval_samples": len(job.questions),
        "seed": settings.seed,
        "steps": progress.step,
        "kept_step": progress.kept_step,
        "model": {
            "path": str(job.folder.path),
            "sha256": job.versions["model"],
            "vocabulary_sha256": job.tokenizer.sha256,
            "num_parameters": num_parameters(made.model),
            "random_init": job.random_init,
        },
        "wall_s": round(progress.earlier_s + time.perf_counter() - started, 3),
    }
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
                    made.model.state_dict(),
                    job.folder.config,
                    job.tokenizer,
                    card=_card(job, settings, evaluation),
                )
                squad_answers.write_predictions(staging / PREDICTIONS_NAME, given)
                manifest.write_json(staging / output.RESULT_NAME, result)
    return result


def _as_it_is(job: Job, settings: Settings) -> course.Outcome:
    """The model that is only to answer.

    Raises:
        CheckpointError: it has not learned to.
    """
    model = BertForQuestionAnswering(job.folder.config, settings.kernels)
    with distributed.one_voice():
        if checkpoint.load_weights(model, job.folder):
            raise CheckpointError(
                f"{job.folder.path} is not fine-tuned on SQuAD: it has no head for the answer's "
                "place; give the output folder of finetune/run_squad.py, or --do_train"
            )
    return course.as_it_is(model, settings, lambda forward, step: evaluate(job, forward, step))


def evaluate(job: Job, forward: Callable[..., tuple[Tensor, Tensor]], step: int) -> Evaluation:
    """Score a model on the dev set and print the scores; collective.

    Raises:
        TrainingDivergedError: the loss is not a finite number.
    """
    width = job.windows["max_seq_length"]

    def stacked(**inputs: Tensor) -> Tensor:
        """Both logits as one tensor of a width that all batches have, B2S."""
        start_BS, end_BS = forward(**inputs)
        least = torch.finfo(start_BS.dtype).min
        both_B2S = torch.stack([start_BS, end_BS], dim=1)
        return F.pad(both_B2S, (0, width - both_B2S.shape[2]), value=least)

    logits_N2S = batches.predict(stacked, job.dev, this_device(), job.stop)
    loss = _mean_loss(job.dev, logits_N2S)
    check_finite(loss, step)
    scores = squad_answers.score(job.questions, _answers(job, logits_N2S))
    shown = ", ".join(f"{name}: {value:f}" for name, value in scores.items())
    print(f"eval loss: {loss:f}, {shown}", flush=True)
    return Evaluation(loss=loss, metrics=scores, logits=(logits_N2S,))


def _answers(job: Job, logits_N2S: npt.NDArray[np.float32]) -> dict[str, str]:
    return squad_answers.best_answers(
        job.questions,
        job.dev,
        logits_N2S[:, 0],
        logits_N2S[:, 1],
        num_best=job.num_best,
        max_answer_length=job.max_answer_length,
    )


def _mean_loss(dev: Features, logits_N2S: npt.NDArray[np.float32]) -> float:
    """The mean over all windows, exact whatever the batches were."""
    start_NS, end_NS = torch.from_numpy(logits_N2S).unbind(1)
    starts_N, ends_N = torch.from_numpy(dev.positions_N2).unbind(1)
    return span_loss(start_NS, end_NS, starts_N, ends_N).item() / len(dev)


def _course(job: Job, train: Features, settings: Settings) -> course.Course:
    def save_step(weights: Weights, evaluation: Evaluation, folder: Path) -> None:
        checkpoint.save_model(
            folder,
            weights,
            job.folder.config,
            job.tokenizer,
            card=_card(job, settings, evaluation),
            source={"run": _source(job, settings), "step": folder.name},
            inputs=job.versions,
        )

    def load_start(model: nn.Module) -> None:
        if not job.random_init:
            checkpoint.load_weights(model, job.folder)

    return course.Course(
        name="SQuAD",
        metric=_METRIC,
        train=train,
        source=jsonable(_source(job, settings)),
        inputs=job.versions,
        evaluate=lambda forward, step: evaluate(job, forward, step),
        save_step=save_step,
        new_model=lambda: BertForQuestionAnswering(job.folder.config, settings.kernels),
        load_start=load_start,
    )


def _source(job: Job, settings: Settings) -> dict[str, Any]:
    """All that decides what comes out, except the inputs."""
    return {
        "task": "SQuAD",
        "model": str(job.folder.path),
        "random_init": job.random_init,
        **job.windows,
        "n_best_size": job.num_best,
        "max_answer_length": job.max_answer_length,
        "processes": distributed.world_size(),
        "settings": settings.deciding(),
    }


def _card(job: Job, settings: Settings, evaluation: Evaluation) -> str:
    start = "random weights" if job.random_init else job.folder.path.name
    return checkpoint.model_card(
        title="BERT fine-tuned on SQuAD v1.1",
        facts={
            "fine-tuned from": start,
            **{name: f"{value:.4f}" for name, value in evaluation.metrics.items()},
            "learning rate": settings.learning_rate,
            "epochs": settings.num_epochs,
            "seed": settings.seed,
        },
    )
