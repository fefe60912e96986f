"""Fine-tuning in the tests' own process. Its group stays: DeepSpeed holds on to the first."""

import os
import signal

import pytest
import torch

from zerobert import engine

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_of_the_group: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _alone():
    """One process on one thread: matrices this small are slower on more. What it sets is undone."""
    before = dict(os.environ)
    for name in _RENDEZVOUS:
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", **_of_the_group}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _of_the_group.update({k: v for k, v in os.environ.items() if k in _RENDEZVOUS})
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def group(_alone) -> None:
    """A process group of this process."""
    engine.init_distributed()
