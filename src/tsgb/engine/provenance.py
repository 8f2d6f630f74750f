"""Which tensors were there before the forward: parameters, buffers, attributes, arguments, what a function holds.

A tensor that the forward meets and that neither was there before nor was computed by a call that the tape saw came by
NumPy, another thread or a write behind torch's back. It may depend on the image, so it is not taken for a constant.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .operators import Operator
from .private import storage_key
from .supported import CoverageError

__all__ = ["Constants", "storages_before"]

_DEPTH = 4  # of containers and objects in one another


class Constants:
    """The tensors of one forward that do not depend on the image, as far as that is known.

    Args:
        before: the memory of tensors that were there before, see `storages_before`.

    Attributes:
        has_left: whether values of the image have left torch, as ``Tensor.numpy`` and ``tolist`` let them.
    """

    def __init__(self, before: set[int]) -> None:
        self.has_left = False
        self._before: set[int | None] = {*before}
        self._known: dict[int, weakref.ref[Tensor]] = {}  # results of calls that were seen
        self._cut: dict[int, weakref.ref[Tensor]] = {}  # those that hold values of the image, cut off by ``detach``
        self._exported: set[int | None] = set()  # memory that NumPy was given, and may write on
        self._uninitialised: dict[int | None, Tensor] = {}  # memory that holds no values yet

    def run(self, func: Any, operator: Operator, args: Any, kwargs: Any, constants: Sequence[Tensor]) -> Any:
        """Run an operator on constants; what it gives is known if they are."""
        written = None if not operator.writes else kwargs["out"] if operator.is_out else args[0]
        is_known = all(self.is_known(t) for t in constants if t is not written or operator.role == "cut")
        if is_known and operator.role != "cut":
            self._has_written(written)
        output = func(*args, **kwargs)
        is_cut = bool(self._cut) and any(self._is_cut(t) for t in constants)
        if operator.role == "leaving":
            self.has_left |= is_cut
            self._exported.update(key for t in constants if (key := storage_key(t)) not in self._before)
        if operator.role == "fresh":  # made of numbers, or of an array
            is_known = is_known or not self.has_left or constants[0].dim() == 0
        for o in output if isinstance(output, (list, tuple)) else [output]:
            if not isinstance(o, Tensor) or o is written:
                continue
            if operator.is_uninitialised and o.numel():
                self._uninitialised[storage_key(o)] = o
            elif is_known:
                self._known[id(o)] = weakref.ref(o)
                if is_cut:
                    self._cut[id(o)] = self._known[id(o)]
        return output

    def cut(self, t: Tensor) -> Tensor:
        """Take what was cut off from the image on purpose for a constant."""
        self._known[id(t)] = self._cut[id(t)] = weakref.ref(t)
        return t

    def is_known(self, t: Tensor) -> bool:
        """Tell whether a tensor was there before the forward, or was computed by a call that was seen."""
        key = storage_key(t)
        if isinstance(t, nn.Parameter) or key in self._before:
            return True
        known = self._known.get(id(t))
        return known is not None and known() is t and key not in self._exported

    def check(self, func: Any, constants: Sequence[Tensor], written: Any) -> None:
        """Refuse constants that are not known where they meet a value; what is written becomes known.

        Raises:
            CoverageError: says where such tensors come from, and what to do.
        """
        if not all(self.is_known(t) for t in constants if t is not written):
            raise CoverageError(_UNKNOWN.format(func.name(), "meets"))
        self._has_written(written)

    def check_write(self, func: Any, written: Tensor, is_shared: Callable[[Tensor], bool]) -> None:
        """Refuse a write on a constant that lies in the memory of a value.

        Raises:
            CoverageError: as `check`.
        """
        if is_shared(written):
            raise CoverageError(_UNKNOWN.format(func.name(), "writes on"))

    def _has_written(self, t: Any) -> None:
        """Take memory that held no values for known, once a call that was seen has written on it."""
        if isinstance(t, Tensor) and (key := storage_key(t)) in self._uninitialised:
            self._before.add(key)

    def _is_cut(self, t: Tensor) -> bool:
        cut = self._cut.get(id(t))
        return cut is not None and cut() is t


_UNKNOWN = (
    "the model's {} {} a tensor that was neither there before the forward nor computed by torch operators in this "
    "thread (it came through NumPy, another thread, or memory written behind torch's back), so it cannot be told "
    "whether it depends on the image: compute it with torch, or register it as a buffer"
)
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (str, bytes, int, float, bool, torch.dtype, torch.device, type, type(None))  # holds no tensor


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
    elif isinstance(value, _PLAIN) or id(value) in seen or depth < 0:
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
            elif name not in _OF_ANY_MODULE and not (
                isinstance(held, _PLAIN) or (type(held) is tuple and all(isinstance(h, _PLAIN) for h in held))
            ):
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
    graph: Any = module.inlined_graph  # nodes live as long as it does
    for node in graph.findAllNodes("prim::Constant", recurse=True):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.t("value")
