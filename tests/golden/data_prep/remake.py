"""Write vocab.txt and expected.json anew: `python tests/golden/data_prep/remake.py`.

Do it only when the rules were meant to change, and say so in the change log: users' shards change.
"""

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from data_prep.build import build_instances  # noqa: E402
from data_prep.config import InstanceConfig  # noqa: E402
from zerobert.shards import read_shard  # noqa: E402
from zerobert.tokenizer import WordPieceTokenizer, train_vocabulary  # noqa: E402

CASES = {
    "pairs": InstanceConfig(max_seq_length=48, max_predictions_per_seq=8, dupe_factor=3),
    "short": InstanceConfig(
        max_seq_length=24, max_predictions_per_seq=5, masked_lm_prob=0.3, short_seq_prob=0.5
    ),
    "whole_words": InstanceConfig(
        max_seq_length=48, max_predictions_per_seq=8, whole_word_mask=True
    ),
    "no_pairs": InstanceConfig(max_seq_length=48, max_predictions_per_seq=8, no_nsp=True),
}
RANDOM_SEED = 12345


def array_hashes(config: InstanceConfig, shard: Path) -> dict[str, str]:
    """The SHA-256 of each array that the golden text becomes."""
    tokenizer = WordPieceTokenizer.from_file(HERE / "vocab.txt", do_lower_case=True)
    build_instances([HERE / "text.txt"], shard, tokenizer, config, random_seed=RANDOM_SEED)
    return {
        name: hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in read_shard(shard).items()
    }


def main() -> None:
    """Remake both files."""
    vocab = train_vocabulary([HERE / "text.txt"], vocab_size=300, do_lower_case=True)
    (HERE / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    shard = HERE / "remade.hdf5"
    expected = {name: array_hashes(config, shard) for name, config in CASES.items()}
    shard.unlink()
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
