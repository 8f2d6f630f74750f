"""Run a bench: distribute the work, keep a journal, resume after a kill, and write the results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import methods, render
from ..data import fingerprint
from ..models import sha256
from . import cost, records, results
from .precomputed_maps import MAP_METRICS, precomputed_methods
from .protocol import CONFIDENCES, FIGURES, GRIDS, LARGEST_GRIDS, METRICS, figures, is_asked
from .records import Key, Record
from .samples import grids
from .work import Grid, Job, Worker
from .worker_pool import Begun, Task, WorkerPool, on_rank_0, ranks, threads

__all__ = ["run"]

_PACKAGES = ("tsgb", "torch", "numpy", "pillow", "torchvision", "timm", "captum", "zennit", "pycocotools")


def run(
    job: Job,
    limit: int | None = None,
    workers: int | None = None,
    begun: Begun = lambda count: nullcontext(lambda done: None),
) -> dict[str, Any]:
    """Evaluate methods on annotated images. Records go to ``records.jsonl`` at once, the results follow at the end.

    Every process computes with one thread and every batch has the same images, so the results depend neither on the
    number of processes nor on how often the run was killed and resumed. Under ``torchrun`` the ranks share the work and
    need the ``out`` folder in common. A resumed run does not retry failures; choose another ``out`` for that.

    Args:
        job: see `tsgb.bench.job`. ``limit``: how many images of the dataset, by default all.
        workers: processes of this rank. By default, one a core, at most 8; only this one if the network is on a GPU.
            ``job.load`` must be picklable for more than one.
        begun: a context manager for progress, called with the number of images, later of grids. It yields a function
            that is called with the number of units just finished.

    Returns:
        The results, as ``results.json`` has them; {} on a rank other than 0.

    Raises:
        ValueError: a method or metric is unknown, ``limit`` is not positive, or ``out`` has another bench.
        OSError: ``out`` cannot be written. RuntimeError: a process was killed, or another bench writes to ``out``.

    Example:
        >>> import functools, tempfile, tsgb
        >>> what = {"methods": ["tsgb-fused", "gradcam"], "metrics": ["pointing"], "out": tempfile.mkdtemp()}
        >>> found = run(tsgb.bench.job(functools.partial(tsgb.load, "bundled"), **what), limit=2, workers=1)
        >>> [(row["method"], row["n"]) for row in found["rows"] if row["metric"] == "pointing"]
        [('tsgb-fused', 2), ('gradcam', 2)]
    """
    _check(job, limit)
    usual = torch.get_num_threads()
    with ranks() as (rank, world), threads(1):
        worker = Worker(job, rank)
        count = len(worker.samples) if limit is None else min(len(worker.samples), limit)
        protocol = on_rank_0(rank, lambda: _protocol(worker, count))
        on_rank_0(rank, lambda: _begin(job.out, protocol))
        with records.lock(job.out) if rank == 0 else nullcontext():
            known = on_rank_0(rank, lambda: _known(job.out))
            pool = WorkerPool(worker, rank, world, workers, begun)
            pool.work(_image_tasks(worker, count, known))
            planned, confidence = on_rank_0(rank, lambda: _planned(job))
            pool.work(_grid_tasks(planned, job, known))
            if rank > 0:
                return {}
            with threads(usual):
                _measure(worker, count, known)
            found = list(_journal(job.out).values())
            worker.draw_worst(found)
            counts = {"confidence": confidence, "grids": _by_side(planned)} if planned else {}
            return results.write(job, {**protocol, **counts}, found, worker.dataset.problems)


def _image_tasks(worker: Worker, count: int, known: dict[Key, Record]) -> list[Task]:
    size, methods = worker.job.batch_size, worker.job.methods
    tasks: list[Task] = []
    for start in range(0, count, size):
        indices = tuple(range(start, min(start + size, count)))
        units = [worker.samples[index].name for index in indices]
        if all(_is_done(unit, methods, known) for unit in units):
            continue
        done = frozenset((unit, method) for unit in units for method in ("", *methods) if (unit, method) in known)
        tasks.append(("images", indices, done))
    return tasks


def _is_done(unit: str, methods: Sequence[str], known: dict[Key, Record]) -> bool:
    note = known.get((unit, ""))
    return note is not None and (not note["evaluated"] or all((unit, method) in known for method in methods))


def _planned(job: Job) -> tuple[list[Grid], float | None]:
    """Plan grids of images that the network predicts with confidence; return them and that confidence."""
    if not is_asked(job.metrics, "grid", "grid_ap"):
        return [], None
    sure = [
        (record["index"], *record["confidence"])
        for record in _journal(job.out).values()
        if record["method"] == "" and record.get("confidence")
    ]
    enough = 4 * LARGEST_GRIDS
    confidence = next((c for c in CONFIDENCES if sum(p >= c for *_, p in sure) >= enough), CONFIDENCES[-1])
    candidates = [(index, target) for index, target, p in sure if p >= confidence]
    planned = [
        # No image has a name that begins with a slash.
        Grid(f"/grid{suffix}/{number:04d}", *zip(*entries, strict=True))
        for suffix, side in GRIDS.items()
        for number, entries in enumerate(grids(candidates, side, LARGEST_GRIDS, job.seed))
    ]
    return planned, confidence


def _by_side(planned: Sequence[Grid]) -> dict[str, int]:
    return {f"grid{suffix}": sum(len(grid.indices) == side**2 for grid in planned) for suffix, side in GRIDS.items()}


def _grid_tasks(planned: Sequence[Grid], job: Job, known: dict[Key, Record]) -> list[Task]:
    tasks: list[Task] = []
    for cells in sorted({len(grid.indices) for grid in planned}):
        same = [grid for grid in planned if len(grid.indices) == cells]
        size = max(1, job.batch_size // cells)  # as many pixels as in a batch of images
        for start in range(0, len(same), size):
            batch = tuple(same[start : start + size])
            done = frozenset((g.unit, m) for g in batch for m in job.methods if (g.unit, m) in known)
            if len(done) < len(batch) * len(job.methods):
                tasks.append(("grids", batch, done))
    return tasks


def _measure(worker: Worker, count: int, known: dict[Key, Record]) -> None:
    """Measure time and memory, unless the journal has them."""
    for name in ("speed", "memory"):
        if name in worker.job.metrics and not all((cost.UNITS[name], m) in known for m in worker.job.methods):
            for record in cost.measure(name, worker, count):
                if records.key(record) not in known:
                    records.append(worker.journal, [record])


def _check(job: Job, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more images, got {limit}")
    precomputed = precomputed_methods(job.maps) if job.maps is not None else ()
    for kind, asked, known in (
        ("method", job.methods, (*precomputed, *methods.METHODS)),
        ("metric", job.metrics, METRICS),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"{name!r} is no {kind}: choose among {', '.join(known)}")
        if not asked or len(set(asked)) < len(asked):
            raise ValueError(f"{kind}s must be one or more, each once, got {', '.join(asked) or 'none'}")
    unfit = [metric for metric in job.metrics if metric not in MAP_METRICS]
    if unfit and any(method in precomputed for method in job.methods):
        raise ValueError(
            f"precomputed maps cannot be evaluated with {', '.join(unfit)}: choose among {', '.join(MAP_METRICS)}"
        )


def _protocol(worker: Worker, count: int) -> dict[str, Any]:
    """Return everything that the results depend on."""
    job, network = worker.job, worker.network
    code = Path(network.spec.rpartition(":")[0])
    protocol = {
        "model": network.spec,
        "weights": network.weights,
        "weights_sha256": network.weights_sha256,
        **({"code_sha256": sha256(code)} if code.suffix == ".py" else {}),
        "preprocessing": network.preprocessing.record(),
        "data": worker.dataset.name,
        "layout": worker.dataset.layout,
        **({} if job.data is None else {"data_sha256": fingerprint(Path(job.data))}),
        **({} if job.maps is None else {"maps_sha256": fingerprint(job.maps)}),
        **({} if job.images is None else {"slice": job.images}),
        "images": count,
        "seed": job.seed,
        "batch_size": job.batch_size,
        "methods": {name: _method(job, name) for name in job.methods},
        "metrics": {name: asdict(FIGURES[name]) for name in figures(job.metrics)},
        "asked": list(job.metrics),
        "versions": dict(_versions()),
    }
    return protocol


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _method(job: Job, name: str) -> dict[str, str]:
    if job.maps is not None and name in precomputed_methods(job.maps):
        return {"title": name, "source": "precomputed maps"}
    return {"title": methods.METHODS[name].title, "source": methods.METHODS[name].source}


def _begin(out: Path, protocol: dict[str, Any]) -> None:
    """Begin a journal, or resume that of the same bench."""
    file = out / "protocol.json"
    if file.exists():
        _check_same(file, protocol)
    elif out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no bench: choose another --out")
    else:
        render.save_text(json.dumps(protocol, indent=1) + "\n", file)


def _check_same(file: Path, protocol: dict[str, Any]) -> None:
    try:
        found = json.loads(file.read_text())
        different = [name for name in {**found, **protocol} if found.get(name) != protocol.get(name)]
    except (ValueError, TypeError):
        different = ["a protocol that cannot be read"]
    if different:
        held = f"{file.parent} holds another bench, which differs in {', '.join(different)}"
        raise ValueError(f"{held}: choose another --out, or remove it")


def _known(out: Path) -> dict[Key, Record]:
    """Read the records of earlier runs."""
    for journal in out.glob("records*.jsonl"):
        records.truncate_partial_line(journal)
    return _journal(out)


def _journal(out: Path) -> dict[Key, Record]:
    """Read the records of all ranks, each once."""
    return {records.key(record): record for file in sorted(out.glob("records*.jsonl")) for record in records.read(file)}
