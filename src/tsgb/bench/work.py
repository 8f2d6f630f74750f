"""One worker of a bench: it holds the network and the dataset, and turns pictures and grids into records."""

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

from .. import methods, pictures
from ..categories import classes_of
from ..data import Dataset, Sample, open_dataset
from ..models import Network
from ..report import one_line
from . import gallery, records
from .cascade import cascade
from .gallery import Gallery
from .given import folder_of, given_maps, given_methods, slice_of
from .judge import PER_CASE, PER_PICTURE, Sight, Value, judge_case, judge_grid, judge_picture, other_class, seed_of
from .protocol import is_asked
from .subjects import Classifier, Subject, compose, picture_of, subject

__all__ = ["Grid", "Job", "Worker"]

Maps = dict[int, Tensor]  # class to map (H, W)


@dataclass(frozen=True)
class Job:
    """What is to be done; it goes to other processes, which load the network and open the dataset themselves."""

    load: Callable[[], Network]
    data: str | Path | None
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    seed: int
    batch_size: int
    out: Path
    maps: Path | None = None  # a folder of given maps, judged beside the methods
    left_out: tuple[tuple[str, str], ...] = ()  # methods that were not run, and why
    pictures: str | None = None  # which of the dataset's, as a Python slice


@dataclass(frozen=True)
class Grid:
    """A grid of pictures: its name in the records, and the indices of its pictures and their classes, row by row."""

    unit: str
    indices: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class _Looked:
    """A picture that was read, with what the network says of it."""

    subject: Subject
    logits: Tensor
    wanted: list[int]  # the classes whose maps are needed


class Worker:
    """A process's part in a job; ``rank`` tells the journals of several machines apart."""

    def __init__(self, job: Job, rank: int = 0) -> None:
        self.job = job
        self.gallery = Gallery(job.out)
        self.journal = job.out / ("records.jsonl" if rank == 0 else f"records-{rank}.jsonl")

    @cached_property
    def network(self) -> Network:
        """The network, loaded when first asked for."""
        return self.job.load()

    @cached_property
    def model(self) -> Classifier:
        """The network as one that returns logits (N, classes)."""
        return Classifier(self.network.model)

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, opened when first asked for."""
        return open_dataset(self.job.data)

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """The pictures of the dataset that were asked for."""
        samples = self.dataset.samples
        if self.job.pictures is None:
            return samples
        found = samples[slice_of(self.job.pictures)]
        if not found:
            raise ValueError(f"pictures {self.job.pictures!r} takes none of the {len(samples)} of {self.dataset.name}")
        return found

    def do_pictures(self, indices: Sequence[int], done: frozenset[tuple[str, str]]) -> None:
        """Judge every method on some pictures, all in one batch, and write the records that are not there yet."""
        looked = self._looked(indices, done)
        if not looked or not is_asked(self.job.metrics, *PER_CASE, *PER_PICTURE):
            return
        todo = [m for m in self.job.methods if any((one.subject.unit, m) not in done for one in looked)]
        after = self._after(looked, todo) if is_asked(self.job.metrics, "cascade") else {}
        for method in todo:
            found, drawn = [], self._maps(method, looked, self.model)
            for one, (maps, errors) in zip(looked, drawn, strict=True):
                stages, lost = after.get((method, one.subject.unit), ([], []))
                errors = errors + lost
                values = self._values(method, one, maps, stages, errors)
                found.append(_record(one.subject.unit, one.subject.index, method, values, errors))
            records.append(self.journal, [record for record in found if records.key(record) not in done])
            self._show(method, looked, found, [maps for maps, _ in drawn])

    def do_grids(self, grids: Sequence[Grid], done: frozenset[tuple[str, str]]) -> None:
        """Judge every method on some grids of one size, all in one batch, and write the records."""
        looked = []
        for grid in grids:
            tensor = compose([self.tensor(self.samples[index].read()) for index in grid.indices])
            whole = Subject(grid.unit, grid.indices[0], tensor, (1.0, 1.0), (), ())
            looked.append(_Looked(whole, torch.empty(0), list(grid.targets)))
        for method in self.job.methods:
            if all((grid.unit, method) in done for grid in grids):
                continue
            found = []
            for one, (maps, errors) in zip(looked, self._maps(method, looked, self.model), strict=True):
                values: list[Value] = []
                if not errors:
                    stacked = torch.stack([maps[target] for target in one.wanted])
                    values = judge_grid(stacked, one.wanted, one.subject.unit, method, self.job.metrics, self.job.seed)
                    values = _finite(values, errors)
                found.append(_record(one.subject.unit, one.subject.index, method, values, errors))
            records.append(self.journal, [record for record in found if records.key(record) not in done])

    def draw_worst(self, found: Sequence[records.Record]) -> None:
        """Draw what the page shows and is not there, as it was lost with a killed process or left to others."""
        for index, lacking in gallery.lacking(self.job.out, self.job.methods, found):
            for one in self._looked([index], frozenset([(self.samples[index].name, "")])):
                picture = picture_of(one.subject.tensor, self.network.preprocessing)
                for method in lacking:
                    maps = self._maps(method, [one], self.model)[0][0] if method else {}
                    if not method or one.wanted[0] in maps:
                        self.gallery.draw(index, method, picture, maps.get(one.wanted[0]))

    def _looked(self, indices: Sequence[int], done: frozenset[tuple[str, str]]) -> list[_Looked]:
        """Read pictures and run the network on them; write down what is to be said of each."""
        notes: list[records.Record] = []
        read: list[tuple[int, Sample, Image.Image, Tensor]] = []
        for index in indices:
            sample = self.samples[index]
            try:
                picture = sample.read()
                read.append((index, sample, picture, self.tensor(picture)))
            except Exception as error:  # whatever is wrong with a picture, the rest goes on
                notes.append(_note(sample.name, index, [_named(sample.name, error)]))
        looked = []
        for one, logits in zip(read, self._logits([tensor for *_, tensor in read]), strict=True):
            index, sample, picture, tensor = one
            try:
                found = subject(sample, index, picture, tensor, logits, self.dataset, self.network)
            except ValueError as error:
                notes.append(_note(sample.name, index, [_named(sample.name, error)]))
                continue
            wanted = self._wanted(found, logits)
            said = {
                "cases": len(found.cases),
                "distant": found.distant,
                "judged": bool(wanted),
                "shown": self._label(wanted[0]) if wanted else None,
                "confidence": self._confidence(sample, logits),
            }
            notes.append(_note(sample.name, index, list(found.problems), **said))
            if wanted:
                looked.append(_Looked(found, logits, wanted))
        records.append(self.journal, [note for note in notes if records.key(note) not in done])
        return looked

    def _logits(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not tensors:
            return []
        with torch.inference_mode():
            logits: Tensor = self.model(torch.stack(list(tensors)))
        return list(logits.float())

    def _wanted(self, found: Subject, logits: Tensor) -> list[int]:
        """The classes whose maps the metrics need: of the annotation, and the predicted, the second, and another."""
        metrics = self.job.metrics
        wanted = [case.target for case in found.cases] if is_asked(metrics, *PER_CASE) else []
        if is_asked(metrics, *PER_PICTURE):
            best, second = _two_best(logits)
            wanted.append(best)
            if "sensitivity" in metrics:
                wanted.append(second)
            if "random_logit" in metrics:
                wanted.append(other_class(best, len(logits), seed_of(self.job.seed, found.unit)))
        return list(dict.fromkeys(wanted))

    def _maps(self, method: str, looked: Sequence[_Looked], model: torch.nn.Module) -> list[tuple[Maps, list[str]]]:
        """A method's maps of each picture by class, and what went wrong; a batch that fails is tried one by one."""
        if self.job.maps is not None and method in self._given:
            folder = folder_of(self.job.maps, method)
            return [given_maps(folder, self._labels[one.subject.unit], one.wanted) for one in looked]
        found: dict[int, tuple[Maps, list[str]]] = {}
        for count in sorted({len(one.wanted) for one in looked}):
            group = [place for place, one in enumerate(looked) if len(one.wanted) == count]
            try:
                found.update(zip(group, self._batch(method, [looked[place] for place in group], model), strict=True))
            except Exception:
                for place in group:
                    try:
                        found[place] = self._batch(method, [looked[place]], model)[0]
                    except Exception as error:  # a rival on a network that it was not made for may raise anything
                        found[place] = {}, [one_line(error)]
        return [found[place] for place in range(len(looked))]

    def _batch(self, method: str, looked: Sequence[_Looked], model: torch.nn.Module) -> list[tuple[Maps, list[str]]]:
        images = torch.stack([one.subject.tensor for one in looked])
        targets = torch.tensor([one.wanted for one in looked])
        maps = methods.attribute(method, model, images, targets, self.job.seed)
        return [(dict(zip(one.wanted, row, strict=True)), []) for one, row in zip(looked, maps, strict=True)]

    def _after(
        self, looked: Sequence[_Looked], todo: Sequence[str]
    ) -> dict[tuple[str, str], tuple[list[Tensor], list[str]]]:
        """By method and unit: the predicted class's maps under a network that forgets from the head downwards."""
        after: dict[tuple[str, str], tuple[list[Tensor], list[str]]] = {
            (method, one.subject.unit): ([], []) for method in todo for one in looked
        }
        predicted = [_Looked(one.subject, one.logits, [_two_best(one.logits)[0]]) for one in looked]
        for forgetful in cascade(self.model, looked[0].subject.tensor[None], self.job.seed):
            for method in todo:
                for one, (maps, errors) in zip(predicted, self._maps(method, predicted, forgetful), strict=True):
                    stages, problems = after[method, one.subject.unit]
                    stages += [maps[one.wanted[0]]] if maps else []
                    problems += [f"randomised: {error}" for error in errors if not problems]
        return after

    def _values(self, method: str, one: _Looked, maps: Maps, after: Sequence[Tensor], errors: list[str]) -> list[Value]:
        """The values of one picture's maps; what cannot be judged is added to the errors."""
        job, values = self.job, []
        for case in one.subject.cases if is_asked(job.metrics, *PER_CASE) else ():
            if case.target in maps:
                try:
                    values += judge_case(maps[case.target], case, one.subject, method, job.metrics, job.seed)
                except ValueError as error:
                    errors.append(f"class {case.target}: {error}")
        best, second = _two_best(one.logits)
        if is_asked(job.metrics, *PER_PICTURE) and best in maps:
            other = other_class(best, len(one.logits), seed_of(job.seed, one.subject.unit))
            sight = Sight(self.model, one.subject.tensor, best, second, other, [] if errors else after)
            try:
                values += judge_picture(maps, sight, job.metrics, job.seed)
            except ValueError as error:
                errors.append(str(error))
        return _finite(values, errors)

    def tensor(self, picture: Image.Image) -> Tensor:
        """A picture as the network's input (3, H, W), on its device."""
        tensor = self.network.preprocessing.tensor(picture)
        held = next(self.network.model.parameters(), tensor)
        return tensor.to(held.device, held.dtype)

    def _confidence(self, sample: Sample, logits: Tensor) -> list[Any] | None:
        """For grids: the class of a picture of one class, and the network's confidence in it if it predicts it."""
        if not is_asked(self.job.metrics, "grid", "grid_ap") or len(sample.categories) != 1:
            return None
        category = sample.categories[0]
        known = classes_of(self.dataset.categories[category], category, self.network.names, len(logits))
        predicted = _two_best(logits)[0]
        return [predicted, float(logits.softmax(0)[predicted])] if known == (predicted,) else None

    def _show(
        self, method: str, looked: Sequence[_Looked], found: Sequence[records.Record], drawn: Sequence[Maps]
    ) -> None:
        """Keep what the page shows of pictures on which the first method does badly."""
        is_first = method == self.job.methods[0]
        for one, record in zip(looked, found, strict=True):
            if is_first:
                self.gallery.admit(one.subject.index, record)
        for one, maps in zip(looked, drawn, strict=True):
            index, map = one.subject.index, maps.get(one.wanted[0])
            if index in self.gallery:
                picture = picture_of(one.subject.tensor, self.network.preprocessing)
                if is_first:
                    self.gallery.draw(index, "", picture, None)
                if map is not None:
                    self.gallery.draw(index, method, picture, map)

    @cached_property
    def _given(self) -> tuple[str, ...]:
        """Names of the methods whose maps are given."""
        return () if self.job.maps is None else given_methods(self.job.maps)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What stands for each picture in the names of given maps, as `tsgb explain` names its own."""
        names = [sample.name for sample in self.dataset.samples]
        return dict(zip(names, pictures.labels([Path(name) for name in names]), strict=True))

    def _label(self, target: int) -> str:
        names = self.network.names
        return f"{target} {names[target]}" if names else str(target)


def _finite(values: list[Value], errors: list[str]) -> list[Value]:
    """Values without those that are not finite, as of a map whose sum overflows; they are added to the errors."""
    broken = {name for name, _, value in values if isinstance(value, float) and not math.isfinite(value)}
    errors += [f"{name} is not finite: the map's values are too large" for name in sorted(broken)]
    return [value for value in values if value[0] not in broken]


def _record(unit: str, index: int, method: str, values: list[Value], errors: list[str]) -> records.Record:
    return {"unit": unit, "index": index, "method": method, "values": values, "errors": errors}


def _note(unit: str, index: int, problems: list[str], **said: Any) -> records.Record:
    return {"unit": unit, "index": index, "method": "", "problems": problems, "judged": False, **said}


def _named(unit: str, error: Exception) -> str:
    message = one_line(error)
    return message if unit in message else f"{unit}: {message}"


def _two_best(logits: Tensor) -> tuple[int, int]:
    best = logits.argsort(descending=True, stable=True)[:2].tolist()
    return best[0], best[-1]
