"""The `shards` and `instances` commands: sentences -> HDF5 shards.

The text is tokenised into a folder of pieces first (tokens.py). A shard is a range of the documents
in the seeded order that they have there, so neither the order of files nor the number of workers
changes it, and what is held out is whole documents. Each shard is built on its own: memory depends
on the largest shard and the workers, not on the corpus.
"""

import collections
import dataclasses
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import native
from data_prep.config import InstanceConfig, ShardsConfig
from data_prep.folders import is_done
from data_prep.instances import Vocabulary, create_instances, vocabulary_of
from data_prep.parallel import Pool, pool, progress
from data_prep.sources import text_files
from data_prep.tokens import (
    Range,
    TokensConfig,
    end_of_equals,
    find_places,
    piece_files,
    read_documents,
    read_range,
    stamp,
    tokenize_text,
)
from data_prep.wordpiece import Documents, encode
from zerobert import __version__
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import (
    FileRecord,
    read_manifest,
    resumable_folder,
    sha256_file,
    write_json,
    write_manifest,
    write_text,
)
from zerobert.shards import VOCAB_NAME, Split, write_rows
from zerobert.tokenizer import WordPieceTokenizer

KIND = "shards"


class ShardPlan(NamedTuple):
    """Which documents, by their ranks, a shard is made of."""

    split: Split
    number: int
    first: int
    end: int


class _Task(NamedTuple):
    """All that a worker needs to make a shard.

    Attributes:
        first, end: which documents of every piece.
    """

    plan: ShardPlan
    path: Path
    pieces: list[Path]
    first: list[int]
    end: list[int]
    vocabulary: Vocabulary
    config: ShardsConfig

    @property
    def receipt(self) -> Path:
        """Written when the shard is complete: its figures."""
        return self.path.with_name(f".{self.path.name}.json")


def build_shards(
    input_dir: Path,
    vocab_file: Path,
    output_dir: Path,
    config: ShardsConfig,
    *,
    workers: int,
    dask_scheduler: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Make the training and test shards of a text folder.

    A folder that already holds them is left as it is; one that was begun is gone on with.

    Args:
        dask_scheduler: address of a Dask scheduler, whose workers do the work instead of processes
            of this machine; they see the same files at the same paths.

    Returns:
        The folder of the shards, and the manifest's summary.

    Raises:
        DataError: the text or the vocabulary is not what it should be, or the disk is full.
        ConfigError: more shards than the documents can fill, or the folder holds something else.
    """
    started = time.monotonic()
    input_dir, output_dir = input_dir.resolve(), output_dir.resolve()
    tokenizer = WordPieceTokenizer.from_file(vocab_file, do_lower_case=config.do_lower_case)
    files = {path: stamp(path) for path in _text_only(input_dir, vocab_file, output_dir)}
    native.is_available()  # the workers find it built, or the user told that it can't be
    with pool(workers, dask_scheduler) as workers_pool:
        names = [_printable(path.relative_to(input_dir)) for path in files]
        inputs = dict(zip(names, workers_pool.read(_hash_file, files), strict=True))
        inputs[VOCAB_NAME] = tokenizer.sha256
        folder = output_dir / config.folder_name / config.name
        if is_done(folder, kind=KIND, config=config.as_record(), inputs=inputs):
            return folder, read_manifest(folder).summary
        tokens_config = TokensConfig(
            do_lower_case=config.do_lower_case, random_seed=config.random_seed
        )
        tokens = output_dir / tokens_config.folder_name / config.name
        counts = tokenize_text(
            files, tokenizer, tokens, tokens_config, inputs=inputs, pool=workers_pool
        )
        plans = plan_shards(counts["documents"], _num_held_out(counts, tokens, config), config)
        identity = {"config": config.as_record(), "inputs": inputs, "version": __version__}
        with resumable_folder(folder, identity) as staging:
            write_text(staging / VOCAB_NAME, (tokens / VOCAB_NAME).read_text(encoding="utf-8"))
            tasks = _tasks(plans, tokens, staging, vocabulary_of(tokenizer), config)
            totals, records = _build_missing(tasks, counts, workers_pool)
            summary = _summary(counts, totals, config.instances, time.monotonic() - started)
            write_manifest(
                staging,
                kind=KIND,
                config=config.as_record(),
                inputs=inputs,
                known=records,
                summary=summary,
            )
    return folder, summary


def _text_only(input_dir: Path, vocab_file: Path, output_dir: Path) -> list[Path]:
    """The text files of a folder.

    Raises:
        ConfigError: what is not text lies among them, or would at the next run.
    """
    files = text_files(input_dir)
    if input_dir == output_dir or input_dir in output_dir.parents:
        raise ConfigError(
            f"--output_dir {output_dir} lies inside --input_dir, where the next run would take its "
            f"{VOCAB_NAME} for text; choose a folder outside"
        )
    for path in files:
        if path.name == VOCAB_NAME or path.resolve() == vocab_file.resolve():
            raise ConfigError(f"{path} would be taken for text; move it out of --input_dir")
    return files


def _printable(path: Path) -> str:
    """A path for the manifest, which is UTF-8, as file names need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _hash_file(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _num_held_out(counts: Mapping[str, int], tokens: Path, config: ShardsConfig) -> int:
    """How many documents are held out: the share asked for, and those equal to the last of them."""
    if config.n_test_shards == 0:
        return 0
    wanted = _num_asked_for(counts["documents"], config)
    return end_of_equals(piece_files(tokens), wanted)


def _num_asked_for(num_documents: int, config: ShardsConfig) -> int:
    return round(num_documents * config.fraction_test_set)


def plan_shards(num_documents: int, num_test: int, config: ShardsConfig) -> list[ShardPlan]:
    """Deal the documents out by their ranks: the first `num_test` ones to the test shards.

    Raises:
        ConfigError: there are not enough documents; the message says how many shards they fill.
    """
    needed = config.instances.min_documents
    num_training = num_documents - num_test
    if num_training < config.n_training_shards * needed or num_test < config.n_test_shards * needed:
        raise ConfigError(_too_few_message(num_documents, num_test, config))
    shares: list[tuple[Split, int, int, int]] = [
        ("training", config.n_training_shards, num_test, num_training),
        ("test", config.n_test_shards, 0, num_test),
    ]
    return [
        ShardPlan(
            split, number, first + number * size // count, first + (number + 1) * size // count
        )
        for split, count, first, size in shares
        for number in range(count)
    ]


def _too_few_message(num_documents: int, num_test: int, config: ShardsConfig) -> str:
    needed = config.instances.min_documents
    if num_documents < needed:
        return (
            f"{num_documents} document(s) with text, wanted at least {needed}: the second sentence "
            "of a pair comes from another document (a blank line separates them), and a shard is "
            "built on its own; give more text, or turn the pairs off with --no_nsp"
        )
    most_test = num_test // needed
    most_training = (num_documents - (num_test if most_test else 0)) // needed
    if most_training == 0 and (more := num_test - _num_asked_for(num_documents, config)) > 0:
        return (
            f"of {num_documents} documents, {num_test} are held out, {more} of them because their "
            "text equals that of the last one asked for, which leaves too few for a training "
            "shard; hold none out with --n_test_shards 0, or remove the copies"
        )
    if most_training == 0:
        return (
            f"of {num_documents} documents, {num_test} are held out, which leaves too few for a "
            "training shard; lower --fraction_test_set"
        )
    return (
        f"{num_documents} documents, of which {num_test} are held out, can't fill "
        f"{config.n_training_shards} training and {config.n_test_shards} test shards of at least "
        f"{needed} each; pass at most --n_training_shards {most_training} --n_test_shards "
        f"{most_test}, or another --fraction_test_set"
    )


def _tasks(
    plans: Sequence[ShardPlan],
    tokens: Path,
    folder: Path,
    vocabulary: Vocabulary,
    config: ShardsConfig,
) -> list[_Task]:
    pieces = piece_files(tokens)
    firsts = find_places(pieces, [plan.first for plan in plans]).tolist()
    ends = find_places(pieces, [plan.end for plan in plans]).tolist()
    return [
        _Task(
            plan=plan,
            path=folder / f"{config.name}_{plan.split}_{plan.number}.hdf5",
            pieces=pieces,
            first=first,
            end=end,
            vocabulary=vocabulary,
            config=config,
        )
        for plan, first, end in zip(plans, firsts, ends, strict=True)
    ]


def _build_missing(
    tasks: Sequence[_Task], counts: Mapping[str, int], workers: Pool
) -> tuple[collections.Counter[str], dict[str, FileRecord]]:
    """Make the shards that an earlier run has not made.

    Returns:
        The figures of all shards together, and what the manifest says of each.
    """
    missing = [task for task in tasks if not task.receipt.exists()]
    text_bytes = counts["text_bytes"] / counts["documents"]
    sizes = [round((task.plan.end - task.plan.first) * text_bytes) for task in missing]
    skipped = counts["text_bytes"] - sum(sizes)
    for _ in progress(
        workers.map(_build_shard, missing), label="shards", sizes=sizes, skipped=skipped
    ):
        pass
    receipts = {
        task.path.name: json.loads(task.receipt.read_text(encoding="utf-8")) for task in tasks
    }
    records = {name: FileRecord(**receipt.pop("record")) for name, receipt in receipts.items()}
    totals: collections.Counter[str] = collections.Counter()
    for name, receipt in receipts.items():
        totals.update(receipt, bytes=records[name].num_bytes)
    return totals, records


def _build_shard(task: _Task) -> None:
    """Make one shard, in any process; the result depends on the task alone."""
    documents = read_documents(task.pieces, task.first, task.end)
    seed = f"{task.config.random_seed} {task.plan.split} {task.plan.number}"
    record, filled = _write_instances(
        task.path, documents, task.config.instances, task.vocabulary, random.Random(seed)
    )
    receipt = {"record": dataclasses.asdict(record), "rows": record.num_rows, "filled": filled}
    write_json(task.receipt, receipt)


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
    documents = encode(_read_as_reference(input_files), tokenizer)[0]
    record, filled = _write_instances(
        output_file, documents, config, vocabulary_of(tokenizer), random.Random(random_seed)
    )
    counts = {
        "documents": documents.num_documents,
        "sentences": documents.num_sentences,
        "tokens": len(documents.tokens),
        "unknown": int((documents.tokens == tokenizer.unk_id).sum()),
    }
    totals = {"rows": record.num_rows or 0, "filled": filled, "bytes": record.num_bytes}
    return _summary(counts, totals, config, time.monotonic() - started)


def _read_as_reference(files: Sequence[Path]) -> bytes:
    """Files as the reference sees them: only a blank line ends a document, so one may go on in the
    next file.
    """
    texts = [read_range(Range(path, 0, stamp(path).num_bytes)) for path in files]
    return b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts)


def _write_instances(
    path: Path,
    documents: Documents,
    config: InstanceConfig,
    vocabulary: Vocabulary,
    rng: random.Random,
) -> tuple[FileRecord, int]:
    """Write the rows of some documents.

    Returns:
        What a manifest says of the file, and how many places of its rows are filled.
    """
    instances = create_instances(documents, config, vocabulary, rng)
    filled = 0

    def read(start: int, stop: int) -> dict[str, Any]:
        nonlocal filled
        arrays = instances.arrays(start, stop)
        filled += int(arrays["input_mask"].sum())
        return arrays

    return write_rows(path, instances.num_rows, config.max_seq_length, read), filled


def _summary(
    counts: Mapping[str, int], totals: Mapping[str, int], config: InstanceConfig, seconds: float
) -> dict[str, Any]:
    return {
        "documents": counts["documents"],
        "sentences": counts["sentences"],
        "tokens": counts["tokens"],
        "unknown_share": round(counts["unknown"] / counts["tokens"], 6),
        "rows": totals["rows"],
        "fill": round(totals["filled"] / (totals["rows"] * config.max_seq_length), 4),
        "bytes": totals["bytes"],
        "seconds": round(seconds, 1),
    }
