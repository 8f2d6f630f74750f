"""How an operator that can hand relevance on begins to: whether it can here, how it is run, what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import rules
from ..tracing import is_traced, untraced
from . import operators
from .folding import Folding, Waiting
from .handing import GRADIENT, Convolution, Handing, MaxPool, Mean, Passing, Sum, Takes
from .operators import Call
from .saved import Cell
from .windows import Windows

__all__ = ["Start", "producer", "start"]

Keep = Callable[[Tensor], Cell]


@dataclass(slots=True)
class Start:
    """An operator about to run.

    Attributes:
        signals: the operands that depend on the image.
        begin: called with the output.
        run: runs the operator, where it is not to run as the model called it.
        is_kinked: whether its derivative at the input is that at the output, which an in-place call leaves.
        spared: what was kept and may be written on, as nothing arrives where it changes.
        waiting: what will have the output, where the operator need not run until it is read.
    """

    signals: tuple[Tensor, ...]
    begin: Callable[[Tensor], Handing]
    run: Callable[[], Tensor] | None = None
    is_kinked: bool = False
    spared: Cell | None = None
    waiting: Waiting | None = None


def start(call: Call, rule: Any, function: Callable[..., Tensor], keep: Keep, folding: Folding) -> Start | None:
    """Begin to hand relevance on, where the rule can and what came before takes relevance; else None.

    Args:
        call: the operator, its first operand the signal. ``function``: the torch function that the table names.
        rule: of the table. ``keep``: makes cells. ``folding``: which convolutions wait.
    """
    form = rule.func if isinstance(rule, partial) else rule
    if form in (rules.conv, rules.conv_lumped):
        conv = _Conv(function, form is rules.conv_lumped, keep, folding)
        return _convolution(conv, call.args[0], *call.args[1:], **call.kwargs)
    if form in (rules.activation, rules.shift, rules.gate):
        return _passing(call, form, function)
    if rule == rules.ORDINARY and call.name == "add":
        return _sum(call, keep)
    if rule == rules.ORDINARY and call.name == "max_pool2d":
        return _max_pool(call.args[0], *call.args[1:], **call.kwargs)
    if rule == rules.ORDINARY and call.name == "mean":
        return _mean(call.args[0], keep, *call.args[1:], **call.kwargs)
    if rule == rules.ORDINARY and call.name == "adaptive_avg_pool2d":
        return _pool(call.args[0], keep, *call.args[1:], **call.kwargs)
    return None


def producer(x: Tensor) -> Handing | None:
    """What handed relevance on to where a tensor came from, if anything does."""
    ruling = getattr(x.grad_fn, "ruling", None)
    return None if ruling is None else ruling.handing


def _taken(x: Tensor) -> Takes:
    handing = producer(x)
    return GRADIENT if handing is None else handing.takes


def _is_positive(x: Tensor) -> bool:
    handing = producer(x)
    return handing is not None and handing.is_positive


@dataclass(slots=True)
class _Conv:
    function: Callable[..., Tensor]
    is_lumped: bool
    keep: Keep
    folding: Folding


def _convolution(
    conv: _Conv,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Start | None:
    if x.dim() < weight.dim() or x.shape[2:].numel() == 1:
        return None
    fields, below, is_positive = 1 if conv.is_lumped else groups, _taken(x), _is_positive(x)
    windows = Windows.of(weight.shape[2:], stride, padding, dilation)
    count = windows.count(x.shape[2:])
    # What the convolution would refuse, it is to refuse where it is called.
    fits = x.shape[1] == weight.shape[1] * groups and min(count) > 0 and x.device == weight.device
    # Weights more than values of the output take longer to read, and to scale, than the output.
    is_heavy = x.shape[0] * weight.shape[0] * math.prod(count) < weight.numel() and not is_traced()
    # An output that is 0 has no relevance, though a shift after it hands some on. Where no weight is 0 this is so only
    # where nothing is seen, and lost anyway.
    with untraced():
        may_be_zero = bias is None and (is_heavy or int(weight.count_nonzero()) < weight.numel())

    def begin(o: Tensor) -> Convolution:
        has_zeros = int(o.count_nonzero()) < o.numel() if may_be_zero and is_heavy else may_be_zero
        return Convolution(x, o != 0 if has_zeros else None, windows, fields, below, is_positive, conv.keep)

    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    is_wide = weight.dim() == 4 and weight[0, 0].numel() > 1
    if is_heavy and fits and is_wide and x.device.type == "cpu" and not x.is_contiguous():
        return Start((x,), begin, lambda: _as_contiguous(partial(conv.function, **options), x, weight, bias))
    if may_be_zero or not fits or not conv.folding.waits(x, weight, bias):
        return Start((x,), begin)
    waiting = Waiting(conv.function, conv.keep(x), conv.keep(weight), options)
    return Start((x,), begin, lambda: waiting.empty(windows), waiting=waiting)


def _as_contiguous(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution whose weights are many: for an image channels last torch would rearrange them at each call."""
    return function(x.contiguous(), weight, bias).contiguous(memory_format=torch.channels_last)


def _passing(call: Call, form: Any, function: Callable[..., Tensor]) -> Start | None:
    x = call.args[0]
    before = producer(x)
    if before is None or before.takes == GRADIENT:
        return None
    bounds = [value for value in call.args[1:2] if isinstance(value, (int, float))]
    is_positive = function in rules.RELUS or (call.name == "hardtanh" and bool(bounds) and bounds[0] >= 0)
    if form is rules.activation:
        if not _is_zero_at_zero(function, x, call):
            return None
        spared = before.o if isinstance(before, Sum) and function is rules.RELUS[0] else None
        passing = Passing(before.takes, is_positive, has_zeros=True)
        return Start((x,), lambda _: passing, is_kinked=function in rules.KINKED, spared=spared)
    if form is rules.shift and before.has_zeros:
        return None  # a shift turns zeros into numbers, whose relevance has nowhere to go
    if call.name != "batch_norm" and any(_widens(x, other) for other in call.args[1:2]):
        return None
    return Start((x,), lambda _: Passing(before.takes, is_positive=False, has_zeros=form is rules.gate))


def _is_zero_at_zero(function: Callable[..., Tensor], x: Tensor, call: Call) -> bool:
    if function in rules.KINKED and len(call.args) == 1 and not call.kwargs:
        return True
    rest = call.args[1:], tuple(call.kwargs.items())
    if operators.tensors(rest):
        with untraced():
            return not function(x.new_zeros(1), *call.args[1:], **call.kwargs).any()
    return _keeps_zero(function, *rest)


@lru_cache(maxsize=512)
def _keeps_zero(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    with untraced():
        return not function(torch.zeros(1), *args, **dict(kwargs)).any()


def _widens(x: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor):
        return False
    return bool(torch.broadcast_shapes(x.shape, other.shape) != x.shape)  # type: ignore[no-untyped-call]


def _sum(call: Call, keep: Keep) -> Start | None:
    if len(call.args) != 2 or call.kwargs or not all(isinstance(t, Tensor) and t.requires_grad for t in call.args):
        return None
    a, b = call.args
    before = producer(a), producer(b)
    if before[0] is None or before[1] is None or a.shape != b.shape or a.dtype != b.dtype:
        return None
    below = before[0].takes, before[1].takes
    has_zeros = before[0].has_zeros and before[1].has_zeros
    return Start((a, b), lambda o: Sum(b, o, below, has_zeros, keep))


def _mean(x: Tensor, keep: Keep, dim: Any = None, keepdim: bool = False, **options: Any) -> Start | None:
    """The mean over all positions."""
    dims = (dim,) if isinstance(dim, int) else dim
    is_whole = isinstance(dims, (tuple, list)) and sorted(d % x.dim() for d in dims) == [*range(2, x.dim())]
    if options or not is_whole or x.dim() < 3 or _taken(x) == GRADIENT:
        return None
    return Start((x,), lambda _: Mean(x, keep))


def _pool(x: Tensor, keep: Keep, output_size: Any) -> Start | None:
    if x.dim() != 4 or output_size not in (1, (1, 1), [1, 1]):
        return None
    begun = _mean(x, keep, (2, 3))
    return None if begun is None else replace(begun, run=lambda: x.mean((2, 3), keepdim=True))


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Start | None:
    if x.dim() != 4 or return_indices or producer(x) is None:
        return None
    below, is_positive = _taken(x), _is_positive(x)
    steps = stride if stride is not None and stride != [] else kernel_size
    pairs = [[n, n] if isinstance(n, int) else list(n) for n in (kernel_size, steps, padding, dilation)]
    places: list[Tensor] = []

    def run() -> Tensor:
        o: Tensor
        o, indices = torch.ops.aten.max_pool2d_with_indices(x, *pairs, ceil_mode)
        places.append(indices)
        return o

    return Start((x,), lambda _: MaxPool(x, places[0], (*pairs, ceil_mode), below, is_positive), run)
