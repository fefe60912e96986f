"""From flags to runs: which tasks, from which model, with which settings and seeds."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from finetune import config, data, glue, job, submission
from finetune.batches import end_if_asked
from finetune.data import find_labels, parse_columns
from finetune.loop import Settings
from finetune.output import check_output, claimed, discard_spent_state, told
from finetune.report import REPORT_NAME
from finetune.tasks import Task, custom_task, find_task, plain
from zerobert import distributed
from zerobert.checkpoint import newest_model
from zerobert.device import slow_precision, this_device
from zerobert.errors import ConfigError
from zerobert.manifest import is_complete, writing
from zerobert.served import computes_in
from zerobert.signals import StopRequest

RUNS = Path("runs")
FINETUNED = RUNS / "finetune"
_OWN_DATA = ("train_file", "dev_file", "text_columns", "label_column")


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Fine-tune as the flags of `run_glue.py` say; collective.

    Returns:
        The exit code.

    Raises:
        ZerobertError: what the user can mend.
        SystemExit: a signal asked to end.
    """
    with config.one_process_speaks(args):
        if plain(args.task_name) == "glue":
            with distributed.one_voice():
                _refuse_own_data(args)
            run_all(args, stop)
        else:
            run_one(args, stop)
    return 0


def run_one(args: argparse.Namespace, stop: StopRequest) -> None:
    """Fine-tune on the task that was named."""
    with distributed.one_voice():
        task = named_task(args)
        if args.from_mnli and (args.model_name_or_path or not task.gains_from):
            raise ConfigError(
                "--from_mnli takes the model fine-tuned on MNLI, for RTE, MRPC or STS-B; leave it "
                f"out for {task.name}"
                + (f" from {args.model_name_or_path}" if args.model_name_or_path else "")
            )
        model = args.model_name_or_path or default_model(task, from_mnli=args.from_mnli)
    out = args.output_dir or FINETUNED / task.name
    result = run_task(args, task, model, out, stop)
    print(glue.format_results([result], title=f"{task.name} ({out})"))
    if result["metrics"]:
        print(f"mistakes and settings: {out / REPORT_NAME}")


def run_all(args: argparse.Namespace, stop: StopRequest) -> None:
    """Fine-tune on every task that there is data for.

    The table is also in `glue.json` and `glue.html`, and the predictions in `submission.zip`. What
    an earlier call that did not come to its end has finished is not done again.
    """
    with distributed.one_voice():
        model = args.model_name_or_path or str(newest_model(RUNS))
        tasks = glue.available_tasks(args.data_dir)
        out = args.output_dir or FINETUNED
        lacks_answers = args.do_predict and not (out / submission.ZIP_NAME).is_file()
        is_open = glue.is_unfinished(out / "glue.json") or lacks_answers
        reuses = args.resume == "auto" and is_open
        for task in tasks:  # before the first is trained
            data.check_files(task, args.data_dir, with_test=args.do_predict)
        if args.from_mnli and not any(task.name == "MNLI" for task in tasks):
            raise ConfigError("--from_mnli: there is no data of MNLI to fine-tune on first")
    if args.from_mnli:
        tasks = sorted(tasks, key=lambda task: task.name != "MNLI")
    _survey(args, tasks, model, out, stop)
    with contextlib.ExitStack() as held:
        with distributed.one_voice():
            if distributed.is_main():
                with writing(out):
                    out.mkdir(parents=True, exist_ok=True)
            held.enter_context(told(out))
        _run_each(args, tasks, model, out, stop, reuses=reuses)


def _survey(
    args: argparse.Namespace, tasks: list[Task], model: str, out: Path, stop: StopRequest
) -> None:
    """Look at all that can stop a task, before those that come before it are trained; collective.

    Raises:
        ZerobertError: what the user can mend.
    """
    print(f"looking at the data of {', '.join(task.name for task in tasks)} first", flush=True)
    for task in tasks:
        begin, folder = _begin(args, task, tasks, model, out), out / task.name
        with distributed.one_voice():
            seeds, settings = _choose(args, task, begin, folder)
        with open(os.devnull, "w") as nowhere:  # it is said when the task has its turn
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                if begin == model:
                    prepared = _prepare(args, task, model, stop)
                else:  # that model is not there yet
                    with distributed.one_voice():
                        data.read_all(task, args.data_dir, with_test=args.do_predict)
        if begin == model and args.resume == "auto":
            with distributed.one_voice():
                job.check_states(prepared, settings, seeds, folder)


def _begin(args: argparse.Namespace, task: Task, tasks: list[Task], model: str, out: Path) -> str:
    """The model that a task of several starts from: another task's, or the one that all do."""
    source = task.trained_on or (task.gains_from if args.from_mnli else "")
    return str(out / source) if any(other.name == source for other in tasks) else model


def _run_each(
    args: argparse.Namespace,
    tasks: list[Task],
    model: str,
    out: Path,
    stop: StopRequest,
    *,
    reuses: bool,
) -> None:
    """Fine-tune on one task after the other, and tell their results."""
    title = f"GLUE dev sets, {model}"
    results: list[dict[str, Any]] = []
    for task in tasks:
        end_if_asked(stop)
        begin = _begin(args, task, tasks, model, out)
        results.append(run_task(args, task, begin, out / task.name, stop, reuses=reuses))
        with distributed.one_voice():
            if distributed.is_main():
                is_last = len(results) == len(tasks)
                glue.write_results(out / "glue.json", results, is_finished=is_last)
                glue.write_page(out / "glue.html", results, title=title)
    print(glue.format_results(results, title=title))
    print(f"models, predictions and {out / 'glue.json'} are in {out}/")
    print(f"the same with links to each task's page: {out / 'glue.html'}")
    with distributed.one_voice():
        if distributed.is_main():
            _zip_predictions(out, results, is_asked=args.do_predict)


def _zip_predictions(out: Path, results: list[dict[str, Any]], *, is_asked: bool) -> None:
    path = out / submission.ZIP_NAME
    if not is_asked:
        path.unlink(missing_ok=True)  # of other models than those that are here now
        return
    missing = submission.write_zip(path, [out / result["task"] for result in results])
    print(f"for the GLUE server: {path}")
    if missing:
        print(f"warning: it lacks {', '.join(missing)}, and the server takes no zip without them")


def run_task(
    args: argparse.Namespace,
    task: Task,
    model: str,
    out: Path,
    stop: StopRequest,
    *,
    reuses: bool = False,
) -> dict[str, Any]:
    """Fine-tune on one task with every seed asked for; collective.

    Args:
        reuses: a finished result of the very same run is taken as it is.
    """
    with contextlib.ExitStack() as held:
        with distributed.one_voice():
            seeds, settings = _choose(args, task, model, out)
            if slow := slow_precision(this_device(), computes_in(settings.deepspeed)):
                print(f"warning: {slow}")
        prepared = _prepare(args, task, model, stop)
        with distributed.one_voice():
            held.enter_context(claimed(out))
            held.enter_context(told(out))
            done = job.finished(prepared, settings, seeds, out) if reuses else None
        if done is not None:
            print(f"{task.name}: finished in {out}")
            if distributed.is_main():
                discard_spent_state(out)
            job.answer_tests(prepared, settings, out)
            return done
        return job.run_seeds(prepared, settings, seeds, out, stop, resumes=args.resume == "auto")


def _choose(
    args: argparse.Namespace, task: Task, model: str, out: Path
) -> tuple[list[int], Settings]:
    """The seeds and the settings, where the output folder may be written to."""
    seeds = parse_seeds(args)
    own_folders = [out / f"seed_{seed}" for seed in seeds] if len(seeds) > 1 else []
    for folder in (out, *own_folders):
        check_output(folder, Path(model), job.prediction_names(task, args.do_predict))
    return seeds, config.choose_settings(
        args,
        seeds[0],
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        num_epochs=task.num_epochs,
    )


def _prepare(args: argparse.Namespace, task: Task, model: str, stop: StopRequest) -> job.Job:
    return job.prepare(
        task,
        model=model,
        random_init=args.random_init,
        data_dir=args.data_dir,
        max_seq_length=args.max_seq_length,
        do_predict=args.do_predict,
        stop=stop,
    )


def default_model(task: Task, *, from_mnli: bool) -> str:
    """The newest pretrained model, or the fine-tuned one for a task that can't be trained on or
    is to start from it.

    Raises:
        ConfigError: there is none.
    """
    source = task.trained_on or (task.gains_from if from_mnli else "")
    if not source:
        return str(newest_model(RUNS))
    folder = FINETUNED / source
    if not is_complete(folder):
        why = (
            f"{task.name} has no training set, a model fine-tuned on {source} answers it"
            if task.trained_on
            else f"--from_mnli: {task.name} starts from a model fine-tuned on {source}"
        )
        raise ConfigError(
            f"{why}: there is none in {folder}; run --task_name {source} first or give "
            "--model_name_or_path"
        )
    return str(folder)


def named_task(args: argparse.Namespace) -> Task:
    """The task of `--task_name`.

    Raises:
        ConfigError: there is none of that name, or flags that are for another kind.
    """
    if plain(args.task_name) == "custom":
        return custom_row(args)
    task = find_task(args.task_name)
    _refuse_own_data(args)
    return task


def _refuse_own_data(args: argparse.Namespace) -> None:
    names = (*_OWN_DATA, "test_file", "regression")
    if given := [f"--{name}" for name in names if getattr(args, name)]:
        raise ConfigError(
            f"{', '.join(given)}: for one's own data; give --task_name custom, not "
            f"{args.task_name}, or leave it out"
        )


def custom_row(args: argparse.Namespace) -> Task:
    """The task that the user's own files make.

    Raises:
        ConfigError: a flag is missing.
    """
    if missing := [f"--{name}" for name in _OWN_DATA if getattr(args, name) is None]:
        raise ConfigError(f"--task_name custom: also give {', '.join(missing)}")
    if args.do_predict and args.test_file is None:
        raise ConfigError("--do_predict: --task_name custom also needs --test_file")
    if args.test_file is not None and not args.do_predict:
        raise ConfigError("--test_file is answered with --do_predict: give both or neither")
    if args.data_dir is not None:
        raise ConfigError("--data_dir: --task_name custom names its files by --train_file and kin")
    return custom_task(
        train_file=args.train_file,
        dev_file=args.dev_file,
        test_file=args.test_file,
        text_columns=parse_columns(args.text_columns),
        label_column=args.label_column,
        labels=() if args.regression else find_labels(args.train_file, args.label_column),
    )


def parse_seeds(args: argparse.Namespace) -> list[int]:
    """`--seeds 1,2,3`, or the one `--seed`.

    Raises:
        ConfigError: not numbers, or one twice.
    """
    if args.seeds is None:
        return [args.seed]
    words = args.seeds.split(",")
    seeds = [int(word) for word in words if word.strip().isdecimal()]
    if len(set(seeds)) < len(words):
        raise ConfigError(f"--seeds: wanted different numbers as 1,2,3, got {args.seeds!r}")
    return seeds
