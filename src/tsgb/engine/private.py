"""The names of torch that are not public, in one place: what a new release of torch may move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import _pop_mode_temporarily

__all__ = ["below_autograd", "can_decompose", "is_traced", "share_storage", "storage_key", "untraced", "without_tape"]


@contextmanager
def below_autograd() -> Iterator[None]:
    """Dispatch below autograd, where composite operators arrive whole and no graph is built."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


def can_decompose(operator: Any) -> bool:
    """Tell whether an operator is a composite of others, which ``operator.decompose`` runs."""
    return bool(operator._can_decompose())


def share_storage(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors lie in the same memory; alias annotations of schemas do not say."""
    return bool(torch._C._is_alias_of(one, other))  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int | None:
    """Identify the memory of a tensor while it lives; None for a tensor without memory of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def without_tape(tensor: Tensor) -> Tensor:
    """Copy a tensor beside the innermost dispatch mode, which is the tape; a trace sees the copy."""
    with _pop_mode_temporarily():
        return tensor.detach().clone()


def is_traced() -> bool:
    """Tell whether ``torch.fx.experimental.proxy_tensor.make_fx`` traces what runs here."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def untraced() -> AbstractContextManager[Any]:
    """Run the body beside the graph that is traced: for facts of weights and shapes, which no image changes."""
    return disable_proxy_modes_tracing() if is_traced() else nullcontext()
