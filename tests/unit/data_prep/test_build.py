import dataclasses
import hashlib
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import build, tokens
from data_prep.build import build_instances, build_shards, plan_shards
from data_prep.config import InstanceConfig, ShardsConfig
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import resumable_folder, verify_folder
from zerobert.shards import check_values, find_shards, read_shard
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = InstanceConfig(max_seq_length=16, max_predictions_per_seq=3, dupe_factor=2)


def small_config(**changes: Any) -> ShardsConfig:
    return dataclasses.replace(
        ShardsConfig(
            name="toy", n_training_shards=3, n_test_shards=1, fraction_test_set=0.2, instances=ROWS
        ),
        **changes,
    )


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    tokens = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", "!"]
    path.write_text("".join(f"{token}\n" for token in tokens))
    return path


def document(number: int) -> str:
    word = LETTERS[number % 26] * (2 + number // 26)
    return "".join(f"{word} {LETTERS[line]} {word}.\n" for line in range(6))


def write_texts(folder: Path, *files: list[int]) -> Path:
    folder.mkdir()
    for index, numbers in enumerate(files):
        text = "\n".join(document(number) for number in numbers)
        (folder / f"part_{index}.txt").write_text(text)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.hdf5")
    }


def test_shards_are_complete_and_well_named(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(20)), list(range(20, 30)))
    folder, summary = build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    assert (
        folder
        == tmp_path
        / "out"
        / (
            "hdf5_lower_case_1_seq_len_16_max_pred_3_masked_lm_prob_0.15_random_seed_12345_dupe_factor_2"
        )
        / "toy"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "toy_test_0.hdf5",
        "toy_training_0.hdf5",
        "toy_training_1.hdf5",
        "toy_training_2.hdf5",
        "vocab.txt",
    ]
    manifest = verify_folder(folder)
    assert manifest.kind == "shards"
    assert manifest.config["do_lower_case"] is True
    assert manifest.config["max_seq_length"] == 16
    assert sorted(manifest.inputs) == ["part_0.txt", "part_1.txt", "vocab.txt"]
    assert manifest.inputs["vocab.txt"] == hashlib.sha256(vocab_file.read_bytes()).hexdigest()
    shards = [*find_shards([folder], "training"), *find_shards([folder], "test")]
    for shard in shards:
        assert manifest.files[shard.path.name].num_rows == shard.num_rows
        check_values(read_shard(shard.path), vocab_size=59, where="x")
    assert summary["documents"] == 30
    assert summary["sentences"] == 180
    assert summary["rows"] == sum(shard.num_rows for shard in shards)
    assert summary["unknown_share"] == 0


def test_neither_workers_nor_files_nor_pieces_change_a_shard(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_texts(tmp_path / "one", list(range(30)))
    two = write_texts(tmp_path / "two", list(range(29, 14, -1)), [], list(range(15)))
    results = []
    for texts, piece_bytes, workers in [
        *((one, 1 << 20, 1), (one, 500, 2), (two, 1 << 20, 2), (two, 70, 1), (one, 200, 1))
    ]:
        monkeypatch.setattr(tokens, "_PIECE_BYTES", piece_bytes)
        output = tmp_path / f"{texts.name} {piece_bytes}"
        folder, _ = build_shards(texts, vocab_file, output, small_config(), workers=workers)
        results.append(digests(folder))
    assert len(results[0]) == 4
    assert all(result == results[0] for result in results)
    other, _ = build_shards(one, vocab_file, tmp_path / "d", small_config(random_seed=1), workers=1)
    assert digests(other) != results[0]


def test_a_second_run_does_nothing(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    first = build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    written = (first[0] / "manifest.json").stat().st_mtime_ns
    assert build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=2) == first
    assert (first[0] / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="n_training_shards 3 instead of 2; remove it"):
        build_shards(
            texts, vocab_file, tmp_path / "out", small_config(n_training_shards=2), workers=1
        )


@given(
    num_documents=st.integers(0, 60),
    n_training=st.integers(1, 30),
    n_test=st.integers(0, 10),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    no_nsp=st.booleans(),
)
def test_a_plan_uses_every_document_once_or_says_what_would_fit(
    num_documents: int, n_training: int, n_test: int, fraction: float, no_nsp: bool
) -> None:
    def plan(n_training: int, n_test: int) -> list[int]:
        config = ShardsConfig(
            n_training_shards=n_training,
            n_test_shards=n_test,
            fraction_test_set=fraction,
            instances=InstanceConfig(no_nsp=no_nsp),
        )
        held_out = round(num_documents * fraction) if n_test else 0
        plans = plan_shards(num_documents, held_out, config)
        assert [plan.number for plan in plans] == [*range(n_training), *range(n_test)]
        dealt = [rank for plan in plans for rank in range(plan.first, plan.end)]
        assert sorted(dealt) == list(range(num_documents))
        return [plan.end - plan.first for plan in plans]

    needed = 1 if no_nsp else 2
    try:
        sizes = plan(n_training, n_test)
    except ConfigError as error:
        message = str(error)
    else:
        assert min(sizes) >= needed
        assert max(sizes[:n_training]) - min(sizes[:n_training]) <= 1
        return
    if advice := re.search(r"--n_training_shards (\d+) --n_test_shards (\d+)", message):
        assert min(plan(int(advice[1]), int(advice[2]))) >= needed
    elif "lower --fraction_test_set" in message:
        assert num_documents - round(num_documents * fraction) < needed
    else:
        assert num_documents < needed
        assert f"wanted at least {needed}" in message


def test_copies_that_leave_nothing_to_train_on_are_counted() -> None:
    config = ShardsConfig(n_training_shards=1, n_test_shards=1, fraction_test_set=0.1)
    with pytest.raises(ConfigError) as caught:
        plan_shards(40, 40, config)
    assert "40 are held out, 36 of them because their text equals" in str(caught.value)
    assert "with --n_test_shards 0, or remove the copies" in str(caught.value)
    assert len(plan_shards(40, 0, dataclasses.replace(config, n_test_shards=0))) == 1


def test_one_document_is_not_enough(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", [1])
    config = small_config(n_training_shards=1, n_test_shards=0)
    with pytest.raises(ConfigError, match=r"1 document\(s\) with text, wanted at least 2"):
        build_shards(texts, vocab_file, tmp_path / "out", config, workers=1)
    rows = dataclasses.replace(ROWS, no_nsp=True)
    folder, _ = build_shards(
        texts, vocab_file, tmp_path / "out", dataclasses.replace(config, instances=rows), workers=1
    )
    assert folder.parent.name.endswith("_dupe_factor_2_no_nsp")


def test_text_that_is_not_utf8_names_the_place(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(10)))
    (texts / "part_9.txt").write_bytes(b"fine\n\nb\xe4d\n")
    with pytest.raises(DataError, match=r"part_9\.txt is not UTF-8 text: .* at byte 7"):
        build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    assert not list((tmp_path / "out").rglob("*.hdf5"))


def hidden_folder(out: Path, name: str) -> Path:
    """Where a broken-off run keeps what it has done."""
    (found,) = out.glob(f"{name}_*/.incomplete-toy")
    return found


def written(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Inode and time of files: another one would have others."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)
    }


def break_off(monkeypatch: pytest.MonkeyPatch, name: str, after: int, run: Any) -> None:
    """Run until a step has been done some times; its next time fails as on a full disk."""
    module: Any = {"_tokenize_piece": tokens, "_build_shard": build}[name]
    step, done = getattr(module, name), []

    def failing(task: Any) -> None:
        if len(done) == after:
            raise DataError("no space")
        done.append(step(task))

    with monkeypatch.context() as patches:
        patches.setattr(module, name, failing)
        with pytest.raises(DataError, match="no space"):
            run()


@pytest.mark.parametrize("step", ["_tokenize_piece", "_build_shard"])
def test_a_broken_off_run_goes_on_and_ends_as_an_unbroken_one(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_BYTES", 300)
    texts = write_texts(tmp_path / "text", list(range(30)))
    out = tmp_path / "out"

    def run(**changes: Any) -> Path:
        return build_shards(texts, vocab_file, out, small_config(**changes), workers=1)[0]

    wanted = build_shards(texts, vocab_file, tmp_path / "unbroken", small_config(), workers=1)[0]
    break_off(monkeypatch, step, 2, run)
    kind, pattern = {"_tokenize_piece": ("tokens", "piece_*"), "_build_shard": ("hdf5", "*.hdf5")}[
        step
    ]
    begun = hidden_folder(out, kind)
    # A killed process leaves what it was writing.
    (begun / f".piece_00009.bin.{'0123456789abcdef' * 2}").write_bytes(bytes(1000))
    first = written(begun, pattern)
    assert len(first) == 2
    assert not list(out.glob("hdf5_*/toy"))
    break_off(monkeypatch, step, 1, run)
    second = written(begun, pattern)
    assert len(second) == 3
    assert not list(begun.glob(".piece_00009*"))
    folder = run()
    assert digests(folder) == digests(wanted)
    final = folder if kind == "hdf5" else out / "tokens_lower_case_1_random_seed_12345" / "toy"
    third = written(final, pattern)
    assert first.items() < second.items() < third.items()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    verify_folder(folder)


@pytest.mark.parametrize("step", ["_tokenize_piece", "_build_shard"])
def test_what_was_begun_from_something_else_is_not_gone_on_with(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_BYTES", 300)
    texts = write_texts(tmp_path / "text", list(range(30)))
    out = tmp_path / "out"

    def run(**changes: Any) -> Path:
        return build_shards(texts, vocab_file, out, small_config(**changes), workers=1)[0]

    # Neither of these is in the folder's name.
    break_off(monkeypatch, step, 2, lambda: run(n_training_shards=2))
    wanted = build_shards(texts, vocab_file, tmp_path / "unbroken", small_config(), workers=1)[0]
    assert digests(run()) == digests(wanted)
    shutil.rmtree(out)
    original = (texts / "part_0.txt").read_text()
    (texts / "part_0.txt").write_text(document(77) + "\n" + original)
    break_off(monkeypatch, step, 2, run)
    (texts / "part_0.txt").write_text(original)
    shutil.rmtree(out / "tokens_lower_case_1_random_seed_12345" / "toy", ignore_errors=True)
    assert digests(run()) == digests(wanted)


def test_a_worker_that_lives_on_sees_the_new_vocabulary(tmp_path: Path, vocab_file: Path) -> None:
    """Those of a cluster do; the path of the vocabulary is the same in both runs."""
    texts = write_texts(tmp_path / "text", list(range(30)))
    lines = vocab_file.read_text().splitlines()
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{token}\n" for token in lines[:5] + lines[:4:-1]))
    folder, _ = build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    with pytest.raises(ConfigError, match="other text or another vocabulary; remove it or choose"):
        build_shards(texts, other, tmp_path / "out", small_config(), workers=1)
    first = digests(folder)
    shutil.rmtree(folder)
    # The shards are gone, their tokens are not: the message names these.
    with pytest.raises(ConfigError, match=r"tokens_lower_.*/toy: it was made from other text or"):
        build_shards(texts, other, tmp_path / "out", small_config(), workers=1)
    shutil.rmtree(tmp_path / "out")
    folder, _ = build_shards(texts, other, tmp_path / "out", small_config(), workers=1)
    ids = read_shard(folder / "toy_test_0.hdf5")["input_ids"]
    tokens._tokenizer.cache_clear()
    again, _ = build_shards(texts, other, tmp_path / "again", small_config(), workers=1)
    np.testing.assert_array_equal(read_shard(again / "toy_test_0.hdf5")["input_ids"], ids)
    assert digests(again) == digests(folder) != first


def test_a_second_length_is_built_from_the_same_tokens(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    long = small_config(instances=dataclasses.replace(ROWS, max_seq_length=32))
    build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    made = written(tmp_path / "out" / "tokens_lower_case_1_random_seed_12345" / "toy", "*")
    assert set(made) == {"manifest.json", "piece_00000.bin", "vocab.txt"}

    def refuse(task: Any) -> None:
        raise AssertionError("the text was tokenised again")

    monkeypatch.setattr(tokens, "_tokenize_piece", refuse)
    folder, _ = build_shards(texts, vocab_file, tmp_path / "out", long, workers=1)
    assert find_shards([folder], "test")[0].seq_length == 32
    assert made == written(tmp_path / "out" / "tokens_lower_case_1_random_seed_12345" / "toy", "*")


def test_text_that_vanishes_meanwhile_is_named_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_BYTES", 300)
    texts = write_texts(tmp_path / "text", list(range(20)), list(range(20, 30)))
    wanted, _ = build_shards(texts, vocab_file, tmp_path / "unbroken", small_config(), workers=1)
    away = (texts / "part_1.txt").rename(tmp_path / "away")
    hash_file = build._hash_file

    def hash_and_remove(path: Path) -> str:
        value = hash_file(path)
        path.rename(away) if path.name == "part_1.txt" else None
        return value

    def run() -> Path:
        return build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)[0]

    away.rename(texts / "part_1.txt")
    with monkeypatch.context() as patches:
        patches.setattr(build, "_hash_file", hash_and_remove)
        with pytest.raises(DataError, match=r"part_1\.txt can't be read: No such file"):
            run()
    away.rename(texts / "part_1.txt")
    tokenize_piece = tokens._tokenize_piece

    def remove_and_tokenize(task: Any) -> None:
        if task.ranges[0].path.name == "part_1.txt":
            task.ranges[0].path.rename(away)
        tokenize_piece(task)

    with monkeypatch.context() as patches:
        patches.setattr(tokens, "_tokenize_piece", remove_and_tokenize)
        with pytest.raises(DataError, match=r"part_1\.txt can't be read: No such file"):
            run()
    assert len(written(hidden_folder(tmp_path / "out", "tokens"), "piece_*")) > 3
    away.rename(texts / "part_1.txt")
    assert digests(run()) == digests(wanted)


def words_vocabulary(path: Path, count: int) -> Path:
    """A vocabulary of whole words, one for each of so many documents."""
    path.write_text("".join(f"{token}\n" for token in [*SPECIAL_TOKENS, *words(count)]))
    return path


def words(count: int) -> list[str]:
    return [f"{LETTERS[i // 26]}{LETTERS[i % 26]}x" for i in range(count)]


def documents_in(shard: Path) -> set[int]:
    """The documents whose word is anywhere in a shard of `words_vocabulary`."""
    arrays = read_shard(shard)
    ids = arrays["input_ids"]
    np.put_along_axis(ids, arrays["masked_lm_positions"], arrays["masked_lm_ids"], axis=1)
    # A position of 0 ends the list of answers: its 0 was put where [CLS] stands.
    return set(np.unique(ids[:, 1:]).tolist()) - set(range(5))


@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
def test_every_document_is_in_one_shard_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_BYTES", piece_bytes)
    vocab_file = words_vocabulary(tmp_path / "vocab.txt", 101)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(
        "\n".join(f"{word} {word} {word}\n" * 7 for word in words(101))
    )
    # As many passes as make it certain that each document comes first in a pair.
    rows = dataclasses.replace(ROWS, dupe_factor=2, short_seq_prob=0)
    config = small_config(n_training_shards=7, n_test_shards=2, instances=rows)
    folder, _ = build_shards(tmp_path / "text", vocab_file, tmp_path / "out", config, workers=1)
    found = {path.name: documents_in(path) for path in sorted(folder.glob("*.hdf5"))}
    assert sorted(document for shard in found.values() for document in shard) == list(range(5, 106))
    assert [len(shard) for shard in found.values()] == [10, 10, 11, 12, 11, 12, 11, 12, 12]


def test_copies_of_a_document_are_kept_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one key: whatever the shards, at most two neighbours share a text."""
    vocab_file = words_vocabulary(tmp_path / "vocab.txt", 12)
    copies = [f"{word} {word} {word}\n" * 5 for word in words(12) for _ in range(7)]
    (tmp_path / "text").mkdir()
    config = small_config(n_training_shards=4, n_test_shards=1)
    results = []
    for piece_bytes, step in [(1 << 20, 1), (100, 5), (200, 11)]:
        monkeypatch.setattr(tokens, "_PIECE_BYTES", piece_bytes)
        mixed = [copies[step * i % len(copies)] for i in range(len(copies))]
        (tmp_path / "text" / "a.txt").write_text("\n".join(mixed))
        folder, summary = build_shards(
            tmp_path / "text", vocab_file, tmp_path / f"{piece_bytes}", config, workers=1
        )
        assert summary["documents"] == 84
        results.append(digests(folder))
        shards = [folder / "toy_test_0.hdf5"]
        shards += [folder / f"toy_training_{number}.hdf5" for number in range(4)]
        found = [documents_in(path) for path in shards]
        assert set.union(*found) == set(range(5, 17))
        for i, j in itertools.combinations(range(5), 2):
            assert len(found[i] & found[j]) <= (1 if j == i + 1 else 0)
    assert results[0] == results[1] == results[2]


def pretraining_dataset(path: Path, max_pred_length: int) -> list[list[Any]]:
    """A shard as the reference's trainer reads it, with h5py and nothing of this project.

    Source: `pretraining_dataset` of NVIDIA's run_pretraining.py: the datasets in this order, whole;
    labels of -1 but where a position is, and a position of 0 ends them.
    """
    keys = ["input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids"]
    keys += ["next_sentence_labels"]
    with h5py.File(path, "r") as file:
        inputs = [np.asarray(file[key][:]) for key in keys]
    samples = []
    for index in range(len(inputs[0])):
        ids, mask, segments, positions, answers, label = (
            np.asarray(values[index].astype(np.int64)) for values in inputs
        )
        labels = np.full(ids.shape, -1)
        end = max_pred_length
        if len(zeros := (positions == 0).nonzero()[0]):
            end = zeros[0]
        labels[positions[:end]] = answers[:end]
        samples.append([ids, segments, mask, labels, label])
    return samples


def test_the_references_own_reader_finds_what_it_expects(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    folder, _ = build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    path = folder / "toy_training_0.hdf5"
    with h5py.File(path, "r") as file:
        rows = len(file["input_ids"])
        assert rows > 20
        assert {
            name: (dataset.dtype.str, dataset.shape, dataset.compression)
            for name, dataset in file.items()
        } == {
            "input_ids": ("<i4", (rows, 16), "gzip"),
            "input_mask": ("|i1", (rows, 16), "gzip"),
            "segment_ids": ("|i1", (rows, 16), "gzip"),
            "masked_lm_positions": ("<i4", (rows, 3), "gzip"),
            "masked_lm_ids": ("<i4", (rows, 3), "gzip"),
            "next_sentence_labels": ("|i1", (rows,), "gzip"),
        }
        assert not any(dataset.shuffle or dataset.fletcher32 for dataset in file.values())
    vocab = vocab_file.read_text().splitlines()
    cls, sep, mask_id = (vocab.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    num_masked = 0
    for ids, segments, mask, labels, label in pretraining_dataset(path, 3):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (16 - length)
        assert ((ids >= 0) & (ids < len(vocab))).all()
        original = np.where(labels == -1, ids, labels)
        assert original[0] == cls
        ends = np.flatnonzero(original == sep)
        assert len(ends) == 2
        assert ends[1] == length - 1
        assert not ids[length:].any()
        first, second = int(ends[0]) + 1, length - int(ends[0]) - 1
        assert segments.tolist() == [0] * first + [1] * second + [0] * (16 - length)
        assert (labels != -1).sum() == min(3, max(1, round(length * 0.15)))
        assert not (labels[length:] != -1).any()
        assert not np.isin(original[labels != -1], [cls, sep]).any()
        assert label in (0, 1)
        num_masked += int((ids[labels != -1] == mask_id).sum())
    assert num_masked > rows / 2


def build_of(tmp_path: Path, vocab_file: Path, text: bytes, **changes: Any) -> dict[str, Any]:
    """The summary of one training shard of a text."""
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_bytes(text)
    config = small_config(n_training_shards=1, n_test_shards=0, **changes)
    return build_shards(tmp_path / "text", vocab_file, tmp_path / "out", config, workers=1)[1]


@pytest.mark.parametrize("text", [b"", b"\n \n\t\n", "\u200b\n\n\u200b\n".encode()])
def test_text_without_any_is_refused(tmp_path: Path, vocab_file: Path, text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"0 document\(s\) with text, wanted at least 2"):
        build_of(tmp_path, vocab_file, text)
    assert not list((tmp_path / "out").rglob("*.hdf5"))


def test_binary_files_are_refused_with_the_place(tmp_path: Path, vocab_file: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt is not text: a NUL at byte 5; leave it out"):
        build_of(tmp_path, vocab_file, b"ab.\n\n\0\n\nc\n")


def test_a_document_without_a_token_is_left_out(tmp_path: Path, vocab_file: Path) -> None:
    text = "ab.\nc.\n\n\u200b\n\u200d\n\nde.\n\u200b\nf.\n\n \n\nab.\n"
    summary = build_of(tmp_path, vocab_file, text.encode())
    assert (summary["documents"], summary["sentences"]) == (3, 5)


def test_a_vocabulary_without_a_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(DataError, match=r"vocab\.txt .*lack.* \[MASK\]"):
        build_of(tmp_path, path, b"a\n\na\n")


def test_output_and_vocabulary_are_not_taken_for_text(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    for output in (texts, texts / "deep" / "out"):
        with pytest.raises(ConfigError, match=r"--output_dir .* lies inside --input_dir, where"):
            build_shards(texts, vocab_file, output, small_config(), workers=1)
    (tmp_path / "link").symlink_to(texts)
    with pytest.raises(ConfigError, match=r"--output_dir .* lies inside --input_dir, where"):
        build_shards(texts, vocab_file, tmp_path / "link" / "out", small_config(), workers=1)
    inside = shutil.copy(vocab_file, texts / "words.txt")
    with pytest.raises(ConfigError, match=r"words\.txt would be taken for text; move it out"):
        build_shards(texts, inside, tmp_path / "out", small_config(), workers=1)
    inside.rename(texts / "vocab.txt")
    with pytest.raises(ConfigError, match=r"vocab\.txt would be taken for text; move it out"):
        build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)
    assert sorted(path.name for path in texts.iterdir()) == ["part_0.txt", "vocab.txt"]
    assert not (tmp_path / "out").exists()


def test_links_and_odd_names_are_read_as_other_files(tmp_path: Path, vocab_file: Path) -> None:
    plain = write_texts(tmp_path / "plain", list(range(20)), list(range(20, 30)))
    odd = tmp_path / "odd [a]\n*"
    odd.mkdir()
    (odd / "linked.txt").symlink_to(plain / "part_0.txt")
    shutil.copy(plain / "part_1.txt", os.fsencode(odd) + b"/\xff \n.txt")
    name = "ü [a] *\n'"
    wanted, _ = build_shards(plain, vocab_file, tmp_path / "out", small_config(), workers=1)
    folder, _ = build_shards(
        odd, vocab_file, odd.parent / "o?t", small_config(name=name), workers=1
    )
    assert folder.name == name
    assert verify_folder(folder).inputs.keys() == {"linked.txt", "\\xff \n.txt", "vocab.txt"}
    assert set(digests(folder).values()) == set(digests(wanted).values())
    again = build_shards(odd, vocab_file, odd.parent / "o?t", small_config(name=name), workers=1)
    assert again[0] == folder
    (odd / "broken.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"broken\.txt can't be read: No such file"):
        build_shards(odd, vocab_file, tmp_path / "x", small_config(), workers=1)


def test_seeds_may_be_negative_or_huge(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    results = [
        digests(
            build_shards(
                texts, vocab_file, tmp_path / "out", small_config(random_seed=seed), workers=1
            )[0]
        )
        for seed in (-3, 3, 0, 2**64 + 3, 10**100)
    ]
    assert all(one != other for one, other in itertools.combinations(results, 2))


def test_a_folder_that_another_process_fills_is_refused(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(30)))
    tokens_folder = tmp_path / "out" / "tokens_lower_case_1_random_seed_12345" / "toy"
    with resumable_folder(tokens_folder, {}):
        with pytest.raises(DataError, match=r"another process is filling .*toy; wait for its end"):
            build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)


@pytest.mark.parametrize(
    ("text", "no_nsp", "message"),
    [
        (b"A.\n\nna\xefve\n", False, r"a\.txt is not UTF-8 text: .* at byte 6; convert"),
        (b"A.\n\n\0\n\nB.\n", False, r"a\.txt is not text: a NUL at byte 4; leave it out"),
        (b"A.\nB.\n", False, "wanted at least 2 documents with text, got 1"),
        (b"\n \n", False, "wanted at least 2 documents with text, got 0"),
        (b"", True, "wanted at least 1 documents with text, got 0"),
    ],
)
def test_bad_text_for_one_shard_is_refused(
    tmp_path: Path, vocab_file: Path, text: bytes, no_nsp: bool, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text)
    tokenizer = WordPieceTokenizer.from_file(vocab_file, do_lower_case=True)
    rows = dataclasses.replace(ROWS, no_nsp=no_nsp)
    with pytest.raises(DataError, match=message):
        build_instances([tmp_path / "a.txt"], tmp_path / "a.hdf5", tokenizer, rows, random_seed=1)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt can't be read: No such file"):
        build_instances([tmp_path / "a.txt"], tmp_path / "a.hdf5", tokenizer, rows, random_seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]


def test_equal_documents_are_on_one_side_of_the_hold_out(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", [*range(8), *[25] * 30], [*range(8, 16), *[25] * 30])
    config = small_config(n_training_shards=2, n_test_shards=2, fraction_test_set=0.4)
    folder, _ = build_shards(texts, vocab_file, tmp_path / "out", config, workers=1)

    def has_the_repeated_one(split: Any) -> bool:
        arrays = [read_shard(shard.path) for shard in find_shards([folder], split)]
        z = [*SPECIAL_TOKENS, *LETTERS].index("z")
        return any(
            bool((a[name] == z).any()) for a in arrays for name in ("input_ids", "masked_lm_ids")
        )

    assert has_the_repeated_one("training") != has_the_repeated_one("test")


def test_no_more_is_held_out_than_was_asked_for(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(50)))
    config = small_config(n_test_shards=8, fraction_test_set=0.1)
    with pytest.raises(ConfigError, match=r"of which 5 are held out, .* --n_test_shards 2, or"):
        build_shards(texts, vocab_file, tmp_path / "out", config, workers=1)
