"""Being written down as a graph: what is decided then is decided for every later call, so no value may decide it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

__all__ = ["holds", "is_traced", "untraced"]

_NOTHING = nullcontext()


def is_traced() -> bool:
    """Tell whether ``torch.fx.experimental.proxy_tensor.make_fx`` is writing down what runs here.

    Example:
        >>> is_traced()
        False
    """
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def holds(condition: Tensor) -> bool:
    """Tell whether a condition holds anywhere; of what is traced, that it may.

    For work that changes nothing where the condition does not hold.

    Example:
        >>> holds(torch.tensor([1.0, -1.0]) < 0)
        True
    """
    return is_traced() or bool(condition.any())


def untraced() -> AbstractContextManager[Any]:
    """Run the body beside the graph: it tells what is so whatever the images are, of shapes and weights.

    Example:
        >>> with untraced():
        ...     int(torch.ones(3).count_nonzero())
        3
    """
    return disable_proxy_modes_tracing() if is_traced() else _NOTHING
