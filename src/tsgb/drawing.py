"""From what came backward to maps: of one image's own relevance, or of what the convolutions of all depths shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import rules
from .backprop import Owed, Product, Reading, Relevance, Summed, dense, summed

__all__ = ["NOTHING", "all_depths", "relevance", "where"]

#: Stands for 0 in an image whose model shifts it, so that x * gradient can carry the evidence of a black pixel. It is
#: used only where the logits are bit for bit those of the zeros. float16 has no such number, and keeps its zeros.
NOTHING = 1e-30


def relevance(leaf: Tensor, grad: Tensor | None, count: int, whole: bool) -> Tensor:
    """The relevance of an image for ``count`` classes: (count, *shape), or summed over the channels; float32 at least.

    Args:
        leaf: the image. ``grad``: what arrived there, a `Relevance` or the gradient of one class; None for nothing.
        whole: whether the relevance of every value is asked for.

    A pixel that is zero, or stands for one, keeps what it carries if that is more than a trace.
    """
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    image = leaf.detach()
    if grad is None:
        values = torch.zeros_like(image, dtype=dtype).expand(count, *image.shape)
    elif not isinstance(grad, Relevance):
        values = image.to(dtype) * grad[None].to(dtype)
    elif any(isinstance(p, (Summed, Owed)) or (isinstance(p, Product) and p.base is None) for p in grad.parts):
        return summed(grad.parts).squeeze(2)
    else:
        values = dense(grad.parts)
    values = torch.where((image.abs() <= NOTHING) & (values.abs() < NOTHING**0.5), 0, values)
    return values.sum(2) if not whole and image.dim() > 2 else values


def all_depths(rule: Callable[..., Tensor], reading: Reading, image: Tensor, whole: bool) -> Tensor | None:
    """The map of all depths, (K, N, *size) or whole (K, N, C, *size); None where nothing was read to make it of.

    Args:
        rule: the table's, see `rules.depths`. ``reading``: of the backward. ``image``: (N, C, *size).
        whole: whether each channel's share is asked for.

    The positive values of a map of all depths sum to the evidence for the class that passed the gates, in logits; the
    negative ones have the same scale, but sum to no more than the evidence against it. Where all evidence is against a
    class, the map is that of what speaks against it, below 0. Of channels each has its share of a pixel in proportion
    to its size.
    """
    if reading.evidence is None:
        return None
    coarse = [field for field in reading.fields if field.dim() == image.dim() and field.shape[1] == len(image)]
    coarse = [field.to(image.device) for field in coarse]  # parts of a model may be on other devices
    speaks_for, against = reading.evidence.to(image.device)
    if not coarse or speaks_for.shape != coarse[0].shape[:2]:  # where the head keeps its images in another dimension
        return None
    sign = _each(torch.where(speaks_for > 0, 1.0, -1.0).to(speaks_for.dtype), image)
    sizes = [field.shape[2:] for field in coarse]
    held = [_on_grid(rules.claims(rows, gate, **reading.options), sizes) for rows, gate in reading.contests]
    claims = [both.to(image.device) for both in held if both is not None]
    found = sign * rule([field * sign for field in coarse], image, claims)
    raised, lowered = (_scale(*both) for both in ((speaks_for, found.clamp(min=0)), (against, found.clamp(max=0))))
    lowered = torch.where(raised > 0, torch.minimum(raised, lowered), lowered)
    found = found.clamp(min=0) * _each(raised, image) + found.clamp(max=0) * _each(lowered, image)
    if not whole:
        return found
    total = image.abs().sum(1, keepdim=True)
    share = torch.where(total > 0, image.abs() / total.clamp(min=NOTHING), 1 / image.shape[1])
    return found.unsqueeze(2) * share


def _scale(evidence: Tensor, values: Tensor) -> Tensor:
    """What scales values (K, N, *size) of one sign to the sum (K, N); 0 where either is 0."""
    return evidence.abs() / values.flatten(2).sum(2).abs().clamp(min=NOTHING)


def _each(numbers: Tensor, values: Tensor) -> Tensor:
    """Numbers (K, N) as factors of values (..., *size)."""
    return numbers.reshape(*numbers.shape, *(1,) * (values.dim() - 2))


def _on_grid(held: Tensor, sizes: Sequence[torch.Size]) -> Tensor | None:
    """Claims (2, K, N, *positions) on a grid of as many dimensions as the fields have; of tokens, on a field's grid."""
    if held.dim() - 3 == len(sizes[0]):
        return held
    size = next((size for size in sizes if size.numel() == held.shape[3:].numel()), None)
    return None if size is None else held.reshape(*held.shape[:3], *size)


def where(known: Tensor, values: Tensor) -> Tensor:
    """Values (K, N, *) where (K, N) holds, else 0."""
    return torch.where(known.to(values.device).reshape(*known.shape, *(1,) * (values.dim() - 2)), values, 0)
