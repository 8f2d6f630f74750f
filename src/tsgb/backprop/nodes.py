"""The nodes that operators with a rule put into autograd's graph.

`Ruled` runs a rule in its plain form, gradient in and gradient out, class by class; `Handed` one that hands relevance
on, see `handing`. Both carry a `Ruling`, by which the mechanism finds them in the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import rules
from . import graph, operators
from .handing import GRADIENT, TINY, Handing
from .relevance import Dense, Gradient, LostError, Part, Relevance, of_type, single
from .saved import Cell

if TYPE_CHECKING:
    from .reading import Reading

__all__ = ["SLOT", "Handed", "Job", "Ruled", "Ruling", "form"]

SLOT = torch.empty(0)


@dataclass(slots=True)
class Ruling:
    """An operator that met a rule.

    It lives on the operator's node, so it holds no tensors of the graph: through one that an in-place call changed, the
    node would keep itself alive. The tensors of the call's arguments are what autograd saves; `SLOT` stands in their
    places. Cells hold tensors that are cut off from the graph.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Tensor]
    rule: Callable[..., Tensor]
    head_rule: Callable[..., Tensor] | None = None  # for operators that carry weights: the rule where they are the head
    on_vector: bool = False
    is_linear: bool = False
    is_whole: bool = False  # of a convolution: whether it shares one number a position, not one for each group
    parts: int = 1  # of a convolution: images that stand side by side in its channels
    reading: Reading | None = None  # what notes that number
    carries: bool = False  # of a convolution: whether a 0 of its output shares what a shift right after it gave it
    is_ordinary: bool = False  # set above the head, where the target's own derivative is what counts
    f: float | None = None  # set on the heads, with the number of images
    count: int = 0
    is_single: bool = False  # of a head: whether each row of gradients is of one class
    arrived: Tensor | None = None  # of a head: per class and image, whether any gradient arrived in this backward
    handing: Handing | None = None
    passing: Handing | None = None  # of a convolution: of its second output, that of the batch norm after it
    rectifier: str = ""  # what wrote on that output, and has no node of its own
    is_below: bool = False  # whether something with weights is known to come after it
    x: Cell | None = None  # until then, the input and the other tensors: a head needs them, and what is above it
    others: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Cell] = field(default_factory=dict)  # those that something takes which gives gradients back

    def backward(self, grad: Tensor, x: Tensor, o: Tensor | None, others: Sequence[Tensor]) -> Tensor:
        """Apply the rule in float32 at least, and hand on what the type of x can hold.

        ``o`` is the output where the rule asks for it, ``others`` are the tensors among the call's other arguments.
        """
        tensors = iter(others)
        args, kwargs = operators.mapped(lambda _: single(next(tensors)), (self.args, self.kwargs))
        with torch.autocast(x.device.type, enabled=False):
            if self.is_ordinary:
                with torch.enable_grad():
                    leaf = single(x).detach().requires_grad_()
                    (grad_x,) = torch.autograd.grad(self.function(leaf, *args, **kwargs), leaf, single(grad))
            elif self.f is None:
                output = {} if o is None else {"o": single(o)}
                grad_x = self._checked(self.rule, self.rule(single(grad), single(x), *args, **output, **kwargs), x)
            else:
                assert self.head_rule is not None
                swapped, is_alone = self._is_swapped(x), x.dim() == 1
                grad, features = (grad.transpose(0, 1), x.transpose(0, 1)) if swapped else (grad, x)
                grad, features = (grad[None], features[None]) if is_alone else (grad, features)
                most = {"most": len(grad)} if self.is_single and _wants(self.head_rule, "most") else {}
                grad_x = self.head_rule(single(grad), single(features), *args, f=self.f, **most, **kwargs)
                grad_x = self._checked(self.head_rule, grad_x, features)
                grad_x = grad_x.transpose(0, 1) if swapped else grad_x[0] if is_alone else grad_x
        return of_type(grad_x, x.dtype)

    def _checked(self, rule: Callable[..., Tensor], given: Any, x: Tensor) -> Tensor:
        """What a rule gave, if it is a gradient of its input."""
        if isinstance(given, Tensor) and given.shape == x.shape:
            return given
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the rule {getattr(form(rule), '__name__', rule)!r} of {self.name} must return the gradient at its input, "
            f"{tuple(x.shape)}, got {got}"
        )

    def classes(self, grads: Tensor, x: Tensor, o: Tensor | None, others: Sequence[Tensor]) -> Tensor:
        """Apply `backward` to the gradients of several classes (K, *out)."""
        if self.f is not None:
            self._note_arrivals(grads, x)
        is_weighted = self.head_rule is not None  # what else is in the call are weights, not another's rows
        if is_weighted and x.dim() == 2 and len(x) == len(grads[0]) and o is None:
            rows = self.backward(grads.flatten(0, 1), x.repeat(len(grads), 1), None, others)
            return rows.reshape(len(grads), len(x), -1)
        return torch.stack([self.backward(grad, x, o, others) for grad in grads])

    def release(self) -> None:
        """Let go of what only a head, or what is above it, needs."""
        self.is_below, self.x, self.others = True, None, []

    def _note_arrivals(self, grads: Tensor, x: Tensor) -> None:
        grads = grads.transpose(1, 2) if self._is_swapped(x) else grads
        self.arrived = grads.flatten(min(2, grads.dim() - 1)).any(-1, keepdim=grads.dim() == 2)  # of a vector by itself

    def _is_swapped(self, x: Tensor) -> bool:
        """Tell features (T, N, C) of a sequence-first network: a head's sums are over the positions of one image."""
        return self.is_linear and x.dim() == 3 and len(x) != self.count == x.shape[1]


class Ruled(torch.autograd.Function):
    """An operator with a rule in its plain form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ruling: Ruling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the operator."""
        o = ruling.function(x, *args, **kwargs)
        o = o.clone() if o._is_view() else o  # else it could not be written on, as it could without this node
        ctx.ruling = ruling
        needs_o = _wants(ruling.rule, "o") or ruling.is_whole
        before = graph.ruling_of(x.grad_fn)
        if before is not None and before.carries and form(ruling.rule) is rules.shift:
            x = _carrying(x)
        kept = None if not needs_o else _carrying(o) if ruling.carries else o
        ctx.save_for_backward(x, kept, *operators.tensors((args, kwargs)))
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Run the rule."""
        x, o, *others = ctx.saved_tensors
        ruling, grad = ctx.ruling, grads[0]
        if ruling.reading is not None and o is not None:
            rows = grad.gradients() if isinstance(grad, Relevance) else grad[None]
            relevance = single(rows) * single(o)
            if ruling.parts > 1:
                relevance = relevance.reshape(len(rows), ruling.parts, -1, *o.shape[2:])
            ruling.reading.note(relevance.sum(-1 if ruling.is_linear else 2))
        o = o if _wants(ruling.rule, "o") else None
        if isinstance(grad, Relevance):
            values = ruling.classes(grad.gradients(), x, o, others)
            return Relevance(x.shape, x.dtype, [Gradient(single(values))]), None, None, None
        if ruling.f is not None:
            ruling._note_arrivals(grad[None], x)
        return ruling.backward(grad, x, o, others), None, None, None


class Job(NamedTuple):
    """What `Handed` is to do: run an operator, then begin to hand on with its output."""

    ruling: Ruling
    run: Callable[[], Tensor]
    begin: Callable[[Tensor], Handing]
    is_inplace: bool
    is_followed: bool = False  # whether what follows it is an output of its own


def form(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The function of `tsgb.rules` that a table's entry is, whatever it was given and in whatever form it is to run."""
    rule = inspect.unwrap(rule)
    return rule.func if isinstance(rule, partial) else rule


def _carrying(x: Tensor) -> Tensor:
    """A number in the place of each 0, so that x * gradient can be something there; not where the type has none."""
    return torch.where(x == 0, TINY, x) if torch.finfo(x.dtype).tiny < TINY else x


class Handed(torch.autograd.Function):
    """An operator that hands relevance on; in place where its ruling says so."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        *signals: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the operator, and let the rule keep what it needs."""
        ctx.set_materialize_grads(False)
        ctx.ruling = job.ruling
        o = job.run()
        if job.is_inplace:
            ctx.mark_dirty(signals[0])
        job.ruling.handing = job.begin(o)
        ctx.kinds = [(signal.shape, signal.dtype) for signal in signals]
        ctx.shape = o.shape
        return (o, job.run()) if job.is_followed else o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Hand on what arrives; the caller has left autocast."""
        ruling = ctx.ruling
        arrived = [(place, grad) for place, grad in enumerate(grads) if grad is not None]
        if not arrived:
            return (None, *(None for _ in ctx.kinds))
        if not all(isinstance(grad, Relevance) for _, grad in arrived):
            raise LostError("a gradient of one class arrived")
        grad: Any = arrived[0][1]
        if ruling.is_ordinary or ruling.f is not None:
            given = _above(ruling, grad, len(ctx.kinds))
        elif ruling.handing.takes == GRADIENT:
            given = ruling.handing.hand([Gradient(grad.gradients())])
        else:
            given = ruling.handing.hand(_arrived(ruling, arrived))
        if not _is_kept():
            ruling.handing.forget()
        if len(given) == 1 and given[0] is grad.parts and ctx.kinds[0] == (grad.shape, grad.dtype):
            return None, grad
        made = [Relevance(shape, dtype, parts) for (shape, dtype), parts in zip(ctx.kinds, given, strict=True)]
        return (None, *made)


_ASK = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def _is_kept() -> bool:
    """Tell whether the graph may be run again; a torch that cannot say keeps what is kept until the graph goes."""
    return _ASK is None or bool(_ASK())


def _above(ruling: Ruling, grad: Relevance, count: int) -> list[list[Part]]:
    """The gradients below the head, and below what is above it."""
    grads = grad.gradients()
    if count > 1:
        assert ruling.handing is not None
        return [[Gradient(given)] for given in ruling.handing.split(grads)]
    if ruling.x is None:
        raise LostError("the input of the head was let go")
    x = ruling.x.tensor
    given = single(ruling.classes(grads, x, None, ruling.others))
    handing = ruling.handing
    if ruling.f is None or handing is None or handing.below == GRADIENT:
        return [[Gradient(given)]]
    return [[Dense(_channels_first(given * single(x), handing.is_last))]]


def _channels_first(values: Tensor, is_last: bool) -> Tensor:
    """Relevance (K, N, C, *) from that of a tensor whose channels may stand last."""
    return values.movedim(-1, 2) if is_last else values


def _arrived(ruling: Ruling, grads: list[tuple[int, Any]]) -> list[Part]:
    """The relevance that arrives, at one output or both."""
    assert ruling.handing is not None
    found = [_relevance(grad.parts, ruling.outputs.get(place), ruling.handing.is_last) for place, grad in grads]
    return found[0] if len(found) == 1 else [part for parts in found for part in parts]


def _relevance(parts: list[Part], o: Cell | None, is_last: bool) -> list[Part]:
    """Turn gradients into relevance."""
    if not any(isinstance(part, Gradient) for part in parts):
        return parts
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Gradient):
            if o is None:
                raise LostError("an output was let go for which gradients arrived")
            found.append(Dense(_channels_first(part.values * single(o.tensor), is_last)))
        else:
            found.append(part)
    return found


def _wants(rule: Callable[..., Any], name: str) -> bool:
    """Tell whether a rule has a parameter of a name; rules of the table are few, and asked for at every layer."""
    try:
        return name in _parameters(rule)
    except TypeError:  # it has no hash
        return name in inspect.signature(rule).parameters


@lru_cache(maxsize=512)
def _parameters(rule: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)
