"""Class activation maps at the last features, read by Captum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import last_features
from .maps import upsampled

__all__ = ["gradcam", "layercam"]


def gradcam(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Grad-CAM, ``relu(sum_k mean(g_k) a_k)`` at the last features a, by Captum, enlarged bilinearly.

    Source: R. Selvaraju et al., "Grad-CAM", ICCV 2017.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> import tsgb
        >>> gradcam(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model, last_features(model, images)[1])
    columns = [cam.attribute(images, target, relu_attributions=True)[:, 0] for target in targets.T]
    return torch.stack([upsampled(column.detach(), images.shape[2:]) for column in columns], 1)


def layercam(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """LayerCAM, ``relu(sum_k relu(g_k) a_k)`` at the last features a, read by Captum, enlarged bilinearly.

    Source: P. Jiang et al., "LayerCAM", IEEE Transactions on Image Processing 30 (2021).

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), 0 or more.

    Example:
        >>> import tsgb
        >>> layercam(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    from captum.attr import LayerActivation, LayerGradientXActivation

    layer = last_features(model, images)[1]
    features = LayerActivation(model, layer).attribute(images).detach()
    reader = LayerGradientXActivation(model, layer, multiply_by_inputs=False)
    columns = []
    for target in targets.T:
        gradients = reader.attribute(images, target).detach()
        cam = (gradients.clamp(min=0) * features).sum(1).clamp(min=0)
        columns.append(upsampled(cam, images.shape[2:]))
    return torch.stack(columns, 1)
