"""Batch norm folded into the convolution before it, which waits until it is known what reads its output.

Relevance passes batch norm unchanged, so nothing asks for what lies between the two::

    batch_norm(conv(x, w)) = conv(x, s w) + (bias - s mean),        s = weight / sqrt(var + eps)

A convolution that waits has two outputs in autograd's graph, its own and that of the batch norm after it, which so
needs no node of its own; nor does a rectifier that writes on the latter before anything has read it.

The last digits are not those of the model, and max pooling chooses by them between values that are nearly the same. So
nothing is folded below a max pooling, or another operator that chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import rules
from ..tracing import is_traced
from . import graph
from .handing import Passing
from .operators import Call
from .saved import Cell, Kept
from .windows import Windows

__all__ = ["LATE", "UNREAD", "FoldedError", "Folding", "Waiting", "bounds"]

_FOLDED = "batch_norm"
_WRITING = {"relu", "relu6", "hardtanh"}  # rectifiers, which may write on what waits

#: Calls that may run with the convolution that they follow.
LATE = {_FOLDED, *_WRITING}

#: Calls that read no value of a tensor.
UNREAD = {"dim", "size", "shape", "ndim", "dtype", "device", "numel", "requires_grad", "is_floating_point"}

_WITH = ("", "_with_indices")
_CHOOSING = {f"{kind}max_pool{n}d{what}" for kind in ("", "adaptive_") for n in (1, 2, 3) for what in _WITH}
_CHOOSING |= {"amax", "argmax", "max", "maximum", "sort", "topk"}


class FoldedError(Exception):
    """A max pooling came after what was folded, or it is the head: the model has to be run without that."""


class Folding:
    """Where in a forward batch norm is folded.

    Args:
        table: of rules; its batch norm has to pass relevance unchanged.
        pools: how many max poolings the model is known to have; None folds nothing.

    Example:
        >>> folding = Folding(rules.DEFAULT, pools=1)
        >>> folding.is_on, folding.meet("max_pool2d"), folding.is_on
        (False, None, True)
    """

    def __init__(self, table: rules.Table, pools: int | None) -> None:
        rule = table.get(functional.batch_norm)
        passes_on = isinstance(rule, partial) and rule.func is rules.shift
        self._left = pools if passes_on else None
        self._has_folded = False
        self.is_spoiled = False  # whether a max pooling came after; the model may have caught the error

    @property
    def is_on(self) -> bool:
        """Whether no max pooling is known to come."""
        return self._left == 0

    def meet(self, name: str) -> None:
        """Look at an operator that is about to run.

        Raises:
            FoldedError: it chooses among values, which have the digits of another computation.
        """
        if name in _CHOOSING and self._left is not None:
            if self._has_folded:
                self.is_spoiled = True
                raise FoldedError
            self._left = max(0, self._left - 1)

    def waits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Tell whether a convolution waits: in float32 alone, as in float64 the model's own digits are kept."""
        if not self.is_on or bias is not None or is_traced() or torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype == weight.dtype == torch.float32 and x.dim() == weight.dim()

    def take(self, call: Call, rule: Callable[..., Tensor], kept: Kept) -> Tensor | None:
        """Let a call wait with the convolution that it follows: its output; None where it has to run.

        Args:
            call: one of those that are `LATE`. ``rule``: what it met. ``kept``: knows what waits.
        """
        x: Tensor = call.args[0]
        waiting, ruling = kept.waits(x), graph.ruling_of(x.grad_fn)
        if not isinstance(waiting, Waiting) or ruling is None or ruling.handing is None:
            return None
        if call.name == _FOLDED:
            output = kept.after(x)
            if output is not None:
                self._has_folded = True
                kept.wait(output, waiting.folded(*call.args[1:], **call.kwargs))
                ruling.passing = Passing(ruling.handing.takes, False, True, ruling.handing.is_last)
            return output
        clamp = bounds(call) if call.inplace is x and x.output_nr and not waiting.has_rectifier else None
        if clamp is None or clamp[0] != 0 or not isinstance(rule, partial) or rule.func is not rules.activation:
            return None
        waiting.rectify(*clamp)
        ruling.passing = Passing(ruling.handing.takes, True, True, ruling.handing.is_last)
        ruling.rectifier = call.name
        return x


class Waiting(Cell):
    """The output of a convolution that has not been worked out.

    Args:
        function: the convolution, of ``x``, ``weight``, ``bias`` and ``options``.
        x: (N, C, *in). ``weight``: (O, C / groups, *k). ``bias``: (O,) or None.
        options: stride, padding, dilation and groups by name, as they came.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        x: Cell,
        weight: Cell,
        options: dict[str, Any],
        bias: Tensor | None = None,
    ) -> None:
        self._function, self._x, self._weight, self._bias, self._options = function, x, weight, bias, options
        self._bounds: tuple[float, float] | None = None
        self.is_spared = False

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """The output."""
        x = self._x.tensor
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # as it was when the convolution was called
                return self._run(x)
        return self._run(x)

    @property
    def has_rectifier(self) -> bool:
        """Whether the output is rectified."""
        return self._bounds is not None

    def rectify(self, low: float, high: float) -> None:
        """Clamp the output."""
        self._bounds = low, high

    def empty(self, windows: Windows) -> Tensor:
        """A tensor of the output's shape, in the memory of one value."""
        x = self._x.tensor
        shape = x.shape[0], self._weight.tensor.shape[0], *windows.count(x.shape[2:])
        return torch.empty_strided(shape, [0] * len(shape), dtype=x.dtype, device=x.device)

    def folded(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Waiting:
        """The output of the batch norm that follows, which waits in its turn."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            scale = (running_var + eps).rsqrt_()
            if weight is not None:
                scale *= weight
            shift = -running_mean * scale if bias is None else torch.addcmul(bias, running_mean, scale, value=-1)
            kernels = self._weight.tensor
            scaled = kernels * scale.reshape(-1, *[1] * (kernels.dim() - 1))
        return Waiting(self._function, self._x, Cell(scaled), self._options, shift)

    def _run(self, x: Tensor) -> Tensor:
        o = self._function(x, self._weight.tensor, self._bias, **self._options)
        return o if self._bounds is None else o.clamp_(*self._bounds)


def bounds(call: Call) -> tuple[float, float] | None:
    """Between which values a rectifier clamps; None where that is not known, or it is none.

    Example:
        >>> bounds(Call("relu6", (torch.ones(1),), {})), bounds(Call("silu", (torch.ones(1),), {}))
        ((0.0, 6.0), None)
    """
    if call.kwargs or call.name not in _WRITING:
        return None
    if call.name != "hardtanh":
        return (0.0, 6.0 if call.name == "relu6" else float("inf")) if len(call.args) == 1 else None
    given = call.args[1:]
    return given if len(given) == 2 and all(isinstance(value, (int, float)) for value in given) else None
