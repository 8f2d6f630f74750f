"""Annotated images as the network sees them: inputs, the regions of their classes, and grids of images."""

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

__all__ = ["Case", "Classifier", "EvalSample", "compose", "grids", "image_of", "prepare_sample"]

SMALL = 1 / 4  # of an image's area: classes whose boxes cover less are difficult where another class is present


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
    """One class in one image or grid, in the pixels of the network's input (H, W).

    Attributes:
        category: the dataset's number of the class.
        target: the network's class that is explained.
        region: bool (H, W), the class's mask; its boxes where it has no mask; its cell of a grid.
        has_mask: whether ``region`` is a mask.
        boxes: float64 (n, 4), x0, y0, x1, y1, and ``box_region`` their pixels, bool (H, W).
        is_difficult: whether the boxes cover less than a quarter of an image that shows another class too.
    """

    category: int
    target: int
    region: Tensor
    has_mask: bool
    boxes: npt.NDArray[np.float64]
    box_region: Tensor
    is_difficult: bool


@dataclass(frozen=True)
class EvalSample:
    """An annotated image as the network sees it.

    Attributes:
        unit: its name in the records. ``index``: its place in the dataset.
        tensor: (3, H, W), the network's input.
        scale: pixels of the image per pixel of the input, down and across.
        cases: the classes in it that the network knows, each once.
        problems: one line for each annotation that cannot be used.
        distant: the number of classes that are left out: the network knows only kinds of them, none of which is
            among its 20 most probable.
    """

    unit: str
    index: int
    tensor: Tensor
    scale: tuple[float, float]
    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    distant: int = 0


def prepare_sample(
    sample: Sample, index: int, image: Image.Image, tensor: Tensor, logits: Tensor, dataset: Dataset, network: Network
) -> EvalSample:
    """Map a sample's annotation to the network's input, and match its classes with the network's.

    A class of the dataset may stand for several of the network's. Then the most probable of these is explained, if it
    is among the 20 most probable of all.

    Args:
        sample: an image of the dataset. ``index``: its place there.
        image: its image. ``tensor``: (3, H, W), the network's input. ``logits``: (classes,).

    Raises:
        ValueError: the regions of the annotated classes cannot be read.
    """
    classes = logits.argsort(descending=True, stable=True).tolist()
    cases, problems, distant = [], [], 0
    if not sample.categories:
        try:
            sample.regions()
            problems.append(f"{sample.name}: no annotation")
        except ValueError as error:  # metrics without annotation still apply
            problems.append(str(error))
    elif sample.size is not None and sample.size != image.size:
        problems.append(f"{sample.name}: annotated as {_times(sample.size)}, but the image is {_times(image.size)}")
    else:
        for region in sample.regions():
            category = dataset.categories[region.category]
            known = classes_of(category, region.category, network.names, len(classes))
            best = next((c for c in classes if c in known), None)
            if best is None:
                problems.append(f"{sample.name}: the network has no class {category.name!r} ({region.category})")
            elif best not in classes[:NEAREST] and has_kinds(category, network.names, len(classes)):
                distant += 1
            else:
                case = _case(region, best, len(sample.categories) > 1, image.size, network.preprocessing)
                has_place = case.has_mask or len(region.boxes)
                if case.region.any() or not has_place:
                    cases.append(case)
                if has_place and not (case.region.any() and case.box_region.any()):
                    problems.append(f"{sample.name}: {category.name!r} holds no pixel of what the network sees")
    scale = _scale(network.preprocessing, image.size)
    return EvalSample(sample.name, index, tensor, scale, tuple(cases), tuple(problems), distant)


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
    """Mark the pixels whose centre lies in a box."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    found = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        found |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    return found


def _seen(mask: npt.NDArray[np.bool_], preprocessing: Preprocessing, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Sample an image's mask at the centres of the network's pixels; False outside of the image."""
    height, width = preprocessing.size
    corners = preprocessing.to_image([[0, 0, width, height]], size)[0]
    x = np.floor(corners[0] + (np.arange(width) + 0.5) * (corners[2] - corners[0]) / width).astype(int)
    y = np.floor(corners[1] + (np.arange(height) + 0.5) * (corners[3] - corners[1]) / height).astype(int)
    there = ((y >= 0) & (y < size[1]))[:, None] & ((x >= 0) & (x < size[0]))
    found: npt.NDArray[np.bool_] = mask[np.clip(y, 0, size[1] - 1)][:, np.clip(x, 0, size[0] - 1)] & there
    return found


def _scale(preprocessing: Preprocessing, size: tuple[int, int]) -> tuple[float, float]:
    x0, y0, x1, y1 = preprocessing.to_image([[0, 0, 1, 1]], size)[0].tolist()
    return y1 - y0, x1 - x0


def grids(pool: Iterable[tuple[int, int]], side: int, largest: int, seed: int) -> list[tuple[tuple[int, int], ...]]:
    """Sort images into grids of distinct classes, each image into at most one, in a random order.

    Args:
        pool: (index, class) of each image. ``side``: images along a side. ``largest``: grids at most.

    Returns:
        Complete grids, each the (index, class) of ``side * side`` images, row by row.

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
    """Arrange network inputs (C, H, W) as a square grid (C, n H, n W), row by row.

    Example:
        >>> compose([torch.full((1, 1, 1), float(k)) for k in range(4)])[0].tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    side = round(len(tensors) ** 0.5)
    return torch.cat([torch.cat(list(tensors[row * side : (row + 1) * side]), 2) for row in range(side)], 1)


def image_of(tensor: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Undo the normalisation of a network input (3, H, W).

    Example:
        >>> image_of(torch.zeros(3, 2, 4), Preprocessing(size=(2, 4))).getpixel((0, 0))
        (124, 116, 104)
    """
    mean, std = (tensor.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    values: Any = ((tensor * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().contiguous().numpy())


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
