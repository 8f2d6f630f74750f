"""What methods share: from values at features or channels to maps of the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["gaussian_blur", "smoothed", "upsampled"]


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur maps with a Gaussian, ``exp(-d^2 / (2 sigma^2))`` for whole |d| <= 4 sigma, summing to 1, edges repeated.

    Args:
        maps: (..., H, W) floating. ``sigma``: in pixels, above 0.

    Returns:
        The shape of ``maps``; a constant map is unchanged.

    Example:
        >>> gaussian_blur(torch.tensor([[0.0, 1.0, 0.0]]), 0.5)  # e^-2 = 0.135 to 1 on either side
        tensor([[0.1065, 0.7866, 0.1065]])
    """
    radius = math.ceil(4 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = functional.conv2d(functional.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    flat = functional.conv2d(functional.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return flat.reshape(maps.shape)


def smoothed(gradients: Tensor) -> Tensor:
    """Make a map of gradients at the image: the largest |g| over the channels, blurred by 0.02 of the longer side.

    Args:
        gradients: (N, C, H, W).

    Returns:
        (N, H, W), 0 or more.

    Example:
        >>> smoothed(-torch.ones(1, 3, 8, 8)).unique()
        tensor([1.])
    """
    height, width = gradients.shape[-2:]
    return gaussian_blur(gradients.abs().amax(1), 0.02 * max(height, width))


def upsampled(maps: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Enlarge maps (N, h, w) bilinearly to (N, H, W), ``align_corners=False``.

    Example:
        >>> upsampled(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    return functional.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
