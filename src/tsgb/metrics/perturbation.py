"""Insertion and deletion: the score of a class while an image is taken away, or built up, in the order of a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_maps
from .ranking import ranking

__all__ = ["area", "deletion_scores", "insertion_scores"]

_KERNEL, _SIGMA = 11, 5.0  # of the Gaussian that insertion starts from, in pixels


def deletion_scores(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    batch_size: int = 32,
    steps: int = 224,
    seed: int = 0,
) -> Tensor:
    """Probability of the target while the pixels are set to 0, those with the highest evidence first.

    ::

        score_s = softmax(model(image with its first floor(s * H * W / steps) pixels at 0))[target],  s = 0 .. steps

    0 is that of the normalised image, its mean colour. At 224 x 224 a step is 224 pixels, as in the source; elsewhere
    steps are as even as can be, so that none changes nothing while pixels are left. Source: V. Petsiuk, A. Das, K.
    Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.

    Args:
        model: Network in eval mode, from (n, C, H, W) to logits (n, classes).
        images: (N, C, H, W), floating, normalised as the model takes them, on its device.
        maps: (N, H, W), floating, any sign; ties as in `tsgb.metrics.ranking.ranking`.
        targets: (N,), integer, class of each image.
        batch_size: Images that the model is given at a time.
        steps: Number of steps, 1 or more.
        seed: Seed of the ties.

    Returns:
        float64 (N, steps + 1) in 0..1 on the device of ``images``, from the whole image to none of it.

    Raises:
        ValueError: If shapes do not fit, ``images`` are not floating, a map is not finite, a target is no class, the
            model is in train mode, or its output has another shape or is not finite.
        TypeError: If ``maps`` are not floating or ``targets`` not integer.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.zeros(len(x))], 1)
        >>> deletion_scores(model, image, image[:, 0], torch.tensor([0]), steps=4)  # logits 6, 3, 1, 0, 0
        tensor([[0.9975, 0.9526, 0.7311, 0.5000, 0.5000]], dtype=torch.float64)
    """
    ranks = _ranks(model, images, maps, targets, batch_size, steps, seed)
    return _scores(model, images, torch.zeros_like(images), ranks, targets, batch_size, steps)


def insertion_scores(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    batch_size: int = 32,
    steps: int = 224,
    seed: int = 0,
) -> Tensor:
    """Probability of the target while the pixels of a blurred image are made sharp, highest evidence first.

    The blurred image is ``conv(image, G)`` with zero padding 5, where G is 11 x 11 and sums to 1,
    ``G(y, x) ~ exp(-(y^2 + x^2) / (2 * 5^2))``. The rest, arguments and source included, is as in `deletion_scores`.

    Returns:
        float64 (N, steps + 1) in 0..1 on the device of ``images``, from the blurred image to the whole one.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.zeros(len(x))], 1)
        >>> scores = insertion_scores(model, image, image[:, 0], torch.tensor([0]), steps=4)
        >>> scores[0, 0] < 0.6, scores[0, 4]  # logits 0.27 and 6
        (tensor(True), tensor(0.9975, dtype=torch.float64))
    """
    ranks = _ranks(model, images, maps, targets, batch_size, steps, seed)
    return _scores(model, _blurred(images), images, ranks, targets, batch_size, steps)


def area(scores: Tensor) -> Tensor:
    """Area under curves of scores over 0..1 by the trapezoid rule, ``(sum - first / 2 - last / 2) / (n - 1)``.

    Args:
        scores: (..., n), floating, n of 2 or more.

    Returns:
        float64 (...); in 0..1 for probabilities.

    Raises:
        ValueError: If there are fewer than two scores.

    Example:
        >>> area(torch.tensor([[1.0, 0.5, 0.0, 0.0]]))  # (1.5 - 0.5 - 0) / 3
        tensor([0.3333], dtype=torch.float64)
    """
    if scores.dim() < 1 or scores.shape[-1] < 2:
        raise ValueError(f"scores must be of shape (..., n) with n of 2 or more, got {tuple(scores.shape)}")
    values = scores.double()
    return (values.sum(-1) - values[..., 0] / 2 - values[..., -1] / 2) / (values.shape[-1] - 1)


def _scores(
    model: Callable[[Tensor], Tensor],
    before: Tensor,
    after: Tensor,
    ranks: Tensor,
    targets: Tensor,
    batch_size: int,
    steps: int,
) -> Tensor:
    """Scores (N, steps + 1) while the pixels go from ``before`` to ``after`` in the order of their ranks."""
    pixels = ranks.shape[1] * ranks.shape[2]
    targets = targets.to(before.device, torch.int64)
    scores: list[Tensor] = []
    total = len(before) * (steps + 1)
    with torch.inference_mode():
        # Batches run on from one image to the next, so that only the last of all may be short.
        for start in range(0, total, batch_size):
            places = torch.arange(start, min(start + batch_size, total), device=before.device)
            image, step = places // (steps + 1), places % (steps + 1)
            changed = ranks[image] < (step * pixels // steps)[:, None, None]
            batch = torch.where(changed[:, None], after[image], before[image])
            logits = model(batch)
            if logits.dim() != 2 or len(logits) != len(batch):
                raise ValueError(f"model must return ({len(batch)}, classes) logits, got {tuple(logits.shape)}")
            if not scores and int(targets.max()) >= logits.shape[1]:
                raise ValueError(f"targets must be below the {logits.shape[1]} classes, got {int(targets.max())}")
            scores.append(logits.double().softmax(1).gather(1, targets[image][:, None])[:, 0])
    # Joined outside of inference mode, so that the result is an ordinary tensor.
    found = torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64, device=before.device)
    if not found.isfinite().all():
        raise ValueError("model returned NaN or infinite logits for a perturbed image")
    return found.reshape(len(before), steps + 1)


def _ranks(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    batch_size: int,
    steps: int,
    seed: int,
) -> Tensor:
    """Check the arguments; rank (N, H, W) of each pixel in its map, 0 the highest, ties in an order of the seed."""
    check_maps(maps)
    if not images.is_floating_point() or images.dim() != 4:
        raise ValueError(f"images must be floating (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if maps.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"maps must be (N, H, W) of the images {tuple(images.shape)}, got {tuple(maps.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"targets must be ({len(images)},), one class an image, got {tuple(targets.shape)}")
    if (targets < 0).any():
        raise ValueError(f"targets must be 0 or more, got {int(targets.min())}")
    if batch_size < 1 or steps < 1:
        raise ValueError(f"batch_size and steps must be 1 or more, got {batch_size} and {steps}")
    if getattr(model, "training", False):
        raise ValueError("model must be in eval mode, else its scores depend on the batch: call model.eval() first")
    order = ranking(maps, seed).to(images.device)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(maps.shape)


def _blurred(images: Tensor) -> Tensor:
    """Blur by the Gaussian of insertion, rows and columns one after the other, zeros beyond the edges."""
    distance = torch.arange(_KERNEL, dtype=torch.float64) - _KERNEL // 2
    weights = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    line = (weights / weights.sum()).to(images.device)
    single = images.detach().double().flatten(0, 1)[:, None]
    rows = functional.conv2d(single, line.view(1, 1, -1, 1), padding=(_KERNEL // 2, 0))
    both = functional.conv2d(rows, line.view(1, 1, 1, -1), padding=(0, _KERNEL // 2))
    return both.reshape(images.shape).to(images.dtype)
