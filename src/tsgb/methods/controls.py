"""Maps that look at no image: what every method must beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["center", "random"]


def center(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """How near a pixel is to the image's centre: 1 there, 0 in the corners, falling evenly.

    Source: the control of the pointing game (J. Zhang et al., ECCV 2016).

    Args:
        model: not read. ``images``: (N, 3, H, W), for its shape. ``targets``: (N, K), for its shape. ``seed``: not
            read.

    Returns:
        (N, K, H, W), from 0 to 1.

    Example:
        >>> center(nn.Identity(), torch.zeros(1, 3, 1, 4), torch.zeros(1, 1))[0, 0]
        tensor([[0.2500, 0.7500, 0.7500, 0.2500]])
    """
    sides = images.shape[2:]
    rows, columns = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in sides)
    distance = torch.hypot(rows[:, None], columns[None, :])
    return (1 - distance / (math.hypot(*sides) / 2)).expand(*targets.shape, -1, -1)


def random(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise of 0..1 from the seed, the same for all images and targets.

    Args:
        model: not read. ``images``: (N, 3, H, W), for its shape. ``targets``: (N, K), for its shape. ``seed``: of the
            noise.

    Returns:
        (N, K, H, W).

    Example:
        >>> maps = random(nn.Identity(), torch.zeros(2, 3, 8, 8), torch.zeros(2, 1))
        >>> torch.equal(maps[0], maps[1])
        True
    """
    noise = torch.rand(images.shape[2:], generator=torch.Generator().manual_seed(seed))
    return noise.to(images.device).expand(*targets.shape, -1, -1)
