"""The mechanism: apply a table of rules to any model during one forward and one backward, without touching the model.

A `Backprop` sees every torch call that the model makes in its thread. Where the table has a rule the operator runs as
one autograd function whose backward is the rule; all else runs as it is. The graph that autograd builds then *is* the
method: its gradient at the image is TSGB's. No operator is named here; the table names them, `meeting` finds the rule
of a call, `operators` reads its spelling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .. import rules
from . import graph, operators, scope
from .coverage import Coverage
from .folding import LATE, UNREAD, FoldedError, Folding
from .handing import CHANNELS, SUMS, Image
from .heads import Heads
from .meeting import Meeting
from .nodes import Handed, Job, Ruled
from .operators import Call, mapped
from .relevance import LostError
from .ruling import Ruling, form
from .saved import Kept, separate
from .starts import producer, start

# What a tensor tells without being read, of which no more need be known.
_FACTS = UNREAD - {"requires_grad"}
# Hooks on gradients, which are none here.
_LISTENING = ("register_hook", "retain_grad")
_STRIDED = ("as_strided", "stride", "data_ptr", "storage", "untyped_storage", "storage_offset")

__all__ = ["Backprop", "recording"]

_FINE = 8  # convolutions that autocast does not run in half precision


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
        >>> run.find_heads(logits, 1).above
        []
        >>> run.coverage.rows()
        [('conv2d', 'conv_lumped', 1), ('flatten', 'ordinary', 1), ('linear', 'linear_head', 1)]
    """

    def __init__(
        self, table: rules.Table, f: float | None, kept: Kept, is_handing: bool, pools: int | None = None
    ) -> None:
        super().__init__()
        self._kept, self._is_handing = kept, is_handing
        self.folding = Folding(table, pools)
        self._table = Meeting(table)
        self._f = table[rules.F] if f is None else f
        self.coverage = Coverage()
        self._run: object | None = None  # what marks the nodes of this forward, once an image has entered
        self.has_shifts = False  # whether a constant was added to what comes from the image without weights between
        self._count = 0  # of images
        self.in_target = False  # whether what runs is a callable target, whose products keep their own derivatives

    def enter(self, leaf: Tensor, layout: torch.memory_format, whole: bool) -> Tensor:
        """Copy a leaf of the graph into the image that the model is given.

        Args:
            layout: the copy's memory format. ``whole``: whether the relevance of every value of the image is asked for;
                else it may be summed over the channels.
        """
        with torch._C.DisableTorchFunction():
            if not self._is_handing:
                return self._entered(leaf.clone(memory_format=layout))
            ruling = Ruling("image", (), {}, torch.clone, rules.ORDINARY)  # type: ignore[arg-type]
            takes = CHANNELS if whole or leaf.dim() < 3 else SUMS
            copy = partial(leaf.detach().clone, memory_format=layout)
            return self._entered(Handed.apply(Job(ruling, copy, lambda _: Image(takes), False), leaf))  # type: ignore[no-untyped-call]

    def _entered(self, image: Tensor) -> Tensor:
        self._run, self._count = self._run or object(), len(image)
        graph.mark(image.grad_fn, self._run, True)  # type: ignore[arg-type]
        return image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operators.name(func)
        if name in _FACTS:
            return func(*args, **(kwargs or {}))
        if name in _LISTENING:
            return RemovableHandle(OrderedDict())  # of which nothing is ever called
        is_on = self._kept.leave()
        try:
            return self._called(func, name, args, kwargs or {})
        finally:
            self._kept.resume(is_on)

    def _called(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call under its rule, if it has one."""
        seen: list[Tensor] = []

        def constant(tensor: Tensor) -> Tensor:
            seen.append(self._from_image(tensor))
            return seen[-1]

        args, kwargs = mapped(constant, args), mapped(constant, kwargs) if kwargs else kwargs
        if self._kept.waiting and name not in UNREAD and name not in LATE:
            self._kept.settle(seen)
        depending = 0
        for tensor in seen:
            if tensor.requires_grad:
                depending += 1
                if (handing := producer(tensor)) is not None:
                    handing.readers += 1
        if not depending or not torch.is_grad_enabled():
            if self._kept.waiting:
                self._kept.settle(seen)
            with self._kept.watching():
                return func(*args, **kwargs)
        call = operators.read(func, args, kwargs)
        met = self._table.meet(call, depending, self._count, self.in_target)
        if met is not None and not self.has_shifts and form(met[0].rule) is rules.shift:
            self.has_shifts = graph.is_near_image(met[1].args[0].grad_fn)
        self.folding.meet(call.name)
        if self._is_fine(call, met):
            with torch.autocast(call.args[0].device.type, enabled=False):
                return self._ran(func, args, kwargs, call, met)
        return self._ran(func, args, kwargs, call, met)

    def _from_image(self, tensor: Tensor) -> Tensor:
        """A tensor, so that requiring grad means: depends on the image; weights do not, nor what was made of them."""
        if tensor.is_inference():
            return tensor.clone()
        if not tensor.requires_grad:
            return tensor
        if tensor.grad_fn is None or not (self._run is None or graph.is_of(tensor.grad_fn, self._run)):
            return tensor.detach()
        return tensor

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
        return sum(ruling.head_rule is not None for ruling in self.coverage.met) < _FINE

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
            if self._kept.waiting and call.name in LATE:
                if met is not None and (taken := self.folding.take(call, met[0].rule, self._kept)) is not None:
                    self.coverage.met.append(met[0])
                    return taken
                self._kept.settle(operators.tensors((call.args, call.kwargs)))
            handed = self._hand(call, met, partial(func, *args, **kwargs))
            if handed is not None:
                return handed
            if call.inplace is not None or call.name == "setitem":
                self._keep_outputs(call)
            if call.name in _STRIDED:
                raise LostError(f"the model reads how its tensors lie in memory ({call.name})")
            if call.name == "view" and not _is_viewable(func, args, kwargs):
                # It would be one if the image were contiguous; a copy serves as long as nothing is written on it.
                args = (args[0].contiguous(), *args[1:])
                self._kept.torn[args[0].untyped_storage()._cdata] = args[0].detach()
        if met is None:
            scope.refuse(call, self._table.known)
            with self._kept.watching():
                output = operators.plain(func, args, kwargs)
            if not self._is_handing:
                output = separate(args, output)
            elif any(t.requires_grad for t in operators.tensors(output)):  # and not the number of its dimensions
                self._keep_outputs(call)
            return self._read(call, self._note(call, output))
        ruling, call = met
        if self._is_handing:
            self._keep_outputs(call)
        ruling.others = []  # autograd saves them
        self.coverage.met.append(ruling)
        self._release_below(ruling, call.args[0])
        with self._kept.watching():
            o = Ruled.apply(call.args[0], ruling, call.args[1:], call.kwargs)  # type: ignore[no-untyped-call]
            return self._read(call, o if call.inplace is None else call.inplace.copy_(o))

    def _hand(self, call: Call, met: tuple[Ruling, Call] | None, run: Callable[[], Any]) -> Any:
        """Run an operator that hands relevance on; None where this one cannot."""
        kept = self._kept
        if met is not None:
            ruling, call = met
        elif (kept_on_purpose := self._table.ordinary(call)) is not None:
            ruling = kept_on_purpose
        else:
            return None
        begun = start(call, ruling, kept.pack, self.folding)
        if begun is None:
            return None
        x, written = begun.signals[0], call.inplace
        if written is not None and (written is not x or written._is_view()):
            return None
        if met is None:
            self.coverage.unruled[call.name, rules.ORDINARY] += 1
        else:
            self.coverage.met.append(ruling)
        self._release_below(ruling, x)
        inplace = written is not None
        if len(begun.signals) == 1 and not (inplace and begun.is_kinked):
            ruling.x = kept.pack(x)
        if begun.run is None and not inplace:
            run = partial(ruling.function, *call.args, **call.kwargs)
        if written is not None:
            with kept.sparing(begun.spared):
                kept.copy(written)
        job = Job(ruling, begun.run or run, begun.begin, inplace, begun.waiting is not None)
        o = Handed.apply(job, *begun.signals)  # type: ignore[no-untyped-call]
        if inplace and begun.is_kinked:
            ruling.x = kept.pack(o)
        if begun.waiting is not None:
            o, after = o
            kept.wait(o, begun.waiting, after)
        return o

    def _keep_outputs(self, call: Call) -> None:
        """Keep the outputs that an operator takes which gives gradients back."""
        for tensor in operators.tensors((call.args, call.kwargs)):
            ruling = graph.ruling_of(tensor.grad_fn)
            if ruling is not None and ruling.handing is not None and tensor.output_nr not in ruling.outputs:
                ruling.outputs[tensor.output_nr] = self._kept.pack(tensor)

    def _read(self, call: Call, output: Any) -> Any:
        """Keep what has positions, as the classes may compete there."""
        for tensor in operators.tensors(output) if self._table.is_reading else ():
            if tensor.requires_grad:
                graph.keep_output(tensor, self._kept.pack(tensor), operators.tensors((call.args, call.kwargs)))
        return output

    def _release_below(self, ruling: Ruling, x: Tensor) -> None:
        """What is below an operator with weights is no head: let go of what a head needs."""
        if not self._is_handing or ruling.head_rule is None:
            return
        for found in [graph.ruling_of(node) for node in graph.walk(x.grad_fn, stop=graph.is_settled)]:
            if found is not None:
                found.release()

    def _note(self, call: Call, output: Any) -> Any:
        """Remember an operator that met no rule, on the nodes of what it returned and in the coverage."""
        made = [t.grad_fn for t in operators.tensors(output) if t.requires_grad and t.grad_fn is not None]
        known = call.name in self._table.known
        nodes: dict[Any, None] = {}
        if call.inplace is None:  # it may be made of others, of which no torch function tells
            before = {t.grad_fn for t in operators.tensors((call.args, call.kwargs))}
            within = (
                node for root in made for node in graph.walk(root, stop=lambda n: n in before or graph.is_known(n))
            )
            nodes = dict.fromkeys(node for node in within if node not in before and not graph.is_known(node))
            nodes.update(dict.fromkeys(node for node in made if node not in before))  # else it handed its operand on
        else:
            nodes = dict.fromkeys(made)
        if made or call.inplace is not None:
            self.coverage.unruled[call.name, rules.ORDINARY if known else None] += 1
        if made and not known:
            self.coverage.noted.add(call.name)
        is_weighted = not known and any(
            not t.requires_grad and t.is_floating_point() and t.dim() > 0
            for t in operators.tensors((call.args, call.kwargs))
        )
        for node in nodes:
            graph.note(node, call.name, call.name in self._table.openers, is_weighted)
        return output

    def find_heads(self, target: Tensor, count: int, one_each: bool = False) -> Heads:
        """Find the first operators that carry weights below a target of ``count`` images; see `Heads`."""
        return Heads(target, self.coverage, self._f, count, one_each)


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
        >>> run.coverage.rows()
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


def _is_viewable(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad():
            func(*args, **kwargs)
    except RuntimeError:
        return False
    return True
