"""A run's folders: `model_<step>/` for the world, `state_<step>/` to resume from, `latest`.

A folder is complete or absent; `latest` moves last.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from zerobert import checkpoint, distributed, manifest, training_state
from zerobert.config import BertConfig
from zerobert.ds_config import check_same_run
from zerobert.engine import Engine
from zerobert.errors import CheckpointError, ManifestError
from zerobert.served import precision
from zerobert.tokenizer import WordPieceTokenizer
from zerobert.training_state import Snapshot

LATEST_NAME = "latest"
SKIPPED_NAME = "skipped.json"


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Where a run stands: all that changes in it beside weights and optimizer.

    Attributes:
        samples: sequences trained on.
        position: the next sequence in the order of the data; more than `samples` where some were
            left out.
    """

    step: int = 0
    samples: int = 0
    position: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def advance(self, *, samples: int, tokens: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.samples += samples
        self.position += samples
        self.tokens += tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What is needed to write a run's folders.

    Attributes:
        identity: what a resumed run must agree in (`pretrain.config.identity`).
        inputs: name -> sha256 of the vocabulary and the data's manifests.
        micro_samples: the sequences of a micro-batch, which a resumed run may change.
    """

    path: Path
    model: BertConfig
    tokenizer: WordPieceTokenizer
    resolved: Mapping[str, Any]
    identity: Mapping[str, Any]
    inputs: Mapping[str, str]
    micro_samples: int
    keep_states: int
    keep_models: int = 0
    keep_every_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """One time that a run went back: from that state on it goes on behind `end_sample`."""

    to_step: int
    from_step: int
    end_sample: int
    reason: str


def _read_skipped(path: Path) -> list[Skipped]:
    try:
        notes = json.loads((path / SKIPPED_NAME).read_text(encoding="utf-8"))
        return [Skipped(**note) for note in notes]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / SKIPPED_NAME} can't be read: {error}") from error


def _write_skipped(path: Path, notes: Sequence[Skipped]) -> None:
    manifest.write_json(path / SKIPPED_NAME, [dataclasses.asdict(note) for note in notes])


class Saver:
    """Writes a run's folders in the background: the training goes on when its state is copied.

    One save at a time: the next one waits for it, and so does the end of the run. Every rank writes
    the pieces that it holds; rank 0 then makes the model folder of them, completes the state, and
    moves `latest` to it.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._group = distributed.new_group()
        self._pending: Future[None] | None = None

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy what is to be saved, and begin to write it; collective.

        Raises:
            DataError: the save before this one failed.
        """
        self.wait()
        copies = engine.snapshot(), dataclasses.replace(state)
        self._pending = self._pool.submit(self._write, *copies)

    def check(self) -> None:
        """Let the outcome of a save be known as soon as it has one.

        Raises:
            DataError: a folder can't be written; on the rank that noticed, the others end quietly.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way.

        Raises:
            DataError: as in `check`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Take no more saves; one that is under way goes on to its end, or to the process's."""
        self._pool.shutdown(wait=False)

    def go_back(self, wrong: TrainState, num_states: int, reason: str) -> Path | None:
        """Make an earlier state the newest, and note what is to be skipped behind it; collective.

        Args:
            wrong: where the training stands, up to which all samples behind the earlier state are
                to be skipped.
            num_states: how many states to go back, 1 for the newest; fewer where there are no more.

        Returns:
            The earlier state; None where there is none.
        """
        self.wait()
        target: Path | None = None  # on rank 0
        with distributed.one_voice():
            if distributed.is_main():
                states = _states(self._run.path)
                target = _first_sound(states[min(num_states, len(states)) - 1 :])
            if target is not None:
                note = Skipped(
                    to_step=saved_step(target),
                    from_step=wrong.step,
                    end_sample=wrong.position,
                    reason=reason,
                )
                _write_skipped(self._run.path, [*_read_skipped(self._run.path), note])
                supersede(self._run.path, target)
        found: Path | None = distributed.broadcast_object(target)
        return found

    def _write(self, snapshot: Snapshot, state: TrainState) -> None:
        """All of one save, on every rank. The model folder first, so that a state never lies there
        without it.
        """
        run = self._run
        folder = run.path / f"state_{state.step}"
        training_state.write_state(
            folder,
            snapshot,
            config={
                "step": state.step,
                "world_size": distributed.world_size(),
                "micro_samples": run.micro_samples,
                "identity": dict(run.identity),
                "train_state": dataclasses.asdict(state),
            },
            inputs=run.inputs,
            finish=lambda reader, _: _save_model(dict(reader.weights()), state, run),
            group=self._group,
        )
        with distributed.one_voice(self._group):
            if distributed.is_main():
                manifest.write_text(run.path / LATEST_NAME, folder.name + "\n")
                _prune(run)


def _save_model(weights: Mapping[str, Tensor], state: TrainState, run: RunFolder) -> None:
    has_nsp = any(name.startswith("cls.seq_relationship.") for name in weights)
    facts = {
        "optimizer steps": state.step,
        "sequences": state.samples,
        "tokens": state.tokens,
        "training": "masked LM" + (" + next sentence prediction" if has_nsp else ""),
        "precision": precision(run.resolved),
    }
    checkpoint.save_model(
        run.path / f"model_{state.step}",
        weights,
        run.model,
        run.tokenizer,
        card=checkpoint.model_card(title="BERT pretrained with zerobert", facts=facts),
        source=run.resolved,
        inputs=run.inputs,
    )


def _prune(run: RunFolder) -> None:
    models = sorted(_numbered(run.path, "model"), key=_named_step, reverse=True)
    old = models[run.keep_models :] if run.keep_models else []
    for folder in [*_states(run.path)[run.keep_states :], *old]:
        if not run.keep_every_steps or _named_step(folder) % run.keep_every_steps:
            shutil.rmtree(folder, ignore_errors=True)


def _states(path: Path) -> list[Path]:
    """Complete states, newest first."""
    found = filter(manifest.is_complete, _numbered(path, "state"))
    return sorted(found, key=_named_step, reverse=True)


def _numbered(path: Path, kind: str) -> list[Path]:
    """The folders `<kind>_<step>` of a run."""
    names = re.compile(rf"{kind}_\d+")
    return [folder for folder in path.glob(f"{kind}_*") if names.fullmatch(folder.name)]


def _named_step(folder: Path) -> int:
    """The step of a state or a model of this run's, which may be damaged inside."""
    return int(folder.name.rpartition("_")[2])


def find_state(path: Path, resume: str) -> Path | None:
    """The state to resume from, its checksums verified; None to start anew.

    A damaged newest state falls back to the one before it, and says so.

    Args:
        resume: `auto`, `never`, or the path of a state folder.

    Raises:
        CheckpointError: the state that was named can't be used, or all there are, are damaged, or
            all there were, are gone.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _first_sound([Path(resume)])
    states = _states(path)
    if not states and (path / LATEST_NAME).exists():  # written when a first state was whole
        raise CheckpointError(
            f"{path} holds a run whose states are gone: it can't go on, and would be written over; "
            "name another --output_dir, or move it aside with --resume never"
        )
    return _first_sound(states)


def _first_sound(candidates: Sequence[Path]) -> Path | None:
    """The first state whose files are what they were, None of none.

    Raises:
        CheckpointError: there are states, and all are damaged.
    """
    problems = []
    for folder in candidates:
        try:
            _check_state(folder)
        except ManifestError as error:
            print(f"warning: {folder} is not used: {error}", flush=True)
            problems.append(str(error))
        else:
            return folder
    if problems:
        raise CheckpointError(
            f"no usable training state: {problems[0]}; "
            "name another with --resume, or start over with --resume never"
        )
    return None


def _check_state(folder: Path) -> None:
    kind = manifest.verify_folder(folder).kind
    if kind != "state":
        raise ManifestError(f"{folder} is a {kind} folder, wanted state_<step>")


def saved_step(folder: Path) -> int:
    """The optimizer step that a state was saved at."""
    return int(manifest.read_manifest(folder).config["step"])


def micro_batch_of(path: Path) -> int | None:
    """The micro-batch of the run that lies in a folder; None where none has been saved."""
    for folder in _states(path):
        with contextlib.suppress(ManifestError):
            return int(manifest.read_manifest(folder).config["micro_samples"])
    return None


def check_resumable(folder: Path, run: RunFolder) -> None:
    """Hold a state against the run that is to go on from it.

    Raises:
        ConfigError: the state is of a run with other settings.
    """
    saved = manifest.read_manifest(folder).config
    before = {**saved["identity"]}
    for name in ("total_steps", "max_train_s"):  # earlier versions held what no rate depends on
        if run.identity.get(name) is None:
            before.pop(name, None)
    check_same_run(before, run.identity, str(folder))
    if saved["micro_samples"] != run.micro_samples:
        print(
            f"warning: the micro-batch was {saved['micro_samples']}, is {run.micro_samples}: the "
            "samples stay the same, their dropout does not",
            flush=True,
        )


def restore(engine: Engine, folder: Path) -> TrainState:
    """Bring an engine to where a state was saved, behind the samples that the run of this folder
    was to skip there; collective.

    Raises:
        CheckpointError: the state can't be loaded, or is of another model.
    """
    engine.restore(training_state.StateReader(folder))
    state = TrainState(**manifest.read_manifest(folder).config["train_state"])
    ends = [note.end_sample for note in _read_skipped(folder.parent) if note.to_step == state.step]
    state.position = max([state.position, *ends])
    return state


def claim(path: Path) -> None:
    """Make a run's folder, and keep other runs out of it for as long as this process lives.

    Raises:
        ConfigError: another run is writing into the folder.
        DataError: the folder can't be made.
    """
    manifest.claim_folder(path)  # stays open: the claim ends with this process
    manifest.remove_leftovers(path)  # of a run that was killed


def supersede(path: Path, resumed: Path | None) -> None:
    """Make the state that a run goes on from its newest: those beyond it and their models are
    renamed, and what was to be skipped behind them is forgotten.

    Args:
        resumed: None where the run begins.
    """
    step = -1 if resumed is None else saved_step(resumed)
    beyond = [_named_step(folder) for folder in _states(path) if _named_step(folder) > step]
    for folder in (path / f"{kind}_{number}" for number in beyond for kind in ("model", "state")):
        if folder.exists():
            with manifest.writing(folder):
                folder.rename(_free_name(path / f"superseded-{folder.name}"))
    notes = _read_skipped(path)
    if kept := [note for note in notes if note.to_step <= step]:
        _write_skipped(path, kept)
    elif notes:
        with manifest.writing(path):
            (path / SKIPPED_NAME).unlink()
    if newest := next(iter(_states(path)), None):
        manifest.write_text(path / LATEST_NAME, f"{newest.name}\n")


def _free_name(path: Path) -> Path:
    """The path, or one with a number behind it where that is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def set_aside(path: Path) -> Path | None:
    """Move an earlier run's folder out of the way of one that starts anew; nothing is deleted.

    Returns:
        Where it went; None where there was no run.
    """
    path = path.resolve()  # `.` has no name to add to
    if not _states(path) and not list(path.glob(f"model_*/{manifest.MANIFEST_NAME}")):
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    with manifest.writing(aside):
        path.rename(aside)
    return aside
