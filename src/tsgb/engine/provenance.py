"""Which tensors were there before the forward: parameters, buffers, attributes, arguments, what a function holds.

A tensor that the forward meets and that neither was there before nor was computed by a call that the tape saw came by
NumPy, another thread or a write behind torch's back. It may depend on the image, so it is not taken for a constant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .private import storage_key

__all__ = ["storages_before"]

_DEPTH = 4  # of containers and objects in one another


def storages_before(model: Callable[..., Any], *more: Any) -> set[int]:
    """Identify the memory of all tensors that a model and other objects hold.

    Example:
        >>> len(storages_before(nn.Linear(2, 3)))
        2
    """
    seen: set[int] = set()
    return {key for root in (model, *more) for t in _tensors(root, seen, _DEPTH) if (key := storage_key(t)) is not None}


def _tensors(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is None or isinstance(value, (str, bytes, int, float, bool, torch.dtype, torch.device, type)):
        return
    elif id(value) in seen or depth < 0:
        return
    elif isinstance(value, torch.jit.ScriptModule):
        seen.add(id(value))
        yield from value.parameters()
        yield from value.buffers()
        yield from _traced_constants(value)
    elif isinstance(value, nn.Module):
        seen.add(id(value))
        state = value.__dict__
        yield from (t for t in state["_parameters"].values() if t is not None)
        yield from (t for t in state["_buffers"].values() if t is not None)
        for name, held in state.items():
            if name == "_modules":
                for child in held.values():
                    yield from _tensors(child, seen, _DEPTH)
            elif name[:1] != "_" or name.endswith("_impl") or isinstance(held, Tensor):
                yield from _tensors(held, seen, depth - 1)
    else:
        seen.add(id(value))
        for part in _parts(value):
            yield from _tensors(part, seen, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    """Give what an object holds: items, attributes, and of a function what its code can reach."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
    elif inspect.isfunction(value):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)
        if hasattr(value, "__wrapped__"):
            yield value.__wrapped__
    elif hasattr(value, "__dict__") and not inspect.ismodule(value):
        yield from vars(value).values()
        yield from (held for name, held in vars(type(value)).items() if not name.startswith("__"))
        if "__call__" in vars(type(value)):
            yield type(value).__call__


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _traced_constants(module: torch.jit.ScriptModule) -> Iterator[Tensor]:
    """Give the tensors that a trace has written into its graph."""
    graph = module.inlined_graph  # nodes live as long as it does
    for node in graph.findAllNodes("prim::Constant", recurse=True):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.t("value")
