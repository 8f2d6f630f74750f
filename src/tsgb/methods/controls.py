"""Baselines that ignore the image, which every method must beat."""

from __future__ import annotations

import math
import zlib

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
        tensor([[0.2724, 0.7575, 0.7575, 0.2724]])
    """
    sides = images.shape[2:]
    rows, columns = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in sides)
    distance = torch.hypot(rows[:, None], columns[None, :])
    return (1 - distance / (math.hypot(*sides) / 2)).expand(*targets.shape, -1, -1)


def random(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise of 0..1, another for each image, target and seed.

    Args:
        model: not read. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: of the noise.

    Returns:
        (N, K, H, W).

    Example:
        >>> images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
        >>> maps = random(nn.Identity(), images, torch.zeros(2, 1, dtype=torch.int64))
        >>> torch.equal(maps[0], maps[1]), torch.equal(maps[1:], random(nn.Identity(), images[1:], torch.tensor([[0]])))
        (False, True)
    """
    maps = torch.empty(*targets.shape, *images.shape[2:])
    for n, image in enumerate(images.cpu()):
        known = zlib.crc32(image.contiguous().numpy().tobytes())
        for k, target in enumerate(targets[n].tolist()):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{known}/{target}".encode()))
            maps[n, k] = torch.rand(images.shape[2:], generator=generator)
    return maps.to(images.device)
