"""The registry of saliency methods, and `attribute`, which runs any of them under the same contract."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from . import cams, controls, gradients, perturbation, propagation, relevance

__all__ = ["ALIASES", "METHODS", "Method", "attribute"]

_EXTRAS = {"zennit": "zennit"}  # the extra that brings a package, where it is not "bench"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: its display name.
        source: one line, the library that computes it and every parameter; goes into the protocol of each figure.
        attribute: ``(model, images (N, 3, H, W), targets (N, K) int64, seed) -> maps (N, K, H, W)``, to be called
            through `tsgb.methods.attribute`.
        needs: packages that it imports.
    """

    title: str
    source: str
    attribute: Callable[[nn.Module, Tensor, Tensor, int], Tensor]
    needs: tuple[str, ...] = ()


_CAPTUM = ("captum",)
_BLURRED = "max over channels of |g|, Gaussian sigma 0.02 max(H, W)"
_AT_LAST = "at the last features below the head, bilinear"
_AT_TWICE = "read at the last output twice as large as the last features, sum over channels, bilinear"
_SUMMED = "sum over channels, signed"

#: The methods by name, in the order in which they are shown.
METHODS: dict[str, Method] = {
    "tsgb-fused": Method("TSGB (fused)", "tsgb.explain, rules.FUSED, signed", propagation.tsgb_fused),
    "tsgb-pixels": Method("TSGB (pixels)", "tsgb.explain, rules.PIXELS, signed", propagation.tsgb_pixels),
    "tsgb-paper": Method("TSGB (paper)", "tsgb.explain, rules.PAPER, signed", propagation.tsgb_paper),
    "gradcam": Method("Grad-CAM", f"captum LayerGradCam, relu_attributions, {_AT_LAST}", cams.gradcam, _CAPTUM),
    "layercam": Method(
        "LayerCAM",
        f"relu(sum relu(g) a), captum LayerActivation and LayerGradientXActivation, {_AT_LAST}",
        cams.layercam,
        _CAPTUM,
    ),
    "gradient": Method("Gradient", f"captum Saliency, {_BLURRED}", gradients.gradient, _CAPTUM),
    "inputxgradient": Method(
        "Input x gradient", f"captum InputXGradient, {_SUMMED}", gradients.inputxgradient, _CAPTUM
    ),
    "smoothgrad": Method(
        "SmoothGrad",
        "captum NoiseTunnel(Saliency), 25 samples, noise sigma 0.15 (max - min) of the image, max over channels of "
        "|mean g|",
        gradients.smoothgrad,
        _CAPTUM,
    ),
    "integrated-gradients": Method(
        "Integrated gradients",
        f"captum IntegratedGradients, baseline 0, 50 steps (gausslegendre), {_SUMMED}",
        gradients.integrated_gradients,
        _CAPTUM,
    ),
    "guided": Method("Guided backprop", f"tsgb rules.GUIDED, {_BLURRED}", propagation.guided),
    "deconvnet": Method("Deconvnet", f"tsgb rules.DECONVNET, {_BLURRED}", propagation.deconvnet),
    "guided-gradcam": Method(
        "Guided Grad-CAM",
        "tsgb rules.GUIDED, max over channels of |g|, times gradcam",
        propagation.guided_gradcam,
        _CAPTUM,
    ),
    "ebp": Method("Excitation backprop", f"tsgb rules.EXCITATION, {_AT_TWICE}", propagation.ebp),
    "cebp": Method("Contrastive EB (c-MWP)", f"tsgb rules.CONTRASTIVE, {_AT_TWICE}, positive part", propagation.cebp),
    "deeplift": Method(
        "DeepLift",
        f"captum DeepLift (rescale), baseline 0, ReLU6 as relu(x) - relu(x - 6), {_SUMMED}",
        gradients.deeplift,
        _CAPTUM,
    ),
    "lrp": Method(
        "LRP",
        "zennit EpsilonPlusFlat(epsilon=1e-6, stabilizer=1e-6), batch norms merged into the convolution before, "
        f"other batch norms and functional activations Pass, functional sums, means and pooling Norm, {_SUMMED}",
        relevance.lrp,
        ("zennit",),
    ),
    "occlusion": Method(
        "Occlusion",
        "captum Occlusion, window 1/8 of the side, stride 1/16, baseline 0, logit, mean over windows",
        perturbation.occlusion,
        _CAPTUM,
    ),
    "rise": Method("RISE", "2000 masks, grid 7 x 7, p 0.5, softmax probability", perturbation.rise),
    "center": Method("Centre", "1 at the image's centre, falling evenly to 0 in the corners", controls.center),
    "random": Method("Random", "uniform noise, another for each image, target and seed", controls.random),
}

#: Other names of methods.
ALIASES = {"tsgb": "tsgb-fused"}


@torch.inference_mode(False)
@torch.enable_grad()
def attribute(name: str, model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Compute the maps of one method: how much each pixel speaks for each target, larger for more.

    The model is the same afterwards: weights, buffers, ``.grad``, flags, hooks, mode; so is torch's random state. What
    a method draws at random comes from the seed and is the same whatever else is in the batch.

    Args:
        name: a key of `METHODS` or `ALIASES`.
        model: a classifier in eval mode that returns logits (N, classes).
        images: (N, 3, H, W) floating, as the model expects them, on its device.
        targets: (N, K) int64 class indices, K >= 1 for each image.
        seed: of the methods that draw at random (smoothgrad, rise, random).

    Returns:
        (N, K, H, W) float32 on the images' device, without a graph.

    Raises:
        ValueError: an unknown name, images or targets of a wrong shape or value, or a model that the method does not
            fit; what the method itself raises.
        TypeError: images that are not floating, or targets that are not int64.
        RuntimeError: the model is in training mode.
        ModuleNotFoundError: a package is missing; it names the extra to install.
        ArithmeticError: the map is not finite.

    Example:
        >>> import tsgb
        >>> model = tsgb.load("bundled").model
        >>> attribute("gradcam", model, torch.rand(2, 3, 128, 128), torch.tensor([[0, 4], [1, 2]])).shape
        torch.Size([2, 2, 128, 128])
    """
    name = ALIASES.get(name, name)
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}")
    _check_packages(name, method)
    _check_arguments(images, targets)
    checks.check_mode(model)
    # Copies, as tensors made under inference mode hold no gradient.
    images, targets = images.detach().clone(), targets.detach().to(images.device, copy=True)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            maps = method.attribute(model, images, targets, seed).detach()
    except FloatingPointError as error:
        raise ArithmeticError(f"{name}: {error}") from error
    expected = (*targets.shape, *images.shape[2:])
    if tuple(maps.shape) != expected:
        raise RuntimeError(f"{name}: the maps must have shape {expected}, got {tuple(maps.shape)}")
    broken = ~maps.isfinite().flatten(1).all(1)
    if broken.any():
        raise ArithmeticError(f"{name}: the map of image {int(broken.nonzero()[0])} holds NaN or infinity")
    return maps.to(torch.float32)


def _check_packages(name: str, method: Method) -> None:
    for package in method.needs:
        if importlib.util.find_spec(package) is None:
            extra = _EXTRAS.get(package, "bench")
            raise ModuleNotFoundError(f"method {name!r} needs {package}: pip install 'tsgb[{extra}]'", name=package)


def _check_arguments(images: Tensor, targets: Tensor) -> None:
    checks.check_inputs((images,))
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
    how = f"targets must be int64 of shape ({len(images)}, K), K class indices for each image"
    if not isinstance(targets, Tensor):
        raise TypeError(f"{how}, got {type(targets).__name__}: torch.tensor([[3]] * {len(images)})")
    if targets.dtype != torch.int64:
        raise TypeError(f"{how}, got {str(targets.dtype).removeprefix('torch.')}: call targets.long()")
    if targets.dim() != 2 or len(targets) != len(images) or targets.shape[1] == 0:
        raise ValueError(f"{how}, got {tuple(targets.shape)}: for one class an image call targets[:, None]")
    if (targets < 0).any():
        raise ValueError(f"{how}, 0 or more, got {int(targets.min())}")
