"""The `shards` and `instances` commands: sentences -> HDF5 shards.

Documents are dealt to shards in the order of a seeded hash of their text, so neither the order of
files nor the number of workers changes a shard, and what is held out is whole documents. Each shard
is built on its own: memory depends on the largest shard and the workers, not on the corpus.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.corpus import decode, read_lines, text_files
from data_prep.folders import is_done
from data_prep.instances import InstanceConfig, create_instances, vocabulary_of
from data_prep.parallel import ordered_map, progress
from data_prep.wordpiece import Document, encode_documents
from zerobert.errors import ConfigError
from zerobert.manifest import (
    read_manifest,
    sha256_file,
    staged_folder,
    staging_path,
    write_manifest,
    write_text,
)
from zerobert.shards import VOCAB_NAME, Array, Split, write_shard
from zerobert.tokenizer import WordPieceTokenizer

KIND = "shards"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How a set of shards is made; the names are the flags'."""

    name: str = "wikicorpus_en"
    n_training_shards: int = 256
    n_test_shards: int = 256
    fraction_test_set: float = 0.1
    random_seed: int = 12345
    do_lower_case: bool = True
    instances: InstanceConfig = dataclasses.field(default_factory=InstanceConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"--name: wanted a plain folder name, got {self.name!r}")
        if self.n_training_shards < 1:
            raise ConfigError(
                f"--n_training_shards: wanted at least 1, got {self.n_training_shards}"
            )
        if self.n_test_shards < 0:
            raise ConfigError(f"--n_test_shards: wanted at least 0, got {self.n_test_shards}")
        if not 0 <= self.fraction_test_set < 1:
            raise ConfigError(
                f"--fraction_test_set: wanted 0 to below 1, got {self.fraction_test_set}"
            )

    @property
    def folder_name(self) -> str:
        """NVIDIA's name for the folder, where its readers look; our own options come after it."""
        rows = self.instances
        options = "_whole_word_mask" * rows.whole_word_mask + "_no_nsp" * rows.no_nsp
        return (
            f"hdf5_lower_case_{int(self.do_lower_case)}_seq_len_{rows.max_seq_length}"
            f"_max_pred_{rows.max_predictions_per_seq}_masked_lm_prob_{rows.masked_lm_prob}"
            f"_random_seed_{self.random_seed}_dupe_factor_{rows.dupe_factor}{options}"
        )

    def as_record(self) -> dict[str, Any]:
        """The settings as the manifest keeps them: flat, under the flags' names."""
        record = dataclasses.asdict(self)
        return {**record, **record.pop("instances")}


class Span(NamedTuple):
    """Where a document stands, and its place in the seeded order."""

    key: bytes
    path: Path
    offset: int
    num_bytes: int


class ShardTask(NamedTuple):
    """All that a worker needs to make one shard."""

    path: Path
    split: Split
    number: int
    spans: list[Span]
    vocab_file: Path
    config: ShardsConfig


def build_shards(
    input_dir: Path, vocab_file: Path, output_dir: Path, config: ShardsConfig, *, workers: int
) -> tuple[Path, dict[str, Any]]:
    """Make the training and test shards of a text folder.

    A folder that already holds them is left as it is.

    Returns:
        The folder of the shards, and the manifest's summary.

    Raises:
        DataError: the text or the vocabulary is not what it should be, or the disk is full.
        ConfigError: more shards than the documents can fill, or the folder holds something else.
    """
    started = time.monotonic()
    tokenizer = WordPieceTokenizer.from_file(vocab_file, do_lower_case=config.do_lower_case)
    files = text_files(input_dir)
    inputs = {VOCAB_NAME: tokenizer.sha256}
    inputs |= {str(path.relative_to(input_dir)): sha256_file(path) for path in files}
    folder = output_dir / config.folder_name / config.name
    if is_done(folder, kind=KIND, config=config.as_record(), inputs=inputs):
        return folder, read_manifest(folder).summary
    spans = sorted(span for path in files for span in find_documents(path, config.random_seed))
    tasks = plan_shards(spans, config, staging_path(folder))
    with staged_folder(folder) as staging:
        # The workers read this copy: the original may change under them.
        write_text(staging / VOCAB_NAME, "".join(f"{token}\n" for token in tokenizer.vocab))
        results = progress(
            ordered_map(build_shard, tasks, workers=min(workers, len(tasks))),
            label="shards",
            total=len(tasks),
            unit=" shards",
        )
        counts = dict(zip((task.path.name for task in tasks), results, strict=True))
        total = sum(counts.values(), collections.Counter[str]())
        summary = _figures(total, config.instances.max_seq_length, time.monotonic() - started)
        write_manifest(
            staging,
            kind=KIND,
            config=config.as_record(),
            inputs=inputs,
            num_rows={name: count["rows"] for name, count in counts.items()},
            summary=summary,
        )
    return folder, summary


def find_documents(path: Path, seed: int) -> Iterator[Span]:
    """Where the documents of a text file stand: runs of lines between blank ones.

    Raises:
        DataError: the file is not UTF-8 text.
    """
    digest, start, offset = hashlib.blake2b(str(seed).encode(), digest_size=16), 0, 0
    is_empty = True
    with open(path, "rb") as file:
        for raw in file:
            line = decode(raw, where=path, offset=offset).strip()
            if line:
                digest.update(line.encode() + b"\n")
                is_empty = False
            offset += len(raw)
            if not line:
                if not is_empty:
                    yield Span(digest.digest(), path, start, offset - start)
                digest, start = hashlib.blake2b(str(seed).encode(), digest_size=16), offset
                is_empty = True
    if not is_empty:
        yield Span(digest.digest(), path, start, offset - start)


def plan_shards(spans: Sequence[Span], config: ShardsConfig, folder: Path) -> list[ShardTask]:
    """Deal the documents out in their seeded order: the first ones to the test shards.

    Raises:
        ConfigError: there are not enough documents; the message says how many shards they fill.
    """
    needed = config.instances.min_documents
    num_test = max(round(len(spans) * config.fraction_test_set), config.n_test_shards * needed)
    if config.n_test_shards == 0:
        num_test = 0
    if len(spans) - num_test < config.n_training_shards * needed:
        raise ConfigError(_too_few_message(len(spans), config))
    plan: list[tuple[Split, int, Sequence[Span]]] = [
        ("training", config.n_training_shards, spans[num_test:]),
        ("test", config.n_test_shards, spans[:num_test]),
    ]
    return [
        ShardTask(
            path=folder / f"{config.name}_{split}_{number}.hdf5",
            split=split,
            number=number,
            spans=list(share[number::num_shards]),
            vocab_file=folder / VOCAB_NAME,
            config=config,
        )
        for split, num_shards, share in plan
        for number in range(num_shards)
    ]


def _too_few_message(num_documents: int, config: ShardsConfig) -> str:
    needed = config.instances.min_documents
    num_test = min(config.n_test_shards, round(num_documents * config.fraction_test_set) // needed)
    held_out = max(round(num_documents * config.fraction_test_set), num_test * needed)
    num_training = (num_documents - (held_out if num_test else 0)) // needed
    if num_training == 0:
        return (
            f"{num_documents} document(s) with text, wanted at least {needed}: the second sentence "
            "of a pair comes from another document (a blank line separates them), and a shard is "
            "built on its own; give more text, or turn the pairs off with --no_nsp"
        )
    return (
        f"{num_documents} documents can't fill {config.n_training_shards} training and "
        f"{config.n_test_shards} test shards of at least {needed} each; pass at most "
        f"--n_training_shards {num_training} --n_test_shards {num_test}"
    )


def build_shard(task: ShardTask) -> collections.Counter[str]:
    """Make one shard, in any process; the result depends on the task alone.

    Returns:
        How many documents, sentences, tokens, unknown ones, rows and filled places.
    """
    config = task.config
    tokenizer = _tokenizer(task.vocab_file, config.do_lower_case)
    documents = encode_documents([_read_span(span) for span in task.spans], tokenizer)
    rng = random.Random(f"{config.random_seed} {task.split} {task.number}")
    arrays = create_instances(documents, config.instances, vocabulary_of(tokenizer), rng)
    write_shard(task.path, arrays)
    return _count(documents, arrays, tokenizer) + collections.Counter(
        bytes=task.path.stat().st_size
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(vocab_file: Path, do_lower_case: bool) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_file(vocab_file, do_lower_case=do_lower_case)


def _read_span(span: Span) -> list[str]:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        text = file.read(span.num_bytes).decode("utf-8")
    return [line for raw in text.split("\n") if (line := raw.strip())]


def build_instances(
    input_files: Sequence[Path],
    output_file: Path,
    tokenizer: WordPieceTokenizer,
    config: InstanceConfig,
    *,
    random_seed: int,
) -> dict[str, Any]:
    """One shard from whole files, row for row what the reference script makes of them.

    Returns:
        The summary.

    Raises:
        DataError: a file is not text, there are too few documents, or the disk is full.
    """
    started = time.monotonic()
    documents = encode_documents(_read_as_reference(input_files), tokenizer)
    arrays = create_instances(
        documents, config, vocabulary_of(tokenizer), random.Random(random_seed)
    )
    write_shard(output_file, arrays)
    counts = _count(documents, arrays, tokenizer)
    counts["bytes"] = output_file.stat().st_size
    return _figures(counts, config.max_seq_length, time.monotonic() - started)


def _read_as_reference(files: Sequence[Path]) -> list[list[str]]:
    """Lines and documents as the reference sees them: only a blank line ends a document, so one may
    go on in the next file; any of the three line ends counts.
    """
    documents: list[list[str]] = [[]]
    for path in files:
        for raw in io.StringIO("".join(read_lines(path)), newline=None):
            if line := raw.strip():
                documents[-1].append(line)
            else:
                documents.append([])
    return documents


def _count(
    documents: Sequence[Document], arrays: dict[str, Array], tokenizer: WordPieceTokenizer
) -> collections.Counter[str]:
    sentences = [sentence for document in documents for sentence in document]
    return collections.Counter(
        documents=len(documents),
        sentences=len(sentences),
        tokens=sum(map(len, sentences)),
        unknown=sum(sentence.count(tokenizer.unk_id) for sentence in sentences),
        rows=len(arrays["input_ids"]),
        filled=int(arrays["input_mask"].sum()),
    )


def _figures(counts: collections.Counter[str], seq_length: int, seconds: float) -> dict[str, Any]:
    return {
        "documents": counts["documents"],
        "sentences": counts["sentences"],
        "tokens": counts["tokens"],
        "unknown_share": round(counts["unknown"] / counts["tokens"], 6),
        "rows": counts["rows"],
        "fill": round(counts["filled"] / (counts["rows"] * seq_length), 4),
        "bytes": counts["bytes"],
        "seconds": round(seconds, 1),
    }
