"""An experiment from its output folder to its last words."""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import loop, preflight, report
from pretrain import state as run_state
from pretrain.data import StepLoader, evaluation_batches, fingerprint
from pretrain.experiment import DTYPES, Experiment
from pretrain.order import sample_order
from pretrain.state import Saver, TrainState
from zerobert import checkpoint, distributed, kernels, manifest, served
from zerobert.device import peak_flops
from zerobert.engine import Engine
from zerobert.errors import ConfigError, exit_code
from zerobert.model import BertForPreTraining
from zerobert.optim import build_optimizer
from zerobert.signals import StopRequest
from zerobert.tracking import code_version, open_tracker, read_status, write_status
from zerobert.training_state import StateReader

# Without gradients several micro-batches fit where one did.
_EVAL_MICRO_BATCHES = 4


def train(run: Experiment, args: argparse.Namespace, stop: StopRequest) -> int:
    """Build the model, resume where there is something to resume, train, and write the report.

    Returns:
        0, or the exit code of the signal that ended the run.

    Raises:
        ZerobertError: what the user can mend.
    """
    with distributed.one_voice():
        resume_from = _output_folder(run, args)
    resume_from, is_complete = distributed.broadcast_object(resume_from)
    if is_complete:
        assert resume_from is not None
        _finish(run, 0, run_state.saved_step(resume_from))
        return 0
    try:
        with distributed.connected():
            if connection := preflight.check(
                run.folder.path,
                run.folder.resolved,
                {k: v for k, v in run.folder.identity.items() if k.startswith("data.")},
            ):
                _say(connection)
            return _train(run, args, stop, resume_from)
    except BaseException as error:
        if distributed.is_main():
            text = " ".join(str(error).split())
            write_status(
                run.folder.path,
                "preempted" if isinstance(error, KeyboardInterrupt) else "failed",
                exit_code(error),
                total_steps=run.steps,
                error=text or type(error).__name__,
            )
        raise


def _train(
    run: Experiment, args: argparse.Namespace, stop: StopRequest, resume_from: Path | None
) -> int:
    torch.manual_seed(run.config.bert.run.seed)
    model = BertForPreTraining(run.folder.model, run.config.bert.kernels, nsp=run.nsp)
    with distributed.one_voice():
        if run.config.init_from is not None and resume_from is None:
            new = checkpoint.load_weights(model, run.config.init_from)
            _say(f"weights of {run.config.init_from.path}; new: {', '.join(new) or 'none'}")
    config = run.config
    optimizer = build_optimizer(model, config.optimizer, config.bert.kernels.lamb)
    training = Engine(model, optimizer, _engine_config(run))
    distributed.set_timeout(config.bert.run.collective_timeout_s)
    state = TrainState()
    if resume_from is not None:
        with distributed.one_voice():
            state = run_state.restore(training, resume_from)
        _say(f"resumed from {resume_from} at step {state.step} of {run.length}")
    elif config.init_state is not None:
        with distributed.one_voice():
            if distributed.is_main():
                manifest.verify_folder(config.init_state)
            training.restore_moments(StateReader(config.init_state))
        _say(f"moments of {config.init_state}")
    is_elsewhere = (
        resume_from is not None and resume_from.resolve().parent != run.folder.path.resolve()
    )
    with _tracker(run, state) as tracker:
        code = _loop(run, training, state, tracker, stop, args, begins_elsewhere=is_elsewhere)
    training.close()
    return code


def _output_folder(run: Experiment, args: argparse.Namespace) -> tuple[Path | None, bool]:
    """Rank 0 makes the folder; the state to resume from, and whether nothing is left to do."""
    path = run.folder.path
    found: Path | None = None
    is_complete = False
    if distributed.is_main():
        run_state.claim(path)
        if args.resume == "never":
            _refuse_to_move_inputs(run)
        if args.resume == "never" and (aside := run_state.set_aside(path)):
            _say(f"the earlier run is kept in {aside}")
            run_state.claim(path)
        found = run_state.find_state(path, args.resume)
        if found is not None:
            run_state.check_resumable(found, run.folder)
            is_complete = _is_complete(run, found)
        run_state.supersede(path, found)
        if not is_complete:
            manifest.write_json(path / "config.json", run.folder.resolved)
            write_status(path, "running", None, total_steps=run.steps)
    return found, is_complete


def _refuse_to_move_inputs(run: Experiment) -> None:
    source = run.config.init_from
    shards = (*run.training, *run.held_out)
    used = [*([source.path] if source else []), *(shard.path for shard in shards)]
    folder = run.folder.path.resolve()
    for path in used:
        if folder in path.resolve().parents:
            raise ConfigError(
                f"--resume never sets {run.folder.path} aside, and with it {path}, which this run "
                "needs; choose another --output_dir"
            )


def _is_complete(run: Experiment, found: Path) -> bool:
    """Whether the run that ended with this state met a limit that still holds."""
    status = read_status(run.folder.path)
    step = run_state.saved_step(found)
    if status.get("state") != "done":
        return False
    if run.steps is not None and step >= run.steps:
        return True
    budget_s, elapsed_s = run.config.bert.run.max_train_s, status.get("elapsed_s")
    is_spent = budget_s is not None and elapsed_s is not None and elapsed_s >= budget_s
    return is_spent and status.get("step") == step


def _engine_config(run: Experiment) -> dict[str, Any]:
    ds = dict(run.config.deepspeed)
    ds.pop("scheduler", None)  # the loop sets the rate
    return {
        **ds,
        "train_batch_size": run.sizes.global_samples,
        "train_micro_batch_size_per_gpu": run.sizes.micro_samples,
        "gradient_accumulation_steps": run.sizes.accumulation_steps,
    }


@contextlib.contextmanager
def _tracker(run: Experiment, state: TrainState) -> Iterator[Any]:
    """Rank 0's tracker, closed with the outcome; None on the other ranks."""
    if not distributed.is_main():
        yield None
        return
    tracking = run.config.bert.tracking
    tracker = open_tracker(
        run.folder.path,
        wandb="wandb" in tracking.tracker,
        project=tracking.project,
        run_name=run.folder.path.name,
        config={**run.folder.resolved, **_origin(run)},
        resume_step=state.step,
    )
    if state.step:
        tracker.event(state.step, "resume", processes=distributed.world_size(), code=code_version())
    try:
        yield tracker
    except BaseException:
        tracker.close(1)
        raise
    tracker.close(0)


def _origin(run: Experiment) -> dict[str, Any]:
    """What a run is made of beside its settings."""
    folders = sorted({shard.path.parent for shard in run.training})
    return {
        "parameters": run.parameters,
        "processes": distributed.world_size(),
        "code": code_version(),
        "data": {
            **fingerprint(run.training),
            "inputs": dict(run.folder.inputs),
            "made_by": {
                str(folder): manifest.read_manifest(folder).config
                for folder in folders
                if manifest.is_complete(folder)
            },
        },
    }


def _loop(
    run: Experiment,
    training: Engine,
    state: TrainState,
    tracker: Any,
    stop: StopRequest,
    args: argparse.Namespace,
    *,
    begins_elsewhere: bool,
) -> int:
    settings = run.config.bert.run
    order = sample_order(run.training, seed=settings.seed, global_samples=run.sizes.global_samples)
    loader = StepLoader(
        run.training,
        order,
        vocab_size=run.folder.model.vocab_size,
        micro_samples=run.sizes.micro_samples,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        masking=run.masking,
        num_shapes=run.config.bert.kernels.num_shapes,
    )
    _print_header(run, training)
    profiling = loop.profile(run.folder.path) if args.profile and distributed.is_main() else None
    with (
        profiling or contextlib.nullcontext() as profiler,
        contextlib.closing(Saver(run.folder)) as saver,
    ):
        code = loop.train(
            training,
            loader,
            (lambda everything: _held_out(run, everything)) if run.held_out else None,
            state,
            loop.LoopConfig(
                total_steps=run.steps,
                logging_steps=settings.logging_steps,
                save_steps=settings.save_steps,
                eval_steps=settings.eval_steps,
                seed=settings.seed,
                max_train_s=settings.max_train_s,
                rate=functools.partial(run.config.rate, total_steps=run.steps),
                rows_of_epoch=order.num_rows,
                flops_per_sequence=run.flops_per_sequence,
                nsp=run.nsp,
                peak_flops=peak_flops(training.device),
                guard=run.config.bert.guard,
                begins_elsewhere=begins_elsewhere,
            ),
            saver,
            tracker,
            stop,
            profiler,
        )
    _finish(run, code, state.step)
    if distributed.is_main():
        outcome = {
            "step": state.step,
            "total_steps": run.steps,
            "elapsed_s": state.elapsed_s,
        }
        write_status(run.folder.path, "preempted" if code else "done", code, **outcome)
    return code


def _finish(run: Experiment, code: int, step: int) -> None:
    """Rank 0's last words."""
    if not distributed.is_main():
        return
    path = run.folder.path
    page = report.write_report([path], path / "report.html")
    how = "complete"
    if code:
        how = f"stopped at step {step} of {run.length}; the same command goes on"
    model = path / f"model_{step}"
    lacking = "none yet" if code else "none, it was removed"
    _say(f"{how}; model: {model if model.is_dir() else lacking}; curves: {page}")


def _held_out(run: Experiment, everything: bool) -> Iterator[tuple[dict[str, Tensor], bool]]:
    return evaluation_batches(
        run.held_out,
        num_rows=0 if everything else run.config.bert.run.eval_rows,
        batch_samples=_EVAL_MICRO_BATCHES * run.sizes.micro_samples,
        vocab_size=run.folder.model.vocab_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _print_header(run: Experiment, training: Engine) -> None:
    for name, value in run.facts().items():
        _say(f"{name}: {value}")
    model = run.folder.model
    choices = kernels.choose(
        run.config.bert.kernels,
        training.device,
        DTYPES[served.computes_in(run.config.deepspeed)],
        dropout_p=model.attention_probs_dropout_prob,
        head_width=model.hidden_size // model.num_attention_heads,
        hidden_size=model.hidden_size,
    )
    _say(kernels.format_choices(choices.values()))
    if not run.held_out:
        _say("no held-out shards: training goes on without evaluation")


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)
