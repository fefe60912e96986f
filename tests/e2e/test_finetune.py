"""The fine-tuning command as users type it, and its model in Hugging Face's hands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from tests import forked
from zerobert import manifest
from zerobert.checkpoint import load_tokenizer, load_weights, open_model, save_model
from zerobert.config import BertConfig
from zerobert.model import BertForPreTraining, BertForSequenceClassification
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "finetune" / "run_glue.py"
WORDS = ("good", "fine", "bad", "poor", "a", "the", "soup", "tea", "was", "is", ".", "s", "##s")
SENTENCES = [
    (f"The {dish} {verb} {taste} .", label)
    for dish in ("soup", "soups", "tea", "teas")
    for verb in ("was", "is")
    for taste, label in (("good", 1), ("fine", 1), ("bad", 0), ("poor", 0))
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with a pretrained model and SST-2's three files."""
    config = BertConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, *WORDS], do_lower_case=True)
    torch.manual_seed(0)
    model = BertForPreTraining(config)
    save_model(
        tmp_path / "model", model.state_dict(), config, tokenizer, card="", source={}, inputs={}
    )
    folder = tmp_path / "data" / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rows = "".join(f"{text}\t{label}\n" for text, label in SENTENCES)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + rows * 4)
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + rows)
    (folder / "test.tsv").write_text("index\tsentence\n0\tgood tea\n1\tpoor soup\n")
    return tmp_path


def command(*flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("GLUE_DIR", "RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def call(place: Path, *flags: str) -> subprocess.CompletedProcess:
    return forked.run(command(*flags), environment(), cwd=place, timeout_s=200)


def test_paddlenlps_command_trains_a_model_that_transformers_loads(place: Path) -> None:
    done = call(
        place,
        *("--model_type", "bert", "--model_name_or_path", "model", "--task_name", "SST-2"),
        *("--max_seq_length", "128", "--batch_size", "32", "--learning_rate", "2e-5"),
        *("--num_train_epochs", "3", "--logging_steps", "1", "--save_steps", "5"),
        *("--output_dir", "out", "--n_gpu", "1", "--do_predict"),
    )
    assert done.returncode == 0, done.stderr
    log = re.findall(
        r"^global step (\d+), epoch: (\d+), batch: (\d+), loss: \d+\.\d{6}, "
        r"speed: \d+\.\d\d step/s$",
        done.stdout,
        re.MULTILINE,
    )
    assert log == [
        (str(step), str((step - 1) // 4), str((step - 1) % 4 + 1)) for step in range(1, 13)
    ]
    evaluations = re.findall(r"^eval loss: \d\.\d{6}, accu: \d\.\d{6}$", done.stdout, re.MULTILINE)
    assert len(evaluations) == 3  # at steps 5, 10 and the last, 12
    if not torch.cuda.is_available():
        assert "no CUDA device; running on the CPU" in done.stdout

    out = place / "out"
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], result["num_eval_samples"]) == (12, 32)
    assert evaluations[-1].endswith(f"accu: {result['value']:f}")
    assert (out / "SST-2.tsv").read_text().count("\n") == 3
    for folder in (out, out / "step_5", out / "step_10"):
        manifest.verify_folder(folder)
    assert_transformers_agrees(out)
    assert_predict_says_what_transformers_does(place)


def assert_transformers_agrees(out: Path) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    folder = open_model(str(out))
    ours = BertForSequenceClassification(folder.config, 2).eval()
    assert load_weights(ours, folder) == []
    texts = [text for text, _ in SENTENCES]
    batch = transformers.AutoTokenizer.from_pretrained(out)(
        texts, padding=True, return_tensors="pt"
    )
    ids, segments = load_tokenizer(folder).encode_pairs(texts, None, max_seq_length=128)
    assert [row[: len(i)] for row, i in zip(batch["input_ids"].tolist(), ids, strict=True)] == ids
    assert all(sum(row) == 0 for row in segments)
    with torch.no_grad():
        found = ours(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        torch.testing.assert_close(found, theirs(**batch).logits, atol=1e-5, rtol=0)


def predict(place: Path, model: str, text: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "finetune" / "predict.py"), "--model_name_or_path", model],
        input=text,
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def assert_predict_says_what_transformers_does(place: Path) -> None:
    texts = [text for text, _ in SENTENCES]
    done = predict(place, "out", "\n".join(texts))
    assert (done.returncode, done.stderr) == (0, "")
    pipe = transformers.pipeline(
        "text-classification", str(place / "out"), device="cpu", top_k=None
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [text for _, _, text in lines] == texts
    for (label, chances, _), theirs in zip(lines, pipe(texts), strict=True):
        assert label == theirs[0]["label"]
        ours = {
            name: float(value) for name, value in (each.split() for each in chances.split(", "))
        }
        assert ours == pytest.approx({each["label"]: each["score"] for each in theirs}, abs=1e-4)


def test_predict_refuses_a_pretrained_model_in_one_line(place: Path) -> None:
    done = predict(place, "model", "good tea\n")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: model is not fine-tuned: it has no sentence classifier")


def test_a_fault_of_the_user_is_one_line_and_code_2(place: Path) -> None:
    with open(place / "data" / "glue" / "SST-2" / "train.tsv", "a") as file:
        file.write("no label here\n")
    done = call(place, "--task_name", "sst2", "--model_name_or_path", "model")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert lines == [
        "error: data/glue/SST-2/train.tsv line 130: wanted 2 columns between TABs "
        "(sentence, label), got 1"
    ]
    assert not (place / "runs").exists()


def test_ctrl_c_leaves_nothing_half_written(place: Path) -> None:
    process = subprocess.Popen(
        command(
            *("--task_name", "sst2", "--model_name_or_path", "model", "--output_dir", "out"),
            *("--num_train_epochs", "1e5", "--save_steps", "3", "--logging_steps", "1"),
        ),
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (place / "out" / "step_6" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no save within two minutes"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("stopping: the step is finished and saved first")
    assert "Traceback" not in errors
    status = json.loads((place / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 130)
    names = {path.name for path in (place / "out").iterdir()} - {"status.json"}
    assert "state" in names
    assert all(re.fullmatch(r"step_\d+|state", name) for name in names), names
    for name in names:
        manifest.verify_folder(place / "out" / name)


def test_two_processes_that_are_ended_go_on_where_they_stopped(place: Path) -> None:
    (place / "zero.json").write_text(
        '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}'
    )
    flags = ("--task_name", "sst2", "--model_name_or_path", "model", "--n_gpu", "2")
    flags += ("--deepspeed_config", "zero.json", "--num_train_epochs", "6")
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(*flags, "--logging_steps", "1", "--output_dir", "cut"),
            cwd=place,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while "global step 3," not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    assert log.read_text().count("eval loss") < 6
    on = call(place, *flags, "--output_dir", "cut")
    assert on.returncode == 0, on.stderr
    assert "going on from step" in on.stdout
    assert on.stdout.count("examples from data/glue/SST-2/dev.tsv") == 1  # one process speaks
    assert on.stderr.count("wanted SST-2's official 872 rows") == 1
    assert json.loads((place / "cut" / "result.json").read_text())["steps"] == 6 * 16
    manifest.verify_folder(place / "cut")
    assert not (place / "cut" / "state").exists()
