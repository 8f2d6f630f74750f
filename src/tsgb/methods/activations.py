"""A copy of a model that DeepLift can read: its activations as modules, each used once, nothing in place."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import rules
from . import spelled as operators

__all__ = ["prepared", "twin_of"]

_BENT = {str(packet).split(".")[1].strip("_") for packet in (*rules.ACTIVATIONS, *rules.GATES)} | {
    operators.name(function)
    for function in (
        functional.softsign,
        functional.tanhshrink,
        functional.softplus,
        functional.layer_norm,
        functional.group_norm,
        functional.max_pool2d,
        functional.max_pool2d_with_indices,
        functional.adaptive_max_pool2d,
        torch.exp,
        torch.log,
        torch.sqrt,
        torch.maximum,
        torch.minimum,
        torch.max,
        torch.amax,
        torch.clip,
    )
}
_PRODUCTS = {operators.name(function) for function in (torch.mul, torch.div, torch.matmul, torch.bmm)}


def prepared(model: nn.Module, images: Tensor, known: tuple[type[nn.Module], ...]) -> nn.Module:
    """Copy a model, with its activations as DeepLift wants them.

    Args:
        model: a classifier in eval mode; left alone.
        images: (N, 3, H, W); the copy is run on the first.
        known: types of modules whose bends the method knows.

    Returns:
        The copy, its weights without gradients.

    Raises:
        ValueError: something bends outside of such modules.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU6(inplace=True), nn.Flatten(), nn.Linear(72, 2)).eval()
        >>> prepared(model, torch.zeros(1, 3, 8, 8), (nn.ReLU,))[1]
        _Clipped(
          (lower): ReLU()
          (upper): ReLU()
        )
    """
    twin = twin_of(model)
    _replace(twin, lambda module: _Clipped(module) if isinstance(module, nn.Hardtanh) else None)
    calls = _calls(twin, images, known)
    _replace(twin, lambda module: _Apart(module, calls[module]) if calls[module] > 1 else None)
    return twin


def twin_of(model: nn.Module) -> nn.Module:
    """Copy a model whose modules write nothing in place, its weights without gradients.

    Example:
        >>> twin_of(nn.ReLU(inplace=True))
        ReLU()
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    for module in twin.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010, as no module is known to have it
    return twin


class _Clipped(nn.Module):
    """``clamp(x, a, b) = a + relu(x - a) - relu(x - b)``."""

    def __init__(self, module: nn.Hardtanh) -> None:
        super().__init__()
        self.ends = (module.min_val, module.max_val)
        self.lower, self.upper = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.ends
        return low + self.lower(x - low) - self.upper(x - high)  # type: ignore[no-any-return]


class _Apart(nn.Module):
    """A module that is used several times in a run, as one copy for each."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(count))
        self.done = 0

    def forward(self, x: Tensor) -> Any:
        self.done += 1
        return self.copies[(self.done - 1) % len(self.copies)](x)


def _replace(model: nn.Module, choose: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put other modules in the places of those for which some are chosen, the same wherever one is shared."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items() if child]
    others = {child: choose(child) for _, _, child in places}
    for parent, name, child in places:
        other = others[child]
        if other is not None:
            setattr(parent, name, other)


def _calls(model: nn.Module, images: Tensor, known: tuple[type[nn.Module], ...]) -> Counter[nn.Module]:
    """Count the calls of the known modules in one run, and refuse what bends outside of them."""
    calls: Counter[nn.Module] = Counter()
    inside: list[nn.Module] = []

    def enter(module: nn.Module, _args: Any) -> None:
        calls[module] += 1
        inside.append(module)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        inside.pop()

    handles = []
    for module in model.modules():
        if type(module) in known:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    image = images[:1].detach().clone().requires_grad_()
    with torch.enable_grad(), _Bends(inside) as bends:
        model(image)
    for handle in handles:
        handle.remove()
    if bends.seen:
        raise ValueError(
            f"deeplift: the model bends where Captum's DeepLift does not see it ({', '.join(sorted(bends.seen))}), and "
            f"would get a plain gradient there: it knows the modules {', '.join(kind.__name__ for kind in known)}"
        )
    return calls


class _Bends(TorchFunctionMode):
    """Notes which curved operators are called while ``inside`` is empty."""

    def __init__(self, inside: list[nn.Module]) -> None:
        super().__init__()
        self._inside = inside
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operators.name(func)
        depending = sum(t.requires_grad for t in operators.tensors((args, kwargs)))
        if not self._inside and (depending > 1 if name in _PRODUCTS else depending and name in _BENT):
            self.seen.add(name)
        return func(*args, **kwargs)
