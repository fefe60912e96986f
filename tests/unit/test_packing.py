"""Where the tokens of a batch lie when its padding is left out."""

import torch

from zerobert.packing import NUM_SHAPES, pack


def test_places_and_starts() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    packing = pack(mask)
    assert packing.places_T.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 8, 8]
    assert packing.cu_seqlens.dtype == torch.int32


def test_the_number_of_tokens_is_round_and_every_place_is_there_once() -> None:
    torch.manual_seed(0)
    sizes = set()
    for _ in range(50):
        lengths = torch.randint(1, 129, (16,))
        mask = (torch.arange(128) < lengths[:, None]).long()
        packing = pack(mask)
        num_tokens = int(lengths.sum())
        sizes.add(len(packing.places_T))
        assert 0 <= len(packing.places_T) - num_tokens < 16 * 128 // NUM_SHAPES
        assert len(packing.places_T) % (16 * 128 // NUM_SHAPES) == 0
        assert packing.places_T.unique().numel() == len(packing.places_T)
        assert mask.flatten()[packing.places_T[:num_tokens]].all()
        assert not mask.flatten()[packing.places_T[num_tokens:]].any()
        assert packing.cu_seqlens.tolist() == [0, *lengths.cumsum(0), len(packing.places_T)]
    assert len(sizes) < NUM_SHAPES // 2


def test_what_is_filled_up_at_the_end_is_in_parts_no_longer_than_a_row() -> None:
    """Kernels are told how long a row is at most, and leave what is longer as it was."""
    torch.manual_seed(0)
    for num_shapes in (NUM_SHAPES, 8):
        counts = set()
        for _ in range(50):
            mask = (torch.arange(16) < torch.randint(1, 17, (100, 1))).long()
            packing = pack(mask, num_shapes)
            lengths = packing.cu_seqlens.diff()
            assert torch.equal(lengths[:100], mask.sum(1).int())
            assert 0 <= lengths.min() <= lengths.max() <= 16
            assert packing.cu_seqlens[-1] == len(packing.places_T)
            assert len(packing.places_T) % (100 * 16 // num_shapes) in (0, 100 * 16 % num_shapes)
            counts.add(len(packing.cu_seqlens))
        assert len(counts) == 1  # one shape, for compiled code


def test_a_full_batch_keeps_all_places() -> None:
    packing = pack(torch.ones(3, 5, dtype=torch.int64))
    assert packing.places_T.tolist() == list(range(15))
    assert packing.cu_seqlens.tolist() == [0, 5, 10, 15, 15]
