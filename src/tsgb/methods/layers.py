"""Where a network's features lie: the layer that Grad-CAM reads, found from one run without names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Place", "last_features", "twice_as_large"]


@dataclass(frozen=True)
class Place:
    """One output of a module in a run: the ``call``-th of the module ``name``, of height and width ``size``."""

    name: str
    call: int
    size: tuple[int, int]


def last_features(model: nn.Module, images: Tensor) -> tuple[str, nn.Module]:
    """Find the module whose output is the last map of features below the head.

    The head is the last module with weights of its own to finish. Among the modules that finish before it and do not
    contain it, that of the last 4-D output larger than 1 x 1 is taken: the outermost, where a container ends in it.
    Pooling, dropout and identities are no features.

    Args:
        model: a classifier; it is run once, without gradients, on the first image.
        images: (N, C, H, W), N >= 1.

    Returns:
        Name and module, such as ("layer4", ...) of a torchvision ResNet.

    Raises:
        ValueError: no module has such an output.

    Example:
        >>> import tsgb
        >>> last_features(tsgb.load("bundled").model, torch.zeros(1, 3, 128, 128))[0]
        'blocks'
    """
    name = _last(_outputs(model, images)).name
    return name, model.get_submodule(name)


def twice_as_large(model: nn.Module, images: Tensor) -> Place | None:
    """Find the last output of a module that is at least twice as high and wide as that of `last_features`.

    Args:
        model, images: as for `last_features`.

    Returns:
        The place, None for the image itself where nothing else is as large.

    Raises:
        ValueError: as for `last_features`.

    Example:
        >>> import tsgb
        >>> twice_as_large(tsgb.load("bundled").model, torch.zeros(1, 3, 128, 128))
        Place(name='blocks.2', call=0, size=(16, 16))
    """
    places = _outputs(model, images)
    height, width = _last(places).size
    larger = [place for place in places if place.size[0] >= 2 * height and place.size[1] >= 2 * width]
    return larger[-1] if larger else None


def _last(places: list[Place]) -> Place:
    if not places:
        raise ValueError(
            "the model has no module below its head whose output is a map (N, C, H, W) larger than 1 x 1: "
            "Grad-CAM and its kin need one; write the last features as a module (torch.nn.Sequential)"
        )
    return places[-1]


def _outputs(model: nn.Module, images: Tensor) -> list[Place]:
    """The maps that modules put out below the head, in the order in which they were finished."""
    finished: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, output: object) -> None:
        finished.append((name, tuple(output.shape) if isinstance(output, Tensor) else ()))

    modules = dict(model.named_modules())
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in modules.items()
        if name
    ]
    try:
        with torch.no_grad():
            model(images[:1].clone())  # which the network may write to
    finally:
        for handle in handles:
            handle.remove()
    weighted = [index for index, (name, _) in enumerate(finished) if _has_weights(modules[name])]
    end = weighted[-1] if weighted else len(finished)
    head = finished[end][0] if weighted else ""
    places, calls = [], dict.fromkeys(modules, -1)
    for name, shape in finished[:end]:
        calls[name] += 1
        holds_head = f"{head}.".startswith(f"{name}.")  # so does a container that runs a second time
        if _is_map(shape) and not holds_head and not _is_passing(modules[name]):
            places.append(Place(name, calls[name], (shape[2], shape[3])))
    return places


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def _is_passing(module: nn.Module) -> bool:
    kind = type(module).__name__
    if any(module.children()):
        return False
    return isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity)) or "Pool" in kind or "Drop" in kind
