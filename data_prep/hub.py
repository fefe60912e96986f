"""The text column of Hugging Face datasets: from the hub, streamed, or from a folder."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import TextConfig
from data_prep.sources import identify, local_source, printable
from data_prep.streams import OnRead, loaded, reading, refusals
from data_prep.tables import check_column
from zerobert.errors import ConfigError, DataError, MissingDependencyError

_ROWS_AT_A_TIME = 256
# The hub answers in less than one; without network this is what a user waits at most.
_TIMEOUT_S = 10
_SAVED_MARKS = ("state.json", "dataset_dict.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A split of a dataset.

    Attributes:
        num_bytes: of its columns, unpacked; 0 where nobody says.
        stamp: the hub's revision, or a hash of the folder's files.
        rows: a `datasets.Dataset` or `IterableDataset`.
    """

    name: str
    num_bytes: int
    stamp: str
    rows: Any


def find_datasets(inputs: Sequence[str], config: TextConfig) -> list[HubDataset]:
    """The split of each dataset that the settings choose; nothing of it is read yet.

    Args:
        inputs: names on the hub, or folders: of `save_to_disk`, or of files that `load_dataset`
            knows. What exists here is never looked up on the hub.

    Raises:
        DataError: the hub can't be reached, or there is no such dataset, configuration or split.
        MissingDependencyError: `datasets` is not installed.
    """
    if not all(inputs):
        raise ConfigError("--input: wanted names of datasets or folders, got an empty one")
    datasets = _datasets()
    return [
        _from_folder(datasets, Path(name), config)
        if _is_here(name)
        else _from_hub(datasets, name, config)
        for name in dict.fromkeys(inputs)
    ]


def _is_here(name: str) -> bool:
    with reading(printable(name)):
        return Path(name).exists()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("--format hf needs datasets: pip install datasets") from error
    # Its bars would fill a log, and what it logs is in its errors too.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _from_folder(datasets: Any, folder: Path, config: TextConfig) -> HubDataset:
    name = printable(str(folder))
    if not folder.is_dir():
        raise DataError(f"{name} is a file; name it without --format hf, which wants a folder")
    if any((folder / mark).is_file() for mark in _SAVED_MARKS):
        with _loading(name):
            saved = datasets.load_from_disk(str(folder))
        rows = _split(saved, config.dataset_split, name) if isinstance(saved, Mapping) else saved
    else:
        with _loading(name):
            builder = datasets.load_dataset_builder(str(folder), config.dataset_config_name)
            rows = builder.as_streaming_dataset(split=config.dataset_split)
    return HubDataset(name=name, num_bytes=_num_bytes(rows), stamp=_hash(folder), rows=rows)


def _split(splits: Mapping[str, Any], wanted: str, name: str) -> Any:
    if wanted not in splits:
        raise DataError(
            f"{name}: wanted the split {wanted!r}, got {', '.join(splits)}; choose one with "
            "--dataset_split"
        )
    return splits[wanted]


def _hash(folder: Path) -> str:
    """A hash of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = printable(str(path.relative_to(folder)))
            digest.update(f"{identify(local_source(path))} {name}\n".encode())
    return digest.hexdigest()


def _from_hub(datasets: Any, name: str, config: TextConfig) -> HubDataset:
    revision = None if datasets.config.HF_HUB_OFFLINE else _revision(name)
    with _loading(name):
        builder = datasets.load_dataset_builder(name, config.dataset_config_name, revision=revision)
        rows = builder.as_streaming_dataset(split=config.dataset_split)
    stamp = revision or str(builder.hash)
    return HubDataset(name=name, num_bytes=_num_bytes(rows), stamp=stamp, rows=rows)


def _revision(name: str) -> str:
    """The commit that the hub has now; without network `datasets` itself tries half a minute."""
    import huggingface_hub

    try:
        with _loading(name):
            info = huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_S)
    except DataError as error:
        raise DataError(
            f"{error}; there is no folder of this name either; check the name and the network, or "
            "set HF_HUB_OFFLINE=1 to read what was downloaded before"
        ) from error
    return str(info.sha)


def _num_bytes(rows: Any) -> int:
    if hasattr(rows, "data"):
        return int(rows.data.nbytes)
    split = (rows.info.splits or {}).get(str(rows.split))
    return getattr(split, "num_bytes", None) or 0


def read_texts(
    dataset: HubDataset, text_field: str, on_read: OnRead | None = None
) -> Iterator[str | None]:
    """The cells of the text column, in order; a null is None.

    Raises:
        DataError: the column is missing or holds no text, or the rows can't be read.
    """
    rows = dataset.rows
    if rows.features is not None:
        columns = [(key, getattr(kind, "dtype", str(kind))) for key, kind in rows.features.items()]
        check_column(columns, text_field, dataset.name)
        rows = rows.select_columns([text_field])
    batches = iter(rows.iter(batch_size=_ROWS_AT_A_TIME))
    while True:
        with _loading(dataset.name):
            batch = next(batches, None)
        if batch is None:
            return
        # Files of JSON may keep other types than their first rows have.
        check_column(
            [(key, _kind(cells)) for key, cells in batch.items()], text_field, dataset.name
        )
        texts = batch[text_field]
        yield from texts
        if on_read is not None:
            on_read(sum(map(len, filter(None, texts))))


def _kind(cells: Sequence[object]) -> str:
    """`string`, or the type of the first cell that is no text."""
    others = (type(cell).__name__ for cell in cells if not isinstance(cell, str | None))
    return next(others, "string")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what `datasets` and the hub raise into a `DataError` that names the dataset."""
    try:
        yield
    except _failures() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} can't be loaded: {reason}") from error


def _failures() -> tuple[type[Exception], ...]:
    own = loaded(("datasets.exceptions", "DatasetsError"), ("pyarrow", "ArrowException"))
    return (ValueError, RuntimeError, *own, *refusals())
