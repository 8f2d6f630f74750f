"""The head: the first operators with weights on the way from the target to the image, and their rule, TSGB-FC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .kinds import HiddenLayer
from .kinds.gradient import schema_arguments, vjp, widened
from .kinds.sharing import times
from .private import is_traced
from .supported import CoverageError
from .tape import GRADIENT, Node, Tape, Value, replaced

__all__ = ["Head", "below"]

aten = torch.ops.aten


def below(start: Sequence[Value], stop: Callable[[Value], bool] = lambda value: False) -> Iterator[Value]:
    """Walk from values towards the images, along what is given anything, not past values where ``stop`` holds."""
    ahead, seen = list(start), set(start)
    while ahead:
        value = ahead.pop()
        yield value
        if value.node is not None and not stop(value):
            for x in value.node.rule.paths(value.node):
                if x not in seen:
                    seen.add(x)
                    ahead.append(x)


class Head:
    """Where the number f counts; what lies above keeps its own derivative.

    Args:
        tape: of the forward. ``target``: the value of the logits, or of what was computed from them.
        rules: of operators with weights where they are the head; None for their own derivative.
        f: the number, or what tells it from whether the network has hidden layers; None where there is none.

    Attributes:
        nodes: the heads.
        above: the operators between them and the target.
        f: the number, or None.
        arrived: of each head in the last backward, per class and image, whether any gradient arrived.

    Raises:
        CoverageError: no head was found, or an operator unknown to the table may hide it.
    """

    def __init__(
        self, tape: Tape, target: Value, rules: dict[Any, Any], f: float | Callable[[bool], float] | None
    ) -> None:
        self.target, self._rules = target, rules
        self.nodes: list[Node] = []
        self.above: list[Node] = []
        self.arrived: list[Tensor] = []
        ahead, seen = [target], {target}
        while ahead:
            node = ahead.pop().node
            if node is None or node in self.above or node in self.nodes:
                continue
            if self._is_head(node):
                self.nodes.append(node)
                continue
            if node.rule.name is None and _has_weights(node):
                raise CoverageError(
                    f"the target comes from `{node.name}`, an operator with weights for which the rules have no entry, "
                    "so the head cannot be told: write the head as a linear layer or a convolution"
                )
            self.above.append(node)
            for value in node.inputs:
                if value not in seen:
                    seen.add(value)
                    ahead.append(value)
        if not self.nodes:
            names = ", ".join(sorted({node.name for node in tape.nodes})) or "nothing"
            raise CoverageError(
                "no head was found: between the image and the target there is no linear layer and no convolution that "
                f"the rules know (seen: {names})"
            )
        for node in (*self.nodes, *self.above):
            for out in node.outputs:
                if out is not None:
                    out.needs = GRADIENT
        self.inputs = [value for node in self.nodes for value in node.inputs[:1]]
        self.weighted_below = [v.node for v in below(self.inputs, _is_weighted) if _is_weighted(v)]
        hidden = any(isinstance(node.rule, HiddenLayer) for node in self.weighted_below if node is not None)
        self.f = f(hidden) if callable(f) else f

    def _is_head(self, node: Node) -> bool:
        if not node.is_weighted:
            return False
        if "transpose" in node.name:  # with as many channels before as after it only enlarges what is below
            given = schema_arguments(node.op, node.args, node.kwargs)
            keeps_channels = given["weight"].shape[0] == given["weight"].shape[1] * given["groups"]
            return not (keeps_channels and self._follows_weights(node.inputs[0]))
        return True

    @staticmethod
    def _follows_weights(x: Value) -> bool:
        """Tell whether nothing nonlinear lies between a value and the next weights below."""
        from ..rules.tables import ACTIVATIONS

        values = [v for v in below([x], _is_weighted) if v.node is not None]
        return all(_is_weighted(v) or v.node.packet not in ACTIVATIONS for v in values if v.node is not None)

    def backward(self, tape: Tape, node: Node, grads: Tensor, classes: int, rows: Tensor | None) -> Tensor:
        """Give the gradient (K, *shape) at the head's input.

        Args:
            grads: (K, *shape) at its output. ``classes``: how many rows are of requested classes.
            rows: (K, N), the class that each row of gradients is one-hot for, where that is known.
        """
        count, x = tape.images[0].shape[0], widened(tape.get(node.inputs[0]))
        is_linear = node.packet is aten.linear
        is_sequence_first = is_linear and x.dim() == 3 and len(x) != count == x.shape[1]
        by_image = grads.transpose(1, 2) if is_sequence_first else grads
        flags = by_image[:classes].flatten(min(2, grads.dim() - 1)).any(-1, keepdim=grads.dim() == 2)
        self.arrived.append(flags)
        rule, held = self._rules.get(node.packet), replaced([node.args, node.kwargs], tape.get, None)
        if rule is None:
            if not is_linear:
                given = vjp(node, [x, *map(tape.get, node.inputs[1:])], [grads])[0]
                assert given is not None
                return given
            weight = widened(held[0][1])
            if rows is not None and node.output is self.target and grads.dim() == 3:  # rows of the weights
                rest = [times(grads[len(rows) :], weight)] if len(rows) < len(grads) else []
                return torch.cat([weight[rows], *rest])
            return times(grads, weight)
        given_args = schema_arguments(node.op, *held)
        names = [a.name for a in node.op._schema.arguments[1:]]
        args = [widened(a) if isinstance(a, Tensor) else a for a in (given_args[name] for name in names)]
        grads, features = by_image, x.transpose(0, 1) if is_sequence_first else x
        if x.dim() == 1:
            grads, features = grads[:, None], features[None]
        if is_linear or "transpose" not in node.name:
            grads, args = _restricted(grads, args, is_linear, classes * count if node.output is self.target else None)
        f = float(self.f or 0)
        if features.dim() == 2:
            flat: Tensor = rule(grads.flatten(0, 1), features.repeat(len(grads), 1), *args, f=f)
            found = flat.reshape(len(grads), *features.shape)
        else:
            found = torch.stack([rule(grad, features, *args, f=f) for grad in grads])
        return found.transpose(1, 2) if is_sequence_first else found[:, 0] if x.dim() == 1 else found

    def arrivals(self, classes: int, count: int) -> Tensor:
        """Tell for each class and image (K, N) whether any gradient arrived in the last backward."""
        found, self.arrived = [flags.to(self.arrived[0].device) for flags in self.arrived], []
        if len(found) == count and all(flags.shape == (classes, 1) for flags in found):  # heads of one image each
            return torch.cat(found, 1)
        if not found or any(flags.shape != (classes, count) for flags in found):
            return torch.full((classes, count), bool(found))
        return torch.stack(found).any(0)


def check_positions(tape: Tape) -> None:
    """Refuse a model that the rules cannot reach below its head.

    Raises:
        CoverageError: no operator with weights acts on the positions of a map.
    """
    weighted = [node for node in tape.nodes if node.is_weighted and node.packet is not aten.linear]
    if any(not isinstance(node.rule, HiddenLayer) for node in weighted):
        return
    names = ", ".join(sorted({node.name for node in tape.nodes}))
    raise CoverageError(
        "the model has no convolution that the rules know: TSGB explains convolutional networks, and a plain gradient "
        f"is not passed off as its map (operators seen: {names})"
    )


def coverage(tape: Tape, target: Value, head: Head) -> list[tuple[str, str | None, int]]:
    """List which operator met which rule how often; None for an operator that the table does not know."""
    reached = {value.node for value in _all_below(target)}
    rows: Counter[tuple[str, str | None]] = Counter()
    above = set(head.above)
    for node in tape.nodes:
        if not any(value is not None and value.dtype.is_floating_point for value in node.outputs):
            continue
        rule: str | None = "ordinary" if node in above else node.rule.name
        if node in head.nodes:
            formula = head._rules.get(node.packet)
            rule = "gradient_head" if formula is None else getattr(formula, "func", formula).__name__
        if rule is not None or node in reached:
            rows[node.name, rule] += 1
    return sorted(((name, rule, n) for (name, rule), n in rows.items()), key=lambda row: (row[0], row[1] or ""))


def _all_below(target: Value) -> set[Value]:
    ahead, seen = [target], {target}
    while ahead:
        node = ahead.pop().node
        for value in node.inputs if node is not None else ():
            if value not in seen:
                seen.add(value)
                ahead.append(value)
    return seen


def _is_weighted(value: Value) -> bool:
    return value.node is not None and value.node.is_weighted


def _has_weights(node: Node) -> bool:
    tensors = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Tensor)]
    return any(t.is_floating_point() and t.dim() > 0 for t in tensors)


def _restricted(grads: Tensor, args: list[Any], is_linear: bool, at_most: int | None) -> tuple[Tensor, list[Any]]:
    """Leave out the classes for which no gradient arrives: their weights play no part."""
    weight = args[0]
    if not is_linear and args[-1] != 1:  # groups
        return grads, args
    dim = grads.dim() - 1 if is_linear else 2
    by_class = grads.movedim(dim, 0).flatten(1)
    if is_traced():
        if at_most is None or at_most >= len(weight):
            return grads, args
        used = by_class.abs().amax(1).topk(at_most).indices
    else:
        used = by_class.any(1).nonzero()[:, 0]
    if len(used) in (0, len(weight)) or len(weight) != len(by_class):
        return grads, args
    return grads.index_select(dim, used), [weight[used], None, *args[2:]]
