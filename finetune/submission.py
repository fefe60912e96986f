"""All tasks' predictions as the one file that the GLUE server takes: a zip of one TSV a test set.

Source: gluebenchmark.com, instructions for submission.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from finetune.tasks import TASKS
from zerobert.errors import DataError
from zerobert.manifest import write_bytes

ZIP_NAME = "submission.zip"
NAMES = tuple(split.submission for task in TASKS for split in task.test)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name: equal files, equal zips


def write_zip(path: Path, folders: Sequence[Path]) -> list[str]:
    """Pack the predictions that the tasks' folders hold.

    Returns:
        The names of the test sets that the server wants and that no folder has answers to.

    Raises:
        DataError: a file can't be read, or the zip can't be written.
    """
    paths = {name: [folder / f"{name}.tsv" for folder in folders] for name in NAMES}
    found = {name: file for name in NAMES for file in paths[name] if file.is_file()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, file in found.items():
            entry = zipfile.ZipInfo(f"{name}.tsv", _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, on every system
            archive.writestr(entry, _read(file))
    write_bytes(path, packed.getvalue())
    return [name for name in NAMES if name not in found]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}") from error
