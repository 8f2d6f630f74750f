"""SUM: each operand of a sum is given its share of the relevance, R a / o; so is each element of an average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..private import is_traced
from ..tape import CHANNEL_SUM, GRADIENT, PER_CHANNEL
from ..terms import ChannelSum, Cotangent, Dense, Factored, Term, channel_sum, dense, of_images
from .copying import channels_first, channels_in_place
from .gradient import Elementwise, Gradient, RelevanceRule, replay, vjp, widened
from .passing import Shift, comes_from

if TYPE_CHECKING:
    from ..memory import Memory
    from ..tape import Node, Tape

__all__ = ["Average", "Mean", "Sum"]

aten = torch.ops.aten
TINY = 1e-30  # makes 0 / 0 a zero, and changes no other number
_PIECE = 2**20  # elements of a tensor that is worked on in one piece, so that it stays in the cache


class Sum(RelevanceRule):
    """A sum or difference: of two branches, or with a constant.

    Args:
        has_shifts: whether a constant passes relevance, see `passing.Shift`; else it keeps its own derivative.
    """

    survives_relu = True

    def __init__(self, has_shifts: bool) -> None:
        self.has_shifts = has_shifts

    def may_overwrite(self, node: Node, memory: Memory) -> bool:
        """Allow a write on the first branch where nothing else needs what lies there."""
        return self._is_of_branches(node) and not memory.holders()

    @staticmethod
    def _is_of_branches(node: Node) -> bool:
        if len(node.inputs) != 2 or node.packet is not aten.add or node.kwargs or len(node.args) != 2:
            return False
        a, b = node.inputs
        is_alike = a.shape == b.shape and a.dtype == b.dtype and a.channel_dim == b.channel_dim
        return a is not b and is_alike and GRADIENT not in (a.needs, b.needs)

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep the second branch and the sum; choose another rule for a sum with a constant."""
        if self._is_of_branches(node):
            (a, b), out = node.inputs, node.output
            out.needs, out.channel_dim = PER_CHANNEL, a.channel_dim
            tape.keep(b, tensors[1])
            tape.keep(out, output)
            return None
        x = node.inputs[0]
        rule: RelevanceRule = Gradient()
        if len(node.inputs) == 1:
            is_bias = x.node is not None and x.node.is_weighted and x.node.packet is aten.linear and x.positions == 1
            passes = self.has_shifts and not is_bias and not tape.in_target
            rule = Shift("shift") if passes else Elementwise()
        elif self.has_shifts and node.packet is aten.sub and _is_centre(*node.inputs):
            rule = Shift("shift")
        return replay(rule, tape, node, tensors, output)

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Split what arrives into the shares of both branches."""
        (a, b), (terms,), out = node.inputs, arrived, node.output
        assert isinstance(terms, list)
        operand, o = (channels_first(v, widened(tape.get(v))[None])[0] for v in (b, out))
        needs_sum = a.needs == CHANNEL_SUM, b.needs == CHANNEL_SUM
        count = _classes(terms)
        if count == 1 and not is_traced():
            return list(_shares_of_one(terms, operand, o, needs_sum))
        share = operand / (o + TINY)
        factored = [t for t in terms if isinstance(t, Factored)]
        if count == 1 or len(factored) > count:
            factored = []  # then the classes' own channels are less work than the terms'
        given: tuple[list[Term], list[Term]] = [], []
        for term in factored:
            for terms_of, half in zip(given, _halves(term, share, needs_sum), strict=True):
                terms_of.append(half)
        rest = [t for t in terms if not any(t is known for known in factored)]
        if rest:
            values = dense(rest)
            mine = values * share
            for terms_of, part, is_sum in zip(given, (values - mine, mine), needs_sum, strict=True):
                terms_of.append(ChannelSum(part.sum(2, keepdim=True)) if is_sum else Dense(part))
        return list(given)


def _is_centre(a: Any, b: Any) -> bool:
    """Tell whether b, subtracted from a, is its mean, as a norm that is spelled out takes away."""
    return len(a.shape) == len(b.shape) and b.shape.numel() < a.shape.numel() and comes_from(b, a)


def _classes(terms: Sequence[Term]) -> int:
    first = terms[0]
    return len(first.factor if isinstance(first, Factored) else first.values)  # type: ignore[union-attr]


def _halves(term: Factored, share: Tensor, needs_sum: tuple[bool, bool]) -> list[Term]:
    """What the two operands are given of a factored term, where the second has a share of it."""
    assert term.base is not None
    mine = term.base * share
    if term.total is None:
        both = Factored(term.factor, term.base - mine, None), Factored(term.factor, mine, None)
        return [ChannelSum(channel_sum([t])) if is_sum else t for t, is_sum in zip(both, needs_sum, strict=True)]
    total = mine.sum(1, keepdim=True)
    return [
        Factored(term.factor, None if needs_sum[0] else term.base - mine, term.total - total),
        Factored(term.factor, None if needs_sum[1] else mine, total),
    ]


def _shares_of_one(
    terms: Sequence[Term], b: Tensor, o: Tensor, needs_sum: tuple[bool, bool]
) -> tuple[list[Term], list[Term]]:
    """The shares for one class, in pieces that stay in the cache."""
    whole = [None if is_sum else torch.empty_like(o) for is_sum in needs_sum]
    sums: tuple[list[Tensor], list[Tensor]] = [], []
    step = max(1, _PIECE // o[0].numel())
    for start in range(0, len(o), step):
        rows = slice(start, start + step)
        values = dense(of_images(terms, rows))[0]
        share = o[rows] + TINY
        mine = torch.div(b[rows], share, out=share).mul_(values)
        for place, tensor in enumerate(whole):
            if tensor is not None:
                tensor[rows] = mine if place else torch.sub(values, mine)
            elif place:
                sums[place].append(mine.sum(1, keepdim=True))
            else:
                sums[place].append(values.sum(1, keepdim=True) - mine.sum(1, keepdim=True))
    given = [
        [ChannelSum(torch.cat(pieces)[None]) if tensor is None else Dense(tensor[None])]
        for tensor, pieces in zip(whole, sums, strict=True)
    ]
    return given[0], given[1]  # type: ignore[return-value]


class Average(Gradient):
    """Linear without a constant, as pooling and resizing are: of the relevance each element is given its share.

    ::

        R_x = x * op^T(R / o)
    """

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep the input."""
        x, out = node.inputs[0], node.output
        if x.needs == GRADIENT or len(node.inputs) > 1 or len(out.shape) != len(x.shape) or len(x.shape) < 3:
            return replay(Gradient(), tape, node, tensors, output)
        out.needs, out.channel_dim, out.is_positive = PER_CHANNEL, x.channel_dim, x.is_positive
        tape.keep(x, tensors[0])
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give each element its share of the relevance, ``x * op^T(R / o)``."""
        (x,), (terms,), out = node.inputs, arrived, node.output
        assert isinstance(terms, list)
        t = widened(tape.get(x))
        o = channels_first(out, node.op(t, *node.args[1:], **node.kwargs)[None])
        (grads,) = vjp(node, [t], [channels_in_place(out, dense(terms) / (o + TINY))])
        assert grads is not None
        values = channels_first(x, grads * t)
        return [[ChannelSum(values.sum(2, keepdim=True)) if x.needs == CHANNEL_SUM else Dense(values)]]


class Mean(Average):
    """The mean over all positions: its gradient weighs each channel, ``R = grad / positions * x``."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep the input; a mean over some of the positions is an average."""
        x, out, count = node.inputs[0], node.output, len(node.inputs[0].shape)
        if node.packet is aten.mean:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            is_whole = sorted(d % count for d in dims or ()) == [*range(2, count)]
        else:
            is_whole = out.shape[2:].numel() == 1
        if x.needs == GRADIENT or x.channel_dim != 1 or count < 3 or not is_whole:
            return super().record(tape, node, tensors, output)
        tape.keep(x, tensors[0])
        return _GlobalMean()


class _GlobalMean(RelevanceRule):
    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        (x,), (grads,) = node.inputs, arrived
        assert isinstance(grads, Tensor)
        t = widened(tape.get(x))
        weights = grads.reshape(*grads.shape[:3], *(1,) * (t.dim() - 2)) / t[0, 0].numel()
        return [[Factored(weights, t, None)]]
