"""A task's examples: from its official files, from a user's own, or from the Hugging Face hub."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.tables import read_header, read_rows
from finetune.tasks import File, Split, Task, plain
from zerobert.errors import ConfigError, DataError, MissingDependencyError, print_aside
from zerobert.manifest import sha256_file

HUB_DATASET = "nyu-mll/glue"
_MRPC_DEV_IDS = "dev_ids.tsv"
_MRPC_ID_COLUMNS = ("#1 ID", "#2 ID")
_MAX_SHOWN_LABELS, _MAX_SHOWN = 20, 60  # labels, characters
_MAX_SCORE = float(np.finfo(np.float32).max)

Labels = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """One split, read.

    Args:
        source: the file, or the hub's name of it.
        version: the file's sha256, or the hub's fingerprint.
        second: the second texts of a sentence-pair task.
        labels: class indices or scores; None for a test set.
    """

    source: str
    version: str
    first: list[str]
    second: list[str] | None
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.first)


def choose_folder(task: Task, data_dir: Path | None) -> Path | None:
    """The folder with the task's files, None where only the hub is left.

    Args:
        data_dir: that folder, or a GLUE root that holds it; None to search the usual roots.

    Raises:
        DataError: `data_dir` was given and does not hold the task.
    """
    if data_dir is None:
        roots = glue_roots(None)
        return next((found for root in roots if (found := find_in_root(task, root))), None)
    if found := find_in_root(task, data_dir):
        return found
    if _holds(data_dir, task):
        return data_dir
    raise DataError(
        f"--data_dir {data_dir}: found no {_wanted_files(task)}, neither there nor in "
        f"{task.folders[0]}/ there; give the task's folder or the GLUE folder that holds it"
    )


def glue_roots(data_dir: Path | None) -> list[Path]:
    """Where GLUE's folders are looked for: as told, else in `$GLUE_DIR`, else in `data/glue`.

    Raises:
        DataError: the environment names a folder that is not there.
    """
    if data_dir is not None:
        return [data_dir]
    named = os.environ.get("GLUE_DIR")
    if named and not Path(named).is_dir():
        raise DataError(f"GLUE_DIR {named}: no such folder; name GLUE's folder, or unset it")
    return [Path(named or "data/glue")]


def find_in_root(task: Task, root: Path) -> Path | None:
    """The task's folder inside a GLUE root, however its name is spelled."""
    names = {plain(name) for name in task.folders}
    folders = sorted(path for path in root.glob("*") if plain(path.name) in names)
    return next((folder for folder in folders if _holds(folder, task)), None)


def _holds(folder: Path, task: Task) -> bool:
    splits = [split for split in (task.train, *task.dev, *task.test) if split]
    return any((folder / file.name).is_file() for split in splits for file in split.files)


def _wanted_files(task: Task) -> str:
    splits = [split for split in (task.train, *task.dev) if split] or task.test
    return " and ".join(split.files[0].name for split in splits)


def check_files(task: Task, data_dir: Path | None, *, with_test: bool) -> None:
    """Look whether all of a task's files are there; on the hub that is not known beforehand.

    Raises:
        DataError: names the one that is missing.
    """
    folder = choose_folder(task, data_dir)
    for split in _splits(task, with_test=with_test):
        if folder is not None:
            _find_file(task, split, folder)


def read_all(task: Task, data_dir: Path | None, *, with_test: bool) -> None:
    """Read every row and label once.

    Raises:
        DataError, MissingDependencyError: see `load_split`.
    """
    folder = choose_folder(task, data_dir)
    for split in _splits(with_labelled(task, folder), with_test=with_test):
        load_split(task, split, folder)


def _splits(task: Task, *, with_test: bool) -> list[Split]:
    """What is read of a task; one that can't be trained on has its test set answered always."""
    tests = task.test if with_test or not task.train else ()
    return [split for split in (task.train, *task.dev, *tests) if split]


def load_split(task: Task, split: Split, folder: Path | None) -> Examples:
    """Read one split, warning of a row count that is not the official one.

    Args:
        folder: the task's folder; None for the hub.

    Raises:
        DataError: the file is missing, empty or broken, or the hub can't be reached.
        MissingDependencyError: the hub is wanted and `datasets` is not installed.
    """
    examples = _from_hub(task, split) if folder is None else _from_folder(task, split, folder)
    if not len(examples):
        raise DataError(f"{examples.source}: no rows; the file is empty or was cut off")
    wanted = (split.hub_num_rows if folder is None else None) or split.num_rows
    if wanted is not None and len(examples) != wanted:
        print_aside(
            f"warning: {examples.source}: wanted {task.name}'s official {wanted} rows, got "
            f"{len(examples)}; scores can't be compared with published ones"
        )
    return examples


def _find_file(task: Task, split: Split, folder: Path) -> File:
    file = next((file for file in split.files if (folder / file.name).is_file()), None)
    if file is None:
        wanted = " or ".join(str(folder / file.name) for file in split.files)
        what = f"put {task.name}'s official file there" if task.folders else "give one that exists"
        raise DataError(f"{wanted}: no such file; {what}")
    return file


def _from_folder(task: Task, split: Split, folder: Path) -> Examples:
    file = _find_file(task, split, folder)
    path = folder / file.name
    has_labels = not split.submission
    keep = _listed_ids(folder) if file.rows != "all" else None
    named = _columns(task, file)
    columns = (
        *(named if has_labels else named[:-1]),
        *(_MRPC_ID_COLUMNS if keep is not None else []),
    )
    num_texts = len(task.text_columns)
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    # Predictions are numbered by row, so a test set has none to spare.
    skips = task.skips_broken_rows and has_labels
    rows = read_rows(
        path,
        columns,
        header=file.header,
        skips_broken_rows=skips,
        tells_of_quotes=not task.folders,
    )
    for line, cells in rows:
        if keep is not None and (cells[-2:] in keep) != (file.rows == "listed"):
            continue
        texts.append(cells[:num_texts])
        if has_labels:
            labels.append(_parse_label(task, cells[num_texts], path, line))
    return Examples(
        source=str(path),
        version=sha256_file(path),
        first=[row[0] for row in texts],
        second=[row[1] for row in texts] if num_texts > 1 else None,
        labels=_label_array(task, labels) if has_labels else None,
    )


def _columns(task: Task, file: File) -> tuple[str, ...]:
    """The columns of the texts and of the label, as a file names them."""
    return file.columns or (*task.text_columns, task.label_column)


def with_labelled(task: Task, folder: Path | None) -> Task:
    """The task with a dev set more, where a file that mostly has no labels has some.

    Raises:
        DataError: such a file can't be read.
    """
    split = task.sometimes_labelled
    for file in split.files if split and folder is not None else ():
        path = Path(folder or "", file.name)
        if path.is_file() and set(_columns(task, file)) <= set(read_header(path)):
            assert split is not None
            return dataclasses.replace(task, dev=(dataclasses.replace(split, files=(file,)),))
    return task


def _listed_ids(folder: Path) -> set[tuple[str, ...]]:
    path = folder / _MRPC_DEV_IDS
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; it says which rows of MRPC's original release are the dev set"
        )
    return {cells for _, cells in read_rows(path, _MRPC_ID_COLUMNS, header=_MRPC_ID_COLUMNS)}


def _parse_label(task: Task, text: str, path: Path, line: int) -> float:
    if task.is_regression:
        score = _number(text)
        if score is None:
            raise DataError(
                f"{path} line {line}: wanted a number in {task.label_column!r} that float32 holds, "
                f"got {text[:_MAX_SHOWN]!r}"
            )
        return score
    if text not in task.labels:
        raise DataError(
            f"{path} line {line}: unknown label {text[:_MAX_SHOWN]!r} in {task.label_column!r}; "
            f"{task.name} knows {_shown(task.labels)}"
        )
    return task.labels.index(text)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _MAX_SCORE else None  # no NaN, either


def _shown(labels: Sequence[str]) -> str:
    """Labels for a message: quoted, as blanks in them matter, and not thousands of them."""
    quoted = [repr(label[:_MAX_SHOWN]) for label in labels[:_MAX_SHOWN_LABELS]]
    return ", ".join([*quoted, "..."] if len(labels) > _MAX_SHOWN_LABELS else quoted)


def _label_array(task: Task, labels: Sequence[float]) -> Labels:
    if task.is_regression:
        return np.array(labels, dtype=np.float32)
    return np.array(labels, dtype=np.int64)


def find_labels(path: Path, label_column: str) -> tuple[str, ...]:
    """The distinct labels of a user's own file, sorted; numbers by value.

    Raises:
        DataError: the file can't be read, a row has no label, all have the same, or one is spelled
            in two ways.
    """
    lines: dict[str, int] = {}
    for line, cells in read_rows(path, [label_column]):
        lines.setdefault(cells[0], line)
    labels = sorted(lines)
    for label in labels:
        if not label.strip() or label.strip().lower() == "nan":
            raise DataError(
                f"{path} line {lines[label]}: no label in {label_column!r}, got {label!r}; label "
                "the row or remove it"
            )
    _check_spelling(lines, f"{path}: {label_column!r}")
    if len(labels) < 2:
        raise DataError(
            f"{path}: wanted two or more labels in {label_column!r}, "
            f"got {_shown(labels) or 'no rows'}"
        )
    values = {label: _number(label) for label in labels}
    if None not in values.values():
        labels.sort(key=lambda label: values[label] or 0.0)
        if part := next((label for label in labels if (values[label] or 0.0) % 1), None):
            print_aside(
                f"warning: {path}: {label_column!r} has numbers such as {part}, each a class of "
                "its own here; if they are scores, give --regression"
            )
    print(f"{path}: {len(labels)} classes: {_shown(labels)}")
    return tuple(labels)


def _check_spelling(lines: Mapping[str, int], where: str) -> None:
    """Refuse one label in two spellings, which would be two classes.

    Args:
        lines: of each label, the first that has it.

    Raises:
        DataError: they differ in blanks around them, or as `1` and `1.0` do.
    """
    seen: dict[str | float, str] = {}
    for label, line in lines.items():
        number = _number(label)
        other = seen.setdefault(label.strip() if number is None else number, label)
        if other != label:
            raise DataError(
                f"{where}: {other!r} in line {lines[other]} and {label!r} in line {line} are one "
                "label in two spellings; spell them alike"
            )


def _from_hub(task: Task, split: Split) -> Examples:
    where = (
        f"put the official files into data/glue/{task.folders[0]}/, or name their folder with "
        "--data_dir or GLUE_DIR"
    )
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"no data for {task.name}: {where}; or, with network: pip install datasets"
        ) from error
    name = f"{HUB_DATASET} {task.hub_config}/{split.hub}"
    print_aside(f"no files of {task.name} here: asking the Hugging Face hub for {name}")
    try:
        table = datasets.load_dataset(HUB_DATASET, task.hub_config, split=split.hub)
    except (OSError, ValueError) as error:  # no network, and nothing or another task cached
        raise DataError(f"{name} can't be had from the hub ({error}); {where}") from error
    names = getattr(table.features["label"], "names", None)
    if names and tuple(names) != task.label_names:
        raise DataError(
            f"{name}: wanted the labels {', '.join(task.label_names)}, got {', '.join(names)}; "
            f"{where}"
        )
    columns = [list(table[column]) for column in task.hub_text_columns]
    labels = _label_array(task, table["label"]) if not split.submission else None
    return Examples(
        source=name,
        version=str(table._fingerprint),
        first=columns[0],
        second=columns[1] if len(columns) > 1 else None,
        labels=labels,
    )


def parse_columns(text: str) -> tuple[str, ...]:
    """`a` or `a,b`, as `--text_columns` is written.

    Raises:
        ConfigError: not one or two names.
    """
    columns = tuple(column.strip() for column in text.split(","))
    if not 1 <= len(columns) <= 2 or not all(columns):
        raise ConfigError(
            f"--text_columns: wanted one name, or two with a comma between, got {text!r}"
        )
    return columns
