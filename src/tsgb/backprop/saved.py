"""What backward needs, kept from in-place calls; and the random state, from the model's own draws."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import operators
from .relevance import LostError


class Cell:
    """What autograd saved; weakly known to `Kept`, held by the graph alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.is_spared = False


class Kept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copy on write: a tensor that backward needs is cloned before an in-place call changes it.

    A network may be right in inference and yet overwrite what a gradient needs (``y = conv(x); x += y``).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._states: tuple[Any, ...] | None = None
        self._cells: dict[int, list[weakref.ref[Cell]]] = {}
        self.torn: dict[int, Tensor] = {}  # copies in place of views, by their storage
        # Tensors not worked out yet, by their storage, and what a call that follows is to return.
        self.waiting: dict[int, tuple[weakref.ref[Tensor], Cell, Tensor | None]] = {}

    def pack(self, tensor: Tensor) -> Cell:
        """Take what autograd saves."""
        # An output in the hands of its own node would keep the graph alive, unseen by the collector, until it is run.
        cell = Cell(tensor.detach())
        self._cells.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(cell))
        return cell

    @staticmethod
    def unpack(cell: Cell) -> Tensor:
        """Give it back as it was."""
        return cell.tensor

    def wait(self, tensor: Tensor, cell: Cell, after: Tensor | None = None) -> None:
        """Let a tensor be worked out when it is read; the cell will have it. ``after``: see `after`."""
        key = _storage(tensor)
        forget = weakref.ref(tensor, lambda _: self.waiting.pop(key, None))
        self.waiting[key] = forget, cell, after

    def waits(self, tensor: Tensor) -> Cell | None:
        """What will have a tensor that is not worked out yet, else None."""
        found = self.waiting.get(_storage(tensor)) if self.waiting else None
        return None if found is None else found[1]

    def after(self, tensor: Tensor) -> Tensor | None:
        """The output of a call that follows one that waits, which is given once."""
        found = self.waiting.get(_storage(tensor))
        if found is None:
            return None
        self.waiting[_storage(tensor)] = *found[:2], None
        return found[2]

    def settle(self, tensors: Iterable[Tensor]) -> None:
        """Work out what is about to be read."""
        if not self.waiting:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for tensor in tensors:
                reference, cell, _ = self.waiting.pop(_storage(tensor), (None, None, None))
                whole = None if reference is None else reference()
                if whole is not None and cell is not None:
                    is_on = self.leave()
                    try:
                        whole.data = cell.tensor
                    finally:
                        self.resume(is_on)

    def settle_all(self) -> None:
        """Work out what is left and can still be read."""
        self.settle([t for t in [reference() for reference, *_ in self.waiting.values()] if t is not None])

    def leave(self) -> bool:
        """Stop watching, for what writes on nothing that is kept and draws no random numbers; tell whether it did."""
        count: int = torch._C._len_torch_dispatch_stack()
        is_on = count > 0 and torch._C._get_dispatch_stack_at(count - 1) is self
        if is_on:
            torch._C._pop_torch_dispatch_stack(None)
        return is_on

    def resume(self, is_on: bool) -> None:
        """Watch on, after what `leave` told."""
        if is_on:
            torch._C._push_on_torch_dispatch_stack(self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the body watched, within one that is not."""
        is_on = self.leave()
        self.resume(True)
        try:
            yield
        finally:
            self.leave()
            self.resume(is_on)

    def is_innermost(self) -> bool:
        """Tell whether what autograd saves now comes to `pack`, not to later hooks; False where torch cannot say."""
        ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        hooks = None if ask is None else ask(True)
        return hooks is not None and hooks[0] == self.pack

    @contextmanager
    def sparing(self, cell: Cell | None) -> Iterator[None]:
        """Let the body write on one tensor that is kept."""
        if cell is not None:
            cell.is_spared = True
        try:
            yield
        finally:
            if cell is not None:
                cell.is_spared = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.waiting:  # and read behind the back of torch's functions
            self.settle(operators.tensors((args, kwargs)))
        if torch.Tag.nondeterministic_seeded in func.tags and self._states is None:
            self._states = torch.get_rng_state(), _cuda_states()
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in operators.tensors(written):
                    self.copy(tensor)
        return func(*args, **kwargs)

    def restore_random_state(self) -> None:
        """Undo the model's own draws; where it drew nothing, other threads' draws are left alone."""
        if self._states is not None:
            torch.set_rng_state(self._states[0])
            for device, state in enumerate(self._states[1]):
                torch.cuda.set_rng_state(state, device)

    def copy(self, tensor: Tensor) -> None:
        """Copy what is kept of a tensor that is about to be written on."""
        copies: dict[Any, Tensor] = {}  # one for all cells that hold the same view
        storage = tensor.untyped_storage()._cdata
        if storage in self.torn:
            raise LostError("the model writes on a view that was copied")
        for reference in self._cells.pop(storage, []):
            cell = reference()
            if cell is not None and cell.is_spared:
                self._cells.setdefault(storage, []).append(reference)
            elif cell is not None:
                view = cell.tensor.data_ptr(), cell.tensor.shape, cell.tensor.stride(), cell.tensor.dtype
                if view not in copies:
                    copies[view] = cell.tensor.clone()
                cell.tensor = copies[view]


def separate(args: tuple[Any, ...], outputs: Any) -> Any:
    """Let views that one call returned together (``x.chunk(2)``) be written in place, as they may be without grad."""
    if type(outputs) not in (tuple, list) or not args or not isinstance(args[0], Tensor):
        return outputs
    storage = args[0].untyped_storage().data_ptr()
    if not all(isinstance(t, Tensor) and t._is_view() and t.untyped_storage().data_ptr() == storage for t in outputs):
        return outputs
    return type(outputs)(args[0].as_strided(t.shape, t.stride(), t.storage_offset()) for t in outputs)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse, batched by vmap: of these none is kept
        return 0


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
