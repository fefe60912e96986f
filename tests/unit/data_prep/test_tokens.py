"""Cutting text into pieces loses and doubles nothing, and the order of documents ignores it."""

import dataclasses
import itertools
import resource
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import tokens
from data_prep.parallel import Pool
from data_prep.tokens import (
    Range,
    TokensConfig,
    find_places,
    piece_files,
    plan_pieces,
    read_documents,
    read_range,
    stamp,
    tokenize_text,
)
from data_prep.wordpiece import encode
from tests.unit.data_prep.test_wordpiece import (
    TOKENIZERS,
    documents_lists,
    documents_of,
    sentences_of,
)
from zerobert.errors import DataError
from zerobert.manifest import write_bytes

BYTE_ORDER_MARK = "\ufeff"
CONFIG = TokensConfig(do_lower_case=True, random_seed=12345)

# What could be cut wrongly: every line end, blanks that are no space, letters of several bytes.
texts = st.lists(
    st.sampled_from(
        [
            *("\n", "\n", "\n\n", "\r\n", "\r", " ", "\t", "\u3000", "\u2028", "\x1c"),
            *(BYTE_ORDER_MARK, "a", "bc d", "é", "東", "\U0001f600"),
        ]
    ),
    max_size=25,
).map("".join)


def restated(text: str) -> list[list[str]]:
    """The documents of a text: lines without a blank one between."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    return [list(group) for has_text, group in groups if has_text]


def check_cutting(folder: Path, contents: list[str], piece_bytes: int) -> None:
    """The documents of all ranges are those of the files, each once and in order."""
    files = [folder / f"{number}.txt" for number in range(len(contents))]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content.encode())
    wanted = [
        document
        for content in contents
        for document in restated(content.removeprefix(BYTE_ORDER_MARK))
    ]
    pieces = plan_pieces(files, piece_bytes)
    texts = [[read_range(part) for part in piece] for piece in pieces]
    assert [
        document for piece in texts for text in piece for document in restated(text.decode())
    ] == wanted
    together = [restated(b"\n\n".join(piece).decode()) for piece in texts]
    assert list(itertools.chain.from_iterable(together)) == wanted
    assert not any(b"\r" in text for piece in texts for text in piece)


@settings(max_examples=300, deadline=None)
@given(contents=st.lists(texts, max_size=4), piece_bytes=st.integers(1, 40))
@example(contents=["", "\n", BYTE_ORDER_MARK + "\n\na", ""], piece_bytes=1)
@example(contents=[BYTE_ORDER_MARK + "a\n\n" + BYTE_ORDER_MARK + "b"], piece_bytes=2)
@example(contents=["a\n \t\u3000\nb\r\n\r\nc\r\rd"], piece_bytes=3)
def test_documents_are_cut_nowhere_and_come_once(
    tmp_path_factory: Any, contents: list[str], piece_bytes: int
) -> None:
    check_cutting(tmp_path_factory.mktemp("texts"), contents, piece_bytes)


def test_every_size_of_piece_gives_the_same_documents(tmp_path: Path) -> None:
    text = (
        BYTE_ORDER_MARK + "a b\r\nc\r\n\r\n\u3000\r\nd\n\n\n \t \né\u2028f\n\x1c\n東京\n\ng\rh\r\ri"
    )
    contents = [text, "", text + "\n", "one line " * 20, "\n" * 9]
    size = max(len(content.encode()) for content in contents)
    for piece_bytes in range(1, size + 2):
        check_cutting(tmp_path, contents, piece_bytes)


def test_small_files_share_a_piece_and_large_ones_are_cut(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abcdef"]
    texts = ["xx\n", "", "x\nx\n", "12\n\n" * 9, "x" * 30, "\n".join(["x" * 30, "", "xx", "", "x"])]
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)
    a, _, c, d, e, f = files
    assert plan_pieces(files, 10) == [
        [Range(a, 0, 3), Range(c, 0, 4)],
        [Range(d, 0, 12)],
        [Range(d, 12, 24)],
        [Range(d, 24, 36)],
        [Range(e, 0, 30)],
        [Range(f, 0, 32)],
        [Range(f, 32, 37)],
    ]
    assert plan_pieces([], 10) == []


def test_a_document_is_looked_through_once_however_small_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were each piece to look for its own start, this would read 40,000 times half the file."""
    path = tmp_path / "a.txt"
    path.write_text("a b c d\n" * 50_000)
    started = time.process_time()
    assert plan_pieces([path], 10) == [[Range(path, 0, 400_000)]]
    assert time.process_time() - started < 5


def test_what_is_not_text_is_named_with_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\nalso fine\n\nna\xefve\n")
    assert read_range(Range(path, 0, 17)) == b"fine\n\nalso fine\n\n"
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: .* at byte 19;"):
        read_range(Range(path, 17, 23))
    path.write_bytes(b"fine\n\nalso fine\n\nbin\0ary\n")
    with pytest.raises(DataError, match=r"a\.txt is not text: a NUL at byte 20;"):
        read_range(Range(path, 17, 24))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt can't be read: No such file or directory"):
        read_range(Range(path, 0, 8))
    with pytest.raises(DataError, match=r"a\.txt can't be read: No such file or directory"):
        plan_pieces([path], 8)


def write_piece(path: Path, documents: Any, keys: Any, vocab_size: int) -> Path:
    tokenizer: Any = types.SimpleNamespace(vocab=range(vocab_size))
    write_bytes(path, *tokens._packed(documents, keys, tokenizer))
    return path


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1], ids=["two bytes", "four bytes"])
@given(documents_lists)
def test_a_piece_reads_back_as_it_was_written(
    tmp_path_factory: Any, vocab_size: int, lists: list[list[list[int]]]
) -> None:
    # Ids at the upper end, where the type on disk matters.
    lists = [[[vocab_size - 1 - i for i in ids] for ids in document] for document in lists]
    keys = np.arange(2 * len(lists), dtype=np.uint64).reshape(-1, 2)
    path = tmp_path_factory.mktemp("piece") / "piece_00000.bin"
    write_piece(path, documents_of(lists), keys, vocab_size)
    piece = tokens._Piece(path)
    assert piece.num_documents == len(lists)
    assert piece.keys.tolist() == keys[:, 0].tolist()
    assert piece.lower_keys.tolist() == keys[:, 1].tolist()
    for first, end in itertools.combinations(range(len(lists) + 1), 2):
        read = piece.read(first, end)
        assert [array.dtype for array in read] == [np.int32, np.int64, np.int64]
        assert sentences_of(read) == lists[first:end]
    token_bytes = 2 if vocab_size == 1 << 16 else 4
    num_sentences = sum(map(len, lists))
    num_tokens = sum(len(ids) for document in lists for ids in document)
    assert path.stat().st_size == 32 + 8 * (3 * len(lists) + num_sentences + 2) + (
        token_bytes * num_tokens
    )


TOP = (1 << 64) - 1
# Few values, so that many are equal, and both ends of what 64 bits hold.
upper_keys = st.sampled_from([0, 1, 2, 1 << 63, TOP - 1, TOP]) | st.integers(0, TOP)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(upper_keys, max_size=6), max_size=5))
@example([[TOP] * 3, [], [TOP] * 3, [0] * 3])
def test_ranks_are_found_as_a_sort_finds_them(
    tmp_path_factory: Any, keys_of_pieces: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    documents: list[tuple[int, int, int]] = []
    for number, upper in enumerate(keys_of_pieces):
        upper.sort()
        # A document has one token: its number.
        first = len(documents)
        lists = [[[first + i]] for i in range(len(upper))]
        keys = np.array([[key, 7] for key in upper], np.uint64).reshape(-1, 2)
        write_piece(folder / f"piece_{number:05d}.bin", documents_of(lists), keys, 1000)
        documents += [(key, number, first + i) for i, key in enumerate(upper)]
    documents.sort()
    pieces = piece_files(folder)
    ranks = range(len(documents) + 1)
    places = find_places(pieces, ranks)
    for rank in ranks:
        before = [number for _, number, _ in documents[:rank]]
        assert places[rank].tolist() == [before.count(i) for i in range(len(keys_of_pieces))]
    for first, end in itertools.pairwise(ranks[:: max(1, len(documents) // 3)]):
        part = read_documents(pieces, places[first].tolist(), places[end].tolist())
        assert part.tokens.tolist() == [token for _, _, token in documents[first:end]]


def test_a_rank_needs_no_open_file_for_every_piece(tmp_path: Path) -> None:
    """A large corpus has more pieces than a process may have open files."""
    for number in range(200):
        keys = np.array([[number, 0]], np.uint64)
        write_piece(tmp_path / f"piece_{number:05d}.bin", documents_of([[[number]]]), keys, 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard))
    try:
        places = find_places(piece_files(tmp_path), [0, 150, 200])
        part = read_documents(piece_files(tmp_path), places[1].tolist(), places[2].tolist())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert part.tokens.tolist() == list(range(150, 200))


def tokenize(files: list[Path], folder: Path, *, seed: int = 12345) -> dict[str, Any]:
    inputs = {path.name: path.read_text() for path in files}
    return tokenize_text(
        {path: stamp(path) for path in files},
        TOKENIZERS[True],
        folder,
        dataclasses.replace(CONFIG, random_seed=seed),
        inputs=inputs,
        pool=Pool(None, 1),
    )


def everything(folder: Path) -> Any:
    """All documents of a folder, in their order."""
    pieces = piece_files(folder)
    counts = [tokens._Piece(path).num_documents for path in pieces]
    return sentences_of(read_documents(pieces, [0] * len(pieces), counts))


def test_the_order_is_that_of_a_seeded_hash_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"the {chr(97 + i)} b.\n{chr(97 + i)}{chr(98 + i)}\n" for i in range(20)] * 2
    one, two, three = (tmp_path / f"{name}.txt" for name in ("one", "two", "three"))
    one.write_text("\n".join(documents))
    two.write_text("\n \n".join(documents[13:]).removesuffix("\n"))
    three.write_text("\r\n\r\n".join(text.replace("\n", "\r\n") for text in documents[:13]))
    whole = encode(one.read_bytes(), TOKENIZERS[True])[0]
    summary = tokenize([one], tmp_path / "whole")
    assert summary == {
        "documents": 40,
        "sentences": 80,
        "tokens": len(whole.tokens),
        "unknown": 0,
        "text_bytes": one.stat().st_size,
    }
    wanted = everything(tmp_path / "whole")
    assert sorted(wanted) == sorted(sentences_of(whole)) != wanted
    for piece_bytes in (25, 200, 1 << 20):
        monkeypatch.setattr(tokens, "_PIECE_BYTES", piece_bytes)
        tokenize([two, three], tmp_path / f"cut{piece_bytes}")
        assert (len(piece_files(tmp_path / f"cut{piece_bytes}")) > 1) == (piece_bytes < 1 << 20)
        assert everything(tmp_path / f"cut{piece_bytes}") == wanted
    tokenize([one], tmp_path / "other", seed=1)
    assert sorted(everything(tmp_path / "other")) == sorted(wanted)
    assert everything(tmp_path / "other") != wanted


def test_text_that_changes_meanwhile_is_refused_and_nothing_of_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the a\n\nthe b\n")
    tokenize_piece = tokens._tokenize_piece

    def write_and_tokenize(task: Any) -> None:
        path.write_text("the a\n\nthe c\n\nthe d\n")
        tokenize_piece(task)

    with monkeypatch.context() as patches:
        patches.setattr(tokens, "_tokenize_piece", write_and_tokenize)
        with pytest.raises(DataError, match=r"a\.txt changed while it was read; run the same"):
            tokenize([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_text("the a\n\nthe b\n")
    assert tokenize([path], tmp_path / "out")["documents"] == 2
