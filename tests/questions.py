"""A small file of questions in SQuAD's form, and a vocabulary for it."""

import json
from pathlib import Path
from typing import Any

from finetune.tasks import File, Split
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCAB = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?'()-"]
TOKENIZER = WordPieceTokenizer(VOCAB, do_lower_case=True)  # each letter is a piece
FILE = Split(files=(File(name="train.json"),))

KEEPER = (
    "The lamp on Grey Skerry was lit in 1871 by Ada Thorn, who kept it for forty-two years. Her "
    "log-books, written in pencil, note every ship that passed (9,310 of them) and the colour of "
    "the sea each morning. After a storm in 1902 the stairs were cut anew from red granite."
)
MILL = "Olm Mill grinds rye.\n\nIts wheel was carried from École Haute by barge."


def paragraph(context: str, *asked: tuple[str, str]) -> dict[str, Any]:
    return {
        "context": context,
        "qas": [
            {
                "id": f"{context[:4]}-{number}",
                "question": question,
                "answers": [{"text": answer, "answer_start": context.index(answer)}],
            }
            for number, (question, answer) in enumerate(asked)
        ],
    }


def example() -> dict[str, Any]:
    """A small file in the official form."""
    keeper = paragraph(
        KEEPER,
        ("Who was the first to light the lamp?", "Ada Thorn"),
        ("How many ships are in the books?", "9,310"),
        ("What are the new stairs made of?", "red granite"),
        ("What were the books written in?", "pencil"),
    )
    mill = paragraph(MILL, ("What is ground?", "rye"), ("Where is the wheel from?", "École Haute"))
    mill["qas"][1]["answers"].append({"text": "Haute", "answer_start": MILL.index("Haute")})
    return {
        "version": "1.1",
        "data": [
            {"title": "Grey Skerry", "paragraphs": [keeper]},
            {"title": "Olm Mill", "paragraphs": [mill]},
        ],
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
