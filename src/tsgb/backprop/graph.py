"""What autograd's graph tells of a forward: which operators lie between two tensors, and what was noted of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from . import operators
from .ruling import Ruling
from .saved import Cell

__all__ = [
    "follows_weights",
    "gate",
    "has_positions",
    "has_weights",
    "is_all_of",
    "is_beside",
    "is_centre",
    "is_known",
    "is_linear",
    "is_near_image",
    "is_of",
    "is_settled",
    "is_unseen",
    "is_weighted",
    "keep_output",
    "mark",
    "name",
    "note",
    "notes",
    "output_of",
    "positions",
    "ruling_of",
    "walk",
]

_NAME, _IS_GATE, _IS_WEIGHTED = "tsgb.name", "tsgb.gate", "tsgb.weighted"  # keys of nodes' metadata
_OUTPUTS, _CHANNELS, _RUN = "tsgb.outputs", "tsgb.channels", "tsgb.run"

# They hand values on, or a multiple of the one operand that depends on the image.
_HANDING_ON = {
    "clone",
    "contiguous",
    "to",
    "type",
    "float",
    "double",
    "view",
    "view_as",
    "reshape",
    "mul",
    "div",
    "neg",
}


def ruling_of(node: Node | None) -> Ruling | None:
    """Give the ruling of an operator that met a rule, else None."""
    return getattr(node, "ruling", None)


def note(node: Node, called: str, opens: bool, weighs: bool) -> None:
    """Note an operator that met no rule: its name, whether it is a gating one, whether it carries weights."""
    kept = notes(node)
    kept[_NAME], kept[_IS_GATE], kept[_IS_WEIGHTED] = called, opens, weighs


def notes(node: Node) -> dict[str, Any]:
    """Give the metadata that lives as long as the node."""
    found: dict[str, Any] = node.metadata  # type: ignore[assignment]
    return found


def mark(node: Node, run: object, is_of_image: bool) -> None:
    """Note whether a node comes from an image of a forward."""
    notes(node)[_RUN] = run, is_of_image


def is_of(node: Node, run: object) -> bool:
    """Tell whether a node comes from an image of a forward, and is no older, of a graph that the model kept."""
    if _marked(node, run) is None:
        mark(node, run, any(_marked(found, run) for found in walk(node, lambda found: _marked(found, run) is not None)))
    return bool(_marked(node, run))


def _marked(node: Node, run: object) -> bool | None:
    known, is_of_image = notes(node).get(_RUN, (None, False))
    return is_of_image if known is run else None


def is_near_image(node: Node | None) -> bool:
    """Tell whether a node comes from an image without weights between."""
    return any(not found.next_functions for found in walk(node, has_weights))


def name(node: Node) -> str:
    """Name an operator."""
    ruling = ruling_of(node)
    return ruling.name if ruling is not None else str(notes(node).get(_NAME, node.name()))


def is_weighted(node: Node) -> bool:
    """Tell whether an operator without a rule carries weights."""
    return bool(notes(node).get(_IS_WEIGHTED))


def has_weights(node: Node) -> bool:
    """Tell whether an operator with a rule carries weights."""
    ruling = ruling_of(node)
    return ruling is not None and ruling.head_rule is not None


def is_beside(node: Node | None, count: int) -> bool:
    """Tell whether a tensor holds ``count`` images side by side in its channels, as a view has laid them."""
    while node is not None:
        ruling, sizes = ruling_of(node), getattr(node, "_saved_self_sym_sizes", None)
        if sizes is not None and int(sizes[0]) == count:
            return True
        below = [edge for edge, _ in node.next_functions if edge is not None]
        if ruling is not None and (ruling.parts > 1 or ruling.head_rule is not None):
            return ruling.parts == count
        node = below[0] if len(below) == 1 else None
    return False


def follows_weights(tensor: Tensor, bending: Collection[str]) -> bool:
    """Tell whether nothing that bends (one of ``bending``) lies between a tensor and the next weights below it."""
    below = walk(tensor.grad_fn, has_weights)
    return _maker(tensor) not in bending and all(has_weights(node) or name(node) not in bending for node in below)


def is_settled(node: Node) -> bool:
    """Tell whether it is known of an operator that it is no head, or that it carries weights."""
    ruling = ruling_of(node)
    return ruling is not None and (ruling.is_below or ruling.head_rule is not None)


def is_known(node: Node) -> bool:
    """Tell whether an operator met a rule or was noted."""
    return hasattr(node, "ruling") or _NAME in notes(node)


def is_linear(node: Node | None) -> bool:
    """Tell whether an operator is a linear layer with a rule, on a vector."""
    ruling = ruling_of(node)
    return ruling is not None and ruling.is_linear and ruling.on_vector


def is_unseen(node: Node) -> bool:
    """Tell whether a node came about behind the mechanism's back, and carries weights or bends."""
    if is_known(node):
        return False
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return not node.name().startswith("BackwardHookFunction")  # torch's own, an identity around hooked modules
    return operators.BENDING.search(node.name()) is not None


def keep_output(tensor: Tensor, cell: Cell, inputs: Iterable[Tensor]) -> None:
    """Keep a value of a map on the node that made it, if it has positions, and in which dimension its channels are."""
    if tensor.grad_fn is not None and tensor.dim() > 2:
        place = _channels(tensor, inputs)
        notes(tensor.grad_fn).setdefault(_CHANNELS, {})[tensor.output_nr] = place
        if tensor[0].numel() > max(tensor.shape[1], tensor.shape[place]):
            notes(tensor.grad_fn).setdefault(_OUTPUTS, {})[tensor.output_nr] = cell


def output_of(node: Node, place: int) -> tuple[Tensor | None, int]:
    """Give an output that was kept, and the dimension of its channels."""
    handing = getattr(ruling_of(node), "handing", None)
    cell = notes(node).get(_OUTPUTS, {}).get(place)
    channels = notes(node).get(_CHANNELS, {}).get(place, 1)
    if handing is not None:
        channels = len(node.shape) - 1 if handing.is_last else 1  # type: ignore[attr-defined]
    return None if cell is None else cell.tensor, channels


def _channels(tensor: Tensor, inputs: Iterable[Tensor]) -> int:
    """In which dimension the channels of a tensor with positions are: where its maker puts, finds or has moved them."""
    ruling, last = ruling_of(tensor.grad_fn), tensor.dim() - 1
    if ruling is not None and ruling.head_rule is not None:
        return last if ruling.is_linear else 1
    given = next((t for t in inputs if t.grad_fn not in (None, tensor.grad_fn) and t.dim() > 2), tensor._base)
    if given is None or given.grad_fn is None:  # it was written in place
        below = tensor.grad_fn.next_functions if tensor.grad_fn is not None else ()
        return next((min(output_of(node, place)[1], last) for node, place in below if node is not None), 1)
    before = output_of(given.grad_fn, given.output_nr)[1]
    is_view = tensor._base is not None and (tensor._base is given or tensor._base is given._base)
    strides = [[*zip(t.shape, t.stride(), strict=True)] for t in (given, tensor)]
    if is_view and strides[0] != strides[1] and sorted(strides[0]) == sorted(strides[1]):  # dimensions are exchanged
        return strides[1].index(strides[0][before])
    return last if before == given.dim() - 1 else min(before, last)


def has_positions(node: Node) -> bool:
    """Tell whether an operator's output is a map of more than one position."""
    handing = getattr(ruling_of(node), "handing", None)
    return _OUTPUTS in notes(node) if handing is None else positions(node) > 1


def positions(node: Node) -> int:
    """Count the positions of an operator's output; 1 where it is not known to be a map."""
    handing = getattr(ruling_of(node), "handing", None)
    if handing is None:
        kept = [(cell.tensor, output_of(node, place)[1]) for place, cell in notes(node).get(_OUTPUTS, {}).items()]
        return max((tensor[0].numel() // tensor.shape[channels] for tensor, channels in kept), default=1)
    shape = node.shape  # type: ignore[attr-defined]
    return int((shape[1:-1] if handing.is_last else shape[2:]).numel())


def walk(start: Node | None, stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """Go through the nodes from ``start`` towards the image, not past those where ``stop`` holds."""
    ahead, seen = [start], {start}
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        yield node
        if not stop(node):
            for edge, _ in node.next_functions:
                if edge not in seen:
                    seen.add(edge)
                    ahead.append(edge)


def is_all_of(target: Tensor, source: GradientEdge, leaves: Sequence[Tensor]) -> bool:
    """Tell whether the model enters a target through one tensor alone: no weights and no image beside it."""
    ahead, seen = [(target.grad_fn, target.output_nr)], set()
    while ahead:
        node, place = ahead.pop()
        if node is None or (node is source.node and place == source.output_nr) or (node, place) in seen:
            continue
        seen.add((node, place))
        if node is source.node or has_weights(node) or any(getattr(node, "variable", None) is x for x in leaves):
            return False
        ahead.extend(node.next_functions)
    return True


def gate(a: Tensor, b: Tensor, bending: Collection[str]) -> Tensor | None:
    """Tell which of two factors is the gate of the other, None for a product of equals.

    A gate is the factor that left a gating operator, that is broadcast over the other, that was computed from the
    other, or, as in gated linear units, that left an activation, one of ``bending``, where the other did not.
    """
    if a.grad_fn is None or b.grad_fn is None:
        return None
    opened = [bool(notes(node).get(_IS_GATE)) for node in (a.grad_fn, b.grad_fn)]
    if opened[0] != opened[1]:
        return a if opened[0] else b
    sizes = [torch.Size(n for n, step in zip(t.shape, t.stride(), strict=True) if step != 0).numel() for t in (a, b)]
    if sizes[0] != sizes[1]:
        return a if sizes[0] < sizes[1] else b
    if _comes_from(b, a):
        return b
    if _comes_from(a, b):
        return a
    bent = [_maker(t) in bending for t in (a, b)]
    return None if bent[0] == bent[1] else a if bent[0] else b


def _maker(tensor: Tensor) -> str:
    """Name the operator that a tensor is the output of, whether it has a node of its own or was copied in place."""
    node, place = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name().endswith("CopyBackwards"):
        node, place = node.next_functions[-1]
    ruling = ruling_of(node)
    if ruling is not None and place:
        return ruling.rectifier
    return "" if node is None else name(node)


def _comes_from(b: Tensor, a: Tensor) -> bool:
    """Tell whether b is a, or was computed from it and not only from what was split off with it."""
    origin, place = _origin(a)
    if _origin(b)[0] is origin:
        return _origin(b)[1] == place
    found = walk(b.grad_fn, stop=lambda node: node is origin)
    return any(edge is origin and nr == place for node in found for edge, nr in node.next_functions)


def _origin(tensor: Tensor) -> tuple[Node | None, int]:
    """Where a tensor's values were made, which copies and views of it only hand on, and constant factors scale."""
    node, place = tensor.grad_fn, tensor.output_nr
    while node is not None and name(node) in _HANDING_ON:
        below = [edge for edge in node.next_functions if edge[0] is not None]
        ruling = ruling_of(node)
        if len(below) != 1 or (ruling is not None and callable(ruling.rule)):  # of a gate, which was held
            break
        node, place = below[0]
    return node, place


def is_centre(a: Tensor, b: Tensor) -> bool:
    """Tell whether b, which is subtracted from a, was computed from it and is broadcast over it.

    So a norm spelled out takes the mean away; like the statistics of batch norm it is held constant.
    """
    if a.dim() != b.dim() or b.numel() >= a.numel() or b.grad_fn is None:
        return False
    return _comes_from(b, a)
