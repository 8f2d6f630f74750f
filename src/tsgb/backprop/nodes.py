"""The nodes that operators with a rule put into autograd's graph.

`Ruled` runs a rule in its plain form, gradient in and gradient out, class by class; `Handed` one that hands relevance
on, see `handing`. Both carry a `Ruling`, see `ruling`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rules
from . import graph, operators
from .handing import GRADIENT, TINY, Handing
from .relevance import Dense, Gradient, LostError, Part, Relevance, single
from .ruling import Ruling, form, wants
from .saved import Cell

__all__ = ["Handed", "Job", "Ruled"]


class Ruled(torch.autograd.Function):
    """An operator with a rule in its plain form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ruling: Ruling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the operator."""
        o = ruling.function(x, *args, **kwargs)
        o = o.clone() if o._is_view() else o  # else it could not be written on, as it could without this node
        ctx.ruling = ruling
        needs_o = wants(ruling.rule, "o") or ruling.is_whole
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
        if ruling.note is not None and o is not None:
            rows = grad.gradients() if isinstance(grad, Relevance) else grad[None]
            relevance = single(rows) * single(o)
            if ruling.parts > 1:
                relevance = relevance.reshape(len(rows), ruling.parts, -1, *o.shape[2:])
            ruling.note(relevance.sum(-1 if ruling.is_linear else 2))
        o = o if wants(ruling.rule, "o") else None
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
