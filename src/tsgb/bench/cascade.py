"""Cascading randomisation (Adebayo et al. 2018): a network that forgets, from its head downwards."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .protocol import STAGES

__all__ = ["cascade"]


def cascade(model: nn.Module, image: Tensor, seed: int) -> Iterator[nn.Module]:
    """Randomise a copy of a network stage by stage: the head first, then ever more of what lies below, at last all.

    A module draws its weights anew as it did when it was built (``reset_parameters``); one that cannot, from a normal
    distribution of its weights' own mean and spread. Modules count in the order in which they run.

    Args:
        model: it is only read. ``image``: (1, C, H, W), run once to see the order of the modules.
        seed: the same weights are drawn for the same seed.

    Yields:
        The same copy at each of up to 8 stages, randomised further each time.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
        >>> [int((m[3].weight != net[3].weight).any()) + int((m[0].weight != net[0].weight).any())
        ...     for m in cascade(net, torch.zeros(1, 3, 8, 8), seed=0)]
        [1, 2]
    """
    model = copy.deepcopy(model)
    order = _in_order(model, image)[::-1]
    count = min(STAGES, len(order))
    # Evenly spaced, but for the head, which is a stage of its own.
    ends = [1 + round(k * (len(order) - 1) / max(1, count - 1)) for k in range(count)]
    start = 0
    for end in ends:
        with torch.random.fork_rng(devices=_devices(model)):
            for position in range(start, end):
                torch.manual_seed(seed + position)
                _randomise(order[position])
        start = end
        yield model


def _in_order(model: nn.Module, image: Tensor) -> list[nn.Module]:
    """Modules that hold weights themselves, each once, in the order in which they run."""
    seen: list[nn.Module] = []
    weighted = [m for m in model.modules() if any(p.is_floating_point() for p in m.parameters(recurse=False))]

    def note(module: nn.Module, *_: object) -> None:
        if not any(module is other for other in seen):
            seen.append(module)

    hooks = [module.register_forward_hook(note) for module in weighted]
    try:
        with torch.inference_mode():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        parameter.normal_(float(parameter.mean()), spread or 1.0)


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
