"""A fine-tuned model asked, from texts, files and stdin, with every way in which that can fail."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from finetune import predict
from finetune.classifier import open_classifier
from zerobert.checkpoint import save_model
from zerobert.config import BertConfig
from zerobert.errors import CheckpointError, ConfigError, DataError
from zerobert.model import BertForPreTraining, BertForSequenceClassification
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

WORDS = ("good", "fine", "bad", "a", "the", "soup", "tea", "is")
CONFIG = BertConfig(
    vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    initializer_range=0.5,
)
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, *WORDS], do_lower_case=True)


def save(
    folder: Path,
    labels: tuple[str, ...],
    *,
    task: str = "custom",
    columns: tuple[str, ...] = (),
    length: int | None = None,
) -> BertForSequenceClassification:
    """Save a model with these labels, or of a score; it has random weights, which differ widely."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG, len(labels) or 1).eval()
    if not labels:
        with torch.no_grad():  # so that scores lie below, in and above 0 to 5
            model.classifier.weight *= 8
            model.classifier.bias -= 5
    run = {"task": task, "text_columns": columns}
    save_model(
        folder,
        model.state_dict(),
        CONFIG,
        TOKENIZER,
        card="",
        labels=labels,
        is_regression=not labels,
        source={"run": {**run, **({"max_seq_length": length} if length else {})}},
        inputs={},
    )
    return model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a fine-tuned model in `m`."""
    monkeypatch.chdir(tmp_path)
    save(Path("m"), ("no", "yes"))
    return tmp_path


class Terminal(io.TextIOWrapper):
    """A stdin that somebody types into."""

    def isatty(self) -> bool:
        return True


def ask(
    monkeypatch: pytest.MonkeyPatch,
    *flags: str,
    stdin: bytes | Terminal = b"",
    model: str = "m",
) -> None:
    argv = ["predict.py", "--model_name_or_path", model, "--n_gpu", "0", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    if isinstance(stdin, bytes):
        stdin = io.TextIOWrapper(io.BytesIO(stdin))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert predict.main() == 0


@torch.no_grad()
def logits(
    model: BertForSequenceClassification, first: str, second: str | None = None
) -> list[float]:
    """One text alone, without padding."""
    pair = None if second is None else [second]
    ids, segments = TOKENIZER.encode_pairs([first], pair, max_seq_length=64)
    out = model(
        torch.tensor(ids), torch.ones(1, len(ids[0]), dtype=torch.long), torch.tensor(segments)
    )
    found: list[float] = out[0].tolist()
    return found


def expected_line(first: str, second: str | None = None) -> str:
    model = save(Path("same"), ("no", "yes"))
    no, yes = torch.tensor(logits(model, first, second)).double().softmax(0).tolist()
    texts = first if second is None else f"{first}\t{second}"
    return f"{'yes' if yes > no else 'no'}\tno {no:.4f}, yes {yes:.4f}\t{texts}"


def test_a_line_for_each_text(place: Path, monkeypatch, capsys) -> None:
    ask(monkeypatch, "the tea is good", "bad soup")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [expected_line("the tea is good"), expected_line("bad soup")]
    assert lines[0].split("\t")[1] != lines[1].split("\t")[1]


def test_an_empty_text_on_the_command_line_has_its_answer(place: Path, monkeypatch, capsys) -> None:
    ask(monkeypatch, "", "bad soup")
    assert capsys.readouterr().out.splitlines() == [expected_line(""), expected_line("bad soup")]


@pytest.mark.parametrize(
    ("columns", "text", "message"),
    [
        (("a",), "good\ttea", "fine-tuned on single texts, got pairs of texts"),
        (("a", "b"), "good", "fine-tuned on pairs of texts, got single texts; a TAB, or two"),
    ],
)
def test_pairs_and_single_texts_are_not_mixed_up(
    place: Path, monkeypatch, columns: tuple[str, ...], text: str, message: str
) -> None:
    save(Path("m"), ("no", "yes"), columns=columns)
    with pytest.raises(ConfigError, match=message):
        ask(monkeypatch, text)


def test_a_model_of_any_number_of_labels_is_refused(place: Path, monkeypatch) -> None:
    Path("m/manifest.json").unlink()
    config = json.loads(Path("m/config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    Path("m/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gives a row any number of labels"):
        ask(monkeypatch, "good")


def test_stdin_has_a_text_a_line_and_a_tab_in_a_pair(place: Path, monkeypatch, capsys) -> None:
    ask(monkeypatch, stdin=b"good tea\r\n\n  \nbad\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [expected_line("good tea"), expected_line("bad")]
    ask(monkeypatch, stdin=b"the tea\tgood\na soup\tbad\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [expected_line("the tea", "good"), expected_line("a soup", "bad")]


def test_many_texts_come_in_their_order(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(predict, "_CHUNK", 3)
    texts = ["the " * i + "tea" for i in (5, 1, 3, 2, 9, 0, 4, 7)]
    ask(monkeypatch, stdin="\n".join(texts).encode())
    shown = [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == texts


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_file_of_each_format_to_a_table(place: Path, monkeypatch, capsys, suffix: str) -> None:
    rows = [("the tea", "good"), ("a soup", "bad")]
    path = Path(f"in.{suffix}")
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in rows))
    else:
        between = {"tsv": "\t", "csv": ","}[suffix]
        path.write_text("".join(between.join(row) + "\n" for row in [("a", "b"), *rows]))
    flags = ("--input_file", str(path), "--text_columns", "a,b")
    ask(monkeypatch, *flags, "--output_file", "new/out.tsv")
    assert capsys.readouterr().out == "2 answers in new/out.tsv\n"
    header, *lines = Path("new/out.tsv").read_text().splitlines()
    assert header == "row\tlabel\tprobability_no\tprobability_yes"
    ask(monkeypatch, *flags, "--output_file", "out.jsonl")
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for i, (row, line, record) in enumerate(zip(rows, lines, records, strict=True), start=1):
        label, chances, *_ = expected_line(*row).split("\t")
        no, yes = (record["probabilities"][name] for name in ("no", "yes"))
        assert (record["row"], record["label"]) == (i, label)
        assert f"no {no:.4f}, yes {yes:.4f}" == chances
        assert line == f"{i}\t{label}\t{no:.6f}\t{yes:.6f}"


def test_a_score_is_cut_to_its_task_s_range_alone(place: Path, monkeypatch, capsys) -> None:
    texts = ("good", "bad soup", "the tea is fine")
    model = save(Path("s"), (), task="STS-B")
    wanted = [logits(model, text)[0] for text in texts]
    assert min(wanted) < 0 < sorted(wanted)[1] < 5 < max(wanted)
    ask(monkeypatch, *texts, model="s")
    lines = capsys.readouterr().out.splitlines()
    cut = [min(max(value, 0.0), 5.0) for value in wanted]
    assert lines == [f"{value:.3f}\t{text}" for value, text in zip(cut, texts, strict=True)]
    save(Path("s"), (), task="custom")
    ask(monkeypatch, *texts, "--output_file", "s.jsonl", model="s")
    scores = [json.loads(line)["score"] for line in Path("s.jsonl").read_text().splitlines()]
    assert scores == pytest.approx(wanted, abs=1e-5)
    ask(monkeypatch, *texts, "--output_file", "s.tsv", model="s")
    assert Path("s.tsv").read_text().splitlines()[0] == "row\tscore"
    assert [line.split("\t")[0] for line in Path("s.tsv").read_text().splitlines()[1:]] == [*"123"]


def test_a_model_is_asked_at_the_length_that_it_was_fine_tuned_at(place: Path) -> None:
    save(Path("short"), ("no", "yes"), length=8)
    cpu = torch.device("cpu")
    assert open_classifier("short", cpu).max_seq_length == 8
    assert open_classifier("short", cpu, max_seq_length=16).max_seq_length == 16
    assert open_classifier("m", cpu).max_seq_length == 64  # unknown: the model's limit


def test_a_model_of_hugging_face_s_whose_labels_have_no_names(
    place: Path, monkeypatch, capsys
) -> None:
    torch.manual_seed(3)
    fields = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size")}
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **fields,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
    ).eval()
    theirs.save_pretrained("theirs")
    assert "id2label" not in json.loads(Path("theirs/config.json").read_text())
    TOKENIZER.save(Path("theirs"))
    ask(monkeypatch, "the tea is good", model="theirs")
    ids, _ = TOKENIZER.encode_pairs(["the tea is good"], None, max_seq_length=64)
    with torch.no_grad():
        chances = theirs(input_ids=torch.tensor(ids)).logits[0].softmax(0)
    label, each, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label == f"LABEL_{int(chances.argmax())}"
    assert each == ", ".join(f"LABEL_{i} {chances[i]:.4f}" for i in range(2))
    assert text == "the tea is good"


def test_a_label_or_text_of_several_lines_stays_one_line(place: Path, monkeypatch, capsys) -> None:
    save(Path("m"), ("of\ntwo", "with\ttab"))
    Path("in.jsonl").write_text(json.dumps({"a": "good\n\ttea"}) + "\n")
    flags = ("--input_file", "in.jsonl", "--text_columns", "a")
    ask(monkeypatch, *flags)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("\tgood tea")
    assert len(line.split("\t")) == 3
    ask(monkeypatch, *flags, "--output_file", "out.tsv")
    header, line = Path("out.tsv").read_text().splitlines()
    assert header == "row\tlabel\tprobability_of two\tprobability_with tab"
    assert len(line.split("\t")) == 4


@pytest.mark.parametrize(
    ("flags", "stdin", "error", "message"),
    [
        ((), b"", DataError, "stdin: no text"),
        ((), b" \n\n", DataError, "stdin: no text"),
        ((" ",), b"", DataError, "the command line: no text"),
        ((), b"a\nb\tc\n", DataError, "stdin line 2: wanted one text, got 2"),
        ((), b"a\tb\n\nc\n", DataError, "stdin line 3: wanted two texts with a TAB between, got 1"),
        ((), b"a\tb\tc\n", DataError, "stdin line 1: wanted two texts with a TAB between, got 3"),
        ((), b"a\n\xff\n", DataError, "stdin line 2: wanted UTF-8 text"),
        (("a", "--input_file", "in.tsv", "--text_columns", "a"), b"", ConfigError, "one of them"),
        (("--input_file", "in.tsv"), b"", ConfigError, "--text_columns go together"),
        (("--text_columns", "a"), b"", ConfigError, "--text_columns go together"),
        (
            ("--input_file", "in.tsv", "--text_columns", "z"),
            b"",
            DataError,
            "no column 'z'; its co",
        ),
        (("--input_file", "no.tsv", "--text_columns", "a"), b"", DataError, "no.tsv: no such file"),
        (
            ("--input_file", "rows0.tsv", "--text_columns", "a"),
            b"",
            DataError,
            "rows0.tsv: no text",
        ),
        (("--input_file", "empty.tsv", "--text_columns", "a"), b"", DataError, "the file is empty"),
        (("a", "--output_file", "out.csv"), b"", ConfigError, "wanted a name in .tsv or .jsonl"),
        (
            ("--input_file", "in.tsv", "--text_columns", "a", "--output_file", "./in.tsv"),
            b"",
            ConfigError,
            "--output_file is --input_file",
        ),
        (("a", "--max_seq_length", "65"), b"", ConfigError, "m was made for at most 64"),
        (("a", "--max_seq_length", "0"), b"", ConfigError, "wanted 1 or more, got 0"),
    ],
)
def test_faults_of_the_user(
    place: Path, monkeypatch, capsys, flags: tuple[str, ...], stdin: bytes, error, message: str
) -> None:
    Path("in.tsv").write_text("a\tb\ngood\ttea\n")
    Path("rows0.tsv").write_text("a\tb\n")
    Path("empty.tsv").touch()
    with pytest.raises(error, match=message):
        ask(monkeypatch, *flags, stdin=stdin)
    assert Path("in.tsv").read_text() == "a\tb\ngood\ttea\n"


def test_whoever_types_gets_each_answer_at_once(place: Path, monkeypatch, capsys) -> None:
    terminal = Terminal(io.BytesIO(b"good tea\nbad\ttea\n"))
    with pytest.raises(DataError, match="stdin line 2"):
        ask(monkeypatch, stdin=terminal)
    shown = capsys.readouterr()
    assert shown.out == expected_line("good tea") + "\n"
    assert shown.err == "a text a line, Ctrl-D ends\n"


def test_an_output_file_is_whole_or_as_it_was(place: Path, monkeypatch) -> None:
    Path("out.tsv").write_text("older\n")
    monkeypatch.setattr(predict, "_CHUNK", 1)
    with pytest.raises(DataError, match="stdin line 2"):
        ask(monkeypatch, "--output_file", "out.tsv", stdin=b"good\nbad\ttea\n")
    assert Path("out.tsv").read_text() == "older\n"


def test_a_pretrained_model_has_no_answer(place: Path, monkeypatch) -> None:
    model = BertForPreTraining(CONFIG)
    save_model(Path("p"), model.state_dict(), CONFIG, TOKENIZER, card="", source={}, inputs={})
    with pytest.raises(CheckpointError, match="p is not fine-tuned: it has no sentence classifier"):
        ask(monkeypatch, "good", model="p")


@pytest.mark.parametrize(
    ("closed", "flags", "error", "message"),
    [
        ("stdin", (), ConfigError, "stdin is closed: give texts"),
        ("stdout", ("good tea",), ConfigError, "stdout is closed, .*: give --output_file"),
    ],
)
def test_a_stream_that_is_closed_is_told(
    place: Path, monkeypatch, closed: str, flags: tuple[str, ...], error: type, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", "--model_name_or_path", "m", *flags])
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(error, match=message):
        predict.main()
