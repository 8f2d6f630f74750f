"""The cost of a method: time as a multiple of a forward, memory as a multiple of a plain gradient's."""

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import methods
from ..report import one_line
from .evaluate import Value
from .records import Record
from .work import Job, Worker

__all__ = ["UNITS", "measure"]

ROUNDS = 5

#: The last unit that each measurement writes down; no image's name begins with a slash.
UNITS = {"speed": f"/round/{ROUNDS - 1}", "memory": "/process"}


def measure(name: str, worker: Worker, count: int) -> Iterator[Record]:
    """Measure "speed" or "memory" of every method, on a batch of the first ``count`` images.

    Errors go into the records, for every method if nothing can be measured.

    Yields:
        One record for each round and method.
    """
    try:
        images, targets = _batch(worker, count)
        yield from _speed(worker, images, targets) if name == "speed" else _memory(worker.job, count)
    except Exception as error:
        for method in worker.job.methods:
            yield _record(UNITS[name], 0, method, [], f"{name}: {one_line(error)}")


def _speed(worker: Worker, images: Tensor, targets: Tensor) -> Iterator[Record]:
    """Time every method, one target an image, beside a forward under inference mode.

    Rounds are interleaved: each runs the forward and then every method once, so that disturbances affect all
    alike. The first round is a warm-up and is not counted.
    """
    broken: dict[str, str] = {}
    for number in range(-1, ROUNDS):
        forward = _seconds(partial(_forward, worker.model, images), images)
        for method in worker.job.methods:
            values: list[Value] = []
            if method not in broken:
                try:
                    spent = _seconds(partial(methods.attribute, method, worker.model, images, targets), images)
                    values.append(("speed", -1, spent / forward))
                except Exception as error:  # a method may raise anything
                    broken[method] = one_line(error)
            if number >= 0:
                yield _record(f"/round/{number}", number, method, values, broken.get(method))


def _memory(job: Job, count: int) -> Iterator[Record]:
    """Measure how far each method lifts the highest resident set above that of the loaded model and the input.

    On a GPU the memory allocated there. Each in a fresh process; divided by what a plain input gradient needs.
    """
    plain = _in_fresh_process(job, count, "")
    for method in job.methods:
        values: list[Value] = []
        broken = None
        try:
            values.append(("memory", -1, _in_fresh_process(job, count, method) / plain))
        except Exception as error:  # a method may raise anything
            broken = one_line(error)
        yield _record(UNITS["memory"], 0, method, values, broken)


def _record(unit: str, index: int, method: str, values: list[Value], error: str | None) -> Record:
    errors = [] if error is None else [error]
    return {"unit": unit, "index": index, "method": method, "values": values, "errors": errors}


def _batch(worker: Worker, count: int) -> tuple[Tensor, Tensor]:
    """The first readable images, as many as a batch holds, and their predicted classes (N, 1)."""
    tensors: list[Tensor] = []
    for index in range(count):
        try:
            tensors.append(worker.tensor(worker.samples[index].read()))
        except Exception:  # reported where it was evaluated
            continue
        if len(tensors) == worker.job.batch_size:
            break
    if not tensors:
        raise ValueError("none of the images can be read")
    images = torch.stack(tensors)
    return images, _forward(worker.model, images).argmax(1, keepdim=True)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits.clone()


def _gradient(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Compute a plain gradient at the image; the weights need none."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(model(leaf).gather(1, targets).sum(), leaf)


def _seconds(run: Callable[[], object], images: Tensor) -> float:
    if images.is_cuda:  # by the device's own clock
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(images.device)
        return float(before.elapsed_time(after)) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _in_fresh_process(job: Job, count: int, method: str) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_lifted, job, count, method).result()


def _lifted(job: Job, count: int, method: str) -> float:
    """Bytes by which a method, or with "" a plain gradient, lifts the peak of this process."""
    images, targets = _batch(worker := Worker(job), count)
    if method:  # imports do not count
        toy = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        ).eval()
        methods.attribute(method, toy, torch.rand(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64))
    function = partial(methods.attribute, method) if method else _gradient
    run = partial(function, worker.model, images, targets)
    if images.is_cuda:
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        run()
        return float(torch.cuda.max_memory_allocated(images.device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = _status("VmRSS")
        run()
        return float(_status("VmHWM") - before)
    except OSError as error:
        raise OSError("peak memory is read from /proc/self, which this system lacks") from error


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
