"""Batch norm folded into the convolution before it, which waits until it is known what reads its output.

Relevance passes batch norm unchanged, so nothing asks for what lies between the two::

    batch_norm(conv(x, w)) = conv(x, s w) + (bias - s mean),        s = weight / sqrt(var + eps)

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
from .saved import Cell
from .windows import Windows

__all__ = ["FOLDED", "UNREAD", "FoldedError", "Folding", "Waiting"]

FOLDED = "batch_norm"

#: Calls that read no value of a tensor; of the folded one it is seen to elsewhere.
UNREAD = {FOLDED, "dim", "size", "shape", "ndim", "dtype", "device", "numel", "requires_grad", "is_floating_point"}

_WITH = ("", "_with_indices")
_CHOOSING = {f"{kind}max_pool{n}d{what}" for kind in ("", "adaptive_") for n in (1, 2, 3) for what in _WITH}
_CHOOSING |= {"amax", "argmax", "max", "maximum", "sort", "topk"}


class FoldedError(Exception):
    """A max pooling came after what was folded: the model has to be run without that."""


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

    def fold(self, waiting: Waiting, *args: Any, **kwargs: Any) -> Tensor:
        """Run a convolution with the batch norm after it."""
        self._has_folded = True
        return waiting.folded(*args, **kwargs)


class Waiting(Cell):
    """The output of a convolution without bias that has not been worked out.

    Args:
        function: the convolution, of ``x``, ``weight`` and ``options``.
        x: (N, C, *in). ``weight``: (O, C / groups, *k).
        options: stride, padding, dilation and groups by name, as they came.
    """

    def __init__(self, function: Callable[..., Tensor], x: Cell, weight: Cell, options: dict[str, Any]) -> None:
        self._function, self._x, self._weight, self._options = function, x, weight, options
        self.is_spared = False

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """The output."""
        return self._run(self._weight.tensor, None)

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
    ) -> Tensor:
        """The output of the batch norm that follows."""
        scale = (running_var + eps).rsqrt_()
        if weight is not None:
            scale *= weight
        shift = -running_mean * scale if bias is None else torch.addcmul(bias, running_mean, scale, value=-1)
        kernels = self._weight.tensor
        return self._run(kernels * scale.reshape(-1, *[1] * (kernels.dim() - 1)), shift)

    def _run(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = self._x.tensor
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # as it was when the convolution was called
                return self._function(x, weight, bias, **self._options)
        return self._function(x, weight, bias, **self._options)
