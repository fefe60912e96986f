import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer

from zerobert.errors import ConfigError, DataError
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer, train_vocabulary

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCAB = (
    *SPECIAL_TOKENS,
    *("the", "cat", "sat", "un", "##aff", "##able", "É", "école", "ecole", "Cat"),
    *("東", "京", "都", ".", ",", "!", "'", "-"),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
)
TEXTS = [
    "The cat sat, unaffable!",
    "École ÉCOLE cats' Cat",
    "東京都 in the 東京",
    "a [MASK] in the[SEP]text",
    "\u200bzero\u00a0width \x0b tab\tand\r\nnew\x85line",
    "σίσυφος ΣΊΣΥΦΟΣ",
    "x" * 120,
    "",
]


@pytest.fixture(params=[True, False], ids=["uncased", "cased"])
def tokenizer(request: pytest.FixtureRequest) -> WordPieceTokenizer:
    return WordPieceTokenizer(VOCAB, do_lower_case=request.param)


def write_vocab(folder: Path, *tokens: str) -> Path:
    path = folder / "vocab.txt"
    path.write_bytes("".join(f"{token}\n" for token in tokens).encode())
    return path


def test_words_become_pieces() -> None:
    tokenizer = WordPieceTokenizer(VOCAB, do_lower_case=True)
    ids = tokenizer.encode_words(["Unaffable cats.", "東京"])
    assert [[VOCAB[token] for token in row] for row in ids] == [
        ["un", "##aff", "##able", "cat", "##s", "."],
        ["東", "京"],
    ]
    assert tokenizer.decode([tokenizer.cls_id, *ids[0], tokenizer.sep_id]) == (
        "[CLS] unaffable cats. [SEP]"
    )


def test_pieces_say_which_characters_they_are() -> None:
    tokenizer = WordPieceTokenizer(VOCAB, do_lower_case=True)
    texts = ["  The ÉCOLE, unaffable", "東京 x\u0301y", ""]
    encoded = tokenizer.encode_words_with_offsets(texts)
    assert [ids for ids, _ in encoded] == tokenizer.encode_words(texts)
    pieces = [
        [(VOCAB[token], text[start:end]) for token, (start, end) in zip(*encoding, strict=True)]
        for text, encoding in zip(texts, encoded, strict=True)
    ]
    assert pieces == [
        [
            ("the", "The"),
            ("ecole", "ÉCOLE"),
            (",", ","),
            ("un", "un"),
            ("##aff", "aff"),
            ("##able", "able"),
        ],
        [("東", "東"), ("京", "京"), ("x", "x"), ("##y", "y")],
        [],
    ]


def test_special_ids_are_those_of_the_vocabulary(tokenizer: WordPieceTokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (0, 1, 2)
    assert (tokenizer.sep_id, tokenizer.mask_id) == (3, 4)


@pytest.mark.parametrize("lower_case", [True, False])
def test_words_equal_the_librarys_on_any_unicode(lower_case: bool) -> None:
    ids = {token: index for index, token in enumerate(VOCAB)}
    reference = BertWordPieceTokenizer(ids, lowercase=lower_case)
    tokenizer = WordPieceTokenizer(VOCAB, do_lower_case=lower_case)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.text(max_size=40), max_size=4))
    def check(texts: list[str]) -> None:
        wanted = [reference.encode(text, add_special_tokens=False).ids for text in texts]
        assert tokenizer.encode_words(texts) == wanted

    check()


def test_transformers_loads_what_is_saved(tokenizer: WordPieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == tokenizer.encode_words(TEXTS)
    assert theirs.vocab_size == len(VOCAB)
    assert theirs.model_max_length == 512
    assert (theirs.pad_token_id, theirs.mask_token_id) == (0, 4)
    again = WordPieceTokenizer.from_file(
        tmp_path / "vocab.txt", do_lower_case=tokenizer.do_lower_case
    )
    assert (again.vocab, again.sha256) == (tokenizer.vocab, tokenizer.sha256)


@pytest.mark.parametrize("length", [5, 6, 9, 17, 64])
def test_pairs_are_cut_as_hugging_face_cuts_them(
    tokenizer: WordPieceTokenizer, tmp_path: Path, length: int
) -> None:
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [(first, second) for first in TEXTS for second in TEXTS]
    first, second = [list(side) for side in zip(*pairs, strict=True)]
    wanted = theirs(first, second, truncation=True, max_length=length)
    assert tokenizer.encode_pairs(first, second, max_seq_length=length) == (
        wanted["input_ids"],
        wanted["token_type_ids"],
    )
    wanted = theirs(first, truncation=True, max_length=length)
    assert tokenizer.encode_pairs(first, None, max_seq_length=length) == (
        wanted["input_ids"],
        wanted["token_type_ids"],
    )
    # What was cut once must not be cut for ever.
    assert len(tokenizer.encode_words(["cat " * 100])[0]) == 100


def test_a_pair_needs_room(tokenizer: WordPieceTokenizer) -> None:
    with pytest.raises(ConfigError, match="max_seq_length: wanted at least 5, got 4"):
        tokenizer.encode_pairs(["a"], ["b"], max_seq_length=4)


def test_line_ends_do_not_change_a_vocabulary(tmp_path: Path) -> None:
    path = write_vocab(tmp_path, *SPECIAL_TOKENS, "a", "\u2028")
    unix = WordPieceTokenizer.from_file(path, do_lower_case=True)
    assert unix.vocab[-2:] == ("a", "\u2028")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    windows = WordPieceTokenizer.from_file(path, do_lower_case=True)
    assert (windows.vocab, windows.sha256) == (unix.vocab, unix.sha256)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"), r"its 5 tokens lack \[MASK\]"),
        (("a", *SPECIAL_TOKENS), r"wanted \[PAD\] in the first line .*, got 'a'"),
        ((*SPECIAL_TOKENS, "a", "b", "a"), "the token 'a' is there 2 times"),
        ((), r"its 1 tokens lack \[PAD\], \[UNK\]"),
    ],
)
def test_what_is_no_vocabulary(tmp_path: Path, tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        WordPieceTokenizer.from_file(write_vocab(tmp_path, *tokens), do_lower_case=True)


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    path = write_vocab(tmp_path, *SPECIAL_TOKENS, "a")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(DataError, match="begins with a byte order mark"):
        WordPieceTokenizer.from_file(path, do_lower_case=True)


@pytest.mark.parametrize(
    ("words", "is_cased"), [(["a", "##b"], False), (["A", "b"], True), (["[unused1]"], False)]
)
def test_capitals_tell_of_a_cased_vocabulary(words: list[str], is_cased: bool) -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, *words], do_lower_case=True)
    assert tokenizer.is_cased == is_cased


def test_what_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt can't be read: No such file"):
        WordPieceTokenizer.from_file(tmp_path / "none.txt", do_lower_case=True)
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(DataError, match=r"wanted UTF-8 .* invalid start byte at byte 6"):
        WordPieceTokenizer.from_file(path, do_lower_case=True)


CORPUS = (
    "the cats sat on the mats and the rats sat on the hats\n"
    "東京の猫は東京に座る。 Élan vital, élan!\n"
) * 50


def test_training_starts_with_the_special_tokens_and_the_characters(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(CORPUS, encoding="utf-8")
    vocab = train_vocabulary([text], vocab_size=120, do_lower_case=True)
    assert tuple(vocab[:5]) == SPECIAL_TOKENS
    assert len(vocab) == len(set(vocab))
    assert {"the", "sat", "##ats", "東", "京", "猫"} <= set(vocab)
    # Chinese characters and punctuation stand alone, accents and capitals are gone.
    assert not {"##東", "##,", "é", "É", "E"} & set(vocab)
    cased = train_vocabulary([text], vocab_size=120, do_lower_case=False)
    assert {"É", "é"} <= set(cased)
    tokenizer = WordPieceTokenizer(vocab, do_lower_case=True)
    assert tokenizer.unk_id not in tokenizer.encode_words([CORPUS])[0]


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(CORPUS, encoding="utf-8")
    program = (
        "import sys, json; from pathlib import Path\n"
        "from zerobert.tokenizer import train_vocabulary\n"
        "vocab = train_vocabulary([Path(sys.argv[1])], vocab_size=90, do_lower_case=True)\n"
        "print(json.dumps(vocab))"
    )
    root = str(Path(__file__).resolve().parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(text)],
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(3)
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())) <= 90


def test_a_vocabulary_never_is_larger_than_asked_for(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(CORPUS, encoding="utf-8")
    for size in (10, 25, 60):
        assert len(train_vocabulary([text], vocab_size=size, do_lower_case=True)) <= size
    with pytest.raises(ConfigError, match="vocab_size: wanted 10 to 10000000, got 9"):
        train_vocabulary([text], vocab_size=9, do_lower_case=True)


def test_a_name_that_is_no_text_changes_nothing(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt"))
    vocabs = []
    for path in (tmp_path / "a.txt", odd):
        path.write_text("the cat sat on the mat\n" * 3)
        vocabs.append(train_vocabulary([path], vocab_size=40, do_lower_case=True))
    assert vocabs[0] == vocabs[1]
    assert "cat" in vocabs[0]


def test_text_that_can_not_teach(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" \n\n")
    with pytest.raises(DataError, match="no text to learn a vocabulary from"):
        train_vocabulary([path], vocab_size=100, do_lower_case=True)
    path.write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: .* at byte 6; convert"):
        train_vocabulary([path], vocab_size=100, do_lower_case=True)
    with pytest.raises(DataError, match=r"none\.txt can't be read: No such file"):
        train_vocabulary([tmp_path / "none.txt"], vocab_size=100, do_lower_case=True)
