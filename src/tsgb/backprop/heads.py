"""The head: the first operators with weights on the way from the target to the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from . import graph
from .coverage import Coverage, CoverageError
from .folding import FoldedError
from .reading import Reading, openings, tops
from .ruling import Ruling

__all__ = ["Heads"]


class Heads:
    """Where the number f counts; what lies above keeps its own derivative.

    Args:
        target: the logits, or what was computed from them, for ``count`` images.
        coverage: of the forward, in which what is above is counted as ordinary.
        f: the number, or what tells it from whether the network has hidden linear layers; None where there is none.
        one_each: whether one value of each image's logits is asked for at a time.

    Attributes:
        rulings: the heads'. ``above``: names of the operators between them and the target. ``f``: the number, or
            None.

    Raises:
        CoverageError: no head was found, or an operator unknown to the table may hide it.
        FoldedError: what is above a head, whose derivative counts, was folded into it.
    """

    def __init__(
        self, target: Tensor, coverage: Coverage, f: float | Callable[[bool], float] | None, count: int, one_each: bool
    ) -> None:
        self.rulings: list[Ruling] = []
        self.above: list[str] = []
        below = list(graph.walk(target.grad_fn))
        coverage.unseen = Counter(node.name() for node in below if graph.is_unseen(node))
        coverage.keep({graph.name(node) for node in below})
        nodes = []
        for node in graph.walk(target.grad_fn, stop=graph.has_weights):
            if graph.is_unseen(node):
                raise CoverageError(
                    f"the target comes from {node.name()}, which did not pass through torch's functions in this "
                    "thread (a scripted module, an autograd function), so the head cannot be told: write it in torch"
                )
            ruling = graph.ruling_of(node)
            if ruling is not None and ruling.head_rule is not None:
                if ruling.passing is not None:
                    raise FoldedError
                nodes.append(node)
                self.rulings.append(ruling)
                continue
            if graph.is_weighted(node):
                raise CoverageError(
                    f"the target comes from `{graph.name(node)}`, an operator with weights for which the rules "
                    "have no entry, so the head cannot be told: write the head as a linear layer or a convolution"
                )
            self.above.append(graph.name(node))
            coverage.count_above(graph.name(node))
            if ruling is not None:
                ruling.is_ordinary = True
        if not self.rulings:
            raise CoverageError(
                "no head was found: between the image and the target there is no linear layer and no convolution"
                f" that the rules know (seen: {', '.join(sorted({name for name, _ in coverage.unruled})) or 'nothing'})"
            )
        self._nodes, self._below = nodes, below
        edges = [edge for node in nodes for edge, _ in node.next_functions if edge is not None]
        first = [ruling for edge in edges for ruling in _first(edge)]
        self.f = f(any(ruling.on_vector for ruling in first)) if callable(f) else f
        for ruling in coverage.met:
            ruling.f = None
        for head in self.rulings:
            head.f, head.count, head.is_single = float(self.f or 0), count, one_each and not self.above

    def read_by(self, reading: Reading) -> list[Node]:
        """Let a reading note what the convolutions below share; give the nodes where the classes compete, if any."""
        found = tops(self._nodes)
        below = {node for top in found for node in graph.walk(top)}  # what is above them goes backward for all rows
        for node in self._below:
            if node not in below:
                continue
            ruling = graph.ruling_of(node)
            if ruling is not None and ruling.is_whole and ruling.f is None:  # and is no head
                ruling.note = reading.note
                if ruling.handing is not None:
                    ruling.handing.note = reading.note
        return found

    def past(self, found: Sequence[Node]) -> dict[Node, list[int]]:
        """The edges by which evidence goes past the nodes where the classes compete, see `openings`."""
        return openings(self._below[:1], found)

    def arrived(self, classes: int, count: int) -> Tensor:
        """Tell for each class and image (K, N) whether any gradient arrived in the last backward."""
        found = [head.arrived for head in self.rulings if head.arrived is not None]
        found = [flags.to(found[0].device) for flags in found]  # heads may be on several devices
        for head in self.rulings:
            head.arrived = None
        if len(found) == count and all(flags.shape == (classes, 1) for flags in found):  # heads of one image each
            return torch.cat(found, 1)
        if not found or any(flags.shape != (classes, count) for flags in found):
            return torch.full((classes, count), bool(found))
        return torch.stack(found).any(0)


def _first(start: Node) -> list[Ruling]:
    """The rulings of the first operators with weights."""
    found = [graph.ruling_of(node) for node in graph.walk(start, stop=graph.has_weights)]
    return [ruling for ruling in found if ruling is not None and ruling.head_rule is not None]
