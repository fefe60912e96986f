"""Which failures of a collective are a lost connection."""

import pytest
import torch.distributed as dist

from zerobert import distributed
from zerobert.errors import ConnectionLostError

# As torch 2.13 words them.
LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 30000ms "
    "for recv operation to complete",
    "NCCL communicator was aborted on rank 3",
]


@pytest.mark.parametrize("words", LOST)
def test_a_lost_connection_is_told_as_one(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with (
        pytest.raises(ConnectionLostError, match="the same command goes on"),
        distributed.connected(),
    ):
        raise RuntimeError(words)


def test_torch_s_own_class_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConnectionLostError), distributed.connected():
        raise dist.DistBackendError("anything")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), distributed.connected():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    with pytest.raises(RuntimeError, match="gloo"), distributed.connected():
        raise RuntimeError(LOST[0])
