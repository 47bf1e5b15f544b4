"""Processes that make batches ahead of time, and what is said when one of them hangs or dies."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing.context import BaseContext
from types import FrameType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")

_PREFETCH = 2  # batches that each worker has ready
_LOOK_SECONDS = 5.0  # between two looks at whether the workers live
_GRACE_SECONDS = 30  # that a worker goes on after SIGTERM


def iterate(items: Dataset[T], count: int, workers: int, timeout: float) -> Generator[T]:
    """Items 0 .. count - 1 of a dataset in order, made in `workers` processes; 0 makes them in this one.

    timeout: seconds to wait for an item; 0 waits for ever

    Close it when you stop before the end: it ends its workers at once then. Left to the garbage collector it takes
    seconds for each, for that may close the queues first through which they are told to end.

    Raises:
        RuntimeError: where a worker ends, or gives no item in time
    """
    if workers == 0 or count == 0:
        for number in range(count):
            yield items[number]
        return
    loader = DataLoader(
        items,
        batch_size=None,  # an item is a whole batch
        sampler=range(count),
        num_workers=min(workers, count),
        prefetch_factor=_PREFETCH,
        pin_memory=torch.cuda.is_available(),
        # A short wait, repeated: the loader looks whether its workers live only when a wait has ended.
        timeout=min(timeout or _LOOK_SECONDS, _LOOK_SECONDS),
        multiprocessing_context=_context(),
        worker_init_fn=_settle_worker,
    )
    iterator = iter(loader)
    try:
        for _ in range(count):
            yield _next(iterator, timeout)
    finally:
        del iterator  # ends the workers


def _next(iterator: Iterator[T], timeout: float) -> T:
    began = time.monotonic()
    while True:
        try:
            return next(iterator)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            message = str(error)
            timed_out, ended = "DataLoader timed out" in message, "exited unexpectedly" in message
            in_worker = "in DataLoader worker process" in message  # raised by the item itself
            if in_worker or (isinstance(error, RuntimeError) and not timed_out and not ended):
                raise
            if not timed_out:  # it ended, or the loader met the gap that it left
                raise RuntimeError(
                    f"a data worker died ({message}): often the machine is out of memory, or out of shared memory "
                    f"(/dev/shm); lower data.workers or train.micro_batch, or set data.workers to 0."
                ) from error
            if timeout and time.monotonic() - began >= timeout:
                raise RuntimeError(
                    f"no data worker gave a batch within data.timeout = {timeout:g} s: it hangs or its storage does; "
                    f"check the storage, raise data.timeout, or set data.workers to 0 to see where it stops."
                ) from error


@functools.cache
def _context() -> BaseContext:
    """Workers are forked from a small server that has only loaded this package.

    A fork of the training process would take over its threads' locks, its signal handlers and its GPU state.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.fork_server", f"{__package__}.loading"])
    return context


def _settle_worker(_: int) -> None:
    """A worker leaves signals to the training process, which may want to finish a step and save first.

    Launchers and schedulers signal whole process groups. SIGTERM is how the training process itself ends a worker that
    does not answer, so it is delayed rather than ignored; a second one ends the worker at once.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_with_parent() -> None:
    """End this worker when the training process is gone, however it ended.

    Torch's own check looks at the parent, which is the fork server, and a worker that hands over a batch waits for a
    reader for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_GRACE_SECONDS)
