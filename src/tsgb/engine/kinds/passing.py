"""PASS: relevance passes unchanged, as through norms, activations with act(0) = 0, gates and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...rules.tables import ACTIVATIONS, GATES
from ..private import untraced
from ..tape import CHANNEL_SUM, GRADIENT, PER_CHANNEL, Value, listed
from ..terms import ChannelSum, Cotangent, Dense, dense
from .copying import Reshape, Same, channels_first
from .gradient import Elementwise, Gradient, RelevanceRule, replay, vjp, widened
from .sharing import Share

if TYPE_CHECKING:
    from ..memory import Memory
    from ..tape import Node, Tape

__all__ = ["Activation", "Gate", "Pass", "Product", "Shift", "comes_from"]

aten = torch.ops.aten


class Pass(RelevanceRule):
    """The signal is given all relevance; other operands are held constant.

    Args:
        signal: which of the operands that depend on the image it is.
    """

    def __init__(self, name: str, signal: int = 0) -> None:
        self.name, self.signal = name, signal

    def paths(self, node: Node) -> list[Value]:
        """List the signal alone."""
        return [node.inputs[self.signal]]

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Ask for what the signal needs, and keep the inputs where that is a gradient."""
        x, out = node.inputs[self.signal], node.output
        out.is_positive = self.is_positive(node)
        if out.shape == x.shape:
            out.needs, out.channel_dim = x.needs, x.channel_dim
        if x.needs == GRADIENT or out.shape != x.shape:
            for value, tensor in zip(node.inputs, tensors, strict=True):
                tape.keep(value, tensor)
        return None

    def is_positive(self, node: Node) -> bool:
        """Tell whether no element of the output is below 0."""
        return False

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give the signal all that arrives; `gradient` changes gradients."""
        given: list[Cotangent | None] = [None] * len(node.inputs)
        first = arrived[0]
        given[self.signal] = self.gradient(tape, node, first) if isinstance(first, Tensor) else first
        return given

    def gradient(self, tape: Tape, node: Node, grads: Tensor) -> Tensor:
        """Where a gradient is needed below: ``grad * o / x``, 0 where x is 0, summed where x is broadcast."""
        x = widened(tape.get(node.inputs[self.signal]))
        if grads.shape[1:] == x.shape:
            return grads * torch.where(x == 0, 0, self.slope(tape, node, x))
        relevance = grads * widened(listed(node.run(tape.get))[0])
        ones = (1,) * (relevance.dim() - 1 - x.dim())
        summed = relevance.sum_to_size(len(grads), *ones, *x.shape).reshape(len(grads), *x.shape)
        return torch.where(x == 0, 0, summed / torch.where(x == 0, 1, x))

    def slope(self, tape: Tape, node: Node, x: Tensor) -> Tensor:
        """``o / x`` where x is not 0, finite."""
        largest = torch.finfo(x.dtype).max
        output = widened(listed(node.run(tape.get))[0])
        return (output / torch.where(x == 0, 1, x)).clamp(-largest, largest)


class Shift(Pass):
    """A constant added or subtracted, a norm: relevance passes but where the input is 0 by itself."""

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Save where the signal is not 0, if it may be 0 by itself."""
        other = super().record(tape, node, tensors, output)
        x, out = node.inputs[self.signal], node.output
        is_shared = x.node is not None and isinstance(x.node.rule, Share)
        if out.needs != GRADIENT and x.may_be_zero is not False and not is_shared:
            zeros_of = x.may_be_zero if isinstance(x.may_be_zero, Tensor) else tensors[self.signal]
            node.saved, out.needs = channels_first(x, (zeros_of != 0)[None])[0], PER_CHANNEL
        return other

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Give the signal what arrives, but nothing where it is 0."""
        if node.saved is None:
            return super().backward(tape, node, arrived)
        given: list[Cotangent | None] = [None] * len(node.inputs)
        values = dense(arrived[0]) * node.saved  # type: ignore[arg-type]
        is_sum = node.inputs[self.signal].needs == CHANNEL_SUM
        given[self.signal] = [ChannelSum(values.sum(2, keepdim=True)) if is_sum else Dense(values)]
        return given


class Activation(Pass):
    """An elementwise function with act(0) = 0; others keep their own derivative."""

    def may_overwrite(self, node: Node, memory: Memory) -> bool:
        """Allow a write where relevance passes, and nothing needs the input but a sum that a ReLU may rectify."""
        x = node.inputs[0]
        if x.needs == GRADIENT or not _keeps_zero(node):
            return False
        # A sum that only a ReLU reads may be rectified where it is kept: nothing arrives where it becomes 0.
        is_sum = node.packet is aten.relu and x.readers == 1 and x.node is not None and x.node.rule.survives_relu
        return all(value is x and is_sum and x.keepers == 1 for value in memory.holders())

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep what any signal keeps; where act(0) is not 0, the operator has its own derivative."""
        if len(node.inputs) > 1 or not _keeps_zero(node):
            return replay(Elementwise(), tape, node, tensors, output)
        return super().record(tape, node, tensors, output)

    def is_positive(self, node: Node) -> bool:
        """Tell whether the function is a ReLU, or clips at 0 from below."""
        least = node.args[1] if node.packet in (aten.hardtanh, aten.clamp) and len(node.args) > 1 else None
        return node.packet in (aten.relu, aten.relu6) or least == 0

    def gradient(self, tape: Tape, node: Node, grads: Tensor) -> Tensor:
        """``grad * act(x) / x``, and act'(0) at 0."""
        x = widened(tape.get(node.inputs[0]))
        (at_zero,) = vjp(node, [torch.zeros_like(x)], [torch.ones_like(x)[None]])
        assert at_zero is not None
        return grads * torch.where(x == 0, at_zero[0], self.slope(tape, node, x))


class Gate(Pass):
    """A factor that the signal is multiplied by."""

    def __init__(self, name: str, signal: int, factor: Any) -> None:
        super().__init__(name, signal)
        self.factor = factor

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Note a constant factor, whose zeros are those of the output."""
        other = super().record(tape, node, tensors, output)
        if node.output.needs != GRADIENT and len(node.inputs) == 1 and node.inputs[0].may_be_zero is False:
            factor = self.factor
            node.output.may_be_zero = factor.expand(node.output.shape) if isinstance(factor, Tensor) else factor == 0
        return other

    def gradient(self, tape: Tape, node: Node, grads: Tensor) -> Tensor:
        """Multiply gradients by the factor, or divide them by it, summed where the signal is broadcast."""
        x = node.inputs[self.signal]
        place = 1 if node.args[0] is x else 0  # of the factor, which may be the signal itself
        factor = node.args[place]
        if isinstance(factor, (Value, Tensor)):
            factor = widened(tape.get(factor) if isinstance(factor, Value) else factor)
        given: Tensor = grads / factor if node.packet is aten.div else grads * factor
        ones = (1,) * (given.dim() - 1 - len(x.shape))
        return given.sum_to_size(len(grads), *ones, *x.shape).reshape(len(grads), *x.shape)


class Product(RelevanceRule):
    """A product or quotient: with a constant, of a signal and a gate, or of equals.

    Args:
        has_gates: whether one of two factors may be the gate of the other.
    """

    def __init__(self, has_gates: bool) -> None:
        self.has_gates = has_gates

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Choose the rule: constant factors and gates pass relevance, a product of equals keeps its own derivative."""
        if len(node.inputs) == 1:
            is_factor = node.args[0] is node.inputs[0] and node.inputs[0].needs != GRADIENT
            factor = node.args[1] if len(node.args) > 1 and node.packet is aten.mul else 1.0
            return replay(Gate("ordinary", 0, factor) if is_factor else Gradient(), tape, node, tensors, output)
        signal = None
        if self.has_gates and not tape.in_target and len(node.inputs) == 2:
            signal = 0 if node.packet is aten.div else signal_of(node.inputs[0], node.inputs[1], *tensors)
        rule = Gradient() if signal is None else Gate("gate", signal, 1.0)
        return replay(rule, tape, node, tensors, output)


def signal_of(a: Value, b: Value, at: Tensor, bt: Tensor) -> int | None:
    """Tell which of two factors is the signal; None for a product of equals.

    The gate is the factor that left a gating function, that is broadcast over the other, that was computed from the
    other, or, as in gated linear units, that left an activation where the other did not.
    """
    opened = [_packet(_origin(v)) in GATES for v in (a, b)]
    if opened[0] != opened[1]:
        return int(opened[0])
    sizes = [math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step != 0) for t in (at, bt)]
    if sizes[0] != sizes[1]:
        return int(sizes[0] < sizes[1])
    if comes_from(b, a):
        return 0
    if comes_from(a, b):
        return 1
    bent = [_packet(v) in ACTIVATIONS for v in (a, b)]
    return None if bent[0] == bent[1] else int(bent[0])


def comes_from(b: Value, a: Value) -> bool:
    """Tell whether b is a, or was computed from it."""
    a = _origin(a)
    ahead, seen = [_origin(b)], set()
    while ahead:
        value = ahead.pop()
        if value is a:
            return True
        if value not in seen and value.node is not None:
            seen.add(value)
            ahead.extend(value.node.inputs)
    return False


def _packet(value: Value) -> Any:
    return None if value.node is None else value.node.packet


def _origin(value: Value) -> Value:
    """Where a value was made that copies, views and constant factors only hand on."""
    while value.node is not None and len(value.node.inputs) == 1:
        if value.node.packet not in _FACTORS and not isinstance(value.node.rule, (Reshape, Same)):
            break
        value = value.node.inputs[0]
    return value


_FACTORS = (aten.mul, aten.div, aten.neg)


def _keeps_zero(node: Node) -> bool:
    """Tell whether act(0) = 0; a slope that is a tensor belongs to a ReLU."""
    rest = (*node.args[1:], *node.kwargs.values())
    if any(isinstance(a, (Tensor, Value)) for a in rest):
        return node.packet in (aten.prelu, aten._prelu_kernel)
    return _is_zero_at_zero(node.op, tuple(node.args[1:]), tuple(node.kwargs.items()))


@lru_cache(maxsize=512)
def _is_zero_at_zero(op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    with untraced():
        return not op(torch.zeros(1), *args, **dict(kwargs)).any()
