"""Whether the box around a thresholded map is the object's: box accuracy, MaxBoxAcc and MaxBoxAccV2."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import regions
from .checks import check_maps

__all__ = ["THRESHOLDS", "box_accuracy", "max_box_accuracy", "threshold_hits"]

THRESHOLDS = 1001  # 0, 0.001 .. 1 of the map's maximum
_OVERLAPS = (0.3, 0.5, 0.7)  # the IoUs of MaxBoxAccV2


def box_accuracy(map: Tensor, boxes: Tensor | npt.ArrayLike, iou: float = 0.5) -> bool:
    """Box accuracy of one map: whether the box of its evidence overlaps one of the object's.

    The map is thresholded at the mean of its positive part, and the box of the largest connected piece taken. Source:
    Zhou et al. 2016, "Learning deep features for discriminative localization".

    Args:
        map: (H, W) floating, any sign.
        boxes: (n, 4), the class's boxes: left, upper, right, lower edge in the map's pixels.
        iou: the least intersection over union that counts, above 0 and at most 1.

    Returns:
        Whether any of the boxes is met; False for a map without positive values, or no boxes.

    Raises:
        TypeError, ValueError: ``map`` is no finite map, ``boxes`` no boxes, or ``iou`` out of range.

    Example:
        The mean is 18 / 16, so the box found is (1, 1, 3, 3) of area 4, of which the one given, of area 6, holds all.

        >>> map = torch.zeros(4, 4)
        >>> map[1:3, 1:3] = torch.tensor([[3.0, 6.0], [6.0, 3.0]])
        >>> box_accuracy(map, [[1, 1, 4, 3]]), box_accuracy(map, [[1, 1, 4, 3]], iou=0.7)
        (True, False)
    """
    given = _boxes(boxes)
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be above 0 and at most 1, got {iou}")
    found = regions.boxes(_array(map), "mean", "largest")
    return bool((_overlap(found, given) >= iou).any())


def threshold_hits(map: Tensor, boxes: Tensor | npt.ArrayLike) -> Tensor:
    """Which thresholds' boxes meet the object's, for MaxBoxAcc and MaxBoxAccV2.

    At each threshold t = 0, 0.001 .. 1 the region max(map, 0) > t * max(map) falls into connected pieces. Row 0, of
    MaxBoxAcc: the box of the largest piece has an IoU of at least 0.5 with any of the object's boxes. Rows 1 to 3, of
    MaxBoxAccV2: the box of any piece has one of at least 0.3, 0.5, 0.7. Source: Choe et al. 2020, "Evaluating
    weakly supervised object localization methods right".

    The thresholds are gone through from the top, and pieces are only looked at where pixels join them: a map costs
    what its pixels cost, not a thousand labellings.

    Args:
        map: (H, W) floating, any sign.
        boxes: (n, 4), the class's boxes: left, upper, right, lower edge in the map's pixels.

    Returns:
        (4, 1001) bool on the CPU; all False for a map without positive values, or no boxes.

    Raises:
        TypeError, ValueError: ``map`` is no finite map, or ``boxes`` no boxes.

    Example:
        From 0.2 to below 0.6 of the maximum the region is the upper two pixels, (0, 0, 2, 1).

        >>> hits = threshold_hits(torch.tensor([[5.0, 3.0], [1.0, 0.0]]), [[0, 0, 2, 1]])
        >>> hits[3].nonzero()[[0, -1], 0].tolist()
        [200, 599]
    """
    given = _boxes(boxes)
    born, died, sizes, firsts, found = _pieces(_levels(_array(map)))
    best = _overlap(found, given).max(1, initial=0)
    hits = np.zeros((1 + len(_OVERLAPS), THRESHOLDS), np.bool_)
    # Pieces only grow as the threshold falls, so the largest so far is the largest there is; of several the first one.
    rank = np.maximum.accumulate(sizes * map.numel() - firsts)
    largest = np.flatnonzero(np.diff(rank, prepend=0))
    until = np.append(born[largest][1:], -1)
    met = best[largest] >= 0.5
    _fill(hits[0], born[largest][met], until[met])
    for row, overlap in zip(hits[1:], _OVERLAPS, strict=True):
        _fill(row, born[best >= overlap], died[best >= overlap])
    return torch.from_numpy(hits)


def max_box_accuracy(hits: Tensor, tune: Tensor) -> tuple[float, int]:
    """Accuracy at the threshold that is best on other cases.

    MaxBoxAcc of row 0 of `threshold_hits`; MaxBoxAccV2 is the mean of those of rows 1 to 3, each with its own
    threshold.

    Args:
        hits: (N, T) bool, one row of `threshold_hits` for each case.
        tune: (N,) bool, the cases that choose the threshold; the others are reported.

    Returns:
        The share of hits among the cases reported, 0..1, and the index of the threshold, the lowest of the best.

    Raises:
        TypeError, ValueError: no bool tensors of these shapes, or no cases on one of the two sides.

    Example:
        >>> hits = torch.tensor([[True, False, True], [False, False, True], [True, True, False], [False, False, True]])
        >>> max_box_accuracy(hits, torch.tensor([True, True, False, False]))
        (0.5, 2)
    """
    for name, value in (("hits", hits), ("tune", tune)):
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a bool tensor, got {got}")
    if hits.dim() != 2 or not hits.shape[1] or tune.shape != hits.shape[:1]:
        raise ValueError(f"hits must be (N, T) and tune (N,), got {tuple(hits.shape)} and {tuple(tune.shape)}")
    if not tune.any() or tune.all():
        raise ValueError(f"tune must leave cases on both sides, got {int(tune.sum())} of {len(tune)}")
    counts = hits[tune].sum(0)
    index = int((counts == counts.max()).nonzero()[0])
    return float(hits[~tune, index].double().mean()), index


def _pieces(levels: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.int64], ...]:
    """All connected pieces of the regions ``levels > t``, one for each set of pixels, from the highest t down.

    For each piece: the highest t it exists at, the t at which it has become part of a larger one (-1: none), the number
    of its pixels, its first pixel row by row, and its box.
    """
    flat = levels.ravel()
    count, width = len(flat), levels.shape[1]
    pairs = _neighbours(levels)
    pixels_of, pairs_of = _by_level(flat), _by_level(np.minimum(flat[pairs[0]], flat[pairs[1]]))
    # Of each pixel: the piece it hangs below (a piece is known by its first pixel) and, for a piece, what it is so far.
    above, place, known = np.arange(count), np.zeros(count, np.int64), np.full(count, -1)
    rows, columns = np.divmod(above, width)
    size, box = np.ones(count, np.int64), np.stack([columns, rows, -columns - 1, -rows - 1], 1)  # all edges by minimum
    found, died, made = [np.zeros((0, 7), np.int64)], np.full(count, -1), 0
    for t in range(THRESHOLDS - 2, -1, -1):
        added = pixels_of[t + 1]
        if not len(added):
            continue
        met = pairs[:, pairs_of[t + 1]]
        while not np.array_equal(met, higher := above[met]):
            met = higher
        concerned = np.unique(np.append(added, met))
        place[concerned] = np.arange(len(concerned))
        joined = regions.join(len(concerned), place[met[0]], place[met[1]])
        order = np.argsort(joined, kind="stable")
        starts = np.flatnonzero(np.diff(joined[order], prepend=-1))
        pieces = concerned[order[starts]]
        parts = concerned[order]
        size[pieces], box[pieces] = np.add.reduceat(size[parts], starts), np.minimum.reduceat(box[parts], starts)
        above[concerned] = concerned[joined]
        grown = known[concerned]
        died[grown[grown >= 0]] = t
        known[pieces] = np.arange(made, made + len(pieces))
        made += len(pieces)
        found.append(np.column_stack([np.full(len(pieces), t), size[pieces], pieces, box[pieces]]))
    table = np.concatenate(found)
    return table[:, 0], died[:made], table[:, 1], table[:, 2], table[:, 3:] * np.array([1, 1, -1, -1])


def _neighbours(levels: npt.NDArray[np.int16]) -> npt.NDArray[np.int64]:
    """The pairs of pixels, (2, n), that touch at a side or a corner and are in some region."""
    pixel, inside = np.arange(levels.size).reshape(levels.shape), levels > 0
    pairs = []
    for one, other in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        both = inside[one] & inside[other]
        pairs.append((pixel[one][both], pixel[other][both]))
    return np.concatenate(pairs, 1)


def _by_level(levels: npt.NDArray[np.int16]) -> list[npt.NDArray[np.int64]]:
    """Where each level is: the indices of 0, those of 1, ..."""
    order = np.argsort(levels, kind="stable")
    bounds = np.searchsorted(levels[order], np.arange(THRESHOLDS + 1))
    return [order[start:end] for start, end in pairwise(bounds)]


def _levels(map: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """How many of the thresholds each pixel exceeds: it is in the region of threshold t where this is above t."""
    evidence = np.maximum(map.astype(np.float64), 0)
    thresholds = np.arange(THRESHOLDS) / (THRESHOLDS - 1) * evidence.max()
    return np.searchsorted(thresholds, evidence, "left").astype(np.int16)


def _fill(row: npt.NDArray[np.bool_], born: npt.NDArray[np.int64], died: npt.NDArray[np.int64]) -> None:
    """Set the thresholds from each ``born`` down to above its ``died``."""
    steps = np.zeros(THRESHOLDS + 1, np.int64)
    np.add.at(steps, died + 1, 1)
    np.add.at(steps, born + 1, -1)
    row[:] = steps.cumsum()[:-1] > 0


def _overlap(found: npt.NDArray[Any], given: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Intersection over union, (n, m), of n boxes and m boxes."""
    a, b = found[:, None], given[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return np.asarray(shared / (areas[0] + areas[1] - shared))


def _array(map: Tensor) -> npt.NDArray[Any]:
    if not isinstance(map, Tensor) or map.dim() != 2:
        got = tuple(map.shape) if isinstance(map, Tensor) else type(map).__name__
        raise TypeError(f"map must be a floating tensor (H, W), got {got}")
    check_maps(map[None], "map")
    return map.detach().double().cpu().numpy()


def _boxes(boxes: Tensor | npt.ArrayLike) -> npt.NDArray[np.float64]:
    given = np.asarray(boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes, dtype=np.float64)
    given = given.reshape(0, 4) if given.size == 0 else given
    if given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"boxes must have shape (n, 4), left, upper, right, lower edge, got {given.shape}")
    if not np.isfinite(given).all() or not (given[:, :2] < given[:, 2:]).all():
        raise ValueError(f"boxes must have left < right and upper < lower, got {given.tolist()}")
    return given
