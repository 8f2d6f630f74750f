"""SHARE: TSGB-Conv. What arrives at a position is shared among all that it sees, in proportion to |x|."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...rules.formulas import EPS
from ..private import is_traced, untraced
from ..tape import CHANNEL_SUM, GRADIENT, PER_CHANNEL
from ..terms import ChannelSum, Cotangent, Dense, Factored, Thunk, channel_sum, dense, of_images
from ..windows import Windows
from .copying import channels_first
from .gradient import Gradient, RelevanceRule, replay, schema_arguments, widened

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..tape import Node, Tape, Value

__all__ = ["HiddenLayer", "Share", "times"]

aten = torch.ops.aten
_PIECE = 2**20  # elements of a tensor that is worked on in one piece, so that it stays in the cache


class HiddenLayer(Gradient):
    """Weights on a vector, or on a map of one position: their own derivative."""

    name = "linear"

    def __init__(self) -> None:
        super().__init__("linear")

    def paths(self, node: Node) -> list[Value]:
        """List the input alone, not weights that depend on the image."""
        return node.inputs[:1]

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep weights that depend on the image, and the input where it is needed."""
        for place, (value, x) in enumerate(zip(node.inputs, tensors, strict=True)):
            if place or node.packet is not aten.linear or value.needs != GRADIENT:
                tape.keep(value, x)
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Multiply what arrives by the weights, and give nothing to weights that depend on the image."""
        others: list[Cotangent | None] = [None] * (len(node.inputs) - 1)  # weights that depend on the image are held
        if node.packet is aten.linear and isinstance(arrived[0], Tensor):
            weight = node.args[1]
            return [times(arrived[0], widened(weight if isinstance(weight, Tensor) else tape.get(weight))), *others]
        return [super().backward(tape, node, arrived)[0], *others]


def times(grads: Tensor, weight: Tensor) -> Tensor:
    """``grads @ weight`` of gradients (K, ..., O); on a CPU, of many rows and large weights the other way round."""
    rows = grads.reshape(-1, grads.shape[-1])
    if len(rows) >= 16 and weight.numel() >= 2**24 and not rows.is_cuda:
        found = (weight.T @ rows.T).T.contiguous()
    else:
        found = rows @ weight
    return found.reshape(*grads.shape[:-1], -1)


class Share(RelevanceRule):
    """A convolution, a transposed convolution, or a linear layer on positions, which is a convolution of 1 x 1.

    Args:
        merges_groups: whether the channels of all groups are summed as one.
        checks_zeros: whether an output of 0, as of pruned weights, is to have no relevance.
    """

    def __init__(self, name: str, merges_groups: bool, checks_zeros: bool) -> None:
        self.name, self.merges_groups, self.checks_zeros = name, merges_groups, checks_zeros

    def paths(self, node: Node) -> list[Value]:
        """List the input alone, not weights that depend on the image."""
        return node.inputs[:1]

    def run(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run the operator; on a CPU, rearrange a small input rather than large weights."""
        x, weight = args[0], args[1]
        if node.packet is aten.conv2d and x.dim() == 4 and x.device.type == "cpu" and not x.is_contiguous():
            stride = _pairs(args[3] if len(args) > 3 else 1)
            values = len(x) * len(weight) * math.prod(n // s for n, s in zip(x.shape[2:], stride, strict=True))
            if values < weight.numel() and weight[0, 0].numel() > 1:  # they would be rearranged at each call
                return node.op(x.contiguous(), *args[1:], **kwargs).contiguous(memory_format=torch.channels_last)
        return node.op(*args, **kwargs)

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Save the windows and the channel sum of ``|x|``, and keep the input where its channels are needed."""
        x, out, t = node.inputs[0], node.output, tensors[0]
        weight, bias, groups, windows = _geometry(node)
        if node.args[0] is not x:
            return replay(Gradient(None), tape, node, tensors, output)
        is_linear = node.packet is aten.linear
        channel_dim = t.dim() - 1 if is_linear else 1
        size = t.shape[1:-1] if is_linear else t.shape[2:]
        if size.numel() == 1 or t.dim() < 3:
            out.channel_dim = min(channel_dim, out_dims := len(out.shape) - 1) or out_dims
            return replay(HiddenLayer(), tape, node, tensors, output)
        images = _images_beside(x, tape.images[0].shape[0], groups) if self.merges_groups else 1
        fields = images if self.merges_groups else groups
        # A group may see zeros alone where others do not: then its zero has a share, which a shift right after passes.
        is_merged = self.merges_groups and groups > images
        out.channel_dim, out.may_be_zero = channel_dim, not self.checks_zeros and is_merged and bias is None
        out.needs = CHANNEL_SUM if fields == 1 else PER_CHANNEL
        is_other = x.needs != GRADIENT and x.channel_dim != channel_dim
        nonzero_mask = None
        if self._may_be_zero(weight, bias, groups, is_merged=fields < groups):
            nonzero_mask, out.needs = channels_first(out, (output != 0)[None])[0], PER_CHANNEL
            out.may_be_zero = False
        total = None
        if fields == 1:
            dtype = torch.promote_types(t.dtype, torch.float32)
            total = (t if x.is_positive else t.abs()).sum(channel_dim, keepdim=True, dtype=dtype)
            total = total.movedim(channel_dim, 1)
        if fields > 1 or x.needs != CHANNEL_SUM:
            tape.keep(x, t)
        node.saved = windows, size, fields, total, nonzero_mask, bias is not None, groups == images, is_other
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Divide what arrives by the sum of each window, spread it over the window, and multiply it by ``|x|``."""
        x, others, (terms,) = node.inputs[0], [None] * (len(node.inputs) - 1), arrived
        windows: Windows | _TransposedWindows
        windows, size, fields, total, nonzero_mask, has_bias, is_whole, is_other = node.saved
        assert isinstance(terms, list)
        if nonzero_mask is not None:
            terms = [Dense(dense(terms) * nonzero_mask)]
        note = tape.recorder.record if tape.recorder is not None and is_whole and node in tape.recorder.nodes else None
        if fields > 1:
            return [self._by_group(tape, node, terms, note), *others]
        c, n = channel_sum(terms), windows.sums(total, EPS)
        if note is not None:
            note((c if has_bias else c * (n > EPS)).squeeze(2))

        def spread() -> Tensor:
            return windows.spread(c / n, size)

        if x.needs == CHANNEL_SUM and not is_other:
            if x.node is None:
                return [[Thunk(lambda: spread() * total)], *others]
            return [[Factored(spread(), None, total)], *others]
        field, t = spread(), widened(tape.get(x))
        channel_dim = t.dim() - 1 if node.packet is aten.linear else 1
        if x.needs == PER_CHANNEL and not is_other:
            base = t.movedim(channel_dim, 1)
            return [[Factored(field, base if x.is_positive else base.abs(), total)], *others]
        return [field.movedim(2, channel_dim + 1) * t.sign(), *others]

    def _may_be_zero(self, weight: Tensor, bias: Tensor | None, groups: int, is_merged: bool) -> bool:
        if not self.checks_zeros or is_traced() or not isinstance(weight, Tensor):
            return False
        with untraced():
            return (bias is None or _holds_zero(bias)) and (is_merged or _holds_zero(weight))

    def _by_group(
        self, tape: Tape, node: Node, terms: Sequence[Any], note: Callable[[Tensor], None] | None
    ) -> Cotangent:
        """Share the relevance of each group of channels by itself."""
        x = node.inputs[0]
        windows, size, fields, _, _, has_bias, *_ = node.saved
        t = widened(tape.get(x))
        sizes = t if x.is_positive else t.abs()
        if note is not None:
            is_seen = True if has_bias else windows.sums(_grouped(sizes, fields, 1), EPS) > EPS
            note((_grouped(dense(terms), fields, 2) * is_seen).squeeze(1))
        if x.needs == CHANNEL_SUM:
            step = len(t) if is_traced() else max(1, _PIECE // t[0].numel())
            pieces = []
            for start in range(0, len(t), step):
                rows = slice(start, start + step)
                seen = _grouped(sizes[rows], fields, 1)
                shares = _grouped(dense(of_images(terms, rows)), fields, 2) / windows.sums(seen, EPS)
                pieces.append((windows.spread(shares, size) * seen).sum(2, keepdim=True))
            return [ChannelSum(torch.cat(pieces, 1))]
        shares = _grouped(dense(terms), fields, 2) / windows.sums(_grouped(sizes, fields, 1), EPS)
        field = windows.spread(shares, size)
        factor = sizes if x.needs == PER_CHANNEL else t.sign()
        values = (field.unsqueeze(3) * factor.reshape(len(factor), fields, -1, *size)).flatten(2, 3)
        return [Dense(values)] if x.needs == PER_CHANNEL else values


class _TransposedWindows:
    """What each position of the output comes from, for a transposed convolution: the windows' transpose."""

    def __init__(self, windows: Windows, size: Sequence[int]) -> None:
        self._windows, self._size = windows, size

    def sums(self, x: Tensor, plus: float = 0.0) -> Tensor:
        """Sum what each position of the output comes from."""
        return self._windows.spread(x, self._size) + plus

    def spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Give each position of the output's value to all that it comes from."""
        flat = x.reshape(-1, *x.shape[-1 - len(size) :])
        return self._windows.sums(flat).reshape(*x.shape[: -len(size)], *size)


def _geometry(node: Node) -> tuple[Any, Any, int, Any]:
    """Read weight, bias, number of groups and windows of a convolution or linear layer."""
    given = schema_arguments(node.op, node.args, node.kwargs)
    weight, bias = given["weight"], given["bias"]
    if node.packet is aten.linear:
        dims = len(node.inputs[0].shape) - 2
        return weight, bias, 1, Windows.of((1,) * dims, 1, 0, 1)
    windows = Windows.of(weight.shape[2:], given["stride"], given["padding"], given["dilation"])
    if "output_padding" in given:
        size = node.outputs[0].shape[2:] if node.outputs and node.outputs[0] is not None else ()
        return weight, bias, given["groups"], _TransposedWindows(windows, size)
    return weight, bias, given["groups"], windows


def _images_beside(x: Value, count: int, groups: int) -> int:
    """Count the images that stand side by side in the channels, as where weights depend on the image; else 1."""
    if x.shape[0] != 1 or count == 1 or groups % count:
        return 1
    while x.node is not None:
        if x.node.is_weighted and isinstance(x.node.rule, Share):
            return count if x.node.saved is not None and x.node.saved[2] == count else 1
        if x.node.inputs[0].shape[0] == count and x.shape[0] == 1:
            return count
        if len(x.node.rule.paths(x.node)) != 1:
            return 1
        x = x.node.rule.paths(x.node)[0]
    return 1


def _pairs(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _holds_zero(weight: Tensor) -> bool:
    return weight.numel() > 0 and not bool(weight.abs().amin())


def _grouped(x: Tensor, fields: int, dim: int) -> Tensor:
    """Sum the channels of each field along a dimension."""
    return x if x.shape[dim] == fields else x.reshape(*x.shape[:dim], fields, -1, *x.shape[dim + 1 :]).sum(dim + 1)
