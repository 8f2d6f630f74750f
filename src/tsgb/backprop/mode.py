"""The mechanism: apply a table of rules to any model during one forward and one backward, without touching the model.

A `Backprop` sees every torch call that the model makes in its thread. Where the table has a rule the operator runs as
one autograd function whose backward is the rule; all else runs as it is. The graph that autograd builds then *is* the
method: its gradient at the image is TSGB's. No operator is named here; the table names them, `operators` reads their
spellings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .. import rules
from . import operators
from .folding import FOLDED, UNREAD, FoldedError, Folding, Waiting
from .handing import CHANNELS, SUMS, Image
from .nodes import SLOT, Handed, Job, Ruled, Ruling
from .operators import Call, mapped
from .relevance import LostError
from .saved import Kept
from .starts import start

# What a tensor tells without being read, of which no more need be known.
_FACTS = UNREAD - {FOLDED, "requires_grad"}
_STRIDED = ("as_strided", "stride", "data_ptr", "storage", "untyped_storage", "storage_offset")

__all__ = ["Backprop", "CoverageError", "recording"]

_FINE = 8  # convolutions that autocast does not run in half precision

_NAME, _OPEN, _WEIGHTED = "tsgb.name", "tsgb.gate", "tsgb.weighted"  # keys of autograd nodes' metadata


class CoverageError(RuntimeError):
    """The rules do not cover the model, so that its map would not be TSGB's."""


class Backprop(TorchFunctionMode):
    """One forward of a model under a table of rules; enter it through `recording`.

    The image must be no leaf of the graph (a clone of one): leaves that require grad are taken for the model's weights.

    Args:
        table: torch functions and roles to rules, see `tsgb.rules`.
        f: the number f of the head's rule; None takes the table's.
        kept: keeps what backward needs. ``is_handing``: whether rules hand relevance on where they can.
        pools: see `recording`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).eval()
        >>> x = torch.rand(1, 3, 8, 8, requires_grad=True).clone()
        >>> with recording(rules.PAPER) as run:
        ...     logits = model(x)
        >>> run.find_heads(logits, 1)
        >>> run.coverage()
        [('conv2d', 'conv_lumped', 1), ('flatten', 'ordinary', 1), ('linear', 'linear_head', 1)]
    """

    def __init__(
        self, table: rules.Table, f: float | None, kept: Kept, is_handing: bool, pools: int | None = None
    ) -> None:
        super().__init__()
        self._kept, self._is_handing = kept, is_handing
        self.folding = Folding(table, pools)
        self._rules, self._heads, self._constant, self._products = (
            {operators.name(key): (key, rule) for key, rule in part.items() if callable(key)}
            for part in (table, *(table.get(role, {}) for role in (rules.HEAD, rules.CONSTANT, rules.GATE)))
        )
        self._openers = {operators.name(function) for function in rules.GATES}
        self._f = table[rules.F] if f is None else f
        self._met: list[Ruling] = []
        self._unruled: Counter[tuple[str, str | None]] = Counter()
        self._unseen: Counter[str] = Counter()
        self.has_shifts = False  # whether a constant was added to what comes from the image
        self.heads: list[Ruling] = []
        self.above: list[str] = []  # names of the operators between the head and the target
        self.f: float | None = None

    def enter(self, leaf: Tensor, form: torch.memory_format, whole: bool) -> Tensor:
        """Copy a leaf of the graph into the image that the model is given.

        Args:
            form: the copy's memory format. ``whole``: whether the relevance of every value of the image is asked for;
                else it may be summed over the channels.
        """
        with torch._C.DisableTorchFunction():
            if not self._is_handing:
                return leaf.clone(memory_format=form)
            ruling = Ruling("image", (), {}, torch.clone, rules.ORDINARY)  # type: ignore[arg-type]
            takes = CHANNELS if whole or leaf.dim() < 3 else SUMS
            copy = partial(leaf.detach().clone, memory_format=form)
            image: Tensor = Handed.apply(Job(ruling, copy, lambda _: Image(takes), False), leaf)  # type: ignore[no-untyped-call]
            return image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operators.name(func)
        if name in _FACTS:
            return func(*args, **(kwargs or {}))
        is_on = self._kept.leave()
        try:
            return self._called(func, name, args, kwargs or {})
        finally:
            self._kept.resume(is_on)

    def _called(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call under its rule, if it has one."""
        seen: list[Tensor] = []

        def constant(tensor: Tensor) -> Tensor:
            seen.append(_constant(tensor))
            return seen[-1]

        args, kwargs = mapped(constant, args), mapped(constant, kwargs)
        if self._kept.waiting and name not in UNREAD:
            self._kept.settle(seen)
        depending = sum([t.requires_grad for t in seen])
        if not depending or not torch.is_grad_enabled():
            if self._kept.waiting:
                self._kept.settle(seen)
            with self._kept.watching():
                return func(*args, **kwargs)
        call = operators.read(func, args, kwargs)
        met = self._meet(call, depending)
        self.folding.meet(call.name)
        if self._is_fine(call, met):
            with torch.autocast(call.args[0].device.type, enabled=False):
                return self._ran(func, args, kwargs, call, met)
        return self._ran(func, args, kwargs, call, met)

    def _is_fine(self, call: Call, met: tuple[Ruling, Call] | None) -> bool:
        """Tell whether a convolution is to run in float32 under autocast: the first few.

        In half precision the values of the image, and which of a pool's values is the largest, are told too coarsely.
        """
        if met is None or met[0].head_rule is None or met[0].is_linear:
            return False
        if not torch.is_autocast_enabled(call.args[0].device.type):
            return False
        if any(t.dtype != torch.float32 for t in operators.tensors((call.args, call.kwargs))):
            return False
        return sum(ruling.head_rule is not None for ruling in self._met) < _FINE

    def _ran(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        met: tuple[Ruling, Call] | None,
    ) -> Any:
        """Run a call that depends on the image."""
        if self._is_handing:
            if not self._kept.is_innermost():
                raise LostError("the model saves tensors in its own way, as gradient checkpointing does")
            handed = self._hand(call, met, partial(func, *args, **kwargs))
            if handed is not None:
                return handed
            if call.name == FOLDED:
                self._kept.settle([call.args[0]])
            if call.inplace is not None or call.name == "setitem":
                self._keep_outputs(call)
            if call.name in _STRIDED:
                raise LostError(f"the model reads how its tensors lie in memory ({call.name})")
            if call.name == "view" and not _is_viewable(func, args, kwargs):
                # It would be one if the image were contiguous; a copy serves as long as nothing is written on it.
                args = (args[0].contiguous(), *args[1:])
                self._kept.torn[args[0].untyped_storage()._cdata] = args[0].detach()
        if met is None:
            with self._kept.watching():
                output = operators.plain(func, args, kwargs)
            if not self._is_handing:
                output = _separate(args, output)
            elif any(t.requires_grad for t in operators.tensors(output)):  # and not the number of its dimensions
                self._keep_outputs(call)
            return self._note(call, output)
        ruling, call = met
        if self._is_handing:
            self._keep_outputs(call)
        ruling.others = []  # autograd saves them
        self._met.append(ruling)
        self._release_below(ruling, call.args[0])
        with self._kept.watching():
            o = Ruled.apply(call.args[0], ruling, call.args[1:], call.kwargs)  # type: ignore[no-untyped-call]
            return o if call.inplace is None else call.inplace.copy_(o)

    def _meet(self, call: Call, depending: int) -> tuple[Ruling, Call] | None:
        """Find the rule that a call meets, if any: by its role among its operands, else by its name.

        Of the call that comes back the first operand alone depends on the image; what else did is held constant.
        ``depending``: how many operands depend on it.
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
        if depending > 1:
            call = replace(call, args=(signals[0], *mapped(_held, call.args[1:])), kwargs=mapped(_held, call.kwargs))
        if call.name not in self._heads:
            return _ruling(call, function, rule), call
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        roles = {"on_vector": operators.on_vector(signals[0], weight), "is_linear": weight.dim() == 2}
        return _ruling(call, function, rule, head_rule=self._heads[call.name][1], **roles), call

    def _hand(self, call: Call, met: tuple[Ruling, Call] | None, run: Callable[[], Any]) -> Any:
        """Run an operator that hands relevance on; None where this one cannot."""
        kept = self._kept
        if met is not None:
            ruling, call = met
        elif self._rules.get(call.name, (None, None))[1] == rules.ORDINARY and call.args:
            ruling = _ruling(call, self._rules[call.name][0], self._rules[call.name][1])
        else:
            return None
        begun = start(call, ruling.rule, ruling.function, kept.pack, self.folding)
        x, written = call.args[0], call.inplace
        if begun is None or (written is not None and (written is not x or written._is_view())):
            return None
        if met is None:
            self._unruled[call.name, rules.ORDINARY] += 1
        else:
            self._met.append(ruling)
        self._release_below(ruling, x)
        inplace = written is not None
        waiting = kept.waits(x)
        if not (inplace and begun.is_kinked):
            ruling.x = waiting or kept.pack(x)
        if isinstance(waiting, Waiting):
            run = partial(self.folding.fold, waiting, *call.args[1:], **call.kwargs)
        elif begun.run is None and not inplace:
            run = partial(ruling.function, *call.args, **call.kwargs)
        if written is not None:
            with kept.sparing(begun.spared):
                kept.copy(written)
        o = Handed.apply(Job(ruling, begun.run or run, begun.begin, inplace), *begun.signals)  # type: ignore[no-untyped-call]
        if inplace and begun.is_kinked:
            ruling.x = kept.pack(o)
        if begun.waiting is not None:
            kept.wait(o, begun.waiting)
        return o

    def _keep_outputs(self, call: Call) -> None:
        """Keep the outputs that an operator takes which gives gradients back."""
        for tensor in operators.tensors((call.args, call.kwargs)):
            ruling = getattr(tensor.grad_fn, "ruling", None)
            if ruling is not None and ruling.handing is not None and ruling.o is None:
                ruling.o = self._kept.pack(tensor)

    def _release_below(self, ruling: Ruling, x: Tensor) -> None:
        """What is below an operator with weights is no head: let go of what a head needs."""
        if not self._is_handing or ruling.head_rule is None:
            return
        for found in [getattr(node, "ruling", None) for node in _walk(x.grad_fn, stop=_is_settled)]:
            if found is not None:
                found.release()

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

    def find_heads(self, target: Tensor, count: int, one_each: bool = False) -> None:
        """Walk from the target's node to the first operators that carry weights: they are the head.

        Args:
            target: the logits, or what was computed from them, for ``count`` images.
            one_each: whether one value of each image's logits is asked for at a time.

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
            head.f, head.count, head.is_single = self.f, count, one_each and not self.above

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

    def arrived(self, classes: int, count: int) -> Tensor:
        """Tell for each class and image (K, N) whether any gradient arrived at the head in the last backward."""
        found = [head.arrived for head in self.heads if head.arrived is not None]
        for head in self.heads:
            head.arrived = None
        if not found or any(flags.shape != (classes, count) for flags in found):
            return torch.full((classes, count), bool(found))
        return torch.stack(found).any(0)

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
def recording(
    table: rules.Table, f: float | None = None, handing: bool = False, pools: int | None = None
) -> Iterator[Backprop]:
    """Run the body under a table of rules, with gradients on, and with what backward needs kept from in-place calls.

    Args:
        table: see `tsgb.rules`. ``f``: the number f of the head's rule; None takes the table's.
        handing: whether rules hand relevance on where they can. Then what flows backward has to be a `Relevance`.
        pools: how many max poolings the model has, after which batch norm is folded into convolutions; None: never.

    Yields:
        The `Backprop` that records the body; the backward runs outside.

    Raises:
        FoldedError: the model has more max poolings.

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
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            kept,
            hooks,
            Backprop(table, f, kept, handing, pools if handing else None) as run,
        ):
            try:
                yield run
            finally:
                kept.settle_all()
            if run.folding.is_spoiled:
                raise FoldedError
    finally:
        kept.restore_random_state()


def _ruling(call: Call, function: Callable[..., Tensor], rule: Callable[..., Tensor], **roles: Any) -> Ruling:
    others: list[Tensor] = []

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            others.append(tensor)
        return SLOT

    args, kwargs = mapped(taken, call.args[1:]), mapped(taken, call.kwargs)
    return Ruling(call.name, args, kwargs, function, rule, others=others, **roles)


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
    return tensor.detach() if tensor.requires_grad else tensor


def _name(rule: Any) -> str:
    return _name(rule.func) if isinstance(rule, partial) else getattr(rule, "__name__", type(rule).__name__)


def _notes(node: Node) -> dict[str, Any]:
    notes: dict[str, Any] = node.metadata  # type: ignore[assignment]
    return notes


def _weighted(node: Node) -> bool:
    ruling = getattr(node, "ruling", None)
    return ruling is not None and ruling.head_rule is not None


def _is_viewable(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad():
            func(*args, **kwargs)
    except RuntimeError:
        return False
    return True


def _is_settled(node: Node) -> bool:
    ruling = getattr(node, "ruling", None)
    return ruling is not None and (ruling.is_below or ruling.head_rule is not None)


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
