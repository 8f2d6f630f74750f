"""Make one map from what a backward pass recorded: let classes compete, and fuse the relevance of all depths.

The engine calls `competition_gate` where the evidence of the classes meets the last feature map, and `fused_map` with
the fields that the convolutions recorded. Every number that shapes a map is a field of `Fusion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Fusion", "competition_gate", "fuse_depths", "fused_map"]

_TINY = 1e-30  # turns 0 / 0 into 0 and changes no other number
_CHUNK = 2**20  # values of full-size maps to compute at once, so that they stay in the cache


@dataclass(frozen=True)
class Fusion:
    """The numbers of the fusion. Distances are positions on a grid of about ``side`` positions a dimension.

    Example:
        >>> Fusion(halo=0.0).halo, Fusion().side
        (0.0, 64)
    """

    rivals: int = 20  # the classes of the highest logits, which a requested class may have to compete with
    alike: float = 0.6  # the correlation of evidence from which a class is a sibling, no rival at all
    floor: float = 0.3  # the share that a class keeps where a rival claims everything
    side: int = 64  # the resolution at which depths are fused
    octaves: int = 4  # how many depths are fused: the coarsest octaves of the fields' sizes
    halo: float = 0.2  # the height of the halo around the evidence, relative to the peak
    reach: float = 8.0  # the standard deviation of the halo
    radius: int = 5  # the radius of the guided filter's window
    noise: float = 0.02  # the guided filter's epsilon: variances of the image below it count as noise


def competition_gate(evidence: Tensor, requested: int, fusion: Fusion) -> Tensor:
    """Compute how much of its evidence each requested class keeps at each position.

    ::

        l_k(p) = positions * c_k(p)                      (the logit, if all positions spoke as p does)
        w_r = clamp(1 - corr(c_r, c_k) / alike, 0, 1)    (how far class r is a rival of k, not a sibling)
        share_k(p) = exp l_k(p) / (exp l_k(p) + sum over r of w_r exp l_r(p))
        gate_k = floor + (1 - floor) share_k

    ``c_k`` is the evidence for class k: its relevance, summed over the channels. A class whose evidence lies at the
    same positions, such as another breed of dog, is a sibling. It would close the gate over the object itself. Evidence
    that is the same at all positions correlates with nothing.

    Args:
        evidence: (K + R, N, *positions), any sign: of the requested classes, then of the classes that may be rivals. A
            requested class may be among these.
        requested: K.
        fusion: its ``alike`` and ``floor`` are read.

    Returns:
        (K, N, *positions), from ``floor`` to 1.

    Example:
        >>> left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> competition_gate(torch.cat([left, right]), 1, Fusion()).round(decimals=2)
        tensor([[[0.9200, 0.3800]]])
        >>> competition_gate(torch.cat([left, 2 * left]), 1, Fusion())
        tensor([[[1., 1.]]])
    """
    maps = evidence.flatten(2)
    logits = maps * maps.shape[2]
    unit = _standardized(maps)[2] / maps.shape[2] ** 0.5
    likeness = torch.einsum("knp,rnp->krn", unit[:requested], unit[requested:])
    rivalry = (1 - likeness / fusion.alike).clamp(0, 1)
    against = logits[requested:] + rivalry.log()[..., None]
    share = torch.cat([logits[:requested, None], against], 1).softmax(1)[:, 0]
    return (fusion.floor + (1 - fusion.floor) * share).reshape(requested, *evidence.shape[1:])


def fused_map(
    fields: Sequence[Tensor], evidence: Tensor | None, image: Tensor, fusion: Fusion, per_channel: bool = False
) -> Tensor | None:
    """Fuse the fields of all depths into a map in units of the logit.

    ::

        m = s * fuse_depths(s * fields),    s = 1 if evidence_for > 0 else -1
        map = a max(m, 0) + b min(m, 0),    a = evidence_for / sum max(m, 0)
        b = min(a, |evidence_against| / sum |min(m, 0)|)        (without a where that is 0)

    So the positive values sum to the evidence for the class, and the negative values to no more than the evidence
    against it. If all evidence is against a class, its map shows what speaks against it, in negative values.

    Args:
        fields: each (K, N, *positions), what a convolution shares. Fields of other dimensions or images are ignored.
        evidence: (2, K, N), the evidence for and against each class that passed the gates, summed over the positions.
        image: (N, C, *size).
        fusion: the numbers of the fusion.
        per_channel: whether to divide each pixel among the image's channels, in proportion to their absolute values.

    Returns:
        (K, N, *size), or (K, N, C, *size) per channel. None if there is no field, or no evidence of these images.

    Example:
        >>> fields, evidence = [torch.rand(2, 1, 4, 4)], torch.tensor([[[3.0], [5.0]], [[0.0], [0.0]]])
        >>> fused_map(fields, evidence, torch.rand(1, 3, 16, 16), Fusion()).sum((2, 3)).round(decimals=3)
        tensor([[3.],
                [5.]])
    """
    fields = [field.to(image.device) for field in fields if field.dim() == image.dim() and field.shape[1] == len(image)]
    if evidence is None or not fields or evidence.shape[1:] != fields[0].shape[:2]:
        return None
    speaks_for, against = _broadcast(evidence.to(image.device), image)
    sign = _sign(speaks_for)
    total, flip = _fused(_octaves(fields, image, fusion) * sign, image, fusion)
    total = total * (flip * sign)
    spatial = tuple(range(2, image.dim()))
    raised = speaks_for / total.clamp(min=0).sum(spatial, keepdim=True).clamp(min=_TINY)
    lowered = against / total.clamp(max=0).sum(spatial, keepdim=True).clamp(max=-_TINY)
    lowered = torch.where(raised > 0, torch.minimum(raised, lowered), lowered)
    total = total * torch.where(total > 0, raised, lowered)
    if not per_channel:
        return total
    sizes = image.abs()
    whole = sizes.sum(1, keepdim=True)
    share = torch.where(whole > 0, sizes / whole.clamp(min=_TINY), 1 / image.shape[1])
    return total.unsqueeze(2) * share


def fuse_depths(fields: Sequence[Tensor], image: Tensor, fusion: Fusion) -> Tensor:
    """Fuse the fields of all depths into one map: what they agree on, a halo around it, aligned to the image's edges.

    ::

        F_s = sum of the fields of octave s            (each resized to the grid, of the same sum)
        M = sum over s of F_s / max F_s        t = M / max M        v = t + halo * G(t) / max G(t)
        map = max(guided(v), min(v, 0)), times 1 + max(t, 0)

    The grid has about ``side ** d`` positions for d spatial dimensions, in the image's aspect ratio. Octave s holds the
    sizes from 1 / 2 ** s of the grid's to below twice that, octave 0 all that are as fine as the grid or finer. The
    coarsest ``octaves`` of them count. ``G`` is a Gaussian of the standard deviation ``reach``, of positive values
    alone. The guided filter moves the map's borders to those of the image, but levels its peak, which the last factor
    restores (on the grid). Where no field of a class is positive, the formula is applied to the negated fields, and the
    map negated.

    Sources: the mean over depths is the project's own; He, Sun, Tang, "Guided image filtering", IEEE TPAMI 2013.

    Args:
        fields: each (K, N, *positions), any sign.
        image: (N, C, *size), with as many spatial dimensions (one to three) as the fields.
        fusion: the numbers of the fusion.

    Returns:
        (K, N, *size), not scaled to the evidence.

    Raises:
        ValueError: ``fields`` is empty.

    Example:
        >>> fuse_depths([torch.rand(2, 1, 4, 4), torch.rand(2, 1, 8, 8)], torch.rand(1, 3, 16, 16), Fusion()).shape
        torch.Size([2, 1, 16, 16])
    """
    if not fields:
        raise ValueError("fuse_depths needs at least one field (K, N, *positions), got none")
    total, flip = _fused(_octaves(fields, image, fusion), image, fusion)
    return total * flip


def _octaves(fields: Sequence[Tensor], image: Tensor, fusion: Fusion) -> Tensor:
    """Fields (K, N, *positions) on the grid, those of one octave added up: (octaves, K, N, *grid)."""
    size = image.shape[2:]
    scale = fusion.side / math.prod(size) ** (1 / len(size))
    grid = [max(1, round(n * scale)) for n in size]
    by_size: dict[tuple[int, ...], list[Tensor]] = {}
    for field in fields:
        by_size.setdefault(tuple(field.shape[2:]), []).append(field)
    octaves: dict[int, list[Tensor]] = {}
    for positions, same in by_size.items():
        finer = math.prod(positions) / math.prod(grid)
        octave = max(0, math.ceil(-math.log2(finer) / len(grid)))
        octaves.setdefault(octave, []).append(_resized(_total(same), grid) * finer)
    return torch.stack([_total(octaves[octave]) for octave in sorted(octaves)[-fusion.octaves :]])


def _fused(octaves: Tensor, image: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """The map of `fuse_depths` before it is negated, and the sign (K, N, 1, ...) to multiply it by."""
    dims = image.dim() - 2
    flip = _sign(octaves.amax((0, *range(-dims, 0)), keepdim=True)[0])
    total = _over_largest(_over_largest(octaves * flip, dims).sum(0), dims)
    gaussian = _windows(total, lambda x: torch.erf(x / (fusion.reach * 2**0.5)))
    positive = total.clamp(min=0)
    around = _over_largest(_smoothed(positive, gaussian), dims)
    value = total.add(around, alpha=fusion.halo)
    image = image.to(value.dtype)
    image = image if image.shape[1] <= 2 * fusion.radius + 1 else image.mean(1, keepdim=True)
    middle, spread, colors = _standardized(_resized(image, total.shape[2:]))
    image = (image - middle) / spread
    planes = torch.cat([_guided_filter_fit(value, colors, fusion), value.clamp(max=0)[None]]) * (1 + positive)
    chunk = max(1, _CHUNK // math.prod((len(image), *image.shape[2:])))
    return torch.cat([_guided_filter_apply(part, image) for part in torch.split(planes, chunk, 1)]), flip


def _total(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(maps)).sum(0) if len(maps) > 1 else maps[0]


def _guided_filter_fit(maps: Tensor, colors: Tensor, fusion: Fusion) -> Tensor:
    """In each window, fit the maps (K, N, *grid) by a linear function of the image's channels, standardized.

    ::

        a_w = (cov_w(I) + noise)^-1 cov_w(I, map)        b_w = mean_w(map) - a_w . mean_w(I)

    Returned are the means over the windows that hold a position, of b_w, then of a_w for each channel of the image
    (N, C, *grid): (1 + C, K, N, *grid).
    """
    colors = colors.transpose(0, 1)
    count, targets = len(colors), torch.cat([colors, maps])
    box = _windows(maps, lambda x: (x / (fusion.radius + 0.5)).clamp(-1, 1))
    means, products = _smoothed(torch.cat([targets[None], colors[:, None] * targets]), box).tensor_split([1])
    unit = torch.eye(count, len(targets), dtype=maps.dtype, device=maps.device)
    unit = unit.reshape(*unit.shape, *(1,) * (maps.dim() - 1))
    system = (products + unit * fusion.noise).addcmul(means[0, :count, None], means, value=-1)
    for i in range(count):  # Gauss-Jordan elimination: a positive definite matrix needs no pivoting
        pivot = system[i] / system[i, i]
        system = system.addcmul((system[:, i] - unit[:, i])[:, None], pivot, value=-1)
    slopes = system[:, count:]
    offset = means[:, count:] - (slopes * means[0, :count, None]).sum(0)
    return _smoothed(torch.cat([offset, slopes]), box)


def _guided_filter_apply(planes: Tensor, image: Tensor) -> Tensor:
    """Apply the fit to the standardized image at full size, and bound the result below by the last plane."""
    size = image.shape[2:]
    offset, *slopes, least = _resized(planes.flatten(0, 1), size).reshape(*planes.shape[:3], *size)
    for slope, color in zip(slopes, image.transpose(0, 1), strict=True):
        offset = offset.addcmul(slope, color)
    return torch.maximum(offset, least)


def _standardized(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the standard deviation of maps (A, B, *), and the maps less their mean, over their deviation.

    Deviations below eps ** 0.625 of the maps' own values may be rounding errors and count as none.
    """
    spatial = tuple(range(2, maps.dim()))
    middle = maps.mean(spatial, keepdim=True)
    centered = maps - middle
    rounding = maps.square() * torch.finfo(maps.dtype).eps ** 1.25
    spread = (centered.square() + rounding).mean(spatial, keepdim=True).clamp(min=_TINY).sqrt()
    return middle, spread, centered / spread


def _over_largest(maps: Tensor, dims: int) -> Tensor:
    """Maps (..., *grid) over their largest value; 0 where none is positive."""
    largest = maps.amax(tuple(range(-dims, 0)), keepdim=True)
    return maps * ((largest > 0) / largest.clamp(min=_TINY))


def _sign(numbers: Tensor) -> Tensor:
    """1 for positive numbers, else -1."""
    return (numbers > 0).to(numbers.dtype) * 2 - 1


def _broadcast(numbers: Tensor, image: Tensor) -> Tensor:
    """Numbers (..., K, N) as factors of maps (K, N, *size)."""
    return numbers.reshape(*numbers.shape, *(1,) * (image.dim() - 2))


def _windows(maps: Tensor, cumulative: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The weights (length, length) of a window around each position, for each dimension of maps (K, N, *grid).

    ``cumulative`` rises from -1 to 1: twice a distribution function, less 1. Values at the border continue beyond it,
    so the outermost positions get the weights of all that lies outside.
    """
    windows = {}
    for length in maps.shape[2:]:
        if length not in windows:
            places = torch.arange(length, dtype=maps.dtype, device=maps.device)
            steps = cumulative(places[1:] - 0.5 - places[:, None])
            windows[length] = (functional.pad(steps, (0, 1), value=1.0) - functional.pad(steps, (1, 0), value=-1.0)) / 2
    return [windows[length] for length in maps.shape[2:]]


def _smoothed(maps: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """Maps (..., *grid), averaged by the window of each position along each dimension."""
    for window in windows:
        maps = maps.movedim(-len(windows), -1) @ window.T
    return maps


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (A, B, *positions) at another size: means over areas if it is coarser, linear interpolation if finer."""
    positions = tuple(maps.shape[2:])
    if positions == tuple(size):
        return maps
    is_finer = all(n >= m for n, m in zip(positions, size, strict=True))
    mode = "area" if is_finer else ("linear", "bilinear", "trilinear")[len(size) - 1]
    return functional.interpolate(maps, tuple(size), mode=mode)
