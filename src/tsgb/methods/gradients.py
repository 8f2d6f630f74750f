"""Gradients at the image and their kin, by Captum."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .activations import prepared
from .maps import smoothed

__all__ = ["deeplift", "gradient", "inputxgradient", "integrated_gradients", "smoothgrad"]


def gradient(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """The gradient's largest |g| over the channels, by Captum, blurred by 0.02 of the longer side.

    Source: K. Simonyan, A. Vedaldi, A. Zisserman, "Deep Inside Convolutional Networks", ICLR workshop 2014.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> import tsgb
        >>> gradient(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    from captum.attr import Saliency

    saliency = Saliency(model)
    with _quiet():
        return torch.stack([smoothed(saliency.attribute(images, target, abs=True)) for target in targets.T], 1)


def inputxgradient(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Image * gradient, summed over the channels, signed, by Captum.

    Source: A. Shrikumar et al., "Not Just a Black Box", 2016. Arguments as for `gradient`.

    Returns:
        (N, K, H, W), signed.

    Example:
        >>> import tsgb
        >>> inputxgradient(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    from captum.attr import InputXGradient

    method = InputXGradient(model)
    with _quiet():
        return torch.stack([method.attribute(images, target).sum(1).detach() for target in targets.T], 1)


def smoothgrad(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """SmoothGrad: the largest |mean gradient| over the channels, of 25 noisy copies of the image, by Captum.

    The noise is Gaussian, of 0.15 of the image's range, the same draws for all images and targets. Source: D. Smilkov
    et al., "SmoothGrad", 2017.

    Args:
        model, images, targets: as for `gradient`. ``seed``: of the noise; torch's random state is set by it.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> import tsgb
        >>> smoothgrad(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0]])).shape
        torch.Size([1, 1, 128, 128])
    """
    from captum.attr import NoiseTunnel, Saliency

    method = NoiseTunnel(Saliency(model))
    maps = torch.zeros(*targets.shape, *images.shape[2:], dtype=images.dtype, device=images.device)
    for n in range(len(images)):
        image = images[n : n + 1]
        sigma = 0.15 * float(image.max() - image.min())
        for k, target in enumerate(targets[n]):
            torch.manual_seed(seed)
            with _quiet():
                found = method.attribute(
                    image, nt_samples=25, nt_samples_batch_size=5, stdevs=sigma, target=int(target), abs=False
                )
            maps[n, k] = found[0].detach().abs().amax(0)
    return maps


def integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Integrated gradients from an image of zeros in 50 steps, summed over the channels, signed, by Captum.

    Source: M. Sundararajan, A. Taly, Q. Yan, "Axiomatic Attribution for Deep Networks", ICML 2017. Arguments as for
    `gradient`.

    Returns:
        (N, K, H, W), signed.

    Example:
        >>> import tsgb
        >>> integrated_gradients(tsgb.load("bundled").model, torch.rand(1, 3, 64, 64), torch.tensor([[0]])).shape
        torch.Size([1, 1, 64, 64])
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    columns = [
        method.attribute(images, baselines=0, target=target, n_steps=50, internal_batch_size=max(16, len(images)))
        for target in targets.T
    ]
    return torch.stack([column.sum(1).detach() for column in columns], 1)


def deeplift(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """DeepLift, rescale rule, against an image of zeros, summed over the channels, signed, by Captum.

    It runs on a copy of the model that Captum can read: nothing in place, no activation used twice, and ReLU6 written
    as two ReLUs, ``relu(x) - relu(x - 6)``, whose multipliers sum to its own. Source: A. Shrikumar, P. Greenside, A.
    Kundaje, "Learning Important Features Through Propagating Activation Differences", ICML 2017. Arguments as for
    `gradient`.

    Returns:
        (N, K, H, W), signed.

    Raises:
        ValueError: the model bends where Captum does not see it (a functional ReLU, SiLU, a gate).

    Example:
        >>> import tsgb
        >>> deeplift(tsgb.load("bundled").model, torch.rand(1, 3, 64, 64), torch.tensor([[0]])).shape
        torch.Size([1, 1, 64, 64])
    """
    from captum.attr import DeepLift
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    method = DeepLift(prepared(model, images, tuple(SUPPORTED_NON_LINEAR)))
    maps = torch.zeros(*targets.shape, *images.shape[2:], device=images.device)
    with _quiet():
        for n in range(len(images)):  # one by one: it keeps the input and output of every activation, twice
            for k, target in enumerate(targets[n]):
                maps[n, k] = method.attribute(images[n : n + 1], baselines=0, target=target)[0].sum(0).detach()
    del method
    gc.collect()  # its hooks and the copy of the model refer to each other, and hold activations
    return maps


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Captum's remarks on what it sets and takes back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input Tensor 0 did not already require gradients")
        warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
        yield
