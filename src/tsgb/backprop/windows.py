"""Sums over the windows that a convolution or pooling sees, and their transpose, by shifted additions.

A kernel of ones is separable, so a window of k x k costs 2 k additions of one-channel maps and no convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..tracing import is_traced

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """Where the windows of a convolution lie: one number a spatial dimension in each tuple.

    Attributes:
        kernel: their size. ``stride``: from one to the next. ``before``, ``after``: the padding at both ends.
        dilation: from one of a window's positions to the next.

    Example:
        >>> windows = Windows.of((3,), 1, "same", 1)
        >>> windows.sums(torch.ones(1, 1, 4))
        tensor([[[2., 3., 3., 2.]]])
        >>> windows.spread(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), (4,))
        tensor([[[1., 1., 1., 0.]]])
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Windows:
        """Read the arguments of ``torch.nn.functional.conv2d`` and its kin."""
        kernel = tuple(kernel)
        stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
        if padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        else:
            before = after = _each(0 if padding == "valid" else padding, len(kernel))
        return _windows(kernel, stride, before, after, dilation)

    @cached_property
    def is_point(self) -> bool:
        """Whether each window is one position, and every position has its own."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return self.kernel == self.stride == ones and self.before == self.after == zeros

    def count(self, size: Sequence[int]) -> tuple[int, ...]:
        """How many there are along each dimension of so many positions.

        Example:
            >>> Windows.of((3,), 2, 1, 1).count((5,))
            (3,)
        """
        parts = zip(self.before, size, self.after, self._reach, self.stride, strict=True)
        return tuple([(before + n + after - reach - 1) // step + 1 for before, n, after, reach, step in parts])

    def sums(self, x: Tensor, more: float = 0.0) -> Tensor:
        """Sum over each window: (N, G, *in) to (N, G, *out), with a number added to each sum."""
        if self.is_point:
            return x + more
        if self._is_even and x.shape[1] > 1:
            return self._convolved(x, more, self.stride, self.before)
        x = functional.pad(x, [n for ends in zip(self.before[::-1], self.after[::-1], strict=True) for n in ends])
        for place, (k, step, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            dim = place - len(self.kernel)
            count = (x.shape[dim] - d * (k - 1) - 1) // step + 1
            total = _every(x, dim, 0, step, count).clone()
            for j in range(1, k):
                total += _every(x, dim, j * d, step, count)
            x = total
        return x.add_(more)

    def spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Give each window's value to all its positions, added up where they meet: (..., G, *out) to (..., G, *in)."""
        if self.is_point:
            return x
        if self._is_even and x.shape[-1 - len(self.kernel)] > 1:
            leading = x.shape[: -1 - len(self.kernel)]
            # Not by flatten, which of one class and image makes strides that torch does not know for channels last.
            images = x[0] if len(leading) == 2 and leading[0] == 1 else x.flatten(0, len(leading) - 1)
            spread = self._spread_convolved(images, size)
            return spread.reshape(*leading, *spread.shape[1:])
        for place, (k, step, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            dim = place - len(self.kernel)
            first, count = self.before[place], x.shape[dim]
            shape = list(x.shape)
            shape[dim] = first + size[place] + self.after[place]
            if is_traced():
                total = _put_together([x] * k, dim, step, d, shape[dim])
            else:
                total = x.new_zeros(shape)
                for j in range(k):
                    _every(total, dim, j * d, step, count).add_(x)
            x = total.narrow(dim, first, size[place])
        return x

    @property
    def _is_even(self) -> bool:
        """Whether both ends are padded alike, as torch's convolutions pad."""
        return self.before == self.after

    @cached_property
    def _reach(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    def _convolved(self, x: Tensor, more: float, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """Window sums of many channels (N, G, *), where one convolution takes less than many additions."""
        convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.kernel) - 1]
        ones, groups = x.new_ones(x.shape[1], 1, *self.kernel), x.shape[1]
        bias = x.new_full((groups,), more) if more else None  # which costs nothing, as an addition would
        return convolution(x, ones, bias, stride, padding, self.dilation, groups)

    def _spread_convolved(self, x: Tensor, size: Sequence[int]) -> Tensor:
        back = tuple(r - b for r, b in zip(self._reach, self.before, strict=True))
        if set(self.stride) == {1} and min(back) >= 0:
            return self._convolved(x, 0.0, self.stride, back)
        transposed = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
        covered = zip(x.shape[2:], self.stride, self.before, self._reach, strict=True)
        unseen = [n - ((m - 1) * s - 2 * b + r + 1) for n, (m, s, b, r) in zip(size, covered, strict=True)]
        ones, groups = x.new_ones(x.shape[1], 1, *self.kernel), x.shape[1]
        return transposed[len(size) - 1](x, ones, None, self.stride, self.before, unseen, groups, self.dilation)

    def spread_products(self, field: Tensor, weighting: Tensor, size: Tensor) -> Tensor:
        """Sum over g of ``size * spread(field * weighting)``, with the work for each place in the window done once.

        Args:
            field: (K, N, 1, *out). ``weighting``: (N, G, *out). ``size``: (N, G, *in).

        Returns:
            (K, N, 1, *in).
        """
        return self._spread_shared(field, size, lambda seen: weighting * seen)

    def spread_to(self, field: Tensor, values: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
        """Sum over g of ``field * values``, put where ``places`` says, with the work for each place done once.

        Args:
            field: (K, N, 1, *out). ``values``: (N, G, *out).
            places: (N, G, *out), of which position of all, counted row by row, each value is for.
            size: the positions, *in.

        Returns:
            (K, N, 1, *in).
        """
        positions = torch.arange(math.prod(size), device=field.device).reshape(1, 1, *size)
        return self._spread_shared(field, positions, lambda here: values * (places == here))

    def _spread_shared(self, field: Tensor, size: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """For each place in the window, add the field times what all classes share there."""
        dims = range(len(self.kernel))
        whole = functional.pad(size, [n for e in zip(self.before[::-1], self.after[::-1], strict=True) for n in e])
        total = field.new_zeros(*field.shape[:2], 1, *whole.shape[2:])
        products = []
        for offset in product(*(range(k) for k in self.kernel)):
            seen, given = whole, total
            for n in dims:
                start, step, count = offset[n] * self.dilation[n], self.stride[n], field.shape[3 + n]
                seen, given = _every(seen, 2 + n, start, step, count), _every(given, 3 + n, start, step, count)
            values = of(seen).sum(1, keepdim=True)
            if is_traced():
                products.append(field * values)
            else:
                given.addcmul_(field, values)
        if is_traced():
            for n in reversed(dims):
                lines = [products[first : first + self.kernel[n]] for first in range(0, len(products), self.kernel[n])]
                ends = self.stride[n], self.dilation[n], whole.shape[2 + n]
                products = [_put_together(line, n - len(self.kernel), *ends) for line in lines]
            (total,) = products
        for n in dims:
            total = total.narrow(3 + n, self.before[n], size.shape[2 + n])
        return total

    def reaching(self, size: Sequence[int], out: Sequence[int]) -> Windows:
        """The same windows with as much padding after ``size`` positions as ``out`` windows need."""
        parts = zip(self.kernel, self.stride, self.before, self.dilation, size, out, strict=True)
        after = tuple(max(0, (m - 1) * s + d * (k - 1) + 1 - n - b) for k, s, b, d, n, m in parts)
        return replace(self, after=after)


@lru_cache(maxsize=1024)
def _windows(*parts: tuple[int, ...]) -> Windows:
    return Windows(*parts)


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    return values * count if len(values) == 1 else values


def _every(x: Tensor, dim: int, start: int, step: int, count: int) -> Tensor:
    """``count`` positions along a dimension, from ``start`` on, every ``step``-th."""
    slices = [slice(None)] * x.dim()
    slices[dim] = slice(start, start + (count - 1) * step + 1, step)
    return x[tuple(slices)]


def _put_together(given: Sequence[Tensor], dim: int, step: int, dilation: int, size: int) -> Tensor:
    """Add tensors up, the j-th at every ``step``-th of ``size`` positions from ``j * dilation`` on, for a graph.

    It writes on no slices, as of many such writes torch's compiler has made wrong code. ``dim`` counts from the end.
    """
    length = -(-size // step)
    sums: list[Tensor | None] = [None] * step  # of the positions that leave the same remainder
    for j, x in enumerate(given):
        first, rest = divmod(j * dilation, step)
        placed = functional.pad(x, [0, 0] * (-1 - dim) + [first, length - x.shape[dim] - first])
        before = sums[rest]
        sums[rest] = placed if before is None else before + placed
    nothing = torch.zeros_like(next(x for x in sums if x is not None))
    axis = given[0].dim() + dim + 1
    side_by_side = torch.stack([nothing if x is None else x for x in sums], axis).flatten(axis - 1, axis)
    return side_by_side.narrow(dim, 0, size)
