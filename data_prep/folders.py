"""Output folders: which are done, which must not be touched; and text files written whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerobert.errors import ConfigError
from zerobert.manifest import find_problems, is_complete, read_manifest, writing


def is_done(
    folder: Path, *, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    """Whether the folder already is what this command would make.

    Raises:
        ConfigError: something else lies there, which must not be replaced unasked.
        DataError: it can't be looked into.
    """
    with writing(folder):
        if not folder.exists():
            return False
        if not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose another --output_dir")
        if not is_complete(folder):
            _refuse_in_use(folder)
            return False
    manifest = read_manifest(folder)
    wanted = json.loads(json.dumps(config))
    if manifest.kind != kind:
        changed = f"it holds {manifest.kind}"
    elif different := [key for key in wanted if manifest.config.get(key) != wanted[key]]:
        changed = "it was made with " + ", ".join(
            f"{key} {manifest.config.get(key)!r} instead of {wanted[key]!r}" for key in different
        )
    elif sorted(manifest.inputs.values()) != sorted(inputs.values()):
        changed = "it was made from other text or another vocabulary"
    elif problems := find_problems(folder):
        changed = f"it was changed since ({problems[0]})"
    else:
        return True
    raise ConfigError(f"{folder}: {changed}; remove it or choose another output folder")


def _refuse_in_use(folder: Path) -> None:
    """Refuse a folder that the finished one can not replace."""
    if os.path.ismount(folder):
        raise ConfigError(f"{folder} is a mount point; name a folder inside it as --output_dir")
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files that this command did not write; choose another --output_dir"
        )
