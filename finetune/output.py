"""The output folder: a finished model replaces an older one only when it is whole.

`OUT/` is itself the model folder and holds other things too: `result.json`, predictions,
`step_<n>/`, and until the training ends `state/`, from which a run that was ended goes on. All
files of a finished model are gathered in a hidden folder inside it and then moved up, the manifest
last: without a manifest `OUT/` is no model. The next run ends the moves of one that was killed.
`status.json` tells whether a run lives, or how it ended.
"""

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.report import REPORT_NAME
from zerobert import distributed, manifest
from zerobert.checkpoint import MODEL_NAMES
from zerobert.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, ConfigError, DataError, exit_code
from zerobert.manifest import MANIFEST_NAME
from zerobert.tracking import write_status

RESULT_NAME = "result.json"
STATE_NAME = "state"
_NAMES = (*MODEL_NAMES, REPORT_NAME)  # of a finished model's files, whatever its task
_COMPLETED, _OLDER = ".completed", ".older"
_WRITTEN_ON_THE_WAY = re.compile(rf"step_\d+|{STATE_NAME}")


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Have the output folder for oneself.

    Raises:
        ConfigError: another run has it.
        DataError: nothing can be written there.
    """
    descriptor = manifest.claim_folder(out) if distributed.is_main() else None
    try:
        if descriptor is not None:
            finish_replacement(out)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def told(out: Path) -> Iterator[None]:
    """Keep `status.json` in a claimed folder: that the run lives, and how it ended.

    Raises:
        DataError: it can't be written.
    """
    if not distributed.is_main():
        yield
        return
    tell = functools.partial(write_status, out, kind="finetune")
    tell("running", None)
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        is_asked = code in (EXIT_TERMINATED, EXIT_INTERRUPTED)
        reason = "" if isinstance(error, SystemExit) else " ".join(str(error).split())
        with contextlib.suppress(DataError):  # a full disk: the first reason is the one to tell
            tell("preempted" if is_asked else "failed", code, error=reason or type(error).__name__)
        raise
    tell("done", 0)


def check_output(out: Path, model: Path, predictions: Collection[str] = ()) -> None:
    """Refuse a folder whose contents fine-tuning did not write.

    Args:
        model: the one to start from.
        predictions: the names of the files for them.

    Raises:
        ConfigError: it is or holds the model to start from, is a file, is another model's folder,
            or something of another's has a name there that is needed.
    """
    start = model.resolve()
    if model.exists() and out.resolve() in (start, *start.parents):
        raise ConfigError(
            f"--output_dir {out} is or holds the model to start from, which would be lost; "
            "choose another folder"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file; choose a folder")
    has_other_model = (out / "config.json").exists() or manifest.is_complete(out)
    if has_other_model and not (out / RESULT_NAME).exists():
        raise ConfigError(
            f"--output_dir {out} holds a model that fine-tuning did not write; "
            "choose another folder"
        )
    needed = {*predictions, *(() if (out / RESULT_NAME).exists() else _NAMES)} - _written(out)
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        is_way = _WRITTEN_ON_THE_WAY.fullmatch(path.name) and not manifest.is_complete(path)
        if is_way or path.name in needed:
            raise ConfigError(
                f"--output_dir {out}: fine-tuning did not write {path}, and would write over it; "
                "move it away or choose another folder"
            )


def _written(out: Path) -> set[str]:
    """The names of the files that runs have written, the last of them not yet moved up perhaps."""
    folders = (out, out / _COMPLETED, out / _COMPLETED / _OLDER)
    records = [manifest.read_manifest(folder) for folder in folders if manifest.is_complete(folder)]
    return {name for record in records for name in record.files}


def announce_replacement(out: Path) -> None:
    """Say what becomes of a model that is there."""
    if manifest.is_complete(out):
        print(
            f"{out} holds a finished model: it stays until the new one is complete, then it is "
            "replaced"
        )


@contextlib.contextmanager
def replacing(
    out: Path, *, config: Mapping[str, Any], inputs: Mapping[str, str], keep: Collection[str]
) -> Iterator[Path]:
    """Yield an empty folder whose files become those of `out` when the block ends, all or none.

    What an earlier run left in `out` is removed then: the files and the `step_<n>` and `seed_<n>`
    folders that its manifest names, if they are not this run's. All else stays.

    Args:
        config, inputs: for the manifest.
        keep: the folders in `out` that this run wrote.

    Raises:
        DataError: something can't be written.
    """
    completed = out / _COMPLETED
    record = {**config, "folders": sorted(keep)}
    with manifest.staged_folder(completed) as staging:
        yield staging
        manifest.write_manifest(staging, kind="model", config=record, inputs=inputs)
    finish_replacement(out)
    discard_state(out, keep)  # last: until the model is there it is all that there is


def finish_replacement(out: Path) -> None:
    """Move a completed model up, from wherever the process was killed that began with it.

    Raises:
        DataError: something can't be moved.
    """
    completed = out / _COMPLETED
    if not completed.is_dir():
        return
    with manifest.writing(out):
        if manifest.is_complete(completed):
            record = manifest.read_manifest(completed)
            _remove_older(out, completed / _OLDER, record)
            # The result goes first, as the mark that the folder is ours; the manifest last.
            middle = sorted(set(record.files) - {RESULT_NAME})
            for name in (RESULT_NAME, *middle, MANIFEST_NAME):
                if (completed / name).exists():
                    (completed / name).replace(out / name)
        shutil.rmtree(completed)


def discard_spent_state(out: Path) -> None:
    """Remove the state of the very training that the finished model is of, left by a kill."""
    state = out / STATE_NAME
    if manifest.is_complete(out) and manifest.is_complete(state):
        record, spent = manifest.read_manifest(out), manifest.read_manifest(state)
        if (record.config.get("run"), record.inputs) == (spent.config["run"], spent.inputs):
            discard_state(out, record.config["folders"])


def discard_state(out: Path, keep: Collection[str] = ()) -> None:
    """Remove what it takes to go on with a training, and the models that it saved on its way.

    Args:
        keep: those to be left.
    """
    state = out / STATE_NAME
    if manifest.is_complete(state):
        steps = manifest.read_manifest(state).config["progress"]["saved_steps"]
        for name in {f"step_{step}" for step in steps}.difference(keep):
            _discard(out / name)
    _discard(state)


def _discard(folder: Path) -> None:
    """Remove a folder of ours; one that is half removed is not taken for somebody else's."""
    if folder.is_dir():
        hidden = manifest.staging_path(folder)
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _remove_older(out: Path, aside: Path, new: manifest.Manifest) -> None:
    """Make an older model's folder no model any more, and remove what the new one lacks.

    Args:
        aside: a folder for the older one's manifest, so that a kill does not lose the list.
    """
    if manifest.is_complete(out):
        aside.mkdir(exist_ok=True)
        (out / MANIFEST_NAME).replace(aside / MANIFEST_NAME)
    if manifest.is_complete(aside):
        older = manifest.read_manifest(aside)
        for name in set(older.files).difference(new.files):
            (out / name).unlink(missing_ok=True)
        for name in set(older.config.get("folders", ())).difference(new.config["folders"]):
            _discard(out / name)
    manifest.remove_leftovers(out)  # of a run that was killed
