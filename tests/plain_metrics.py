"""Order, shares and boxes written again, slow and literal, for the tests to hold tsgb.metrics and regions against.

One map at a time, Python loops in float64, from the formulas of the protocols; connected pieces are scipy's. Nothing
here uses the library.
"""

import numpy as np
import torch
from scipy import ndimage

CORNERS = np.ones((3, 3))  # pixels that touch at a corner are connected


def ranking(map, seed=0):
    """Pixels (y, x) from the highest value to the lowest, equal values in the order in which the seed draws them."""
    width = map.shape[1]
    drawn = torch.randperm(map.numel(), generator=torch.Generator().manual_seed(seed)).tolist()
    turn = {pixel: place for place, pixel in enumerate(drawn)}
    pixels = sorted(range(map.numel()), key=lambda p: (-float(map[p // width, p % width]), turn[p]))
    return [(p // width, p % width) for p in pixels]


def average_precision(map, mask, seed=0):
    """Mean over the mask's pixels of the precision at their ranks."""
    found, precisions = 0, []
    for rank, (y, x) in enumerate(ranking(map, seed), 1):
        if mask[y, x]:
            found += 1
            precisions.append(found / rank)
    return sum(precisions) / len(precisions) if precisions else float("nan")


def pointing(map, mask, tolerance, scale, seed=0):
    """Whether the pixel ranked first is in the mask, or nearer to one of it than the tolerance."""
    y, x = ranking(map, seed)[0]
    for v in range(map.shape[0]):
        for u in range(map.shape[1]):
            squared = ((v - y) * scale[0]) ** 2 + ((u - x) * scale[1]) ** 2
            if mask[v, u] and (squared < tolerance**2 or (v, u) == (y, x)):
                return True
    return False


def share(map, mask, nothing=0.0):
    """Positive values inside the mask over all of them."""
    inside = total = 0.0
    for y in range(map.shape[0]):
        for x in range(map.shape[1]):
            value = max(float(map[y, x]), 0.0)
            total += value
            inside += value if mask[y, x] else 0.0
    return inside / total if total > nothing else 0.0


def cells(n, height, width):
    """The cells of a grid, pixel by pixel."""
    masks = [[[False] * width for _ in range(height)] for _ in range(n * n)]
    for y in range(height):
        for x in range(width):
            masks[y * n // height * n + x * n // width][y][x] = True
    return torch.tensor(masks)


def region(map, threshold):
    """Pixels whose positive part exceeds the mean of the positive parts, or a share of the highest."""
    evidence = np.maximum(np.asarray(map, dtype=np.float64), 0)
    limit = sum(evidence.ravel().tolist()) / evidence.size if threshold == "mean" else threshold * evidence.max()
    return evidence > limit


def pieces(inside):
    """(pixels, box) of each connected piece, the largest first."""
    labels, count = ndimage.label(inside, CORNERS)
    found = []
    for label in range(1, count + 1):
        rows, columns = np.nonzero(labels == label)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        found.append((len(rows), tuple(float(edge) for edge in box)))
    return sorted(found, key=lambda piece: -piece[0])


def iou(a, b):
    """Area of what two boxes share over the area of what either has."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def box_accuracy(map, boxes, least=0.5):
    """Whether the box of the largest piece above the mean meets any of the boxes."""
    found = pieces(region(map, "mean"))
    return bool(found) and any(iou(found[0][1], box) >= least for box in boxes)


def threshold_hits(map, boxes):
    """At every threshold, every piece anew."""
    hits = torch.zeros(4, 1001, dtype=torch.bool)
    for k in range(1001):
        found = pieces(region(map, k / 1000))
        for rank, (_, piece) in enumerate(found):
            overlap = max((iou(piece, box) for box in boxes), default=0.0)
            hits[0, k] |= rank == 0 and overlap >= 0.5
            for row, least in enumerate((0.3, 0.5, 0.7), 1):
                hits[row, k] |= overlap >= least
    return hits


def max_box_accuracy(hits, tune):
    """The first threshold of the most hits among the tuned cases, and the share of hits among the others."""
    hits, tune = hits.tolist(), tune.tolist()
    counts = [sum(row[k] for row, tuned in zip(hits, tune, strict=True) if tuned) for k in range(len(hits[0]))]
    best = counts.index(max(counts))
    others = [row[best] for row, tuned in zip(hits, tune, strict=True) if not tuned]
    return sum(others) / len(others), best
