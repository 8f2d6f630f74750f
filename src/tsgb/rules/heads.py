"""The head's rules, TSGB-FC: where the evidence against a class is made to balance the evidence for it.

They have the form of those in `formulas`, and the number f as a keyword besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..tracing import holds, is_traced
from .formulas import convolution, convolution_transposed, linearised, product

__all__ = ["Split", "conv_head", "conv_transposed_head", "gradient", "gradient_head", "linear_head", "selectivity"]

Split = Literal["contributions", "weights"]


def linear_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    f: float,
    split: Split = "contributions",
    most: int | None = None,
) -> Tensor:
    """TSGB-FC: weigh the evidence against the target so that it balances the fraction f of the evidence for it.

    With ``W+ = max(W, 0)``, ``W- = min(W, 0)``, and the bias left out::

        z+ = W+ x        z- = W- x        beta = f * z+ / |z-|        (beta = 0 where z- = 0)
        grad_x = W+^T grad + W-^T (beta * grad)

    That is ``split="weights"``, the authors' form. ``split="contributions"`` is right for features of any sign::

        z+ = sum max(w x, 0)        z- = sum min(w x, 0)

    with each weight's gradient scaled by the side its contribution is on; for x >= 0 the two agree. Where ``x`` has
    positions, (N, ..., C), z+ and z- are summed over them as in `conv_head`.

    Args:
        grad: (N, ..., O), arriving at the logits.
        x: (N, ..., C), the features.
        weight: (O, C). ``bias``: (O,) or None, not read.
        f: the fraction, usually 0..1. 0 leaves the evidence for, 1 balances both sides exactly.
        split: "contributions" or "weights".
        most: how many classes have a gradient at most, where that is known without a look at them.

    Returns:
        (N, ..., C). For x >= 0 and one target the relevance below the head sums to (1 - f) z+ of the target.

    Example:
        >>> x, grad = torch.rand(1, 5), torch.tensor([[0.0, 1.0, 0.0]])
        >>> weight = torch.tensor([0.5, -1.0, 2.0, -0.3, 1.0]).repeat(3, 1)
        >>> abs((x * linear_head(grad, x, weight, f=1.0)).sum().item()) < 1e-5
        True
    """
    grad, weight = _asked(grad, weight, -1, most)
    positions = tuple(range(1, x.dim() - 1))
    return _head(functional.linear, grad, x, weight, f, split, positions)


def conv_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    f: float,
    split: Split = "contributions",
    most: int | None = None,
) -> Tensor:
    """TSGB-FC where the head is a convolution before pooling: one beta per image and class, over all positions.

    ::

        z+-_k = sum over positions p of grad_k(p) z+-_k(p)        beta_k = f * z+_k / |z-_k|
        grad_x = conv^T(grad, W+) + conv^T(beta * grad, W-)

    which is `linear_head` under global pooling. Where the arriving gradients of a class sum to less than zero (the
    class that is subtracted in a difference of logits), z+ and z- are taken of their negative, as beta weighs evidence,
    not its sign.

    Args:
        grad: (N, O, *out), arriving at the output. ``x``: (N, C, *in). ``weight``: (O, C / groups, *k).
        bias: (O,) or None, not read. The rest as in ``torch.nn.functional.conv2d``.
        f: the fraction, usually 0..1. ``split``, ``most``: see `linear_head`.

    Returns:
        (N, C, *in).

    Example:
        >>> x, weight = torch.rand(1, 5, 4, 4), torch.randn(3, 5, 1, 1)
        >>> grad = torch.zeros(1, 3, 4, 4)
        >>> grad[:, 1] = 1 / 16
        >>> pooled = linear_head(grad.sum((2, 3)), x.mean((2, 3)), weight[:, :, 0, 0], f=0.75)
        >>> torch.allclose(conv_head(grad, x, weight, f=0.75), pooled[:, :, None, None] / 16, atol=1e-5)
        True
    """
    if groups == 1:
        grad, weight = _asked(grad, weight, 1 - x.dim(), most)
    function = convolution(weight)
    args = (None, stride, padding, dilation, groups)
    positions = tuple(range(2, x.dim()))
    return _head(lambda s, w: function(s, w, *args), grad, x, weight, f, split, positions)


def conv_transposed_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    f: float,
    split: Split = "contributions",
    **kwargs: Any,
) -> Tensor:
    """TSGB-FC where the head is a transposed convolution, as at the end of a decoder: see `conv_head`.

    Args:
        grad: (N, O, *out), arriving at the output. ``x``: (N, C, *in). ``weight``: (C, O / groups, *k).
        bias: (O,) or None, not read. The rest as in ``torch.nn.functional.conv_transpose2d``.
        f: the fraction, usually 0..1. ``split``: see `linear_head`.

    Returns:
        (N, C, *in).

    Example:
        >>> x, weight, grad = torch.rand(1, 5, 4, 4), torch.randn(5, 3, 1, 1), torch.zeros(1, 3, 4, 4)
        >>> grad[:, 1] = 1 / 16
        >>> same = conv_head(grad, x, weight.transpose(0, 1), f=0.75)
        >>> torch.allclose(conv_transposed_head(grad, x, weight, f=0.75), same, atol=1e-6)
        True
    """
    function = convolution_transposed(weight)
    positions = tuple(range(2, x.dim()))
    return _head(lambda s, w: function(s, w, None, *args, **kwargs), grad, x, weight, f, split, positions)


def gradient(grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
    """The operator's own gradient, for the operators with weights, which need a rule to be known as a head.

    Args:
        grad: arriving at the output. ``x``: the input.
        function: the operator, called as ``function(x, *args, **kwargs)``.

    Returns:
        The shape of ``x``.

    Example:
        >>> gradient(torch.ones(1), torch.tensor([3.0]), function=torch.square)
        tensor([6.])
    """
    if function is functional.linear and args:
        weight: Tensor = args[0]
        return _times(grad, weight)  # without the output, which takes as long
    return linearised(lambda s: function(s, *args, **kwargs), x)[1](grad)


def gradient_head(
    grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], f: float = 1.0, **kwargs: Any
) -> Tensor:
    """`gradient` where the operator is the head; ``f`` is not read.

    Example:
        >>> gradient_head(torch.ones(1), torch.tensor([3.0]), function=torch.square, f=0.75)
        tensor([6.])
    """
    return gradient(grad, x, *args, function=function, **kwargs)


def selectivity(hidden: bool) -> float:
    """Choose f: 1 where a hidden layer lies below the head, else 0.75.

    A hidden layer is one with weights, on a vector or a 1 x 1 map, between the topmost spatial convolution and the
    head. Without a hidden layer f = 1 takes the evidence that the classes share away, and with it the object's
    extent.

    Example:
        >>> selectivity(hidden=True), selectivity(hidden=False)
        (1.0, 0.75)
    """
    return 1.0 if hidden else 0.75


def _times(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``. A row that asks for one class is a row of the weights, and most are such."""
    if is_traced() or grad.dim() != 2 or not grad.numel():
        return product(grad, weight)
    several = (grad.count_nonzero(1) > 1).nonzero().flatten()
    if len(several) == len(grad):  # of a hidden layer
        return product(grad, weight)
    classes = grad.abs().argmax(1)
    given = grad.gather(1, classes[:, None]) * weight[classes]
    given[several] = product(grad[several], weight)
    return given


def _asked(grad: Tensor, weight: Tensor, dim: int, most: int | None) -> tuple[Tensor, Tensor]:
    """The gradients and weights of the classes for which gradients arrive; the others' weights play no part."""
    by_class = grad.movedim(dim, 0).flatten(1)
    if is_traced():
        if most is None or most >= len(weight):
            return grad, weight
        used = by_class.abs().amax(1).topk(most).indices
    else:
        used = by_class.any(1).nonzero()[:, 0]
    if len(used) == 0 or len(used) == len(weight):
        return grad, weight
    return grad.index_select(dim, used), weight[used]


def _head(
    function: Callable[[Tensor, Tensor], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    f: float,
    split: Split,
    positions: tuple[int, ...],
) -> Tensor:
    """TSGB-FC for any ``function(x, weight)`` that is linear in both."""
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    # Each part of x with the weights that speak for the class there, and those that speak against it.
    parts = [(torch.ones_like(x), positive, negative)]
    if split == "contributions" and holds(x < 0):
        parts = [((x >= 0).to(x.dtype), positive, negative), ((x < 0).to(x.dtype), negative, positive)]
    z_for, z_against = torch.zeros_like(grad), torch.zeros_like(grad)
    pulls = []
    for mask, supporting, opposing in parts:
        o, pull_for = linearised(lambda s, w=supporting: function(s, w), x * mask)
        z_for = z_for + o
        o, pull_against = linearised(lambda s, w=opposing: function(s, w), x * mask)
        z_against = z_against + o
        pulls.append((mask, pull_for, pull_against))
    if positions:
        weighting = grad * torch.where(grad.sum(positions, keepdim=True) < 0, -1, 1)
        z_for = (weighting * z_for).sum(positions, keepdim=True)
        z_against = (weighting * z_against).sum(positions, keepdim=True)
    beta = torch.where(z_against == 0, 0, f * z_for / torch.where(z_against == 0, 1, z_against).abs())
    below = torch.zeros_like(x)
    for mask, pull_for, pull_against in pulls:
        below = below + mask * (pull_for(grad) + pull_against(beta * grad))
    return below
