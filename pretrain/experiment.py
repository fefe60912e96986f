"""From flags and files to what is to be trained; every fault of the input is told here."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from pretrain import config as pretrain_config
from pretrain import footprint, memory
from pretrain import state as run_state
from pretrain.config import PretrainConfig
from pretrain.data import fingerprint
from pretrain.masking import MASKED_LM_PROB, Masking, masking_of
from pretrain.state import RunFolder
from zerobert import checkpoint, distributed, engine, manifest, served
from zerobert.checkpoint import ModelFolder
from zerobert.device import slow_precision
from zerobert.ds_config import BatchSizes, batch_sizes
from zerobert.errors import ConfigError
from zerobert.model import BertForPreTraining, num_parameters, training_flops_per_sequence
from zerobert.shards import (
    VOCAB_NAME,
    ShardInfo,
    empty_arrays,
    find_shards,
    read_rows,
    shard_lower_case,
    shard_vocabulary,
)
from zerobert.tokenizer import WordPieceTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that is known before the model is built."""

    config: PretrainConfig
    folder: RunFolder
    sizes: BatchSizes
    steps: int | None
    training: tuple[ShardInfo, ...]
    held_out: tuple[ShardInfo, ...]
    nsp: bool
    masking: Masking | None

    @property
    def max_predictions(self) -> int:
        """Of a training batch: the shards' own, or as many as fresh masks may be."""
        if self.masking is not None:
            return self.masking.max_predictions
        return self.training[0].max_predictions

    @property
    def flops_per_sequence(self) -> float:
        """Of a training step."""
        return training_flops_per_sequence(
            self.folder.model, self.training[0].seq_length, self.max_predictions
        )

    @property
    def length(self) -> str:
        """What ends the run."""
        seconds = self.config.bert.run.max_train_s
        limits = [f"{self.steps:,} steps"] if self.steps is not None else []
        limits += [f"{seconds:,.0f} s"] if seconds is not None else []
        return " or ".join(limits)

    @functools.cached_property
    def parameters(self) -> int:
        """The number of the model's values."""
        with torch.device("meta"):
            return num_parameters(BertForPreTraining(self.folder.model, nsp=self.nsp))

    @property
    def state_bytes(self) -> float:
        """What weights, gradients and optimizer hold on each rank."""
        return footprint.state_bytes(
            self.parameters,
            precision=served.precision(self.config.deepspeed),
            stage=served.stage(self.config.deepspeed, distributed.world_size()),
            ranks=distributed.world_size(),
            zero=self.config.deepspeed.get("zero_optimization"),
        )

    @property
    def micro_batch_bytes(self) -> float:
        """What the backward pass needs of a micro-batch without padding."""
        sample = footprint.activation_bytes(
            self.folder.model,
            num_tokens=self.training[0].seq_length,
            max_predictions=self.max_predictions,
            width=4 if served.computes_in(self.config.deepspeed) == "fp32" else 2,
            is_checkpointed=self.config.bert.kernels.activation_checkpointing,
        )
        return self.sizes.micro_samples * sample

    def _describe_saves(self) -> str:
        """What the run leaves on the disk: models are fp32, and states hold two moments beside."""
        run = self.config.bert.run
        model_gb, state_gb = 4e-9 * self.parameters, 12e-9 * self.parameters
        if self.steps is None or run.keep_every_steps:
            return f"{model_gb:.2f} GB a model, {state_gb:.2f} GB a state"
        saves = -(-self.steps // run.save_steps)
        models, states = min(saves, run.keep_models or saves), min(saves, run.keep_states)
        return (
            f"{models * model_gb + states * state_gb:,.2f} GB in the end = models, {models} x "
            f"{model_gb:.2f}, and states, {states} x {state_gb:.2f}"
        )

    def facts(self) -> dict[str, str]:
        """The size of the undertaking, for `--dry_run` and the first lines of a run."""
        low = served.precision(self.config.deepspeed)
        ranks = distributed.world_size()
        stage = served.stage(self.config.deepspeed, ranks)
        rows = sum(shard.num_rows for shard in self.training)
        flops = self.flops_per_sequence * self.sizes.global_samples
        data, words = f"epochs of {rows:,} sequences", self.folder.tokenizer
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        warning = engine.why_not_here(self.config.deepspeed) or slow_precision(
            device, served.computes_in(self.config.deepspeed)
        )
        if self.steps is not None:
            data = f"{self.steps * self.sizes.global_samples / rows:.2f} {data}"
        return {
            "parameters": f"{self.parameters:,}",
            **({"warning": warning} if warning else {}),
            "processes": f"{ranks}, of {torch.get_num_threads()} CPU threads each",
            "batch": f"{self.sizes.global_samples} sequences = {self.sizes.micro_samples} x "
            f"{self.sizes.accumulation_steps} micro-steps x {ranks} processes",
            "length": f"{self.length}; {data}",
            "vocabulary": f"{len(words.vocab):,} tokens of "
            f"{'lower-cased' if words.do_lower_case else 'cased'} text",
            "learning rate": self.config.describe_rate(self.steps),
            "weights, gradients and optimizer": f"{self.state_bytes / 2**30:.2f} GiB a process, "
            f"ZeRO stage {stage}, {low}",
            "a micro-batch": f"{self.micro_batch_bytes / 2**30:.2f} GiB beside them, with fused "
            "attention",
            "FLOPs a step": f"{flops:.3g}",
            "on the disk": self._describe_saves(),
        }


def prepare(args: argparse.Namespace, *, micro_samples: int | None = None) -> Experiment:
    """Read the configuration and look at the data; nothing is written.

    Args:
        micro_samples: the one that `--auto_micro_batch` has found; None while it looks for it.

    Raises:
        ZerobertError: what the user can mend, each with a line that says how.
    """
    config = pretrain_config.resolve(args)
    world_size = distributed.world_size()
    if args.auto_micro_batch:
        config = pretrain_config.with_micro_batch(config, micro_samples, world_size)
    sizes = batch_sizes(config.deepspeed, world_size)
    folders = [Path(folder) for folder in config.bert.data.input_dir]
    training = _training_shards(folders, args)
    eval_dir = config.bert.data.eval_dir
    held_out = find_shards([Path(eval_dir)] if eval_dir else folders, "test")
    if eval_dir and not held_out:
        raise ConfigError(f"--eval_dir {eval_dir}: no HDF5 file with 'test' in its name there")
    _check_same_shape(training, held_out)
    if args.auto_micro_batch or not args.dry_run:  # what is only printed may be for other devices
        engine.check_device(config.deepspeed)
    held_out_folders = [Path(eval_dir)] if eval_dir else []
    tokenizer, inputs = _vocabulary(config, [*folders, *held_out_folders], training)
    _check_vocabulary([*training, *held_out], tokenizer)
    model = config.model(len(tokenizer.vocab))
    _check_positions(config, model.max_position_embeddings, training[0].seq_length)
    output_dir = Path(args.output_dir or Path("runs") / config.name)
    if any(output_dir.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"--output_dir {output_dir} holds the shards; choose another folder")
    data, nsp = fingerprint(training), _has_nsp(config, training)
    if nsp and model.type_vocab_size < 2:
        raise ConfigError(
            "the shards have two segments, the model has type_vocab_size 1; set it to 2, or train "
            'on masked words alone: "data": {"nsp": false}'
        )
    steps = pretrain_config.total_steps(config.bert.run, data["rows"], sizes.global_samples)
    resolved = pretrain_config.resolved_json(config, model)
    return Experiment(
        config=config,
        folder=RunFolder(
            path=output_dir,
            model=model,
            tokenizer=tokenizer,
            resolved=resolved,
            identity=pretrain_config.identity(
                resolved,
                steps=steps,
                sizes=sizes,
                data={
                    **data,
                    **_masking_identity(config),
                    "vocab_sha256": tokenizer.sha256,
                    "nsp": nsp,
                },
                init_from=config.init_from,
            ),
            inputs=inputs,
            micro_samples=sizes.micro_samples,
            keep_states=config.bert.run.keep_states,
            keep_models=config.bert.run.keep_models,
            keep_every_steps=config.bert.run.keep_every_steps,
        ),
        sizes=sizes,
        steps=steps,
        training=tuple(training),
        held_out=tuple(held_out),
        nsp=nsp,
        masking=_masking(config, tokenizer, training[0].seq_length),
    )


def fitting_micro_batch(run: Experiment, args: argparse.Namespace) -> int:
    """The largest micro-batch that this rank has memory for; a run that goes on keeps its own.

    Raises:
        ConfigError: not even one sequence fits.
    """
    rank_samples = run.sizes.global_samples // distributed.world_size()
    if args.resume != "never":
        kept = run_state.micro_batch_of(run.folder.path)
        if kept is not None and rank_samples % kept == 0:
            return kept
    shard, low = run.training[0], served.precision(run.config.deepspeed)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return memory.largest_micro_batch(
        memory.builder(run.folder.model, run.config.bert.kernels, nsp=run.nsp, dtype=DTYPES[low]),
        dtype=DTYPES[served.computes_in(run.config.deepspeed)],
        seq_length=shard.seq_length,
        max_predictions=run.max_predictions,
        rank_samples=rank_samples,
        state_bytes=run.state_bytes,
        device=device,
    )


def _training_shards(folders: list[Path], args: argparse.Namespace) -> list[ShardInfo]:
    shards = find_shards(folders, "training")
    if not shards:
        where = ", ".join(map(str, folders))
        raise ConfigError(
            f"no training shards (*train*.hdf5) under {where}; make them with 'bash launch.sh prep "
            f"shards --input_dir TEXT --vocab_file VOCAB --output_dir {folders[0]}' or name their "
            "folder with --input_dir"
        )
    predictions = args.max_predictions_per_seq
    if predictions is not None and predictions != shards[0].max_predictions:
        raise ConfigError(
            f"--max_predictions_per_seq is {predictions}, the shards were made with "
            f"{shards[0].max_predictions}; leave the flag out or make other shards"
        )
    return shards


def _has_nsp(config: PretrainConfig, training: list[ShardInfo]) -> bool:
    """Whether next-sentence labels are trained on: as asked, or as the shards were made.

    Raises:
        ConfigError: labels are asked for that the shards do not have.
    """
    lacking = sorted(
        folder
        for folder in {shard.path.parent for shard in training}
        if manifest.is_complete(folder) and manifest.read_manifest(folder).config.get("no_nsp")
    )
    asked = config.bert.data.nsp
    if asked and lacking:
        raise ConfigError(
            f"bert.data.nsp: the shards in {lacking[0]} were made with --no_nsp; make others, or "
            "remove the key"
        )
    return not lacking if asked is None else asked


def _masking(
    config: PretrainConfig, tokenizer: WordPieceTokenizer, seq_length: int
) -> Masking | None:
    data = config.bert.data
    if data.masking == "static":
        return None
    return masking_of(
        tokenizer,
        seed=config.bert.run.seed,
        masked_lm_prob=data.masked_lm_prob or MASKED_LM_PROB,
        seq_length=seq_length,
        whole_word_mask=data.whole_word_mask,
    )


def _masking_identity(config: PretrainConfig) -> dict[str, Any]:
    """What a resumed run must agree in of its masks; the rest of `bert.data` it may change."""
    data = config.bert.data
    if data.masking == "static":
        return {"masking": "static"}
    return {
        "masking": "dynamic",
        "masked_lm_prob": data.masked_lm_prob or MASKED_LM_PROB,
        "whole_word_mask": data.whole_word_mask,
    }


def _check_same_shape(training: list[ShardInfo], held_out: list[ShardInfo]) -> None:
    if held_out and held_out[0].seq_length != training[0].seq_length:
        raise ConfigError(
            f"{held_out[0].path} has sequences of {held_out[0].seq_length}, the training shards of "
            f"{training[0].seq_length}; name held-out shards of that length with --eval_dir"
        )


def _check_positions(config: PretrainConfig, num_positions: int, seq_length: int) -> None:
    if num_positions >= seq_length:
        return
    if config.init_from is None:
        raise ConfigError(
            f"the shards have sequences of {seq_length}, the model has max_position_embeddings "
            f"{num_positions}; raise it, or make shorter shards"
        )
    raise ConfigError(
        f"the shards have sequences of {seq_length}, {config.init_from.path} knows positions up to "
        f"{num_positions}; make shorter shards, or train a model whose bert.model has "
        f"max_position_embeddings {seq_length} from the first phase on"
    )


def _vocabulary(
    config: PretrainConfig, folders: list[Path], training: list[ShardInfo]
) -> tuple[WordPieceTokenizer, dict[str, str]]:
    """The vocabulary of the shards, and the hashes of all that a run is made from."""
    beside = shard_vocabulary(folders)
    given = config.bert.data.vocab_file
    source = config.init_from
    known = None
    if source is not None and source.has_vocabulary:
        known = checkpoint.load_tokenizer(source)
    if given is None and beside is None and known is None:
        raise ConfigError(
            f"no vocab.txt beside the shards in {', '.join(map(str, folders))}; name the one they "
            "were made with by --vocab_file"
        )
    lower_case = shard_lower_case(folders)
    if lower_case is None and source is not None:
        lower_case = source.text_rules.do_lower_case
    file = Path(given) if given else beside
    if file is not None:
        tokenizer = WordPieceTokenizer.from_file(file, do_lower_case=lower_case is not False)
        if lower_case is None and tokenizer.is_cased:  # shards of others may not say it
            tokenizer = WordPieceTokenizer(tokenizer.vocab, do_lower_case=False)
    else:
        assert known is not None
        tokenizer = WordPieceTokenizer(known.vocab, do_lower_case=lower_case is not False)
    if given and beside and manifest.sha256_file(beside) != manifest.sha256_file(given):
        raise ConfigError(f"--vocab_file {given} is not the vocabulary of the shards, {beside}")
    if source is not None and known is not None:
        _check_words(source, known, tokenizer)
    inputs = {"vocab.txt": tokenizer.sha256}
    for folder in sorted({shard.path.parent for shard in training}):
        if manifest.is_complete(folder):
            path = folder / manifest.MANIFEST_NAME
            inputs[str(path)] = manifest.sha256_file(path)
    return tokenizer, inputs


def _check_vocabulary(shards: list[ShardInfo], tokenizer: WordPieceTokenizer) -> None:
    """Hold each folder's shards against the vocabulary: by their manifest, or where they have none
    by what their first row begins with.

    Raises:
        ConfigError: the shards were made with other words.
    """
    for folder, shard in {shard.path.parent: shard for shard in reversed(shards)}.items():
        made_with = None
        if manifest.is_complete(folder):
            made_with = manifest.read_manifest(folder).inputs.get(VOCAB_NAME)
        if made_with is None:
            arrays = empty_arrays(shard, 1)
            read_rows(shard, {0: arrays})
            is_other = arrays["input_ids"][0, 0] != tokenizer.cls_id
        else:
            is_other = made_with != tokenizer.sha256
        if is_other:
            raise ConfigError(
                f"the shards in {folder} were made with another vocabulary than the one of "
                f"{len(tokenizer.vocab)} words that is used; name theirs by --vocab_file, or name "
                "folders of one vocabulary"
            )


def _check_words(
    source: ModelFolder, known: WordPieceTokenizer, tokenizer: WordPieceTokenizer
) -> None:
    """More words, or fewer, are told by the architecture; here it is other words, or their order.

    Raises:
        ConfigError: the model knows other words by the shards' numbers.
    """
    pairs = enumerate(zip(known.vocab, tokenizer.vocab, strict=False))
    number = next((i for i, (word, other) in pairs if word != other), None)
    if number is not None:
        raise ConfigError(
            f"{source.path} was trained with another vocabulary: its word {number} is "
            f"{known.vocab[number]!r}, the shards' is {tokenizer.vocab[number]!r}; use shards made "
            "with its vocab.txt"
        )
