"""What backward needs, kept from in-place calls; and the random state, from the model's own draws."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import operators


class _Cell:
    """What autograd saved; weakly known to `Kept`, held by the graph alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copy on write: a tensor that backward needs is cloned before an in-place call changes it.

    A network may be right in inference and yet overwrite what a gradient needs (``y = conv(x); x += y``).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._states: tuple[Any, ...] | None = None
        self._cells: dict[int, list[weakref.ref[_Cell]]] = {}

    def pack(self, tensor: Tensor) -> _Cell:
        """Take what autograd saves."""
        # An output in the hands of its own node would keep the graph alive, unseen by the collector, until it is run.
        cell = _Cell(tensor.detach())
        self._cells.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(cell))
        return cell

    @staticmethod
    def unpack(cell: _Cell) -> Tensor:
        """Give it back as it was."""
        return cell.tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and self._states is None:
            self._states = torch.get_rng_state(), _cuda_states()
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in operators.tensors(written):
                    self._copy(tensor)
        return func(*args, **kwargs)

    def restore_random_state(self) -> None:
        """Undo the model's own draws; where it drew nothing, other threads' draws are left alone."""
        if self._states is not None:
            torch.set_rng_state(self._states[0])
            for device, state in enumerate(self._states[1]):
                torch.cuda.set_rng_state(state, device)

    def _copy(self, tensor: Tensor) -> None:
        copies: dict[Any, Tensor] = {}  # one for all cells that hold the same view
        for reference in self._cells.pop(tensor.untyped_storage()._cdata, []):
            cell = reference()
            if cell is not None:
                view = cell.tensor.data_ptr(), cell.tensor.shape, cell.tensor.stride(), cell.tensor.dtype
                if view not in copies:
                    copies[view] = cell.tensor.clone()
                cell.tensor = copies[view]


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
