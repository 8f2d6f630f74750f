"""Methods that cover parts of the image and watch the score: occlusion, and RISE."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..targets import find_logits

__all__ = ["occlusion", "rise"]

_BATCH = 16  # images that go through the model at once


def occlusion(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Occlusion: how much the logit falls where a window of zeros covers the pixel, by Captum, mean over windows.

    The window is 1/8 of the side, its steps 1/16, both at least one pixel. Source: M. Zeiler, R. Fergus, "Visualizing
    and Understanding Convolutional Networks", ECCV 2014.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), signed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
        >>> occlusion(model, torch.rand(1, 3, 16, 16), torch.tensor([[0, 1]])).shape
        torch.Size([1, 2, 16, 16])
    """
    from captum.attr import Occlusion

    def scores(x: Tensor, classes: Tensor) -> Tensor:
        return find_logits(model(x.clone())).gather(1, classes)  # which the network may write to

    height, width = images.shape[2:]
    method = Occlusion(scores)
    columns = []
    with torch.no_grad():
        for n in range(len(images)):
            found = method.attribute(
                images[n : n + 1],
                sliding_window_shapes=(3, max(1, height // 8), max(1, width // 8)),
                strides=(3, max(1, height // 16), max(1, width // 16)),
                baselines=0,
                additional_forward_args=targets[n : n + 1],
                perturbations_per_eval=_BATCH,
            )
            columns.append(found.reshape(targets.shape[1], *images.shape[1:]).mean(1))
    return torch.stack(columns)


def rise(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0, count: int = 2000) -> Tensor:
    """RISE: the mean of random masks, weighed by the class's probability behind them.

    ::

        S = 1 / (count p) * sum over i of softmax(model(image * M_i))[target] * M_i

    M_i: a grid of 7 x 7 values, each 1 with p = 0.5 else 0, enlarged bilinearly to 8 x 8 cells of ceil(side / 7)
    pixels, of which a window of the image's size is taken at a random offset below one cell. The masks are the same
    for all images of a call. Source: V. Petsiuk, A. Das, K. Saenko, "RISE", BMVC 2018.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64.
        seed: of the masks. ``count``: how many masks.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
        >>> rise(model, torch.rand(1, 3, 16, 16), torch.tensor([[0, 1]]), count=8).shape
        torch.Size([1, 2, 16, 16])
    """
    maps = torch.zeros(*targets.shape, *images.shape[2:], dtype=images.dtype, device=images.device)
    with torch.no_grad():
        for masks in _masks(count, images, seed):
            for n, image in enumerate(images):
                probabilities = find_logits(model(image * masks[:, None])).softmax(1)[:, targets[n]]
                maps[n] += torch.einsum("ik,ihw->khw", probabilities, masks)
    return maps / (count * 0.5)


def _masks(count: int, images: Tensor, seed: int) -> Iterator[Tensor]:
    """RISE's masks (n, H, W) in batches, of the type and on the device of the images; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    cell = (-(-height // 7), -(-width // 7))
    grids = (torch.rand(count, 1, 7, 7, generator=generator) < 0.5).to(images.device, images.dtype)
    offsets = torch.stack([torch.randint(0, side, (count,), generator=generator) for side in cell], 1).tolist()
    for start in range(0, count, _BATCH):
        enlarged = functional.interpolate(
            grids[start : start + _BATCH], (8 * cell[0], 8 * cell[1]), mode="bilinear", align_corners=False
        )
        yield torch.stack(
            [
                mask[0, y : y + height, x : x + width]
                for mask, (y, x) in zip(enlarged, offsets[start : start + _BATCH], strict=True)
            ]
        )
