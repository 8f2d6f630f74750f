"""The walk back along a tape, for all classes at once; and what is recorded on the way for a fused map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .heads import Head, below
from .kinds import Constant, Gradient, RelevanceRule, Restride, Share
from .kinds.copying import channels_first, channels_in_place
from .kinds.gradient import widened
from .tape import CHANNEL_SUM, GRADIENT, Node, Tape, Value
from .terms import ChannelSum, Cotangent, Dense, Factored, Term, Thunk, add, channel_sum, dense

__all__ = ["ApartError", "FieldRecorder", "gradient_at", "walk"]

aten = torch.ops.aten
Gate = Callable[[Tensor, int], Tensor]


class ApartError(RuntimeError):
    """The classes compete in other images than those that came: the model cuts them apart, or copies them."""


def walk(
    tape: Tape,
    target: Value,
    seeds: Tensor,
    head: Head | None = None,
    classes: int = 0,
    rows: Tensor | None = None,
    frees: bool = True,
    until: Sequence[Value] | None = None,
) -> list[Cotangent | None]:
    """Walk back from a target; give what arrives at each image.

    Args:
        seeds: (K, *shape of the target), the gradients that the walk starts from.
        head: where the rule of the head applies, and above which operators keep their own derivative; None: nowhere.
        classes: how many of the seeds are requested; the others compete with those.
        rows: (K, N), the class that a seed is one-hot for, where that is known.
        frees: whether the walk is the last one, and may free tensors as it goes.
        until: the values at which to read instead of at the images.
    """
    recorder = tape.recorder
    heads, above = (set(head.nodes), set(head.above)) if head is not None else (set(), set())
    arrived: dict[Value, Cotangent] = {target: seeds}
    read: dict[Value | None, Cotangent] = {}
    for node in reversed(tape.nodes):
        given = [None if value is None else arrived.pop(value, None) for value in node.outputs]
        if any(g is not None for g in given):
            if until is not None:
                read.update({v: g for v, g in zip(node.outputs, given, strict=True) if v in until and g is not None})
            if recorder is not None:
                given = [
                    recorder.compete(tape, v, g) if v in recorder.sites and g is not None else g
                    for v, g in zip(node.outputs, given, strict=True)
                ]
            if node in heads and head is not None:
                assert isinstance(given[0], Tensor)
                below_node: list[Cotangent | None] = [None] * len(node.inputs)
                below_node[0] = head.backward(tape, node, given[0], classes, rows)
            elif node in above:
                below_node = _own(node).backward(tape, node, given)
            else:
                below_node = node.rule.backward(tape, node, given)
            for place, (value, g) in enumerate(zip(node.inputs, below_node, strict=True)):
                if g is None:
                    continue
                if recorder is not None and place in recorder.bypass.get(node, ()):
                    g = recorder.pass_by(g)
                if isinstance(g, Tensor) and value.needs != GRADIENT:
                    g = _relevance(tape, value, g)
                elif not isinstance(g, Tensor) and value.needs == GRADIENT:
                    g = _gradient(tape, value, g)
                arrived[value] = add(arrived.get(value), g)
        if frees:
            node.saved = None
            for out in node.outputs:
                if out is not None:
                    out.tensor = None  # every operator that read it lies behind
    if until is not None:
        return [read.get(value) for value in until]
    at_images = [arrived.get(image) for image in tape.images]
    if recorder is not None:
        for place, (image, g) in enumerate(zip(tape.images, at_images, strict=True)):
            if image in recorder.sites and g is not None:
                at_images[place] = recorder.compete(tape, image, g)
    return at_images


def _own(node: Node) -> RelevanceRule:
    """Give the rule that is an operator's own derivative."""
    return node.rule if isinstance(node.rule, (Constant, Restride)) else Gradient()


def _relevance(tape: Tape, value: Value, grads: Tensor) -> list[Term]:
    """Turn a gradient into relevance, where the operator that made the value needs that."""
    values = channels_first(value, grads * widened(tape.get(value)))
    return [ChannelSum(values.sum(2, keepdim=True)) if value.needs == CHANNEL_SUM else Dense(values)]


def _gradient(tape: Tape, value: Value, terms: list[Term]) -> Tensor:
    """Turn relevance into a gradient, where what lies above the head reads what lies below it as well."""
    x = widened(tape.get(value))
    return channels_in_place(value, dense(terms)) / torch.where(x == 0, 1, x) * (x != 0)


def gradient_at(tape: Tape, target: Value, source: Value) -> Tensor | None:
    """Differentiate a target (N,) by a value that all of it comes from; None where it comes from others too."""
    nodes, ahead, seen = set(), [target], {target}
    while ahead:
        node = ahead.pop().node
        if node is None or node.is_weighted:
            return None
        nodes.add(node)
        for value in node.inputs:
            if value is not source and value not in seen:
                seen.add(value)
                ahead.append(value)
    like = widened(tape.get(target))
    arrived: dict[Value, Cotangent] = {target: torch.ones(1, *target.shape, dtype=like.dtype, device=like.device)}
    for node in reversed(tape.nodes):
        given = [None if value is None else arrived.pop(value, None) for value in node.outputs if node in nodes]
        if any(g is not None for g in given):
            for value, g in zip(node.inputs, _own(node).backward(tape, node, given), strict=True):
                if g is not None:
                    arrived[value] = add(arrived.get(value), g)
    grads = arrived.get(source)
    assert grads is None or isinstance(grads, Tensor)
    return grads


class FieldRecorder:
    """Records of one walk what a fused map is made of: evidence where classes compete, and the fields below.

    The rows that go backward are of K requested classes, of R that may be their rivals, and of the mean of all. At a
    competition site the requested classes go on, less that mean, weighed by the gate.

    Args:
        gate: from the evidence of requested classes and rivals to the gate, see `tsgb.fusion.competition_gate`; None
            where nothing competes, and no row is the mean.
        requested: K. ``rivals``: R. ``count``: the number of images.

    Attributes:
        fields: what each convolution shares, one number a position: (K, N, *positions).
        sites: the values at which classes compete.
        nodes: the operators that record a field.
        bypass: the edges by which evidence passes every site by, to an input without positions.
    """

    def __init__(self, gate: Gate | None, requested: int, rivals: int, count: int) -> None:
        self._gate, self._requested, self._rivals, self._count = gate, requested, rivals, count
        self.fields: list[Tensor] = []
        self.sites: set[Value] = set()
        self.nodes: set[Node] = set()
        self.bypass: dict[Node, set[int]] = {}
        self._is_apart = False
        self._evidence: list[Tensor] = []

    def plan(self, head: Head) -> bool:
        """Find the sites, and what is recorded below them; give whether there are any."""
        sites = competition_sites(head)
        self.sites = set(sites)
        lower = {value.node for value in below(sites)} - set(head.nodes)
        shares = {node for node in lower if node is not None and isinstance(node.rule, Share)}
        self.nodes = {node for node in shares if node.rule.name != "conv_transposed"}
        self.bypass = _bypass(head, self.sites)
        return bool(sites)

    @property
    def evidence(self) -> Tensor | None:
        """The evidence for each class that passed the gates, and that against it, (2, K, N); None if none was met."""
        if self._is_apart or not self._evidence:
            return None
        return torch.stack([passed.to(self._evidence[0].device) for passed in self._evidence]).sum(0)

    def record(self, field: Tensor) -> None:
        """Keep what a convolution shares: (K, N, *positions), or (K, positions, N) of a sequence-first network."""
        self.fields.append(field.transpose(1, 2) if self._is_sequence_first(field) else field)

    def is_apart_from(self, image: Tensor) -> bool:
        """Tell whether evidence or fields are of other images than those that came, (N, C, *size)."""
        return self._is_apart or any(f.dim() == image.dim() and f.shape[1] != len(image) for f in self.fields)

    def compete(self, tape: Tape, value: Value, arrived: Cotangent) -> Cotangent:
        """Let the classes compete at a site."""
        if isinstance(arrived, Tensor):
            evidence = channels_first(value, arrived * widened(tape.get(value))).sum(2)
        else:
            evidence = channel_sum(arrived).squeeze(2)
        if self._is_sequence_first(evidence):
            gate = self._passing(evidence.transpose(1, 2)).transpose(1, 2).unsqueeze(2)
        else:
            gate = self._passing(evidence).unsqueeze(2)
        if isinstance(arrived, Tensor):
            return self._own(arrived) * channels_in_place(value, gate)
        return [self._weighed(term, gate) for term in arrived]

    def pass_by(self, arrived: Cotangent) -> Cotangent:
        """On an edge that bypasses every site, forward the requested classes alone, ungated."""
        if isinstance(arrived, Tensor):
            return self._own(arrived)
        return [self._weighed(term, torch.ones((), device=_device(term))) for term in arrived]

    def _passing(self, evidence: Tensor) -> Tensor:
        """Give the gate (K, N, *positions), and keep the evidence that passes it."""
        own = self._own(evidence)
        gate = torch.ones_like(own)
        if self._gate is not None:
            gate = self._gate(evidence[: self._requested + self._rivals], self._requested)
        passing = (own * gate).flatten(2)
        self._evidence.append(torch.stack([passing.clamp(min=0).sum(2), passing.clamp(max=0).sum(2)]))
        self._is_apart |= own.shape[1] != self._count
        return gate

    def _is_sequence_first(self, rows: Tensor) -> bool:
        return rows.dim() == 3 and rows.shape[1] != self._count == rows.shape[2]

    def _own(self, rows: Tensor) -> Tensor:
        """Of all rows those of requested classes, less what all classes share."""
        return rows if self._gate is None else rows[: self._requested] - rows[-1:]

    def _weighed(self, term: Term, gate: Tensor) -> Term:
        if isinstance(term, Factored):
            factor = self._own(term.factor)
            if term.total is not None:
                return Factored(factor * gate, term.base, term.total)
            assert term.base is not None
            return Dense(factor * term.base * gate)
        if isinstance(term, Dense):
            return Dense(self._own(term.values) * gate)
        return ChannelSum(self._own(channel_sum([term])) * gate)


def _device(term: Term) -> Any:
    return term.factor.device if isinstance(term, Factored) else None if isinstance(term, Thunk) else term.values.device


def competition_sites(head: Head) -> list[Value]:
    """Find where the evidence meets the map: the first values below the heads that have positions.

    Global pooling may take the mean over one dimension after the other: it is what comes before. Where one site lies
    below another, it is the first value that all goes through, at last the image; none if there is no such.
    """
    reached = [v for v in below(head.inputs, _has_positions) if _has_positions(v)]
    sites = list(dict.fromkeys(_before_pooling(v) for v in reached))
    if len(sites) <= 1 or not any(set(below(_inputs(v))) & set(sites) for v in sites):
        return sites
    ends = {v for v in below(head.inputs) if v.node is None}
    for candidate in below(head.inputs):
        around = below(head.inputs, lambda v, c=candidate: v is c)  # type: ignore[misc]
        if candidate.node is not None and _has_positions(candidate) and not ends & set(around):
            return [candidate]
    return [v for v in ends if len(ends) == 1 and _has_positions(v)]


def _bypass(head: Head, sites: set[Value]) -> dict[Node, set[int]]:
    """Find the edges by which evidence passes every site by."""
    found: dict[Node, set[int]] = {}
    ahead, seen = [head.target], {head.target}
    while ahead:
        node = ahead.pop().node
        if node is None:
            continue
        given = node.inputs if node in head.above else node.rule.paths(node)
        for place, value in enumerate(node.inputs):
            if value in sites or value not in given:
                continue
            if not sites & set(below([value])):
                found.setdefault(node, set()).add(place)
            elif value not in seen:
                seen.add(value)
                ahead.append(value)
    return found


def _inputs(value: Value) -> Sequence[Value]:
    return value.node.rule.paths(value.node) if value.node is not None else ()


def _has_positions(value: Value) -> bool:
    return value.positions > 1


def _before_pooling(value: Value) -> Value:
    """What a mean or sum over some of the positions was taken of; other values as they are."""
    while value.node is not None and value.node.packet in (aten.mean, aten.sum) and len(value.node.inputs) == 1:
        x = value.node.inputs[0]
        if x.positions <= value.positions:
            break
        value = x
    return value
