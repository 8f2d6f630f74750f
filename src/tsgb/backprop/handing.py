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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..rules.formulas import EPS
from ..tracing import is_traced
from .relevance import Dense, Gradient, LostError, Owed, Part, Product, Summed, dense, single, summed
from .saved import Cell
from .windows import Windows

if TYPE_CHECKING:
    from .reading import Reading

__all__ = [
    "CHANNELS",
    "GRADIENT",
    "SUMS",
    "TINY",
    "AveragePool",
    "Convolution",
    "Handing",
    "Image",
    "Masked",
    "MaxPool",
    "Mean",
    "Passing",
    "Takes",
    "classes_of",
    "in_pieces",
    "rows_of",
]

Takes = Literal["gradient", "channels", "sums"]
GRADIENT: Takes = "gradient"
CHANNELS: Takes = "channels"
SUMS: Takes = "sums"

_PIECE = 2**20  # values of a tensor that is worked on in one piece
TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
_MANY = 3  # classes from which on what they share is worked out once and not for each


class Handing(ABC):
    """One operator of a forward; ``takes`` is what it wants of the relevance that arrives."""

    takes: Takes = SUMS
    below: Takes = GRADIENT  # what the producer of its one input takes
    is_positive = False  # whether no value of the output is below 0, where that is known
    has_zeros = True  # whether values of the output may be 0 and yet not tell that nothing arrives there
    is_last = False  # whether the channels of the output stand last
    readers = 0  # calls that took the output so far
    reading: Reading | None = None  # what notes the relevance that a convolution shares

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
    has_zeros = False

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
            return [[self._grouped(parts)]]
        assert self._total is not None
        relevance, n = summed(parts), self._windows.sums(self._total, EPS)
        if self.reading is not None:
            # An output of 0 has no relevance, though a shift after it hands some on.
            self.reading.note((relevance if self._has_bias else relevance * (n > EPS)).squeeze(2))
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

    def _grouped(self, parts: Sequence[Part]) -> Part:
        sizes = self._sizes()
        size = _grouped(sizes, self._fields, 1)
        if self.below == SUMS:
            at_once = _fields(parts) is not None and (is_traced() or classes_of(parts) >= _MANY)
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
        fields = _fields(parts) if len(parts) == classes_of(parts) == 1 else None
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
        fields = _fields(parts) if self._below == SUMS else None
        if fields is not None and (is_traced() or classes_of(parts) >= _MANY or self._is_partition()):
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


def classes_of(parts: Sequence[Part]) -> int:
    """The number of classes."""
    return len(parts[0].factor if isinstance(parts[0], Product) else parts[0].values)


def _fields(parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]] | None:
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
