"""Metrics and resampling of maps written again, slow and literal: one map at a time, Python loops in float64.

From the formulas of the protocols; connected pieces are scipy's. Nothing here uses the package.
"""

import itertools
import math
import statistics

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


def probability(model, image, target):
    """Softmax of one image's logits at the target."""
    logits = [float(value) for value in model(image[None])[0].detach()]
    return math.exp(logits[target]) / sum(math.exp(value) for value in logits)


def perturbed_scores(model, start, end, map, target, steps, seed):
    """Scores of one image while its pixels go over from start to end, one pixel after the other."""
    image, order = start.clone(), ranking(map, seed)
    scores, done = [], 0
    for step in range(steps + 1):
        while done < len(order) and (done + 1) * steps <= step * len(order):
            y, x = order[done]
            image[:, y, x] = end[:, y, x]
            done += 1
        scores.append(probability(model, image, target))
    return scores


def blurred(image):
    """An 11 x 11 Gaussian of sigma 5 that sums to 1, zeros beyond the edges; (C, H, W)."""
    reach = range(-5, 6)
    kernel = {(v, u): math.exp(-(v * v + u * u) / (2 * 25)) for v in reach for u in reach}
    total = sum(kernel.values())
    result = torch.zeros_like(image)
    for c in range(image.shape[0]):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                for (v, u), weight in kernel.items():
                    if 0 <= y + v < image.shape[1] and 0 <= x + u < image.shape[2]:
                        result[c, y, x] += weight / total * image[c, y + v, x + u]
    return result


def trapezoids(scores):
    """Area of the trapezoids under a curve over 0..1."""
    return sum((a + b) / 2 / (len(scores) - 1) for a, b in itertools.pairwise(scores))


def percentile(values, share):
    """Quantile of a list, linear between values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def signed_scale(map):
    """A map (H, W) as lists, each sign over the 99.5th percentile of its absolute values, cut to -1..1."""
    flat = [float(value) for value in map.flatten()]
    above, below = [v for v in flat if v > 0], [-v for v in flat if v < 0]
    top = percentile(above, 0.995) if above else 1.0
    bottom = percentile(below, 0.995) if below else 1.0
    return [[max(-1.0, min(1.0, float(v) / (top if v > 0 else bottom))) for v in row] for row in map]


def ssim(a, b):
    """Structural similarity of two maps (H, W): windows of 5 x 5, divisor 24, range 2."""
    a, b = signed_scale(a), signed_scale(b)
    found = []
    for y in range(len(a) - 4):
        for x in range(len(a[0]) - 4):
            p = [a[y + v][x + u] for v in range(5) for u in range(5)]
            q = [b[y + v][x + u] for v in range(5) for u in range(5)]
            mp, mq = sum(p) / 25, sum(q) / 25
            vp, vq = sum((i - mp) ** 2 for i in p) / 24, sum((i - mq) ** 2 for i in q) / 24
            c = sum((i - mp) * (j - mq) for i, j in zip(p, q, strict=True)) / 24
            c1, c2 = 0.02**2, 0.06**2
            found.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return sum(found) / len(found)


def mean_of_classes(pairs):
    """Mean over classes of the means of (value, class) pairs."""
    by_class = {}
    for value, kind in pairs:
        by_class.setdefault(kind, []).append(float(value))
    means = [sum(members) / len(members) for members in by_class.values()]
    return sum(means) / len(means)


def class_interval(values, classes, groups, seed, resamples, level):
    """Bootstrap over images: each resample's cases laid out in a list, one resample after the other."""
    images = sorted({int(group) for group in groups})
    generator = np.random.Generator(np.random.PCG64(seed))
    means = []
    for _ in range(resamples):
        times = generator.multinomial(len(images), [1 / len(images)] * len(images))
        cases = []
        for image, count in zip(images, times, strict=True):
            for _ in range(count):
                cases += [(v, c) for v, c, g in zip(values, classes, groups, strict=True) if g == image]
        means.append(mean_of_classes(cases))
    return percentile(means, (1 - level) / 2), percentile(means, (1 + level) / 2)


def median_interval(values, seed, resamples, level):
    """Bootstrap of the median: each resample's values in a list, one resample after the other."""
    ordered, generator = sorted(float(value) for value in values), np.random.Generator(np.random.PCG64(seed))
    medians = []
    for _ in range(resamples):
        places = generator.integers(len(ordered), size=len(ordered)).tolist()
        medians.append(statistics.median([ordered[place] for place in places]))
    return percentile(medians, (1 - level) / 2), percentile(medians, (1 + level) / 2)


def blur(map, sigma):
    """A Gaussian over whole pixels up to 4 sigma in each direction, edges repeated, for a map (H, W)."""
    radius = math.ceil(4 * sigma)
    height, width = map.shape
    result = torch.zeros_like(map)
    for y in range(height):
        for x in range(width):
            total = 0.0
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    weight = math.exp(-(dy**2 + dx**2) / (2 * sigma**2))
                    row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    result[y, x] += weight * float(map[row, column])
                    total += weight
            result[y, x] /= total
    return result


def bilinear(map, height, width):
    """Enlarge a map (h, w), pixel centres at (i + 1/2) / n, edges repeated."""
    result = torch.zeros(height, width, dtype=map.dtype)
    for i in range(height):
        for j in range(width):
            total = 0.0
            y, x = (i + 0.5) * map.shape[0] / height - 0.5, (j + 0.5) * map.shape[1] / width - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    r, c = min(max(row, 0), map.shape[0] - 1), min(max(column, 0), map.shape[1] - 1)
                    total += weight * float(map[r, c])
            result[i, j] = total
    return result
