"""What is read of a backward, beside the image's own relevance: the evidence at the top, and the fields of all depths.

Where the head's evidence meets a map, the classes compete: hooks on autograd's nodes see all their rows there, and let
those asked for go on. Below, each convolution notes what it shares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from . import graph
from .folding import FoldedError
from .relevance import Dense, Gradient, LostError, Owed, Part, Product, Relevance, Summed, single, summed

__all__ = ["ApartError", "Reading", "openings", "tops"]

Rivalry = Callable[[Tensor, int], Tensor]


class ApartError(RuntimeError):
    """The classes compete in other images than those that came: the model cuts them apart, or copies them."""


class Reading:
    """One backward's reading: of rows for K classes asked for, R that may be their rivals, and the mean of all.

    Args:
        rivalry: the table's rule, see `rules.rivalry`; None where nothing competes, and no row is the mean.
        asked: K. ``rivals``: R. ``count``: N.

    Attributes:
        options: what the table gives its rule of a likeness and a temperature.
        fields: what each convolution shares, one number a position: (K, N, *positions).
        contests: of each place where the classes compete the evidence of those asked for and their possible rivals,
            (K + R, N, *positions), and the gate (K, N, *positions).
        is_apart: whether the classes compete in other images than those that came, as in parts or copies of them.
    """

    def __init__(self, rivalry: Rivalry | None, asked: int, rivals: int, count: int) -> None:
        self._rivalry, self._asked, self._rivals, self._count = rivalry, asked, rivals, count
        known: dict[str, float] = getattr(rivalry, "keywords", {})
        self.options = {name: known[name] for name in ("alike", "temperature") if name in known}
        self.fields: list[Tensor] = []
        self.contests: list[tuple[Tensor, Tensor]] = []
        self.is_apart = False
        self._passed: list[Tensor] = []  # a list, as parts on several devices go backward in threads of their own
        self._heard: dict[tuple[Node, int], list[Tensor]] | None = None
        self._gates: dict[tuple[Node, int], Tensor] = {}

    @property
    def evidence(self) -> Tensor | None:
        """The evidence for each class that passed the gates, and that against it, (2, K, N), summed over the positions.

        None where there is no top, or where it holds other images than those that came.
        """
        if self.is_apart or not self._passed:
            return None
        return torch.stack([passed.to(self._passed[0].device) for passed in self._passed]).sum(0)

    def note(self, field: Tensor) -> None:
        """Keep what a convolution shares: (K, N, *positions), or (K, positions, N) of a sequence first."""
        self.fields.append(field.transpose(1, 2) if self._is_swapped(field) else field)

    def is_apart_from(self, image: Tensor) -> bool:
        """Tell whether evidence or fields are of other images than those that came, (N, C, *size)."""
        others = [field for field in self.fields if field.dim() == image.dim() and field.shape[1] != len(image)]
        return self.is_apart or bool(others)

    @contextmanager
    def hooked(self, found: Sequence[Node], open_edges: Mapping[Node, Collection[int]]) -> Iterator[None]:
        """Let the classes compete at these nodes while the body goes backward; past them those asked for go on."""
        handles = [node.register_prehook(partial(self._met, node)) for node in found]
        handles += [node.register_hook(partial(self._let_past, places)) for node, places in open_edges.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._gates.clear()  # a reading lives on nodes, so it may hold none: they would keep each other alive

    def listen(self, found: Sequence[Node], score: Tensor, rows: Tensor) -> None:
        """Hear the rows one by one, where gradients of one class go backward: within `hooked`."""
        edges = [GradientEdge(n, nr) for node in found for n, nr in node.next_functions if n is not None]
        self._heard = {}
        for row in rows.flip(0):  # those asked for last, so that the heads tell what arrived of them
            torch.autograd.grad(score, edges, row, retain_graph=True, allow_unused=True)
        for key, heard in self._heard.items():
            self._gates[key] = self._gate(torch.stack(heard[::-1]))
        self._heard = None
        self.fields.clear()  # a convolution that is a top itself has noted all rows

    def _met(self, node: Node, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        ruling = graph.ruling_of(node)
        if ruling is not None and ruling.passing is not None and len(grads) - sum(grad is None for grad in grads) > 1:
            raise FoldedError  # of the two outputs the classes would compete in each by itself
        given = [None if grad is None else self._weighed((node, nr), grad) for nr, grad in enumerate(grads)]
        return tuple(given)

    def _let_past(
        self, places: Collection[int], given: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Of what a node gives its inputs, let the rows asked for go on where no place is in which classes compete."""
        everywhere = torch.ones(())
        return tuple(
            Relevance(grad.shape, grad.dtype, [self._part(part, everywhere.to(grad.device)) for part in grad.parts])
            if place in places and isinstance(grad, Relevance)
            else grad
            for place, grad in enumerate(given)
        )

    def _weighed(self, key: tuple[Node, int], grad: Tensor) -> Tensor:
        node, nr = key
        ruling = graph.ruling_of(node)
        if isinstance(grad, Relevance) and not any(isinstance(part, Gradient) for part in grad.parts):
            gate = self._gate(summed(grad.parts).squeeze(2)).unsqueeze(2)
            return Relevance(grad.shape, grad.dtype, [self._part(part, gate) for part in grad.parts])
        o, dim = graph.output_of(node, nr)
        if o is None and ruling is not None and nr in ruling.outputs:
            o = ruling.outputs[nr].tensor
        if o is None:
            raise LostError("an output was let go where classes compete")
        if isinstance(grad, Relevance):
            grads = grad.gradients()
            gate = self._gate((grads * single(o)).sum(dim + 1))
            return Relevance(grad.shape, grad.dtype, [Gradient(self._own(grads) * gate.unsqueeze(dim + 1))])
        if self._heard is not None:
            self._heard.setdefault(key, []).append((single(grad) * single(o)).sum(dim))
            return grad
        return grad * self._gates[key][0].unsqueeze(dim) if key in self._gates else grad

    def _gate(self, evidence: Tensor) -> Tensor:
        """How far each class holds each position (K, N, *positions), of the evidence of all rows."""
        if self._is_swapped(evidence):
            return self._gate(evidence.transpose(1, 2)).transpose(1, 2)
        own = self._own(evidence)
        gate = torch.ones_like(own)
        if self._rivalry is not None:
            rows = evidence[: self._asked + self._rivals]
            gate = self._rivalry(rows, self._asked)
            self.contests.append((rows, gate))
        weighed = (own * gate).flatten(2)
        passed = torch.stack([weighed.clamp(min=0).sum(2), weighed.clamp(max=0).sum(2)])
        if passed.shape[2] != self._count:
            self.is_apart = True
        self._passed.append(passed)
        return gate

    def _is_swapped(self, rows: Tensor) -> bool:
        """Tell rows (K, T, N) of a sequence-first network."""
        return rows.dim() == 3 and rows.shape[1] != self._count == rows.shape[2]

    def _own(self, rows: Tensor) -> Tensor:
        """Of all rows those asked for, less what all classes share."""
        return rows if self._rivalry is None else rows[: self._asked] - rows[-1:]

    def _part(self, part: Part, gate: Tensor) -> Part:
        """A part for the classes asked for, weighed by a field (K, N, 1, *)."""
        if isinstance(part, Gradient):
            return Gradient(self._own(part.values) * gate)
        if isinstance(part, Dense):
            return Dense(self._own(part.values) * gate)
        if isinstance(part, (Summed, Owed)):
            return Summed(self._own(part.values) * gate)
        assert isinstance(part, Product)
        factor = self._own(part.factor)
        if part.total is not None:
            return Product(factor * gate, part.total, part.base)
        assert part.base is not None
        return Dense(factor * part.base * gate)


def tops(heads: Sequence[Node]) -> list[Node]:
    """Where the evidence meets the map: the first nodes below the heads whose output has positions.

    Global pooling may take the mean over one dimension after the other: it is what comes before. Where one of them lies
    below another, as in a block that leaves one position by some of its branches alone, it is
    the first that all goes through; none if there is no such.
    """
    edges = [edge for node in heads for edge in _below(node)]
    reached = [node for node in _reached(edges, graph.has_positions) if graph.has_positions(node)]
    found = list(dict.fromkeys(map(_unpooled, reached)))
    if len(found) == 1 or not any(_reached(_below(node)).keys() & set(found) for node in found):
        return found
    ends = {node for node in _reached(edges) if not _below(node)}
    for candidate in filter(graph.has_positions, _reached(edges)):
        if not ends & _reached(edges, partial(is_, candidate)).keys():
            return [candidate]
    return []


def _unpooled(node: Node) -> Node:
    """What a mean or sum over some of the positions was taken of; other nodes as they are."""
    below = _below(node)
    while graph.name(node) in ("mean", "sum") and len(below) == 1:
        if graph.positions(below[0]) <= graph.positions(node):
            break
        node, below = below[0], _below(below[0])
    return node


def openings(start: Sequence[Node], found: Collection[Node]) -> dict[Node, list[int]]:
    """The edges by which evidence goes past the places where classes compete, to an input without positions.

    Args:
        start: where the evidence comes from. ``found``: those places, see `tops`.

    Returns:
        By node above them, which of its edges.
    """
    past: dict[Node, list[int]] = {}
    ahead, seen = list(start), set(start)
    while ahead:
        node = ahead.pop()
        for place, (edge, _) in enumerate(node.next_functions):
            if edge is None or edge in found:
                continue
            if not _reached([edge], found.__contains__).keys() & set(found):
                past.setdefault(node, []).append(place)
            elif edge not in seen:
                seen.add(edge)
                ahead.append(edge)
    return past


def _below(node: Node) -> list[Node]:
    return [edge for edge, _ in node.next_functions if edge is not None]


def _reached(edges: Sequence[Node], stop: Callable[[Node], bool] = lambda node: False) -> dict[Node, None]:
    """The nodes from some on towards the image, in order, not past those where ``stop`` holds."""
    return {node: None for edge in edges for node in graph.walk(edge, stop)}
