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
from .folding import Folding, Waiting, bounds
from .handing import GRADIENT, Convolution, Handing, Image, Masked, Passing, Takes
from .joining import Concatenation, Sum
from .operators import Call
from .pooling import AveragePool, MaxPool, Mean
from .ruling import Ruling
from .saved import Cell
from .windows import Windows

__all__ = ["Start", "producer", "start"]

Keep = Callable[[Tensor], Cell]

_FEW = 2**14  # values of a constant factor that are looked at for zeros


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


def start(call: Call, ruling: Ruling, keep: Keep, folding: Folding) -> Start | None:
    """Begin to hand relevance on, where the rule can and what came before takes relevance; else None.

    Args:
        call: the operator, its first operand the signal. ``ruling``: what it met.
        keep: makes cells. ``folding``: which convolutions wait.
    """
    rule: Any = ruling.rule
    function = ruling.function
    form = rule.func if isinstance(rule, partial) else rule  # one in its plain form is not known here
    if form in (rules.conv, rules.conv_lumped):
        conv = _Conv(function, form is rules.conv_lumped, ruling.parts, ruling.carries, keep, folding)
        return _convolution(conv, call.args[0], *call.args[1:], **call.kwargs)
    if form is rules.linear:
        return _linear(keep, call.args[0], *call.args[1:], **call.kwargs)
    if form in (rules.activation, rules.shift, rules.gate):
        return _passing(call, form, function)
    if rule == rules.ORDINARY and call.name in _ORDINARY:
        return _ORDINARY[call.name](call, keep)
    return None


def producer(x: Tensor) -> Handing | None:
    """What handed relevance on to where a tensor came from, if anything does."""
    ruling: Ruling | None = getattr(x.grad_fn, "ruling", None)
    return None if ruling is None else ruling.passing if x.output_nr else ruling.handing


def _taken(x: Tensor, is_last: bool = False) -> Takes:
    """What the producer takes of one that has the channels where it has them."""
    handing = producer(x)
    return GRADIENT if handing is None or handing.is_last != is_last else handing.takes


def _carries(x: Tensor) -> bool:
    """Tell whether zeros of a convolution share what a shift right after it gives them, as after others they do not."""
    ruling: Ruling | None = getattr(x.grad_fn, "ruling", None)
    return ruling is not None and ruling.carries and x.output_nr == 0


def _is_positive(x: Tensor) -> bool:
    handing = producer(x)
    return handing is not None and handing.is_positive


@dataclass(slots=True)
class _Conv:
    function: Callable[..., Tensor]
    is_lumped: bool
    parts: int  # images side by side in the channels
    carries: bool
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
    fields, below, is_positive = conv.parts if conv.is_lumped else groups, _taken(x), _is_positive(x)
    is_first = isinstance(producer(x), Image)
    windows = Windows.of(weight.shape[2:], stride, padding, dilation)
    count = windows.count(x.shape[2:])
    # What the convolution would refuse, it is to refuse where it is called.
    fits = x.shape[1] == weight.shape[1] * groups and min(count) > 0 and x.device == weight.device
    # Weights more than values of the output take longer to read, and to scale, than the output.
    is_heavy = x.shape[0] * weight.shape[0] * math.prod(count) < weight.numel() and not is_traced()
    # An output that is 0 has no relevance, though a shift after it hands some on, but where the table has it carry
    # that. Where no weight is 0 this is so only where nothing is seen, and lost anyway; unless groups share as one, of
    # which one sees nothing and others do.
    with untraced():
        is_apart = conv.is_lumped and groups > 1
        may_be_zero = not conv.carries and _may_be_zero(weight, bias, is_heavy or is_apart)

    def begin(o: Tensor) -> Convolution:
        has_zeros = int(o.count_nonzero()) < o.numel() if may_be_zero and is_heavy else may_be_zero
        alive = o != 0 if has_zeros else None
        made = Convolution(
            x, alive, windows, fields, below, is_positive, conv.keep, bias is not None, is_first=is_first
        )
        made.has_zeros = conv.carries
        return made

    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    is_wide = weight.dim() == 4 and weight[0, 0].numel() > 1
    if is_heavy and fits and is_wide and x.device.type == "cpu" and not x.is_contiguous():
        return Start((x,), begin, lambda: _as_contiguous(partial(conv.function, **options), x, weight, bias))
    if may_be_zero or not fits or not conv.folding.waits(x, weight, bias):
        return Start((x,), begin)
    waiting = Waiting(conv.function, conv.keep(x), conv.keep(weight), options)
    return Start((x,), begin, lambda: waiting.empty(windows), waiting=waiting)


def _may_be_zero(weight: Tensor, bias: Tensor | None, whatever_weights: bool = False) -> bool:
    """Tell whether an output may be 0 of itself, as where weights were pruned."""
    return (bias is None or _holds_zero(bias)) and (whatever_weights or _holds_zero(weight))


def _holds_zero(weight: Tensor) -> bool:
    if not weight.is_floating_point():
        return not bool(weight.all())
    return weight.numel() > 0 and not bool(weight.abs().amin())  # half the time of a count of the zeros


def _as_contiguous(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution whose weights are many: for an image channels last torch would rearrange them at each call."""
    return function(x.contiguous(), weight, bias).contiguous(memory_format=torch.channels_last)


def _linear(keep: Keep, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Start | None:
    """A linear layer on positions, which is a convolution of 1 x 1."""
    handing = producer(x)
    if x.dim() < 3 or x.shape[1:-1].numel() == 1 or (handing is not None and not handing.is_last):
        return None
    windows, below, is_positive = Windows.of((1,) * (x.dim() - 2), 1, 0, 1), _taken(x, is_last=True), _is_positive(x)
    with untraced():
        may_be_zero = _may_be_zero(weight, bias)
    if may_be_zero:
        return None
    has_bias = bias is not None
    return Start((x,), lambda _: Convolution(x, None, windows, 1, below, is_positive, keep, has_bias, is_last=True))


def _passing(call: Call, form: Any, function: Callable[..., Tensor]) -> Start | None:
    x = call.args[0]
    before = producer(x)
    if before is None or before.takes == GRADIENT:
        return None
    clamp = bounds(call)
    is_positive = clamp is not None and clamp[0] >= 0
    if form is rules.activation:
        if not _is_zero_at_zero(function, x, call):
            return None
        # Nothing arrives where a rectifier sets the sum to 0, if no other call reads the sum.
        is_only = before.readers == 1 and function is rules.RELUS[0]
        spared = before.o if is_only and isinstance(before, Sum) else None
        passing = Passing(before.takes, is_positive, True, before.is_last)
        return Start((x,), lambda _: passing, is_kinked=function in rules.KINKED, spared=spared)
    if call.name != "batch_norm" and any(_widens(x, other) for other in call.args[1:2]):
        return None
    if form is rules.shift and before.has_zeros and not _carries(x):
        masked = Masked(x, before.takes, before.is_last)  # before an in-place call writes on x
        return Start((x,), lambda _: masked)
    return Start((x,), lambda _: Passing(before.takes, False, True, before.is_last))


def _scaled(call: Call, keep: Keep) -> Start | None:
    """A constant factor, as layer scale: what it makes of a value and of its gradient leaves their product."""
    if len(call.args) != 2 or call.kwargs or not isinstance(call.args[0], Tensor):
        return None
    x, factor = call.args
    before = producer(x)
    if (
        before is None
        or before.takes == GRADIENT
        or any(t.requires_grad for t in operators.tensors(factor))
        or _widens(x, factor)
    ):
        return None
    if isinstance(factor, Tensor):
        if factor.numel() > _FEW:
            return None
        with untraced():
            may_be_zero = _holds_zero(factor)
    elif isinstance(factor, (int, float)):
        may_be_zero = factor == 0
    else:
        return None
    return Start((x,), lambda _: Passing(before.takes, False, before.has_zeros or may_be_zero, before.is_last))


def _moved(call: Call, keep: Keep) -> Start | None:
    """Channels moved to the end, or back from there."""
    x = call.args[0]
    before = producer(x)
    if before is None or before.takes == GRADIENT or call.kwargs:
        return None
    places = [d % x.dim() for d in call.args[1]]
    moved = [0, *range(2, x.dim()), 1] if not before.is_last else [0, x.dim() - 1, *range(1, x.dim() - 1)]
    if x.dim() < 4 or places != moved:
        return None
    return Start((x,), lambda _: Passing(before.takes, before.is_positive, before.has_zeros, not before.is_last))


def _is_zero_at_zero(function: Callable[..., Tensor], x: Tensor, call: Call) -> bool:
    if function in rules.KINKED and len(call.args) == 1 and not call.kwargs:
        return True
    rest = call.args[1:], tuple(call.kwargs.items())
    if operators.tensors(rest):
        with untraced():
            return not function(torch.zeros_like(x[:1]), *call.args[1:], **call.kwargs).any()
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
    is_last = before[0].is_last
    if before[1].is_last != is_last:
        return None
    below = before[0].takes, before[1].takes
    return Start((a, b), lambda o: Sum(b, o, below, keep, is_last))


def _concatenation(call: Call, keep: Keep) -> Start | None:
    tensors, dim = call.args[0], call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or set(call.kwargs) - {"dim"} or not isinstance(dim, int):
        return None
    if any(not t.requires_grad or t.dim() < 3 or dim % t.dim() != 1 for t in tensors):
        return None
    found = [producer(t) for t in tensors]
    before = [handing for handing in found if handing is not None and handing.takes != GRADIENT]
    if len(before) < len(tensors) or any(handing.is_last for handing in before):
        return None
    joined = Concatenation(
        [t.shape[1] for t in tensors],
        [handing.takes for handing in before],
        all(handing.is_positive for handing in before),
        any(handing.has_zeros for handing in before),
    )
    return Start(tuple(tensors), lambda _: joined)


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
    before = producer(x)
    if x.dim() != 4 or return_indices or before is None or before.is_last:
        return None
    below, is_positive = before.takes, before.is_positive
    steps = stride if stride is not None and stride != [] else kernel_size
    pairs = [_pair(n) for n in (kernel_size, steps, padding, dilation)]
    places: list[Tensor] = []

    def run() -> Tensor:
        o: Tensor
        o, indices = torch.ops.aten.max_pool2d_with_indices(x, *pairs, ceil_mode)
        places.append(indices)
        return o

    return Start((x,), lambda _: MaxPool(x, places[0], (*pairs, ceil_mode), below, is_positive), run)


def _average_pool(
    x: Tensor,
    keep: Keep,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Start | None:
    if x.dim() != 4 or _taken(x) == GRADIENT:
        return None
    steps = kernel_size if stride is None or stride == [] else stride
    pairs = [_pair(n) for n in (kernel_size, steps, padding)]
    arguments = (*pairs, ceil_mode, count_include_pad, divisor_override)
    below = _taken(x)
    return Start((x,), lambda o: AveragePool(x, o, arguments, below, keep))


def _pair(value: Any) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * 2 if len(given) == 1 else given


_ORDINARY: dict[str, Callable[[Call, Keep], Start | None]] = {
    "add": _sum,
    "cat": _concatenation,
    "mul": _scaled,
    "div": _scaled,
    "permute": _moved,
    "max_pool2d": lambda call, keep: _max_pool(call.args[0], *call.args[1:], **call.kwargs),
    "avg_pool2d": lambda call, keep: _average_pool(call.args[0], keep, *call.args[1:], **call.kwargs),
    "mean": lambda call, keep: _mean(call.args[0], keep, *call.args[1:], **call.kwargs),
    "adaptive_avg_pool2d": lambda call, keep: _pool(call.args[0], keep, *call.args[1:], **call.kwargs),
}
