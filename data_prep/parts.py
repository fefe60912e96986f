"""The parts of a text folder: filled one after the other, with what it takes to go on.

What stands in a part depends on the documents alone, never on who split them or how often the work
was broken off. The record of the complete parts is one hidden file beside them.
"""

import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.wiki import Counts
from zerobert.manifest import FileRecord, write_json, writing

_PART_BYTES = 64 << 20
_RECORD_NAME = ".progress.json"


class Place(NamedTuple):
    """Where in the input a document stands: the number of its source, its number there."""

    source: int
    document: int


class Piece(NamedTuple):
    """What became of one document: its lines (none if it holds no sentence), and counts of it."""

    place: Place
    raw: bytes
    counts: Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The complete parts of a folder.

    Attributes:
        place: of the first document after them.
        counts: of the documents up to there.
        left_out: what readers left out in the sources before that of `place`.
        seconds: the time that all of this took.
    """

    place: Place = dataclasses.field(default_factory=lambda: Place(0, 0))
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def load_progress(folder: Path) -> Progress:
    """What an earlier run completed; nothing if that is not all there.

    Raises:
        DataError: what is left of an incomplete part can't be removed.
    """
    progress = _read_record(folder / _RECORD_NAME)
    for name, record in progress.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.num_bytes:
            progress = Progress()
            break
    with writing(folder):
        for path in folder.glob("*part_*"):
            if path.name not in progress.files:
                path.unlink()
    return progress


def _read_record(path: Path) -> Progress:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return Progress(place=Place(*raw.pop("place")), files=files, **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Progress()


def write_parts(
    folder: Path,
    pieces: Iterator[Piece],
    progress: Progress,
    left_out_before: Callable[[int], Counts],
) -> Progress:
    """Fill part after part, recording each, until the pieces end.

    Args:
        progress: where the pieces start.
        left_out_before: counts of what readers left out in the sources before that number.

    Returns:
        The progress at the end, with counts of what comes after the last part.

    Raises:
        DataError: a part can't be written.
    """
    started = time.monotonic() - progress.seconds
    while True:
        path = folder / f"part_{len(progress.files):05d}.txt"
        counts: Counts = collections.Counter(progress.counts)
        part = _write_part(path, pieces, counts)
        progress = dataclasses.replace(
            progress, counts=dict(counts), seconds=time.monotonic() - started
        )
        if part is None:
            return progress
        place, record = part
        progress = dataclasses.replace(
            progress,
            place=place,
            files={**progress.files, path.name: record},
            left_out=dict(left_out_before(place.source)),
        )
        write_json(folder / _RECORD_NAME, dataclasses.asdict(progress))


def _write_part(
    path: Path, pieces: Iterator[Piece], counts: Counts
) -> tuple[Place, FileRecord] | None:
    """Write documents until the part is full, then give it its name; None if there are no more."""
    temporary = path.with_name(f".{path.name}")
    digest = hashlib.sha256()
    num_bytes = 0
    with writing(path):
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece.raw)
                digest.update(piece.raw)
                counts.update(piece.counts)
                num_bytes += len(piece.raw)
                if num_bytes >= _PART_BYTES:
                    break
            file.flush()
            os.fsync(file.fileno())
        if num_bytes == 0:
            temporary.unlink()
            return None
        temporary.replace(path)
    after = Place(piece.place.source, piece.place.document + 1)
    return after, FileRecord(num_bytes=num_bytes, sha256=digest.hexdigest())
