"""How much of a map's positive part lies where the class is, and the sharpening that such shares reward."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_maps, check_masks

__all__ = ["cells", "energy", "grid", "power"]

_NOTHING = 1e-7  # of a positive map's sum: Rao et al. score what is below as 0


def energy(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy pointing game: the share of the positive map that lies inside the mask.

    ``sum over the mask of max(map, 0) / sum of max(map, 0)``. Source: Wang et al. 2020, "Score-CAM".

    Args:
        maps: (N, H, W) floating, any sign.
        masks: (N, H, W) bool, the class's boxes or mask.

    Returns:
        (N,) float64, 0..1; 0 for a map without positive values.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps, or ``masks`` no bool masks of their shape.

    Example:
        >>> energy(torch.tensor([[[3.0, -5.0], [1.0, 0.0]]]), torch.tensor([[[True, True], [False, False]]]))
        tensor([0.7500], dtype=torch.float64)
    """
    return _share(maps, masks, 0.0, "masks")


def grid(maps: Tensor, cells: Tensor) -> Tensor:
    """Grid pointing game: the share of the positive map that lies in the class's cell of a grid of images.

    As `energy`, but 0 where the positive map sums to 1e-7 or less. Chance is 1 / n^2 for n x n images. Source: Rao et
    al. 2022, "Towards better understanding attribution methods".

    Args:
        maps: (N, H, W) floating, any sign.
        cells: (N, H, W) bool, the cell of each map's class, see the function `cells`.

    Returns:
        (N,) float64, 0..1.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps, or ``cells`` no bool masks of their shape.

    Example:
        >>> grid(torch.ones(4, 6, 6), cells(2, 6, 6))
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    return _share(maps, cells, _NOTHING, "cells")


def cells(n: int, height: int, width: int) -> Tensor:
    """Masks of the cells of an n x n grid, row by row.

    Args:
        n: cells a side, at least 1. ``height``, ``width``: of the whole grid in pixels, multiples of ``n``.

    Returns:
        (n * n, height, width) bool; each pixel is in one cell.

    Raises:
        ValueError: the grid cannot be divided.

    Example:
        >>> cells(2, 2, 4)[1].int()
        tensor([[0, 0, 1, 1],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    if n < 1 or min(height, width) < 1 or height % n or width % n:
        raise ValueError(f"height and width must be multiples of n, at least 1, got {height} x {width} with n = {n}")
    rows, columns = torch.arange(height) // (height // n), torch.arange(width) // (width // n)
    return rows[:, None] * n + columns == torch.arange(n * n)[:, None, None]


def power(maps: Tensor, exponent: float) -> Tensor:
    """The positive part of a map to a power: a control, as shares reward any sharpening and the order does not change.

    Args:
        maps: (N, H, W) floating, any sign.
        exponent: above 0; 2 or 3 sharpens, 1/2 flattens.

    Returns:
        (N, H, W) float64, since the cube of a faint float32 map would be lost to underflow.

    Raises:
        TypeError, ValueError: ``maps`` are no finite maps, or ``exponent`` is not above 0.

    Example:
        >>> power(torch.tensor([[[-2.0, 3.0]]]), 2)
        tensor([[[0., 9.]]], dtype=torch.float64)
    """
    check_maps(maps)
    if not exponent > 0:
        raise ValueError(f"exponent must be above 0, got {exponent}")
    positive: Tensor = maps.double().clamp(min=0) ** exponent
    return positive


def _share(maps: Tensor, masks: Tensor, nothing: float, name: str) -> Tensor:
    check_maps(maps)
    check_masks(masks, maps, name)
    positive = maps.double().clamp(min=0)
    total = positive.sum((1, 2))
    return torch.where(total > nothing, (positive * masks).sum((1, 2)) / total, 0.0)
