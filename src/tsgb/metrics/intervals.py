"""How sure a mean or a median is: percentile bootstrap intervals, those of means drawing whole images, not cases.

The cases of one image (its classes, its boxes) are not independent; a resample takes or leaves them together. To
compare two methods, take the interval of the differences of their values, case by case.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["class_mean_interval", "mean_interval", "mean_over_classes", "median_interval"]

_DRAWN_AT_ONCE = 2**22  # counts, or values, held in memory


def mean_over_classes(values: npt.NDArray[Any], classes: npt.NDArray[Any]) -> float:
    """Mean over the classes of the mean of each class's cases.

    Args:
        values: (N,), one value a case, finite.
        classes: (N,), integer, the class of each case.

    Returns:
        The mean; each class counts once, however many cases it has.

    Raises:
        ValueError: If the shapes are not one (N,) with N of 1 or more, or a value is not finite.
        TypeError: If ``classes`` are not integers.

    Example:
        >>> mean_over_classes(np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 2]))
        0.5
    """
    values, classes, _ = _checked(values, classes, classes)
    _, own = np.unique(classes, return_inverse=True)
    return float((np.bincount(own, values) / np.bincount(own)).mean())


def mean_interval(
    values: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over the cases.

    Each resample draws as many images as there are, with replacement, and takes the mean over all cases of what it
    drew, an image drawn twice twice. The ends are the quantiles (1 - level) / 2 and (1 + level) / 2 of those means,
    linear between them. Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Args:
        values: (N,), one value a case, finite.
        groups: (N,), integer, the image of each case, any numbers.
        seed: Seed of numpy's PCG64.
        resamples: Number of resamples, 1 or more.
        level: Share of the resamples' means that the interval covers, above 0 and below 1.

    Returns:
        Lower and upper end; equal for a single image.

    Raises:
        ValueError: If the shapes are not one (N,) with N of 1 or more, a value is not finite, or ``resamples`` or
            ``level`` out of range.
        TypeError: If ``groups`` are not integers.

    Example:
        >>> low, high = mean_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 1, 2, 3]))
        >>> low, high  # means of four draws from 1 1 1 0
        (0.25, 1.0)
    """
    return class_mean_interval(values, np.zeros(np.shape(values), np.int64), groups, seed, resamples, level)


def class_mean_interval(
    values: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over the classes of the mean of each class's cases.

    A class that a resample did not draw is left out of its mean. The rest, source included, as in `mean_interval`.

    Args:
        values: (N,), one value a case, finite.
        classes: (N,), integer, the class of each case.
        groups: (N,), integer, the image of each case. The rest as in `mean_interval`.

    Returns:
        Lower and upper end.

    Example:
        >>> values, classes = np.array([1.0, 1.0, 0.0, 0.0]), np.array([3, 3, 5, 5])
        >>> class_mean_interval(values, classes, groups=np.array([0, 1, 0, 1]))  # either image has both classes
        (0.5, 0.5)
    """
    values, classes, groups = _checked(values, classes, groups)
    _check_draws(resamples, level)
    kinds, of_class = np.unique(classes, return_inverse=True)
    images, of_image = np.unique(groups, return_inverse=True)
    # Cases of one class in one image are drawn together: their sum and number are all that is needed, class by class.
    pairs, of_pair = np.unique(of_class * len(images) + of_image, return_inverse=True)
    sums, numbers = np.bincount(of_pair, values), np.bincount(of_pair)
    image, starts = pairs % len(images), np.searchsorted(pairs // len(images), np.arange(len(kinds)))
    generator = np.random.Generator(np.random.PCG64(seed))
    even, rows, means = np.full(len(images), 1 / len(images)), max(1, _DRAWN_AT_ONCE // len(pairs)), []
    for start in range(0, resamples, rows):
        drawn = generator.multinomial(len(images), even, size=min(rows, resamples - start))[:, image]
        totals = np.add.reduceat(drawn * sums, starts, axis=1)
        counts = np.add.reduceat(drawn * numbers, starts, axis=1)
        means.append((totals / np.maximum(counts, 1)).sum(1) / (counts > 0).sum(1))
    return _ends(means, level)


def median_interval(
    values: npt.NDArray[Any], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of independent values, such as a measurement's rounds.

    Each resample draws as many values as there are, with replacement, and takes their median, of an even number the
    mean of the middle two. The ends, and the source, as in `mean_interval`.

    Args:
        values: (N,), finite, N of 2 or more, in any order.
        seed: Seed of numpy's PCG64.
        resamples: Number of resamples, 1 or more.
        level: Share of the resamples' medians that the interval covers, above 0 and below 1.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: If ``values`` are not one (N,) with N of 2 or more, one is not finite, or ``resamples`` or
            ``level`` out of range.

    Example:
        >>> median_interval(np.array([2.0, 1.0, 9.0]))  # 1 is the median of 7 in 27 draws of three, 9 too
        (1.0, 9.0)
        >>> median_interval(np.array([2.0, 1.0, 9.0]), level=0.4)
        (2.0, 2.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be of shape (N,), got {values.shape}")
    if len(values) < 2:
        raise ValueError(f"values must be two or more, got {len(values)}: one value has no interval")
    _check_finite(values)
    _check_draws(resamples, level)
    values = np.sort(values)  # so that their order does not matter
    generator = np.random.Generator(np.random.PCG64(seed))
    rows, medians = max(1, _DRAWN_AT_ONCE // len(values)), []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(values), size=(min(rows, resamples - start), len(values)))
        medians.append(np.median(values[drawn], axis=1))
    return _ends(medians, level)


def _ends(drawn: list[npt.NDArray[np.float64]], level: float) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_draws(resamples: int, level: float) -> None:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be 1 or more and level between 0 and 1, got {resamples} and {level}")


def _check_finite(values: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {values[~np.isfinite(values)][0]}; leave those cases out")


def _checked(
    values: npt.NDArray[Any], classes: npt.NDArray[Any], groups: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    values, labels = np.asarray(values, np.float64), [np.asarray(classes), np.asarray(groups)]
    for name, given in zip(("classes", "groups"), labels, strict=True):
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"{name} must be integers, got {given.dtype}")
        if values.ndim != 1 or not len(values) or given.shape != values.shape:
            raise ValueError(
                f"values and {name} must be of one shape (N,), N > 0, got {values.shape} and {given.shape}"
            )
    _check_finite(values)
    return values, labels[0].astype(np.int64), labels[1].astype(np.int64)
