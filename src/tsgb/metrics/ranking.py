"""Metrics that depend on the ranking of a map's pixels alone: average precision and the pointing game."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_maps, check_masks

__all__ = ["average_precision", "pointing", "ranking"]


def ranking(maps: Tensor, seed: int = 0) -> Tensor:
    """Rank the pixels of each map from the most evidence to the least, ties at random.

    The pixels are put into a random order first, one for all maps of a size, and sorted stably from there; so a map's
    ranking depends on the map and the seed, not on the batch or the device.

    Args:
        maps: (N, H, W) floating, any sign.
        seed: decides among equal values.

    Returns:
        (N, H * W) int64, pixel indices row by row, the highest value's first.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps.

    Example:
        >>> ranking(torch.tensor([[[0.1, 0.9], [0.5, -1.0]]]))
        tensor([[1, 2, 0, 3]])
    """
    check_maps(maps)
    shuffled, pixels = _shuffled(maps, seed)
    return pixels[shuffled.argsort(dim=1, descending=True, stable=True)]


def average_precision(maps: Tensor, masks: Tensor, seed: int = 0) -> Tensor:
    """Average precision of the pixels, ranked by the map, as a detector of the mask.

    ::

        AP = 1 / |mask| * sum over ranks r that hold a pixel of the mask of (pixels of the mask among the first r) / r

    scikit-learn's ``average_precision_score``, with ties broken at random instead of taken as one step. Chance is
    about |mask| / (H * W); a mask of everything gives 1.

    Args:
        maps: (N, H, W) floating, any sign, higher is more evidence.
        masks: (N, H, W) bool, the object (mask AP), its boxes (box AP), or the class's cell of a grid (grid AP).
        seed: decides among equal values, see `ranking`.

    Returns:
        (N,) float64, 0..1; NaN where the mask is empty.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps, or ``masks`` no bool masks of their shape.

    Example:
        Of the two pixels of the mask one is ranked first, the other third: (1/1 + 2/3) / 2.

        >>> map = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])
        >>> average_precision(map, torch.tensor([[[True, False], [False, True]]]))
        tensor([0.8333], dtype=torch.float64)
    """
    check_maps(maps)
    check_masks(masks, maps)
    found = masks.flatten(1).gather(1, ranking(maps, seed)).double()
    ranks = torch.arange(1, found.shape[1] + 1, dtype=torch.float64, device=maps.device)
    return (found.cumsum(1) / ranks * found).sum(1) / found.sum(1)


def pointing(
    maps: Tensor,
    masks: Tensor,
    tolerance: float = 0.0,
    scale: Sequence[float] | Tensor = (1.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """Pointing game: whether the map's highest pixel points at the mask.

    A hit is a highest pixel that lies in the mask, or nearer to a pixel of it than the tolerance::

        (scale_y * dy)^2 + (scale_x * dx)^2 < tolerance^2

    Source: Zhang et al. 2016, "Top-down neural attention by excitation backprop"; the strict inequality is TorchRay's,
    whose tolerance is 15 pixels of the original image.

    Args:
        maps: (N, H, W) floating, any sign. ``masks``: (N, H, W) bool, the class's mask or boxes.
        tolerance: in pixels of the original image, 0 or more; 0 asks for a pixel of the mask itself.
        scale: pixels of the original image per pixel of the map, (vertical, horizontal): one pair for all maps, or
            (N, 2).
        seed: decides which of several highest pixels is meant.

    Returns:
        (N,) bool; False where the mask is empty.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps, ``masks`` no bool masks of their shape, ``tolerance``
        negative, or ``scale`` of another shape or not positive.

    Example:
        >>> map, mask = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> map[0, 0, 0], mask[0, 0, 2] = 1, True
        >>> pointing(map, mask), pointing(map, mask, tolerance=2), pointing(map, mask, tolerance=2.1)
        (tensor([False]), tensor([False]), tensor([True]))
    """
    check_maps(maps)
    check_masks(masks, maps)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, in pixels of the original image, got {tolerance}")
    scales = torch.as_tensor(scale, dtype=torch.float64, device=maps.device)
    if scales.shape not in ((2,), (len(maps), 2)) or not (scales > 0).all() or scales.isinf().any():
        raise ValueError(f"scale must be positive, (vertical, horizontal) or (N, 2), got {scale}")
    height, width = maps.shape[1:]
    shuffled, pixels = _shuffled(maps, seed)
    highest = pixels[shuffled.argmax(1)]
    dy = torch.arange(height, device=maps.device) - (highest // width)[:, None]
    dx = torch.arange(width, device=maps.device) - (highest % width)[:, None]
    squared = (dy * scales[..., :1])[:, :, None] ** 2 + (dx * scales[..., 1:])[:, None, :] ** 2
    return (masks & ((squared < tolerance**2) | (squared == 0))).flatten(1).any(1)


def _shuffled(maps: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The maps' pixels (N, H * W) in a random order, and which pixels these are."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randperm(maps.shape[1] * maps.shape[2], generator=generator).to(maps.device)
    return maps.flatten(1)[:, pixels], pixels
