"""Rules that hand relevance on: what they keep of the forward, and what they give to the operators below.

The formulas are those of `rules`; here they are written for relevance, tensor * gradient, in place of the gradient, and
for K classes at once. An operator says what it wants of what arrives: the relevance of every channel, or its sum over
the channels alone. It is told what each of its inputs' producers takes: a ``GRADIENT``, relevance by ``CHANNELS``, or
``SUMS``. Where a tensor's channels stand last, (N, ..., C), its relevance is that of the tensor with the channels moved
to the front all the same; a gradient has the tensor's own layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..rules.formulas import EPS
from ..tracing import is_traced
from .relevance import Dense, Gradient, LostError, Owed, Part, Product, Summed, dense, single, summed
from .saved import Cell
from .windows import Windows

__all__ = [
    "CHANNELS",
    "GRADIENT",
    "MANY",
    "SUMS",
    "TINY",
    "Convolution",
    "Handing",
    "Image",
    "Masked",
    "Passing",
    "Takes",
    "classes_of",
    "fields_of",
    "in_pieces",
    "rows_of",
]

Takes = Literal["gradient", "channels", "sums"]
GRADIENT: Takes = "gradient"
CHANNELS: Takes = "channels"
SUMS: Takes = "sums"

_PIECE = 2**20  # values of a tensor that is worked on in one piece
TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
MANY = 3  # classes from which on what they share is worked out once and not for each


class Handing(ABC):
    """One operator of a forward; ``takes`` is what it wants of the relevance that arrives."""

    takes: Takes = SUMS
    below: Takes = GRADIENT  # what the producer of its one input takes
    is_positive = False  # whether no value of the output is below 0, where that is known
    has_zeros = True  # whether values of the output may be 0 and yet not tell that nothing arrives there
    is_last = False  # whether the channels of the output stand last
    readers = 0  # calls that took the output so far
    note: Callable[[Tensor], None] | None = None  # told what a convolution shares, where it is read

    @abstractmethod
    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """From the relevance that arrives to what each input is given."""

    def forget(self) -> None:  # noqa: B027
        """Let go of what was kept, as it has been used; here nothing."""

    def split(self, grads: Tensor) -> list[Tensor]:
        """From gradients (K, *out) to those of each input; what has one input is not asked."""
        return [grads]


class Image(Handing):
    """The image, where relevance ends."""

    def __init__(self, takes: Takes) -> None:
        """``takes``: what is asked for."""
        self.takes = takes

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give what came."""
        return [parts]


class Passing(Handing):
    """What passes relevance unchanged: norms, activations with act(0) = 0, constants, gates, moved channels."""

    def __init__(self, below: Takes, is_positive: bool, has_zeros: bool, is_last: bool) -> None:
        """``below``: what the producer takes, and so this. The rest is of the output."""
        self.takes, self.is_positive, self.has_zeros, self.is_last = below, is_positive, has_zeros, is_last

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give what came."""
        return [parts]


class Masked(Handing):
    """A shift that turns zeros into numbers: relevance passes but where the input is 0, as there it has nowhere to go.

    Args:
        x: (N, C, *in), the input. ``below``: what its producer takes. The rest is of the output.
    """

    takes = CHANNELS

    def __init__(self, x: Tensor, below: Takes, is_last: bool) -> None:
        self._below, self.is_last = below, is_last
        self._alive: Tensor | None = (x.movedim(-1, 1) if is_last else x) != 0

    def forget(self) -> None:
        """Let go of the mask."""
        self._alive = None

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give what came where something is."""
        if self._alive is None:
            raise LostError("the mask of a shift was let go")
        given: list[Part] = []
        for part in parts:
            if isinstance(part, Product):
                assert part.base is not None
                base = part.base * self._alive
                total = None if part.total is None else base.sum(1, keepdim=True)
                given.append(Product(part.factor, total, base))
            else:
                given.append(Dense(dense([part]) * self._alive))
        return [[Summed(summed(given))] if self._below == SUMS else given]


class Convolution(Handing):
    """TSGB-Conv: ``u = spread(c / (n + 1e-10))`` is handed on as the relevance ``u |x|``; see `rules.conv`.

    Args:
        x: (N, C, *in), the input, or (N, *in, C) where its channels stand last, as a linear layer's. ``alive``: (N, O,
            *out), where the output has relevance; None for everywhere.
        windows: what each position of the output sees.
        fields: 1, or the number of groups where each is treated by itself.
        below: what the producer of ``x`` takes.
        is_first: whether ``x`` is the image, whose relevance is worked out when it is asked for, if it is.
        is_positive: whether no value of ``x`` is below 0, where that is known.
        keep: makes a cell of a tensor. ``has_bias``: whether the output is more than 0 where nothing is seen.
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
        has_bias: bool,
        is_last: bool = False,
        is_first: bool = False,
    ) -> None:
        x = x.movedim(-1, 1) if is_last else x
        self._alive, self._windows, self._has_bias, self.is_last = alive, windows, has_bias, is_last
        self.takes = SUMS if fields == 1 and self._alive is None else CHANNELS
        self._fields, self.below, self._is_positive = fields, below, is_positive
        self._size, self._is_first = x.shape[2:], is_first
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
            return [[self._by_group(parts)]]
        assert self._total is not None
        relevance, n = summed(parts), self._windows.sums(self._total, EPS)
        if self.note is not None:
            # An output of 0 has no relevance, though a shift after it hands some on.
            self.note((relevance if self._has_bias else relevance * (n > EPS)).squeeze(2))
        total = self._total

        def spread() -> Tensor:
            return self._windows.spread(relevance / n, self._size)

        if self.below == SUMS:
            return [[Owed(n, lambda: spread() * total) if self._is_first else Product(spread(), total, None)]]
        field = spread()
        if self.below == CHANNELS:
            return [[Product(field, self._total, self._sizes())]]
        values = field * single(self._input()).sign()
        return [[Gradient(values.movedim(2, -1) if self.is_last else values)]]

    def _by_group(self, parts: Sequence[Part]) -> Part:
        sizes = self._sizes()
        size = _grouped(sizes, self._fields, 1)
        if self.note is not None:  # each field is an image's
            shared = _grouped(dense(parts), self._fields, 2)
            is_seen = True if self._has_bias else self._windows.sums(size, EPS) > EPS
            self.note((shared * is_seen).squeeze(1))  # a copy, as what arrived is written on below
        if self.below == SUMS:
            at_once = fields_of(parts) is not None and (is_traced() or classes_of(parts) >= MANY)
            sums = self._sums_at_once if at_once else self._sums
            pieces = in_pieces(len(size), size[0].numel())
            return Summed(torch.cat([sums(rows_of(parts, rows), size[rows]) for rows in pieces], 1))
        n = self._windows.sums(size, EPS)
        field = self._windows.spread(_grouped(dense(parts), self._fields, 2).div_(n), self._size)
        factor = sizes if self.below == CHANNELS else single(self._input()).sign()
        values = (field.unsqueeze(3) * _unflattened(factor, self._fields, 1)).flatten(2, 3)
        return Dense(values) if self.below == CHANNELS else Gradient(values)

    def _sums(self, parts: Sequence[Part], size: Tensor) -> Tensor:
        """The sums over channels below, of some images."""
        n = self._windows.sums(size, EPS)
        fields = fields_of(parts) if len(parts) == classes_of(parts) == 1 else None
        if fields is None:
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
            for factor, base in fields_of(parts) or ()
        ]
        return torch.stack(found).sum(0)

    def _input(self) -> Tensor:
        if self._x is None:
            raise LostError("the input of a convolution was let go")
        return self._x.tensor

    def _sizes(self) -> Tensor:
        x = single(self._input())
        return x if self._is_positive else x.abs()


def classes_of(parts: Sequence[Part]) -> int:
    """The number of classes."""
    return len(parts[0].factor if isinstance(parts[0], Product) else parts[0].values)


def fields_of(parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]] | None:
    """The fields and bases of relevance that is a sum of products of such, else None."""
    found = [(p.factor, p.base) for p in parts if isinstance(p, Product) and p.total is not None and p.base is not None]
    return found if len(found) == len(parts) else None


def in_pieces(count: int, numel: int) -> list[slice]:
    """Cut images into pieces that stay in the cache, and for which no memory is mapped anew; a graph's are whole."""
    step = count if is_traced() else max(1, _PIECE // numel)
    return [slice(start, start + step) for start in range(0, count, step)]


def rows_of(parts: Sequence[Part], rows: slice) -> list[Part]:
    """Relevance of some images."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Product):
            base = None if part.base is None else part.base[rows]
            found.append(Product(part.factor[:, rows], None if part.total is None else part.total[rows], base))
        elif isinstance(part, (Summed, Owed)):
            found.append(Summed(part.values[:, rows]))
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
