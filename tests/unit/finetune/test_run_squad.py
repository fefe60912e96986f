import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from finetune import loop, run_squad
from tests.questions import TOKENIZER, VOCAB, example, write
from zerobert import manifest
from zerobert.checkpoint import open_model, save_model
from zerobert.config import BertConfig
from zerobert.errors import CheckpointError, ConfigError, DataError
from zerobert.model import BertForPreTraining
from zerobert.tracking import read_status

CONFIG = BertConfig(
    vocab_size=len(VOCAB),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
FLAGS = ("--train_file", "train.json", "--predict_file", "train.json", "--doc_stride", "32")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch) -> None:
    """A working folder with a pretrained model and a file of questions."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG)
    folder = Path("runs/tiny/model_7")
    folder.parent.mkdir(parents=True)
    save_model(folder, model.state_dict(), CONFIG, TOKENIZER, card="", source={}, inputs={})
    write(tmp_path, example())


def run(monkeypatch, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["run_squad.py", *FLAGS, *flags])
    assert run_squad.main() == 0
    out = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else ""
    return json.loads(Path(out or "runs/finetune/SQuAD", "result.json").read_text())


def test_it_learns_the_answers_and_hugging_face_loads_it(monkeypatch, capsys) -> None:
    flags = ("--learning_rate", "3e-3", "--num_train_epochs", "60", "--batch_size", "8")
    result = run(monkeypatch, *flags, "--load_best_model_at_end", "--save_steps", "40")
    out = Path("runs/finetune/SQuAD")
    manifest.verify_folder(out)
    assert (result["task"], result["metric"], result["num_eval_samples"]) == ("SQuAD", "f1", 6)
    assert result["metrics"]["exact_match"] > 0.6
    assert result["value"] == result["metrics"]["f1"] >= result["metrics"]["exact_match"]
    printed = capsys.readouterr().out
    assert re.search(r"eval loss: \d+\.\d{6}, exact_match: \d\.\d{6}, f1: \d\.\d{6}\n", printed)
    assert "SQuAD: 6 questions from train.json" in printed
    assert "BERT-base, Devlin et al." in printed
    answers = json.loads((out / "predictions.json").read_text())
    wanted = {
        row["id"]: [answer["text"] for answer in row["answers"]]
        for article in example()["data"]
        for paragraph in article["paragraphs"]
        for row in paragraph["qas"]
    }
    exact = sum(answers[name] in texts for name, texts in wanted.items())
    assert exact / 6 == pytest.approx(result["metrics"]["exact_match"], abs=0.17)
    _, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info.values()), info
    assert open_model(str(out / "step_40"))


def test_a_run_that_was_ended_goes_on_bit_for_bit(monkeypatch, capsys) -> None:
    flags = ("--num_train_epochs", "3", "--batch_size", "4")
    whole = run(monkeypatch, *flags, "--output_dir", "whole")
    assert whole["steps"] > 4
    plain, asked = loop.stop_code, iter(range(99))
    monkeypatch.setattr(loop, "stop_code", lambda _: 143 * (next(asked) == 3))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *flags, "--output_dir", "cut")
    assert ended.value.code == 143
    monkeypatch.setattr(loop, "stop_code", plain)
    with pytest.raises(ConfigError, match="doc_stride was 32, is 40"):
        run(monkeypatch, *flags, "--output_dir", "cut", "--doc_stride", "40")
    asked = ("--do_predict", "--model_name_or_path", "whole", "--output_dir", "cut")
    with pytest.raises(ConfigError, match="cut/state is of a run with other settings"):
        run(monkeypatch, *asked)
    assert read_status(Path("cut"))["state"] == "failed"
    capsys.readouterr()
    cut = run(monkeypatch, *flags, "--output_dir", "cut")
    assert "SQuAD: going on from step 4" in capsys.readouterr().out
    assert read_status(Path("cut"))["state"] == "done"
    assert {**cut, "wall_s": 0} == {**whole, "wall_s": 0}
    weights = [Path(out, "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_fine_tuned_model_answers_without_training(monkeypatch, capsys) -> None:
    made = run(monkeypatch, "--num_train_epochs", "1", "--do_train", "--do_predict")
    asked = ("--do_predict", "--train_file", "none.json", "--output_dir", "answers")
    model = ("--model_name_or_path", "runs/finetune/SQuAD")
    again = run(monkeypatch, *asked, *model)
    assert (made["steps"], again["steps"]) == (2, 0)
    assert again["metrics"] == made["metrics"]
    answers = [Path(out, "predictions.json").read_bytes() for out in (model[1], "answers")]
    assert answers[0] == answers[1]
    with pytest.raises(CheckpointError, match="model_7 is not fine-tuned on SQuAD"):
        run(monkeypatch, *asked)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (("--predict_file", "x.json"), DataError, "x.json: no such file; put SQuAD v1.1's"),
        (("--max_seq_length", "129"), ConfigError, "was made for at most 128"),
        (("--max_query_length", "200"), ConfigError, "max_seq_length: wanted more than 203"),
        (("--n_best_size", "0"), ConfigError, "--n_best_size: wanted 1 or more, got 0"),
        (("--batch_size", "-1"), ConfigError, "wanted whole numbers above 0, got -1"),
        (("--stride", "1"), ConfigError, "unrecognized arguments: --stride"),
    ],
)
def test_bad_flags(monkeypatch, flags: tuple[str, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(monkeypatch, *flags)
    assert not Path("runs/finetune").exists()
