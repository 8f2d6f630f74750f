"""What flows backward for K classes at once: a gradient, or relevance (tensor * gradient) as a sum of terms.

Below the topmost convolution the classes differ in one-channel fields alone; what has channels is the same for all of
them. So relevance is kept as a sum of terms, most of which are a field times a base that all classes share. Relevance
has its channels in front, (K, N, C, *), wherever the tensor has them; a gradient has the tensor's own layout, (K, N,
...). Both are float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelSum", "Cotangent", "Dense", "Factored", "Term", "Thunk", "add", "channel_sum", "dense", "of_images"]


@dataclass(frozen=True, slots=True)
class Dense:
    """The relevance of every value (K, N, C, *)."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Factored:
    """``factor * base``: what differs by class times what all classes share, (N, C, *).

    The factor is a field (K, N, 1, *); then ``total`` (N, 1, *) is the base's sum over the channels, and the base may
    be None where no more is needed. Or the factor weighs each channel, (K, N, C, 1, ...); then ``total`` is None.
    """

    factor: Tensor
    base: Tensor | None
    total: Tensor | None


@dataclass(frozen=True, slots=True)
class ChannelSum:
    """The relevance summed over the channels (K, N, 1, *), where no more is needed."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Thunk:
    """A `ChannelSum` that is computed when it is read, if it is."""

    compute: Callable[[], Tensor]


Term = Dense | Factored | ChannelSum | Thunk
Cotangent = Tensor | list[Term]


def channel_sum(terms: Sequence[Term]) -> Tensor:
    """Sum relevance over the channels: (K, N, 1, *).

    Example:
        >>> base = torch.ones(1, 3, 2)
        >>> channel_sum([Factored(torch.ones(1, 1, 1, 2), base, base.sum(1, keepdim=True))])
        tensor([[[[3., 3.]]]])
    """
    total = _channel_sum(terms[0])
    for term in terms[1:]:
        total = total + _channel_sum(term)
    return total


def _channel_sum(term: Term) -> Tensor:
    if isinstance(term, Factored):
        if term.total is not None:
            return term.factor * term.total
        assert term.base is not None
        sums = torch.einsum("knc,ncp->knp", term.factor.flatten(2), term.base.flatten(2))
        return sums.reshape(*sums.shape[:2], 1, *term.base.shape[2:])
    if isinstance(term, Dense):
        return term.values.sum(2, keepdim=True)
    return term.values if isinstance(term, ChannelSum) else term.compute()


def dense(terms: Sequence[Term]) -> Tensor:
    """Add relevance up for every value: (K, N, C, *).

    Example:
        >>> dense([Factored(torch.full((1, 1, 1, 2), 2.0), torch.ones(1, 1, 2), torch.ones(1, 1, 2))])
        tensor([[[[2., 2.]]]])
    """
    total: Tensor | None = None
    is_own = False  # whether the total may be written on
    for term in sorted(terms, key=lambda term: isinstance(term, Factored)):
        if isinstance(term, Factored):
            assert term.base is not None, "the channels of a term were not kept"
            if total is None:
                total = term.factor * term.base
            else:
                add_product = total.addcmul_ if is_own else total.addcmul
                total = add_product(term.factor, term.base)
            is_own = True
        else:
            assert isinstance(term, Dense), "a sum over the channels cannot be taken apart"
            is_own, total = total is not None, term.values if total is None else total + term.values
    assert total is not None
    return total


def add(one: Cotangent | None, other: Cotangent) -> Cotangent:
    """Add what arrives at a tensor from two operators; factored terms of one base are joined."""
    if one is None:
        return other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        return one + other
    joined = list(one)
    for term in other:
        for place, known in enumerate(joined):
            if isinstance(term, Factored) and isinstance(known, Factored) and term.total is known.total is not None:
                joined[place] = Factored(known.factor + term.factor, known.base, known.total)
                break
        else:
            joined.append(term)
    return joined


def of_images(terms: Sequence[Term], rows: slice) -> list[Term]:
    """Give the relevance of some of the images."""
    cut: list[Term] = []
    for term in terms:
        if isinstance(term, Factored):
            base, total = (None if t is None else t[rows] for t in (term.base, term.total))
            cut.append(Factored(term.factor[:, rows], base, total))
        elif isinstance(term, Dense):
            cut.append(Dense(term.values[:, rows]))
        else:
            cut.append(ChannelSum(_channel_sum(term)[:, rows]))
    return cut
