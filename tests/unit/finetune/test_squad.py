import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune import squad
from finetune.squad import Features, Question, Questions, encode, load_questions, windows
from finetune.tasks import Split
from tests.questions import FILE, KEEPER, MILL, TOKENIZER, VOCAB, example, write
from zerobert.config import BertConfig
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import sha256_file
from zerobert.model import BertForQuestionAnswering, span_loss


def load(folder: Path, content: object, *, for_training: bool = True) -> Questions:
    return load_questions(FILE, write(folder, content), for_training=for_training)


def test_a_file_is_read(tmp_path: Path) -> None:
    questions = load(tmp_path, example())
    assert questions.source == str(tmp_path / "train.json")
    assert questions.version == sha256_file(tmp_path / "train.json")
    assert [row.id for row in questions.rows] == [
        *("The -0", "The -1", "The -2", "The -3", "Olm -0", "Olm -1")
    ]
    last = questions.rows[-1]
    assert (last.text, last.context) == ("Where is the wheel from?", MILL)
    assert last.answers == ("École Haute", "Haute")
    for row in questions.rows:
        assert row.place is not None
        assert row.context[slice(*row.place)] == row.answers[0]


@pytest.mark.parametrize("num_rows", [None, 6, 87_599])
def test_another_count_than_the_official_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_rows: int | None
) -> None:
    write(tmp_path, example())
    split = Split(files=FILE.files, num_rows=num_rows)
    assert len(load_questions(split, tmp_path / split.files[0].name, for_training=False)) == 6
    told = capsys.readouterr().err
    if num_rows == 87_599:
        assert "train.json: wanted SQuAD's official 87599 questions, got 6; scores" in told
    else:
        assert told == ""


def test_official_files_have_their_names_and_counts() -> None:
    assert (squad.TRAIN.files[0].name, squad.TRAIN.num_rows) == ("train-v1.1.json", 87_599)
    assert (squad.DEV.files[0].name, squad.DEV.num_rows) == ("dev-v1.1.json", 10_570)


def answers_of(content: dict[str, Any], article: int, row: int) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = content["data"][article]["paragraphs"][0]["qas"][row]["answers"]
    return answers


@pytest.mark.parametrize("start", [0, -1, 10_000, len(KEEPER)])
def test_training_leaves_out_answers_that_are_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: int
) -> None:
    content = example()
    answers_of(content, 0, 1)[0]["answer_start"] = start
    answers_of(content, 1, 1)[0]["answer_start"] = start  # its second one is where it says
    questions = load(tmp_path, content)
    assert "left out 1 of 6 questions, whose answers are not where" in capsys.readouterr().err
    assert [row.id for row in questions.rows if row.id.endswith("-1")] == ["Olm -1"]
    place = questions.rows[-1].place
    assert place is not None
    assert MILL[slice(*place)] == "Haute"

    to_score = load(tmp_path, content, for_training=False)
    assert capsys.readouterr().err == ""
    assert len(to_score) == 6
    assert to_score.rows[1].place is None
    assert to_score.rows[1].answers == ("9,310",)


def test_a_blank_is_no_answer(tmp_path: Path) -> None:
    content = example()
    answers_of(content, 0, 0)[0].update(text=" ", answer_start=3)
    assert len(load(tmp_path, content)) == 5


def test_no_answer_where_it_says_is_an_error(tmp_path: Path) -> None:
    content = example()
    for article, row in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]:
        for answer in answers_of(content, article, row):
            answer["answer_start"] += 1
    with pytest.raises(DataError, match="none of 6 answers is where its answer_start says"):
        load(tmp_path, content)


def edit(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        if to is None:
            del content[path[-1]]
        else:
            content[path[-1]] = to

    return apply


PARAGRAPH = ("data", 1, "paragraphs", 0)
ROW = (*PARAGRAPH, "qas", 1)
DAMAGES: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("train.json: wanted 'data', got only 'version'; this is for SQuAD", edit("data", to=None)),
    ("train.json: no questions; the file is empty or was cut off", edit("data", to=[])),
    ("train.json: wanted a list in 'data', got {}", edit("data", to={})),
    (r"train.json: data\[1\]: wanted an object {...}, got 'rye'", edit("data", 1, to="rye")),
    (
        r"data\[1\].paragraphs\[0\]: wanted 'context', got only 'qas'",
        edit(*PARAGRAPH, "context", to=None),
    ),
    (r"paragraphs\[0\]: wanted a string in 'context', got 7", edit(*PARAGRAPH, "context", to=7)),
    (r"paragraphs\[0\].qas\[1\]: wanted 'id', got only 'question'", edit(*ROW, "id", to=None)),
    (r"qas\[1\]: wanted 'question', got only 'id', 'answers'", edit(*ROW, "question", to=None)),
    (r"qas\[1\]: wanted 'answers', got only", edit(*ROW, "answers", to=None)),
    (r"qas\[1\]: wanted an answer, got none; this is for SQuAD v1.1", edit(*ROW, "answers", to=[])),
    (r"answers\[0\]: wanted 'text', got only", edit(*ROW, "answers", 0, "text", to=None)),
    (
        r"answers\[0\]: wanted a whole number in 'answer_start', got '3'",
        edit(*ROW, "answers", 0, "answer_start", to="3"),
    ),
    (
        r"answers\[0\]: wanted a whole number in 'answer_start', got True",
        edit(*ROW, "answers", 0, "answer_start", to=True),
    ),
    (r"qas\[1\]: 'question' has half of a UTF-16 char", edit(*ROW, "question", to="\ud83d?")),
    ("the id 'The -0' is there 2 times", edit(*ROW, "id", to="The -0")),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_each_damage_has_its_message(
    tmp_path: Path, message: str, damage: Callable[[dict[str, Any]], None]
) -> None:
    content = example()
    damage(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.json: the file is empty"),
        (b" \n", "train.json: the file is empty"),
        (b"[]", r"train.json: wanted an object {...}, got \[\]"),
        (b'{"data": [\n{"title"', "line 2 column 9: not JSON .*; the file is broken or was cut"),
        (b'{"data": "\xff"}', "wanted UTF-8 text, got the byte 0xff"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_questions(FILE, tmp_path / "train.json", for_training=True)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json: no such file; put SQuAD v1\.1's official"):
        load_questions(FILE, tmp_path / "train.json", for_training=True)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_questions(FILE, path, for_training=True)) == 6


def one(context: str, question: str, place: tuple[int, int] | None) -> Questions:
    answers = (context[slice(*place)],) if place else ("x",)
    row = Question(id="q", text=question, context=context, answers=answers, place=place)
    return Questions(source="here", version="", rows=(row,))


def pieces(features: Features) -> list[str]:
    return [
        " ".join(VOCAB[token].removeprefix("##") for token in ids)
        for ids in features.tokens.input_ids
    ]


def test_windows_step_by_the_stride() -> None:
    features = encode(
        one("Abc de, fgh.", "Xyz?", (4, 9)),  # de, f
        TOKENIZER,
        max_seq_length=11,
        doc_stride=3,
        max_query_length=3,
    )
    # Of 10 pieces 5 have room beside a question of 3, whose mark is cut.
    assert pieces(features) == [
        "[CLS] x y z [SEP] a b c d e [SEP]",
        "[CLS] x y z [SEP] d e , f g [SEP]",
        "[CLS] x y z [SEP] f g h . [SEP]",
    ]
    assert features.tokens.segment_ids[-1] == [0] * 5 + [1] * 5
    # The answer is "de, f", of which only the second window has all.
    assert features.positions_N2.tolist() == [[0, 0], [5, 8], [0, 0]]
    assert features.contexts_N2.tolist() == [[5, 10], [5, 10], [5, 9]]
    assert features.pieces_N.tolist() == [0, 3, 6]
    assert features.questions_N.tolist() == [0, 0, 0]
    assert features.lengths().tolist() == [11, 11, 10]
    assert len(features) == 3


def test_contexts_are_told_apart(tmp_path: Path) -> None:
    features = encode(load(tmp_path, example()), TOKENIZER, max_seq_length=96, doc_stride=16)
    questions = load(tmp_path, example())
    for window in range(len(features)):
        row = questions.rows[features.questions_N[window]]
        begin, end = features.contexts_N2[window]
        first = features.pieces_N[window]
        spans = features.offsets_K2[first : first + end - begin]
        read = [row.context[start:stop] for start, stop in spans]
        ids = features.tokens.input_ids[window][begin:end]
        written = [VOCAB[token].removeprefix("##") for token in ids]
        assert [text.lower().replace("é", "e") for text in read] == written


def test_an_answer_of_unknown_place_adds_nothing_to_the_loss() -> None:
    features = encode(one("abc", "x", None), TOKENIZER, max_seq_length=80)
    assert features.positions_N2.tolist() == [[80, 80]]
    batch = features.inputs(np.array([0]), torch.device("cpu"))
    start_BS = torch.randn(batch["input_ids_BS"].shape)
    assert features.loss_sum((start_BS, start_BS), np.array([0])).item() == 0


def test_a_context_without_pieces_is_one_window() -> None:
    features = encode(one(" ", "x", None), TOKENIZER, max_seq_length=80)
    assert pieces(features) == ["[CLS] x [SEP] [SEP]"]
    assert features.offsets_K2.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 67}, "max_seq_length: wanted more than 67, .* got 67; lower max_quer"),
        ({"doc_stride": 0}, "max_query_length and doc_stride: wanted 1 or more, got 64 and 0"),
        ({"max_query_length": 0}, "wanted 1 or more, got 0 and 128"),
    ],
)
def test_lengths_without_room_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(one("abc", "x", None), TOKENIZER, **changes)


def test_batches_and_their_loss_fit_the_model(tmp_path: Path) -> None:
    features = encode(load(tmp_path, example()), TOKENIZER, max_seq_length=100, doc_stride=40)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=len(VOCAB),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=100,
        )
    ).eval()
    chosen = np.array([3, 0, len(features) - 1])
    assert features.positions_N2[chosen].any(axis=1).tolist() != [False] * 3
    batch = features.inputs(chosen, torch.device("cpu"))
    assert batch["input_mask_BS"].sum(1).tolist() == features.lengths()[chosen].tolist()
    loss = features.loss_sum(model(**batch), chosen)
    alone = torch.zeros(())
    for i in chosen:
        batch = features.inputs(np.array([i]), torch.device("cpu"))
        starts, ends = torch.tensor(features.positions_N2[i])[:, None]
        alone = alone + span_loss(*model(**batch), starts, ends)
    torch.testing.assert_close(loss, alone, atol=1e-4, rtol=0)


@given(num_pieces=st.integers(0, 500), room=st.integers(1, 400), stride=st.integers(1, 500))
def test_windows_are_those_of_bert_and_leave_nothing_out(
    num_pieces: int, room: int, stride: int
) -> None:
    found = windows(num_pieces, room=room, stride=stride)
    wanted, start = [(0, min(room, num_pieces))], 0
    while wanted[-1][1] < num_pieces:
        start += min(stride, room)
        wanted.append((start, min(start + room, num_pieces)))
    assert found == wanted
    assert {i for first, end in found for i in range(first, end)} == set(range(num_pieces))


def test_windows_are_those_of_the_tokenizers_library(tmp_path: Path) -> None:
    """There a stride is the overlap: the room of the context less BERT's stride."""
    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    questions = load(tmp_path, example())
    max_seq_length, doc_stride = 90, 24
    features = encode(questions, TOKENIZER, max_seq_length=max_seq_length, doc_stride=doc_stride)
    for number, row in enumerate(questions.rows):
        num_query = len(TOKENIZER.encode_words([row.text])[0])
        wanted = theirs(
            row.text,
            row.context,
            truncation="only_second",
            max_length=max_seq_length,
            stride=max_seq_length - num_query - 3 - doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        mine = np.flatnonzero(features.questions_N == number)
        assert [features.tokens.input_ids[i] for i in mine] == wanted["input_ids"]
        assert [features.tokens.segment_ids[i] for i in mine] == wanted["token_type_ids"]
        for i, offsets in zip(mine, wanted["offset_mapping"], strict=True):
            (begin, end), first = features.contexts_N2[i], features.pieces_N[i]
            got = features.offsets_K2[first : first + end - begin]
            assert got.tolist() == [list(pair) for pair in offsets[begin:end]]


# Letters of several scripts, some of which are unknown to the vocabulary; no combining marks.
WORDS = st.text("abcXYZ019éÉßñ東京한ǆﬁ.,?'()-“”—$", min_size=1, max_size=8)
BLANKS = st.text(" \n\t\u00a0\u2003", min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), words=st.lists(WORDS, min_size=1, max_size=40))
def test_the_answer_s_tokens_are_the_answer(data: st.DataObject, words: list[str]) -> None:
    """In each window that has it all; and with windows that overlap enough one has."""
    blanks = [data.draw(BLANKS) for _ in words]
    context = "".join(itertools.chain.from_iterable(zip(blanks, words, strict=True)))
    ends = np.cumsum([len(a) + len(b) for a, b in zip(blanks, words, strict=True)])
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    place = (int(ends[first]) - len(words[first]), int(ends[last]))
    # At most 4 words of at most 8 characters of at most 3 pieces each.
    features = encode(
        one(context, "who", place),
        TOKENIZER,
        max_seq_length=6 + 2 * 96,
        doc_stride=96,
        max_query_length=3,
    )
    has_answer = features.positions_N2.any(axis=1)
    assert has_answer.any()
    for window in np.flatnonzero(has_answer):
        shift = features.pieces_N[window] - features.contexts_N2[window, 0]
        start, end = features.positions_N2[window] + shift
        found = context[features.offsets_K2[start, 0] : features.offsets_K2[end, 1]]
        assert found == context[slice(*place)]
