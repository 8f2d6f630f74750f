"""Where branches meet: sums and concatenations, which hand relevance on to several producers; see `handing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tracing import is_traced
from .handing import CHANNELS, SUMS, TINY, Handing, Takes, classes_of, in_pieces, rows_of
from .relevance import Dense, LostError, Part, Product, Summed, dense, single, summed
from .saved import Cell

__all__ = ["Concatenation", "Sum"]


class Sum(Handing):
    """``o = a + b``: each is given its share of the relevance, ``R a / o`` and ``R b / o``.

    Args:
        b: the operand that is kept. ``o``: the sum; where what comes after sets it to 0 and nothing arrives there, it
            need not be the sum.
        below: what the producers of ``a`` and ``b`` take.
        keep: makes a cell of a tensor. ``is_last``: whether their channels stand last.
    """

    takes = CHANNELS

    def __init__(
        self,
        b: Tensor,
        o: Tensor,
        below: tuple[Takes, Takes],
        keep: Callable[[Tensor], Cell],
        is_last: bool = False,
    ) -> None:
        self._below, self.is_last = below, is_last
        b, o = (b.movedim(-1, 1), o.movedim(-1, 1)) if is_last else (b, o)
        self._b: Cell | None = keep(b)
        self.o: Cell | None = keep(o)

    def forget(self) -> None:
        """Let go of operand and sum."""
        self._b = self.o = None

    def split(self, grads: Tensor) -> list[Tensor]:
        """The same for both."""
        return [grads, grads]

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give both operands their shares."""
        if self._b is None or self.o is None:
            raise LostError("the operands of a sum were let go")
        b, o, count = self._b.tensor, self.o.tensor, classes_of(parts)
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
        for rows in in_pieces(len(o), o[0].numel()):
            values = dense(rows_of(parts, rows))[0]
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


class Concatenation(Handing):
    """Tensors side by side along their channels: each is given the relevance of its own.

    Args:
        counts: of the channels of each. ``below``: what their producers take, none of them a gradient.
        is_positive, has_zeros: of the output.
    """

    takes = CHANNELS

    def __init__(self, counts: Sequence[int], below: Sequence[Takes], is_positive: bool, has_zeros: bool) -> None:
        self._counts, self._below, self.is_positive, self.has_zeros = counts, below, is_positive, has_zeros

    def split(self, grads: Tensor) -> list[Tensor]:
        """Each its own."""
        return list(torch.split(grads, list(self._counts), 2))

    def hand(self, parts: list[Part]) -> list[list[Part]]:
        """Give each its channels."""
        given: list[list[Part]] = []
        first = 0
        for count, takes in zip(self._counts, self._below, strict=True):
            mine = [_channels(part, slice(first, first + count)) for part in parts]
            given.append([Summed(summed([part])) for part in mine] if takes == SUMS else mine)
            first += count
        return given


def _share(b: Tensor, o: Tensor) -> Tensor:
    """What part of o, a sum, b is."""
    share = single(o) + TINY
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


def _channels(part: Part, channels: slice) -> Part:
    """Relevance of some channels."""
    if not isinstance(part, Product):
        return Dense(dense([part])[:, :, channels])
    assert part.base is not None
    base = part.base[:, channels]
    if part.total is None:
        return Product(part.factor[:, :, channels], None, base)
    return Product(part.factor, base.sum(1, keepdim=True), base)
