"""Maps on grids of positions, in one dimension to three: on another grid, smoothed, led by the edges of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["over_largest", "painted", "planes", "resized", "smoothed"]

_TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
_REACH = 3  # standard deviations after which a Gaussian is cut
_SHADE = 1e-4  # of a picture's values: differences below it are rounding
_COLOURS = 4  # channels that guide each by itself; of more it is their mean, as each window solves for all of them


def over_largest(maps: Tensor) -> Tensor:
    """Divide maps (K, N, *) by their largest value; what is positive nowhere is nothing, but NaN stays NaN.

    Example:
        >>> over_largest(torch.tensor([[[1.0, 4.0]], [[-1.0, 0.0]]]))
        tensor([[[0.2500, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.0000]]])
    """
    largest = maps.flatten(2).amax(2).reshape(*maps.shape[:2], *(1 for _ in maps.shape[2:]))
    return torch.where(largest <= 0, 0, maps / largest.clamp(min=_TINY))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (K, N, *) on another grid: by means of areas on a coarser one, by linear interpolation on a finer one.

    Example:
        >>> resized(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if all(n >= m for n, m in zip(maps.shape[2:], size, strict=True)):
        pools: tuple[Any, ...] = (
            functional.adaptive_avg_pool1d,
            functional.adaptive_avg_pool2d,
            functional.adaptive_avg_pool3d,
        )
        pooled: Tensor = pools[len(size) - 1](maps, tuple(size))
        return pooled
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    return functional.interpolate(maps, tuple(size), mode=mode, align_corners=False)


def smoothed(maps: Tensor, deviation: float) -> Tensor:
    """Maps (K, N, *) under a Gaussian of a standard deviation in positions, the border's values going on beyond it.

    Example:
        >>> smoothed(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]), 0.5).round(decimals=2)
        tensor([[[0.0000, 0.1100, 0.7900, 0.1100, 0.0000]]])
    """
    reach = int(_REACH * deviation + 0.5)
    if reach == 0:
        return maps
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp((places / deviation).square() / -2)
    return _weighed(maps, weights / weights.sum())


def planes(maps: Tensor, image: Tensor, radius: int, epsilon: float) -> Tensor:
    """The guided filter's planes: in each window the linear function of the image's colours that is nearest to the map.

    ::

        a_w = (cov_w(I) + epsilon)^-1 cov_w(I, map)        b_w = mean_w(map) - a_w . mean_w(I)
        out(p) = (mean of a_w).I(p) + mean of b_w,         over the windows w that hold p

    So a map's borders move to those of the image, and what is of one colour within a window becomes of one value. The
    windows are worked out on the map's grid and applied to the image as fine as it is. I is each channel of the image
    less its mean, over the root mean square of that, both taken on the grid; of more than four channels it is their
    mean. Source: He, Sun, Tang, "Guided image filtering", IEEE TPAMI 2013; on a coarser grid, He and Sun, arXiv
    1505.00996.

    Args:
        maps: (K, N, *grid), any sign, of each image.
        image: (N, C, *size).
        radius: of a window of ``2 radius + 1`` positions a side; beyond the border its values go on.
        epsilon: above 0; variances of the image below it are taken for noise.

    Returns:
        (1 + C, K, N, *grid): the mean of b_w, then of a_w for each channel of the image, or for their mean. They are of
        the image as it is, to which `painted` applies them.

    Example:
        Of two colours, that are taken for one object each, the map tells the border one position too far left.

        >>> image, map = torch.tensor([[[0.0, 0, 0, 1, 1, 1]]]), torch.tensor([[[0.0, 0, 1, 1, 1, 1]]])
        >>> painted(planes(map, image, radius=2, epsilon=0.01), image).round(decimals=1)
        tensor([[[0.2000, 0.3000, 0.5000, 1.0000, 1.0000, 1.0000]]])
    """
    image = _guide(image, maps)
    small, flat = resized(image, maps.shape[2:]), (1,) * (image.dim() - 2)
    middle = small.flatten(2).mean(2).reshape(*small.shape[:2], *flat)
    spread = (small - middle).square() + _SHADE**2 * small.square()  # a picture of one colour guides nothing
    size = spread.flatten(2).mean(2).sqrt().clamp(min=_TINY).reshape(*small.shape[:2], *flat)
    colours = ((small - middle) / size).transpose(0, 1)
    count, weights = len(colours), maps.new_full((2 * radius + 1,), 1 / (2 * radius + 1))
    pairs = [(c, d) for c in range(count) for d in range(c + 1)]
    seen = _weighed(torch.stack([*colours, *(colours[c] * colours[d] for c, d in pairs)]), weights)
    means, matrix = seen[:count], [[seen[0]] * count for _ in range(count)]
    for (c, d), mean in zip(pairs, seen[count:], strict=True):
        matrix[c][d] = matrix[d][c] = mean - means[c] * means[d] + (epsilon if c == d else 0.0)
    products = torch.stack([maps, *(maps * colour for colour in colours)])
    of_maps, *with_maps = _weighed(products.flatten(0, 1), weights).reshape(products.shape)
    slopes = _solved(matrix, [both - of_maps * mean for both, mean in zip(with_maps, means, strict=True)])
    offset = of_maps
    for slope, mean in zip(slopes, means, strict=True):
        offset = offset - slope * mean
    # From here on they are of the image as it is, which is larger than anything on the grid.
    slopes = [slope / scale for slope, scale in zip(slopes, size.transpose(0, 1), strict=True)]
    for slope, shift in zip(slopes, middle.transpose(0, 1), strict=True):
        offset = offset - slope * shift
    return _weighed(torch.stack([offset, *slopes]).flatten(0, 1), weights).reshape(products.shape)


def painted(lines: Tensor, image: Tensor) -> Tensor:
    """The guided filter's map (K, N, *size): what `planes` say of an image, as fine as it is.

    Example:
        >>> painted(torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1), torch.tensor([[[1.0, 3.0]]]))
        tensor([[[2.5000, 6.5000]]])
    """
    image = _guide(image, lines)
    out = resized(lines[0], image.shape[2:])
    for line, colour in zip(lines[1:], image.transpose(0, 1), strict=True):
        out = torch.addcmul(out, resized(line, image.shape[2:]), colour)
    return out


def _guide(image: Tensor, like: Tensor) -> Tensor:
    image = image if image.shape[1] <= _COLOURS else image.mean(1, keepdim=True)
    return image.to(like.dtype)


def _solved(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Solve ``matrix @ x = right`` at each position, by elimination: a positive definite matrix needs no pivots."""
    rows, right, count = [list(row) for row in matrix], list(right), len(right)
    for i in range(count):
        for j in range(i + 1, count):
            share = rows[j][i] / rows[i][i]
            rows[j] = [a - share * b for a, b in zip(rows[j], rows[i], strict=True)]
            right[j] = right[j] - share * right[i]
    for i in reversed(range(count)):
        for j in range(i + 1, count):
            right[i] = right[i] - rows[i][j] * right[j]
        right[i] = right[i] / rows[i][i]
    return right


def _weighed(maps: Tensor, weights: Tensor) -> Tensor:
    """Weigh the neighbours of each position along each dimension, the border's values going on beyond it.

    By a matrix for each dimension: lines are short, and one product takes less than a convolution of one channel.
    """
    reach = len(weights) // 2
    for dim in range(2, maps.dim()):
        length = maps.shape[dim]
        places = torch.arange(length, device=maps.device)
        seen = (places[:, None] + torch.arange(-reach, reach + 1, device=maps.device)).clamp(0, length - 1)
        matrix = maps.new_zeros(length, length).scatter_add(1, seen, weights.expand(length, -1))
        maps = torch.matmul(maps.movedim(dim, -1), matrix.T).movedim(-1, dim)
    return maps
