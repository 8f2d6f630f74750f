"""What a map is judged against: pictures and grids of them as the network sees them, with the regions of classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from ..categories import classes_of, has_kinds
from ..data import Dataset, Region, Sample
from ..models import Network
from ..preprocessing import Preprocessing
from ..targets import find_logits
from .protocol import NEAREST

__all__ = ["Case", "Classifier", "Subject", "compose", "grids", "picture_of", "subject"]

SMALL = 1 / 4  # of a picture's area: classes whose boxes cover less are difficult where another class is present


class Classifier(nn.Module):
    """A network as one that returns logits (N, classes); logits with positions become their mean over them.

    Example:
        >>> Classifier(torch.nn.Conv2d(3, 5, 1))(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        logits = find_logits(self.model(images))
        return logits.flatten(2).mean(2) if logits.dim() > 2 else logits


@dataclass(frozen=True)
class Case:
    """One class in one picture or grid, in the pixels of the network's input (H, W).

    Attributes:
        category: the dataset's number of the class.
        target: the network's class that is asked about.
        region: bool (H, W), the class's mask; its boxes where it has no mask; its cell of a grid.
        has_mask: whether ``region`` is a mask.
        boxes: float64 (n, 4), x0, y0, x1, y1, and ``box_region`` their pixels, bool (H, W).
        is_difficult: whether the boxes cover less than a quarter of a picture that shows another class too.
    """

    category: int
    target: int
    region: Tensor
    has_mask: bool
    boxes: npt.NDArray[np.float64]
    box_region: Tensor
    is_difficult: bool


@dataclass(frozen=True)
class Subject:
    """A picture as the network sees it.

    Attributes:
        unit: its name in the records. ``index``: its place in the dataset.
        tensor: (3, H, W), the network's input.
        scale: pixels of the picture per pixel of the input, down and across.
        cases: the classes in it that the network knows, each once.
        problems: one line for each annotation that cannot be judged.
        distant: classes that are left out as the network has only kinds of them, none among its 20 most probable.
    """

    unit: str
    index: int
    tensor: Tensor
    scale: tuple[float, float]
    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    distant: int = 0


def subject(
    sample: Sample, index: int, picture: Image.Image, tensor: Tensor, logits: Tensor, dataset: Dataset, network: Network
) -> Subject:
    """Carry a sample's annotation to the network's input, and choose the network's class for each of its classes.

    A class of the dataset that stands for several of the network's is asked about as the most probable of them, and
    counts if that is among the 20 most probable of all.

    Args:
        sample: whose annotation is read. ``index``: its place in the dataset.
        picture: its picture. ``tensor``: (3, H, W), the network's input. ``logits``: (classes,).

    Raises:
        ValueError: the regions of the annotated classes cannot be read.
    """
    order = logits.argsort(descending=True, stable=True).tolist()
    cases, problems, distant = [], [], 0
    if not sample.categories:
        try:
            sample.regions()
            problems.append(f"{sample.name}: no annotation")
        except ValueError as error:  # the picture is judged all the same by what needs no annotation
            problems.append(str(error))
    elif sample.size is not None and sample.size != picture.size:
        problems.append(f"{sample.name}: annotated as {_times(sample.size)}, but the picture is {_times(picture.size)}")
    else:
        for region in sample.regions():
            category = dataset.categories[region.category]
            known = classes_of(category, region.category, network.names, len(order))
            best = next((c for c in order if c in known), None)
            if best is None:
                problems.append(f"{sample.name}: the network has no class {category.name!r} ({region.category})")
            elif best not in order[:NEAREST] and has_kinds(category, network.names, len(order)):
                distant += 1
            else:
                case = _case(region, best, len(sample.categories) > 1, picture.size, network.preprocessing)
                has_place = case.has_mask or len(region.boxes)
                if case.region.any() or not has_place:
                    cases.append(case)
                if has_place and not (case.region.any() and case.box_region.any()):
                    problems.append(f"{sample.name}: {category.name!r} holds no pixel of what the network sees")
    scale = _scale(network.preprocessing, picture.size)
    return Subject(sample.name, index, tensor, scale, tuple(cases), tuple(problems), distant)


def _case(region: Region, target: int, has_others: bool, size: tuple[int, int], preprocessing: Preprocessing) -> Case:
    boxes = preprocessing.to_network(region.boxes, size) if len(region.boxes) else np.zeros((0, 4))
    height, width = preprocessing.size
    boxes = np.clip(boxes, 0, [width, height, width, height])
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    box_region = _inside(boxes, height, width)
    mask = box_region if region.mask is None else _seen(region.mask, preprocessing, size)
    sides = region.boxes[:, 2:] - region.boxes[:, :2]
    small = len(sides) > 0 and float(sides.prod(1).sum()) < SMALL * size[0] * size[1]
    return Case(
        region.category, target, torch.from_numpy(mask), region.mask is not None, boxes, torch.from_numpy(box_region),
        small and has_others,
    )  # fmt: skip


def _inside(boxes: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Pixels whose centre lies in a box."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    found = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        found |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    return found


def _seen(mask: npt.NDArray[np.bool_], preprocessing: Preprocessing, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A picture's mask at the centres of the network's pixels; nothing lies outside of the picture."""
    height, width = preprocessing.size
    corners = preprocessing.to_picture([[0, 0, width, height]], size)[0]
    x = np.floor(corners[0] + (np.arange(width) + 0.5) * (corners[2] - corners[0]) / width).astype(int)
    y = np.floor(corners[1] + (np.arange(height) + 0.5) * (corners[3] - corners[1]) / height).astype(int)
    there = ((y >= 0) & (y < size[1]))[:, None] & ((x >= 0) & (x < size[0]))
    found: npt.NDArray[np.bool_] = mask[np.clip(y, 0, size[1] - 1)][:, np.clip(x, 0, size[0] - 1)] & there
    return found


def _scale(preprocessing: Preprocessing, size: tuple[int, int]) -> tuple[float, float]:
    x0, y0, x1, y1 = preprocessing.to_picture([[0, 0, 1, 1]], size)[0].tolist()
    return y1 - y0, x1 - x0


def grids(pool: Iterable[tuple[int, int]], side: int, largest: int, seed: int) -> list[tuple[tuple[int, int], ...]]:
    """Sort pictures into grids of distinct classes, each picture into one at most, in an order drawn from the seed.

    Args:
        pool: (index, class) of each picture. ``side``: pictures along a side. ``largest``: grids at most.

    Returns:
        Whole grids alone, each the (index, class) of ``side * side`` pictures, row by row.

    Example:
        >>> grids([(7, 0), (8, 0), (9, 1), (5, 2), (6, 3)], 2, largest=500, seed=0)
        [((9, 1), (7, 0), (6, 3), (5, 2))]
    """
    entries = sorted(pool)
    order = np.random.Generator(np.random.PCG64([seed, side])).permutation(len(entries))
    begun: list[dict[int, tuple[int, int]]] = []
    whole: list[tuple[tuple[int, int], ...]] = []
    for position in order:
        _, target = entries[position]
        grid = next((grid for grid in begun if target not in grid), None)
        if grid is None:
            grid = {}
            begun.append(grid)
        grid[target] = entries[position]
        if len(grid) == side**2:
            begun.remove(grid)
            whole.append(tuple(grid.values()))
            if len(whole) == largest:
                break
    return whole


def compose(tensors: Sequence[Tensor]) -> Tensor:
    """Lay network inputs (C, H, W) out as a square grid (C, n H, n W), row by row.

    Example:
        >>> compose([torch.full((1, 1, 1), float(k)) for k in range(4)])[0].tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    side = round(len(tensors) ** 0.5)
    return torch.cat([torch.cat(list(tensors[row * side : (row + 1) * side]), 2) for row in range(side)], 1)


def picture_of(tensor: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """The picture that a network input (3, H, W) shows.

    Example:
        >>> picture_of(torch.zeros(3, 2, 4), Preprocessing(size=(2, 4))).getpixel((0, 0))
        (124, 116, 104)
    """
    mean, std = (tensor.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    values: Any = ((tensor * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().contiguous().numpy())


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
