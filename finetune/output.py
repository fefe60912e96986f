"""The output folder: a finished model replaces an older one only when it is whole.

`OUT/` is itself the model folder and holds other things too: `result.json`, predictions,
`step_<n>/`, and until the training ends `state/`, from which a run that was ended goes on. All
files of a finished model are gathered in a hidden folder inside it and then moved up, the manifest
last: without a manifest `OUT/` is no model.
"""

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from zerobert import manifest
from zerobert.errors import ConfigError
from zerobert.manifest import MANIFEST_NAME

RESULT_NAME = "result.json"
STATE_NAME = "state"
_COMPLETED = ".completed"
_OLDER_FOLDER = re.compile(r"(step|seed)_\d+")


def check_output(out: Path, model: Path) -> None:
    """Refuse a folder whose contents fine-tuning did not write; say what becomes of those it did.

    Raises:
        ConfigError: it is or holds the model to start from, is a file, or another model's folder.
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

    What an earlier run left in `out` is removed then: the files that its manifest names, and the
    `step_<n>` and `seed_<n>` folders that are not this run's or were never completed. Other files
    stay.

    Args:
        config, inputs: for the manifest.
        keep: the folders in `out` that this run wrote.

    Raises:
        DataError: something can't be written.
    """
    completed = out / _COMPLETED
    with manifest.staged_folder(completed) as staging:
        yield staging
        manifest.write_manifest(staging, kind="model", config=config, inputs=inputs)
    with manifest.writing(out):
        _remove_older(out, keep)
        # The result goes first, as the mark that the folder is ours; the manifest last.
        names = {path.name for path in completed.iterdir()}
        middle = sorted(names - {RESULT_NAME, MANIFEST_NAME})
        for name in (RESULT_NAME, *middle, MANIFEST_NAME):
            (completed / name).replace(out / name)
        completed.rmdir()


def _remove_older(out: Path, keep: Collection[str]) -> None:
    if manifest.is_complete(out):
        older = manifest.read_manifest(out).files
        (out / MANIFEST_NAME).unlink()
        for name in older:
            (out / name).unlink(missing_ok=True)
    for path in out.iterdir():
        # Left by a run that was killed, or of no use any more.
        is_unfinished = manifest.is_staging(Path(path.name)) or path.name == STATE_NAME
        if is_unfinished or (_OLDER_FOLDER.fullmatch(path.name) and path.name not in keep):
            shutil.rmtree(path)
