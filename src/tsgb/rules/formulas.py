"""The formula sheet of TSGB: one function per operator, in the symbols of docs/method.md.

Source: L. Cheng, P. Fang, Y. Liang, L. Zhang, C. Shen, H. Wang, "TSGB: Target-Selective Gradient Backprop for Probing
CNN Visual Saliency", IEEE Transactions on Image Processing 31 (2022), 2529-2540, arXiv 2110.05182.

The *relevance* of a tensor is tensor * gradient, elementwise. Most rules of TSGB say in relevance what is done with it,
and need no formula: it passes, is copied, or is shared in proportion (`tsgb.engine.kinds`). What is here are the rules
that are written for the gradient, ``rule(grad, x, ...) -> grad_x``: those of the head, and those of which the authors'
1e-10 is a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "EPS",
    "Split",
    "avg_pool",
    "batch_norm",
    "conv_head",
    "conv_transposed_head",
    "glu",
    "linear_head",
    "linearised",
    "selectivity",
]

EPS = 1e-10  # the authors' guard of n and of the input of batch norm
Split = Literal["contributions", "weights"]


def linear_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    f: float,
    split: Split = "contributions",
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

    Returns:
        (N, ..., C). For x >= 0 and one target the relevance below the head sums to (1 - f) z+ of the target.

    Example:
        >>> x, grad = torch.rand(1, 5), torch.tensor([[0.0, 1.0, 0.0]])
        >>> weight = torch.tensor([0.5, -1.0, 2.0, -0.3, 1.0]).repeat(3, 1)
        >>> abs((x * linear_head(grad, x, weight, f=1.0)).sum().item()) < 1e-5
        True
    """
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
        f: the fraction, usually 0..1. ``split``: see `linear_head`.

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
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    args = (None, stride, padding, dilation, groups)
    return _head(lambda s, w: function(s, w, *args), grad, x, weight, f, split, tuple(range(2, x.dim())))


def conv_transposed_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    f: float,
    split: Split = "contributions",
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
    functions = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    function, args = functions[weight.dim() - 3], (None, stride, padding, output_padding, groups, dilation)
    return _head(lambda s, w: function(s, w, *args), grad, x, weight, f, split, tuple(range(2, x.dim())))


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


def batch_norm(
    grad: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm as the authors run it: ``grad_x = grad * o / (x + 1e-10)``, with the operator's own ``eps`` in o.

    Args:
        grad: (N, C, ...), arriving at the output.
        x: (N, C, ...), the input. The rest as in ``torch.nn.functional.batch_norm``.

    Returns:
        (N, C, ...). At x = 0 the relevance is lost, never NaN.

    Example:
        >>> x, grad = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
        >>> mean, var = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
        >>> o = torch.nn.functional.batch_norm(x, mean, var)
        >>> torch.allclose(x * batch_norm(grad, x, mean, var), grad * o, atol=1e-5)
        True
    """
    return _over(grad * functional.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), x + EPS)


def avg_pool(grad: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Average pooling as the authors run it: ``grad_x = avgpool^T(grad * o) / (x + 1e-10)``.

    Pooling of the whole map keeps its own gradient. Source: the authors' rule for the transitions of DenseNet.

    Args:
        grad: (N, C, *out), arriving at the output.
        x: (N, C, *in), with one, two or three spatial dimensions. The rest as in ``torch.nn.functional.avg_pool2d``.

    Returns:
        (N, C, *in).

    Example:
        >>> x, grad = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
        >>> avg_pool(grad, x, kernel_size=2)[0, 0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.dim() - 3]
    o, transpose = linearised(lambda s: pool(s, **options), x)
    if o.shape[2:].numel() == 1:
        return transpose(grad)
    return _over(transpose(grad * o), x + EPS)


def glu(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Gated linear unit, ``a * sigmoid(b)`` of the halves of x: relevance goes to the signal a, the gate is constant.

    ::

        grad_a = grad * sigmoid(b)          grad_b = 0

    Args:
        grad: arriving at the output. ``x``: the input, twice as long along ``dim``.

    Returns:
        The shape of ``x``.

    Example:
        >>> glu(torch.ones(1), torch.tensor([3.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    gate = x.chunk(2, dim)[1].sigmoid()
    return torch.cat([grad * gate, torch.zeros_like(gate)], dim)


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
    if split == "contributions":
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


def linearised(function: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Give ``function(x)`` and the transpose of its derivative there."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        o = function(x)
    return o.detach(), lambda grad: torch.autograd.grad(o, x, grad, retain_graph=True)[0]


def _over(relevance: Tensor, x: Tensor) -> Tensor:
    """Divide and stay finite: x + 1e-10 may be 0, and relevance / x may be past the type's range."""
    largest = torch.finfo(x.dtype).max
    return (relevance / torch.where(x == 0, EPS, x)).clamp(-largest, largest)
