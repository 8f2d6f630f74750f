"""COCO's segmentations: polygons and run lengths, to the pixels they cover."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .dataset import is_number, shown

__all__ = ["union_mask"]


def union_mask(segmentations: Sequence[Any], size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """Rasterise segmentations and unite them.

    A polygon is closed, `[x0, y0, x1, y1, ...]` in pixel edges, and covers about the pixels whose centres it holds,
    with COCO's rounding at the border. Run lengths go down the columns and start with the zeros; compressed, they are
    a text. Source: the mask API of COCO, run by pycocotools.

    Args:
        segmentations: Each a list of polygons, or `{"size": [height, width], "counts": list or text}`.
        size: Width and height of the image.

    Returns:
        (H, W) bool, true where any of the segmentations is; None if nowhere.

    Raises:
        ValueError: If a segmentation is none of the above, has not the image's size, or lies far outside of it.
        ModuleNotFoundError: If pycocotools is not installed.

    Example:
        >>> union_mask([{"size": [2, 3], "counts": [1, 2, 3]}], size=(3, 2)).astype(int).tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    try:
        api: Any = importlib.import_module("pycocotools.mask")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading masks needs pycocotools: pip install 'tsgb[bench]'") from error
    width, height = size
    runs: list[Any] = []
    for segmentation in segmentations:
        if isinstance(segmentation, dict):
            runs.append(_runs(api, segmentation, size))
        else:
            _check_polygons(segmentation, size)
            runs.extend(api.frPyObjects(segmentation, height, width))
    mask = api.decode(api.merge(runs)).astype(bool)
    return mask if mask.any() else None


def _check_polygons(polygons: Any, size: tuple[int, int]) -> None:
    if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
        raise ValueError(f"segmentation must be a list of polygons or run lengths, got {shown(polygons)}")
    reach = 2 * max(size)  # the rasteriser walks along each edge, so a far corner would take it hours
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            raise ValueError(f"polygon must be at least three pairs of numbers, got {shown(polygon)}")
        if max(map(abs, polygon)) > reach:
            raise ValueError(f"polygon reaches far out of the image of {size[0]} x {size[1]}: {shown(polygon)}")


def _runs(api: Any, segmentation: dict[str, Any], size: tuple[int, int]) -> Any:
    width, height = size
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        raise ValueError(f"run lengths must be of size {[height, width]}, got {shown(segmentation.get('size'))}")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    elif not isinstance(counts, list):
        raise ValueError(f"counts must be a list or a text, got {shown(counts)}")
    # Checked here, as the C code behind trusts them: runs beyond the image would write beyond its memory.
    if not all(isinstance(count, int) and 0 <= count <= width * height for count in counts):
        raise ValueError(f"counts must be integers from 0 on, none beyond the image, got {shown(counts)}")
    if sum(counts) != width * height:
        raise ValueError(f"counts must sum to {width} x {height} = {width * height}, got {sum(counts)}")
    return api.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _decompressed(text: str) -> list[int]:
    """Decode COCO's text of run lengths: five bits a letter, lowest first, from the fourth count on a difference.

    A letter's code less 48 holds five bits of the number and, as the sixth, whether another letter follows; the
    highest bit of the last letter is the sign. From the fourth count on the number is added to the one two before.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"counts is not a text of run lengths: {shown(text)}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError(f"counts is a text of run lengths that is cut off: {shown(text)}")
    return counts
