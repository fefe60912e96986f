import zipfile
from pathlib import Path

from finetune import submission

ALL = (
    *("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm"),
    *("QNLI", "RTE", "WNLI", "AX"),
)


def predictions(root: Path, names: tuple[str, ...]) -> list[Path]:
    """A folder for each task, with a file for each of its test sets."""
    folders = []
    for name in names:
        folder = root / name.split("-m")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.tsv").write_text(f"index\tprediction\n0\t{name}\n")
        folders.append(folder)
    return folders


def test_the_server_s_names_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "submission.zip"
    assert submission.write_zip(path, predictions(tmp_path, ALL)) == []
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{name}.tsv" for name in ALL]
        assert archive.read("MNLI-mm.tsv") == b"index\tprediction\n0\tMNLI-mm\n"


def test_what_is_missing_is_named_and_not_invented(tmp_path: Path) -> None:
    folders = predictions(tmp_path, ("SST-2", "MNLI-m"))
    (tmp_path / "SST-2" / "notes.tsv").write_text("mine")
    missing = submission.write_zip(tmp_path / "s.zip", folders)
    assert missing == [name for name in ALL if name not in ("SST-2", "MNLI-m")]
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == ["SST-2.tsv", "MNLI-m.tsv"]


def test_equal_predictions_make_equal_zips(tmp_path: Path) -> None:
    zips = []
    for name in "ab":
        folders = predictions(tmp_path / name, ("RTE", "AX"))
        zips.append(tmp_path / f"{name}.zip")
        submission.write_zip(zips[-1], folders if name == "a" else folders[::-1])
    assert zips[0].read_bytes() == zips[1].read_bytes()
    with zipfile.ZipFile(zips[0]) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
