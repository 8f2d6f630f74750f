"""What is known of one operator that met a rule, and its rule in plain form: gradient in, gradient out, class by class.

A `Ruling` lives on the operator's node in autograd's graph; by it the mechanism finds the operator again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import operators
from .handing import Handing
from .relevance import of_type, single
from .saved import Cell

__all__ = ["SLOT", "Ruling", "form", "wants"]

SLOT = torch.empty(0)


@dataclass(slots=True)
class Ruling:
    """An operator that met a rule.

    It lives on the operator's node, so it holds no tensors of the graph: through one that an in-place call changed, the
    node would keep itself alive. The tensors of the call's arguments are what autograd saves; `SLOT` stands in their
    places. Cells hold tensors that are cut off from the graph.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Tensor]
    rule: Callable[..., Tensor]
    head_rule: Callable[..., Tensor] | None = None  # for operators that carry weights: the rule where they are the head
    on_vector: bool = False
    is_linear: bool = False
    is_whole: bool = False  # of a convolution: whether it shares one number a position, not one for each group
    parts: int = 1  # of a convolution: images that stand side by side in its channels
    note: Callable[[Tensor], None] | None = None  # told that number, where it is read
    carries: bool = False  # of a convolution: whether a 0 of its output shares what a shift right after it gave it
    is_ordinary: bool = False  # set above the head, where the target's own derivative is what counts
    f: float | None = None  # set on the heads, with the number of images
    count: int = 0
    is_single: bool = False  # of a head: whether each row of gradients is of one class
    arrived: Tensor | None = None  # of a head: per class and image, whether any gradient arrived in this backward
    handing: Handing | None = None
    passing: Handing | None = None  # of a convolution: of its second output, that of the batch norm after it
    rectifier: str = ""  # what wrote on that output, and has no node of its own
    is_below: bool = False  # whether something with weights is known to come after it
    x: Cell | None = None  # until then, the input and the other tensors: a head needs them, and what is above it
    others: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Cell] = field(default_factory=dict)  # those that something takes which gives gradients back

    def backward(self, grad: Tensor, x: Tensor, o: Tensor | None, others: Sequence[Tensor]) -> Tensor:
        """Apply the rule in float32 at least, and hand on what the type of x can hold.

        ``o`` is the output where the rule asks for it, ``others`` are the tensors among the call's other arguments.
        """
        tensors = iter(others)
        args, kwargs = operators.mapped(lambda _: single(next(tensors)), (self.args, self.kwargs))
        with torch.autocast(x.device.type, enabled=False):
            if self.is_ordinary:
                with torch.enable_grad():
                    leaf = single(x).detach().requires_grad_()
                    (grad_x,) = torch.autograd.grad(self.function(leaf, *args, **kwargs), leaf, single(grad))
            elif self.f is None:
                output = {} if o is None else {"o": single(o)}
                grad_x = self._checked(self.rule, self.rule(single(grad), single(x), *args, **output, **kwargs), x)
            else:
                assert self.head_rule is not None
                swapped, is_alone = self._is_swapped(x), x.dim() == 1
                grad, features = (grad.transpose(0, 1), x.transpose(0, 1)) if swapped else (grad, x)
                grad, features = (grad[None], features[None]) if is_alone else (grad, features)
                most = {"most": len(grad)} if self.is_single and wants(self.head_rule, "most") else {}
                grad_x = self.head_rule(single(grad), single(features), *args, f=self.f, **most, **kwargs)
                grad_x = self._checked(self.head_rule, grad_x, features)
                grad_x = grad_x.transpose(0, 1) if swapped else grad_x[0] if is_alone else grad_x
        return of_type(grad_x, x.dtype)

    def _checked(self, rule: Callable[..., Tensor], given: Any, x: Tensor) -> Tensor:
        """What a rule gave, if it is a gradient of its input."""
        if isinstance(given, Tensor) and given.shape == x.shape:
            return given
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the rule {getattr(form(rule), '__name__', rule)!r} of {self.name} must return the gradient at its input, "
            f"{tuple(x.shape)}, got {got}"
        )

    def classes(self, grads: Tensor, x: Tensor, o: Tensor | None, others: Sequence[Tensor]) -> Tensor:
        """Apply `backward` to the gradients of several classes (K, *out)."""
        if self.f is not None:
            self._note_arrivals(grads, x)
        is_weighted = self.head_rule is not None  # what else is in the call are weights, not another's rows
        if is_weighted and x.dim() == 2 and len(x) == len(grads[0]) and o is None:
            rows = self.backward(grads.flatten(0, 1), x.repeat(len(grads), 1), None, others)
            return rows.reshape(len(grads), len(x), -1)
        return torch.stack([self.backward(grad, x, o, others) for grad in grads])

    def release(self) -> None:
        """Let go of what only a head, or what is above it, needs."""
        self.is_below, self.x, self.others = True, None, []

    def _note_arrivals(self, grads: Tensor, x: Tensor) -> None:
        grads = grads.transpose(1, 2) if self._is_swapped(x) else grads
        self.arrived = grads.flatten(min(2, grads.dim() - 1)).any(-1, keepdim=grads.dim() == 2)  # of a vector by itself

    def _is_swapped(self, x: Tensor) -> bool:
        """Tell features (T, N, C) of a sequence-first network: a head's sums are over the positions of one image."""
        return self.is_linear and x.dim() == 3 and len(x) != self.count == x.shape[1]


def form(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The function of `tsgb.rules` that a table's entry is, whatever it was given and in whatever form it is to run."""
    rule = inspect.unwrap(rule)
    return rule.func if isinstance(rule, partial) else rule


def wants(rule: Callable[..., Any], name: str) -> bool:
    """Tell whether a rule has a parameter of a name; rules of the table are few, and asked for at every layer."""
    try:
        return name in _parameters(rule)
    except TypeError:  # it has no hash
        return name in inspect.signature(rule).parameters


@lru_cache(maxsize=512)
def _parameters(rule: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)
