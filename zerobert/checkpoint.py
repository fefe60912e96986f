"""The model folder that pretraining writes and fine-tuning reads, in Hugging Face's format."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zerobert import __version__, manifest
from zerobert.config import BertConfig, from_dict
from zerobert.errors import CheckpointError, ConfigError
from zerobert.tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_NAME,
    VOCAB_NAME,
    AddedWord,
    TextRules,
    WordPieceTokenizer,
)

WEIGHTS_NAME = "model.safetensors"
# What `write_model_files` writes.
MODEL_NAMES = (
    "README.md",
    "config.json",
    WEIGHTS_NAME,
    TOKENIZER_NAME,
    "tokenizer_config.json",
    VOCAB_NAME,
)
_PICKLE_NAME = "pytorch_model.bin"
# On the hub: whole, or in parts with an index.
_WEIGHTS_PATTERNS = (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", "model-*.safetensors")
_PICKLE_PATTERNS = (_PICKLE_NAME, f"{_PICKLE_NAME}.index.json", "pytorch_model-*.bin")
# What a task adds on top of the encoder: may be missing from, or superfluous in, a folder.
_TASK_HEADS = ("classifier.", "qa_outputs.")
_HEADS = ("cls.", "bert.pooler.", *_TASK_HEADS)
# What else Hugging Face's configuration can ask for, and the one value that is computed here.
_ARCHITECTURE = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Hugging Face has no such BERT, and would compute something else with the weights of one.
_PRE_NORM_TYPE = "zerobert-pre-layer-norm"
# transformers' classes that cut text as BERT does, and those that do what tokenizer.json says.
_WORD_PIECE_CLASSES = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_LIBRARY_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_LIBRARY_PARTS = {
    "normalizer": "BertNormalizer",
    "pre_tokenizer": "BertPreTokenizer",
    "model": "WordPiece",
}
_NORMALIZER_NAMES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_ADDED_NAME = "added_tokens.json"
# Of rows that tensor cores like, which are no words: NVIDIA pads to 8, others up to 128.
_ROW_MULTIPLES = (8, 16, 32, 64, 128)
_WORDS, _DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on disk: its architecture and, if it is a classifier, its labels.

    Attributes:
        problem_type: a classifier's, by Hugging Face's names; empty where none is told.
        text_rules: what happens to a text before it is cut.
        tokenizer_class: of transformers, without its `Fast`; empty where none is named.
    """

    path: Path
    config: BertConfig
    labels: tuple[str, ...]
    problem_type: str
    text_rules: TextRules
    tokenizer_class: str

    @property
    def is_regression(self) -> bool:
        """Whether it answers with a number."""
        return self.problem_type == "regression"

    @property
    def has_vocabulary(self) -> bool:
        """Whether a vocabulary came with the weights."""
        return any((self.path / name).is_file() for name in (VOCAB_NAME, TOKENIZER_NAME))


def open_model(name_or_path: str) -> ModelFolder:
    """Read a model folder's configuration, or fetch the model of that name from the hub.

    Raises:
        CheckpointError: no such folder and no such model within reach, an incomplete or damaged
            folder, or another architecture than BERT.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        path = _download(name_or_path)
    if manifest.is_complete(path):
        manifest.verify_folder(path)
    if not _weight_files(path) and list(path.glob(f"model_*/{manifest.MANIFEST_NAME}")):
        raise CheckpointError(
            f"{path} is the folder of a run, not of a model; name one in it, as "
            f"{newest_model(path)}"
        )
    raw = _read_json(path / "config.json")
    if raw.get("model_type", "bert") not in ("bert", _PRE_NORM_TYPE):
        raise CheckpointError(
            f"{path}/config.json: wanted model_type 'bert', got {raw['model_type']!r}; "
            "choose a BERT model"
        )
    names = {field.name for field in dataclasses.fields(BertConfig)}
    try:
        known = {key: value for key, value in raw.items() if key in names}
        if known.get("hidden_act") == "gelu_python":  # the same function
            known["hidden_act"] = "gelu"
        config = from_dict(BertConfig, known, f"{path}/config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    for key, wanted in _ARCHITECTURE.items():
        if raw.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{path}/config.json: {key} {raw[key]!r} is not served, only {wanted!r}; "
                "choose a plain BERT encoder"
            )
    tokenizer_class, text_rules = _tokenizer_settings(path)
    return ModelFolder(
        path=path,
        config=config,
        labels=_labels(raw.get("id2label") or {}, f"{path}/config.json: id2label"),
        problem_type=str(raw.get("problem_type") or ""),
        text_rules=text_rules,
        tokenizer_class=tokenizer_class,
    )


def _labels(found: Any, where: str) -> tuple[str, ...]:
    """The names of classes in their order."""
    if not isinstance(found, Mapping) or not all(key.isdecimal() for key in found):
        raise CheckpointError(f'{where}: wanted {{"0": NAME, "1": NAME, ...}}, got {found!r}')
    return tuple(str(found[key]) for key in sorted(found, key=int))


def _tokenizer_settings(path: Path) -> tuple[str, TextRules]:
    """The class of a folder's tokenizer, and its rules: its config's, else its normalizer's."""
    asked: dict[str, Any] = {}
    if (path / "tokenizer_config.json").is_file():
        asked = _read_json(path / "tokenizer_config.json")
    name = str(asked.get("tokenizer_class") or "").removesuffix("Fast")
    if name in _LIBRARY_CLASSES:
        asked = {}
    normalizer: dict[str, Any] = {}
    if (path / TOKENIZER_NAME).is_file():
        normalizer = _read_json(path / TOKENIZER_NAME).get("normalizer") or {}
    rules = {}
    for field in dataclasses.fields(TextRules):
        known = normalizer.get(_NORMALIZER_NAMES[field.name], field.default)
        rules[field.name] = asked.get(field.name, known)
    return name, TextRules(**rules)


def _download(name: str) -> Path:
    try:
        patterns = ["config.json", VOCAB_NAME, "tokenizer*.json", _ADDED_NAME]
        path = Path(snapshot_download(name, allow_patterns=[*patterns, *_WEIGHTS_PATTERNS]))
        if not _weight_files(path):
            path = Path(snapshot_download(name, allow_patterns=[*patterns, *_PICKLE_PATTERNS]))
    except HFValidationError as error:
        raise CheckpointError(f"there is no folder {name!r}, nor can it be a hub's name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a model folder here nor a model that could be fetched from the "
            f"Hugging Face hub ({type(error).__name__}); give the path of a folder with "
            f"config.json and {WEIGHTS_NAME}, or check the network"
        ) from error
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a Hugging Face model folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


def version(path: Path) -> str:
    """The sha256 of a model folder's weights; empty where there are none."""
    hashes = [manifest.sha256_file(file) for file in _weight_files(path)]
    if len(hashes) < 2:
        return "".join(hashes)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_tokenizer(folder: ModelFolder) -> WordPieceTokenizer:
    """The folder's tokenizer, from `vocab.txt` or from the `tokenizer.json` alone.

    transformers 5 writes only the second.

    Raises:
        CheckpointError: the vocabulary does not fit the weights, or text is to be cut in another
            way than BERT's.
        DataError: the vocabulary is missing or can't be read.
    """
    name = folder.tokenizer_class
    if name not in (*_WORD_PIECE_CLASSES, *_LIBRARY_CLASSES):
        raise CheckpointError(
            f"{folder.path}/tokenizer_config.json: wanted a WordPiece tokenizer as BertTokenizer, "
            f"got {name!r}; choose a model that cuts text as BERT does"
        )
    rules: dict[str, Any] = dataclasses.asdict(folder.text_rules)
    rules["added"] = _added_words(folder.path)
    vocab_file, library_file = folder.path / VOCAB_NAME, folder.path / TOKENIZER_NAME
    if library_file.is_file() and (name in _LIBRARY_CLASSES or not vocab_file.is_file()):
        vocab_file = library_file
        tokenizer = WordPieceTokenizer(_library_words(vocab_file), **rules, where=str(vocab_file))
    else:
        tokenizer = WordPieceTokenizer.from_file(vocab_file, **rules)
    words, rows = len(tokenizer.vocab), folder.config.vocab_size
    if not has_room(folder.config, words):
        raise CheckpointError(
            f"{vocab_file} has {words} words, but the model was made for {rows}: use the "
            "vocabulary that it was trained with"
        )
    return tokenizer


def has_room(config: BertConfig, num_words: int) -> bool:
    """Whether a vocabulary is the model's: as many words as rows, or rows padded to a multiple."""
    padded = [-(-num_words // multiple) * multiple for multiple in _ROW_MULTIPLES]
    return config.vocab_size in (num_words, *padded)


def _added_words(path: Path) -> list[AddedWord]:
    """What a folder's tokenizer has beyond BERT's own tokens, wherever transformers wrote it."""
    found: dict[str, AddedWord] = {}
    listed: list[tuple[Path, Any]] = []
    if (file := path / _ADDED_NAME).is_file():
        ids = _read_json(file)
        listed += [(file, {"content": word, "id": ids[word]}) for word in ids]
    if (file := path / "tokenizer_config.json").is_file():
        known = _read_json(file).get("added_tokens_decoder") or {}
        listed += [(file, {**known[number], "id": int(number)}) for number in known]
    if (file := path / TOKENIZER_NAME).is_file():
        listed += [(file, token) for token in _read_json(file).get("added_tokens") or ()]
    names = {field.name for field in dataclasses.fields(AddedWord)}
    for file, raw in listed:  # later ones know more
        try:
            token = AddedWord(**{key: raw[key] for key in raw if key in names})
        except TypeError as error:
            raise CheckpointError(f"{file}: {raw!r} is no added token: {error}") from error
        if token.content not in SPECIAL_TOKENS:
            found[token.content] = token
    return list(found.values())


def _library_words(path: Path) -> list[str]:
    """The vocabulary of a `tokenizer.json`, in the order of its ids."""
    raw = _read_json(path)
    for part, wanted in _LIBRARY_PARTS.items():
        if (found := (raw.get(part) or {}).get("type")) != wanted:
            raise CheckpointError(
                f"{path}: {part}: wanted {wanted}, got {found}; choose a model that cuts text as "
                "BERT does"
            )
    ids = dict(raw["model"]["vocab"])
    special = [token for token in raw.get("added_tokens", ()) if token["content"] in SPECIAL_TOKENS]
    ids |= {token["content"]: token["id"] for token in special}
    words = sorted(ids, key=lambda word: ids[word])
    if [ids[word] for word in words] != list(range(len(words))):
        raise CheckpointError(f"{path}: the ids of its {len(words)} words have gaps or are double")
    return words


def load_weights(
    model: nn.Module, folder: ModelFolder, *, with_task_head: bool = True
) -> list[str]:
    """Copy a folder's weights into a model.

    Args:
        with_task_head: False where the folder's classifier answers another question.

    Returns:
        The names of the model's parameters that the folder lacks (a head that is new), which keep
        their random values.

    Raises:
        CheckpointError: weights of the encoder are missing, a shape differs, the file can't be
            read, or it holds weights that are not BERT's.
    """
    found = {_standard_name(name): tensor for name, tensor in _read_weights(folder.path).items()}
    own = model.state_dict()
    _check_tied(found, folder.path)
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own and name not in _BUFFERS]
    if lost := [name for name in missing if not name.startswith(_HEADS)]:
        raise CheckpointError(f"{folder.path}: {len(lost)} weights are missing, first {lost[0]!r}")
    if strange := [name for name in unknown if not name.startswith(_HEADS)]:
        raise CheckpointError(f"{folder.path}: {strange[0]!r} is not a weight of this BERT")
    for name, parameter in own.items():
        is_task_head = name.startswith(_TASK_HEADS)
        if name in found and (
            found[name].shape != parameter.shape or (is_task_head and not with_task_head)
        ):
            if not is_task_head:
                raise CheckpointError(
                    f"{folder.path}: {name} has shape {tuple(found[name].shape)}, wanted "
                    f"{tuple(parameter.shape)}; config.json and the weights are not of one model"
                )
            missing.append(name)  # another task's head: as good as none
    model.load_state_dict({name: found[name] for name in own if name not in missing}, strict=False)
    return missing


def _weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights: one, the parts that an index names, or none."""
    for name in (WEIGHTS_NAME, _PICKLE_NAME):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            parts = _read_json(index).get("weight_map")
            if not isinstance(parts, Mapping) or not all(
                isinstance(part, str) and Path(part).name == part for part in parts.values()
            ):
                raise CheckpointError(f"{index}: wanted a weight_map of names to files beside it")
            return [path / part for part in sorted(set(parts.values()))]
    return []


def _read_weights(path: Path) -> dict[str, Tensor]:
    files = _weight_files(path)
    if not files:
        raise CheckpointError(f"{path} has no {WEIGHTS_NAME}: not a complete model folder")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            # weights_only: a pickle from elsewhere must not run code.
            weights |= (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except (
            *(OSError, EOFError, PickleError, SafetensorError),
            *(RuntimeError, TypeError, ValueError),  # TypeError: no mapping at all
        ) as error:
            raise CheckpointError(f"{file}: the weights can't be read: {error}") from error
    return weights


def _check_tied(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a decoder of its own: here it is the word embeddings.

    Raises:
        CheckpointError: the folder has one.
    """
    decoder, words = (weights.get(name) for name in (_DECODER, _WORDS))
    if decoder is not None and words is not None and not torch.equal(decoder, words):
        raise CheckpointError(
            f"{path}: {_DECODER} is not the word embeddings; only tied ones are served"
        )


def _standard_name(name: str) -> str:
    """Today's name of a weight: with the `bert.` prefix, LayerNorm's `gamma` and `beta` renamed."""
    if name == "cls.predictions.decoder.bias":
        return "cls.predictions.bias"
    if not name.startswith(("bert.", *_HEADS)):
        name = f"bert.{name}"
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: BertConfig,
    tokenizer: WordPieceTokenizer,
    *,
    card: str,
    labels: Sequence[str] = (),
    is_regression: bool = False,
    source: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    """Write a model folder, complete or not at all.

    Args:
        state: the weights, by Hugging Face's names; they are written in fp32.
        card: the text of the model card.
        labels: a classifier's label names in order; none for a pretrained model.
        source: how the model was made, for the manifest.
        inputs: name -> sha256 of what it was made from.

    Raises:
        CheckpointError: the vocabulary does not fit the model.
        DataError: the folder can't be written.
    """
    if not has_room(config, len(tokenizer.vocab)):
        raise CheckpointError(
            f"a vocabulary of {len(tokenizer.vocab)} words does not fit a model made for "
            f"{config.vocab_size}"
        )
    with manifest.staged_folder(folder) as staging:
        write_model_files(
            staging,
            state,
            config,
            tokenizer,
            card=card,
            labels=labels,
            is_regression=is_regression,
        )
        manifest.write_manifest(staging, kind="model", config=source, inputs=inputs)


def write_model_files(
    folder: Path,
    state: Mapping[str, Tensor],
    config: BertConfig,
    tokenizer: WordPieceTokenizer,
    *,
    card: str,
    labels: Sequence[str] = (),
    is_regression: bool = False,
) -> None:
    """Write a model's files into an existing folder; the manifest is the caller's.

    Raises:
        DataError: a file can't be written.
    """
    is_classifier = bool(labels) or is_regression
    raw = {
        "architectures": [_architecture(state, is_classifier=is_classifier)],
        "model_type": "bert",
        **dataclasses.asdict(config),
    }
    if config.layer_norm_position == "post":
        del raw["layer_norm_position"]  # all of Hugging Face's BERTs are
    else:
        raw["model_type"] = _PRE_NORM_TYPE
    if is_classifier:
        names = list(labels) or ["LABEL_0"]
        raw["id2label"] = {str(i): label for i, label in enumerate(names)}
        raw["label2id"] = {label: i for i, label in enumerate(names)}
        raw["problem_type"] = "regression" if is_regression else "single_label_classification"
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in state.items()
    }
    with manifest.writing(folder):
        try:
            save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        tokenizer.save(folder, model_max_length=config.max_position_embeddings)
        # safetensors makes a file that its owner alone may read.
        shutil.copymode(folder / VOCAB_NAME, folder / WEIGHTS_NAME)
    manifest.write_json(folder / "config.json", raw)
    manifest.write_text(folder / "README.md", card)


def _architecture(state: Mapping[str, Tensor], *, is_classifier: bool) -> str:
    """Hugging Face's class for the weights."""
    if is_classifier:
        return "BertForSequenceClassification"
    if any(name.startswith("qa_outputs.") for name in state):
        return "BertForQuestionAnswering"
    has_nsp = any(name.startswith("cls.seq_relationship.") for name in state)
    return "BertForPreTraining" if has_nsp else "BertForMaskedLM"


def model_card(*, title: str, facts: Mapping[str, object]) -> str:
    """A model card: what made the model, and how to load it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [bert, zerobert]\n---\n# {title}\n\n"
        f"Made by zerobert {__version__}.\n\n| | |\n|---|---|\n{rows}\n"
    )


def newest_model(runs: Path) -> Path:
    """The pretrained model that was completed last: the newest `model_<n>` anywhere under a folder.

    Raises:
        ConfigError: there is none.
    """
    models = [
        path.parent
        for path in runs.rglob(f"model_*/{manifest.MANIFEST_NAME}")
        if re.fullmatch(r"model_\d+", path.parent.name) and not manifest.is_staging(path)
    ]
    if not models:
        raise ConfigError(
            f"no pretrained model (model_<step>/) under {runs}/: pretrain one with "
            "'bash launch.sh pretrain' or give --model_name_or_path"
        )
    return max(models, key=lambda path: ((path / manifest.MANIFEST_NAME).stat().st_mtime, path))
