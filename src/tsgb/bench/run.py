"""Run a bench: share the work out, keep a journal, go on after a kill, and write the results."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .. import methods, render
from ..report import versions
from . import cost, records, results
from .given import JUDGED, given_methods
from .protocol import CONFIDENCES, FIGURES, GRIDS, LARGEST_GRIDS, METRICS, figures, is_asked
from .records import Key, Record
from .subjects import grids
from .work import Grid, Job, Worker

__all__ = ["run"]

MOST_WORKERS = 8

Begun = Callable[[int], AbstractContextManager[Callable[[int], object]]]
Task = tuple[str, tuple[Any, ...], frozenset[Key]]  # what of the worker does it, what is to be done, what is already


def run(
    job: Job,
    limit: int | None = None,
    workers: int | None = None,
    begun: Begun = lambda count: nullcontext(lambda done: None),
) -> dict[str, Any]:
    """Judge methods on annotated pictures: keep ``records.jsonl`` as it goes, and write the results at the end.

    Every process computes with one thread and every batch holds the same pictures, so that the results do not depend on
    how many processes there are, nor on how often the run was killed and started again. Under ``torchrun`` the ranks
    share the work; they need the ``out`` folder in common.

    Args:
        job: what is to be done. ``limit``: the first so many pictures of the dataset; None takes all.
        workers: processes of this rank; None takes one a core, 8 at most, and this one alone where the network is on a
            GPU. More than one needs ``job.load`` and ``job.open`` to be picklable.
        begun: entered with the number of pictures (later grids) to be done; what it yields is called with how many more
            are done.

    Returns:
        The results, as ``results.json`` has them; {} on a rank other than 0.

    Raises:
        ValueError: a method or metric is unknown, or ``out`` holds another bench.
        OSError: ``out`` cannot be written.
    """
    _check(job)
    threads = torch.get_num_threads()
    with _ranks() as (rank, world), _threads(1):
        worker = Worker(job, rank)
        count = min(len(worker.dataset.samples), len(worker.dataset.samples) if limit is None else limit)
        protocol = _protocol(worker, count)
        known: dict[Key, Record] = {}
        if rank == 0:
            _begin(job.out, protocol)
            known = _journal(job.out)
        known = _told(known)
        share = _Share(worker, rank, world, workers, begun)
        share.work(_picture_tasks(worker, count, known))
        planned, confidence = _told(_planned(job) if rank == 0 else None)
        share.work(_grid_tasks(planned, job, known))
        if rank == 0:
            with _threads(threads):
                _measure(worker, known)
        if rank > 0:
            return {}
        found = list(_journal(job.out).values())
        counts = {"confidence": confidence} if planned else {}
        return results.write(job, {**protocol, **counts}, found, worker.dataset.problems)


class _Share:
    """A rank's share of the work, and the processes that do it."""

    def __init__(self, worker: Worker, rank: int, world: int, workers: int | None, begun: Begun) -> None:
        self.worker, self.rank, self.world, self.begun = worker, rank, world, begun
        on_cpu = all(p.device.type == "cpu" for p in worker.model.parameters())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = workers or (max(1, min(MOST_WORKERS, cores // here)) if on_cpu else 1)

    def work(self, tasks: Sequence[Task]) -> None:
        """Do this rank's part of the tasks, and wait until all ranks have done theirs."""
        mine = tasks[self.rank :: self.world]
        with self.begun(sum(len(task[1]) for task in mine)) as done:
            if min(self.workers, len(mine)) <= 1:
                for task in mine:
                    _do(self.worker, task)
                    done(len(task[1]))
            else:
                self._spread(mine, done)
        if self.world > 1:
            distributed.barrier()

    def _spread(self, mine: Sequence[Task], done: Callable[[int], object]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork after torch has run threads may hang
        count = min(self.workers, len(mine))
        with ProcessPoolExecutor(count, context, _enter, (self.worker.job, self.rank)) as pool:
            futures = {pool.submit(_do_here, task): len(task[1]) for task in mine}
            try:
                for future in as_completed(futures):
                    future.result()
                    done(futures[future])
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a process of the bench was killed, perhaps for want of memory: start again with the same arguments "
                    "to go on, or in another --out with a smaller --batch-size"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_workers: list[Worker] = []  # of a process of the pool, its own


def _enter(job: Job, rank: int) -> None:
    torch.set_num_threads(1)
    _workers[:] = [Worker(job, rank)]


def _do_here(task: Task) -> None:
    _do(_workers[0], task)


def _do(worker: Worker, task: Task) -> None:
    (worker.do_pictures if task[0] == "pictures" else worker.do_grids)(task[1], task[2])


def _picture_tasks(worker: Worker, count: int, known: dict[Key, Record]) -> list[Task]:
    size, methods = worker.job.batch_size, worker.job.methods
    tasks: list[Task] = []
    for start in range(0, count, size):
        indices = tuple(range(start, min(start + size, count)))
        units = [worker.dataset.samples[index].name for index in indices]
        if all(_is_done(unit, methods, known) for unit in units):
            continue
        done = frozenset((unit, method) for unit in units for method in ("", *methods) if (unit, method) in known)
        tasks.append(("pictures", indices, done))
    return tasks


def _is_done(unit: str, methods: Sequence[str], known: dict[Key, Record]) -> bool:
    note = known.get((unit, ""))
    return note is not None and (not note["judged"] or all((unit, method) in known for method in methods))


def _planned(job: Job) -> tuple[list[Grid], float | None]:
    """The grids of the pictures that the network is sure of, and how sure it has to be."""
    if not is_asked(job.metrics, "grid", "grid_ap"):
        return [], None
    sure = [
        (record["index"], *record["confidence"])
        for record in _journal(job.out).values()
        if record["method"] == "" and record.get("confidence")
    ]
    enough = 4 * LARGEST_GRIDS
    confidence = next((c for c in CONFIDENCES if sum(p >= c for *_, p in sure) >= enough), CONFIDENCES[-1])
    pool = [(index, target) for index, target, p in sure if p >= confidence]
    planned = [
        Grid(f"grid{suffix}-{number:04d}", indices)
        for suffix, side in GRIDS.items()
        for number, indices in enumerate(grids(pool, side, LARGEST_GRIDS, job.seed))
    ]
    return planned, confidence


def _grid_tasks(planned: Sequence[Grid], job: Job, known: dict[Key, Record]) -> list[Task]:
    tasks: list[Task] = []
    for cells in sorted({len(grid.indices) for grid in planned}):
        same = [grid for grid in planned if len(grid.indices) == cells]
        size = max(1, job.batch_size // cells)  # as many pixels as a batch of pictures
        for start in range(0, len(same), size):
            batch = tuple(same[start : start + size])
            done = frozenset((g.unit, m) for g in batch for m in job.methods if (g.unit, m) in known)
            if len(done) < len(batch) * len(job.methods):
                tasks.append(("grids", batch, done))
    return tasks


def _measure(worker: Worker, known: dict[Key, Record]) -> None:
    """Measure time and memory, unless it was done."""
    for name in ("speed", "memory"):
        if name in worker.job.metrics and not all((cost.UNITS[name], m) in known for m in worker.job.methods):
            for record in cost.speed(worker) if name == "speed" else cost.memory(worker.job):
                if records.key(record) not in known:
                    records.append(worker.journal, [record])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads; the last digits of a sum depend on how many share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """Join the ranks that `torchrun` has started, if it has: rank and number of ranks."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or distributed.is_initialized():
        yield (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        return
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), world
    finally:
        distributed.destroy_process_group()


def _told(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    if not distributed.is_initialized():
        return value
    told = [value]
    distributed.broadcast_object_list(told)
    return told[0]


def _check(job: Job) -> None:
    for kind, asked, known in (
        ("method", job.methods, tuple(methods.METHODS)),
        ("metric", job.metrics, tuple(METRICS)),
    ):
        if job.maps is not None:
            known = given_methods(job.maps) if kind == "method" else JUDGED
        for name in asked:
            if name not in known:
                where = "" if job.maps is None else " of given maps"
                raise ValueError(f"{name!r} is no {kind}{where}: choose among {', '.join(known)}")
        if not asked or len(set(asked)) < len(asked):
            raise ValueError(f"{kind}s must be one or more, each once, got {', '.join(asked) or 'none'}")


def _protocol(worker: Worker, count: int) -> dict[str, Any]:
    """Everything that the results depend on."""
    job, network = worker.job, worker.network
    return {
        "model": network.spec,
        "weights": network.weights,
        "weights_sha256": network.weights_sha256,
        "preprocessing": network.preprocessing.record(),
        "data": worker.dataset.name,
        "layout": worker.dataset.layout,
        "images": count,
        "seed": job.seed,
        "batch_size": job.batch_size,
        "methods": {name: _method(job, name) for name in job.methods},
        "metrics": {name: asdict(FIGURES[name]) for name in figures(job.metrics)},
        "asked": list(job.metrics),
        "versions": versions(),
    }


def _method(job: Job, name: str) -> dict[str, str]:
    if job.maps is not None:
        return {"title": name, "source": "given maps"}
    return {"title": methods.METHODS[name].title, "source": methods.METHODS[name].source}


def _begin(out: Path, protocol: dict[str, Any]) -> None:
    """Begin a journal, or go on with that of the same bench."""
    file = out / "protocol.json"
    text = json.dumps(protocol, indent=1) + "\n"
    if file.exists():
        if file.read_text() != text:
            raise ValueError(f"{out} holds another bench (see {file}): choose another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no bench: choose another --out")
    else:
        render.save_text(text, file)
    for journal in out.glob("records*.jsonl"):
        records.mend(journal)


def _journal(out: Path) -> dict[Key, Record]:
    """All records of all ranks, each once."""
    return {records.key(record): record for file in sorted(out.glob("records*.jsonl")) for record in records.read(file)}
