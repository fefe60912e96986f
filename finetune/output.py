"""The output folder: a finished model replaces an older one only when it is whole.

`OUT/` is itself the model folder and holds other things too: `result.json`, predictions,
`step_<n>/`, and until the training ends `state/`, from which a run that was ended goes on. All
files of a finished model are gathered in a hidden folder inside it and then moved up, the manifest
last: without a manifest `OUT/` is no model.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from zerobert import distributed, manifest
from zerobert.errors import ConfigError
from zerobert.manifest import MANIFEST_NAME

RESULT_NAME = "result.json"
STATE_NAME = "state"
_COMPLETED = ".completed"
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
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_output(out: Path, model: Path) -> None:
    """Refuse a folder whose contents fine-tuning did not write.

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
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if _WRITTEN_ON_THE_WAY.fullmatch(path.name) and not manifest.is_complete(path):
            raise ConfigError(
                f"--output_dir {out}: fine-tuning did not write {path}, and would write over it; "
                "move it away or choose another folder"
            )


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
    with manifest.writing(out):
        _remove_older(out, keep)
        # The result goes first, as the mark that the folder is ours; the manifest last.
        names = {path.name for path in completed.iterdir()}
        middle = sorted(names - {RESULT_NAME, MANIFEST_NAME})
        for name in (RESULT_NAME, *middle, MANIFEST_NAME):
            (completed / name).replace(out / name)
        completed.rmdir()


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


def _remove_older(out: Path, keep: Collection[str]) -> None:
    if manifest.is_complete(out):
        older = manifest.read_manifest(out)
        (out / MANIFEST_NAME).unlink()
        for name in older.files:
            (out / name).unlink(missing_ok=True)
        for name in set(older.config.get("folders", ())).difference(keep):
            _discard(out / name)
    discard_state(out, keep)
    manifest.remove_leftovers(out)  # of a run that was killed
