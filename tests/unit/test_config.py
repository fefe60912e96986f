"""JSON is read strictly: every key is known, every value of its type, every message says where."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from zerobert.config import SIZES, BertConfig, check_keys, from_dict, load_json
from zerobert.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    names: tuple[str, ...] = ()
    kind: Literal["one", "two", 3] = "one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    num_steps: int
    rate: float = 0.5
    share: float | None = None
    flag: bool = False
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ConfigError(f"num_steps: wanted at least 0, got {self.num_steps}")


def load(folder: Path, text: str | bytes) -> dict[str, Any]:
    path = folder / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_json(path)


def test_comments_and_trailing_commas_pass(tmp_path: Path) -> None:
    text = '{\n// why\n"a": 1, # how\n/* and\nmore */ "b": {"c": [1, 2.5,],},\n}\n'
    assert load(tmp_path, text) == {"a": 1, "b": {"c": [1, 2.5]}}


def test_values_keep_their_types(tmp_path: Path) -> None:
    got = load(tmp_path, '{"i": 1, "f": 1.75e-3, "t": true, "n": null, "s": "é"}')
    assert got == {"i": 1, "f": 0.00175, "t": True, "n": None, "s": "é"}
    assert [type(value) for value in got.values()] == [int, float, bool, type(None), str]


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '{"x": {"a": 1, "a": 2}}'])
def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.json: the key 'a' stands there twice"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', "a.json is not valid JSON"),
        ('{"a": 1 "b": 2}', "a.json is not valid JSON"),
        ("{} {}", "a.json is not valid JSON"),
        ("[1, 2]", r"a.json: wanted a JSON object {...}, got list"),
        ("nonsense", r"a.json: wanted a JSON object {...}, got str"),
        (b'{"a": "\xff"}', "a.json can't be read: .*utf-8"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file; ds_configs/"):
        load_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))} can't be read"):
        load_json(tmp_path)


def test_an_unknown_key_comes_with_the_closest_and_all_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        check_keys({"grad_clippping": 1}, ["gradient_clipping", "fp16"], "a.json")
    assert str(caught.value) == (
        "a.json: unknown key 'grad_clippping' (did you mean 'gradient_clipping'?); "
        "known keys: fp16, gradient_clipping"
    )
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'; known keys: fp16$"):
        check_keys({"fp16": 1, "zzz": 2}, ["fp16"], "a.json")


def test_a_whole_tree_is_built() -> None:
    got = from_dict(
        Outer,
        {
            "num_steps": 3,
            "rate": 1,
            "share": 2,
            "flag": True,
            "free": {"any": [1]},
            "inner": {"names": ["a", "b"], "kind": 3},
        },
        "a.json",
    )
    assert got == Outer(
        num_steps=3,
        rate=1.0,
        share=2.0,
        flag=True,
        free={"any": [1]},
        inner=Inner(names=("a", "b"), kind=3),
    )
    assert type(got.rate) is float
    assert type(got.share) is float


def test_defaults_and_null() -> None:
    assert from_dict(Outer, {"num_steps": 0, "share": None}, "x") == Outer(num_steps=0)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "a.json: missing num_steps"),
        ({"num_steps": 1.0}, "a.json.num_steps: wanted int, got 1.0"),
        ({"num_steps": "1"}, "a.json.num_steps: wanted int, got '1'"),
        ({"num_steps": True}, "a.json.num_steps: wanted int, got True"),
        ({"num_steps": None}, "a.json.num_steps: wanted int, got None"),
        ({"num_steps": 1, "rate": True}, "a.json.rate: wanted float, got True"),
        ({"num_steps": 1, "rate": "1e-3"}, "a.json.rate: wanted float, got '1e-3'"),
        ({"num_steps": 1, "rate": None}, "a.json.rate: wanted float, got None"),
        ({"num_steps": 1, "share": "x"}, "a.json.share: wanted float, got 'x'"),
        ({"num_steps": 1, "flag": 1}, "a.json.flag: wanted bool, got 1"),
        ({"num_steps": 1, "free": []}, "a.json.free: wanted dict, got []"),
        ({"num_steps": 1, "inner": 4}, "a.json.inner: wanted an object {...}, got 4"),
        ({"num_steps": 1, "inner": {"names": "ab"}}, "a.json.inner.names: wanted tuple, got 'ab'"),
        (
            {"num_steps": 1, "inner": {"names": ["a", 2]}},
            "a.json.inner.names[1]: wanted str, got 2",
        ),
        (
            {"num_steps": 1, "inner": {"kind": "three"}},
            "a.json.inner.kind: wanted one of 'one', 'two', 3, got 'three'",
        ),
        (
            {"num_steps": 1, "inner": {"kind": 3.0}},
            "a.json.inner.kind: wanted one of 'one', 'two', 3, got 3.0",
        ),
        (
            {"num_steps": 1, "inner": {"name": []}},
            "a.json.inner: unknown key 'name' (did you mean 'names'?); known keys: kind, names",
        ),
        ({"num_steps": -1}, "a.json: num_steps: wanted at least 0, got -1"),
        ([], "a.json: wanted an object {...}, got []"),
    ],
)
def test_each_wrong_value_is_named(mapping: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, mapping, "a.json")
    assert str(caught.value) == message


def test_sizes_are_the_published_ones() -> None:
    assert list(SIZES) == ["tiny", "mini", "small", "medium", "base", "large"]
    large = BertConfig.from_size({"size": "large"}, "x")
    assert (large.num_hidden_layers, large.hidden_size) == (24, 1024)
    assert (large.num_attention_heads, large.intermediate_size) == (16, 4096)
    tiny = BertConfig.from_size({"size": "tiny"}, "x")
    assert (tiny.num_hidden_layers, tiny.hidden_size) == (2, 128)
    assert (tiny.num_attention_heads, tiny.intermediate_size) == (2, 512)
    assert BertConfig.from_size({}, "x") == BertConfig()


def test_a_size_is_overridden_key_by_key() -> None:
    got = BertConfig.from_size(
        {"size": "mini", "num_hidden_layers": 3, "hidden_dropout_prob": 0}, "x"
    )
    assert (got.num_hidden_layers, got.hidden_size, got.hidden_dropout_prob) == (3, 256, 0.0)
    assert got.attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"size": "huge"}, "m.size: wanted one of tiny, .*, got 'huge'"),
        ({"size": ["tiny"]}, r"m.size: wanted one of tiny, .*, got \['tiny'\]"),
        ({"size": "tiny", "hidden": 3}, "m: unknown key 'hidden'.*; known keys: .*size"),
        ({"hidden_size": 770}, "m: hidden_size 770 can't be divided among 12 attention heads"),
        ({"num_attention_heads": 0}, "m: num_attention_heads: wanted at least 1, got 0"),
        ({"hidden_dropout_prob": 1.0}, "m: hidden_dropout_prob: wanted a probability"),
        ({"classifier_dropout": -0.1}, "m: classifier_dropout: wanted a probability"),
        ({"vocab_size": 0}, "m: vocab_size: wanted at least 1, got 0"),
        ({"hidden_act": "relu"}, "m.hidden_act: wanted one of 'gelu', got 'relu'"),
        ({"hidden_size": 768.5}, "m.hidden_size: wanted int, got 768.5"),
    ],
)
def test_an_architecture_that_can_not_be_is_refused(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BertConfig.from_size(mapping, "m")
