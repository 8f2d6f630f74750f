"""Sums over the windows that a convolution sees, and their transpose.

A kernel of ones is separable: a window of k x k costs 2 k additions of one-channel maps, and no convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Windows"]

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


@dataclass(frozen=True)
class Windows:
    """Where the windows of a convolution lie; each tuple has one number a spatial dimension.

    Attributes:
        kernel: the size of a window.
        stride: the distance from one window to the next.
        before, after: the padding at both ends.
        dilation: the distance from one position of a window to the next.

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
            reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            before, after = tuple(r // 2 for r in reach), tuple(r - r // 2 for r in reach)
        else:
            before = after = _each(0 if padding == "valid" else padding, len(kernel))
        return _windows(kernel, stride, before, after, dilation)

    @cached_property
    def is_point(self) -> bool:
        """Whether each window is one position, and each position has a window."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return self.kernel == self.stride == ones and self.before == self.after == zeros

    @cached_property
    def _reach(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    def sums(self, x: Tensor, plus: float = 0.0) -> Tensor:
        """Sum each window: (N, G, *in) to (N, G, *out), with a number added to each sum."""
        if self.is_point:
            return x + plus
        if x.shape[1] > 1 and self.before == self.after:
            return self._convolve(x, plus, self.stride, self.before)
        if any(self.before) or any(self.after):
            x = functional.pad(x, [n for ends in zip(self.before[::-1], self.after[::-1], strict=True) for n in ends])
        for place, (k, step, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            dim = place - len(self.kernel)
            count = (x.shape[dim] - d * (k - 1) - 1) // step + 1
            x = _add_up([_every(x, dim, j * d, step, count) for j in range(k)])
        return x.add_(plus) if x._base is None and plus else x + plus

    def spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Give each window's value to all its positions, added up where they meet: (..., G, *out) to (..., G, *in)."""
        if self.is_point:
            return x
        dims = len(self.kernel)
        if x.shape[-1 - dims] > 1 and self.before == self.after:
            images = x.reshape(-1, *x.shape[-1 - dims :])
            spread = self._spread_convolved(images, size)
            return spread.reshape(*x.shape[: -1 - dims], *spread.shape[1:])
        for place, (k, step, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            dim = place - dims
            x = _spread_along(x, dim, k, step, d, self.before[place], size[place])
        return x

    def _convolve(self, x: Tensor, plus: float, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """Sum windows of many channels, where one convolution is faster than many additions."""
        groups = x.shape[1]
        bias = x.new_full((groups,), plus) if plus else None
        ones = x.new_ones(groups, 1, *self.kernel)
        return _CONVOLUTIONS[len(self.kernel) - 1](x, ones, bias, stride, padding, self.dilation, groups)

    def _spread_convolved(self, x: Tensor, size: Sequence[int]) -> Tensor:
        back = tuple(r - b for r, b in zip(self._reach, self.before, strict=True))
        if set(self.stride) == {1} and min(back) >= 0:
            return self._convolve(x, 0.0, self.stride, back)
        covered = zip(x.shape[2:], self.stride, self.before, self._reach, strict=True)
        unseen = [n - ((m - 1) * s - 2 * b + r + 1) for n, (m, s, b, r) in zip(size, covered, strict=True)]
        ones, groups = x.new_ones(x.shape[1], 1, *self.kernel), x.shape[1]
        transposed = _TRANSPOSED[len(size) - 1]
        return transposed(x, ones, None, self.stride, self.before, unseen, groups, self.dilation)


@lru_cache(maxsize=1024)
def _windows(*parts: tuple[int, ...]) -> Windows:
    return Windows(*parts)


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    return values * count if len(values) == 1 else values


def _every(x: Tensor, dim: int, start: int, step: int, count: int) -> Tensor:
    """Give ``count`` positions along a dimension, from ``start`` on, every ``step``-th."""
    x = x.narrow(dim, start, (count - 1) * step + 1)
    every: tuple[Any, ...] = (..., slice(None, None, step), *(slice(None),) * (-1 - dim))
    return x if step == 1 else x[every]


def _add_up(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for place, part in enumerate(parts[1:]):
        total = total.add_(part) if place else total + part
    return total


def _spread_along(x: Tensor, dim: int, k: int, step: int, dilation: int, before: int, size: int) -> Tensor:
    """Add up k copies of x along a dimension, the j-th at every ``step``-th position from ``j * dilation - before``."""
    rest = [0, 0] * (-1 - dim)
    if step == 1:
        reach = dilation * (k - 1)
        padded = functional.pad(x, [*rest, max(0, reach - before), max(0, size + before - x.shape[dim])])
        first = max(0, before - reach)
        return _add_up([padded.narrow(dim, first + (k - 1 - j) * dilation, size) for j in range(k)])
    length = -(-(size + before) // step)  # positions that leave the same remainder
    sums: list[Tensor | None] = [None] * step
    for j in range(k):
        first, remainder = divmod(j * dilation, step)
        placed = functional.pad(x, [*rest, first, length - x.shape[dim] - first])
        known = sums[remainder]
        sums[remainder] = placed if known is None else known + placed
    nothing = torch.zeros_like(next(t for t in sums if t is not None))
    axis = x.dim() + dim + 1
    side_by_side = torch.stack([nothing if t is None else t for t in sums], axis).flatten(axis - 1, axis)
    return side_by_side.narrow(dim, before, size)
