import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build import build_shards, plan_shards
from data_prep.config import InstanceConfig, ShardsConfig
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import verify_folder
from zerobert.shards import check_values, find_shards, read_shard
from zerobert.tokenizer import SPECIAL_TOKENS

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


def test_whole_documents_are_held_out(tmp_path: Path, vocab_file: Path) -> None:
    texts = write_texts(tmp_path / "text", list(range(26)))
    folder, _ = build_shards(texts, vocab_file, tmp_path / "out", small_config(), workers=1)

    def first_letters(split: Any) -> set[int]:
        """The letter that is twice in a word marks a document: `cc d cc.`"""
        found: set[int] = set()
        for shard in find_shards([folder], split):
            arrays = read_shard(shard.path)
            ids = arrays["input_ids"]
            np.put_along_axis(ids, arrays["masked_lm_positions"], arrays["masked_lm_ids"], axis=1)
            pieces = ids[:, 1:][(ids[:, 1:] >= 31) & (ids[:, 1:] < 57)]
            found |= set(pieces.tolist())
        return found

    training, test = first_letters("training"), first_letters("test")
    assert (len(training), len(test)) == (21, 5)
    assert not training & test


def test_neither_workers_nor_the_order_of_files_change_a_shard(
    tmp_path: Path, vocab_file: Path
) -> None:
    one = write_texts(tmp_path / "one", list(range(30)))
    two = write_texts(tmp_path / "two", list(range(29, 14, -1)), list(range(15)))
    results = [
        digests(build_shards(texts, vocab_file, tmp_path / out, small_config(), workers=workers)[0])
        for texts, out, workers in [(one, "a", 1), (one, "b", 2), (two, "c", 1)]
    ]
    assert len(results[0]) == 4
    assert results[0] == results[1] == results[2]
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
        plans = plan_shards(num_documents, config)
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
    else:
        assert num_documents < 2 * needed
        assert f"wanted at least {needed}" in message


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
