"""Settings that can't be served are refused by the flag's name."""

from typing import Any

import pytest

from data_prep.config import InstanceConfig, ShardsConfig, TextConfig
from zerobert.errors import ConfigError


@pytest.mark.parametrize("language", ["", "EN", "english", "e"])
def test_a_language_is_a_code(language: str) -> None:
    with pytest.raises(ConfigError, match="--language: wanted an ISO 639 code"):
        TextConfig(language=language)


def test_known_codes_pass() -> None:
    for language in ("en", "de", "yue"):
        TextConfig(language=language)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 4}, "--max_seq_length: wanted at least 5, got 4"),
        ({"max_seq_length": 8}, "--max_predictions_per_seq: wanted 1 to the sequence's 8, got 20"),
        ({"max_predictions_per_seq": 0}, "--max_predictions_per_seq: wanted 1 to"),
        ({"dupe_factor": 0}, "--dupe_factor: wanted at least 1, got 0"),
        ({"masked_lm_prob": 1.5}, "--masked_lm_prob: wanted a probability from 0 to 1, got 1.5"),
        ({"short_seq_prob": -0.1}, "--short_seq_prob: wanted a probability"),
    ],
)
def test_rows_that_can_not_be_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InstanceConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "--name: wanted a plain folder name"),
        ({"name": ""}, "--name: wanted a plain folder name"),
        ({"name": "my_training_corpus"}, "--name: wanted one without `train`"),
        ({"n_training_shards": 0}, "--n_training_shards: wanted at least 1, got 0"),
        ({"n_test_shards": -1}, "--n_test_shards: wanted at least 0, got -1"),
        ({"fraction_test_set": 1.0}, "--fraction_test_set: wanted 0 to below 1, got 1.0"),
    ],
)
def test_shards_that_can_not_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardsConfig(**changes)


def test_the_record_is_flat_and_names_each_setting_once() -> None:
    record = ShardsConfig().as_record()
    assert record["short_seq_prob"] == 0.1
    assert record["n_test_shards"] == 256
    assert not [name for name, value in record.items() if isinstance(value, dict)]
