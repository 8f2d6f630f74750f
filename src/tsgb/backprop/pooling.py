"""Means and poolings that hand relevance on; see `handing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from .handing import CHANNELS, GRADIENT, MANY, SUMS, TINY, Handing, Takes, classes_of, fields_of
from .relevance import Dense, Gradient, LostError, Part, Product, Summed, dense, single
from .saved import Cell
from .windows import Windows

__all__ = ["AveragePool", "MaxPool", "Mean"]


class Mean(Handing):
    """The mean over all positions: its gradient is a weight of each channel, ``R = grad / positions * x``.

    Args:
        x: (N, C, *), the input, whose producer takes relevance. ``keep``: makes a cell of it.
    """

    takes = GRADIENT

    def __init__(self, x: Tensor, keep: Callable[[Tensor], Cell]) -> None:
        self._x: Cell | None = keep(x)

    def forget(self) -> None:
        """Let go of the input."""
        self._x = None

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give each channel its weight."""
        if self._x is None:
            raise LostError("the input of a mean was let go")
        x = single(self._x.tensor)
        given: list[Part] = []
        for part in parts:
            assert isinstance(part, Gradient)
            weights = part.values.reshape(*part.values.shape[:3], *(1 for _ in x.shape[2:])) / x[0, 0].numel()
            given.append(Product(weights, None, x))
        return [given]


class AveragePool(Handing):
    """Average pooling: by its ordinary gradient each value is given its share of the sum, ``R = x * pool^T(R / o)``.

    Args:
        x: (N, C, H, W), the input. ``o``: the output. ``keep``: makes cells of them.
        arguments: as ``torch.ops.aten.avg_pool2d`` takes them after the input.
        below: what the producer of ``x`` takes.
    """

    takes = CHANNELS

    def __init__(
        self, x: Tensor, o: Tensor, arguments: tuple[Any, ...], below: Takes, keep: Callable[[Tensor], Cell]
    ) -> None:
        self._below, self._arguments = below, arguments
        self._x: Cell | None = keep(x)
        self._o: Cell | None = keep(o)

    def forget(self) -> None:
        """Let go of input and output."""
        self._x = self._o = None

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give each value its share."""
        if self._x is None or self._o is None:
            raise LostError("what a pooling took was let go")
        x, o = single(self._x.tensor), single(self._o.tensor)
        found = []
        for values in dense(parts):
            grad = torch.ops.aten.avg_pool2d_backward(values / (o + TINY), x, *self._arguments)
            given = grad.mul_(x)
            found.append(given.sum(1, keepdim=True) if self._below == SUMS else given)
        together = torch.stack(found)
        return [[Summed(together) if self._below == SUMS else Dense(together)]]


class MaxPool(Handing):
    """Max pooling in two dimensions: relevance goes to where the maximum was.

    Args:
        x: (N, C, H, W), the input, of which the shape alone is kept. ``indices``: where the maxima were.
        arguments: kernel, stride, padding, dilation and ceil_mode, as ``torch.ops.aten.max_pool2d_with_indices`` takes
            them.
        below: what the producer of ``x`` takes.
    """

    takes = CHANNELS

    def __init__(self, x: Tensor, indices: Tensor, arguments: tuple[Any, ...], below: Takes, is_positive: bool) -> None:
        self.is_positive = is_positive
        self._below, self._indices, self._arguments = below, indices, arguments
        self._shape = x.shape
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self._form = torch.channels_last if is_last else torch.contiguous_format

    def forget(self) -> None:
        """Let go of the places of the maxima."""
        self._indices = None  # type: ignore[assignment]

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give the maxima all."""
        fields = fields_of(parts) if self._below == SUMS else None
        if fields is not None and (is_traced() or classes_of(parts) >= MANY or self._is_partition()):
            windows, size = self._windows(), self._shape[2:]
            return [[Summed(windows.spread_to(factor, base, self._indices, size)) for factor, base in fields]]
        values = torch.stack([self.scattered(v) for v in dense(parts)])
        return [[Summed(values.sum(2, keepdim=True)) if self._below == SUMS else Dense(values)]]

    def scattered(self, values: Tensor) -> Tensor:
        """Put values (N, C, *out) where the maxima were: (N, C, *in)."""
        if self._indices is None:
            raise LostError("the places of the maxima were let go")
        values = values.contiguous(memory_format=self._form)
        like = torch.empty(self._shape, dtype=values.dtype, device=values.device, memory_format=self._form)
        scattered: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            values, like, *self._arguments, self._indices
        )
        return scattered

    def _windows(self) -> Windows:
        kernel, stride, padding, dilation, _ = self._arguments
        windows = Windows.of(kernel, stride, padding, dilation)
        # With ceil_mode the last window may end beyond the padding.
        return windows.reaching(self._shape[2:], self._indices.shape[2:])

    def _is_partition(self) -> bool:
        kernel, stride = self._arguments[:2]
        return list(kernel) == list(stride)
