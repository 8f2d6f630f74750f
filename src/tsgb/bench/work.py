"""One process of a bench: it loads the network and the dataset, and turns images and grids into records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import images, methods
from ..categories import classes_of
from ..data import Dataset, Sample, open_dataset
from ..models import Network
from ..report import one_line
from . import gallery, records
from .cascade import cascade
from .evaluate import (
    PER_CASE,
    PER_IMAGE,
    ImageContext,
    Value,
    evaluate_case,
    evaluate_grid,
    evaluate_image,
    other_class,
    seed_of,
)
from .gallery import Gallery
from .precomputed_maps import folder_of, precomputed_methods, read_maps, slice_of
from .protocol import is_asked
from .samples import Classifier, EvalSample, compose, image_of, prepare_sample

__all__ = ["Grid", "Job", "Worker"]

Maps = dict[int, Tensor]  # class to map (H, W)


@dataclass(frozen=True)
class Job:
    """A description of a bench, sent to worker processes, which load the network and open the dataset themselves."""

    load: Callable[[], Network]
    data: str | Path | None
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    seed: int
    batch_size: int
    out: Path
    maps: Path | None = None  # a folder of precomputed maps, see `precomputed_maps`
    left_out: tuple[tuple[str, str], ...] = ()  # methods that do not run, and why
    images: str | None = None  # a Python slice of the dataset


@dataclass(frozen=True)
class Grid:
    """A grid of images: its name in the records, and the indices of its images and their classes, row by row."""

    unit: str
    indices: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class Prepared:
    """A sample as the network sees it, with its logits and the classes whose maps are needed."""

    sample: EvalSample
    logits: Tensor
    wanted: list[int]


class Worker:
    """A process's part in a job. Each ``rank`` has a journal of its own."""

    def __init__(self, job: Job, rank: int = 0) -> None:
        self.job = job
        self.gallery = Gallery(job.out)
        self.journal = job.out / ("records.jsonl" if rank == 0 else f"records-{rank}.jsonl")

    @cached_property
    def network(self) -> Network:
        """The network, loaded at first use."""
        return self.job.load()

    @cached_property
    def model(self) -> Classifier:
        """The network as one that returns logits (N, classes)."""
        return Classifier(self.network.model)

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, opened at first use."""
        return open_dataset(self.job.data)

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """The requested images of the dataset."""
        samples = self.dataset.samples
        if self.job.images is None:
            return samples
        found = samples[slice_of(self.job.images)]
        if not found:
            raise ValueError(f"images {self.job.images!r} takes none of the {len(samples)} of {self.dataset.name}")
        return found

    def do_images(self, indices: Sequence[int], done: frozenset[tuple[str, str]]) -> None:
        """Evaluate every method on a batch of images, and append the records that the journal lacks."""
        prepared = self._prepare(indices, done)
        if not prepared or not is_asked(self.job.metrics, *PER_CASE, *PER_IMAGE):
            return
        todo = [m for m in self.job.methods if any((one.sample.unit, m) not in done for one in prepared)]
        after = self._after(prepared, todo) if is_asked(self.job.metrics, "cascade") else {}
        for method in todo:
            found, drawn = [], self._maps(method, prepared, self.model)
            for one, (maps, errors) in zip(prepared, drawn, strict=True):
                stages, lost = after.get((method, one.sample.unit), ([], []))
                errors = errors + lost
                values = self._values(method, one, maps, stages, errors)
                found.append(_record(one.sample.unit, one.sample.index, method, values, errors))
            records.append(self.journal, [record for record in found if records.key(record) not in done])
            self._show(method, prepared, found, [maps for maps, _ in drawn])

    def do_grids(self, grids: Sequence[Grid], done: frozenset[tuple[str, str]]) -> None:
        """Evaluate every method on a batch of grids of one size, and append the records."""
        prepared = []
        for grid in grids:
            tensor = compose([self.tensor(self.samples[index].read()) for index in grid.indices])
            whole = EvalSample(grid.unit, grid.indices[0], tensor, (1.0, 1.0), (), ())
            prepared.append(Prepared(whole, torch.empty(0), list(grid.targets)))
        for method in self.job.methods:
            if all((grid.unit, method) in done for grid in grids):
                continue
            found = []
            for one, (maps, errors) in zip(prepared, self._maps(method, prepared, self.model), strict=True):
                values: list[Value] = []
                if not errors:
                    stacked = torch.stack([maps[target] for target in one.wanted])
                    values = evaluate_grid(
                        stacked, one.wanted, one.sample.unit, method, self.job.metrics, self.job.seed
                    )
                    values = _finite(values, errors)
                found.append(_record(one.sample.unit, one.sample.index, method, values, errors))
            records.append(self.journal, [record for record in found if records.key(record) not in done])

    def draw_worst(self, found: Sequence[records.Record]) -> None:
        """Draw the overlays that the page shows and that are missing, for instance after a kill."""
        for index, lacking in gallery.lacking(self.job.out, self.job.methods, found):
            for one in self._prepare([index], frozenset([(self.samples[index].name, "")])):
                image = image_of(one.sample.tensor, self.network.preprocessing)
                for method in lacking:
                    maps = self._maps(method, [one], self.model)[0][0] if method else {}
                    if not method or one.wanted[0] in maps:
                        self.gallery.draw(index, method, image, maps.get(one.wanted[0]))

    def _prepare(self, indices: Sequence[int], done: frozenset[tuple[str, str]]) -> list[Prepared]:
        """Read images and run the network on them; append a note on each."""
        notes: list[records.Record] = []
        read: list[tuple[int, Sample, Image.Image, Tensor]] = []
        for index in indices:
            sample = self.samples[index]
            try:
                image = sample.read()
                read.append((index, sample, image, self.tensor(image)))
            except Exception as error:  # one broken image must not stop the rest
                notes.append(_note(sample.name, index, [_named(sample.name, error)]))
        prepared = []
        for one, logits in zip(read, self._logits([tensor for *_, tensor in read]), strict=True):
            index, sample, image, tensor = one
            try:
                found = prepare_sample(sample, index, image, tensor, logits, self.dataset, self.network)
            except ValueError as error:
                notes.append(_note(sample.name, index, [_named(sample.name, error)]))
                continue
            wanted = self._wanted(found, logits)
            said = {
                "cases": len(found.cases),
                "distant": found.distant,
                "evaluated": bool(wanted),
                "shown": self._label(wanted[0]) if wanted else None,
                "confidence": self._confidence(sample, logits),
            }
            notes.append(_note(sample.name, index, list(found.problems), **said))
            if wanted:
                prepared.append(Prepared(found, logits, wanted))
        records.append(self.journal, [note for note in notes if records.key(note) not in done])
        return prepared

    def _logits(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not tensors:
            return []
        with torch.inference_mode():
            logits: Tensor = self.model(torch.stack(list(tensors)))
        return list(logits.float())

    def _wanted(self, found: EvalSample, logits: Tensor) -> list[int]:
        """List the classes whose maps are needed: the annotated, the predicted, the second best, a random one."""
        metrics = self.job.metrics
        wanted = [case.target for case in found.cases] if is_asked(metrics, *PER_CASE) else []
        if is_asked(metrics, *PER_IMAGE):
            best, second = _two_best(logits)
            wanted.append(best)
            if "sensitivity" in metrics:
                wanted.append(second)
            if "random_logit" in metrics:
                wanted.append(other_class(best, len(logits), seed_of(self.job.seed, found.unit)))
        return list(dict.fromkeys(wanted))

    def _maps(self, method: str, prepared: Sequence[Prepared], model: torch.nn.Module) -> list[tuple[Maps, list[str]]]:
        """Compute a method's maps of each image by class, with errors. A batch that fails is retried image by image."""
        if self.job.maps is not None and method in self._precomputed:
            folder = folder_of(self.job.maps, method)
            return [read_maps(folder, self._labels[one.sample.unit], one.wanted) for one in prepared]
        found: dict[int, tuple[Maps, list[str]]] = {}
        for count in sorted({len(one.wanted) for one in prepared}):
            group = [place for place, one in enumerate(prepared) if len(one.wanted) == count]
            try:
                found.update(zip(group, self._batch(method, [prepared[place] for place in group], model), strict=True))
            except Exception:
                for place in group:
                    try:
                        found[place] = self._batch(method, [prepared[place]], model)[0]
                    except Exception as error:  # a method may raise anything on a network that it does not support
                        found[place] = {}, [one_line(error)]
        return [found[place] for place in range(len(prepared))]

    def _batch(self, method: str, prepared: Sequence[Prepared], model: torch.nn.Module) -> list[tuple[Maps, list[str]]]:
        images = torch.stack([one.sample.tensor for one in prepared])
        targets = torch.tensor([one.wanted for one in prepared])
        maps = methods.attribute(method, model, images, targets, self.job.seed)
        return [(dict(zip(one.wanted, row, strict=True)), []) for one, row in zip(prepared, maps, strict=True)]

    def _after(
        self, prepared: Sequence[Prepared], todo: Sequence[str]
    ) -> dict[tuple[str, str], tuple[list[Tensor], list[str]]]:
        """Compute the predicted class's maps at each stage of the cascading randomisation, by method and unit."""
        after: dict[tuple[str, str], tuple[list[Tensor], list[str]]] = {
            (method, one.sample.unit): ([], []) for method in todo for one in prepared
        }
        predicted = [Prepared(one.sample, one.logits, [_two_best(one.logits)[0]]) for one in prepared]
        for forgetful in cascade(self.model, prepared[0].sample.tensor[None], self.job.seed):
            for method in todo:
                for one, (maps, errors) in zip(predicted, self._maps(method, predicted, forgetful), strict=True):
                    stages, problems = after[method, one.sample.unit]
                    stages += [maps[one.wanted[0]]] if maps else []
                    problems += [f"randomised: {error}" for error in errors if not problems]
        return after

    def _values(
        self, method: str, one: Prepared, maps: Maps, after: Sequence[Tensor], errors: list[str]
    ) -> list[Value]:
        """Evaluate one image's maps. Failures are added to the errors."""
        job, values = self.job, []
        for case in one.sample.cases if is_asked(job.metrics, *PER_CASE) else ():
            if case.target in maps:
                try:
                    values += evaluate_case(maps[case.target], case, one.sample, method, job.metrics, job.seed)
                except ValueError as error:
                    errors.append(f"class {case.target}: {error}")
        best, second = _two_best(one.logits)
        if is_asked(job.metrics, *PER_IMAGE) and best in maps:
            other = other_class(best, len(one.logits), seed_of(job.seed, one.sample.unit))
            context = ImageContext(self.model, one.sample.tensor, best, second, other, [] if errors else after)
            try:
                values += evaluate_image(maps, context, job.metrics, job.seed)
            except ValueError as error:
                errors.append(str(error))
        return _finite(values, errors)

    def tensor(self, image: Image.Image) -> Tensor:
        """Turn an image into the network's input (3, H, W), on its device."""
        tensor = self.network.preprocessing.tensor(image)
        held = next(self.network.model.parameters(), tensor)
        return tensor.to(held.device, held.dtype)

    def _confidence(self, sample: Sample, logits: Tensor) -> list[Any] | None:
        """Return the class of an image with one class and the network's confidence in it, if it predicts that class."""
        if not is_asked(self.job.metrics, "grid", "grid_ap") or len(sample.categories) != 1:
            return None
        category = sample.categories[0]
        known = classes_of(self.dataset.categories[category], category, self.network.names, len(logits))
        predicted = _two_best(logits)[0]
        return [predicted, float(logits.softmax(0)[predicted])] if known == (predicted,) else None

    def _show(
        self, method: str, prepared: Sequence[Prepared], found: Sequence[records.Record], drawn: Sequence[Maps]
    ) -> None:
        """Draw overlays for the images on which the first method does worst."""
        is_first = method == self.job.methods[0]
        for one, record in zip(prepared, found, strict=True):
            if is_first:
                self.gallery.admit(one.sample.index, record)
        for one, maps in zip(prepared, drawn, strict=True):
            index, map = one.sample.index, maps.get(one.wanted[0])
            if index in self.gallery:
                image = image_of(one.sample.tensor, self.network.preprocessing)
                if is_first:
                    self.gallery.draw(index, "", image, None)
                if map is not None:
                    self.gallery.draw(index, method, image, map)

    @cached_property
    def _precomputed(self) -> tuple[str, ...]:
        """Names of the methods with precomputed maps."""
        return () if self.job.maps is None else precomputed_methods(self.job.maps)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """The label of each image in the file names of precomputed maps, as `tsgb explain` writes them."""
        names = [sample.name for sample in self.dataset.samples]
        return dict(zip(names, images.labels([Path(name) for name in names]), strict=True))

    def _label(self, target: int) -> str:
        names = self.network.names
        return f"{target} {names[target]}" if names else str(target)


def _finite(values: list[Value], errors: list[str]) -> list[Value]:
    """Drop values that are not finite, for instance of a map whose sum overflows, and add them to the errors."""
    broken = {name for name, _, value in values if isinstance(value, float) and not math.isfinite(value)}
    errors += [f"{name} is not finite: the map's values are too large" for name in sorted(broken)]
    return [value for value in values if value[0] not in broken]


def _record(unit: str, index: int, method: str, values: list[Value], errors: list[str]) -> records.Record:
    return {"unit": unit, "index": index, "method": method, "values": values, "errors": errors}


def _note(unit: str, index: int, problems: list[str], **said: Any) -> records.Record:
    return {"unit": unit, "index": index, "method": "", "problems": problems, "evaluated": False, **said}


def _named(unit: str, error: Exception) -> str:
    message = one_line(error)
    return message if unit in message else f"{unit}: {message}"


def _two_best(logits: Tensor) -> tuple[int, int]:
    best = logits.argsort(descending=True, stable=True)[:2].tolist()
    return best[0], best[-1]
