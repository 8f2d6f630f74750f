"""What tensors share that lie in the same memory: so that writes become values, and stale views are read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import SymInt, Tensor

if TYPE_CHECKING:
    from .tape import Value

__all__ = ["Geometry", "Memory", "geometry"]

Geometry = tuple[tuple[int, ...], tuple[int, ...], int | SymInt]


def geometry(t: Tensor) -> Geometry:
    """Give the shape, strides and offset of a tensor."""
    return tuple(t.shape), t.stride(), t.storage_offset()


class Memory:
    """One storage: the value of the tensor that covers it, and how often it was written.

    Attributes:
        whole: the value of all of it; of a constant that was written to, a copy of what it held before.
        geometry: the shape, strides and offset of ``whole``.
        version: counts writes; a tensor that has not seen the last one is cut out of ``whole`` again.
        tensors: how many tensors were seen that lie in it.
        kept: the values that hold a tensor in it.
    """

    __slots__ = ("geometry", "kept", "tensors", "version", "whole")

    def __init__(self, whole: Value | Tensor, t: Tensor) -> None:
        self.whole, self.geometry, self.version, self.tensors = whole, geometry(t), 0, 1
        self.kept: list[Value] = []

    def holders(self) -> list[Value]:
        """Give the values that still need what lies here."""
        return [value for value in self.kept if value.keepers > 0 and value.tensor is not None]

    def rescue(self) -> None:
        """Copy what is needed elsewhere before it is written on."""
        for value in self.holders():
            assert value.tensor is not None
            value.tensor = value.tensor.clone()
        self.kept.clear()
