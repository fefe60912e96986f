"""Run tasks on several cores or machines, in order, with little waiting in memory."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from zerobert.errors import ConfigError, DataError, MissingDependencyError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Enough that no worker waits for the reader, few enough that memory stays flat.
_TASKS_PER_WORKER = 3


class Pool:
    """Where tasks run: this process, others of this machine, or a Dask cluster."""

    def __init__(self, submit: Callable[..., Any] | None, num_workers: int) -> None:
        """Take what starts a task and returns its future; None runs tasks in this process."""
        self._submit = submit
        self._num_workers = num_workers
        self._num_waiting = num_workers * _TASKS_PER_WORKER

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results of `function`, in the order of the tasks, which are drawn as they are needed.

        Raises:
            DataError: a worker was killed or the cluster is gone; or what `function` raises.
        """
        if self._submit is None:
            yield from map(function, tasks)
            return
        iterator = iter(tasks)
        pending = collections.deque(
            self._submit(function, task) for task in itertools.islice(iterator, self._num_waiting)
        )
        while pending:
            try:
                result = pending.popleft().result()
            except BrokenProcessPool as error:
                raise DataError(_KILLED_MESSAGE) from error
            pending.extend(self._submit(function, task) for task in itertools.islice(iterator, 1))
            yield result

    def read(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The same for a function that reads files and leaves Python alone meanwhile."""
        return self.map(function, tasks)


class _LocalPool(Pool):
    """A pool of this machine."""

    def read(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Threads, which read while processes are still starting."""
        with concurrent.futures.ThreadPoolExecutor(self._num_workers) as threads:
            yield from threads.map(function, tasks)


_KILLED_MESSAGE = (
    "a worker process was killed, most often because memory ran out; "
    "run the same command again with a lower --workers"
)
_CLUSTER_MESSAGE = (
    "the Dask cluster gave the work up: the scheduler is gone, or workers were killed, most often "
    "because memory ran out; start them anew and run the same command again"
)


@contextlib.contextmanager
def pool(workers: int, dask_scheduler: str | None = None) -> Iterator[Pool]:
    """Start workers, once for all the work of a command; however it ends, none is left behind.

    Args:
        workers: processes of this machine; 1 is this process itself.
        dask_scheduler: address of a Dask scheduler, whose workers are used instead.

    Raises:
        ConfigError: no scheduler answers at the address.
        MissingDependencyError: Dask is not installed.
    """
    if dask_scheduler is not None:
        with _dask_pool(dask_scheduler) as cluster:
            yield cluster
    elif workers == 1:
        yield _LocalPool(None, 1)
    else:
        with _processes(workers) as executor:
            yield _LocalPool(functools.partial(_submit, executor), workers)


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    # Spawned, not forked: the tokenizers library has threads, which a fork would break.
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    others = set(multiprocessing.active_children())
    try:
        for _ in range(workers):  # they start while the parent looks at its input
            _submit(executor, str, "")
        yield executor
    except BaseException:
        # Nobody wants the results of the tasks that are under way any more.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        # The executor's thread may be in the middle of a message from a worker that is no more. It
        # sees the pipe's end only when this process closes its own copy of that end.
        queues: Any = executor
        queues._result_queue._writer.close()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(
    executor: concurrent.futures.ProcessPoolExecutor, function: Callable[[Task], Result], task: Task
) -> "concurrent.futures.Future[Result]":
    """Start a task, and the process for it where there are too few.

    Ctrl-C is for the parent alone: a process that is started while it is blocked never sees it, not
    even during its imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(function, task)
    except BrokenProcessPool as error:  # a worker died since the last result came
        raise DataError(_KILLED_MESSAGE) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Use one thread, and end when the parent is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _dask_pool(address: str) -> Iterator[Pool]:
    import asyncio  # here: to load it takes longer than many a command

    try:
        from distributed import Client, KilledWorker
        from distributed.comm.core import CommClosedError
    except ImportError as error:
        raise MissingDependencyError(
            "--dask_scheduler needs Dask; install it with `pip install distributed`"
        ) from error
    connect: Any = Client
    cancelled = (concurrent.futures.CancelledError, asyncio.CancelledError)
    try:
        asyncio.run(_knock(address))
        client: Any = connect(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        raise ConfigError(
            f"--dask_scheduler: no scheduler answers at {address!r} "
            f"({str(error) or f'none within {_CONNECT_S} s'}); "
            "start one with `dask scheduler`, and workers with `dask worker ADDRESS`"
        ) from error
    # What they log when the scheduler or the user ends the work, the user gets in one line.
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise ConfigError(
                f"--dask_scheduler: the scheduler at {address!r} has no workers; "
                f"start some with `dask worker {address}`"
            )
        try:
            # Not by client.get_executor(): where the scheduler goes while a result is fetched, its
            # futures never end.
            yield Pool(functools.partial(client.submit, pure=False), threads)
        except (KilledWorker, CommClosedError, *cancelled) as error:
            raise DataError(_CLUSTER_MESSAGE) from error


async def _knock(address: str) -> None:
    """Fail where no scheduler answers: a client waits for ever where something else does (the
    scheduler's dashboard, say), and complains at its end.
    """
    import asyncio

    from distributed.comm.core import connect

    to_address: Any = connect
    comm: Any = await asyncio.wait_for(to_address(address, timeout=_CONNECT_S), _CONNECT_S)
    await comm.close()


_CONNECT_S = 10


def progress(
    items: Iterable[Any], *, label: str, sizes: Sequence[int], skipped: int = 0
) -> Iterator[Any]:
    """The items, with a bar on stderr where that is a terminal: how much, how fast, how long still.

    Args:
        sizes: of each item, in bytes of text.
        skipped: bytes that an earlier run has done.
    """
    with tqdm(
        desc=label,
        total=sum(sizes) + skipped,
        initial=skipped,
        unit="B",
        unit_scale=True,
        disable=None,
        mininterval=0.5,
    ) as bar:
        for item, size in zip(items, sizes, strict=True):
            bar.update(size)
            yield item
