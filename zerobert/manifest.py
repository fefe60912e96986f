"""manifest.json: the last file written into a folder; its presence means that it is complete.

A folder is filled under a temporary name beside its final one and moved into place when its
manifest is written. Whatever kills the process leaves either the whole folder or none; long work
goes on in the unfinished one.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zerobert.errors import ConfigError, DataError, ManifestError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_STAGING_PREFIX = ".incomplete-"
_IDENTITY_NAME = ".identity.json"
_HASH_BLOCK_BYTES = 1 << 20
# What `write_bytes` leaves when the process is killed: hidden, with a UUID at the end.
_TEMPORARY = ".*." + 32 * "[0-9a-f]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a folder: its size, its hash and, for data, its rows."""

    num_bytes: int
    sha256: str
    num_rows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds, from what (`inputs`: name -> sha256) and how it was made."""

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileRecord]
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failed write (no space, no permission) into a `DataError` that names the path.

    Raises:
        DataError: the operating system refused the write.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        no_place = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
        remedy = "choose another path"
        if error.errno not in no_place:
            remedy = "free space or choose another output folder"
        raise DataError(
            f"cannot write {path}: {reason}; {remedy}, then run the same command again"
        ) from error


def sha256_file(path: Path | str) -> str:
    """The hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def visible_folders(
    folder: Path, on_error: Callable[[OSError], None]
) -> Iterator[tuple[Path, list[str]]]:
    """The folders from one down, each once and in order, with the names of their files; hidden ones
    are left out.

    Args:
        on_error: called for a folder that can't be read.
    """
    entered: set[str] = set()
    for parent, names, files in os.walk(folder, onerror=on_error, followlinks=True):
        if (real := os.path.realpath(parent)) in entered:  # a link back up, or twice the same
            names.clear()
            continue
        entered.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(parent), sorted(name for name in files if not name.startswith("."))


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that readers see either the old one or the whole new one.

    Raises:
        DataError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file as `write_bytes` does, in UTF-8.

    Raises:
        DataError: the file can't be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically.

    Raises:
        DataError: the file can't be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def staging_path(final: Path) -> Path:
    """Where a folder is filled until it is complete: hidden, on the same file system as `final`."""
    return final.with_name(_STAGING_PREFIX + final.name)


def leftovers(parent: Path) -> list[Path]:
    """The folders in a parent that were never completed."""
    return sorted(parent.glob(f"{_STAGING_PREFIX}*"))


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed process left in a folder: folders never completed, files half written.

    Whoever calls it holds the folder: nobody else writes there.
    """
    for folder in leftovers(parent):
        shutil.rmtree(folder, ignore_errors=True)
    _remove_half_written(parent)


def _remove_half_written(folder: Path) -> None:
    for unfinished in folder.glob(_TEMPORARY):
        unfinished.unlink(missing_ok=True)


def is_staging(path: Path) -> bool:
    """Whether the path lies in a folder that was never completed."""
    return any(part.startswith(_STAGING_PREFIX) for part in path.parts)


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the block ends, or goes when it raises.

    What an earlier, killed process left under the temporary name is removed first. A folder that is
    already at `final` is replaced.

    Raises:
        DataError: the folder can't be made or moved.
    """
    staging = staging_path(final)
    if staging.is_dir():
        with _locked(staging):  # of a process that was killed, unless somebody holds it
            shutil.rmtree(staging, ignore_errors=True)
    with writing(final):
        staging.mkdir(parents=True)
    with _locked(staging):
        try:
            yield staging
            publish_folder(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextlib.contextmanager
def resumable_folder(final: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to fill, with all that a broken-off call with the same identity left in it.

    It becomes `final` when the block ends, without its hidden files; when the block raises, it
    stays for the next call. What was begun with another identity is removed first.

    Args:
        identity: all that decides what the folder will hold, JSON-able.

    Raises:
        DataError: another process is filling it, or it can't be made or moved.
    """
    staging = staging_path(final)
    with writing(final):
        staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging):
        wanted = json.loads(json.dumps(identity))
        if _identity(staging) != wanted:
            with writing(final):
                _empty(staging)
            write_json(staging / _IDENTITY_NAME, wanted)
        _remove_half_written(staging)
        yield staging
        if final.exists():
            _remove_if_empty(final)
        publish_folder(staging, final)
        for hidden in final.glob(".*"):
            hidden.unlink()


def _remove_if_empty(final: Path) -> None:
    with writing(final):
        try:
            final.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise DataError(
                f"{final} was filled by somebody else in the meantime, and is left as it is; move "
                "it away and run the same command again, which has little left to do"
            ) from error


def _identity(staging: Path) -> Any:
    try:
        return json.loads((staging / _IDENTITY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however it ends.

    Raises:
        DataError: another process holds it.
    """
    descriptor = try_lock(folder)
    if descriptor is None:
        raise DataError(
            f"another process is filling {folder}; wait for its end or choose another folder"
        )
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor that is returned is closed, or the process ends.

    Returns:
        The open descriptor; None where another process holds the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def claim_folder(folder: Path) -> int:
    """Make a folder that can be written to, and keep other runs out of it.

    Returns:
        A descriptor: the claim ends when it is closed, or with this process.

    Raises:
        ConfigError: another run has claimed it.
        DataError: it can't be made, or nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        descriptor = try_lock(folder)
    if descriptor is None:
        raise ConfigError(
            f"another run is writing into {folder}; wait for its end or choose another --output_dir"
        )
    return descriptor


def publish_folder(staging: Path, final: Path) -> None:
    """Flush a filled folder to disk and move it to its final name; an older one there is replaced.

    Raises:
        DataError: the folder can't be moved.
    """
    with writing(final):
        for path in [*(path for path in staging.rglob("*") if path.is_file()), staging]:
            _fsync(path)
        if final.exists():
            retired = final.with_name(f"{_STAGING_PREFIX}{final.name}-{uuid.uuid4().hex}")
            final.rename(retired)
            staging.rename(final)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            staging.rename(final)
        _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    known: Mapping[str, FileRecord] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash every file under the folder and write its manifest; call it when all else is written.

    Hidden files are left out.

    Args:
        kind: what the folder is: `text`, `tokens`, `shards`, `model`, `state`.
        inputs: name -> sha256 of what the folder was made from.
        known: records of files that were hashed when they were written, by relative path.
        summary: figures for people (documents, tokens, seconds).

    Raises:
        DataError: the manifest can't be written.
    """
    files = {name: (known or {}).get(name) or _record(folder / name) for name in _names(folder)}
    manifest = Manifest(
        kind=kind,
        config=dict(config),
        inputs=dict(inputs),
        files=files,
        summary=dict(summary or {}),
    )
    write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest))
    return manifest


def _names(folder: Path) -> list[str]:
    """The files below a folder, relative to it, without hidden ones and its manifest."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        str(name)
        for name in names
        if name.name != MANIFEST_NAME and not any(part.startswith(".") for part in name.parts)
    ]


def _record(path: Path) -> FileRecord:
    return FileRecord(num_bytes=path.stat().st_size, sha256=sha256_file(path))


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ManifestError: there is none (the folder is incomplete), or it can't be understood.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise ManifestError(f"there is no folder {folder}") from error
        raise ManifestError(
            f"{folder} has no {MANIFEST_NAME}: it was never completed; make it again"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{path} can't be read ({error}); make the folder again") from error
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: wanted format_version {FORMAT_VERSION}, got "
            f"{raw.get('format_version') if isinstance(raw, dict) else type(raw).__name__}; "
            "it was written by another version of zerobert"
        )
    try:
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path} is not a manifest ({error}); make the folder again") from error


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest; its files are not read."""
    return (folder / MANIFEST_NAME).is_file()


def find_problems(folder: Path) -> list[str]:
    """Hold every file against the manifest; one line for each that differs, is missing or shut.

    Raises:
        ManifestError: there is no readable manifest.
    """
    problems = []
    for name, record in read_manifest(folder).files.items():
        if problem := _problem(folder / name, record):
            problems.append(f"{folder / name}: {problem}")
    return problems


def _problem(path: Path, record: FileRecord) -> str:
    """What is wrong with a file; nothing if it is as its record says."""
    try:
        if not path.is_file():
            return "missing"
        if (num_bytes := path.stat().st_size) != record.num_bytes:
            return f"{num_bytes} bytes, the manifest says {record.num_bytes}"
        if sha256_file(path) != record.sha256:
            return "its contents differ from the manifest's sha256"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return ""


def verify_folder(folder: Path) -> Manifest:
    """Read the manifest and hold every file against it.

    Raises:
        ManifestError: a file is missing or was changed.
    """
    if problems := find_problems(folder):
        raise ManifestError("; ".join(problems))
    return read_manifest(folder)
