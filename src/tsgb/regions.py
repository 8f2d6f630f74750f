"""Regions of a map: where its evidence exceeds a threshold, connected pieces, and the boxes around them."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["boxes", "components", "join", "mask"]


def mask(map: npt.ArrayLike, threshold: float | Literal["mean"] = "mean") -> npt.NDArray[np.bool_]:
    """Mark the pixels whose evidence exceeds the threshold.

    ``max(map, 0) > threshold``, strictly, where "mean" is the mean of max(map, 0) over all pixels, as Zhou et al. 2016
    ("Learning deep features for discriminative localization") threshold, and a number the share of the map's maximum.

    Args:
        map: (H, W), any sign, higher is more evidence.
        threshold: "mean", or 0..1; 0 marks all positive values, 1 none.

    Returns:
        (H, W) bool; empty for a map without positive values.

    Raises:
        ValueError: ``map`` is not two-dimensional or not finite, or ``threshold`` none of the above.

    Example:
        >>> mask([[4.0, 1.0], [-9.0, 2.0]])  # the mean of 4, 1, 0, 2 is 1.75
        array([[ True, False],
               [False,  True]])
    """
    values = np.asarray(map, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"map must have shape (H, W), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("map must be finite, but it holds NaN or infinity")
    evidence = np.maximum(values, 0)
    if isinstance(threshold, str) and threshold == "mean":
        return np.asarray(evidence > evidence.mean())
    if isinstance(threshold, (str, bool)) or not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be 'mean' or 0..1, a share of the map's maximum, got {threshold!r}")
    return np.asarray(evidence > float(threshold) * evidence.max())


def components(mask: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Label the connected pieces of a mask; pixels that touch at a side or a corner are connected.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) int64, 0 outside of the mask, and 1, 2, ... for the pieces in the order of their first pixels, row by
        row.

    Raises:
        ValueError: ``mask`` is not a two-dimensional array of bool.

    Example:
        >>> components(np.array([[True, False, True], [False, True, False], [False, False, False], [True, True, True]]))
        array([[1, 0, 1],
               [0, 1, 0],
               [0, 0, 0],
               [2, 2, 2]])
    """
    inside = _mask(mask)
    rows, starts, ends, labels = _runs(inside)
    # A run adds its label where it starts and takes it away behind its end; the sums in between are the labels.
    steps = np.zeros((inside.shape[0], inside.shape[1] + 1), np.int64)
    steps[rows, starts] += labels + 1
    steps[rows, ends] -= labels + 1
    return np.asarray(steps.cumsum(1)[:, :-1])


def boxes(
    map: npt.ArrayLike,
    threshold: float | Literal["mean"] = "mean",
    component: Literal["largest", "all"] = "largest",
) -> npt.NDArray[np.float64]:
    """Draw boxes around the connected pieces of a map's evidence above the threshold.

    Args:
        map: (H, W), any sign, higher is more evidence. ``threshold``: see `mask`.
        component: "largest", the piece of the most pixels (of several the one whose first pixel comes first, row by
            row), or "all".

    Returns:
        (n, 4) float64, left, upper, right, lower edge in pixels (the first pixel's box is 0, 0, 1, 1), the piece of the
        most pixels first; (0, 4) for a map without positive values.

    Raises:
        ValueError: ``map`` is not two-dimensional or not finite, ``threshold`` or ``component`` none of the above.

    Example:
        >>> boxes([[0.0, 0.0, 0.0, 9.0], [5.0, 5.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]], threshold=0.5)
        array([[0., 1., 2., 3.]])
    """
    if component not in ("largest", "all"):
        raise ValueError(f"component must be 'largest' or 'all', got {component!r}")
    rows, starts, ends, labels = _runs(mask(map, threshold))
    if not len(labels):
        return np.zeros((0, 4))
    order = np.argsort(labels, kind="stable")
    firsts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    edges = [
        np.minimum.reduceat(starts[order], firsts),
        np.minimum.reduceat(rows[order], firsts),
        np.maximum.reduceat(ends[order], firsts),
        np.maximum.reduceat(rows[order] + 1, firsts),
    ]
    sizes = np.add.reduceat((ends - starts)[order], firsts)
    found = np.stack(edges, 1).astype(np.float64)[np.argsort(-sizes, kind="stable")]
    return found[:1] if component == "largest" else found


def join(count: int, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Find what each of a number of nodes is connected with, by edges between them.

    Rounds of: hang the root at the higher end of each edge below the lowest root it meets, then let every node point at
    its root. Edges within a piece drop out, so that a few rounds do.

    Args:
        count: nodes, numbered 0, 1, ... ``a``, ``b``: (E,) int64, the ends of the edges.

    Returns:
        (count,) int64, the lowest node that each node is connected with.

    Example:
        >>> join(5, np.array([4, 3]), np.array([1, 4]))
        array([0, 1, 2, 1, 1])
    """
    roots = np.arange(count)
    while True:
        a, b = roots[a], roots[b]
        apart = a != b
        if not apart.any():
            return roots
        a, b = a[apart], b[apart]
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b))
        above = roots[roots]
        while not np.array_equal(above, roots):
            roots, above = above, above[above]


def _runs(inside: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], ...]:
    """Rows, first columns, columns behind the last, and components 0, 1, ... of the horizontal runs, row by row."""
    height, width = inside.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = inside
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    # Runs that touch run i in the row above: those that end at its start or later, and start at its end or earlier.
    # One number line holds all rows, each shifted by more than a row's width.
    shift = rows * (width + 2)
    first = np.searchsorted(ends + shift, starts + shift - (width + 2), "left")
    behind = np.searchsorted(starts + shift, ends + shift - (width + 2), "right")
    touching = np.maximum(behind - first, 0)
    below = np.repeat(np.arange(len(rows)), touching)
    above = np.arange(len(below)) - np.repeat(np.cumsum(touching) - touching, touching) + first[below]
    labels = np.unique(join(len(rows), below, above), return_inverse=True)[1]
    return rows, starts, ends, labels


def _mask(mask: Any) -> npt.NDArray[np.bool_]:
    inside = np.asarray(mask)
    if inside.dtype != np.bool_ or inside.ndim != 2:
        raise ValueError(f"mask must be an array of bool, (H, W), got {inside.dtype} {inside.shape}")
    return inside
