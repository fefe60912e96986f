"""The `inspect` and `verify` commands: look at shards as a person would."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.parallel import progress
from data_prep.sources import is_folder, local_source
from zerobert.errors import ConfigError, DataError, ManifestError
from zerobert.manifest import (
    MANIFEST_NAME,
    find_problems,
    leftovers,
    read_manifest,
    try_lock,
    visible_folders,
)
from zerobert.shards import (
    SUFFIXES,
    VOCAB_NAME,
    Array,
    ShardInfo,
    check_values,
    describe_shard,
    find_shards,
    read_shard,
    shard_vocabulary,
)
from zerobert.tokenizer import CONTINUATION, WordPieceTokenizer

LEGEND = "[MASK]{was}: masked; =piece=: to be answered but left; new{was}: replaced at random"
_GREEN, _RED, _RESET = "\033[32m", "\033[31m", "\033[0m"


@dataclasses.dataclass(kw_only=True)
class Statistics:
    """Sums over shards; every share is one of them by another."""

    files: int = 0
    rows: int = 0
    places: int = 0
    filled: int = 0
    answers: int = 0
    masked: int = 0
    kept: int = 0
    random_next: int = 0
    used: Array = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=bool))

    def add(self, arrays: dict[str, Array], mask_id: int) -> None:
        """Count one shard's rows."""
        positions, answers = arrays["masked_lm_positions"], arrays["masked_lm_ids"]
        asked = positions > 0
        shown = np.take_along_axis(arrays["input_ids"], positions, axis=1)
        self.files += 1
        self.rows += len(positions)
        self.places += arrays["input_ids"].size
        self.filled += int(np.count_nonzero(arrays["input_mask"]))
        self.answers += int(np.count_nonzero(asked))
        self.masked += int(np.count_nonzero(asked & (shown == mask_id)))
        self.kept += int(np.count_nonzero(asked & (shown == answers)))
        self.random_next += int(np.count_nonzero(arrays["next_sentence_labels"]))
        self.used[arrays["input_ids"]] = True

    def lines(self) -> Iterator[str]:
        """The statistics, one a line."""
        answers = max(self.answers, 1)
        replaced = self.answers - self.masked - self.kept
        yield f"files {self.files}, rows {self.rows}"
        yield f"fill {self.filled / self.places:.1%} of {self.places // self.rows} places a row"
        yield f"masks a row {self.answers / self.rows:.2f}"
        yield (
            f"masked / kept / random {self.masked / answers:.1%} / {self.kept / answers:.1%} / "
            f"{replaced / answers:.1%}"
        )
        yield f"random next {self.random_next / self.rows:.1%}"
        yield f"vocabulary used {int(self.used.sum())} of {len(self.used)}"


def inspect_shards(path: Path, vocab_file: Path | None, *, num_rows: int) -> Iterator[str]:
    """The first rows as a person reads them, then the statistics of the whole, line by line.

    Args:
        path: a shard or a folder of shards.
        vocab_file: None for the `vocab.txt` beside the shards.

    Raises:
        ConfigError: no vocabulary is found.
        DataError: there is no shard, or one is damaged.
    """
    shards = _shards(path)
    tokenizer = _vocabulary(path, vocab_file)
    colours = sys.stdout.isatty()
    yield LEGEND
    yield from _first_rows(shards, tokenizer, num_rows, colours=colours)
    statistics = Statistics(used=np.zeros(len(tokenizer.vocab), dtype=bool))
    sizes = [shard.path.stat().st_size for shard in shards]
    for shard in progress(shards, label="inspect", sizes=sizes):
        statistics.add(_checked(shard, tokenizer), tokenizer.mask_id)
    yield ""
    yield from statistics.lines()


def _first_rows(
    shards: Sequence[ShardInfo], tokenizer: WordPieceTokenizer, num_rows: int, *, colours: bool
) -> Iterator[str]:
    for shard in shards:
        if num_rows == 0:
            return
        arrays = _checked(shard, tokenizer)
        for row in range(min(num_rows, shard.num_rows)):
            yield f"\n{shard.path.name} row {row}: {_label(arrays, row)}"
            yield _readable(arrays, row, tokenizer, colours=colours)
        num_rows -= min(num_rows, shard.num_rows)


def _checked(shard: ShardInfo, tokenizer: WordPieceTokenizer) -> dict[str, Array]:
    arrays = read_shard(shard.path)
    check_values(arrays, vocab_size=len(tokenizer.vocab), where=str(shard.path))
    return arrays


def _shards(path: Path) -> list[ShardInfo]:
    if not is_folder(path):
        return [describe_shard(path)]
    shards = [*find_shards([path], "training"), *find_shards([path], "test")]
    if not shards:
        raise DataError(f"{path}: no shard with `train` or `test` in its name")
    return shards


def _vocabulary(path: Path, vocab_file: Path | None) -> WordPieceTokenizer:
    found = vocab_file or (shard_vocabulary([path]) if is_folder(path) else _beside(path))
    if found is None:
        raise ConfigError(
            f"{path} has no {VOCAB_NAME} beside its shards; name it with --vocab_file"
        )
    return WordPieceTokenizer.from_file(found, do_lower_case=True)  # its tokens are all that counts


def _beside(shard: Path) -> Path | None:
    vocab_file = shard.with_name(VOCAB_NAME)
    return vocab_file if vocab_file.is_file() else None


def _label(arrays: dict[str, Array], row: int) -> str:
    if not arrays["segment_ids"][row].any():
        return "one segment"
    return "random next" if arrays["next_sentence_labels"][row] else "actual next"


def _readable(
    arrays: dict[str, Array], row: int, tokenizer: WordPieceTokenizer, *, colours: bool
) -> str:
    """One row's text, pieces joined to words, each masked place with its answer."""
    positions = arrays["masked_lm_positions"][row]
    answers = dict(zip(positions.tolist(), arrays["masked_lm_ids"][row].tolist(), strict=True))
    end = int(arrays["input_mask"][row].sum())
    words: list[str] = []
    for position, token in enumerate(arrays["input_ids"][row, :end].tolist()):
        piece = tokenizer.vocab[token]
        continues = piece.startswith(CONTINUATION)
        piece = piece.removeprefix(CONTINUATION)
        if position and position in answers:
            colour = _GREEN if token == tokenizer.mask_id else _RED
            piece = _marked(piece, tokenizer.vocab[answers[position]], token == answers[position])
            piece = f"{colour}{piece}{_RESET}" if colours else piece
        if continues and words:
            words[-1] += piece
        else:
            words.append(piece)
    return " ".join(words)


def _marked(piece: str, answer: str, is_kept: bool) -> str:
    return f"={piece}=" if is_kept else f"{piece}{{{answer}}}"


def verify(path: Path) -> tuple[int, list[str]]:
    """Hold files against their manifest, and shards that are in none against the layout.

    Returns:
        The number of files that were checked, and one line for each that is broken and for each
        folder that was never completed.

    Raises:
        DataError: there is nothing to check.
    """
    checked: set[str] = set()
    problems: list[str] = []
    if is_folder(path):
        shards = _verify_folders(path, checked, problems)
    else:
        local_source(path)
        shards = [path]
    for shard in shards:
        if (real := os.path.realpath(shard)) not in checked:
            checked.add(real)
            problems += _shard_problems(shard)
    if not checked and not problems:
        raise DataError(f"{path}: neither a {MANIFEST_NAME} nor an HDF5 file to check")
    return len(checked), problems


def _verify_folders(path: Path, checked: set[str], problems: list[str]) -> list[Path]:
    """Hold the folders from one down against their manifests.

    Returns:
        The shards in them, those of manifests among them.
    """
    shards: list[Path] = []

    def tell(error: OSError) -> None:
        problems.append(f"{error.filename} can't be read: {error.strerror}")

    for folder, names in visible_folders(path, tell):
        problems += map(_unfinished, leftovers(folder))
        if MANIFEST_NAME in names:
            try:
                checked.update(
                    os.path.realpath(folder / name) for name in read_manifest(folder).files
                )
                problems += find_problems(folder)
            except ManifestError as error:
                checked.add(os.path.realpath(folder / MANIFEST_NAME))
                problems.append(str(error))
        shards += (folder / name for name in names if name.endswith(SUFFIXES))
    return shards


def _unfinished(folder: Path) -> str:
    try:
        descriptor = try_lock(folder)
    except OSError as error:
        return f"{folder} can't be read: {error.strerror}"
    if descriptor is None:
        return f"{folder}: another process is filling it; wait for its end"
    os.close(descriptor)
    return f"{folder}: never completed; run its command again, or remove it"


def _shard_problems(path: Path) -> list[str]:
    try:
        check_values(read_shard(path), vocab_size=_vocab_size(path), where=str(path))
    except DataError as error:
        return [str(error)]
    return []


def _vocab_size(shard: Path) -> int | None:
    vocab_file = _beside(shard)
    if vocab_file is None:
        return None
    return len(WordPieceTokenizer.from_file(vocab_file, do_lower_case=True).vocab)
