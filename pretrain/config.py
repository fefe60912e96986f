"""The experiment: one JSON with DeepSpeed's keys and our `"bert"` section, overridden by flags."""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pretrain.guard import GuardConfig
from zerobert import checkpoint, manifest, schedule, served
from zerobert.checkpoint import ModelFolder, open_model, version
from zerobert.config import SIZES, BertConfig, check_keys, from_dict, load_json
from zerobert.ds_config import BatchSizes, batch_sizes, clipping, flatten, override
from zerobert.ds_scheduler import DeepSpeedScheduler, scheduler_config
from zerobert.errors import ConfigError
from zerobert.kernels import Kernels
from zerobert.optim import OptimizerConfig, optimizer_config
from zerobert.schedule import ScheduleConfig

REPOSITORY = Path(__file__).resolve().parents[1]
PADDLE_JSON = REPOSITORY / "ds_configs" / "paddle_base.json"
_NO_LIMIT = -1  # PaddleNLP's way to say that epochs alone end the run
# What may change in a model that is trained on.
_FREE_OF_WEIGHTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
)
# Names that stand for an architecture with random weights, as they do for PaddleNLP's users.
KNOWN_NAMES: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"size": "base"},
    "bert-base-cased": {"size": "base"},
    "bert-large-uncased": {"size": "large"},
    "bert-large-cased": {"size": "large"},
    "bert-base-multilingual-uncased": {"size": "base"},
    "bert-base-multilingual-cased": {"size": "base"},
    "bert-base-chinese": {"size": "base"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The JSON's `"data"` section; the flags of the same names win.

    Attributes:
        input_dir: folders that are searched downwards for training shards.
        eval_dir: folder with held-out shards; by default those beside the training shards.
        vocab_file: needed only for shards that have no `vocab.txt` beside them.
        nsp: train on next-sentence labels too; by default where the shards have them.
        masking: `static` takes the masks of the shards, `dynamic` draws others in each epoch;
            held-out rows keep theirs.
        masked_lm_prob: share of the tokens that dynamic masks hide (0.15).
        whole_word_mask: dynamic masks hide whole words.
    """

    input_dir: tuple[str, ...] = ("data/shards",)
    eval_dir: str | None = None
    vocab_file: str | None = None
    nsp: bool | None = None
    masking: Literal["static", "dynamic"] = "static"
    masked_lm_prob: float | None = None
    whole_word_mask: bool = False

    def __post_init__(self) -> None:
        if self.masked_lm_prob is not None and not 0 < self.masked_lm_prob < 1:
            raise ConfigError(f"masked_lm_prob: wanted between 0 and 1, got {self.masked_lm_prob}")
        if self.masking == "static" and (self.masked_lm_prob is not None or self.whole_word_mask):
            raise ConfigError(
                "masked_lm_prob and whole_word_mask are for masks drawn afresh: add "
                '"masking": "dynamic", or make shards with these settings'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The JSON's `"run"` section: length, intervals in optimizer steps, and what is kept.

    Attributes:
        max_steps, max_samples, num_train_epochs: the earliest of those given ends the run.
        max_train_s: seconds of training, saves and evaluations on the way included, after which the
            run ends too; a resumed run goes on counting.
        init_from: a model folder, or the hub's name of one, whose weights the run starts from; or
            the folder of a training state, whose moments it takes too.
        eval_steps: 0 evaluates at the end only.
        eval_rows: held-out rows of an evaluation on the way, 0 for all; the last one uses all.
        keep_states: training states that are kept, counted from the newest.
        keep_models: models that are kept, counted from the newest; 0 for all.
        collective_timeout_s: seconds after which a process that does not answer counts as lost: all
            then end with an error, and the same command goes on from the newest state.
        keep_every_steps: beside those, states and models of every multiple of this are kept; 0 for
            none.
    """

    max_steps: int | None = None
    max_samples: int | None = None
    num_train_epochs: float | None = None
    max_train_s: float | None = None
    init_from: str | None = None
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 1000
    eval_steps: int = 1000
    eval_rows: int = 10_000
    keep_states: int = 2
    keep_models: int = 0
    keep_every_steps: int = 0
    collective_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_steps", "keep_states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        for name in ("eval_steps", "eval_rows", "keep_models", "keep_every_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: wanted at least 0, got {getattr(self, name)}")
        if 0 < self.keep_models < self.keep_states:
            raise ConfigError(
                f"keep_models: wanted at least keep_states {self.keep_states}, whose models they "
                f"are, or 0 for all, got {self.keep_models}"
            )
        if self.seed >= 2**64:
            raise ConfigError(f"seed: wanted less than 2^64, got {self.seed}")
        if not 1 <= self.collective_timeout_s < math.inf:
            raise ConfigError(
                f"collective_timeout_s: wanted at least 1, got {self.collective_timeout_s}"
            )
        for name in ("max_steps", "max_samples", "num_train_epochs", "max_train_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: wanted above 0, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The JSON's `"tracking"` section; metrics.jsonl is always written."""

    tracker: tuple[Literal["none", "wandb"], ...] = ("none",)
    project: str = "zerobert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertSection:
    """The JSON's `"bert"` section."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    kernels: Kernels = dataclasses.field(default_factory=Kernels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A resolved experiment, before the data is seen.

    Attributes:
        name: the JSON's name, for the output folder.
        deepspeed: DeepSpeed's own keys.
        scheduler: what DeepSpeed's `"scheduler"` section asks for; None for `bert.schedule`.
        init_from: the folder whose weights the run starts from; None for random weights.
        init_state: the training state whose moments it starts from; None for moments of zero.
    """

    name: str
    deepspeed: dict[str, Any]
    bert: BertSection
    optimizer: OptimizerConfig
    scheduler: DeepSpeedScheduler | None
    init_from: ModelFolder | None
    init_state: Path | None

    @property
    def goes_by_time(self) -> bool:
        """Whether the rate depends on the time budget and not on the number of steps."""
        return self.scheduler is None and self.bert.schedule.by == "time"

    def describe_rate(self, steps: int | None) -> str:
        """The form of the learning rate, for people, and how high so many steps come where that is
        less than was asked for.
        """
        if self.scheduler is not None:
            return f"DeepSpeed's {type(self.scheduler).__name__}"
        ours, peak = self.bert.schedule, self.optimizer.params.lr
        said = f"{ours.name} by {ours.by}, {peak:g} at its peak"
        if ours.by == "time" or steps is None:
            return said
        some = range(0, steps, -(-steps // 1000))
        top = max(schedule.factor(ours, step, total=steps) for step in some)
        return said if top > 0.9 else f"{said}, of which a run of {steps} reaches {top:.1%}"

    def rate(self, step: int, elapsed_s: float, *, total_steps: int | None) -> float:
        """The learning rate of the update that `step` others and `elapsed_s` went before."""
        lr = self.optimizer.params.lr
        if self.scheduler is not None:
            return self.scheduler.rate(step, lr)
        return schedule.rate(
            self.bert.schedule,
            step,
            elapsed_s,
            peak_lr=lr,
            total_steps=total_steps,
            max_train_s=self.bert.run.max_train_s,
        )

    def model(self, vocab_size: int) -> BertConfig:
        """The architecture with the vocabulary's size.

        Raises:
            ConfigError: the JSON or the initial weights ask for another size.
        """
        if self.init_from is not None:
            return self._continued(self.init_from, vocab_size)
        asked = self.bert.model.get("vocab_size", vocab_size)
        if asked != vocab_size:
            raise ConfigError(
                f"bert.model.vocab_size is {asked}, the shards' vocabulary has {vocab_size} words; "
                "remove vocab_size: it comes from the vocabulary"
            )
        return BertConfig.from_size({**self.bert.model, "vocab_size": vocab_size}, "bert.model")

    def _continued(self, source: ModelFolder, vocab_size: int) -> BertConfig:
        """The architecture of the initial weights, with what the JSON may change in it."""
        if not checkpoint.has_room(source.config, vocab_size):
            raise ConfigError(
                f"{source.path} was made for {source.config.vocab_size} words, the shards' "
                f"vocabulary has {vocab_size}: use shards made with its vocab.txt"
            )
        kept = dataclasses.asdict(source.config)
        given = {**self.bert.model}
        if given.get("vocab_size") == vocab_size:  # the weights' own may be padded
            del given["vocab_size"]
        sizes = SIZES.get(str(given.get("size")), {})
        asked = BertConfig.from_size({**kept, **sizes, **given}, "bert.model")
        changed = [
            f"{name} {value} (the weights: {kept[name]})"
            for name, value in dataclasses.asdict(asked).items()
            if name not in _FREE_OF_WEIGHTS and value != kept[name]
        ]
        if changed:
            raise ConfigError(
                f"bert.model asks for {', '.join(changed)}; {source.path} can't start such a "
                "model: leave them out of bert.model, and the folder's are taken"
            )
        return asked


def resolve(args: argparse.Namespace) -> PretrainConfig:
    """Dataclass defaults < JSON < flags.

    Raises:
        ConfigError: a key, a value or a combination that can't be served.
        CheckpointError: the model folder that a flag names can't be read.
    """
    path = Path(args.deepspeed_config or PADDLE_JSON)
    raw = load_json(path)
    section = raw.pop("bert", {})
    check_keys(raw, served.TOP_LEVEL_KEYS, str(path))
    bert = _override(from_dict(BertSection, section, f"{path}: bert"), args)
    bert = _named_model(bert, args.model_name_or_path)
    if bert.run.init_from is not None and args.deepspeed_config is None:
        bert = dataclasses.replace(bert, model={})  # nobody asked for the default JSON's size
    ds = override(raw, args)
    served.check(ds)
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if bert.kernels.compile and stage == 3:
        raise ConfigError(
            "bert.kernels.compile does not go with ZeRO stage 3, whose weights come and go; "
            "remove one of them"
        )
    optimizer = optimizer_config(ds.get("optimizer", {"type": "AdamW"}), f"{path}: optimizer")
    served.check_lamb_kernel(bert.kernels.lamb, ds, optimizer.params)
    ds["gradient_clipping"] = clipping(ds, optimizer.params.max_grad_norm)
    scheduler = None
    if "scheduler" in ds:
        scheduler = scheduler_config(ds["scheduler"], f"{path}: scheduler")
        _check_one_schedule(scheduler, section, args)
    init_state = _training_state(bert.run.init_from)
    source = _model_beside(init_state) if init_state else bert.run.init_from
    config = PretrainConfig(
        name=path.stem,
        deepspeed=ds,
        bert=bert,
        optimizer=optimizer,
        scheduler=scheduler,
        init_from=open_model(source) if source is not None else None,
        init_state=init_state,
    )
    _check_length(config)
    return config


def _training_state(source: str | None) -> Path | None:
    """The folder of a training state, where `--init_from` names one."""
    folder = Path(source or "")
    is_state = manifest.is_complete(folder) and manifest.read_manifest(folder).kind == "state"
    return folder if is_state else None


def _model_beside(state: Path) -> str:
    """The model that was saved with a training state."""
    model = state.with_name(f"model_{manifest.read_manifest(state).config['step']}")
    if not model.is_dir():
        raise ConfigError(f"--init_from {state}: the model of that step, {model}, is missing")
    return str(model)


def _check_one_schedule(
    scheduler: DeepSpeedScheduler, section: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """The rate has one owner: refuse what DeepSpeed's section would overrule in silence.

    Raises:
        ConfigError: names the other owner.
    """
    if "schedule" in section:
        raise ConfigError(
            'the JSON has DeepSpeed\'s "scheduler" section and bert.schedule: remove one of them'
        )
    overruled = {"--warmup_steps": args.warmup_steps, "--schedule_by": args.by}
    if getattr(scheduler, "warmup_max_lr", None) is not None:
        overruled["--learning_rate"] = args.learning_rate
    if given := [flag for flag, value in overruled.items() if value is not None]:
        raise ConfigError(
            f'{given[0]}: the JSON\'s "scheduler" section decides that; change it there, or put '
            "bert.schedule in its place"
        )


def _check_length(config: PretrainConfig) -> None:
    """A schedule must know the whole that its shares are of.

    Raises:
        ConfigError: the run has no such limit.
    """
    run = config.bert.run
    if config.goes_by_time:
        if run.max_train_s is None:
            raise ConfigError(
                "a schedule that goes by time needs to know how long: give --max_train_s, or "
                "max_train_s in bert.run"
            )
    elif config.scheduler is None and run.max_train_s is not None and not _has_steps(run):
        raise ConfigError(
            "max_train_s alone says how long to train, and the schedule goes by steps: give "
            "--schedule_by time, or --max_steps too"
        )


def _has_steps(run: RunConfig) -> bool:
    limits = (run.max_steps, run.max_samples, run.num_train_epochs)
    return any(limit is not None for limit in limits)


def _override(bert: BertSection, args: argparse.Namespace) -> BertSection:
    """Flags over the sections of the same field names."""
    if args.max_steps == _NO_LIMIT:
        args = argparse.Namespace(**{**vars(args), "max_steps": None})
        bert = dataclasses.replace(bert, run=dataclasses.replace(bert.run, max_steps=None))

    def given(section: Any) -> Any:
        names = {field.name for field in dataclasses.fields(section)}
        flags = {name: value for name, value in vars(args).items() if name in names}
        return dataclasses.replace(
            section, **{name: value for name, value in flags.items() if value is not None}
        )

    kernels = bert.kernels
    return dataclasses.replace(
        bert,
        data=given(bert.data),
        schedule=given(bert.schedule),
        run=given(bert.run),
        tracking=given(bert.tracking),
        kernels=dataclasses.replace(kernels, compile=True) if args.to_static else kernels,
    )


def _named_model(bert: BertSection, name: str | None) -> BertSection:
    """PaddleNLP's `--model_name_or_path`: a name is an architecture, a folder its weights too.

    Raises:
        ConfigError: neither.
    """
    if name is None:
        return bert
    if Path(name).is_dir():
        return dataclasses.replace(bert, run=dataclasses.replace(bert.run, init_from=name))
    if name in KNOWN_NAMES:
        sizes = SIZES[KNOWN_NAMES[name]["size"]]
        rest = {key: value for key, value in bert.model.items() if key not in sizes}
        return dataclasses.replace(bert, model={**rest, **KNOWN_NAMES[name]})
    raise ConfigError(
        f"--model_name_or_path: {name!r} is neither a folder nor one of {', '.join(KNOWN_NAMES)}; "
        "to start from a hub model's weights use --init_from"
    )


def with_micro_batch(
    config: PretrainConfig, micro_samples: int | None, world_size: int
) -> PretrainConfig:
    """The same experiment in other micro-batches; accumulation follows.

    Args:
        micro_samples: None for one micro-step.
    """
    ds = {**config.deepspeed}
    total = ds.get("train_batch_size") or batch_sizes(ds, world_size).global_samples
    ds.pop("gradient_accumulation_steps", None)
    ds.pop("train_micro_batch_size_per_gpu", None)
    ds["train_batch_size"] = total
    if micro_samples is not None:
        ds["train_micro_batch_size_per_gpu"] = micro_samples
    return dataclasses.replace(config, deepspeed=ds)


def total_steps(run: RunConfig, num_rows: int, global_samples: int) -> int | None:
    """The optimizer steps of the whole run; None where time alone ends it.

    Raises:
        ConfigError: no limit is given.
    """
    limits = []
    if run.max_steps is not None:
        limits.append(run.max_steps)
    if run.max_samples is not None:
        limits.append(math.ceil(run.max_samples / global_samples))
    if run.num_train_epochs is not None:
        limits.append(math.ceil(run.num_train_epochs * num_rows / global_samples))
    if not limits and run.max_train_s is None:
        raise ConfigError(
            "how long? give --max_steps, --num_train_epochs, --max_samples or --max_train_s, or "
            "bert.run in the JSON"
        )
    return min(limits, default=None)


def resolved_json(config: PretrainConfig, model: BertConfig) -> dict[str, Any]:
    """The whole experiment as one JSON, which runs it again."""
    bert = dataclasses.asdict(config.bert)
    bert["model"] = dataclasses.asdict(model)
    if config.scheduler is not None:
        del bert["schedule"]
    return {**config.deepspeed, "bert": bert}


# What a resumed run may change without becoming another run.
_FREE = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "bert.tracking",
    "bert.data",
    "bert.kernels",
    "bert.run.logging_steps",
    "bert.run.save_steps",
    "bert.run.eval_steps",
    "bert.run.eval_rows",
    "bert.run.keep_states",
    "bert.run.keep_models",
    "bert.run.keep_every_steps",
    "bert.run.collective_timeout_s",
    "bert.run.init_from",  # by its weights, wherever they lie
    "bert.guard",
    "bert.run.max_steps",
    "bert.run.max_samples",
    "bert.run.num_train_epochs",
    "bert.run.max_train_s",
)


def identity(
    resolved: Mapping[str, Any],
    *,
    steps: int | None,
    sizes: BatchSizes,
    data: Mapping[str, Any],
    init_from: ModelFolder | None = None,
) -> dict[str, Any]:
    """What makes a run this run, as flat `section.key` -> value; a resumed run agrees in all.

    Of the limits of its length it is the one that the rate depends on, none for DeepSpeed's.
    """
    rate = resolved["bert"].get("schedule")
    length = ScheduleConfig(**rate).length if rate else None
    return {
        **flatten(resolved, leaving_out=_FREE),
        **flatten(data, "data"),
        "total_steps": steps if length == "steps" else None,
        "max_train_s": resolved["bert"]["run"]["max_train_s"] if length == "time" else None,
        "train_batch_size": sizes.global_samples,
        "init_from_sha256": version(init_from.path) if init_from else None,
    }
