"""Where text comes from: files of this machine, and files behind URLs, through fsspec."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from data_prep.streams import COMPRESSIONS, OnRead, reading, unpacked
from zerobert.errors import ConfigError, DataError, MissingDependencyError
from zerobert.manifest import visible_folders

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_THIS_MACHINE = ("file", "local")
_TEXT_SUFFIX = ".txt"  # of the files that the `text` command writes
# How Wikipedia names the parts of a split dump, by the first and the last page: `.xml-p1p41242`.
_DUMP_PART = re.compile(r"\.xml-p\d+p\d+")
_MAX_NAMES = 5  # in a line that tells what was left out
_HASH_BLOCK_BYTES = 1 << 20
# What storages call a hash of a file's contents, surest first, and the time of its last change.
_CONTENT_KEYS = ("sha256", "blob_id", "md5Hash", "content_md5", "checksum", "ETag", "etag")
_TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "created")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file to read.

    Attributes:
        name: the path or URL as messages and manifests show it; always printable.
        path: as its file system knows it.
        num_bytes: its size as it lies there; 0 where a server does not say.
        stamp: changes when the file does.
        filesystem: the file system behind a URL; None for this machine's.
    """

    name: str
    path: str
    num_bytes: int
    stamp: str
    filesystem: "AbstractFileSystem | None" = None

    @property
    def compression(self) -> str:
        """The suffix of its compression, `.bz2` of `dump.xml.bz2`; empty where it has none."""
        return compression(self._file_name)

    @property
    def suffix(self) -> str:
        """The suffix in front of its compression's: `.xml` of `dump.xml.bz2`."""
        return inner_suffix(self._file_name)

    @property
    def _file_name(self) -> str:
        """The path without what asks a web server for something of it."""
        return self.path if self.filesystem is None else self.path.partition("?")[0]


def compression(name: str) -> str:
    """The suffix of a compression that is read, or nothing."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def inner_suffix(name: str) -> str:
    """The suffix in front of a compression's, in lower case; of a part of a dump the whole's."""
    path = PurePosixPath(name)
    suffix = (path.with_suffix("") if compression(name) else path).suffix.lower()
    return ".xml" if _DUMP_PART.fullmatch(suffix) else suffix


def find_sources(inputs: Sequence[str], suffixes: Container[str]) -> list[Source]:
    """Every file to read, once: those named, and in named folders those that end right.

    Which files of folders are passed over is told on stderr.

    Args:
        inputs: files and folders, here or as URLs. What exists here under such a name is never a
            URL, whatever the name looks like.
        suffixes: of files to take from folders; files without one are taken too.

    Raises:
        DataError: something does not exist or can't be reached.
        ConfigError: a URL of a kind that fsspec does not know.
        MissingDependencyError: the package that reads a kind of URL is not installed.
    """
    found: dict[tuple[object, str], Source] = {}
    skipped: list[str] = []
    for text in inputs:
        url = _URL.match(text)
        if not text:
            raise ConfigError("--input: wanted files, folders or URLs, got an empty name")
        if url is None or os.path.lexists(text):
            sources = _local_sources(Path(text), suffixes, skipped)
        elif url[1].lower() in _THIS_MACHINE:
            sources = _local_sources(Path(text[url.end() :]), suffixes, skipped)
        else:
            sources = _remote_sources(text, url[1].lower(), suffixes, skipped)
        for source in sources:
            place = source.path if source.filesystem else os.path.realpath(source.path)
            found.setdefault((source.filesystem, place), source)
    if skipped and found:
        shown = ", ".join(map(printable, skipped[:_MAX_NAMES]))
        more = f" and {len(skipped) - _MAX_NAMES} more" if len(skipped) > _MAX_NAMES else ""
        print(f"note: passed over for their suffix: {shown}{more}", file=sys.stderr)
    return list(found.values())


def printable(name: str) -> str:
    """A name with the bytes escaped that are no text, which file names may hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _local_sources(path: Path, suffixes: Container[str], skipped: list[str]) -> Iterator[Source]:
    for file in walk(path, suffixes, skipped) if is_folder(path) else [path]:
        yield local_source(file)


def is_folder(path: Path) -> bool:
    """Whether a folder of this machine lies there.

    Raises:
        DataError: it can't be looked at.
    """
    with reading(printable(str(path))):
        return path.is_dir()


def walk(
    folder: Path, suffixes: Container[str], skipped: list[str] | None = None
) -> Iterator[Path]:
    """The files below a folder that end right, in order; hidden ones are left out.

    Args:
        skipped: learns of those that end otherwise.

    Raises:
        DataError: a folder can't be read.
    """
    for parent, names in visible_folders(folder, _refuse_folder):
        for name in names:
            if _ends_right(name, suffixes):
                yield parent / name
            elif skipped is not None:
                skipped.append(str(parent / name))


def _ends_right(name: str, suffixes: Container[str]) -> bool:
    suffix = inner_suffix(name)
    return not suffix or suffix in suffixes


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))} can't be read: {error.strerror}") from error


def text_files(folder: Path) -> list[Path]:
    """The `.txt` files of a text folder, searched downwards.

    Raises:
        DataError: there are none, or a packed one, which would be passed over.
    """
    found = list(walk(folder, (_TEXT_SUFFIX,)))
    if packed := [path for path in found if compression(path.name) and inner_suffix(path.name)]:
        raise DataError(
            f"{packed[0]} is packed, as are {len(packed)} files here in all; unpack them, or let "
            f"`python -m data_prep text --input {folder}` read them first"
        )
    files = [path for path in found if path.suffix.lower() == _TEXT_SUFFIX]
    if not files:
        raise DataError(
            f"{folder}: no .txt file; `python -m data_prep text --output_dir {folder}` makes them"
        )
    return files


def local_source(path: Path) -> Source:
    """A file of this machine.

    Raises:
        DataError: it is missing, or it is no file that can be read twice.
    """
    name = printable(str(path))
    with reading(name):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{name} can't be read: Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name} is a pipe or device, and text is read twice; save it as a file")
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    return Source(name=name, path=str(path), num_bytes=status.st_size, stamp=stamp)


def _remote_sources(
    url: str, protocol: str, suffixes: Container[str], skipped: list[str]
) -> Iterator[Source]:
    kind = _filesystem_class(url, protocol)
    with reading(url):
        filesystem = kind(**kind._get_kwargs_from_urls(url))
        root = str(kind._strip_protocol(url))
        info = filesystem.info(root)
        infos = {root: info}
        if info.get("type") == "directory":
            infos = filesystem.find(root, detail=True)
    for path, found in sorted(infos.items()):
        name = str(filesystem.unstrip_protocol(path))
        if any(part.startswith(".") for part in PurePosixPath(path[len(root) :]).parts):
            continue
        if path == root or _ends_right(path, suffixes):
            yield Source(
                name=name,
                path=path,
                num_bytes=found.get("size") or 0,
                stamp=_remote_stamp(filesystem, path, found),
                filesystem=filesystem,
            )
        else:
            skipped.append(name)


def _filesystem_class(url: str, protocol: str) -> Any:
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise MissingDependencyError(f"{url} is read by fsspec: pip install fsspec") from error
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"{url}: fsspec knows no {protocol}:// ({error})") from error
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        command = f"; pip install {package}" if package != "fsspec" else ""
        raise MissingDependencyError(f"{url}: {error}{command}") from error


def _remote_stamp(filesystem: Any, path: str, listed: Mapping[str, Any] | None = None) -> str:
    """What a storage says of a file's contents, or else of its size and age.

    Args:
        listed: what it said of the file in a list of many, which is less than it says of one.
    """
    info = filesystem.info(path) if listed is None else listed
    large = info.get("lfs")
    known = {**info, **large} if isinstance(large, Mapping) else info
    for key in _CONTENT_KEYS:
        if known.get(key):
            return f"{key} {known[key]}"
    if listed is not None:
        return _remote_stamp(filesystem, path)
    times = [f"{key} {known[key]}" for key in _TIME_KEYS if known.get(key)]
    return " ".join([f"size {known.get('size')}", *times[:1]])


def identify(source: Source, on_read: OnRead | None = None) -> str:
    """What tells this content from any other: a SHA-256, or for a URL the storage's own word.

    Raises:
        DataError: the file can't be read.
    """
    if source.filesystem is not None:
        return source.stamp
    digest = hashlib.sha256()
    with reading(source.name), _raw(source) as raw, unpacked(raw, "", on_read) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_unchanged(source: Source) -> None:
    """Refuse a file that is another one than when it was found.

    Raises:
        DataError: it was changed, or is gone.
    """
    with reading(source.name):
        if source.filesystem is None:
            stamp = local_source(Path(source.path)).stamp
        else:
            source.filesystem.invalidate_cache()
            stamp = _remote_stamp(source.filesystem, source.path)
    if stamp != source.stamp:
        raise DataError(
            f"{source.name} was changed while it was read; wait until it is whole, then run the "
            "same command again"
        )


@contextlib.contextmanager
def opened(source: Source, on_read: OnRead | None = None) -> Iterator[io.BufferedReader]:
    """A file's bytes, unpacked.

    Raises:
        DataError: whatever goes wrong while it is read; names the file.
    """
    with (
        reading(source.name),
        _raw(source) as raw,
        unpacked(raw, source.compression, on_read) as file,
    ):
        yield file


@contextlib.contextmanager
def opened_packed(source: Source) -> Iterator[IO[bytes]]:
    """A file's bytes as they lie there, for readers that jump.

    Raises:
        DataError: whatever goes wrong while it is read; names the file.
    """
    with reading(source.name), _raw(source) as raw:
        yield raw


def _raw(source: Source) -> IO[bytes]:
    if source.filesystem is None:
        return open(source.path, "rb", buffering=0)
    file: IO[bytes] = source.filesystem.open(source.path, "rb")
    return file
