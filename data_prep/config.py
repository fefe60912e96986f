"""Settings of the commands, under the names of their flags; light, so that --help needs no more."""

import dataclasses
import re
from typing import Any, Literal, get_args

from zerobert.errors import ConfigError

Format = Literal["auto", "wiki-dump", "wikiextractor", "text", "jsonl", "parquet", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
DocumentBreak = Literal["file", "blank_line"]
DOCUMENT_BREAKS: tuple[DocumentBreak, ...] = get_args(DocumentBreak)

_LANGUAGE = re.compile(r"[a-z]{2,3}")
# [CLS] a [SEP] b [SEP] with one piece each.
_MIN_SEQ_LENGTH = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text is read.

    Attributes:
        document_break: what ends a document in plain text.
        dataset_config_name: which configuration of a Hugging Face dataset; None for its only one.
    """

    format: Format = "auto"
    text_field: str = "text"
    language: str = "en"
    document_break: DocumentBreak = "file"
    dataset_config_name: str | None = None
    dataset_split: str = "train"

    def __post_init__(self) -> None:
        if self.document_break != "file" and self.format not in ("auto", "text"):
            raise ConfigError(
                f"--document_break {self.document_break} is about plain text, got --format "
                f"{self.format}; leave it out"
            )
        if self.format != "hf" and (self.dataset_config_name or self.dataset_split != "train"):
            raise ConfigError(
                "--dataset_config_name and --dataset_split choose a part of a Hugging Face "
                "dataset; add --format hf, or leave them out"
            )
        # sentencex would take an unknown code for English in silence.
        if not _LANGUAGE.fullmatch(self.language):
            raise ConfigError(
                f"--language: wanted an ISO 639 code such as en or de, got {self.language!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """How rows are made."""

    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 5
    whole_word_mask: bool = False
    no_nsp: bool = False

    def __post_init__(self) -> None:
        if self.max_seq_length < _MIN_SEQ_LENGTH:
            raise ConfigError(
                f"--max_seq_length: wanted at least {_MIN_SEQ_LENGTH}, got {self.max_seq_length}"
            )
        if not 1 <= self.max_predictions_per_seq <= self.max_seq_length:
            raise ConfigError(
                f"--max_predictions_per_seq: wanted 1 to the sequence's {self.max_seq_length}, "
                f"got {self.max_predictions_per_seq}"
            )
        if self.dupe_factor < 1:
            raise ConfigError(f"--dupe_factor: wanted at least 1, got {self.dupe_factor}")
        for name in ("masked_lm_prob", "short_seq_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"--{name}: wanted a probability from 0 to 1, got {getattr(self, name)}"
                )

    @property
    def min_documents(self) -> int:
        """How many documents a file needs: a random next sentence comes from another one."""
        return 1 if self.no_nsp else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How a set of shards is made."""

    name: str = "wikicorpus_en"
    n_training_shards: int = 256
    n_test_shards: int = 256
    fraction_test_set: float = 0.1
    random_seed: int = 12345
    do_lower_case: bool = True
    instances: InstanceConfig = dataclasses.field(default_factory=InstanceConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"--name: wanted a plain folder name, got {self.name!r}")
        if "train" in self.name:
            raise ConfigError(
                f"--name: wanted one without `train`, got {self.name!r}: readers tell training "
                "shards by that word in the file's name, and would train on the held-out ones"
            )
        if self.n_training_shards < 1:
            raise ConfigError(
                f"--n_training_shards: wanted at least 1, got {self.n_training_shards}"
            )
        if self.n_test_shards < 0:
            raise ConfigError(f"--n_test_shards: wanted at least 0, got {self.n_test_shards}")
        if not 0 <= self.fraction_test_set < 1:
            raise ConfigError(
                f"--fraction_test_set: wanted 0 to below 1, got {self.fraction_test_set}"
            )

    @property
    def folder_name(self) -> str:
        """NVIDIA's name for the folder, where its readers look; our own options come after it."""
        rows = self.instances
        options = "_whole_word_mask" * rows.whole_word_mask + "_no_nsp" * rows.no_nsp
        return (
            f"hdf5_lower_case_{int(self.do_lower_case)}_seq_len_{rows.max_seq_length}"
            f"_max_pred_{rows.max_predictions_per_seq}_masked_lm_prob_{rows.masked_lm_prob}"
            f"_random_seed_{self.random_seed}_dupe_factor_{rows.dupe_factor}{options}"
        )

    def as_record(self) -> dict[str, Any]:
        """The settings as the manifest keeps them: flat, under the flags' names."""
        record = dataclasses.asdict(self)
        rows: dict[str, Any] = record.pop("instances")
        return record | rows
