"""A training state on disk: what the optimizer knows of each parameter, for any number of ranks.

Every rank writes the pieces of parameters that it holds (fp32 weights and both moments) into one
file; an index tells which part of which parameter lies where. Nothing in it depends on ZeRO's
stage, its buckets or the number of ranks, so each of them may be another when a run goes on.

```
state_<step>/
    pieces_<rank>.safetensors    1-D fp32 tensors `<kind>/<parameter>`, and their offsets
    index.json                   counters; parameter -> shape and [file, offset, length]s
```
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zerobert import distributed, manifest
from zerobert.errors import CheckpointError

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
INDEX_NAME = "index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a parameter: a range of its values, flattened, from `offset` on.

    Attributes:
        values: kind (`weights`, `exp_avg`, `exp_avg_sq`) -> fp32 [length] on the CPU.
    """

    name: str
    offset: int
    values: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank contributes to a training state: copies, which training leaves alone.

    Attributes:
        counters: what is equal on all ranks and no tensor.
        shapes: every parameter's shape; of vocabulary rows, those that pad it included.
        rows: the rows of each that an exported model has.
    """

    pieces: tuple[Piece, ...]
    counters: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    rows: Mapping[str, int]


def write_state(
    folder: Path,
    snapshot: Snapshot,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    finish: Callable[["StateReader", Path], None] = lambda reader, staging: None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a state folder, complete or not at all; collective.

    Args:
        config, inputs: for the manifest.
        finish: called on rank 0 with what was written, and the folder that it lies in until it is
            complete: for what is made of the state, or to lie in it.
        group: of `distributed.new_group`, in another thread than the main one.

    Raises:
        DataError: something can't be written; on the rank that noticed, the others end quietly.
    """
    staging = manifest.staging_path(folder)
    try:
        with distributed.one_voice(group):
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
                with manifest.writing(staging):
                    staging.mkdir(parents=True)
        with distributed.one_voice(group):
            write_pieces(staging, distributed.rank(), snapshot.pieces)
        with distributed.one_voice(group):
            if distributed.is_main():
                write_index(staging, snapshot)
                finish(StateReader(staging), staging)
                manifest.write_manifest(staging, kind="state", config=config, inputs=inputs)
                manifest.publish_folder(staging, folder)
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(staging, ignore_errors=True)
        raise


def write_pieces(folder: Path, rank: int, pieces: Sequence[Piece]) -> None:
    """Write what one rank holds; a rank that holds nothing writes nothing.

    Raises:
        DataError: the file can't be written.
    """
    if not pieces:
        return
    path = folder / f"pieces_{rank}.safetensors"
    tensors = {
        f"{kind}/{piece.name}": values for piece in pieces for kind, values in piece.values.items()
    }
    offsets = {piece.name: piece.offset for piece in pieces}
    save_tensors(tensors, path, metadata={"offsets": json.dumps(offsets)})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        DataError: it can't be written.
    """
    with manifest.writing(path):
        try:
            save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


def write_index(folder: Path, snapshot: Snapshot) -> None:
    """Write the index over all ranks' pieces, when these are written.

    Raises:
        CheckpointError: the pieces are not the whole of every parameter.
        DataError: the file can't be written.
    """
    found: dict[str, list[tuple[str, int, int]]] = {name: [] for name in snapshot.shapes}
    kinds: set[str] = set()
    for path in sorted(folder.glob("pieces_*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["offsets"])
            kinds.update(key.partition("/")[0] for key in file.keys())  # noqa: SIM118
            for name, offset in offsets.items():
                (length,) = file.get_slice(f"{WEIGHTS}/{name}").get_shape()
                found[name].append((path.name, offset, length))
    parameters = {}
    for name, shape in snapshot.shapes.items():
        pieces = sorted(found[name], key=lambda piece: piece[1])
        ends = [offset + length for _, offset, length in pieces]
        num_values = torch.Size(shape).numel()
        if [0, *ends] != [*(offset for _, offset, _ in pieces), num_values]:
            raise CheckpointError(f"{folder}: the ranks' pieces of {name} are not the whole of it")
        parameters[name] = {"shape": list(shape), "rows": snapshot.rows[name], "pieces": pieces}
    index = {
        "counters": dict(snapshot.counters),
        "kinds": sorted(kinds),
        "parameters": parameters,
    }
    manifest.write_json(folder / INDEX_NAME, index)


class StateReader:
    """A state on disk, read a piece at a time.

    Raises:
        CheckpointError: the folder has no index that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        try:
            index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
            self.counters: dict[str, Any] = index["counters"]
            self.kinds: list[str] = index["kinds"]
            self._parameters: dict[str, Any] = index["parameters"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} holds no training state that can be read ({error}); choose another with "
                "--resume"
            ) from error

    def check_shapes(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Hold the state against a model's parameters.

        Raises:
            CheckpointError: it is of another model.
        """
        saved = {name: tuple(entry["shape"]) for name, entry in self._parameters.items()}
        wanted = {name: tuple(shape) for name, shape in expected.items()}
        if strange := sorted(
            name for name in saved | wanted if saved.get(name) != wanted.get(name)
        ):
            there, here = (shapes.get(strange[0], "missing") for shapes in (saved, wanted))
            raise CheckpointError(
                f"{self.folder} is of another model: {strange[0]} is {there} there, {here} here"
            )

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """A range of a parameter's values, fp32 [length]."""
        parts = []
        for file, first, count in self._parameters[name]["pieces"]:
            start, end = max(offset, first), min(offset + length, first + count)
            if start < end:
                parts.append(
                    self._open(file).get_slice(f"{kind}/{name}")[start - first : end - first]
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and fp32 values, whole, without rows that pad the vocabulary."""
        for name, entry in self._parameters.items():
            shape = torch.Size(entry["shape"])
            yield name, self.read(WEIGHTS, name, 0, shape.numel()).view(shape)[: entry["rows"]]

    def _open(self, file: str) -> Any:
        """Open for as long as this reader: open files hold the space of states that are gone."""
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, "pt")
        return self._files[file]
