"""Which rule a call meets: by its role among its operands, else by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .. import rules
from . import graph, operators
from .operators import Call, mapped
from .ruling import SLOT, Ruling, form

__all__ = ["Meeting"]


class Meeting:
    """A table of rules, by the names of operators.

    Args:
        table: torch functions and roles to rules, see `tsgb.rules`.

    Attributes:
        known: names of the operators that have an entry.
        openers: names of those that a gate comes from.
        is_reading: whether a map is made of what the convolutions share.
    """

    def __init__(self, table: rules.Table) -> None:
        self._rules, self._head_rules, self._constant, self._products = (
            {operators.name(key): (key, rule) for key, rule in part.items() if callable(key)}
            for part in (table, *(table.get(role, {}) for role in (rules.HEAD, rules.CONSTANT, rules.GATE)))
        )
        self.known = self._rules.keys()
        self.openers = {operators.name(function) for function in rules.GATES}
        self._bending = {operators.name(function) for function in rules.ACTIVATIONS}
        self.is_reading = rules.RIVALS in table or rules.MAP in table

    def meet(self, call: Call, depending: int, count: int, in_target: bool) -> tuple[Ruling, Call] | None:
        """Find the rule that a call meets, if any.

        Args:
            call: of which operands that depend on the image require grad, ``depending`` in number.
            count: of images. ``in_target``: whether a callable target makes the call, whose products have no gate.

        Returns:
            The ruling, and the call, of which the first operand alone depends on the image; what else did is held
            constant.
        """
        signals = [t for t in call.args[:2] if isinstance(t, Tensor) and t.requires_grad]
        if len(signals) == 1 and call.name in self._constant and signals[0] is call.args[0]:
            if graph.is_linear(signals[0].grad_fn):
                return None  # the bias of a linear layer, in another spelling
            return _ruling(call, *self._constant[call.name]), call
        if len(signals) == 2 == len(call.args) and not in_target:
            held, table = None, self._products
            if call.name in self._products:
                held = graph.gate(signals[0], signals[1], self._bending) if call.name != "div" else signals[1]
            elif call.name == "sub" and "sub" in self._constant and graph.is_centre(*signals):
                held, table = signals[1], self._constant
            if held is not None:
                signal = signals[0] if held is signals[1] else signals[1]
                call = replace(call, args=(signal, held.detach()))
                return _ruling(call, *table[call.name]), call
        function, rule = self._rules.get(call.name, (None, None))
        if function is None or not callable(rule) or not signals or signals[0] is not call.args[0]:
            return None
        if depending > 1:
            call = replace(call, args=(signals[0], *mapped(_held, call.args[1:])), kwargs=mapped(_held, call.kwargs))
        if call.name not in self._head_rules:
            return _ruling(call, function, rule), call
        if function in rules.TRANSPOSED:
            is_head = not (operators.keeps_channels(call) and graph.follows_weights(signals[0], self._bending))
            return _ruling(call, function, rule, head_rule=self._head_rules[call.name][1] if is_head else None), call
        return self._weighted(call, function, rule, count), call

    def ordinary(self, call: Call) -> Ruling | None:
        """A ruling for a call that keeps its own gradient on purpose; None for others."""
        function, rule = self._rules.get(call.name, (None, None))
        return _ruling(call, function, rule) if rule == rules.ORDINARY and call.args else None

    def _weighted(self, call: Call, function: Callable[..., Tensor], rule: Callable[..., Tensor], count: int) -> Ruling:
        """A ruling for a linear layer or a convolution."""
        x: Tensor = call.args[0]
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
        on_vector, is_linear = operators.on_vector(x, weight), weight.dim() == 2
        groups, parts = 1 if is_linear else x.shape[1] // weight.shape[1], 1
        if form(rule) is rules.conv_lumped and len(x) == 1 < count and groups % count == 0:
            parts = count if graph.is_beside(x.grad_fn, count) else 1
        if parts > 1:
            rule = partial(rule, parts=parts)
        is_lumped = not on_vector and groups > parts and form(rule) is rules.conv_lumped
        return _ruling(
            call,
            function,
            rule,
            head_rule=self._head_rules[call.name][1],
            on_vector=on_vector,
            is_linear=is_linear,
            is_whole=self.is_reading and groups == parts and not on_vector,
            parts=parts,
            carries=is_lumped and bias is None and bool(self._constant),
        )


def _ruling(call: Call, function: Callable[..., Tensor] | None, rule: Any, **roles: Any) -> Ruling:
    assert function is not None
    others: list[Tensor] = []

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            others.append(tensor)
        return SLOT

    args, kwargs = mapped(taken, call.args[1:]), mapped(taken, call.kwargs) if call.kwargs else call.kwargs
    return Ruling(call.name, args, kwargs, function, rule, others=others, **roles)


def _held(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
