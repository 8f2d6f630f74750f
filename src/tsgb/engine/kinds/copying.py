"""COPY: each element of the output is one of an input's, so what arrives, gradient or relevance, goes back to it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..tape import CHANNEL_SUM, GRADIENT, PER_CHANNEL
from ..terms import ChannelSum, Cotangent, Dense, Factored, Term, channel_sum, dense
from .gradient import Gradient, RelevanceRule, replay, vjp

if TYPE_CHECKING:
    from ..tape import Node, Tape, Value

__all__ = [
    "Concatenate", "Constant", "Copy", "MaxPool", "Permute", "Reshape", "Restride", "Same", "channels_first",
    "channels_in_place",
]  # fmt: skip

aten = torch.ops.aten


def channels_first(value: Value, x: Tensor) -> Tensor:
    """Move the channels of (K, N, ...), which has a value's layout, to the front: (K, N, C, *)."""
    return x if value.channel_dim == 1 or x.dim() < 4 else x.movedim(value.channel_dim + 1, 2)


def channels_in_place(value: Value, x: Tensor) -> Tensor:
    """Undo `channels_first`."""
    return x if value.channel_dim == 1 or x.dim() < 4 else x.movedim(2, value.channel_dim + 1)


class Copy(RelevanceRule):
    """Views, slices, padding, flips, repeats: the operator's own derivative, of relevance too."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Say what the outputs need: a gradient where images are mixed or an input needs one, else each channel."""
        if not all(value.dtype.is_floating_point for value in node.inputs):  # indices, which are no blanks
            return replay(Gradient(), tape, node, tensors, output)
        outputs = [value for value in node.outputs if value is not None]
        is_gradient = any(value.needs == GRADIENT for value in node.inputs) or self._mixes(node, outputs)
        for value in outputs:
            value.needs = GRADIENT if is_gradient else PER_CHANNEL
            value.is_positive = all(v.is_positive for v in node.inputs)
        if is_gradient:
            for value, x in zip(node.inputs, tensors, strict=True):
                if value.needs != GRADIENT:
                    tape.keep(value, x)
        return None

    def _mixes(self, node: Node, outputs: list[Value]) -> bool:
        """Tell whether images are taken apart or put together, so that relevance has no place for them."""
        return any(len(v.shape) < 2 or v.shape[0] != node.inputs[0].shape[0] for v in outputs)

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give each input what arrives at its elements."""
        rows = [
            None if v is None or g is None else g if isinstance(g, Tensor) else channels_in_place(v, dense(g))
            for v, g in zip(node.outputs, arrived, strict=True)
        ]
        given = self._back(node, rows)
        is_gradient = next(v for v in node.outputs if v is not None).needs == GRADIENT
        return [
            g if g is None or is_gradient else [Dense(channels_first(v, g))]
            for v, g in zip(node.inputs, given, strict=True)
        ]

    def _back(self, node: Node, rows: list[Tensor | None]) -> list[Tensor | None]:
        like = next(row for row in rows if row is not None)
        return vjp(node, [_blank(node, value, like) for value in node.inputs], rows, is_checked=False)


def _blank(node: Node, value: Value, like: Tensor) -> Tensor:
    """Make a tensor of an input's shape, whose elements do not count; for operators that read strides, of its own."""
    if node.saved is not None and value is node.args[0]:
        return torch.empty_strided(value.shape, node.saved, dtype=like.dtype, device=like.device).zero_()
    return torch.zeros(value.shape, dtype=like.dtype, device=like.device)


class Reshape(Copy):
    """All elements, in their order: views, other types, other devices."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep what is known of the input where the shape stays, else find the channels again."""
        x, out = node.inputs[-1], node.output
        if x.shape == out.shape:
            out.needs, out.is_positive, out.may_be_zero = x.needs, x.is_positive, x.may_be_zero
            out.channel_dim = x.channel_dim
            return Same()
        if len(x.shape) == 2 < len(out.shape):  # a vector
            out.channel_dim = out.shape.index(x.shape[1], 1) if x.shape[1] in out.shape[1:] else 1
        return super().record(tape, node, tensors, output)

    def _back(self, node: Node, rows: list[Tensor | None]) -> list[Tensor | None]:
        (row,), x = rows, node.inputs[0]
        return [None if row is None else row.reshape(len(row), *x.shape)]


class Same(RelevanceRule):
    """The same tensor: what arrives goes on, on the input's device."""

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give the last input what arrives, moved to its device."""
        x, out, given = node.inputs[-1], node.output, arrived[0]
        if x.device != out.device and given is not None:
            if isinstance(given, Tensor):
                given = given.to(x.device)
            elif x.needs == CHANNEL_SUM:
                given = [ChannelSum(channel_sum(given).to(x.device))]
            else:
                given = [Dense(dense(given).to(x.device))]
        return [*[None] * (len(node.inputs) - 1), given]


class Constant(RelevanceRule):
    """What is overwritten by a constant: nothing is given to what was there."""

    def paths(self, node: Node) -> list[Value]:
        """List no input."""
        return []

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep nothing."""
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give no input anything."""
        return [None] * len(node.inputs)


class Restride(Copy):
    """A view cut out of its memory, or a write into a part of it: element by element, whatever the shapes."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Save the strides of the memory, which the operator reads."""
        node.saved = node.saved or tensors[0].stride()
        return super().record(tape, node, tensors, output)

    def _mixes(self, node: Node, outputs: list[Value]) -> bool:
        return False


class Permute(Copy):
    """Exchanged dimensions; where only the channels move, relevance stays as it is."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Find where the channels went; where nothing else moved, relevance stays as it is."""
        x, out, count = node.inputs[0], node.output, len(node.inputs[0].shape)
        places = _order(node, count)
        if places is None:
            return super().record(tape, node, tensors, output)
        out.channel_dim = places.index(x.channel_dim) if count > 2 else 1
        rest = [d for d in places if d != x.channel_dim]
        if rest == sorted(rest) and places[0] == 0 and x.needs != GRADIENT and count > 2:
            out.needs, out.is_positive, out.may_be_zero = x.needs, x.is_positive, x.may_be_zero
            return Same()
        if len(x.shape) == 2 < len(out.shape):  # a vector
            out.channel_dim = out.shape.index(x.shape[1], 1) if x.shape[1] in out.shape[1:] else 1
        return super().record(tape, node, tensors, output)

    def _mixes(self, node: Node, outputs: list[Value]) -> bool:
        places = _order(node, len(node.inputs[0].shape))
        return places is not None and places[:1] != [0]


def _order(node: Node, count: int) -> list[int] | None:
    """Say from which dimension each dimension of the output comes."""
    if node.packet is aten.permute:
        return [d % count for d in node.args[1]]
    places = list(range(count))
    if node.packet is aten.transpose:
        a, b = (d % count for d in node.args[1:3])
    elif node.packet in (aten.t, aten.numpy_T) and count >= 2:
        a, b = count - 2, count - 1
    else:
        return None
    places[a], places[b] = b, a
    return places


class Concatenate(Copy):
    """Tensors side by side along their channels: each is given its own."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Ask for each channel where tensors lie side by side along the channels; elsewhere the operator is a copy."""
        out, dim = node.output, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        is_whole = len(node.inputs) == len(node.args[0]) and len(out.shape) > 2 and dim % len(out.shape) == 1
        if not is_whole or any(v.needs == GRADIENT or v.channel_dim != 1 for v in node.inputs):
            return replay(Copy(), tape, node, tensors, output)
        out.needs, out.channel_dim = PER_CHANNEL, 1
        out.is_positive = all(v.is_positive for v in node.inputs)
        out.may_be_zero = any(v.may_be_zero is not False for v in node.inputs)
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Cut each term into the channels of each input."""
        (terms,), start = arrived, 0
        given: list[Cotangent | None] = []
        assert isinstance(terms, list)
        for value in node.inputs:
            channels = slice(start, start := start + value.shape[1])
            own: list[Term] = []
            for term in terms:
                if not isinstance(term, Factored):
                    own.append(Dense(dense([term])[:, :, channels]))
                    continue
                assert term.base is not None
                base = term.base[:, channels]
                if term.total is None:
                    own.append(Factored(term.factor[:, :, channels], base, None))
                else:
                    own.append(Factored(term.factor, base, base.sum(1, keepdim=True)))
            given.append([ChannelSum(channel_sum([t])) for t in own] if value.needs == CHANNEL_SUM else own)
        return given


class MaxPool(Copy):
    """Max pooling in two dimensions: relevance goes to where the maximum was."""

    def run(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run the pooling, and save where the maxima were."""
        geometry = _geometry(node)
        output, places = aten.max_pool2d_with_indices(args[0], *geometry)
        node.saved = geometry, places
        return output

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Save the memory format beside the places of the maxima."""
        x, out, t = node.inputs[0], node.output, tensors[0]
        if x.needs == GRADIENT or len(x.shape) != 4 or x.channel_dim != 1:
            node.saved = None
            return replay(Gradient(), tape, node, tensors, output)
        is_channels_last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        node.saved = (*node.saved, torch.channels_last if is_channels_last else torch.contiguous_format)
        out.needs, out.is_positive, out.may_be_zero = PER_CHANNEL, x.is_positive, x.may_be_zero is not False
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Scatter relevance to where the maxima were."""
        (terms,), (x,), (geometry, places, form) = arrived, node.inputs, node.saved
        assert isinstance(terms, list)
        fields = [(t.factor, t.base) for t in terms if isinstance(t, Factored) and t.total is not None]
        is_partition = geometry[0] == geometry[1]
        if x.needs == CHANNEL_SUM and len(fields) == len(terms) and (is_partition or len(fields[0][0]) >= _MANY):
            return [[ChannelSum(_scatter_fields(f, b, places, geometry, x.shape[2:])) for f, b in fields]]  # type: ignore[arg-type]
        like = torch.empty(x.shape, dtype=torch.float32, device=places.device, memory_format=form)
        values = torch.stack([
            aten.max_pool2d_with_indices_backward(
                row.contiguous(memory_format=form), like.to(row.dtype), *geometry, places
            )
            for row in dense(terms)
        ])  # fmt: skip
        return [[ChannelSum(values.sum(2, keepdim=True)) if x.needs == CHANNEL_SUM else Dense(values)]]


_MANY = 3  # classes from which on what they share is computed once


def _geometry(node: Node) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    pairs = [
        _pair(given["kernel_size"]), _pair(given.get("stride") or given["kernel_size"]),
        _pair(given.get("padding", 0)), _pair(given.get("dilation", 1)),
    ]  # fmt: skip
    return (*pairs, bool(given.get("ceil_mode", False)))


def _pair(value: Any) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * 2 if len(given) == 1 else given


def _scatter_fields(field: Tensor, base: Tensor, places: Tensor, geometry: Any, size: Sequence[int]) -> Tensor:
    """Put the channel sum of ``field * base`` where the maxima were: (K, N, 1, *out) to (K, N, 1, *in).

    For each offset in the window, which channels had their maximum there is the same for all classes.
    """
    kernel, stride, padding, dilation, _ = geometry
    rows, columns = (torch.arange(places.shape[2 + d], device=places.device) * stride[d] - padding[d] for d in (0, 1))
    shares = []
    for i, j in product(range(kernel[0]), range(kernel[1])):
        here = (rows[:, None] + i * dilation[0]) * size[1] + columns + j * dilation[1]
        shares.append((base * (places == here)).sum(1))
    products = field.squeeze(2).unsqueeze(2) * torch.stack(shares, 1)  # (K, N, offsets, *out)
    reach = tuple((places.shape[2 + d] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1))
    count, images = products.shape[:2]
    spread = functional.fold(products.flatten(3).flatten(0, 1), reach, kernel, dilation, 0, stride)
    ends = [(-padding[d], size[d] - reach[d] + padding[d]) for d in (1, 0)]
    spread = functional.pad(spread, [*ends[0], *ends[1]])
    return spread.reshape(count, images, 1, *size)
