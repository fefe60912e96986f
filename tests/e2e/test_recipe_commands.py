"""Recipes as their users start them: two phases on shards of two lengths, PaddleNLP's own command,
and the launchers' threads.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import forked
from zerobert import checkpoint
from zerobert.config import BertConfig
from zerobert.device import usable_cores
from zerobert.model import BertForPreTraining
from zerobert.shards import find_shards, read_shard
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = str(REPOSITORY / "pretrain" / "run.py")
WORDS = [
    *("river", "mountain", "harbour", "winter", "garden", "engine", "letter", "window"),
    *("market", "shadow", "copper", "violin", "bridge", "candle", "orchard", "signal"),
]
VOCAB = [*SPECIAL_TOKENS, *WORDS, "the", "and", "met", "."]
LENGTHS = {128: 20, 512: 80}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TIMEOUT_S = 150


def run(
    *command: str, code: int = 0, cwd: Path = REPOSITORY, **extra: str
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **extra}
    environment = {name: value for name, value in environment.items() if value != "unset"}
    done = forked.run([sys.executable, *command], environment, cwd=cwd, timeout_s=TIMEOUT_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def refused(*command: str) -> str:
    (line,) = run(*command, code=2).stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of real shards of both lengths, made from one text with one vocabulary."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "text").mkdir()
    documents = [
        "".join(
            f"the {WORDS[(7 * page + line) % 16]} and the {WORDS[(page + 3 * line) % 16]} met .\n"
            for line in range(90)
        )
        for page in range(12)
    ]
    (folder / "text" / "all.txt").write_text("\n".join(documents))
    found = {}
    for length, predictions in LENGTHS.items():
        made = run(
            *("-m", "data_prep", "shards", "--input_dir", str(folder / "text")),
            *("--vocab_file", str(folder / "vocab.txt"), "--output_dir", str(folder / "out")),
            *("--n_training_shards", "2", "--n_test_shards", "0", "--dupe_factor", "1"),
            *("--max_seq_length", str(length), "--max_predictions_per_seq", str(predictions)),
        )
        found[length] = Path(made.stdout.splitlines()[-1])
        assert f"seq_len_{length}_max_pred_{predictions}" in str(found[length])
    return found


def num_rows(shards: Path) -> int:
    return sum(shard.num_rows for shard in find_shards([shards], "training"))


def write_phase(path: Path, phase: int, batch: int, **run_section: int) -> Path:
    """NVIDIA's phase on a small model, its schedule over few steps."""
    raw = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Lamb", "params": {"lr": [6e-3, 4e-3][phase - 1]}},
        "bert": {
            "model": SMALL,
            "schedule": {
                "name": "nvidia_polynomial",
                "warmup_proportion": [0.2843, 0.128][phase - 1],
                "degree": 0.5,
            },
            "run": {"logging_steps": 1, "save_steps": 100, "eval_steps": 0, **run_section},
        },
    }
    path.write_text(json.dumps(raw))
    return path


def lines_of(output: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


def counters_of(state: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((state / "index.json").read_text())
    counters: dict[str, Any] = index["counters"]
    return counters


def hugging_face_loss(model: Path, shards: Path) -> float:
    """Of all training rows, by the reference implementation."""
    reference = transformers.BertForPreTraining.from_pretrained(model).eval()
    mlm_sum, nsp_sum, masked, count = 0.0, 0.0, 0, 0
    for shard in find_shards([shards], "training"):
        rows = {name: torch.from_numpy(x).long() for name, x in read_shard(shard.path).items()}
        with torch.no_grad():
            out = reference(rows["input_ids"], rows["input_mask"], rows["segment_ids"])
        is_asked = rows["masked_lm_positions"] > 0
        places = rows["masked_lm_positions"].unsqueeze(-1).expand(-1, -1, len(VOCAB))
        logits = out.prediction_logits.gather(1, places)[is_asked]
        cross_entropy = torch.nn.functional.cross_entropy
        mlm_sum += float(cross_entropy(logits, rows["masked_lm_ids"][is_asked], reduction="sum"))
        labels = rows["next_sentence_labels"]
        nsp_sum += float(cross_entropy(out.seq_relationship_logits, labels, reduction="sum"))
        masked, count = masked + int(is_asked.sum()), count + len(labels)
    return mlm_sum / masked + nsp_sum / count


def test_phase_two_goes_on_from_phase_one_on_longer_shards(
    shards: dict[int, Path], tmp_path: Path
) -> None:
    def start(phase: int, length: int, steps: int, *flags: str) -> Path:
        # The first batch is the whole epoch: its loss does not depend on the order of rows.
        batch = num_rows(shards[length])
        config = write_phase(tmp_path / f"phase{phase}.json", phase, batch, max_steps=steps)
        output = tmp_path / f"phase{phase}"
        flags = ("--input_dir", str(shards[length]), "--output_dir", str(output), *flags)
        done = run(RUN, "--deepspeed_config", str(config), *flags)
        (output / "stdout.txt").write_text(done.stdout)
        return output

    first = start(1, 128, 6)
    source = first / "model_6"
    second = start(2, 512, 8, "--init_from", str(source))
    assert f"weights of {source}; new: none" in (second / "stdout.txt").read_text()

    # The weights are phase 1's, all 512 positions among them.
    assert lines_of(second)[0]["train/loss"] == pytest.approx(
        hugging_face_loss(source, shards[512]), abs=1e-5
    )
    before, after = (load_file(m / "model.safetensors") for m in (source, second / "model_8"))
    name = "bert.embeddings.position_embeddings.weight"
    assert before[name].shape == after[name].shape == (512, 32)
    changes = (after[name] - before[name]).abs().amax(1)
    assert (changes[:400] > 1e-4).all()  # phase 1 has never seen those from 128 on

    # The schedule, the samples and the optimizer are new.
    batch = num_rows(shards[512])
    lines = lines_of(second)
    assert [line["samples"] for line in lines] == [batch * step for step in range(1, 9)]
    assert [line["epoch"] for line in lines] == pytest.approx(range(1, 9))
    shares = [step / 8 for step in range(1, 9)]
    wanted = [4e-3 * (s / 0.128 if s < 0.128 else (1 - s) ** 0.5) for s in shares]
    assert [line["train/lr"] for line in lines] == pytest.approx(wanted)
    assert counters_of(second / "state_8")["optimizer_steps"] == 8

    # From a state the moments come along, as in NVIDIA's recipe, and tell from the first update on.
    third, state = tmp_path / "third", first / "state_6"
    flags = ("--input_dir", str(shards[512]), "--output_dir", str(third))
    config = str(tmp_path / "phase2.json")
    done = run(RUN, "--deepspeed_config", config, *flags, "--init_from", str(state))
    assert f"moments of {state}" in done.stdout
    (before, *after), (plain_before, *plain_after) = (
        [line["train/loss"] for line in lines_of(output)] for output in (third, second)
    )
    assert before == plain_before
    assert all(one != other for one, other in zip(after, plain_after, strict=True))
    assert counters_of(third / "state_8")["optimizer_steps"] == 8

    # Started again it goes on from its own state and not from phase 1's weights, wherever they are.
    source = source.rename(tmp_path / "moved")
    flags = ("--input_dir", str(shards[512]), "--output_dir", str(second))
    again = run(RUN, "--deepspeed_config", config, *flags, "--init_from", str(source))
    assert "complete" in again.stdout
    assert lines_of(second) == lines

    # Without the flag it would be another run, and phase 1's folder is not phase 2's.
    flags = ("--input_dir", str(shards[512]), "--output_dir", str(first))
    line = refused(RUN, "--deepspeed_config", config, *flags, "--init_from", str(source))
    assert "another --output_dir" in line


def save_small_model(
    folder: Path, *, words: Sequence[str] = VOCAB, positions: int = 512, hidden: int = 32
) -> Path:
    config = BertConfig(
        **{**SMALL, "hidden_size": hidden},
        vocab_size=len(words),
        max_position_embeddings=positions,
    )
    checkpoint.save_model(
        folder,
        BertForPreTraining(config).state_dict(),
        config,
        WordPieceTokenizer(words, do_lower_case=True),
        card="",
        source={},
        inputs={},
    )
    return folder


SWAPPED = [*VOCAB[:6], VOCAB[7], VOCAB[6], *VOCAB[8:]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": 128}, "sequences of 512, .* knows positions up to 128; .* from the first"),
        ({"words": [*VOCAB, "more"]}, "was made for 26 words, the shards' vocabulary has 25"),
        ({"words": SWAPPED}, "another vocabulary: its word 6 is 'harbour', the shards' is 'mount"),
        ({"words": [*SWAPPED, "more"]}, "another vocabulary: its word 6 is 'harbour'"),
        ({"hidden": 64}, r"bert.model asks for hidden_size 32 \(the weights: 64\); .* can't start"),
    ],
    ids=["positions", "more words", "other words", "other and more", "size"],
)
def test_a_model_that_phase_two_can_t_start_from_is_one_line(
    shards: dict[int, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    model = save_small_model(tmp_path / "model", **changes)
    config = write_phase(tmp_path / "phase2.json", 2, 4, max_steps=2)
    section = json.loads(config.read_text())
    section["bert"]["model"]["max_position_embeddings"] = changes.get("positions", 512)
    config.write_text(json.dumps(section))
    flags = ("--input_dir", str(shards[512]), "--output_dir", str(tmp_path / "out"))
    line = refused(RUN, "--deepspeed_config", str(config), *flags, "--init_from", str(model))
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


# As PaddleNLP documents it, from the script's path on; only the folders and the length are ours.
PADDLE = """
    --model_type bert
    --model_name_or_path {model}
    --max_predictions_per_seq 20
    --batch_size {batch_size}
    --learning_rate 1e-4
    --weight_decay 1e-2
    --adam_epsilon 1e-6
    --warmup_steps {warmup_steps}
    --num_train_epochs 3
    --input_dir {input_dir}
    --output_dir {output_dir}
    --logging_steps 1
    --save_steps {save_steps}
    --max_steps {max_steps}
    --device {device}
    --use_amp False
"""
PADDLE_LINE = re.compile(
    r"global step: (\d+), epoch: (\d+), batch: (\d+), loss: (\d+\.\d{6}), "
    r"avg_reader_cost: \d+\.\d{5} sec, avg_batch_cost: \d+\.\d{5} sec, "
    r"avg_samples: (\d+\.\d{5}), ips: \d+\.\d{5} sequences/sec"
)


def test_paddlenlp_s_documented_command_plans_bert_base(
    shards: dict[int, Path], tmp_path: Path
) -> None:
    command = PADDLE.format(
        model="bert-base-uncased",
        batch_size=32,
        warmup_steps=10000,
        input_dir=shards[128],
        output_dir=tmp_path / "out",
        save_steps=20000,
        max_steps=1000000,
        device="gpu",
    )
    done = run(RUN, *command.split(), "--dry_run", CUDA_VISIBLE_DEVICES="")
    resolved = json.loads(done.stdout[: done.stdout.rindex("\n}") + 2])
    assert resolved["train_micro_batch_size_per_gpu"] == 32
    assert resolved["bert"]["model"]["hidden_size"] == 768
    assert "batch: 32 sequences = 32 x 1 micro-steps x 1 processes" in done.stdout
    assert "learning rate: paddle_linear by steps, 0.0001 at its peak" in done.stdout
    assert done.stderr.strip() == "--device gpu: torch finds no GPU here; training on the CPU"


def test_paddlenlp_s_command_trains_with_its_rates_and_its_log_line(
    shards: dict[int, Path], tmp_path: Path
) -> None:
    """From a folder's weights, whose vocabulary serves for shards that have none beside them."""
    model = save_small_model(tmp_path / "model")
    bare = tmp_path / "data"
    bare.mkdir()
    for shard in find_shards([shards[128]], "training"):
        (bare / shard.path.name).write_bytes(shard.path.read_bytes())
    out = tmp_path / "pretrained_models"
    command = PADDLE.format(
        model=model,
        batch_size=8,
        warmup_steps=2,
        input_dir=bare,
        output_dir=out,
        save_steps=3,
        max_steps=5,
        device="cpu",
    )
    done = run(RUN, *command.split())
    assert f"weights of {model}; new: none" in done.stdout
    logged = [PADDLE_LINE.fullmatch(line) for line in done.stdout.splitlines()]
    steps = [found for found in logged if found]
    assert [int(found[1]) for found in steps] == [1, 2, 3, 4, 5]
    assert {found[5] for found in steps} == {"8.00000"}
    lines = lines_of(out)
    assert [float(found[4]) for found in steps] == pytest.approx(
        [line["train/loss"] for line in lines], abs=1e-6
    )
    rates = [1e-4 * share for share in (1 / 2, 1, 2 / 3, 1 / 3, 0)]
    assert [line["train/lr"] for line in lines] == pytest.approx(rates)
    assert {"model_3", "model_5"} <= {path.name for path in out.iterdir()}
    last, weights = (
        load_file(folder / "model.safetensors") for folder in (out / "model_5", out / "model_3")
    )
    assert any(not torch.equal(last[name], weights[name]) for name in last)


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("launcher", "flags", "ranks", "threads"),
    [
        ([], ["--n_gpu", "2"], 2, "unset"),  # DeepSpeed's launcher
        ([*TORCHRUN, "--master_port", str(20000 + os.getpid() % 20000)], [], 2, "unset"),
        ([], [], 1, "1"),
    ],
    ids=["deepspeed", "torchrun", "OMP_NUM_THREADS"],
)
def test_ranks_share_the_cores_unless_the_user_has_decided(
    shards: dict[int, Path],
    tmp_path: Path,
    launcher: list[str],
    flags: list[str],
    ranks: int,
    threads: str,
) -> None:
    config = write_phase(tmp_path / "small.json", 1, 4, max_steps=2)
    where = ["--input_dir", str(shards[128]), "--output_dir", str(tmp_path / "out")]
    command = [*launcher, RUN, "--deepspeed_config", str(config), *where, *flags]
    done = run(*command, "--batch_size", "2", "--dry_run", OMP_NUM_THREADS=threads)
    share = max(1, usable_cores() // ranks) if threads == "unset" else int(threads)
    assert f"processes: {ranks}, of {share} CPU threads each" in done.stdout
