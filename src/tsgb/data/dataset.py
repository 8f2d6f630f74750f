"""What a data set of any layout comes down to: samples, each an image and the regions of the classes in it."""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Category", "DataError", "Dataset", "Region", "Sample", "box_array", "is_number", "shown", "without_boxes"]

_MOST = 1e7  # pixels: no image is as long, and what is larger would overflow further on

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 60


class DataError(ValueError):
    """A path under which no data set is found: one line that names it and says which layouts are understood."""


@dataclass(frozen=True)
class Category:
    """A class as the data set names it, with its WordNet id (`n01440764`) where the data set gives one."""

    name: str
    wnid: str | None = None


@dataclass(frozen=True)
class Region:
    """Where the objects of one class are in an image.

    Attributes:
        category: Key into `Dataset.categories`.
        boxes: (n, 4) float64, left, upper, right, lower edge in pixels: the box of the first pixel is (0, 0, 1, 1).
            (0, 4) where the data set has no boxes.
        mask: (H, W) bool, true on the class's pixels; None where the data set has no mask of all its objects, or an
            empty one.
    """

    category: int
    boxes: npt.NDArray[np.float64]
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: Its path in the data set's image folder, with forward slashes, or `scene-000012`; no other sample of
            the data set has it.
        categories: The classes that are annotated in it, ascending, each once; () where none is.
        read: Reads the image, upright and RGB; raises `tsgb.images.ImageError`.
        regions: Reads one region for each of `categories`, in their order; raises ValueError, one line that names the
            file, where the annotation is broken.
        size: Width and height that the annotation gives the image, which boxes and masks refer to; None where it
            gives none. An image that `read` turns upright may differ from it.
    """

    name: str
    categories: tuple[int, ...]
    read: Callable[[], Image.Image]
    regions: Callable[[], tuple[Region, ...]]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples in the order of the data set, and the classes that their numbers stand for.

    Attributes:
        name: Name of the folder or file, or `scenes`.
        layout: `coco`, `voc`, `imagenet`, `labels`, `folders` or `scenes`.
        categories: What each category number stands for, also those that no sample has.
        samples: Of a known length; a sample may be made when it is asked for.
        problems: What was passed over in the annotations, one line each.
    """

    name: str
    layout: str
    categories: dict[int, Category]
    samples: Sequence[Sample]
    problems: tuple[str, ...] = ()


def is_number(value: object) -> bool:
    """Tell whether a value is an int or float that can be a place in an image: no bool, not NaN, below 1e7.

    Example:
        >>> is_number(3.5), is_number("3"), is_number(True), is_number(float("nan")), is_number(10**400)
        (True, False, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def box_array(boxes: Sequence[Sequence[float]], size: tuple[int, int] | None) -> npt.NDArray[np.float64]:
    """Clip boxes to the image and leave out what is empty then.

    Args:
        boxes: n times left, upper, right, lower edge.
        size: Width and height of the image; None clips at the left and upper edge alone.

    Returns:
        (m, 4) float64, m <= n.

    Example:
        >>> box_array([(-2, 1, 3, 9), (5, 5, 5, 7)], size=(4, 4)).tolist()
        [[0.0, 1.0, 3.0, 4.0]]
    """
    limits = np.tile(size if size is not None else (np.inf, np.inf), 2)
    values = np.clip(np.array(boxes, dtype=np.float64).reshape(-1, 4), 0, limits)
    return values[(values[:, 2] > values[:, 0]) & (values[:, 3] > values[:, 1])]


def without_boxes(categories: tuple[int, ...]) -> tuple[Region, ...]:
    """Return the regions of an image of which only the classes are known.

    Example:
        >>> without_boxes((3,))[0].boxes.shape
        (0, 4)
    """
    return tuple(Region(category, np.zeros((0, 4))) for category in categories)


def shown(value: Any) -> str:
    """Return a value from a file as it may stand in a message: on one line, and not longer than it helps.

    Example:
        >>> shown("cat.jpg"), len(shown("cat" * 999)) < 70
        ("'cat.jpg'", True)
    """
    return _brief.repr(value)
