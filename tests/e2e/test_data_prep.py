"""The user's own commands of the data stage, as subprocesses."""

import bz2
import gzip
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    *("river", "mountain", "harbour", "winter", "garden", "engine", "letter", "window"),
    *("market", "shadow", "copper", "violin", "bridge", "candle", "orchard", "signal"),
    *("thunder", "village", "lantern", "compass"),
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def run(
    *arguments: object, code: int = 0, preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
    )
    assert result.returncode == code, result.stderr
    return result


def refused(*arguments: object, preexec_fn: Callable[[], None] | None = None) -> str:
    """The one line on stderr of a command that the user has to mend."""
    lines = run(*arguments, code=2, preexec_fn=preexec_fn).stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def article(number: int) -> str:
    first, second = WORDS[number % 20], WORDS[(number * 7 + 3) % 20]
    return " ".join(
        f"The {first} and the {second} met {WORDS[(number + line) % 20]} number {line}."
        for line in range(12)
    )


def write_dump(path: Path, num_articles: int) -> Path:
    pages = "".join(
        f"<page><title>{number}</title><ns>0</ns><revision><text>'''A''' {{{{box}}}} "
        f"{article(number)}</text></revision></page>"
        for number in range(num_articles)
    )
    path.write_bytes(bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    dump = write_dump(folder / "dump.xml.bz2", 60)
    result = run("text", "--input", dump, "--output_dir", folder / "text", "--workers", 2)
    assert "documents 60, sentences 720" in result.stderr
    return folder / "text"


@pytest.fixture(scope="module")
def vocab(text: Path) -> Path:
    path = text.parent / "vocab.txt"
    run("vocab", "--input_dir", text, "--output", path, "--vocab_size", 120)
    return path


def test_a_vocabulary_is_not_replaced_by_another(text: Path, vocab: Path) -> None:
    flags = ("vocab", "--input_dir", text, "--output", vocab, "--vocab_size")
    before = vocab.read_bytes()
    assert f"{vocab} exists and is another file" in refused(*flags, 100)
    run(*flags, 120)
    assert vocab.read_bytes() == before


def shard_flags(text: Path, vocab: Path, output: Path) -> list[object]:
    return [
        *("--input_dir", text, "--vocab_file", vocab, "--output_dir", output),
        *("--n_training_shards", 3, "--n_test_shards", 1, "--max_seq_length", 32),
        *("--max_predictions_per_seq", 5, "--name", "toy"),
    ]


def test_from_a_dump_to_shards(text: Path, vocab: Path, tmp_path: Path) -> None:
    result = run("shards", *shard_flags(text, vocab, tmp_path), "--workers", 2)
    folder = Path(result.stdout.splitlines()[-1])
    assert folder.name == "toy"
    assert "documents 60, sentences 720" in result.stderr
    again = run("shards", *shard_flags(text, vocab, tmp_path))
    assert again.stdout == result.stdout
    # A reader that knows NVIDIA's keys, types and shapes, and nothing of us.
    with h5py.File(folder / "toy_training_0.hdf5", "r") as file:
        rows = file["input_ids"].shape[0]
        assert {name: (dataset.dtype.str, dataset.shape) for name, dataset in file.items()} == {
            "input_ids": ("<i4", (rows, 32)),
            "input_mask": ("|i1", (rows, 32)),
            "segment_ids": ("|i1", (rows, 32)),
            "masked_lm_positions": ("<i4", (rows, 5)),
            "masked_lm_ids": ("<i4", (rows, 5)),
            "next_sentence_labels": ("|i1", (rows,)),
        }
    shown = run("inspect", folder, "-n", 1).stdout
    assert "[CLS]" in shown
    assert "files 4, rows" in shown
    assert "verify: 7 files, 0 broken" in run("verify", tmp_path).stderr
    (folder / "toy_test_0.hdf5").write_bytes(b"gone")
    broken = run("verify", tmp_path, code=2).stderr
    assert "toy_test_0.hdf5: 4 bytes, the manifest says" in broken
    assert "toy_test_0.hdf5: 4 bytes" in refused("shards", *shard_flags(text, vocab, tmp_path))


def test_one_file_with_the_references_flags(text: Path, vocab: Path, tmp_path: Path) -> None:
    flags = ["--vocab_file", vocab, "--max_seq_length", 64, "--max_predictions_per_seq", 10]
    part = text / "part_00000.txt"
    # The reference reads a list of files as one text, cut wherever it may be.
    lines = part.read_text().splitlines(keepends=True)
    (tmp_path / "a.txt").write_text("".join(lines[:100]))
    (tmp_path / "b.txt").write_text("".join(lines[100:]))
    both = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    for name, source in [("file", part), ("list", both), ("folder", text)]:
        run("instances", *flags, "--input_file", source, "--output_file", tmp_path / name)
    assert (
        (tmp_path / "file").read_bytes()
        == (tmp_path / "list").read_bytes()
        == (tmp_path / "folder").read_bytes()
    )
    blocked = refused("instances", *flags, "--input_file", part, "--output_file", part / "x")
    assert f"cannot write {part / 'x'}: " in blocked
    missing = refused("instances", *flags, "--input_file", "a,b", "--output_file", tmp_path / "x")
    assert missing == "error: a: no such file or folder"
    cased = tmp_path / "cased.txt"
    cased.write_text(vocab.read_text() + "".join(f"{word.title()}\n" for word in WORDS))
    flags[1] = cased
    said = run("instances", *flags, "--input_file", part, "--output_file", tmp_path / "x").stderr
    assert "of the vocabulary's tokens have capitals" in said


@pytest.mark.parametrize("name", ["text", "vocab", "shards", "instances", "inspect", "verify"])
def test_every_command_explains_itself(name: str) -> None:
    shown = run(name, "--help").stdout
    assert f"example: python -m data_prep {name}" in shown.replace("\n", " ")


def test_bad_input_is_one_line_and_leaves_nothing(text: Path, vocab: Path, tmp_path: Path) -> None:
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "empty.txt").write_text("")
    (bad / "binary.txt").write_bytes(bytes(range(256)))
    (bad / "latin1.txt").write_bytes("Olé.\n".encode("latin-1"))
    whole = write_dump(tmp_path / "dump.xml.bz2", 5).read_bytes()
    (bad / "cut.xml.bz2").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    for name, message in [
        ("empty.txt", "empty.txt: 1 empty documents"),
        ("binary.txt", "binary.txt is not"),
        ("latin1.txt", "latin1.txt is not UTF-8 text: invalid continuation byte at byte 2"),
        ("cut.xml.bz2", "cut.xml.bz2 is cut short or damaged"),
        ("none.txt", "none.txt: no such file or folder"),
    ]:
        assert message in refused("text", "--input", bad / name, "--output_dir", out)
    flags = shard_flags(text, vocab, out)
    assert "wanted 1 to the sequence's 5, got 6" in refused(
        "shards", *flags, "--max_seq_length", 5, "--max_predictions_per_seq", 6
    )
    assert "--max_seq_length: wanted at least 5" in refused("shards", *flags, "--max_seq_length", 4)
    assert "no such file" in refused("shards", *flags, "--vocab_file", "none.txt").lower()
    words = tmp_path / "words.txt"
    words.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    assert "lack [MASK]" in refused("shards", *flags, "--vocab_file", words)
    assert "unrecognized arguments: --worker 2" in refused("shards", *flags, "--worker", 2)
    vocab_flags = ["vocab", "--output", out / "vocab.txt", "--input_dir"]
    (bad / "latin1.txt").unlink()
    assert "binary.txt is not" in refused(*vocab_flags, bad)
    (bad / "binary.txt").write_text("One\0two.\n")
    assert "binary.txt is not text: a NUL at byte 3" in refused(*vocab_flags, bad)
    (bad / "a.TXT.gz").write_bytes(gzip.compress(b"Text.\n"))
    assert "a.TXT.gz is packed" in refused(*vocab_flags, bad)
    assert "a.TXT.gz is packed" in refused("shards", *flags, "--input_dir", bad)
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert "pass at most --n_training_shards 27" in refused(
        "shards", *flags, "--n_training_shards", 100
    )
    assert not list(out.rglob("*.hdf5"))


def limit_file_size() -> None:
    """As good as a full disk: every file stops growing at 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_nothing_is_taken_for_whole(
    text: Path, vocab: Path, tmp_path: Path
) -> None:
    wide = ["--dupe_factor", 20]
    flags = [*shard_flags(text, vocab, tmp_path / "shards"), *wide]
    message = refused("shards", *flags, preexec_fn=limit_file_size)
    assert "cannot write" in message
    assert "piece_00000.bin: File too large; free space or" in message
    source = text / "part_00000.txt"
    message = refused(
        *("instances", "--vocab_file", vocab, "--input_file", source),
        *("--output_file", tmp_path / "x.hdf5", *wide),
        preexec_fn=limit_file_size,
    )
    assert "x.hdf5: File too large" in message
    message = refused(
        "text", "--input", source, "--output_dir", tmp_path / "text", preexec_fn=limit_file_size
    )
    assert "part_00000.txt: File too large" in message
    assert not visible_files(tmp_path)
    assert "0 broken" in run("verify", Path(run("shards", *flags).stdout.strip())).stderr


def visible_files(folder: Path) -> list[Path]:
    """The files that a reader would find: not those in a folder that was never completed."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".incomplete-") for part in path.relative_to(folder).parts)
    ]
