"""What every metric asks of maps and masks; a refusal names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_maps", "check_masks"]


def check_maps(maps: Tensor, name: str = "maps") -> None:
    """Refuse what is no batch of finite maps.

    Args:
        maps: (N, H, W), floating.
        name: what the caller calls them.

    Raises:
        TypeError: no floating tensor. ValueError: a wrong shape, or values that are not finite.

    Example:
        >>> import torch
        >>> check_maps(torch.tensor([[[1.0, float("nan")]]]))
        Traceback (most recent call last):
            ...
        ValueError: maps must be finite, but map 0 holds NaN or infinity
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = str(maps.dtype).removeprefix("torch.") if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"{name} must be a floating tensor (N, H, W), got {got}")
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} must have shape (N, H, W), got {tuple(maps.shape)}")
    finite = maps.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but map {int((~finite).nonzero()[0])} holds NaN or infinity")


def check_masks(masks: Tensor, maps: Tensor, name: str = "masks") -> None:
    """Refuse masks that are not boolean, or not of the maps' shape and device.

    Args:
        masks: (N, H, W) bool. ``maps``: (N, H, W), what they belong to.
        name: what the caller calls the masks.

    Raises:
        TypeError: no boolean tensor. ValueError: another shape, or another device.

    Example:
        >>> import torch
        >>> check_masks(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))
        Traceback (most recent call last):
            ...
        TypeError: masks must be a bool tensor (N, H, W), got float32
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = str(masks.dtype).removeprefix("torch.") if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a bool tensor (N, H, W), got {got}")
    if masks.shape != maps.shape:
        raise ValueError(f"{name} must have the maps' shape {tuple(maps.shape)}, got {tuple(masks.shape)}")
    if masks.device != maps.device:
        raise ValueError(f"{name} must be on the maps' device {maps.device}, got {masks.device}")
