"""What a method costs: time as a multiple of a forward, memory as a multiple of a plain gradient's."""

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
from .records import Record
from .work import Job, Worker

__all__ = ["memory", "speed"]

ROUNDS = 5

#: The last unit that each measurement writes down.
UNITS = {"speed": f"round-{ROUNDS - 1}", "memory": "process"}


def speed(worker: Worker) -> Iterator[Record]:
    """Time every method on the first pictures, one target an image, beside a forward under inference mode.

    Rounds are interleaved: each runs the forward and then every method once, so that what disturbs the machine disturbs
    all. A first round warms up and is not counted.

    Yields:
        One record for each round and method.
    """
    images, targets = _batch(worker)
    broken: dict[str, str] = {}
    for number in range(-1, ROUNDS):
        forward = _seconds(partial(_forward, worker.model, images), images)
        for method in worker.job.methods:
            values, errors = [], [broken[method]] if method in broken else []
            if not errors:
                try:
                    spent = _seconds(partial(methods.attribute, method, worker.model, images, targets), images)
                    values = [("speed", -1, spent / forward)]
                except Exception as error:  # a rival may raise anything
                    broken[method] = one_line(error)
                    errors = [broken[method]]
            if number >= 0:
                yield {"unit": f"round-{number}", "index": number, "method": method, "values": values, "errors": errors}


def memory(job: Job) -> Iterator[Record]:
    """Measure how far each method lifts the highest resident set above that of the loaded model and the input.

    On a GPU the memory allocated there. Each in a fresh process; divided by what a plain input gradient needs.

    Yields:
        One record for each method.
    """
    plain = _in_fresh_process(job, "")
    for method in job.methods:
        values, errors = [], []
        try:
            values = [("memory", -1, _in_fresh_process(job, method) / plain)]
        except Exception as error:  # a rival may raise anything
            errors = [one_line(error)]
        yield {"unit": "process", "index": 0, "method": method, "values": values, "errors": errors}


def _batch(worker: Worker) -> tuple[Tensor, Tensor]:
    """The first readable pictures, as many as a batch holds, and their predicted classes (N, 1)."""
    tensors: list[Tensor] = []
    for sample in worker.dataset.samples:
        try:
            tensors.append(worker.tensor(sample.read()))
        except ValueError:
            continue
        if len(tensors) == worker.job.batch_size:
            break
    images = torch.stack(tensors)
    return images, _forward(worker.model, images).argmax(1, keepdim=True)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits.clone()


def _gradient(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """A plain gradient at the image, of weights that ask for none."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(model(leaf).gather(1, targets).sum(), leaf)


def _seconds(run: Callable[[], object], images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    run()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


def _in_fresh_process(job: Job, method: str) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_lifted, job, method).result()


def _lifted(job: Job, method: str) -> float:
    """Bytes by which a method, or with "" a plain gradient, lifts the peak of this process."""
    images, targets = _batch(worker := Worker(job))
    if method:  # what it imports is no part of what it needs
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
