"""NVIDIA's HDF5 layout for BERT pretraining: schema, writer, reader, checks, and finding shards.

A shard holds N rows of S positions, at most P of them masked. Six gzip datasets a file:

| dataset                | type | shape  | meaning                                                 |
|------------------------|------|--------|---------------------------------------------------------|
| `input_ids`            | i4   | [N, S] | `[CLS] a [SEP] b [SEP]`, masks applied, then 0          |
| `input_mask`           | i1   | [N, S] | 1 up to the end of the row, then 0                      |
| `segment_ids`          | i1   | [N, S] | 0 up to the first `[SEP]`, 1 up to the second, then 0   |
| `masked_lm_positions`  | i4   | [N, P] | ascending; a 0 ends the list: [CLS] is never masked     |
| `masked_lm_ids`        | i4   | [N, P] | what stood there                                        |
| `next_sentence_labels` | i1   | [N]    | 1: the second segment is a random one                   |

Source: NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/create_pretraining_data.py.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import deflate
import h5py
import numpy as np
import numpy.typing as npt

from zerobert.errors import ConfigError, DataError, ShardFormatError
from zerobert.manifest import (
    FileRecord,
    is_complete,
    read_manifest,
    sha256_file,
    visible_folders,
    write_bytes,
)

Array = npt.NDArray[Any]
Split = Literal["training", "test"]

DTYPES: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype("<i4"),
    "input_mask": np.dtype("<i1"),
    "segment_ids": np.dtype("<i1"),
    "masked_lm_positions": np.dtype("<i4"),
    "masked_lm_ids": np.dtype("<i4"),
    "next_sentence_labels": np.dtype("<i1"),
}
SUFFIXES = (".hdf5", ".h5")
VOCAB_NAME = "vocab.txt"

# h5py's automatic chunks are tall slices of a few columns: one row then inflates all of them. Ours
# are whole rows, as many as h5py's own cache still holds a chunk of: 512 KiB of ids.
_CHUNK_PLACES = 1 << 17
# What the file says its filter is; any reader inflates it alike. The bytes are made by libdeflate,
# whose level 1 is four times as fast as zlib's level 4 on these arrays for 1 % more bytes, and the
# same on every machine. (ISA-L is twice as fast again, but now and then gives other bytes.)
_GZIP_LEVEL = 4
_LIBDEFLATE_LEVEL = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a shard's header says.

    Attributes:
        chunks: shape of the gzip chunks of each dataset; None where it is packed otherwise.
    """

    path: Path
    num_rows: int
    seq_length: int
    max_predictions: int
    chunks: tuple[tuple[int, ...] | None, ...]

    @property
    def chunk_rows(self) -> int:
        """Rows of `input_ids` that are inflated together."""
        return min(self.chunks[0][0], self.num_rows) if self.chunks[0] else 1


def describe_shard(path: Path | str) -> ShardInfo:
    """Check a shard's schema and say its size; no data is read.

    Raises:
        DataError: there is no such file, or it can't be opened.
        ShardFormatError: not HDF5, a dataset is missing, or one has another type or shape.
    """
    with _opened(Path(path)) as file:
        return _describe(h5py.File(file), Path(path))


def read_shard(path: Path | str) -> dict[str, Array]:
    """All six datasets, in their native types.

    Raises:
        DataError: there is no such file, or it can't be opened.
        ShardFormatError: the schema is not NVIDIA's, or the data is damaged.
    """
    shard = describe_shard(path)
    arrays = empty_arrays(shard, shard.num_rows)
    read_rows(shard, {0: arrays})
    return arrays


def empty_arrays(shard: ShardInfo, num_rows: int) -> dict[str, Array]:
    """Room for rows like a shard's."""
    shapes = array_shapes(num_rows, shard.seq_length, shard.max_predictions)
    return {name: np.empty(shapes[name], dtype) for name, dtype in DTYPES.items()}


def read_rows(shard: ShardInfo, wanted: Mapping[int, Mapping[str, Array]]) -> None:
    """Fill arrays with a shard's rows; no chunks but theirs are read.

    Threads may read side by side: HDF5 gives out one packed chunk at a time, and the inflating,
    which is the work, is done outside of it.

    Args:
        wanted: by the number of a row, the arrays that are filled from it on.

    Raises:
        DataError: there is no such file, or it can't be opened.
        ShardFormatError: the data is damaged, or no longer what was described.
    """
    with _opened(shard.path) as file:
        for name, chunk in zip(DTYPES, shard.chunks, strict=True):
            dataset = h5py.h5d.open(file, name.encode())
            if dataset.shape[0] != shard.num_rows:
                raise ShardFormatError(
                    f"{shard.path}: {name} had {shard.num_rows} rows and now has "
                    f"{dataset.shape[0]}; a shard must not change while it is used"
                )
            for first, arrays in wanted.items():
                if chunk is None:
                    arrays[name][:] = h5py.Dataset(dataset)[first : first + len(arrays[name])]
                else:
                    _read_chunks(dataset, chunk, first, arrays[name])


def _read_chunks(dataset: Any, chunk: tuple[int, ...], first: int, array: Array) -> None:
    """Rows of one dataset; gzip is inflated by libdeflate, in a third of the time of HDF5's own."""
    dtype, width = array.dtype, array.shape[-1]
    stop = first + len(array)
    for start in range(first - first % chunk[0], stop, chunk[0]):
        if len(chunk) == 1:
            rows = _inflated(dataset, (start,), chunk, dtype)
        elif chunk[1] == width:
            rows = _inflated(dataset, (start, 0), chunk, dtype)
        else:
            columns = range(0, width, chunk[1])
            tiles = [_inflated(dataset, (start, column), chunk, dtype) for column in columns]
            rows = np.concatenate(tiles, axis=1)[:, :width]
        low, high = max(start, first), min(start + chunk[0], stop)
        array[low - first : high - first] = rows[low - start : high - start]


def _inflated(
    dataset: Any, corner: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    num_bytes = math.prod(shape) * dtype.itemsize  # a chunk that the edge cuts is stored whole
    skipped_filters, packed = dataset.read_direct_chunk(corner)
    raw = packed if skipped_filters else deflate.zlib_decompress(packed, num_bytes)
    if len(raw) != num_bytes:
        raise OSError(f"a chunk of {len(raw)} bytes, wanted {num_bytes}")
    return np.frombuffer(raw, dtype).reshape(shape)


def _gzip_chunk(dataset: Any) -> tuple[int, ...] | None:
    settings = dataset.get_create_plist()
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    return tuple(settings.get_chunk()) if filters == [h5py.h5z.FILTER_DEFLATE] else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if not path.is_file():
            raise DataError(
                f"{path}: no such shard; `python -m data_prep shards --help` makes them"
            )
        # The low-level interface opens a file and its datasets in half of the time.
        yield h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY)
    except PermissionError as error:
        raise DataError(f"{path} can't be opened: {error.strerror}") from error
    except (OSError, RuntimeError, KeyError, deflate.DeflateError) as error:
        # h5py tells damage by OSError, RuntimeError or KeyError, as the place of it happens to be.
        raise ShardFormatError(
            f"{path} is not HDF5 or is damaged ({error}); make or copy it again"
        ) from error


def _describe(file: Any, path: Path) -> ShardInfo:
    datasets = {name: _checked_dataset(file, name, path) for name in DTYPES}
    shapes = {name: tuple(dataset.shape) for name, dataset in datasets.items()}
    num_rows, seq_length = shapes["input_ids"]
    max_predictions = shapes["masked_lm_positions"][1]
    wanted = array_shapes(num_rows, seq_length, max_predictions)
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise ShardFormatError(
                f"{path}: {name} wanted shape {list(wanted[name])} to agree with input_ids and "
                f"masked_lm_positions, got {list(shape)}; make the shard again"
            )
    if num_rows == 0:
        raise ShardFormatError(f"{path} has no rows; make it again or remove it")
    return ShardInfo(
        path=path,
        num_rows=num_rows,
        seq_length=seq_length,
        max_predictions=max_predictions,
        chunks=tuple(map(_gzip_chunk, datasets.values())),
    )


def _checked_dataset(file: Any, name: str, path: Path) -> Any:
    """One dataset, its presence, type and number of axes checked."""
    dataset = h5py.h5o.open(file.id, name.encode()) if name in file else None
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise ShardFormatError(
            f"{path}: the dataset {name} is missing; wanted {', '.join(DTYPES)}, got "
            f"{', '.join(sorted(map(str, file))) or 'none'}"
        )
    if dataset.dtype != DTYPES[name]:
        raise ShardFormatError(
            f"{path}: {name} wanted type {DTYPES[name]}, got {dataset.dtype}; "
            "convert the shard or make it again"
        )
    num_axes = 1 if name == "next_sentence_labels" else 2
    if len(dataset.shape) != num_axes:
        raise ShardFormatError(
            f"{path}: {name} wanted {num_axes} axes, got shape {list(dataset.shape)}; "
            "make the shard again"
        )
    return dataset


def array_shapes(
    num_rows: int, seq_length: int, max_predictions: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each of the six arrays."""
    return {
        "input_ids": (num_rows, seq_length),
        "input_mask": (num_rows, seq_length),
        "segment_ids": (num_rows, seq_length),
        "masked_lm_positions": (num_rows, max_predictions),
        "masked_lm_ids": (num_rows, max_predictions),
        "next_sentence_labels": (num_rows,),
    }


def write_shard(path: Path | str, arrays: Mapping[str, Array]) -> FileRecord:
    """Write a shard that plain h5py reads; see `write_rows`."""
    num_rows, seq_length = arrays["input_ids"].shape
    return write_rows(
        path,
        num_rows,
        seq_length,
        lambda start, stop: {name: arrays[name][start:stop] for name in DTYPES},
    )


def write_rows(
    path: Path | str,
    num_rows: int,
    seq_length: int,
    read: Callable[[int, int], Mapping[str, Array]],
) -> FileRecord:
    """Write a shard that plain h5py reads; readers see the whole file or none.

    The same rows give the same bytes.

    Args:
        read: the six arrays from a row to before another; called once for each chunk, in order.

    Returns:
        What a manifest says of the file.

    Raises:
        ShardFormatError: there are no rows.
        DataError: the file can't be written: no space, no permission.
    """
    path = Path(path)
    if num_rows == 0:
        raise ShardFormatError(f"{path}: there are no rows to write")
    # Made in memory: HDF5 that fails to write a real file keeps it open, and fails again at exit.
    chunk_rows = min(num_rows, max(1, _CHUNK_PLACES // seq_length))
    image = _hdf5_image(num_rows, chunk_rows, read)
    write_bytes(path, image)
    return FileRecord(
        num_bytes=len(image), sha256=hashlib.sha256(image).hexdigest(), num_rows=num_rows
    )


def _hdf5_image(
    num_rows: int, chunk_rows: int, read: Callable[[int, int], Mapping[str, Array]]
) -> memoryview:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        datasets: dict[str, Any] = {}
        for start in range(0, num_rows, chunk_rows):
            block = read(start, min(start + chunk_rows, num_rows))
            for name, dtype in DTYPES.items():
                array = np.ascontiguousarray(block[name], dtype=dtype)
                if start == 0:
                    datasets[name] = _new_dataset(file, name, num_rows, array)
                place = (start, *[0] * (array.ndim - 1))
                datasets[name].id.write_direct_chunk(place, _deflated(array, chunk_rows))
    return buffer.getbuffer()


def _new_dataset(file: Any, name: str, num_rows: int, first_chunk: Array) -> Any:
    return file.create_dataset(
        name,
        shape=(num_rows, *first_chunk.shape[1:]),
        dtype=first_chunk.dtype,
        chunks=first_chunk.shape,
        compression="gzip",
        compression_opts=_GZIP_LEVEL,
    )


def _deflated(array: Array, chunk_rows: int) -> bytes:
    """A chunk as HDF5's gzip filter writes it; the last one is as long as the others."""
    raw = array.tobytes() + bytes((chunk_rows - len(array)) * (array.nbytes // len(array)))
    return bytes(deflate.zlib_compress(raw, _LIBDEFLATE_LEVEL))


def check_values(
    arrays: Mapping[str, Array], *, vocab_size: int | None, where: str, first_row: int = 0
) -> None:
    """Refuse values that a model can't take; with them training would crash or learn nonsense.

    Args:
        vocab_size: None where the vocabulary is unknown: ids then only must not be negative.
        where: the file, for messages.
        first_row: the number in the file of the arrays' first row.

    Raises:
        ShardFormatError: names the dataset, the first row that is wrong and its value.
    """
    seq_length = arrays["input_ids"].shape[1]
    top_id = np.iinfo(np.int32).max if vocab_size is None else vocab_size - 1
    top = {"input_ids": top_id, "masked_lm_ids": top_id, "masked_lm_positions": seq_length - 1}

    def refuse(array: Array, wrong: Array, wanted: str) -> None:
        if wrong.any():
            place = tuple(int(index) for index in np.argwhere(wrong)[0])
            raise ShardFormatError(
                f"{where}: {wanted}, got {array[place]} in row {first_row + place[0]} "
                f"({int(wrong.sum())} such values); make the shard again, or name the vocabulary "
                "it was made with"
            )

    for name in DTYPES:
        array, high = arrays[name], top.get(name, 1)
        # Seen without its sign, what is below 0 is above all else.
        if array.size and array.view(f"u{array.itemsize}").max() > high:
            refuse(array, (array < 0) | (array > high), f"{name} wanted 0 to {high}")
    mask = arrays["input_mask"]
    refuse(mask[:, :1], mask[:, :1] == 0, "input_mask wanted a token in each row")
    refuse(mask[:, 1:], mask[:, 1:] > mask[:, :-1], "input_mask wanted ones, then zeros")
    positions = arrays["masked_lm_positions"]
    hidden = (positions[:, 1:] > 0) & (positions[:, :-1] == 0)
    refuse(positions[:, 1:], hidden, "masked_lm_positions wanted only zeros after the first 0")
    lengths = mask.sum(axis=1, dtype=positions.dtype)[:, None]
    in_padding = (positions > 0) & (positions >= lengths)
    refuse(positions, in_padding, "masked_lm_positions wanted a place inside the text")


def find_shards(folders: Sequence[Path], split: Split) -> list[ShardInfo]:
    """The shards under the folders; all must have one sequence length and number of predictions.

    A training shard has `train` in its file name; a test shard has `test` and no `train` in it.
    Hidden folders, and with them the unfinished ones, are skipped.

    Returns:
        Sorted by path within each folder; empty when there is none or a folder does not exist.

    Raises:
        DataError: a folder can't be read.
        ShardFormatError: a file is not in NVIDIA's layout.
        ConfigError: the shards differ in length or predictions.
    """
    shards = [describe_shard(path) for path in _shard_paths(folders) if _split(path) == split]
    for shard in shards[1:]:
        if _row_shape(shard) != _row_shape(shards[0]):
            raise ConfigError(
                f"{shard.path} has sequences of {shard.seq_length} with {shard.max_predictions} "
                f"predictions, {shards[0].path} has {shards[0].seq_length} with "
                f"{shards[0].max_predictions}; name folders of one kind"
            )
    return shards


def _row_shape(shard: ShardInfo) -> tuple[int, int]:
    return shard.seq_length, shard.max_predictions


def _split(path: Path) -> Split | None:
    if "train" in path.name:
        return "training"
    return "test" if "test" in path.name else None


def _shard_paths(folders: Sequence[Path]) -> list[Path]:
    """Every HDF5 file under the folders, each once, even where one folder lies in another.

    Raises:
        DataError: a folder can't be read.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for parent, names in visible_folders(folder, _refuse_unreadable):
            for path in (parent / name for name in names if name.endswith(SUFFIXES)):
                found.setdefault(path.resolve(), path)
    return list(found.values())


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise DataError(f"{error.filename} can't be read: {error.strerror}") from error


def shard_vocabulary(folders: Sequence[Path]) -> Path | None:
    """The `vocab.txt` that lies beside the shards; None if none does.

    Raises:
        ConfigError: there are several that differ.
        DataError: one can't be read.
    """
    found: dict[str, Path] = {}
    for path in (parent / VOCAB_NAME for parent in _shard_folders(folders)):
        try:
            if path.is_file():
                found[sha256_file(path)] = path
        except OSError as error:
            raise DataError(f"the vocabulary {path} can't be read: {error.strerror}") from error
    if len(found) > 1:
        raise ConfigError(
            f"the shards were made with different vocabularies, "
            f"{', '.join(map(str, found.values()))}; name folders of one vocabulary"
        )
    return next(iter(found.values()), None)


def shard_lower_case(folders: Sequence[Path]) -> bool | None:
    """Whether the text was lower-cased, by manifest or folder name; None if neither tells.

    Raises:
        ConfigError: some was and some was not.
    """
    answers = {_lower_case(folder) for folder in _shard_folders(folders)} - {None}
    if len(answers) > 1:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: some shards are lower-cased and some are not; "
            "name folders of one kind"
        )
    return next(iter(answers), None)


def _lower_case(folder: Path) -> bool | None:
    if is_complete(folder):
        answer = read_manifest(folder).config.get("do_lower_case")
        if isinstance(answer, bool):
            return answer
    # NVIDIA's tools keep the settings in the name of the folder itself or of the one above it.
    for name in folder.resolve().parts[:-3:-1]:
        if match := re.search(r"lower_case_([01])(?!\d)", name):
            return match[1] == "1"
    return None


def _shard_folders(folders: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(path.parent for path in _shard_paths(folders)))
