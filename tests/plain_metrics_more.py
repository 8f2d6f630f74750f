"""Perturbation, similarity and intervals written again, slow and literal, for the tests to hold tsgb.metrics against.

Python loops in float64, from the formulas of the protocols. Nothing here uses the library.
"""

import itertools
import math
import statistics

import numpy as np
import torch


def ranking(map, seed):
    """Pixels of a map from the highest value to the lowest, equal values in the order in which the seed draws them."""
    width = map.shape[1]
    drawn = torch.randperm(map.numel(), generator=torch.Generator().manual_seed(seed)).tolist()
    turn = {pixel: place for place, pixel in enumerate(drawn)}
    pixels = sorted(range(map.numel()), key=lambda p: (-float(map[p // width, p % width]), turn[p]))
    return [(p // width, p % width) for p in pixels]


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
