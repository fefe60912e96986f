"""Where the tokens of a batch lie when its padding is left out."""

import torch

from zerobert.packing import pack


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
        assert 0 <= len(packing.places_T) - num_tokens < 16 * 128 // 32
        assert len(packing.places_T) % (16 * 128 // 32) == 0
        assert packing.places_T.unique().numel() == len(packing.places_T)
        assert mask.flatten()[packing.places_T[:num_tokens]].all()
        assert not mask.flatten()[packing.places_T[num_tokens:]].any()
        assert packing.cu_seqlens.tolist() == [0, *lengths.cumsum(0), len(packing.places_T)]
    assert len(sizes) < 20


def test_a_full_batch_keeps_all_places() -> None:
    packing = pack(torch.ones(3, 5, dtype=torch.int64))
    assert packing.places_T.tolist() == list(range(15))
    assert packing.cu_seqlens.tolist() == [0, 5, 10, 15, 15]
