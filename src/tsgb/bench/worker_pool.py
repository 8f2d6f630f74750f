"""The processes that run a bench: a pool on this machine, and the ranks that `torchrun` starts."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from .records import Key
from .work import Job, Worker

__all__ = ["Begun", "Task", "WorkerPool", "on_rank_0", "ranks", "threads"]

MOST_WORKERS = 8
WAIT = timedelta(days=7)  # of a rank for the others, which may have slower images

Begun = Callable[[int], AbstractContextManager[Callable[[int], object]]]
Task = tuple[str, tuple[Any, ...], frozenset[Key]]  # "images" or "grids", which, and what of them is done


class WorkerPool:
    """The worker processes of a rank.

    Args:
        worker: that of this process. ``rank`` and ``world``: this rank, and the number of ranks.
        workers: processes of this rank. By default, one a core, at most 8; only this one on a GPU.
        begun: a context manager for progress, see `tsgb.bench.run`.
    """

    def __init__(self, worker: Worker, rank: int, world: int, workers: int | None, begun: Begun) -> None:
        self._worker, self._rank, self._world, self._begun = worker, rank, world, begun
        on_cpu = all(p.device.type == "cpu" for p in worker.model.parameters())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._workers = workers or (max(1, min(MOST_WORKERS, cores // here)) if on_cpu else 1)

    def work(self, tasks: Sequence[Task]) -> None:
        """Run this rank's part of the tasks, and wait for the other ranks.

        Raises:
            RuntimeError: a process was killed.
        """
        mine = tasks[self._rank :: self._world]
        with self._begun(sum(len(task[1]) for task in mine)) as done:
            if min(self._workers, len(mine)) <= 1:
                for task in mine:
                    _do(self._worker, task)
                    done(len(task[1]))
            else:
                self._spread(mine, done)
        if self._world > 1:
            distributed.barrier()

    def _spread(self, mine: Sequence[Task], done: Callable[[int], object]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork after torch has run threads may hang
        count = min(self._workers, len(mine))
        with ProcessPoolExecutor(count, context, _enter, (self._worker.job, self._rank)) as pool:
            futures = {pool.submit(_do_here, task): len(task[1]) for task in mine}
            try:
                for future in as_completed(futures):
                    future.result()
                    done(futures[future])
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a process of the bench was killed, perhaps for lack of memory: the same arguments resume it; "
                    "a smaller --batch-size needs another --out"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():  # do not wait for unfinished tasks
                    process.terminate()
                raise


_workers: list[Worker] = []  # of a process of the pool, its own


def _enter(job: Job, rank: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _workers[:] = [Worker(job, rank)]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed


def _do_here(task: Task) -> None:
    _do(_workers[0], task)


def _do(worker: Worker, task: Task) -> None:
    (worker.do_images if task[0] == "images" else worker.do_grids)(task[1], task[2])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many threads. The last digits of a sum depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Join the ranks that `torchrun` started, if any; yield the rank and the number of ranks."""
    if distributed.is_initialized():
        yield distributed.get_rank(), distributed.get_world_size()
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
    else:
        distributed.init_process_group("gloo", timeout=WAIT)
        try:
            yield distributed.get_rank(), distributed.get_world_size()
        finally:
            distributed.destroy_process_group()


def on_rank_0(rank: int, do: Callable[[], Any]) -> Any:
    """Call a function on rank 0 only; return its result, or raise its error, on every rank."""
    outcome: list[Any] = [None, None]  # result, error
    if rank == 0:
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = error
    if distributed.is_initialized():
        distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
