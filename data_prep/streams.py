"""Byte streams: measured as they lie on disk, handed on unpacked; failures name the file."""

import bz2
import contextlib
import gzip
import io
import lzma
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from zerobert.errors import DataError, MissingDependencyError

# Told how many bytes were just read, as they lie on disk.
OnRead = Callable[[int], object]

_BUFFER_BYTES = 1 << 20
_MAX_REASON_CHARACTERS = 300
# One such piece unpacks to half a gigabyte at worst: 4 bytes can stand for 128 KiB of one letter.
_ZSTD_PIECE_BYTES = 1 << 14
# What `zstd --long=31` needs, the most there is; less is a file that opens elsewhere and not here.
_ZSTD_MAX_WINDOW_BYTES = 1 << 31

# What the libraries behind URLs raise that is no OSError; those that are loaded are looked at.
_NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),  # an OSError from Python 3.11 on
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)


@contextlib.contextmanager
def unpacked(
    raw: IO[bytes], compression: str, on_read: OnRead | None = None
) -> Iterator[io.BufferedReader]:
    """Read a stream through its compression; concatenated members are read to the end of the last.

    Args:
        compression: `.gz`, `.bz2`, `.xz`, `.zst`, or anything else for none.

    Raises:
        EOFError: it ends inside a member; other damage is each library's own error.
        MissingDependencyError: it is `.zst` and zstandard is not installed.
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(io.BufferedReader(_Metered(raw, on_read), _BUFFER_BYTES))
        unpack = _UNPACKERS.get(compression)
        if unpack is not None:
            if not file.peek(1):
                raise EOFError("it is empty")
            file = stack.enter_context(io.BufferedReader(unpack(file), _BUFFER_BYTES))
        yield file


class _Metered(io.RawIOBase):
    """A stream that tells how much of it was read; it leaves closing to who opened the stream."""

    def __init__(self, file: IO[bytes], on_read: OnRead | None) -> None:
        self._file = file
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        if self._on_read is not None:
            self._on_read(len(data))
        return len(data)


class _ZstdFrames(io.RawIOBase):
    """Frames of zstd; a cut one is an error here, where zstandard's own reader just ends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._unpacker = _zstandard().ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_ZSTD_PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("a frame has no end")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _unpack(self) -> None:
        frame = self._frame or self._unpacker.decompressobj()
        self._ready = memoryview(frame.decompress(self._packed))
        self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError(".zst is read by zstandard: pip install zstandard") from error
    return zstandard


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _ZstdFrames,
}
COMPRESSIONS = tuple(_UNPACKERS)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what damaged files, disks and networks raise into a `DataError` that names the file.

    Raises:
        DataError: any of it was raised.
    """
    try:
        yield
    except _damage() as error:
        raise DataError(f"{name} is cut short or damaged ({error}); fetch it again") from error
    except FileNotFoundError as error:
        # Web servers that can't be reached come as this too.
        cause = f" ({_shortened(error.__cause__)})" if error.__cause__ else ""
        raise DataError(f"{name}: no such file or folder{cause}") from error
    except refusals() as error:
        raise DataError(f"{name} can't be read: {_shortened(error)}") from error


def _shortened(error: BaseException) -> str:
    """What an error says, or is; some say what they tried on five pages."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return textwrap.shorten(reason or type(error).__name__, _MAX_REASON_CHARACTERS)


def _damage() -> tuple[type[Exception], ...]:
    return (EOFError, zlib.error, lzma.LZMAError, *loaded(("zstandard", "ZstdError")))


def refusals() -> tuple[type[Exception], ...]:
    """What disks and networks raise."""
    return (OSError, *loaded(*_NETWORK_ERRORS))


def loaded(*names: tuple[str, str]) -> tuple[type[Exception], ...]:
    """Those of the named exceptions whose module was imported: no other can have been raised."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return tuple(kind for kind in found if kind is not None)


def decode(raw: bytes, *, where: Path | str, offset: int) -> str:
    """Bytes of a text file as text.

    Args:
        offset: where in the file the bytes stand, for messages.

    Raises:
        DataError: they are not UTF-8, or hold the NUL that only binary files have.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: {error.reason} at byte {offset + error.start}; "
            "convert it with iconv, or leave it out"
        ) from error
    if "\0" in text:
        raise DataError(f"{where} is not text: a NUL at byte {offset + raw.index(0)}; leave it out")
    return text
