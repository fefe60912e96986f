"""Exact arrays: of text written for this project, and of NVIDIA's own where they are at hand."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.build import build_instances
from data_prep.config import InstanceConfig
from zerobert.shards import read_shard
from zerobert.tokenizer import WordPieceTokenizer, train_vocabulary

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "data_prep"
REFERENCE = ROOT.parent / "shared" / "data"


def load_remake() -> Any:
    """The script that made the hashes; it owns the settings."""
    spec = importlib.util.spec_from_file_location("remake", GOLDEN / "remake.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["pairs", "short", "whole_words", "no_pairs"])
def test_the_golden_text_gives_the_same_arrays_for_ever(case: str, tmp_path: Path) -> None:
    remake = load_remake()
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert remake.array_hashes(remake.CASES[case], tmp_path / "a.hdf5") == expected[case]


def test_the_golden_text_gives_the_same_vocabulary_for_ever() -> None:
    vocab = train_vocabulary([GOLDEN / "text.txt"], vocab_size=300, do_lower_case=True)
    assert vocab == (GOLDEN / "vocab.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's own shards are not here")
@pytest.mark.parametrize(("name", "dupe_factor"), [("test_0", 1), ("training_0", 2)])
def test_the_reference_is_reproduced(name: str, dupe_factor: int, tmp_path: Path) -> None:
    tokenizer = WordPieceTokenizer.from_file(
        REFERENCE / "vocab" / "bert-base-uncased-vocab.txt", do_lower_case=True
    )
    source = REFERENCE / "hdf5" / "brown" / f"brown_{name}.txt"
    shard = tmp_path / "a.hdf5"
    config = InstanceConfig(dupe_factor=dupe_factor)
    build_instances([source], shard, tokenizer, config, random_seed=12345)
    ours, theirs = read_shard(shard), read_shard(source.with_suffix(".hdf5"))
    for dataset, array in theirs.items():
        np.testing.assert_array_equal(ours[dataset], array, err_msg=dataset)
