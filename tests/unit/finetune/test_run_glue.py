import dataclasses
import itertools
import json
import re
import shutil
import statistics
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import batches, course, experiment, glue, job, loop, output, run_glue
from finetune.course import Evaluation
from finetune.tasks import TASKS, find_task
from tests.glue_files import write_every_task
from zerobert import manifest
from zerobert.checkpoint import load_weights, newest_model, open_model, save_model
from zerobert.config import BertConfig
from zerobert.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    TrainingDivergedError,
)
from zerobert.model import BertForPreTraining, BertForSequenceClassification
from zerobert.signals import StopRequest
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from zerobert.tracking import read_status

WORDS = ("good", "fine", "bad", "poor", "a", "the", "soup", "tea", "was", "is")
CONFIG = BertConfig(
    vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
SENTENCES = [
    (f"the {dish} {verb} {taste}", label)
    for dish in ("soup", "tea")
    for verb in ("was", "is")
    for taste, label in (("good", 1), ("fine", 1), ("bad", 0), ("poor", 0))
]


@pytest.fixture(autouse=True)
def _no_data_of_the_machine(monkeypatch):
    """No folder of the machine is to be found."""
    monkeypatch.delenv("GLUE_DIR", raising=False)


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch) -> Path:
    """A pretrained model where launch.sh would find it, seen from an empty working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tiny" / "model_7"
    folder.parent.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, *WORDS], do_lower_case=True)
    model = BertForPreTraining(CONFIG)
    save_model(folder, model.state_dict(), CONFIG, tokenizer, card="", source={}, inputs={})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/glue with SST-2, STS-B, MNLI and AX."""
    root = tmp_path / "data" / "glue"
    rows = "".join(f"{text}\t{label}\n" for text, label in SENTENCES)
    write(root / "SST-2" / "train.tsv", "sentence\tlabel\n" + rows)
    write(root / "SST-2" / "dev.tsv", "sentence\tlabel\n" + rows)
    write(root / "SST-2" / "test.tsv", "index\tsentence\n0\tthe tea is good\n1\tbad soup\n")
    pair = "sentence1\tsentence2\t"
    rows = "".join(f"{text}\tthe tea\t{4 * label}\n" for text, label in SENTENCES)
    write(root / "STS-B" / "train.tsv", f"{pair}score\n{rows}")
    write(root / "STS-B" / "dev.tsv", f"{pair}score\n{rows}")
    rows = "".join(
        f"{text}\ta soup\t{('neutral', 'entailment')[label]}\n" for text, label in SENTENCES
    )
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(root / "MNLI" / f"{name}.tsv", f"{pair}gold_label\n{rows}")
    write(root / "AX" / "ax.tsv", "index\tsentence1\tsentence2\n0\tthe tea\ta soup\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run(monkeypatch, *flags: str | Path) -> dict:
    """Run the command in this process; returns its result.json if OUT is named."""
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, flags)])
    assert run_glue.main() == 0
    out = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else None
    path = Path(out or "") / "result.json"
    return json.loads(path.read_text()) if out and path.is_file() else {}


def test_a_slow_precision_is_said(pretrained: Path, root: Path, monkeypatch, capsys) -> None:
    def slow(device: torch.device, precision: str) -> str:
        return f"{precision} is slow on this {device.type}"

    monkeypatch.setattr(experiment, "slow_precision", slow)
    flags = ("--task_name", "sst2", "--max_steps", "1", "--n_gpu", "0", "--precision", "bf16")
    run(monkeypatch, *flags)
    assert "warning: bf16 is slow on this cpu\n" in capsys.readouterr().out


def test_defaults_are_the_newest_model_data_glue_and_the_tasks_row(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    run(monkeypatch, "--task_name", "sst2", "--do_predict")
    out = Path("runs/finetune/SST-2")
    manifest.verify_folder(out)
    result = json.loads((out / "result.json").read_text())
    assert set(result) == {
        *("task", "metric", "value", "metrics", "majority_baseline", "eval_loss"),
        *("num_eval_samples", "seed", "steps", "kept_step", "model", "wall_s"),
    }
    assert (result["task"], result["metric"]) == ("SST-2", "accuracy")
    assert (result["num_eval_samples"], result["seed"], result["steps"]) == (16, 42, 3)
    assert result["value"] == result["metrics"]["accuracy"]
    assert result["majority_baseline"] == 0.5
    assert result["model"]["path"] == "runs/tiny/model_7"
    assert result["model"]["sha256"] == manifest.sha256_file(pretrained / "model.safetensors")
    predictions = (out / "SST-2.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in predictions] == ["index", "0", "1"]
    record = manifest.read_manifest(out)
    assert record.config["run"]["settings"]["deepspeed"]["optimizer"]["params"]["lr"] == 2e-5
    assert not (out / "state").exists()
    train = root / "SST-2" / "train.tsv"
    assert record.inputs["data/glue/SST-2/train.tsv"] == manifest.sha256_file(train)
    assert record.config["run"]["max_seq_length"] == 64  # the model's limit
    printed = capsys.readouterr().out
    assert "92.88" in printed  # the published figure stands beside ours
    assert "mistakes and settings: runs/finetune/SST-2/report.html\n" in printed
    page = (out / "report.html").read_text()
    assert f'<td>accuracy</td><td class="figure">{100 * result["value"]:.2f}</td>' in page
    [shown] = re.findall(r"Worst mistakes on dev.tsv: (\d+|none)", page)[:1]
    assert int(shown.replace("none", "0")) == round(16 * (1 - result["value"]))


def test_it_learns_and_the_same_seed_gives_the_same_result(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    flags = ("--task_name", "sst-2", "--num_train_epochs", "40", "--learning_rate", "3e-3")
    first = run(monkeypatch, *flags, "--output_dir", "a")
    again = run(monkeypatch, *flags, "--output_dir", "b")
    other = run(monkeypatch, *flags, "--output_dir", "c", "--random_init", "--seed", "1")
    assert first["value"] == 1.0
    assert {**first, "wall_s": 0} == {**again, "wall_s": 0}
    weights = [Path(out, "model.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert (first["model"]["random_init"], other["model"]["random_init"]) == (False, True)


def test_random_init_leaves_the_pretrained_weights_alone(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    flags = ("--task_name", "sst2", "--max_steps", "1", "--learning_rate", "1e-12")
    run(monkeypatch, *flags, "--output_dir", "warm")
    run(monkeypatch, *flags, "--output_dir", "cold", "--random_init")
    source = BertForPreTraining(CONFIG)
    load_weights(source, open_model(str(pretrained)))
    expected = source.bert.embeddings.word_embeddings.weight
    for out, same in (("warm", True), ("cold", False)):
        model = BertForSequenceClassification(CONFIG, 2)
        assert load_weights(model, open_model(out)) == []
        found = model.bert.embeddings.word_embeddings.weight
        assert torch.allclose(found, expected, atol=1e-6) == same


def test_saves_on_the_way_are_complete_models(pretrained: Path, root: Path, monkeypatch) -> None:
    run(
        monkeypatch,
        *("--task_name", "SST-2", "--batch_size", "8", "--num_train_epochs", "2"),
        *("--save_steps", "2", "--output_dir", "out"),
    )
    for step in (2, 4):
        assert manifest.verify_folder(Path(f"out/step_{step}")).config["step"] == step
        assert open_model(f"out/step_{step}").labels == ("negative", "positive")
    run(monkeypatch, "--task_name", "SST-2", "--max_steps", "1", "--output_dir", "out")
    assert not list(Path("out").glob("step_*"))
    manifest.verify_folder(Path("out"))


def test_several_seeds_keep_the_best_and_tell_the_median(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    flags = ("--task_name", "sst2", "--learning_rate", "1e-3", "--output_dir", "out")
    result = run(monkeypatch, *flags, "--seeds", "5,6,7")
    each = [json.loads(Path(f"out/seed_{s}/result.json").read_text()) for s in (5, 6, 7)]
    values = sorted(one["value"] for one in each)
    assert result["median"] == values[1]
    assert result["value"] == result["best"] == values[2]
    assert result["spread"] == values[2] - values[0]
    assert result["all"] == [
        {key: one[key] for key in ("seed", "value", "metrics")} for one in each
    ]
    best = Path(f"out/seed_{result['seed']}")
    manifest.verify_folder(Path("out"))
    manifest.verify_folder(best)
    for name in ("model.safetensors", "report.html"):
        assert Path("out", name).read_bytes() == (best / name).read_bytes()
    assert f"<title>SST-2, seed {result['seed']}</title>" in Path("out/report.html").read_text()


def test_the_best_model_is_kept_and_patience_ends_the_training(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    values = iter([0.5, 0.75, 0.6, 0.7, 0.9])
    evaluate = job.evaluate

    def scripted(*args) -> Evaluation:
        found = evaluate(*args)
        return dataclasses.replace(found, metrics={"accuracy": next(values)})

    monkeypatch.setattr(job, "evaluate", scripted)
    flags = ("--task_name", "sst2", "--num_train_epochs", "9", "--save_steps", "1")
    result = run(monkeypatch, *flags, "--early_stopping_patience", "2", "--output_dir", "out")
    assert (result["steps"], result["kept_step"], result["value"]) == (4, 2, 0.75)
    kept, second = Path("out/model.safetensors"), Path("out/step_2/model.safetensors")
    assert kept.read_bytes() == second.read_bytes()
    assert next(values) == 0.9  # nothing was evaluated once more
    printed = capsys.readouterr().out
    assert "no better accuracy in the last 2 evaluations; that of step 2 is kept" in printed
    assert not Path("out/state").exists()


def ended_after(monkeypatch, steps: int):
    """Let a signal come in the training's n-th step; returns what makes an end of that."""
    count = itertools.count(1)
    asked = loop.stop_code
    monkeypatch.setattr(loop, "stop_code", lambda _: 143 * (next(count) == steps))
    return lambda: monkeypatch.setattr(loop, "stop_code", asked)


@pytest.mark.parametrize("step", [5, 6, 24])
def test_a_run_that_was_ended_goes_on_bit_for_bit(
    pretrained: Path, root: Path, monkeypatch, capsys, step: int
) -> None:
    """Within an epoch of 6 steps, at its end where it owes an evaluation, and at the very last."""
    flags = ("--task_name", "sst2", "--batch_size", "3", "--learning_rate", "1e-3")
    flags = (*flags, "--load_best_model_at_end", "--num_train_epochs", "4")
    whole = run(monkeypatch, *flags, "--output_dir", "whole")
    let_go_on = ended_after(monkeypatch, step)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags, "--output_dir", "cut")
    assert stopped.value.code == 143
    let_go_on()
    assert sorted(path.name for path in Path("cut").iterdir()) == ["state", "status.json"]
    status = read_status(Path("cut"))
    assert (status["state"], status["exit_code"]) == ("preempted", 143)
    with pytest.raises(ConfigError, match=r"params\.lr was 0\.001, is 0\.002; use"):
        run(monkeypatch, *flags, "--learning_rate", "2e-3", "--output_dir", "cut")
    capsys.readouterr()
    result = run(monkeypatch, *flags, "--output_dir", "cut")
    assert f"going on from step {step}" in capsys.readouterr().out
    assert {**result, "wall_s": 0} == {**whole, "wall_s": 0}
    weights = [Path(out, "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("moment", "found"),
    [
        (1, set()),  # behind a split that is read
        (3, {"state", "status.json"}),  # in the evaluation after the first epoch
        (4, {"state", "status.json"}),  # in the one after the second
        (5, {"state", "status.json"}),  # while the test set is answered
    ],
)
def test_a_signal_is_heard_outside_of_training_too(
    pretrained: Path, root: Path, monkeypatch, moment: int, found: set[str]
) -> None:
    flags = ("--task_name", "sst2", "--num_train_epochs", "2", "--do_predict", "--output_dir")
    asked, count = batches.end_if_asked, itertools.count(0)

    def end(stop) -> None:
        if next(count) == moment:
            raise batches.Stopped(130)

    whole = run(monkeypatch, *flags, "whole")
    monkeypatch.setattr(batches, "end_if_asked", end)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags, "cut")
    assert stopped.value.code == 130
    monkeypatch.setattr(batches, "end_if_asked", asked)
    assert {path.name for path in Path().glob("cut/*")} == found
    assert {**run(monkeypatch, *flags, "cut"), "wall_s": 0} == {**whole, "wall_s": 0}


def test_a_signal_is_heard_between_tasks_and_seeds(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    run_task = experiment.run_task
    asked: list[StopRequest] = []

    def ask(args, task, model, out, stop, **options):
        result = run_task(args, task, model, out, stop, **options)
        stop.exit_code = 143
        asked.append(stop)
        return result

    monkeypatch.setattr(experiment, "run_task", ask)
    flags = ("--task_name", "glue", "--max_steps", "1", "--output_dir", "out")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags)
    assert (stopped.value.code, len(asked)) == (143, 1)
    assert read_status(Path("out"))["state"] == "preempted"
    assert not json.loads(Path("out/glue.json").read_text())["is_finished"]


def test_an_ended_glue_run_keeps_what_it_has_finished(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    flags = ("--task_name", "glue", "--max_steps", "2", "--seeds", "1,2", "--output_dir", "out")
    let_go_on = ended_after(monkeypatch, 7)  # in the second task's second seed
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    let_go_on()
    finished = Path("out/SST-2/result.json").stat().st_mtime_ns
    capsys.readouterr()
    run(monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert "SST-2: finished in out/SST-2" in printed
    assert "STS-B: seed 1 is finished in out/STS-B/seed_1" in printed
    assert Path("out/SST-2/result.json").stat().st_mtime_ns == finished
    assert json.loads(Path("out/glue.json").read_text())["is_finished"]
    for folder in (Path("out"), Path("out/SST-2")):
        assert read_status(folder)["state"] == "done"
    run(monkeypatch, *flags)  # the run is whole: everything anew
    assert Path("out/SST-2/result.json").stat().st_mtime_ns != finished


def test_predictions_are_added_to_what_is_finished(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    """Whether the run came to its end or was stopped: no task is trained once more for them."""
    write(root / "STS-B" / "test.tsv", "index\tsentence1\tsentence2\n0\tthe tea\ta soup\n")
    for split in ("matched", "mismatched"):
        rows = "index\tsentence1\tsentence2\n0\tthe tea\ta soup\n"
        write(root / "MNLI" / f"test_{split}.tsv", rows)
    flags = ("--task_name", "glue", "--max_steps", "2", "--seeds", "1,2", "--output_dir")
    run(monkeypatch, *flags, "whole", "--do_predict")
    let_go_on = ended_after(monkeypatch, 7)  # in the second task's second seed
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "cut")
    let_go_on()
    run(monkeypatch, *flags, "cut", "--do_predict")
    weights = Path("cut/MNLI/model.safetensors").stat().st_mtime_ns
    run(monkeypatch, *flags, "plain")
    capsys.readouterr()
    run(monkeypatch, *flags, "plain", "--do_predict")
    assert ": from " not in capsys.readouterr().out
    for out in map(Path, ("cut", "plain")):
        for name in ("SST-2", "STS-B", "MNLI-m", "MNLI-mm", "AX"):
            file = Path(name.removesuffix("-m").removesuffix("-mm"), f"{name}.tsv")
            assert (out / file).read_bytes() == (Path("whole") / file).read_bytes()
        for task in ("SST-2", "AX"):
            manifest.verify_folder(out / task)
        assert sorted(path.name for path in (out / "SST-2").glob("seed_*")) == ["seed_1", "seed_2"]
        assert (out / "submission.zip").is_file()
    assert Path("cut/MNLI/model.safetensors").stat().st_mtime_ns == weights


def test_other_settings_are_refused_before_a_finished_seed_is_trained_anew(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    flags = ("--task_name", "sst2", "--max_steps", "2", "--output_dir", "out")
    run(monkeypatch, *flags)  # what is in the folder before
    flags = (*flags, "--seeds", "1,2")
    let_go_on = ended_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    let_go_on()
    before = Path("out/seed_1/model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"seed_2/state .*params\.lr was 2e-05, is 0\.05"):
        run(monkeypatch, *flags, "--learning_rate", "5e-2")
    run(monkeypatch, *flags)
    assert "seed 1 is finished in out/seed_1" in capsys.readouterr().out
    assert Path("out/seed_1/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--task_name", "sst2", "--seeds", "1,2"), r"seed was 42, is \[1, 2\]"),
        (("--task_name", "ax", "--model_name_or_path", "mnli"), "task was 'SST-2', is 'AX'"),
    ],
)
def test_another_run_s_state_is_not_written_over(
    pretrained: Path, root: Path, monkeypatch, flags: tuple[str, ...], changed: str
) -> None:
    once = ("--max_steps", "1", "--output_dir")
    run(monkeypatch, "--task_name", "mnli", *once, "mnli")
    let_go_on = ended_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--task_name", "sst2", *once, "out")
    let_go_on()
    with pytest.raises(ConfigError, match=rf"out/state is of a run with other .*{changed}.*never"):
        run(monkeypatch, *flags, *once, "out")
    assert manifest.is_complete(Path("out/state"))
    run(monkeypatch, *flags, *once, "out", "--resume", "never")
    assert not Path("out/state").exists()


def test_a_kill_while_the_model_is_moved_costs_no_training(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    flags = ("--task_name", "sst2", "--max_steps", "2", "--output_dir")
    whole = run(monkeypatch, *flags, "whole")

    def die(folder: Path) -> None:
        if (folder / ".completed").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(output, "finish_replacement", die)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "cut")
    monkeypatch.undo()
    monkeypatch.chdir(pretrained.parents[2])
    capsys.readouterr()
    cut = run(monkeypatch, *flags, "cut")
    assert "going on from step 2" in capsys.readouterr().out
    assert {**cut, "wall_s": 0} == {**whole, "wall_s": 0}


def test_the_best_weights_are_not_replaced_by_others(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    read = course.load_file

    def lose(path: Path) -> dict[str, torch.Tensor]:
        path.unlink()
        return read(path)

    monkeypatch.setattr(course, "load_file", lose)
    with pytest.raises(CheckpointError, match=r"state/best\.safetensors can't be read"):
        run(
            monkeypatch,
            *("--task_name", "sst2", "--max_steps", "2", "--load_best_model_at_end"),
            *("--output_dir", "out"),
        )
    assert not Path("out/result.json").exists()


def test_glue_looks_for_every_file_before_it_trains(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    (root / "STS-B" / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"STS-B/dev\.tsv: no such file"):
        run(monkeypatch, "--task_name", "glue", "--max_steps", "1")
    assert not Path("runs/finetune").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\thigh\n", "wanted a number in 'sc"),
        ("MNLI/dev_mismatched.tsv", "sentence1\tsentence2\tgold_label\na\tb\n", "wanted 3 col"),
        ("AX/ax.tsv", "index\tsentence1\n", "no column 'sentence2'"),
    ],
)
def test_glue_reads_every_row_before_it_trains(
    pretrained: Path, root: Path, monkeypatch, file: str, text: str, message: str
) -> None:
    write(root / file, text)
    with pytest.raises(DataError, match=message):
        run(monkeypatch, "--task_name", "glue", "--max_steps", "1", "--from_mnli")
    assert not Path("runs/finetune").exists()


def test_glue_looks_at_every_folder_before_it_trains(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    once = ("--max_steps", "1", "--output_dir")
    let_go_on = ended_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--task_name", "mnli", *once, "out/MNLI")
    let_go_on()
    with pytest.raises(ConfigError, match=r"out/MNLI/state is of a run .*seed was 42, is 7"):
        run(monkeypatch, "--task_name", "glue", "--seed", "7", *once, "out")
    write(Path("out/AX/config.json"), "{}")
    with pytest.raises(ConfigError, match="out/AX holds a model that fine-tuning did not write"):
        run(monkeypatch, "--task_name", "glue", *once, "out")
    assert [path.name for path in Path("out").iterdir() if path.name != "AX"] == ["MNLI"]


def test_a_classifier_of_other_labels_is_new(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    nothing = ("--max_steps", "1", "--learning_rate", "1e-12")
    run(monkeypatch, "--task_name", "sst2", *nothing, "--output_dir", "first")
    again = ("--model_name_or_path", "first", "--output_dir", "again")
    run(monkeypatch, "--task_name", "sst2", *nothing, *again)
    assert "SST-2: the classifier of first is trained on" in capsys.readouterr().out
    rows = "".join(f"{text}\t{('no', 'yes')[label]}\n" for text, label in SENTENCES)
    write(Path("own.tsv"), "text\tlabel\n" + rows)
    own = ("--train_file", "own.tsv", "--dev_file", "own.tsv", "--text_columns", "text")
    run(
        monkeypatch,
        *("--task_name", "custom", *own, "--label_column", "label", *nothing),
        *("--model_name_or_path", "first", "--output_dir", "other", "--seed", "7"),
    )
    assert "the classifier of" not in capsys.readouterr().out
    first, again, other = (classifier(out) for out in ("first", "again", "other"))
    assert torch.allclose(first, again, atol=1e-6)
    assert not torch.allclose(first, other, atol=1e-3)


def test_a_pooler_that_is_new_is_said(pretrained: Path, root: Path, monkeypatch, capsys) -> None:
    flags = ("--task_name", "sst2", "--max_steps", "1")
    run(monkeypatch, *flags)
    assert "pooler" not in capsys.readouterr().out
    weights = load_file(pretrained / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, pretrained / "model.safetensors")
    (pretrained / "manifest.json").unlink()
    run(monkeypatch, *flags, "--model_name_or_path", "runs/tiny/model_7")
    said = "SST-2: the pooler is new: runs/tiny/model_7 has none\n"
    assert said in capsys.readouterr().out


def classifier(out: str) -> torch.Tensor:
    model = BertForSequenceClassification(CONFIG, 2)
    load_weights(model, open_model(out))
    return model.classifier.weight


def test_tasks_that_gain_from_mnli_start_from_it(pretrained: Path, root: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="--from_mnli: STS-B starts from a model fine-tuned on M"):
        run(monkeypatch, "--task_name", "stsb", "--from_mnli")
    for flags in (("rte", "--model_name_or_path", "x"), ("sst2",)):
        with pytest.raises(ConfigError, match="--from_mnli takes the model fine-tuned on M"):
            run(monkeypatch, "--from_mnli", "--task_name", *flags)
    run(monkeypatch, "--task_name", "glue", "--from_mnli", "--max_steps", "1", "--output_dir", "o")
    tasks = json.loads(Path("o/glue.json").read_text())["tasks"]
    assert list(tasks) == ["MNLI", "SST-2", "STS-B", "AX"]
    assert tasks["STS-B"]["model"]["path"] == tasks["AX"]["model"]["path"] == "o/MNLI"
    assert tasks["SST-2"]["model"]["path"] == "runs/tiny/model_7"
    shutil.rmtree(root / "MNLI")
    with pytest.raises(ConfigError, match="--from_mnli: there is no data of MNLI"):
        run(monkeypatch, "--task_name", "glue", "--from_mnli")


def test_a_file_of_deepspeed_s_settings(pretrained: Path, root: Path, monkeypatch) -> None:
    """One for the Trainer of Hugging Face is read, too: `auto` is for flags to say."""
    keys = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98]}},
        "bert": {"kernels": {"packing": False}},
    }
    write(Path("ds.json"), json.dumps(keys))
    flags = ("--task_name", "sst2", "--deepspeed_config", "ds.json", "--output_dir", "out")
    result = run(monkeypatch, *flags, "--learning_rate", "1e-4", "--warmup_steps", "0")
    assert result["steps"] == 3  # 16 examples in one batch of 8 x 2, three epochs
    settings = manifest.read_manifest(Path("out")).config["run"]["settings"]
    assert settings["deepspeed"]["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 1e-4, "weight_decay": 0.01, "eps": 1e-6, "betas": [0.9, 0.98]},
    }
    assert settings["deepspeed"]["gradient_clipping"] == 1.0
    assert not settings["kernels"]["packing"]
    warmup = settings["schedule"]["warmup_steps"], settings["schedule"]["warmup_proportion"]
    assert warmup == (None, 0.1)
    write(Path("ds.json"), json.dumps({"scheduler": {"type": "WarmupLR"}}))
    with pytest.raises(ConfigError, match=r"ds\.json: scheduler: fine-tuning's rate rises"):
        run(monkeypatch, *flags)
    write(Path("ds.json"), json.dumps({"bert": {"model": {"size": "base"}}}))
    with pytest.raises(ConfigError, match="bert: unknown key 'model'; known keys: kernels"):
        run(monkeypatch, *flags)


def test_regression_writes_a_model_with_one_output(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    result = run(monkeypatch, "--task_name", "stsb", "--output_dir", "out")
    assert set(result["metrics"]) == {"pearson", "spearman"}
    assert result["majority_baseline"] == 0.0
    assert open_model("out").is_regression


def test_glue_runs_what_there_is_data_for_and_ax_on_mnlis_model(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    run(monkeypatch, "--task_name", "glue", "--max_steps", "1")
    out = Path("runs/finetune")
    table = json.loads((out / "glue.json").read_text())
    assert list(table["tasks"]) == ["SST-2", "STS-B", "MNLI", "AX"]
    assert table["num_scored_tasks"] == 3
    means = [
        statistics.mean(table["tasks"][name]["metrics"].values())
        for name in ("SST-2", "STS-B", "MNLI")
    ]
    assert table["average"] == pytest.approx(sum(means) / 3)
    assert table["tasks"]["AX"]["model"]["path"] == "runs/finetune/MNLI"
    assert table["tasks"]["AX"]["value"] is None
    assert set(table["tasks"]["MNLI"]["metrics"]) == {"accuracy", "accuracy_mismatched"}
    assert (out / "AX" / "AX.tsv").read_text().startswith("index\tprediction\n0\t")
    assert newest_model(Path("runs")) == Path("runs/tiny/model_7")
    printed = capsys.readouterr().out
    assert "84.42/84.83" in printed
    assert "predictions only" in printed
    links = re.findall(r'<a href="(.*?)">', (out / "glue.html").read_text())
    assert links == [f"{task}/report.html" for task in ("SST-2", "STS-B", "STS-B", "MNLI", "MNLI")]
    assert all((out / link).is_file() for link in links)
    mnli = (out / "MNLI" / "report.html").read_text()
    for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
        assert mnli.count(f"<h2>Answers on {name}</h2>") == 1
    assert not (out / "AX" / "report.html").exists()  # it has no dev set


def test_glue_packs_the_predictions_and_says_what_is_missing(
    pretrained: Path, root: Path, monkeypatch, capsys
) -> None:
    for split in ("matched", "mismatched"):
        rows = "index\tsentence1\tsentence2\n0\tthe tea\ta soup\n"
        write(root / "MNLI" / f"test_{split}.tsv", rows)
    write(root / "STS-B" / "test.tsv", "index\tsentence1\tsentence2\n0\tthe tea\ta soup\n")
    # Of an earlier run; nothing of this one's.
    write(Path("runs/finetune/RTE/RTE.tsv"), "index\tprediction\n0\tentailment\n")
    run(monkeypatch, "--task_name", "glue", "--max_steps", "1", "--do_predict")
    out = Path("runs/finetune")
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.namelist() == [
            f"{name}.tsv" for name in ("SST-2", "STS-B", "MNLI-m", "MNLI-mm", "AX")
        ]
        assert archive.read("AX.tsv") == (out / "AX" / "AX.tsv").read_bytes()
    assert (
        "warning: it lacks CoLA, MRPC, QQP, QNLI, RTE, WNLI, and the server takes no zip without"
        in capsys.readouterr().out
    )
    run(monkeypatch, "--task_name", "glue", "--max_steps", "1")
    assert not (out / "submission.zip").exists()


def test_every_task_in_official_layout_from_its_files_to_the_server_s_zip(
    pretrained: Path, monkeypatch, capsys
) -> None:
    write_every_task(Path("data/glue"))
    run(monkeypatch, "--task_name", "glue", "--num_train_epochs", "1", "--do_predict")
    out = Path("runs/finetune")
    table = json.loads((out / "glue.json").read_text())
    assert list(table["tasks"]) == [task.name for task in TASKS]
    for task in TASKS:
        result = table["tasks"][task.name]
        assert set(result["metrics"]) == set(task.reported)
        assert result["steps"] == (1 if task.train else 0)
        assert result["num_eval_samples"] == (1 if task.dev else 0)
        made = open_model(str(out / task.name))
        assert made.is_regression == task.is_regression
        assert task.is_regression or made.labels == task.label_names
        for split in task.test:
            lines = (out / task.name / f"{split.submission}.tsv").read_text().splitlines()
            assert lines[0] == "index\tprediction"
            index, answer = lines[1].split("\t")
            assert (index, len(lines)) == ("0", 2)
            assert answer in task.labels or (task.is_regression and 0 <= float(answer) <= 5)
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == 11  # MNLI has two test sets
    assert "it lacks" not in capsys.readouterr().out


def test_ax_needs_a_model_that_was_fine_tuned_on_mnli(
    pretrained: Path, root: Path, monkeypatch
) -> None:
    with pytest.raises(ConfigError, match="run --task_name MNLI first"):
        run(monkeypatch, "--task_name", "ax")
    with pytest.raises(ConfigError, match="a model fine-tuned on MNLI answers it"):
        run(monkeypatch, "--task_name", "ax", "--model_name_or_path", pretrained)


FULL = "Logic\tPremise\tHypothesis\tLabel\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [("ax.tsv", "index\tsentence1\tsentence2\tlabel\n"), ("diagnostic-full.tsv", FULL)],
)
def test_ax_is_scored_where_it_has_labels(
    pretrained: Path, root: Path, monkeypatch, capsys, name: str, header: str
) -> None:
    rows = [f"{i}\t{text}\ta soup\t" for i, (text, _) in enumerate(SENTENCES)]
    labels = [("neutral", "entailment")[label] for _, label in SENTENCES]
    labelled = [f"{row}{label}\n" for row, label in zip(rows, labels, strict=True)]
    plain = "index\tsentence1\tsentence2\n" + "".join(f"{row[:-1]}\n" for row in rows)
    write(root / "AX" / "ax.tsv", plain)
    write(root / "AX" / name, header + "".join(labelled))
    flags = ("--learning_rate", "3e-3", "--num_train_epochs", "40", "--output_dir")
    run(monkeypatch, "--task_name", "mnli", *flags, "mnli")
    model = ("--model_name_or_path", "mnli", "--output_dir", "ax")
    result = run(monkeypatch, "--task_name", "ax", *model)
    assert result["metrics"] == {"matthews": 1.0}
    assert (result["value"], result["num_eval_samples"]) == (1.0, 16)
    given = [line.split("\t")[1] for line in Path("ax/AX.tsv").read_text().splitlines()]
    assert given == ["prediction", *labels]
    assert "matthews" in capsys.readouterr().out
    assert Path("ax/report.html").is_file()


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_own_data_in_each_format(pretrained: Path, monkeypatch, suffix: str) -> None:
    separator = {"tsv": "\t", "csv": ","}.get(suffix)
    rows = [(text, ("no", "yes")[label]) for text, label in SENTENCES]
    if separator:
        text = "".join(separator.join(row) + "\n" for row in [("review", "verdict"), *rows])
    else:
        text = "".join(json.dumps({"review": a, "verdict": b}) + "\n" for a, b in rows)
    write(Path(f"own.{suffix}"), text)
    result = run(
        monkeypatch,
        *("--task_name", "custom", "--train_file", f"own.{suffix}", "--dev_file", f"own.{suffix}"),
        *("--test_file", f"own.{suffix}", "--do_predict", "--text_columns", "review"),
        *("--label_column", "verdict", "--output_dir", "out"),
    )
    assert (result["task"], result["num_eval_samples"]) == ("custom", 16)
    assert open_model("out").labels == ("no", "yes")
    predictions = Path("out/custom.tsv").read_text().splitlines()
    assert len(predictions) == 17
    assert set(predictions[1].split("\t")[1:]) < {"no", "yes"}


def test_own_regression(pretrained: Path, monkeypatch) -> None:
    write(Path("own.csv"), "a,b,score\n" + "".join(f"{t},tea,{i}\n" for t, i in SENTENCES))
    result = run(
        monkeypatch,
        *("--task_name", "custom", "--train_file", "own.csv", "--dev_file", "own.csv"),
        *("--text_columns", "a,b", "--label_column", "score", "--regression"),
        *("--output_dir", "out", "--learning_rate", "3e-3", "--num_train_epochs", "80"),
    )
    assert result["metric"] == "pearson"
    assert result["value"] > 0.9


OWN = ("--train_file", "a.csv", "--dev_file", "b.csv", "--text_columns", "t", "--label_column", "y")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--task_name", "sst3"], ConfigError, "unknown task .*mean SST-2"),
        (["--task_name", "rte"], MissingDependencyError, "no data for RTE: put the official files"),
        (
            ["--task_name", "rte", "--data_dir", "data"],
            DataError,
            "--data_dir data: found no train",
        ),
        (["--task_name", "sst2", "--deepspeed_config", "x.json"], ConfigError, "x.json: no such"),
        (["--task_name", "sst2", "--batch_size", "0"], ConfigError, "whole numbers above 0, got 0"),
        (["--task_name", "sst2", "--weight_decay", "-1"], ConfigError, "weight_decay: wanted a"),
        (["--task_name", "sst2", "--n_gpu", "-1"], ConfigError, "--n_gpu: wanted 0 .*, got -1"),
        (
            ["--task_name", "sst2", "--seed", "42", "--seeds", "1,2"],
            ConfigError,
            "--seeds: not allowed with argument --seed",
        ),
        (
            ["--task_name", "sst2", "--model_name_or_path", ""],
            ConfigError,
            "--model_name_or_path: wanted a model's folder or name, got nothing",
        ),
        (["--task_name", "sst2", "--adam_epsilon", "0"], ConfigError, "--adam_epsilon: wanted ab"),
        (
            ["--task_name", "sst2", "--per_device_train_batch_size", "8"],
            ConfigError,
            "--per_device_train_batch_size: give --batch_size",
        ),
        (["--task_name", "sst2", "--do_train"], ConfigError, "--do_train: leave it out"),
        (["--task_name", "sst2", "--do_eval", "true"], ConfigError, "--do_eval: leave it out"),
        (["--task_name", "sst2", "--seeds", "1,x"], ConfigError, "--seeds: wanted different"),
        (["--task_name", "sst2", "--seeds", "1, 1"], ConfigError, "--seeds: wanted different"),
        (["--task_name", "sst2", "--max_steps", "0"], ConfigError, "--max_steps: wanted 1 or more"),
        (["--task_name", "sst2", "--max_seq_length", "65"], ConfigError, "made for at most 64"),
        (["--task_name", "sst2", "--model_type", "gpt"], ConfigError, "invalid choice: 'gpt'"),
        (["--task_name", "sst2", "--epochs", "3"], ConfigError, "unrecognized arguments: --epochs"),
        ([], ConfigError, "required: --task_name; see finetune/run_glue.py --help"),
        (
            ["--task_name", "sst2", "--train_file", "a.csv", "--regression"],
            ConfigError,
            "--train_file, --regression: for one's own data; give --task_name custom, not sst2",
        ),
        (["--task_name", "glue", "--label_column", "y"], ConfigError, "--label_column: for one's"),
        (
            ["--task_name", "custom", *OWN, "--test_file", "c.csv"],
            ConfigError,
            "--test_file is answered with --do_predict",
        ),
        (["--task_name", "custom", *OWN, "--data_dir", "d"], ConfigError, "custom names its files"),
        (["--task_name", "custom"], ConfigError, "also give --train_file, --dev_file, --text_col"),
        (
            ["--task_name", "sst2", "--output_dir", "runs/tiny/model_7"],
            ConfigError,
            "is or holds the model to start from",
        ),
    ],
)
def test_bad_flags(
    pretrained: Path, root: Path, monkeypatch, flags: list[str], error: type, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(error, match=message):
        run(monkeypatch, *flags)
    assert not Path("runs/finetune").exists()


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"lamb": "apex"}, "bert.kernels.lamb 'apex' takes whole parameters"),
        ({"compile": True}, "the batches of fine-tuning have many shapes"),
    ],
)
def test_kernels_that_do_not_serve_fine_tuning_are_named(
    pretrained: Path, root: Path, monkeypatch, kernels: dict[str, object], message: str
) -> None:
    config = {"zero_optimization": {"stage": 1}, "bert": {"kernels": kernels}}
    Path("ds.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        run(monkeypatch, "--task_name", "sst2", "--deepspeed_config", "ds.json")


def test_no_model_says_how_to_make_one(tmp_path: Path, root: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"launch\.sh pretrain"):
        run(monkeypatch, "--task_name", "sst2")


def test_model_folder_of_another_vocabulary(pretrained: Path, root: Path, monkeypatch) -> None:
    (pretrained / "manifest.json").unlink()
    with open(pretrained / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("word\n")
    with pytest.raises(CheckpointError, match="16 words, but the model was made for 15"):
        run(monkeypatch, "--task_name", "sst2", "--model_name_or_path", pretrained)


def test_glue_without_data_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"no GLUE task in data/glue: put the official folders"):
        glue.available_tasks(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert glue.available_tasks(None) == list(TASKS)


def test_ax_alone_is_not_available(root: Path) -> None:
    for name in ("MNLI", "STS-B"):
        for path in (root / name).iterdir():
            path.unlink()
    assert glue.available_tasks(root) == [find_task("sst2")]


def test_results_stand_beside_published_ones() -> None:
    result = {
        "task": "MRPC",
        "metrics": {"accuracy": 0.8, "f1": 0.9},
        "value": 0.8,
        "majority_baseline": 0.6838,
        "steps": 575,
        "seed": 1,
    }
    runs = [{"accuracy": 0.7, "f1": 0.75}, {"accuracy": 0.8, "f1": 0.9}, {"accuracy": 0.6, "f1": 0}]
    several = {**result, "all": [{"metrics": metrics} for metrics in runs]}
    ax = {**result, "task": "AX", "metrics": {}, "majority_baseline": None, "steps": 0}
    lines = glue.format_results([result, several, ax], title="T").splitlines()
    assert re.split("  +", lines[2].strip()) == [
        *("task", "metrics", "median", "best", "spread", "majority class", "PaddleNLP"),
        *("seeds", "steps"),
    ]
    assert lines[-3].split() == [
        *("MRPC", "accuracy/f1", "80.00/90.00", "80.00/90.00", "-", "68.38", "88.24/91.67"),
        *("1", "575"),
    ]
    assert lines[-2].split() == [
        *("MRPC", "accuracy/f1", "70.00/75.00", "80.00/90.00", "20.00/90.00", "68.38"),
        *("88.24/91.67", "3", "575"),
    ]
    assert re.split("  +", lines[-1]) == ["AX", "-", "predictions only", *4 * "-", "1", "0"]


def test_the_page_of_all_tasks_has_each_metric_s_median_best_and_spread() -> None:
    mrpc = {
        "task": "MRPC",
        "metric": "accuracy",
        "metrics": {"accuracy": 0.8, "f1": 0.86},
        "value": 0.8,
        "median": 0.7,
        "median_metrics": {"accuracy": 0.7, "f1": 0.875},
        "majority_baseline": 0.6838,
        "steps": 1150,
        "all": [
            {"seed": 1, "value": 0.7, "metrics": {"accuracy": 0.7, "f1": 0.9}},
            {"seed": 2, "value": 0.8, "metrics": {"accuracy": 0.8, "f1": 0.86}},
            {"seed": 3, "value": 0.65, "metrics": {"accuracy": 0.65, "f1": 0.875}},
        ],
    }
    one = {**mrpc, "task": "SST-2", "metrics": {"accuracy": 0.9}, "value": 0.9, "seed": 42}
    del one["all"], one["median"], one["median_metrics"]
    wnli = {**one, "task": "WNLI"}
    ax = {**one, "task": "AX", "metric": "matthews", "metrics": {}, "value": None, "steps": 0}
    ax["majority_baseline"] = None
    table = glue.results_table([mrpc, one, ax], {"MRPC": "MRPC/report.html"})
    titled = "the average of 2 tasks' mean metrics, without WNLI and AX, is 84.38"
    assert table.title == f"Dev sets, in percent; {titled}"
    assert titled in glue.results_table([mrpc, one, wnli, ax], {}).title
    assert table.header == (
        *("task", "metric", "median", "best", "spread", "majority class", "PaddleNLP"),
        *("seeds", "steps"),
    )
    figures = [
        ("MRPC", "accuracy", "70.00", "80.00", "15.00", "68.38", "88.24", "3", "1,150"),
        ("MRPC", "f1", "87.50", "90.00", "4.00", "-", "91.67", "3", "1,150"),
        ("SST-2", "accuracy", "90.00", "90.00", "-", "68.38", "92.88", "1", "1,150"),
        ("AX", "predictions only", "-", "-", "-", "-", "-", "1", "0"),
    ]
    assert table.rows == figures
    assert table.links == ["MRPC/report.html", "MRPC/report.html", "", ""]
    assert glue.results_table([ax], {}).title == "Dev sets, in percent"


@pytest.mark.parametrize("flags", [("--n_gpu", "1"), ("--device", "gpu")])
def test_cpu_is_said_where_a_gpu_was_asked_for(
    pretrained: Path, root: Path, monkeypatch, capsys, flags: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(monkeypatch, "--task_name", "sst2", "--max_steps", "1", *flags)
    assert "this machine has no CUDA device; running on the CPU" in capsys.readouterr().out


def test_a_run_that_diverged_saves_nothing(pretrained: Path, root: Path, monkeypatch) -> None:
    with pytest.raises(TrainingDivergedError, match="lower --learning_rate"):
        run(
            monkeypatch,
            *("--task_name", "stsb", "--learning_rate", "1e30", "--num_train_epochs", "9"),
            *("--save_steps", "2", "--logging_steps", "100", "--output_dir", "out"),
        )
    assert [path.name for path in Path().glob("out/*")] == ["status.json"]
    assert read_status(Path("out"))["state"] == "failed"
