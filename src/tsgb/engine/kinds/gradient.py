"""GRADIENT: an operator's own derivative, class by class; and rules from gradient to gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..supported import CoverageError
from ..tape import listed, replaced
from ..terms import Cotangent

if TYPE_CHECKING:
    from ..memory import Memory
    from ..tape import Node, Tape, Value

__all__ = [
    "Elementwise", "Formula", "Gradient", "Guided", "RelevanceRule", "replay", "schema_arguments", "vjp", "widened",
]  # fmt: skip


class RelevanceRule:
    """What an operator keeps of the forward, and what it gives its inputs of what arrives at its outputs.

    Attributes:
        name: in the coverage; None where the table does not know the operator.
        survives_relu: whether an output that is kept may be rectified where it lies.
    """

    name: str | None = "ordinary"
    survives_relu = False

    def run(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run the operator."""
        return node.op(*args, **kwargs)

    def paths(self, node: Node) -> list[Value]:
        """List the inputs to which anything is given."""
        return node.inputs

    def may_overwrite(self, node: Node, memory: Memory) -> bool:
        """Tell whether an in-place call may write at once, as nothing here or elsewhere needs what was there."""
        return False

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep what `backward` needs, and say what the outputs need; give another rule if this one does not fit."""
        raise NotImplementedError

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """From what arrives at each output to what each input is given."""
        raise NotImplementedError


def replay(rule: RelevanceRule, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule:
    """Record a node under another rule."""
    return rule.record(tape, node, tensors, output) or rule


def widened(x: Tensor) -> Tensor:
    """Give half precision as float32, all else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _constant(x: Tensor) -> Tensor:
    return widened(x.clone() if x.is_inference() else x)


def vjp(
    node: Node, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], is_checked: bool = True
) -> list[Tensor | None]:
    """Multiply gradients (K, *shape) at each output by the operator's derivative at each input.

    Args:
        is_checked: whether an operator without a derivative is refused; else it gives its inputs nothing.

    Raises:
        CoverageError: the operator has no derivative.
    """
    leaves: dict[Value, Tensor] = {}
    with torch.enable_grad():
        for value, x in zip(node.inputs, tensors, strict=True):
            if value not in leaves:
                leaves[value] = widened(x.detach()).requires_grad_(x.is_floating_point())
        outputs = listed(node.run(leaves.__getitem__, _constant))
    roots = [leaf for leaf in leaves.values() if leaf.requires_grad]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    if is_checked and roots and any(o.is_floating_point() and not o.requires_grad for o, _ in pairs):
        raise CoverageError(
            f"the map depends on `{node.name}`, which has no derivative, so no evidence can be followed through it: "
            "write it with operators that have one"
        )
    pairs = [(o, g) for o, g in pairs if o.requires_grad]
    if not pairs:
        return [None] * len(node.inputs)
    rows = [
        torch.autograd.grad(
            [o for o, _ in pairs], roots, [g[k].to(o.dtype) for o, g in pairs], retain_graph=True, allow_unused=True
        )
        for k in range(len(pairs[0][1]))
    ]
    columns = (None if r[0] is None else r[0][None] if len(r) == 1 else torch.stack(r) for r in zip(*rows, strict=True))
    by_value: dict[Value, Tensor | None] = {v: next(columns) if x.requires_grad else None for v, x in leaves.items()}
    return [by_value.pop(value, None) for value in node.inputs]  # the first place of a value has all of it


class Gradient(RelevanceRule):
    """The operator's own derivative."""

    def __init__(self, name: str | None = "ordinary") -> None:
        self.name = name

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep all inputs."""
        for value, x in zip(node.inputs, tensors, strict=True):
            tape.keep(value, x)
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Multiply what arrives by the operator's derivative."""
        return list(vjp(node, [tape.get(value) for value in node.inputs], arrived))  # type: ignore[arg-type]


class Elementwise(Gradient):
    """The derivative of what acts on each element by itself: one serves all classes."""

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Multiply the gradient of each class by one slope."""
        (grads,) = arrived
        assert isinstance(grads, Tensor)
        if len(node.inputs) > 1 or node.inputs[0].shape != grads.shape[1:]:
            return super().backward(tape, node, arrived)
        (slope,) = vjp(node, [tape.get(node.inputs[0])], [torch.ones_like(grads[:1])])
        return [None if slope is None else grads * slope]


class Guided(Elementwise):
    """Guided backprop: what arrives is rectified before the operator's own derivative."""

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Clamp what arrives at 0, and multiply it by the derivative."""
        return super().backward(tape, node, [g.clamp(min=0) if isinstance(g, Tensor) else g for g in arrived])


class Formula(Gradient):
    """A rule from gradient to gradient, ``rule(grad, x, ...) -> grad_x``, class by class.

    What else of its arguments depends on the image is held constant. A parameter ``o`` is given the output.

    Args:
        rule: takes the operator's other arguments by name, those that it has parameters for.
        key: of a caller's table, which tells how they are passed by position: as the torch function has them; or, for
            an operator, as its schema has them, with defaults filled in.
    """

    def __init__(self, rule: Callable[..., Tensor], name: str | None = None, key: Any = None) -> None:
        inner = getattr(rule, "func", rule)
        self.rule, self.key, self.name = rule, key, name or getattr(inner, "__name__", type(rule).__name__)
        self._names, self._takes_all = _parameters(rule)
        self._order = _parameters(key)[0] if inspect.isfunction(key) else []

    def record(self, tape: Tape, node: Node, tensors: Sequence[Tensor], output: Any) -> RelevanceRule | None:
        """Keep the inputs, and the output where the rule has a parameter ``o``."""
        if not node.args or node.args[0] is not node.inputs[0]:
            return replay(Gradient(None), tape, node, tensors, output)
        super().record(tape, node, tensors, output)
        if "o" in self._names:
            tape.keep(node.output, listed(output)[0])
        return None

    def backward(self, tape: Tape, node: Node, arrived: list[Cotangent | None]) -> list[Cotangent | None]:
        """Apply the rule to the gradient of each class."""
        grads, x = arrived[0], widened(tape.get(node.inputs[0]))
        assert isinstance(grads, Tensor)
        args, kwargs = self._arguments(tape, node)
        if "o" in self._names:
            kwargs["o"] = widened(tape.get(node.output))
        rows = [self._checked(node, self.rule(grad, x, *args, **kwargs), x) for grad in grads]
        return [torch.stack(rows), *[None] * (len(node.inputs) - 1)]

    def _arguments(self, tape: Tape, node: Node) -> tuple[list[Any], dict[str, Any]]:
        """Give what the rule takes after the gradient and the input."""
        args, named = (replaced(a, tape.get, _constant) for a in (node.args, node.kwargs))
        known = schema_arguments(node.op, args, named)
        rest = node.op._schema.arguments[1:]
        if self.key is None:
            return [], {a.name: known[a.name] for a in rest if self._takes_all or a.name in self._names}
        if self._order:
            known["training"] = known.get("training", known.get("train"))
            return [known[name] for name in self._order if name in known and name not in ("input", "self")], {}
        by_name = {a.name: known[a.name] for a in rest if a.kwarg_only}
        return [known[a.name] for a in rest if not a.kwarg_only], by_name

    def _checked(self, node: Node, given: Any, x: Tensor) -> Tensor:
        if isinstance(given, Tensor) and given.shape == x.shape:
            return given
        came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the rule {self.name!r} of {node.name} must return the gradient at its input, {tuple(x.shape)}, got {came}"
        )


def schema_arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give an operator's arguments by name, with defaults filled in."""
    arguments = op._schema.arguments
    known = {argument.name: argument.default_value for argument in arguments}
    known.update(zip([argument.name for argument in arguments], args, strict=False))
    return {**known, **kwargs}


def _parameters(function: Any) -> tuple[list[str], bool]:
    """Name a function's parameters, and tell whether it takes any other by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return [], False
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
