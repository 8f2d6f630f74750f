"""Beyond the paper: where classes compete, and how the relevance of all depths makes one map.

Neither replaces a rule of `formulas`: the first weighs what arrives below the head, the second reads what the
convolutions hand on anyway. `docs/notebook.md` has the measurements behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["depths", "rivalry"]

_TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
_FINE, _WIDE = 1 / 64, 1 / 8  # of the shorter side of the map: see `depths`
_SHARE = 0.5  # of the wide Gaussian in the map
_SIDE = 64  # positions along the shorter side that the fine Gaussian leaves apart: finer fields are added up
_COARSE = 4  # of these side by side, which the wide one does not tell apart
_REACH = 3  # standard deviations after which a Gaussian is cut
_BAND = 0.1  # of correlations to either side, in which a sibling becomes a rival


def rivalry(
    evidence: Tensor, asked: int, *, alike: float = 0.5, temperature: float = 4.0, floor: float = 0.3
) -> Tensor:
    """How far each class that is asked for holds each position against its rivals.

    ::

        l_k(p) = positions * c_k(p)                  (the logit, if all positions spoke as p does)
        w_r = (alike + 0.1 - corr(c_r, c_k)) / 0.2, 0..1   (how far class r is a rival of k, and no sibling)
        share_k(p) = exp(l_k(p) / t) / (exp(l_k(p) / t) + sum over r of w_r exp(l_r(p) / t))
        gate_k = floor + (1 - floor) share_k

    ``c_k`` is the evidence for class k, its relevance summed over the channels where the head meets the map. A class
    that is spoken for by the same positions is a sibling, as another breed of dog, and no rival: it would close the
    gate over the object itself.

    Args:
        evidence: (K + R, N, *positions), any sign: of the classes asked for, then of those that may be rivals. One of
            these may be the same as one asked for.
        asked: K.
        alike: a correlation, -1..1.
        temperature: t, in logits.
        floor: what passes where a rival has all, 0..1: the order among such positions is kept.

    Returns:
        (K, N, *positions), ``floor``..1. It replaces conservation: relevance below sums to the evidence that passed.

    Example:
        >>> left, right = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
        >>> rivalry(torch.cat([left, right]), 1, temperature=1.0, floor=0.25).round(decimals=2)
        tensor([[[1.0000, 0.2500]]])
        >>> rivalry(torch.cat([left, 2 * left]), 1)
        tensor([[[1., 1.]]])
    """
    maps = evidence.flatten(2)
    logits = maps * (maps.shape[2] / temperature)
    centred = maps - maps.mean(2, keepdim=True)
    unit = centred / (centred.norm(dim=2, keepdim=True) + _TINY)
    likeness = torch.einsum("knp,rnp->krn", unit[:asked], unit[asked:])
    rival = ((alike + _BAND - likeness) / (2 * _BAND)).clamp(0, 1)  # a step would make a class of a rounding error
    against = logits[None, asked:] + rival[..., None].log()  # (K, R, N, P)
    share = torch.cat([logits[:asked, None], against], 1).softmax(1)[:, 0]
    return (floor + (1 - floor) * share).reshape(asked, *evidence.shape[1:])


def depths(fields: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """One map of the relevance at all depths: the mean of the fields, each over its largest value.

    ::

        M = mean over sizes of F_s / max F_s,   F_s = sum of the fields c of that size, smoothed
        map = M / max M + 1/2 G(M) / max G(M)

    ``c`` is what TSGB-Conv shares at a convolution's output, one number a position. The finest size is divided until
    its shorter side has at most 64 positions, and all finer fields, as the sums of their positions there, count as of
    that size: a network that answers at so fine a resolution itself would else be outvoted by its stem. The Gaussian
    that smooths has a standard deviation of a 64th of the map's shorter side, less what a field's own coarseness does;
    G, of an eighth, lets what is near the evidence outrank what is far from it.

    Args:
        fields: each (K, N, *positions), any sign; those of one size are added up.
        size: of the map, with as many dimensions as the fields have positions.

    Returns:
        (K, N, *size), at most 3/2. Where no field is positive anywhere, once smoothed, it is the map of what speaks
        against, at least -3/2.

    Raises:
        ValueError: no fields.

    Example:
        >>> depths([torch.rand(2, 1, 4, 4), torch.rand(2, 1, 8, 8)], (16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """
    if not fields:
        raise ValueError("depths needs at least one field (K, N, *positions), got none")
    finest = max((field.shape[2:] for field in fields), key=torch.Size.numel)
    grid = _divided(finest, math.ceil(min(finest) / _SIDE))
    side = min(grid)
    by_size: dict[tuple[int, ...], Tensor] = {}
    for field in fields:
        kept = _joined(field, grid)
        key = tuple(kept.shape[2:])
        by_size[key] = by_size[key] + kept if key in by_size else kept
    smooth = []
    for key, field in by_size.items():
        own = side / min(key) / 2 if min(key) < side else 0.0  # what interpolation from its positions smooths
        rest = max(0.0, (_FINE * side) ** 2 - own**2) ** 0.5
        smooth.append(_smoothed(_resized(field, grid), rest))
    largest = torch.stack([field.flatten(2).amax(2) for field in smooth]).amax(0)
    sign = torch.where(largest > 0, 1.0, -1.0).to(largest.dtype).reshape(*largest.shape, *(1 for _ in grid))
    total = _over_largest(torch.stack([_over_largest(sign * field) for field in smooth]).sum(0))
    small = _divided(grid, _COARSE if side > _SIDE // 2 else 1)
    wide = _smoothed(_resized(total.clamp(min=0), small), _WIDE * min(small))
    return _resized(sign * (total + _SHARE * _over_largest(_resized(wide, grid))), size)


def _joined(field: Tensor, grid: Sequence[int]) -> Tensor:
    """A field as it is on the grid, of the same sum, where it is finer."""
    size = field.shape[2:]
    if tuple(size) == tuple(grid) or any(n < m for n, m in zip(size, grid, strict=True)):
        return field
    return _resized(field, grid) * (size.numel() / torch.Size(grid).numel())


def _divided(size: Sequence[int], by: int) -> tuple[int, ...]:
    return tuple(max(1, round(n / by)) for n in size)


def _over_largest(maps: Tensor) -> Tensor:
    """Maps over their largest value; what is positive nowhere is nothing."""
    largest = maps.flatten(2).amax(2).reshape(*maps.shape[:2], *(1 for _ in maps.shape[2:]))
    return torch.where(largest > 0, maps / largest.clamp(min=_TINY), 0)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps on another grid: by means of areas on a coarser one, by linear interpolation on a finer one."""
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


def _smoothed(maps: Tensor, deviation: float) -> Tensor:
    """Maps under a Gaussian of a standard deviation in positions, the border's values going on beyond it."""
    reach = int(_REACH * deviation + 0.5)
    if reach == 0:
        return maps
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-((places / deviation) ** 2) / 2)
    kernel = (kernel / kernel.sum())[None, None]
    for dim in range(2, maps.dim()):
        lines = maps.movedim(dim, -1)
        flat = functional.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        maps = functional.conv1d(flat, kernel).reshape(lines.shape).movedim(-1, dim)
    return maps
