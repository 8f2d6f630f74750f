"""Methods that are tables of backward rules: TSGB, guided backprop, deconvnet, excitation backprop.

Captum's guided backprop and deconvnet see neither ReLU6 nor functional calls; a table sees every spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import rules
from ..attribution import explain
from ..engine.heads import Head
from ..engine.lookup import head_rules
from ..engine.tape import GRADIENT
from ..engine.terms import channel_sum
from ..engine.walk import walk
from ..passes import recording
from ..targets import find_logits
from .cams import gradcam
from .layers import Place, twice_as_large
from .maps import smoothed, upsampled

__all__ = ["cebp", "deconvnet", "ebp", "guided", "guided_gradcam", "tsgb_fused", "tsgb_paper", "tsgb_pixels"]


def tsgb_fused(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """TSGB under `tsgb.rules.FUSED`, signed.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), signed.

    Example:
        >>> from tsgb import load
        >>> tsgb_fused(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    maps: Tensor = explain(model, images, targets, rules=rules.FUSED).maps
    return maps


def tsgb_pixels(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """TSGB under `tsgb.rules.PIXELS`, signed; arguments and result as for `tsgb_fused`.

    Example:
        >>> from tsgb import load
        >>> tsgb_pixels(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    maps: Tensor = explain(model, images, targets, rules=rules.PIXELS).maps
    return maps


def tsgb_paper(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """TSGB under `tsgb.rules.PAPER`, signed; arguments and result as for `tsgb_fused`.

    Example:
        >>> from tsgb import load
        >>> tsgb_paper(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    maps: Tensor = explain(model, images, targets, rules=rules.PAPER).maps
    return maps


def guided(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Guided backprop: the largest |g| over the channels, blurred by 0.02 of the longer side.

    Source: Springenberg et al. 2015, see `tsgb.rules.guided`.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> from tsgb import load
        >>> guided(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    return _propagated(model, images, targets, rules.GUIDED, lambda _, grad: smoothed(grad))


def deconvnet(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Deconvolutional network: the largest |g| over the channels, blurred by 0.02 of the longer side.

    Source: Zeiler & Fergus 2014, see `tsgb.rules.deconvnet`. Arguments and result as for `guided`.

    Example:
        >>> from tsgb import load
        >>> deconvnet(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    return _propagated(model, images, targets, rules.DECONVNET, lambda _, grad: smoothed(grad))


def guided_gradcam(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Guided Grad-CAM: the largest |g * cam| over the channels, of guided backprop's g and the enlarged Grad-CAM.

    Source: R. Selvaraju et al., "Grad-CAM", ICCV 2017. Arguments and result as for `guided`.

    Example:
        >>> from tsgb import load
        >>> guided_gradcam(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    gradients = _propagated(model, images, targets, rules.GUIDED, lambda _, grad: grad.abs().amax(1))
    return gradients * gradcam(model, images, targets)


def ebp(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Excitation backprop, read where the features are twice as large as the last, enlarged bilinearly.

    Source: Zhang et al. 2016, see `tsgb.rules.excitation`. Arguments as for `guided`.

    Returns:
        (N, K, H, W).

    Example:
        >>> from tsgb import load
        >>> ebp(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    return _excitation(model, images, targets, rules.EXCITATION)


def cebp(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Contrastive excitation backprop (c-MWP), read as `ebp`, its positive part.

    Source: Zhang et al. 2016, see `tsgb.rules.contrastive_head`. Arguments as for `guided`.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> from tsgb import load
        >>> cebp(load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    return _excitation(model, images, targets, rules.CONTRASTIVE).clamp(min=0)


def _excitation(model: nn.Module, images: Tensor, targets: Tensor, table: rules.Table) -> Tensor:
    def read(values: Tensor, grad: Tensor) -> Tensor:
        return upsampled((values * grad).sum(1), images.shape[2:])

    return _propagated(model, images, targets, table, read, twice_as_large(model, images), find_heads=True)


def _propagated(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    table: rules.Table,
    read: Callable[[Tensor, Tensor], Tensor],
    place: Place | None = None,
    find_heads: bool = False,
) -> Tensor:
    """Maps (N, K, H, W) from the values at a place, None for the image, and the table's gradient there.

    Without ``find_heads`` the operators above the head follow the table too, as guided backprop and deconvnet want it.
    """
    images = images.detach()
    with recording(table, model, [images], [GRADIENT]) as (tape, (image,)), _captured(model, place) as outputs:
        logits = find_logits(model(image))
        values = images if place is None else outputs[place.call].detach()
        target, source = tape.value_of(logits), tape.images[0] if place is None else tape.value_of(outputs[place.call])
    try:
        assert target is not None
        assert source is not None
        head = Head(tape, target, head_rules(table), table[rules.F]) if find_heads else None
        seeds = torch.zeros(targets.shape[1], *target.shape).to(images).scatter_(2, targets.T[:, :, None], 1)
        with torch.no_grad():
            (gradient,) = walk(tape, target, seeds, head, len(seeds), until=None if place is None else [source])
    finally:
        tape.close()
    if gradient is None:
        gradient = torch.zeros(targets.shape[1], *values.shape)
    if not isinstance(gradient, Tensor):
        relevance = channel_sum(gradient).squeeze(2)
        return torch.stack([read(torch.ones_like(row[:, None]), row[:, None]) for row in relevance], 1)
    return torch.stack([read(values, grad) for grad in gradient], 1)


@contextmanager
def _captured(model: nn.Module, place: Place | None) -> Iterator[list[Tensor]]:
    """Collect what the module of a place puts out; the network goes on with clones, so none is changed in place."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()

    if place is None:
        yield outputs
        return
    handle = model.get_submodule(place.name).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
