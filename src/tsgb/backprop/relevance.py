"""What flows backward: for K classes at once, the gradient or the relevance at one tensor, as a sum of parts.

Below the topmost convolution the classes differ in one-channel fields alone; what has channels is the same for all of
them. So a `Relevance` is kept in factors, and autograd carries it along the edges of its graph as if it were a gradient
of the tensor's shape. An operator that has no rule gets the classes' dense gradients one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "Dense",
    "Gradient",
    "LostError",
    "Owed",
    "Part",
    "Product",
    "Relevance",
    "Summed",
    "dense",
    "of_type",
    "single",
    "summed",
]


class LostError(Exception):
    """What a fast backward needs is not there: the plain one has to be run."""


@dataclass(frozen=True)
class Gradient:
    """The gradients (K, *shape)."""

    values: Tensor


@dataclass(frozen=True)
class Dense:
    """The relevance of every value (K, *shape)."""

    values: Tensor


@dataclass(frozen=True)
class Product:
    """The relevance ``factor * base``: what differs by class, by what all classes share (N, C, *).

    The factor is a field (K, N, 1, *); then ``total`` (N, 1, *) is the base's sum over the channels, and where no more
    is asked for the base is None. Or it is a weight of each channel (K, N, C, 1, ...); then ``total`` is None.
    """

    factor: Tensor
    total: Tensor | None
    base: Tensor | None


@dataclass(frozen=True)
class Summed:
    """The sum of the relevance over the channels (K, N, 1, *), where no more is asked for."""

    values: Tensor


@dataclass(frozen=True)
class Owed:
    """What a `Summed` holds, worked out each time it is asked for, if it is; ``source`` is of its device."""

    source: Tensor
    work: Callable[[], Tensor]

    @property
    def values(self) -> Tensor:
        """What ``work`` gives."""
        return self.work()


Part = Gradient | Dense | Product | Summed | Owed


def summed(parts: Iterable[Part]) -> Tensor:
    """Sum relevance over the channels: (K, N, 1, *)."""
    found = [_sum(part) for part in parts]
    total = found[0]
    for values in found[1:]:
        total = total + values
    return total


def dense(parts: Iterable[Part]) -> Tensor:
    """Add relevance up for every value: (K, N, C, *). The parts are used up: the sum may lie in the place of one.

    Raises:
        LostError: of one part the sum over the channels alone is known.
    """
    total: Tensor | None = None
    for part in sorted(parts, key=lambda part: isinstance(part, Product)):  # products are added in place
        if isinstance(part, Product) and part.base is not None:
            total = part.factor * part.base if total is None else total.addcmul_(part.factor, part.base)
        elif isinstance(part, Dense):
            total = part.values if total is None else total.add_(part.values)
        else:
            raise LostError(f"{type(part).__name__} has no channels")
    assert total is not None
    return total


class Relevance(Tensor):
    """What flows backward at one tensor; autograd takes it for a gradient of that tensor's shape and type.

    Attributes:
        parts: what it is the sum of, float32 at least.

    Example:
        >>> Relevance(torch.Size((1, 2)), torch.float32, [Gradient(torch.ones(3, 1, 2))]).gradients().shape
        torch.Size([3, 1, 2])
    """

    parts: list[Part]

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, parts: Sequence[Part]) -> Relevance:
        """Make a tensor of a shape and type that holds parts in place of values."""
        device = next(iter(vars(parts[0]).values())).device
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.parts = _merged(parts) if len(parts) > 1 else list(parts)
        return self

    def gradients(self) -> Tensor:
        """Give the dense gradients (K, *shape).

        Raises:
            LostError: a part is relevance, which is no gradient where the tensor's values are not known.
        """
        found = [part.values for part in self.parts if isinstance(part, Gradient)]
        if len(found) < len(self.parts):
            raise LostError("relevance arrived where a gradient was wanted")
        total = found[0]
        for values in found[1:]:
            total = total + values
        return total

    def __repr__(self) -> str:  # type: ignore[override]
        """Name the parts."""
        return f"Relevance({tuple(self.shape)}, {[type(part).__name__ for part in self.parts]})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Add parts to parts; do all else class by class on dense gradients, as every gradient is linear in them."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten.add.Tensor and not kwargs and all(isinstance(x, Relevance) for x in args):
            return Relevance(args[0].shape, args[0].dtype, [*args[0].parts, *args[1].parts])
        if func._schema.is_mutable or func is torch.ops.aten.as_strided.default:
            raise LostError(f"{func} writes on what flows backward")
        if func is torch.ops.aten.view.default:
            func = torch.ops.aten.reshape.default  # what lies in the parts need not lie as the tensor does
        flat, form = tree_flatten((args, kwargs or {}))
        values = [of_type(x.gradients(), x.dtype) if isinstance(x, Relevance) else None for x in flat]
        count = next(len(v) for v in values if v is not None)
        made = []
        for k in range(count):
            a, kw = tree_unflatten(
                [x if v is None else v[k] for x, v in zip(flat, values, strict=True)],
                form,
            )
            made.append(tree_flatten(func(*a, **kw)))
        columns = zip(*(leaves for leaves, _ in made), strict=True)
        return tree_unflatten([_gathered(column) for column in columns], made[0][1])


def _gathered(column: tuple[Any, ...]) -> Any:
    if not isinstance(column[0], Tensor):
        return column[0]
    values = column[0][None] if len(column) == 1 else torch.stack(column)
    return Relevance(column[0].shape, column[0].dtype, [Gradient(single(values))])


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Join products of one base."""
    joined: list[Part] = []
    for part in parts:
        for place, other in enumerate(joined):
            if not isinstance(part, Product) or not isinstance(other, Product) or part.total is None:
                continue
            if part.total is other.total:
                joined[place] = Product(other.factor + part.factor, part.total, part.base)
                break
        else:
            joined.append(part)
    return joined


def _sum(part: Part) -> Tensor:
    if isinstance(part, Product):
        if part.total is not None:
            return part.factor * part.total
        assert part.base is not None
        found = torch.einsum("knc,ncp->knp", part.factor.flatten(2), part.base.flatten(2))
        return found.reshape(*found.shape[:2], 1, *part.base.shape[2:])
    if isinstance(part, Dense):
        return part.values.sum(2, keepdim=True)
    if isinstance(part, (Summed, Owed)):
        return part.values
    raise LostError("a gradient arrived where relevance was wanted")


def single(tensor: Tensor) -> Tensor:
    """Half precision as float32, all else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def of_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What a type can hold of values."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)
