"""Strict JSON -> frozen dataclasses, and BERT's architecture.

An unknown key is an error that names the file, the key and the known keys: a misspelt setting must
never train happily with the default.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import hjson

from zerobert.errors import ConfigError

T = TypeVar("T")


def load_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object as DeepSpeed does: comments and trailing commas pass.

    Raises:
        ConfigError: the file is missing, is not JSON, is not an object, or says a key twice.
    """

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = [key for key, _ in pairs]
        if repeated := sorted({key for key in counts if counts.count(key) > 1}):
            raise ConfigError(
                f"{path}: the key {', '.join(map(repr, repeated))} stands there twice; keep one"
            )
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
        value = hjson.loads(text, object_pairs_hook=reject_duplicates)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; ds_configs/ has one JSON for each recipe"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: wanted a JSON object {{...}}, got {type(value).__name__}")
    return value


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that nobody reads.

    Raises:
        ConfigError: names the key, the closest known one and all known ones.
    """
    known = sorted(known)
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{where}: unknown key {key!r}{hint}; known keys: {', '.join(known)}")


def from_dict(cls: type[T], mapping: Any, where: str) -> T:
    """Build a dataclass, and those nested in it, from parsed JSON, checking every key and type.

    Args:
        where: the file and section, for messages: `bert_base.json: bert.data`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that the class refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: wanted an object {{...}}, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    check_keys(mapping, hints, where)
    values = {key: _checked(value, hints[key], f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except TypeError as error:
        missing = [
            field.name
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in values
        ]
        raise ConfigError(f"{where}: missing {', '.join(missing)}") from error


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation wants it: JSON has no tuples, and writes 1 for 1.0."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _checked(
            value, next(choice for choice in choices if choice is not type(None)), where
        )
    if origin is Literal:
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise ConfigError(f"{where}: wanted one of {', '.join(map(repr, choices))}, got {value!r}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(item, choices[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    wanted = origin or hint
    if hint is Any or type(value) is wanted:
        return value
    raise ConfigError(f"{where}: wanted {getattr(wanted, '__name__', wanted)}, got {value!r}")


SIZES: dict[str, dict[str, int]] = {
    # Source: Turc et al. 2019 (arXiv:1908.08962), Devlin et al. 2018 for base and large.
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    for name, layers, hidden in [
        ("tiny", 2, 128),
        ("mini", 4, 256),
        ("small", 4, 512),
        ("medium", 8, 512),
        ("base", 12, 768),
        ("large", 24, 1024),
    ]
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The architecture, under the names of Hugging Face's `BertConfig`; the defaults are base's.

    Attributes:
        layer_norm_position: `pre` normalises at the start of each half of a layer, not at its end:
            deeper models train without long warm-up, but it is no BERT of Hugging Face's any more.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    layer_norm_position: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id: wanted a word below vocab_size {self.vocab_size}, "
                f"got {self.pad_token_id}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} can't be divided among "
                f"{self.num_attention_heads} attention heads; choose a multiple"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            probability = getattr(self, name)
            if probability is not None and not 0 <= probability < 1:
                raise ConfigError(
                    f"{name}: wanted a probability from 0 to below 1, got {probability}"
                )

    @classmethod
    def from_size(cls, mapping: Mapping[str, Any], where: str) -> "BertConfig":
        """An architecture from `{"size": NAME, ...}`: the named size, overridden key by key.

        Raises:
            ConfigError: an unknown size or key.
        """
        overrides = dict(mapping)
        size = overrides.pop("size", "base")
        if not isinstance(size, str) or size not in SIZES:
            raise ConfigError(f"{where}.size: wanted one of {', '.join(SIZES)}, got {size!r}")
        check_keys(overrides, ["size", *typing.get_type_hints(cls)], where)
        return from_dict(cls, {**SIZES[size], **overrides}, where)
