"""The mechanism: apply a table of rules to any model during one forward and one backward, without touching the model.

A `Backprop` sees every torch call that the model makes in its thread. Where the table has a rule the operator runs as
one autograd function whose backward is the rule; all else runs as it is. The graph that autograd builds then *is* the
method: its gradient at the image is TSGB's. No operator is named here; the table names them, `operators` reads their
spellings.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from . import operators, rules
from .operators import Call
from .saved import Kept

__all__ = ["Backprop", "CoverageError", "recording"]

_SLOT = torch.empty(0)
_NAME, _OPEN, _WEIGHTED = "tsgb.name", "tsgb.gate", "tsgb.weighted"  # keys of autograd nodes' metadata


class CoverageError(RuntimeError):
    """The rules do not cover the model, so that its map would not be TSGB's."""


@dataclass
class _Ruling:
    """An operator that met a rule.

    It lives on the operator's node, so it holds no tensors: through one that an in-place call changed, the node would
    keep itself alive. The tensors of the call's arguments are what autograd saves; `_SLOT` stands in their places.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Tensor]
    rule: Callable[..., Tensor]
    head_rule: Callable[..., Tensor] | None = None  # for operators that carry weights: the rule where they are the head
    on_vector: bool = False
    is_linear: bool = False
    is_ordinary: bool = False  # set above the head, where the target's own derivative is what counts
    f: float | None = None  # set on the heads, with the number of images
    count: int = 0
    arrived: Tensor | None = None  # of a head: per image, whether any gradient arrived in this backward

    def backward(self, grad: Tensor, x: Tensor, o: Tensor | None, others: Sequence[Tensor]) -> Tensor:
        """Apply the rule in float32 at least, and hand on what the type of x can hold.

        ``o`` is the output where the rule asks for it, ``others`` are the tensors among the call's other arguments.
        """
        tensors = iter(others)
        args, kwargs = _map(lambda _: _single(next(tensors)), (self.args, self.kwargs))
        with torch.autocast(x.device.type, enabled=False):
            if self.is_ordinary:
                with torch.enable_grad():
                    leaf = _single(x).detach().requires_grad_()
                    (grad_x,) = torch.autograd.grad(self.function(leaf, *args, **kwargs), leaf, _single(grad))
            elif self.f is None:
                output = {} if o is None else {"o": _single(o)}
                grad_x = self.rule(_single(grad), _single(x), *args, **output, **kwargs)
            else:
                assert self.head_rule is not None
                # Features (T, N, C) of a sequence-first network: a head's sums are over the positions of one image.
                swapped = self.is_linear and x.dim() == 3 and len(x) != self.count == x.shape[1]
                grad, features = (grad.transpose(0, 1), x.transpose(0, 1)) if swapped else (grad, x)
                self.arrived = grad.reshape(len(grad), -1).any(1)
                grad_x = self.head_rule(_single(grad), _single(features), *args, f=self.f, **kwargs)
                grad_x = grad_x.transpose(0, 1) if swapped else grad_x
        if grad_x.dtype != x.dtype:
            largest = torch.finfo(x.dtype).max
            grad_x = grad_x.clamp(-largest, largest).to(x.dtype)
        return grad_x


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ruling: _Ruling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        o = ruling.function(x, *args, **kwargs)
        ctx.ruling = ruling
        ctx.save_for_backward(x, o if _wants_output(ruling.rule) else None, *operators.tensors((args, kwargs)))
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, o, *others = ctx.saved_tensors
        return ctx.ruling.backward(grads[0], x, o, others), None, None, None


def _wants_output(rule: Callable[..., Any]) -> bool:
    return "o" in inspect.signature(rule).parameters


class Backprop(TorchFunctionMode):
    """One forward of a model under a table of rules; enter it through `recording`.

    The image must be no leaf of the graph (a clone of one): leaves that require grad are taken for the model's weights.

    Args:
        table: torch functions and roles to rules, see `tsgb.rules`.
        f: the number f of the head's rule; None takes the table's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).eval()
        >>> x = torch.rand(1, 3, 8, 8, requires_grad=True).clone()
        >>> with recording(rules.PAPER) as run:
        ...     logits = model(x)
        >>> run.find_heads(logits, 1)
        >>> run.coverage()
        [('conv2d', 'conv_lumped', 1), ('flatten', 'ordinary', 1), ('linear', 'linear_head', 1)]
    """

    def __init__(self, table: rules.Table, f: float | None = None) -> None:
        super().__init__()
        self._rules, self._heads, self._constant, self._products = (
            {operators.name(key): (key, rule) for key, rule in part.items() if callable(key)}
            for part in (table, *(table.get(role, {}) for role in (rules.HEAD, rules.CONSTANT, rules.GATE)))
        )
        self._openers = {operators.name(function) for function in rules.GATES}
        self._f = table[rules.F] if f is None else f
        self._met: list[_Ruling] = []
        self._unruled: Counter[tuple[str, str | None]] = Counter()
        self._unseen: Counter[str] = Counter()
        self.has_shifts = False  # whether a constant was added to what comes from the image
        self.heads: list[_Ruling] = []
        self.above: list[str] = []  # names of the operators between the head and the target
        self.f: float | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _map(_constant, args), _map(_constant, kwargs or {})
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in operators.tensors((args, kwargs))):
            return func(*args, **kwargs)
        call = operators.read(func, args, kwargs)
        met = self._meet(call)
        if met is None:
            return self._note(call, _separate(args, func(*args, **kwargs)))
        ruling, call = met
        self._met.append(ruling)
        o = _Ruled.apply(call.args[0], ruling, call.args[1:], call.kwargs)  # type: ignore[no-untyped-call]
        return o if call.inplace is None else call.inplace.copy_(o)

    def _meet(self, call: Call) -> tuple[_Ruling, Call] | None:
        """Find the rule that a call meets, if any: by its role among its operands, else by its name.

        Of the call that comes back the first operand alone depends on the image; what else did is held constant.
        """
        signals = [t for t in call.args[:2] if isinstance(t, Tensor) and t.requires_grad]
        if len(signals) == 1 and call.name in self._constant and signals[0] is call.args[0]:
            if _is_linear(signals[0].grad_fn):
                return None  # the bias of a linear layer, in another spelling
            function, rule = self._constant[call.name]
            self.has_shifts = True
            return _ruling(call, function, rule), call
        if len(signals) == 2 and call.name in self._products and len(call.args) == 2:
            gate = _gate(*signals) if call.name != "div" else signals[1]
            if gate is not None:
                signal = signals[0] if gate is signals[1] else signals[1]
                function, rule = self._products[call.name]
                call = replace(call, args=(signal, gate.detach()))
                return _ruling(call, function, rule), call
        function, rule = self._rules.get(call.name, (None, None))
        if function is None or not callable(rule) or not signals or signals[0] is not call.args[0]:
            return None
        call = replace(call, args=(signals[0], *_map(_held, call.args[1:])), kwargs=_map(_held, call.kwargs))
        if call.name not in self._heads:
            return _ruling(call, function, rule), call
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        roles = {"on_vector": operators.on_vector(signals[0], weight), "is_linear": weight.dim() == 2}
        return _ruling(call, function, rule, head_rule=self._heads[call.name][1], **roles), call

    def _note(self, call: Call, output: Any) -> Any:
        """Remember an operator that met no rule, on the nodes of what it returned and in the coverage."""
        nodes = [t.grad_fn for t in operators.tensors(output) if t.requires_grad and t.grad_fn is not None]
        known = call.name in self._rules
        if nodes or call.inplace is not None:
            self._unruled[call.name, rules.ORDINARY if known else None] += 1
        for node in nodes:
            notes = _notes(node)
            notes[_NAME] = call.name
            notes[_OPEN] = call.name in self._openers
            notes[_WEIGHTED] = not known and any(
                not t.requires_grad and t.is_floating_point() and t.dim() > 0
                for t in operators.tensors((call.args, call.kwargs))
            )
        return output

    def find_heads(self, target: Tensor, count: int) -> None:
        """Walk from the target's node to the first operators that carry weights: they are the head.

        Args:
            target: the logits, or what was computed from them, for ``count`` images.

        Raises:
            CoverageError: no head was found, or an operator unknown to the table may hide it.
        """
        self.heads, self.above, nodes = [], [], []
        self._unseen = Counter(node.name() for node in _walk(target.grad_fn) if _is_unseen(node))
        for node in _walk(target.grad_fn, stop=_weighted):
            if _is_unseen(node):
                raise CoverageError(
                    f"the target comes from {node.name()}, which did not pass through torch's functions in this "
                    "thread (a scripted module, an autograd function), so the head cannot be told: write it in torch"
                )
            ruling = getattr(node, "ruling", None)
            if ruling is not None and ruling.head_rule is not None:
                nodes.append(node)
                self.heads.append(ruling)
            else:
                name = ruling.name if ruling else _notes(node).get(_NAME, node.name())
                self.above.append(name)
                if self._unruled[name, None] and not _notes(node).get(_WEIGHTED):
                    self._unruled[name, None] -= 1  # without weights and above the head, it needs no rule
                    self._unruled[name, rules.ORDINARY] += 1
                if ruling is not None:
                    ruling.is_ordinary = True
            if _notes(node).get(_WEIGHTED):
                raise CoverageError(
                    f"the target comes from `{_notes(node)[_NAME]}`, an operator with weights for which the rules "
                    "have no entry, so the head cannot be told: write the head as a linear layer or a convolution"
                )
        if not self.heads:
            raise CoverageError(
                "no head was found: between the image and the target there is no linear layer and no convolution"
                f" that the rules know (seen: {', '.join(sorted({name for name, _ in self._unruled})) or 'nothing'})"
            )
        below = [edge for node in nodes for edge, _ in node.next_functions if edge is not None]
        first = [node for start in below for node in _walk(start, stop=_weighted) if _weighted(node)]
        hidden = any(node.ruling.on_vector for node in first)  # type: ignore[attr-defined]
        self.f = self._f(hidden) if callable(self._f) else float(self._f)
        for ruling in self._met:
            ruling.f = None
        for head in self.heads:
            head.f, head.count = self.f, count

    def check_positions(self) -> None:
        """Refuse a model that the rules cannot reach below its head.

        Raises:
            CoverageError: no operator with weights acts on the positions of a map.
        """
        weighted = [ruling for ruling in self._met if ruling.head_rule is not None]
        if all(ruling.is_linear or ruling.on_vector for ruling in weighted):
            seen = ", ".join(sorted({name for name, _, _ in self.coverage()}))
            raise CoverageError(
                "the model has no convolution that the rules know: TSGB explains convolutional networks, and a plain "
                f"gradient is not passed off as its map (operators seen: {seen})"
            )

    def arrived(self, count: int) -> list[bool]:
        """Tell for each of ``count`` images whether any gradient arrived at the head in the last backward."""
        found = [head.arrived for head in self.heads if head.arrived is not None]
        for head in self.heads:
            head.arrived = None
        if any(len(flags) != count for flags in found):
            return [True] * count
        return [any(bool(flags[n]) for flags in found) for n in range(count)]

    def coverage(self) -> list[tuple[str, str | None, int]]:
        """List which operator met which rule how often; None for a weighted or curved operator that met none."""
        rows = +self._unruled + Counter({(name, None): count for name, count in self._unseen.items()})
        for ruling in self._met:
            rule = _name(ruling.rule if ruling.f is None else ruling.head_rule)
            rows[ruling.name, rules.ORDINARY if ruling.is_ordinary else rule] += 1
        return sorted(
            ((name, rule, count) for (name, rule), count in rows.items()), key=lambda row: (row[0], row[1] or "")
        )


@contextmanager
def recording(table: rules.Table, f: float | None = None) -> Iterator[Backprop]:
    """Run the body under a table of rules, with gradients on, and with what backward needs kept from in-place calls.

    Args:
        table: see `tsgb.rules`. ``f``: the number f of the head's rule; None takes the table's.

    Yields:
        The `Backprop` that records the body; the backward runs outside.

    Example:
        >>> x = torch.ones(1, 1, 2, 2, requires_grad=True).clone()
        >>> with recording(rules.DEFAULT) as run:
        ...     y = torch.nn.functional.silu(x)
        >>> run.coverage()
        [('silu', 'activation', 1)]
    """
    kept = Kept()
    hooks = saved_tensors_hooks(kept.pack, kept.unpack)
    try:
        with torch.inference_mode(False), torch.enable_grad(), kept, hooks, Backprop(table, f) as run:
            yield run
    finally:
        kept.restore_random_state()


def _ruling(call: Call, function: Callable[..., Tensor], rule: Callable[..., Tensor], **roles: Any) -> _Ruling:
    args, kwargs = _map(lambda _: _SLOT, (call.args[1:], call.kwargs))
    return _Ruling(call.name, args, kwargs, function, rule, **roles)


def _constant(tensor: Tensor) -> Tensor:
    """What does not come from the image does not require grad, so that requiring grad means: depends on the image."""
    if tensor.is_inference():
        return tensor.clone()
    return tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor


def _separate(args: tuple[Any, ...], outputs: Any) -> Any:
    """Let views that one call returned together (``x.chunk(2)``) be written in place, as they may be without grad."""
    if type(outputs) not in (tuple, list) or not args or not isinstance(args[0], Tensor):
        return outputs
    storage = args[0].untyped_storage().data_ptr()
    if not all(isinstance(t, Tensor) and t._is_view() and t.untyped_storage().data_ptr() == storage for t in outputs):
        return outputs
    return type(outputs)(args[0].as_strided(t.shape, t.stride(), t.storage_offset()) for t in outputs)


def _held(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors of an operator's arguments."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    if type(value) is dict:
        return {key: _map(function, item) for key, item in value.items()}
    return value


def _name(rule: Any) -> str:
    return _name(rule.func) if isinstance(rule, partial) else getattr(rule, "__name__", type(rule).__name__)


def _notes(node: Node) -> dict[str, Any]:
    notes: dict[str, Any] = node.metadata  # type: ignore[assignment]
    return notes


def _weighted(node: Node) -> bool:
    ruling = getattr(node, "ruling", None)
    return ruling is not None and ruling.head_rule is not None


def _is_linear(node: Node | None) -> bool:
    ruling = getattr(node, "ruling", None)
    return ruling is not None and ruling.is_linear


def _is_unseen(node: Node) -> bool:
    """Tell whether a node came about behind the mode's back, and carries weights or bends."""
    if hasattr(node, "ruling") or _NAME in _notes(node):
        return False
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return not node.name().startswith("BackwardHookFunction")  # torch's own, an identity around hooked modules
    return operators.BENDING.search(node.name()) is not None


def _walk(start: Node | None, stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """The nodes from ``start`` towards the image, not past those where ``stop`` holds."""
    ahead, seen = [start], {start}
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        yield node
        if not stop(node):
            for edge, _ in node.next_functions:
                if edge not in seen:
                    seen.add(edge)
                    ahead.append(edge)


def _gate(a: Tensor, b: Tensor) -> Tensor | None:
    """Which of two factors is the gate of the other, None for a product of equals.

    A gate is the factor that is broadcast over the other, that was computed from the other, or that left a gating
    operator.
    """
    if a.grad_fn is not None and b.grad_fn is not None:
        opened = [bool(_notes(node).get(_OPEN)) for node in (a.grad_fn, b.grad_fn)]
        if opened[0] != opened[1]:
            return a if opened[0] else b
    sizes = [torch.Size(n for n, step in zip(t.shape, t.stride(), strict=True) if step != 0).numel() for t in (a, b)]
    if sizes[0] != sizes[1]:
        return a if sizes[0] < sizes[1] else b
    if a.grad_fn is not None and b.grad_fn is not None:
        if any(node is a.grad_fn for node in _walk(b.grad_fn, stop=lambda node: node is a.grad_fn)):
            return b
        if any(node is b.grad_fn for node in _walk(a.grad_fn, stop=lambda node: node is b.grad_fn)):
            return a
    return None
