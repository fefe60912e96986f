"""Run tasks on several cores, in order, with little waiting in memory; show how far they are."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from zerobert.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Enough that no worker waits for the reader, few enough that memory stays flat.
_TASKS_PER_WORKER = 3


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int
) -> Iterator[Result]:
    """The results of `function`, in the order of the tasks, whatever the number of workers.

    One worker is this process itself. Tasks are drawn as they are needed. However this ends, no
    worker process is left behind.

    Raises:
        DataError: a worker process was killed; or what `function` raises.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    with _executor(workers) as executor:
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        iterator = iter(tasks)
        try:
            for task in itertools.islice(iterator, workers * _TASKS_PER_WORKER):
                pending.append(executor.submit(function, task))
            while pending:
                result = pending.popleft().result()
                pending.extend(
                    executor.submit(function, task) for task in itertools.islice(iterator, 1)
                )
                yield result
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, most often because memory ran out; "
                "run the same command again with a lower --workers"
            ) from error


@contextlib.contextmanager
def _executor(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    # Spawned, not forked: the tokenizers library has threads, which a fork would break.
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    others = set(multiprocessing.active_children())
    try:
        yield executor
    except BaseException:
        # Nobody wants the results of the tasks that are under way any more.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, use one thread, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def progress(items: Iterable[Task], *, label: str, total: int | None, unit: str) -> Iterator[Task]:
    """The items, with a bar on stderr where that is a terminal."""
    yield from tqdm(items, desc=label, total=total, unit=unit, disable=None, mininterval=0.5)
