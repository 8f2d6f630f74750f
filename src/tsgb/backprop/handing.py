"""Rules that hand relevance on: what they keep of the forward, and what they give to the operators below.

The formulas are those of `rules`; here they are written for relevance, tensor * gradient, in place of the gradient, and
for K classes at once. An operator says what it wants of what arrives: the relevance of every channel, or its sum over
the channels alone. It is told what each of its inputs' producers takes: a ``GRADIENT``, relevance by ``CHANNELS``, or
``SUMS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..rules.formulas import EPS
from ..tracing import is_traced
from .relevance import Dense, Gradient, LostError, Part, Product, Summed, dense, single, summed
from .saved import Cell
from .windows import Windows

__all__ = [
    "CHANNELS",
    "GRADIENT",
    "SUMS",
    "Convolution",
    "Handing",
    "Image",
    "MaxPool",
    "Mean",
    "Passing",
    "Sum",
    "Takes",
]

Takes = Literal["gradient", "channels", "sums"]
GRADIENT: Takes = "gradient"
CHANNELS: Takes = "channels"
SUMS: Takes = "sums"

_PIECE = 2**20  # values of a tensor that is worked on in one piece
_MANY = 3  # classes from which on what they share is worked out once and not for each
_TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number


class Handing(ABC):
    """One operator of a forward; ``takes`` is what it wants of the relevance that arrives."""

    takes: Takes = SUMS
    below: Takes = GRADIENT  # what the producer of its one input takes
    is_positive = False  # whether no value of the output is below 0, where that is known
    has_zeros = True  # whether values of the output may be 0 and yet not tell that nothing arrives there

    @abstractmethod
    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """From the relevance that arrives to what each input is given."""

    def forget(self) -> None:  # noqa: B027
        """Let go of what was kept, as it has been used; here nothing."""


class Image(Handing):
    """The image, where relevance ends."""

    def __init__(self, takes: Takes) -> None:
        """``takes``: what is asked for."""
        self.takes = takes

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give what came."""
        return [parts]


class Passing(Handing):
    """What passes relevance unchanged: batch norm, activations with act(0) = 0, constant shifts, gates."""

    def __init__(self, below: Takes, is_positive: bool, has_zeros: bool) -> None:
        """``below``: what the producer takes, and so this. The rest is of the output."""
        self.takes, self.is_positive, self.has_zeros = below, is_positive, has_zeros

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give what came."""
        return [parts]


class Convolution(Handing):
    """TSGB-Conv: ``u = spread(c / (n + 1e-10))`` is handed on as the relevance ``u |x|``; see `rules.conv`.

    Args:
        x: (N, C, *in), the input. ``alive``: (N, O, *out), where the output has relevance; None for everywhere.
        windows: what each position of the output sees.
        fields: 1, or the number of groups where each is treated by itself.
        below: what the producer of ``x`` takes.
        is_positive: whether no value of ``x`` is below 0, where that is known.
        keep: makes a cell of a tensor.
    """

    has_zeros = False

    def __init__(
        self,
        x: Tensor,
        alive: Tensor | None,
        windows: Windows,
        fields: int,
        below: Takes,
        is_positive: bool,
        keep: Callable[[Tensor], Cell],
    ) -> None:
        self._alive, self._windows = alive, windows
        self.takes = SUMS if fields == 1 and self._alive is None else CHANNELS
        self._fields, self.below, self._is_positive = fields, below, is_positive
        self._size = x.shape[2:]
        self._total = None if fields > 1 else _total(x, is_positive)
        self._x = keep(x) if fields > 1 or below != SUMS else None

    def forget(self) -> None:
        """Let go of the input."""
        self._x = self._total = self._alive = None

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Share each position's relevance among all that it sees, in proportion to |x|."""
        if self._alive is not None:
            parts = [Dense(dense(parts).mul_(self._alive))]
        if self._fields > 1:
            return [[self._grouped(parts)]]
        assert self._total is not None
        shared = summed(parts) / self._windows.sums(self._total, EPS)
        field = self._windows.spread(shared, self._size)
        if self.below == SUMS:
            return [[Product(field, self._total, None)]]
        if self.below == CHANNELS:
            return [[Product(field, self._total, self._sizes())]]
        return [[Gradient(field * single(self._input()).sign())]]

    def _grouped(self, parts: Sequence[Part]) -> Part:
        sizes = self._sizes()
        size = _grouped(sizes, self._fields, 1)
        if self.below == SUMS:
            sums = self._sums if _fields(parts) is None or _count(parts) < _MANY else self._sums_at_once
            pieces = _pieces(len(size), size[0].numel())
            return Summed(torch.cat([sums(_cut(parts, rows), size[rows]) for rows in pieces], 1))
        n = self._windows.sums(size, EPS)
        field = self._windows.spread(_grouped(dense(parts), self._fields, 2).div_(n), self._size)
        factor = sizes if self.below == CHANNELS else single(self._input()).sign()
        values = (field.unsqueeze(3) * _unflattened(factor, self._fields, 1)).flatten(2, 3)
        return Dense(values) if self.below == CHANNELS else Gradient(values)

    def _sums(self, parts: Sequence[Part], size: Tensor) -> Tensor:
        """The sums over channels below, of some images."""
        n = self._windows.sums(size, EPS)
        fields = _fields(parts) if len(parts) == _count(parts) == 1 else None
        if fields is None or is_traced():
            shared = _grouped(dense(parts), self._fields, 2).div_(n)
        else:  # the same in the place of n
            factor, base = fields[0]
            shared = torch.div(_grouped(base, self._fields, 1), n, out=n).mul_(factor[0])[None]
        return self._windows.spread(shared, self._size).mul_(size).sum(2, keepdim=True)

    def _sums_at_once(self, parts: Sequence[Part], size: Tensor) -> Tensor:
        """The same; for each place in the window a one-channel map that all classes share."""
        n = self._windows.sums(size, EPS)
        found = [
            self._windows.spread_products(factor, _grouped(base, self._fields, 1) / n, size)
            for factor, base in _fields(parts) or ()
        ]
        return torch.stack(found).sum(0)

    def _input(self) -> Tensor:
        if self._x is None:
            raise LostError("the input of a convolution was let go")
        return self._x.tensor

    def _sizes(self) -> Tensor:
        x = single(self._input())
        return x if self._is_positive else x.abs()


class Sum(Handing):
    """``o = a + b``: each is given its share of the relevance, ``R a / o`` and ``R b / o``.

    Args:
        b: the operand that is kept. ``o``: the sum; where what comes after sets it to 0 and nothing arrives there, it
            need not be the sum.
        below: what the producers of ``a`` and ``b`` take.
        keep: makes a cell of a tensor.
    """

    takes = CHANNELS

    def __init__(
        self, b: Tensor, o: Tensor, below: tuple[Takes, Takes], has_zeros: bool, keep: Callable[[Tensor], Cell]
    ) -> None:
        self._below, self.has_zeros = below, has_zeros
        self._b: Cell | None = keep(b)
        self.o: Cell | None = keep(o)

    def forget(self) -> None:
        """Let go of operand and sum."""
        self._b = self.o = None

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give both operands their shares."""
        if self._b is None or self.o is None:
            raise LostError("the operands of a sum were let go")
        b, o, count = self._b.tensor, self.o.tensor, _count(parts)
        if count == 1 and not is_traced():
            return [[given] for given in self._of_one(parts, b, o)]
        share = _share(b, o)
        products = [part for part in parts if isinstance(part, Product)]
        if len(products) > count or count == 1:  # then the classes' own channels are less work than the products'
            products = []
        given: list[list[Part]] = [[], []]
        for product in products:
            for place, given_to in enumerate(_split(product, share, self._below)):
                given[place].append(given_to)
        rest = [part for part in parts if not any(part is product for product in products)]
        if rest:
            values = dense(rest)
            mine = values * share
            if self._below[0] == SUMS:
                given[0].append(Summed(values.sum(2, keepdim=True) - mine.sum(2, keepdim=True)))
            else:
                given[0].append(Dense(values.sub_(mine)))
            given[1].append(Summed(mine.sum(2, keepdim=True)) if self._below[1] == SUMS else Dense(mine))
        return given

    def _of_one(self, parts: Sequence[Part], b: Tensor, o: Tensor) -> list[Part]:
        """The shares of one class, in pieces and one of them in the place of what came, as that takes little memory."""
        place = next((part.values[0] for part in parts if isinstance(part, Dense)), None)
        dtype = torch.promote_types(o.dtype, torch.float32)
        whole: list[Tensor | None] = [None, None]
        for operand in (0, 1):
            if self._below[operand] != SUMS:
                whole[operand] = torch.empty_like(o, dtype=dtype) if place is None else place
                place = None
        sums: tuple[list[Tensor], list[Tensor]] = [], []
        for rows in _pieces(len(o), o[0].numel()):
            values = dense(_cut(parts, rows))[0]
            mine = _share(b[rows], o[rows]).mul_(values)
            if whole[0] is None:
                sums[0].append(values.sum(1, keepdim=True) - mine.sum(1, keepdim=True))
            else:
                whole[0][rows] = values.sub_(mine)
            if whole[1] is None:
                sums[1].append(mine.sum(1, keepdim=True))
            else:
                whole[1][rows] = mine
        return [
            Summed(torch.cat(found)[None]) if values is None else Dense(values[None])
            for found, values in zip(sums, whole, strict=True)
        ]


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
        fields = _fields(parts) if self._below == SUMS else None
        if fields is not None and (is_traced() or _count(parts) >= _MANY or self._is_partition()):
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


def _share(b: Tensor, o: Tensor) -> Tensor:
    """What part of o, a sum, b is."""
    share = single(o) + _TINY
    return torch.div(single(b), share, out=share)


def _split(product: Product, share: Tensor, below: tuple[Takes, Takes]) -> list[Part]:
    """What two operands are given of a product, where the second has a share of it."""
    assert product.base is not None
    mine = product.base * share
    if product.total is None:
        both = [Product(product.factor, None, product.base - mine), Product(product.factor, None, mine)]
        return [Summed(summed([p])) if takes == SUMS else p for p, takes in zip(both, below, strict=True)]
    total = mine.sum(1, keepdim=True)
    return [
        Product(product.factor, product.total - total, None if below[0] == SUMS else product.base - mine),
        Product(product.factor, total, None if below[1] == SUMS else mine),
    ]


def _count(parts: Sequence[Part]) -> int:
    """The number of classes."""
    return len(parts[0].factor if isinstance(parts[0], Product) else parts[0].values)


def _fields(parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]] | None:
    """The fields and bases of relevance that is a sum of products of such, else None."""
    found = [(p.factor, p.base) for p in parts if isinstance(p, Product) and p.total is not None and p.base is not None]
    return found if len(found) == len(parts) else None


def _pieces(count: int, numel: int) -> list[slice]:
    """Cut images into pieces whose tensors stay in the cache, and below the size for which memory is mapped anew."""
    step = max(1, _PIECE // numel)
    return [slice(start, start + step) for start in range(0, count, step)]


def _cut(parts: Sequence[Part], rows: slice) -> list[Part]:
    """Relevance of some images."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Product):
            base = None if part.base is None else part.base[rows]
            found.append(Product(part.factor[:, rows], None if part.total is None else part.total[rows], base))
        else:
            found.append(type(part)(part.values[:, rows]))
    return found


def _total(x: Tensor, is_positive: bool) -> Tensor:
    """Sum |x| over the channels, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x if is_positive else x.abs()).sum(1, keepdim=True, dtype=dtype)


def _grouped(x: Tensor, fields: int, dim: int) -> Tensor:
    """Sum the channels of each field along a dimension."""
    return x if x.shape[dim] == fields else _unflattened(x, fields, dim).sum(dim + 1)


def _unflattened(x: Tensor, fields: int, dim: int) -> Tensor:
    return x.reshape(*x.shape[:dim], fields, -1, *x.shape[dim + 1 :])
