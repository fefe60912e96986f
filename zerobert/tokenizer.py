"""WordPiece: load a vocabulary, encode with it, save it for Hugging Face, train one.

The `tokenizers` library is the truth for what a word and its pieces are; only this module uses it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from zerobert.errors import ConfigError, DataError
from zerobert.manifest import write_json, writing

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
VOCAB_NAME = "vocab.txt"
TOKENIZER_NAME = "tokenizer.json"

# Room for [CLS] a [SEP] b [SEP] with one piece in each sentence.
_MIN_PAIR_LENGTH = 5
# Source: BertWordPieceTokenizer.train of the tokenizers library. The alphabet is larger where
# the text needs it, as Chinese does.
_MIN_FREQUENCY = 2
_MIN_ALPHABET = 1000
# Source: SentencePiece's character_coverage for languages with rich character sets.
_CHARACTER_COVERAGE = 0.9995
_BLOCK_BYTES = 4 << 20
# Above it text was hardly lower-cased: bert-base-uncased has 0, bert-base-cased 0.3.
_HIGH_CASED_SHARE = 0.05
# More than any model has; the library aborts where it can't reserve the memory.
_MAX_VOCAB_SIZE = 10_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRules:
    """What happens to a text before it is cut, by the names of `tokenizer_config.json`.

    Attributes:
        strip_accents: None does as `do_lower_case` says.
        tokenize_chinese_chars: each Chinese character is a word of its own.
    """

    do_lower_case: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedWord:
    """A word that is found in a text before it is cut; the flags are those of `tokenizers`."""

    content: str
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class WordPieceTokenizer:
    """A vocabulary and the rules that cut text into its pieces.

    Attributes:
        vocab: every token, those that were added among them; its place is its id.
        sha256: of the vocabulary, one token a line: the same for every file that says the same.
    """

    def __init__(
        self,
        vocab: Sequence[str],
        *,
        do_lower_case: bool,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        added: Sequence[AddedWord] = (),
        where: str = "vocabulary",
    ) -> None:
        """Take a vocabulary.

        Args:
            vocab: what words are cut into.
            do_lower_case, strip_accents, tokenize_chinese_chars: see `TextRules`.
            added: further tokens, whose ids go on from those, or flags of tokens that are there.
            where: its file, for messages.

        Raises:
            DataError: a token is there twice, a special one is missing, [PAD] is not the first, or
                an added one has another id.
        """
        _check_vocabulary(vocab, where)
        self._words = tuple(vocab)
        vocab = self.vocab = _with_added(self._words, added, where)
        self.rules = TextRules(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
        )
        self.sha256 = hashlib.sha256(vocabulary_text(vocab).encode()).hexdigest()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(
            self.vocab.index, SPECIAL_TOKENS
        )
        self._tokenizer = _library_tokenizer(self._words, self.rules, added)

    @property
    def do_lower_case(self) -> bool:
        """Whether case is lost."""
        return self.rules.do_lower_case

    @classmethod
    def from_file(
        cls,
        vocab_file: Path,
        *,
        do_lower_case: bool,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        added: Sequence[AddedWord] = (),
    ) -> "WordPieceTokenizer":
        """Read a `vocab.txt`: one token a line, its number is its id.

        Raises:
            DataError: the file can't be read, or is no WordPiece vocabulary.
        """
        try:
            text = Path(vocab_file).read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(
                f"the vocabulary {vocab_file} can't be read: {error.strerror}"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{vocab_file} is no vocabulary: wanted UTF-8 text with one token a line, got "
                f"{error.reason} at byte {error.start}"
            ) from error
        if text.startswith("\ufeff"):
            raise DataError(
                f"{vocab_file} begins with a byte order mark, which would be part of its first "
                "token; save it as UTF-8 without one"
            )
        # Not splitlines(): a vocabulary may hold U+2028 and its like as tokens.
        tokens = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        return cls(
            tokens,
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
            added=added,
            where=str(vocab_file),
        )

    @property
    def cased_share(self) -> float:
        """The share of tokens with capitals, which hardly any has where text was lower-cased;
        those in brackets, which no text has, left out.
        """
        words = [
            token for token in self.vocab if not (token.startswith("[") and token.endswith("]"))
        ]
        return sum(token != token.lower() for token in words) / max(len(words), 1)

    @property
    def is_cased(self) -> bool:
        """Whether the vocabulary looks as if its text was not lower-cased."""
        return self.cased_share > _HIGH_CASED_SHARE

    def encode_words(self, texts: Sequence[str]) -> list[list[int]]:
        """WordPiece ids of each text, without special tokens and without truncation."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_words_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode_words`; beside the ids the characters of each piece in its text, [start, end).

        They are those of the text as it was given, not of what the normalizer made of it.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_pairs(
        self, first: Sequence[str], second: Sequence[str] | None, *, max_seq_length: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and segment ids of `[CLS] a [SEP]`, or of `[CLS] a [SEP] b [SEP]`, unpadded.

        What is too long loses pieces at the end of its longer sentence first, as in Hugging Face.

        Raises:
            ConfigError: the length has no room for two sentences.
        """
        if max_seq_length < _MIN_PAIR_LENGTH:
            raise ConfigError(
                f"max_seq_length: wanted at least {_MIN_PAIR_LENGTH}, got {max_seq_length}"
            )
        texts: list[str] | list[tuple[str, str]]
        texts = list(first) if second is None else list(zip(first, second, strict=True))
        self._tokenizer.enable_truncation(max_seq_length, strategy="longest_first")
        try:
            encodings = self._tokenizer.encode_batch(texts)
        finally:
            self._tokenizer.no_truncation()
        return [encoding.ids for encoding in encodings], [
            encoding.type_ids for encoding in encodings
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included, for people to read."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, folder: Path, *, model_max_length: int = 512) -> None:
        """Write the three files that transformers' AutoTokenizer loads with equal ids.

        They are `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`; only the second has the
        tokens that were added.

        Args:
            model_max_length: the longest input of the model, where transformers truncates.

        Raises:
            DataError: a file can't be written.
        """
        folder = Path(folder)
        config = {
            "tokenizer_class": "BertTokenizer",
            **dataclasses.asdict(self.rules),
            "model_max_length": model_max_length,
            **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
        }
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / VOCAB_NAME).write_bytes(vocabulary_text(self._words).encode())
        write_json(folder / TOKENIZER_NAME, json.loads(self._tokenizer.to_str()))
        write_json(folder / "tokenizer_config.json", config)


def _check_vocabulary(vocab: Sequence[str], where: str) -> None:
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise DataError(
            f"{where} is no BERT vocabulary: its {len(vocab)} tokens lack {', '.join(missing)}; "
            "`python -m data_prep vocab --help` shows how to make one"
        )
    if vocab[0] != PAD:
        raise DataError(
            f"{where}: wanted {PAD} in the first line (id 0 is padding), got {vocab[0]!r}"
        )
    if len(set(vocab)) != len(vocab):
        token, count = collections.Counter(vocab).most_common(1)[0]
        raise DataError(
            f"{where}: the token {token!r} is there {count} times, wanted once; remove the others"
        )


def _with_added(words: tuple[str, ...], added: Sequence[AddedWord], where: str) -> tuple[str, ...]:
    """The words and, behind them, the added ones that are new, in the order of their ids."""
    ids = {word: index for index, word in enumerate(words)}
    for token in sorted(added, key=lambda token: token.id):
        wanted = ids.setdefault(token.content, len(ids))
        if token.id != wanted:
            raise DataError(
                f"{where} has {len(words)} words: the added token {token.content!r} has the id "
                f"{token.id}, wanted {wanted}; save the tokenizer anew with transformers"
            )
    return tuple(ids)


def vocabulary_text(vocab: Iterable[str]) -> str:
    """What a `vocab.txt` holds: a token a line."""
    return "".join(f"{token}\n" for token in vocab)


def _library_tokenizer(
    vocab: Sequence[str], rules: TextRules, added: Sequence[AddedWord]
) -> Tokenizer:
    """What BertWordPieceTokenizer of the tokenizers library builds, from a vocabulary in memory."""
    ids = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token=UNK, continuing_subword_prefix=CONTINUATION)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=rules.do_lower_case,
        strip_accents=rules.strip_accents,
        handle_chinese_chars=rules.tokenize_chinese_chars,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((SEP, ids[SEP]), (CLS, ids[CLS]))
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    for token in sorted(added, key=lambda token: token.id):  # the library counts on from the words
        flags = dataclasses.asdict(token)
        del flags["id"]
        tokenizer.add_tokens([AddedToken(**flags)])
    return tokenizer


def train_vocabulary(files: Sequence[Path], *, vocab_size: int, do_lower_case: bool) -> list[str]:
    """Learn a vocabulary from UTF-8 text files; the same text gives the same vocabulary.

    The special tokens are the ids 0 to 4. A small corpus may fill fewer than `vocab_size` tokens.

    Raises:
        DataError: a file can't be read, or there is no text in them.
        ConfigError: the size has no room for the special tokens and a few characters.
    """
    if not 2 * len(SPECIAL_TOKENS) <= vocab_size <= _MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size: wanted {2 * len(SPECIAL_TOKENS)} to {_MAX_VOCAB_SIZE}, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(_count_characters(files), tokenizer, limit=(vocab_size - 5) // 2)
    # Handed over as special tokens the characters get their ids in this order; left to itself the
    # library numbers them in the order of a randomly seeded hash table, and its merges with them.
    continuations = [
        CONTINUATION + letter for letter in alphabet if _continues_a_word(letter, tokenizer)
    ]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *continuations],
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    with _named_in_utf8(files) as names:
        tokenizer.train(names, trainer)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(ids, key=lambda token: ids[token])


@contextlib.contextmanager
def _named_in_utf8(files: Sequence[Path]) -> Iterator[list[str]]:
    """The files' names; the library takes UTF-8 only, so that others get a link that has it."""
    with contextlib.ExitStack() as stack:
        names = []
        for path in files:
            name = str(path)
            if not name.isprintable():  # as half a surrogate pair, which stands for a byte
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                link = Path(folder, "text")
                link.symlink_to(path.resolve())
                name = str(link)
            names.append(name)
        yield names


def _count_characters(files: Sequence[Path]) -> collections.Counter[str]:
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for path in files:
        offset = 0
        try:
            with open(path, "rb") as file:
                while raw := b"".join(file.readlines(_BLOCK_BYTES)):
                    points = np.frombuffer(raw.decode("utf-8").encode("utf-32-le"), np.uint32)
                    counts += np.bincount(points, minlength=len(counts))
                    if counts[0]:
                        raise DataError(
                            f"{path} is not text: a NUL at byte {offset + raw.index(0)}; leave it "
                            "out"
                        )
                    offset += len(raw)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text: {error.reason} at byte {offset + error.start}; "
                "convert it first"
            ) from error
    found = np.flatnonzero(counts).tolist()
    return collections.Counter({chr(point): int(counts[point]) for point in found})


def _alphabet(counts: collections.Counter[str], tokenizer: Tokenizer, *, limit: int) -> list[str]:
    """The characters that get tokens of their own, sorted: the frequent ones, as many as needed."""
    normalized: collections.Counter[str] = collections.Counter()
    for character, count in counts.items():
        for letter in tokenizer.normalizer.normalize_str(character).strip():
            normalized[letter] += count
    if not normalized:
        raise DataError(
            "there is no text to learn a vocabulary from; see `python -m data_prep text`"
        )
    ranked = sorted(normalized, key=lambda letter: (-normalized[letter], letter))
    covered = itertools.accumulate(normalized[letter] for letter in ranked)
    wanted = _CHARACTER_COVERAGE * normalized.total()
    needed = sum(count < wanted for count in covered) + 1
    return sorted(ranked[: min(max(needed, _MIN_ALPHABET), limit)])


def _continues_a_word(letter: str, tokenizer: Tokenizer) -> bool:
    """Whether the letter can stand inside a word; punctuation and Chinese characters can't."""
    # The normalizer puts blanks around Chinese characters, the pre-tokenizer cuts at punctuation.
    text = tokenizer.normalizer.normalize_str(f"a{letter}")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1
