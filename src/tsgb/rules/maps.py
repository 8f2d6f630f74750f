"""Beyond the paper: where classes compete, and how the relevance of all depths makes one map.

None replaces a rule of `formulas`: `rivalry` weighs what arrives below the head, `claims` keeps who holds what there,
`depths` reads what the convolutions hand on anyway. `docs/notebook.md` has the measurements behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .grids import over_largest, painted, planes, resized, smoothed

__all__ = ["claims", "depths", "rivalry"]

_TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
_FINE, _WIDE, _REACH = 1 / 64, 1 / 8, 1 / 6  # of the shorter side of the map: see `depths`
_AROUND, _GROUND, _PEAK = 1 / 5, 1 / 5, 1 / 2  # of what lies around, of the class's ground, of the peak in the map
_DOUBT = 0.01  # of the largest claim: where all claims are less, the ground is nobody's
_WINDOW, _NOISE = 1 / 14, 0.02  # of the guided filter: its radius, of the shorter side, and epsilon
_SIDE = 64  # positions along the shorter side that the fine Gaussian leaves apart: finer fields are added up
_COARSE = 4  # of these side by side, which the wide one does not tell apart
_PIECE = 2**20  # values of maps that are worked on at once, as fine as the image: they stay in the cache
_FLAT = 1e-5  # of evidence: deviations of this size are those of rounding, and tell no likeness
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
    gate over the object itself. ``corr`` is the correlation over the positions; what is the same everywhere, but for
    a 1e-5th of its size, correlates with nothing: each deviation's norm counts with that much of the evidence's added.

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
    logits, rival = _against(evidence, asked, alike, temperature)
    share = torch.cat([logits[:asked, None], logits[None, asked:] + rival[..., None].log()], 1).softmax(1)[:, 0]
    return (floor + (1 - floor) * share).reshape(asked, *evidence.shape[1:])


def claims(evidence: Tensor, gate: Tensor, *, alike: float = 0.5, temperature: float = 4.0) -> Tensor:
    """What each class that is asked for, and what its rivals, hold of the positions where they compete.

    ::

        e_k(p) = c_k(p) less the mean of c_r(p) over the classes that may be rivals, 0 where it is less
        own_k = gate_k e_k
        theirs_k = sum over r of w_r e_r exp(l_r / t) / (sum over all s that may be rivals of exp(l_s / t))

    Args:
        evidence, alike, temperature: as in `rivalry`, whose w_r and l_r these are. ``gate``: what it gave.

    Returns:
        (2, K, N, *positions): ``own`` and ``theirs``, 0 or more.

    Example:
        >>> left, right = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
        >>> rows = torch.cat([left, left, right])
        >>> claims(rows, rivalry(rows, 1)).round(decimals=1)
        tensor([[[[1.8000, 0.0000]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[0.0000, 1.8000]]]])
    """
    asked, maps = len(gate), evidence.flatten(2)
    logits, rival = _against(evidence, asked, alike, temperature)
    held = (maps - maps[asked:].mean(0)).clamp(min=0)
    theirs = torch.einsum("krn,rnp->knp", rival, held[asked:] * logits[asked:].softmax(0))
    return torch.stack([held[:asked] * gate.flatten(2), theirs]).reshape(2, asked, *evidence.shape[1:])


def _against(evidence: Tensor, asked: int, alike: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The local logits over the temperature (K + R, N, P), and how far each class r is a rival of k (K, R, N)."""
    maps = evidence.flatten(2)
    logits = maps * (maps.shape[2] / temperature)
    centred = maps - maps.mean(2, keepdim=True)
    unit = centred / (centred.norm(dim=2, keepdim=True) + _FLAT * maps.norm(dim=2, keepdim=True) + _TINY)
    likeness = torch.einsum("knp,rnp->krn", unit[:asked], unit[asked:])
    # A step in place of the band would make a class of a rounding error.
    return logits, ((alike + _BAND - likeness) / (2 * _BAND)).clamp(0, 1)


def depths(fields: Sequence[Tensor], image: Tensor, claims: Sequence[Tensor] = ()) -> Tensor:
    """One map of the relevance at all depths: what they agree on, what the class holds around it, up to the edges.

    ::

        t = M / max M,   M = mean over sizes of F_s / max F_s,   F_s = sum of the fields c of that size, smoothed
        v = t + 1/5 G(t) / max G(t)                                       (what lies around the evidence)
        ground = H(own) / (H(own) + H(theirs) + 1/100 max H(own))         (what is nearer to it than to rivals)
        m = max(v, 1/5 ground) + min(v, 0)
        map = max(guided(m), min(v, 0)) + 1/2 t^4

    ``c`` is what TSGB-Conv shares at a convolution's output, one number a position. The finest size is divided until
    its shorter side has at most 64 positions, and all finer fields, as the sums of their positions there, count as of
    that size: a network that answers at so fine a resolution itself would else be outvoted by its stem. The Gaussian
    that smooths has a standard deviation of a 64th of the map's shorter side, less what a field's own coarseness does;
    G's is an eighth, H's a sixth. Of t, negative values count in v alone. The guided filter, see `grids.planes`, has a
    radius of a 14th and an epsilon of 0.02: it moves the map's borders to those of the image; the peak, which it
    levels, is given back by the fourth power.

    Args:
        fields: each (K, N, *positions), any sign; those of one size are added up.
        image: (N, C, *size), with as many dimensions as the fields have positions.
        claims: each (2, K, N, *positions), of the places where the classes compete, see `claims`; none if they do not,
            and then no ground is the class's.

    Returns:
        (K, N, *size). Where no field is positive anywhere, once smoothed, it is the map of what speaks against.

    Raises:
        ValueError: no fields.

    Example:
        >>> depths([torch.rand(2, 1, 4, 4), torch.rand(2, 1, 8, 8)], torch.rand(1, 3, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """
    if not fields:
        raise ValueError("depths needs at least one field (K, N, *positions), got none")
    finest = max((field.shape[2:] for field in fields), key=torch.Size.numel)
    grid = _divided(finest, math.ceil(min(finest) / _SIDE))
    sign, total = _agreed(fields, grid)
    small = _divided(grid, _COARSE if min(grid) > _SIDE // 2 else 1)
    wide = smoothed(resized(total.clamp(min=0), small), _WIDE * min(small))
    value = total + _AROUND * over_largest(resized(wide, grid))
    if claims:
        ground = resized(_ground(claims, small), grid)
        value = torch.maximum(value, _GROUND * ground) + value.clamp(max=0)
    lines, size = planes(value, image, max(1, round(_WINDOW * min(grid))), _NOISE), image.shape[2:]
    least, peak = value.clamp(max=0), _PEAK * total.clamp(min=0).square().square()
    step = max(1, _PIECE // max(1, len(image) * size.numel()))
    pieces = zip(torch.split(lines, step, 1), *(torch.split(x, step) for x in (least, peak, sign)), strict=True)
    return torch.cat(
        [
            one * (torch.maximum(painted(line, image), resized(low, size)) + resized(top, size))  # planes overshoot
            for line, low, top, one in pieces
        ]
    )


def _agreed(fields: Sequence[Tensor], grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What the depths agree on, over its largest value; and -1 for the classes that nothing speaks for, else 1."""
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
        smooth.append(smoothed(resized(field, grid), rest))
    largest = torch.stack([field.flatten(2).amax(2) for field in smooth]).amax(0)
    sign = torch.where(largest > 0, 1.0, -1.0).to(largest.dtype).reshape(*largest.shape, *(1 for _ in grid))
    return sign, over_largest(torch.stack([over_largest(sign * field) for field in smooth]).sum(0))


def _ground(claims: Sequence[Tensor], grid: tuple[int, ...]) -> Tensor:
    """How far each position is the class's, 0..1: it is nearer to its claims than to those of its rivals."""
    held = torch.stack([torch.stack([resized(part, grid) for part in both]) for both in claims]).sum(0)
    own, theirs = (smoothed(part, _REACH * min(grid)) for part in held)
    doubt = _DOUBT * own.flatten(2).amax(2).reshape(*own.shape[:2], *(1 for _ in grid))
    return own / (own + theirs + doubt).clamp(min=_TINY)


def _joined(field: Tensor, grid: Sequence[int]) -> Tensor:
    """A field as it is on the grid, of the same sum, where it is finer."""
    size = field.shape[2:]
    if tuple(size) == tuple(grid) or any(n < m for n, m in zip(size, grid, strict=True)):
        return field
    return resized(field, grid) * (size.numel() / torch.Size(grid).numel())


def _divided(size: Sequence[int], by: int) -> tuple[int, ...]:
    return tuple(max(1, round(n / by)) for n in size)
