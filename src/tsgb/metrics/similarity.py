"""How alike two maps are: Spearman's and Pearson's correlation, and structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_maps

__all__ = ["correlation", "spearman", "ssim"]

_WINDOW, _K1, _K2, _RANGE = 5, 0.01, 0.03, 2.0  # of structural similarity; signed maps are scaled to -1..1
_FULL = 0.995  # the share of a sign's values that lie at or below its full scale


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two maps over their pixels, ``cov(a, b) / (std(a) std(b))``; 0 where one is constant.

    Args:
        a: (N, H, W), floating, any sign.
        b: The same shape.

    Returns:
        float64 (N,) in -1..1.

    Raises:
        ValueError: If the shapes differ or are not (N, H, W), or a map is not finite.
        TypeError: If a map is not floating.

    Example:
        >>> a = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
        >>> correlation(a, -2 * a + 1), correlation(a, torch.ones(1, 2, 2))
        (tensor([-1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    _check(a, b)
    return _pearson(a.detach().double().flatten(1), b.detach().double().flatten(1))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps over their pixels: Pearson's of the ranks, equal values the mean rank.

    0 where a map is constant. Used by the cascading randomisation of J. Adebayo et al., "Sanity Checks for Saliency
    Maps", NeurIPS 2018, on absolute and on signed maps. Arguments and errors as for `correlation`.

    Returns:
        float64 (N,) in -1..1.

    Example:
        >>> a, b = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 100.0], [10.0, 1000.0]]])
        >>> spearman(a, b)  # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * (1 + 1) / (4 * 15)
        tensor([0.8000], dtype=torch.float64)
    """
    _check(a, b)
    return _pearson(_ranks(a.detach().flatten(1)), _ranks(b.detach().flatten(1)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two signed maps, each scaled to -1..1 by itself first.

    Positive values are divided by the 99.5th percentile (linear between values) of the map's positive values, negative
    ones by that of its absolute negative values, and cut to -1..1. Then, with the means m, variances v and covariance
    c of each 5 x 5 window that lies in the map (divisor 24), and ``C1 = (0.01 * 2)^2``, ``C2 = (0.03 * 2)^2``::

        ssim = mean over windows of (2 m_a m_b + C1) (2 c + C2) / ((m_a^2 + m_b^2 + C1) (v_a + v_b + C2))

    Two maps without any evidence are alike: 1. Source: Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image
    Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 13 (2004), with a uniform window as in
    Adebayo et al. 2018.

    Args:
        a: (N, H, W), floating, any sign, H and W of 5 or more.
        b: The same shape.

    Returns:
        float64 (N,) in -1..1.

    Raises:
        ValueError: As `correlation`, and if H or W is below 5.
        TypeError: If a map is not floating.

    Example:
        >>> a = torch.arange(36.0).reshape(1, 6, 6)
        >>> ssim(a, 3 * a), ssim(a, torch.zeros(1, 6, 6)) < 0.01
        (tensor([1.], dtype=torch.float64), tensor([True]))
    """
    _check(a, b)
    if min(a.shape[1:]) < _WINDOW:
        raise ValueError(f"maps must be of {_WINDOW} x {_WINDOW} pixels or more for ssim, got {tuple(a.shape)}")
    a, b = _scaled(a), _scaled(b)
    mean_a, mean_b = _means(a), _means(b)
    sample = _WINDOW**2 / (_WINDOW**2 - 1)
    spread = sample * (_means(a * a) - mean_a**2 + _means(b * b) - mean_b**2)
    shared = sample * (_means(a * b) - mean_a * mean_b)
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    return likeness.mean((1, 2)).clamp(-1, 1)


def _check(a: Tensor, b: Tensor) -> None:
    check_maps(a, "a")
    check_maps(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a and b must be of one shape (N, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    constant = (a.amax(1) == a.amin(1)) | (b.amax(1) == b.amin(1))
    a, b = _centred(a), _centred(b)
    found = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.where(constant, 0, found.clamp(-1, 1))


def _centred(values: Tensor) -> Tensor:
    """Rows less their mean, on a scale on which no square is lost."""
    scaled = values / values.abs().amax(1, keepdim=True)
    return scaled - scaled.mean(1, keepdim=True)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row (N, P), 1 the smallest; equal values share the mean of theirs."""
    ordered, order = values.sort(dim=1)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    rises = ordered[:, 1:] != ordered[:, :-1]
    edge = rises.new_ones(len(values), 1)
    first = torch.where(torch.cat([edge, rises], 1), places, 0).cummax(1).values
    last = torch.where(torch.cat([rises, edge], 1), places, values.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(order, dtype=torch.float64).scatter_(1, order, (first + last).double() / 2 + 1)


def _scaled(map: Tensor) -> Tensor:
    """Signed maps (N, H, W) on -1..1, each sign by its own full scale."""
    values = map.detach().double()
    return _full(values.clamp(min=0)) - _full((-values).clamp(min=0))


def _full(values: Tensor) -> Tensor:
    """Values of 0 or more over the percentile of those above 0 in their map, cut to 1."""
    ordered = values.flatten(1).sort(dim=1).values
    zeros = (ordered == 0).sum(1, keepdim=True)
    count = ordered.shape[1] - zeros
    place = (count - 1).clamp(min=0).double() * _FULL
    below = (zeros + place.long()).clamp(max=ordered.shape[1] - 1)
    low, high = ordered.gather(1, below), ordered.gather(1, (below + 1).clamp(max=ordered.shape[1] - 1))
    scale = low + (high - low) * (place - place.floor())
    return (values / torch.where(count > 0, scale, 1)[:, :, None]).clamp(max=1)


def _means(values: Tensor) -> Tensor:
    """Mean of each window that lies in the map: (N, H, W) to (N, H - 4, W - 4)."""
    return functional.avg_pool2d(values[:, None], _WINDOW, stride=1)[:, 0]
