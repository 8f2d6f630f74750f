"""The formula sheet of TSGB: one pure function per operator.

Source: L. Cheng, P. Fang, Y. Liang, L. Zhang, C. Shen, H. Wang, "TSGB: Target-Selective Gradient Backprop for Probing
CNN Visual Saliency", IEEE Transactions on Image Processing 31 (2022), 2529-2540, arXiv 2110.05182.

A rule replaces the gradient of one operator ``o = op(x, *args, **kwargs)``::

    rule(grad, x, *args, **kwargs) -> grad_x

``grad`` has the shape of ``o`` and is the gradient that arrives there, ``x`` is the operator's input, the rest are
the operator's own arguments under torch's names; the result has the shape of ``x``. A rule that needs ``o`` has a
keyword of that name and is then given the very values of the forward, else it computes them: in half precision the
two differ, and relevance is conserved only by the former. The *relevance* of a tensor is tensor * gradient,
elementwise; a rule *passes* relevance unchanged where ``x * grad_x = o * grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..tracing import holds, untraced

EPS = 1e-10  # the authors' guard of n and of the input of batch norm
_ROWS, _LARGE = 16, 2**24  # of a product, and of its weights' values: see `product`


def conv(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    o: Tensor | None = None,
) -> Tensor:
    """TSGB-Conv: hand each position's relevance to all that it sees, in proportion to ``|x|``.

    ::

        c = sum over channels of grad * o                     (o includes the bias)
        n = conv(sum over channels of |x|, 1_k)
        grad_x = sign(x) * conv_transpose(c / (n + 1e-10), 1_k)

    ``1_k`` is a kernel of ones of the convolution's size, stride, padding and dilation. Each group of a grouped
    convolution is treated by itself. Source: TSGB-Conv of the paper, for one, two or three spatial dimensions.

    On a map of one position it is a hidden `linear` layer in another layout, and keeps its ordinary gradient: summed
    over the channels, what speaks for and against a class would be lost there.

    Args:
        grad: (N, O, *out), arriving at the output.
        x: (N, C, *in), the input; floating, any sign.
        weight: (O, C / groups, *k). ``bias``: (O,) or None. The rest as in ``torch.nn.functional.conv2d``.
        o: (N, O, *out), the output; None computes it.

    Returns:
        (N, C, *in), of the type of ``x``. The sums of ``x * grad_x`` and ``o * grad`` agree wherever n > 0, but for
        a map of one position.

    Example:
        >>> x, weight = torch.rand(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> grad = torch.randn(1, 4, 6, 6)
        >>> o = torch.nn.functional.conv2d(x, weight)
        >>> torch.allclose((x * conv(grad, x, weight)).sum(), (o * grad).sum(), rtol=1e-3, atol=1e-4)
        True
    """
    if _is_vector(x, weight):
        return linearised(lambda s: _output(weight, s, bias, stride, padding, dilation, groups), x)[1](grad)
    o = _output(weight, x, bias, stride, padding, dilation, groups) if o is None else o
    return _share(grad * o, x, weight, (stride, padding, dilation), fields=groups)


def conv_lumped(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    o: Tensor | None = None,
    parts: int = 1,
) -> Tensor:
    """TSGB-Conv as the authors run it: the sums of `conv` over all channels at once, whatever the groups.

    Arguments, result and source as for `conv`, with which it agrees where ``groups`` is 1. ``parts`` is how many images
    stand side by side in the channels, each of which is treated by itself: models whose weights depend on the image
    convolve all images as groups of one.

    Example:
        >>> x, weight, grad = torch.rand(1, 4, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(1, 4, 3, 3)
        >>> conv_lumped(grad, x, weight, groups=4).shape
        torch.Size([1, 4, 5, 5])
    """
    if _is_vector(x, weight):
        return conv(grad, x, weight, bias, stride, padding, dilation, groups)
    o = _output(weight, x, bias, stride, padding, dilation, groups) if o is None else o
    return _share(grad * o, x, weight, (stride, padding, dilation), fields=parts)


def batch_norm(
    grad: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    o: Tensor | None = None,
) -> Tensor:
    """Batch norm: relevance passes unchanged, ``grad_x = grad * o / (x + 1e-10)``.

    Source: the paper's rule, with the operator's own ``eps`` in ``o``.

    Args:
        grad: (N, C, ...), arriving at the output.
        x: (N, C, ...), the input. The rest as in ``torch.nn.functional.batch_norm``; ``training`` and ``momentum`` are
        not read.

    Returns:
        (N, C, ...). At x = 0 the relevance is lost, never NaN.

    Example:
        >>> x, grad = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
        >>> mean, var = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
        >>> o = torch.nn.functional.batch_norm(x, mean, var)
        >>> torch.allclose(x * batch_norm(grad, x, mean, var), grad * o, atol=1e-5)
        True
    """
    o = functional.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps) if o is None else o
    return _over(grad * o, x + EPS)


def avg_pool(grad: Tensor, x: Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Average pooling as the authors run it, ``grad_x = avgpool^T(grad * o) / (x + 1e-10)``.

    Pooling of the whole map keeps its ordinary gradient. Source: the authors' rule for the transitions of DenseNet.

    Args:
        grad: (N, C, *out), arriving at the output.
        x: (N, C, *in), with one, two or three spatial dimensions. The rest as in ``torch.nn.functional.avg_pool2d``.

    Returns:
        (N, C, *in).

    Example:
        >>> x, grad = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
        >>> avg_pool(grad, x, 2)[0, 0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.dim() - 3]
    o, transpose = linearised(lambda s: pool(s, kernel_size, *args, **kwargs), x)
    if o.shape[2:].numel() == 1:
        return transpose(grad)
    return _over(transpose(grad * o), x + EPS)


def linear(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Hidden linear layer: on a vector the ordinary gradient, ``grad_x = W^T grad``.

    On positions (N, ..., C), more than one, it is a convolution of 1 x 1 in another layout, and shares relevance as
    `conv` does::

        grad_x = sign(x) * c / (n + 1e-10),     c = sum of grad * o,  n = sum of |x|, over the channels

    Args:
        grad: (..., O), arriving at the output.
        x: (..., C), the input; the first dimension counts images.
        weight: (O, C). ``bias``: (O,) or None.

    Returns:
        (..., C).

    Example:
        >>> linear(torch.tensor([[1.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """
    if x.shape[1:-1].numel() == 1:
        return product(grad, weight)
    c = (grad * functional.linear(x, weight, bias)).sum(-1, keepdim=True)
    return x.sign() * (c / (x.abs().sum(-1, keepdim=True) + EPS))


def activation(
    grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], o: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Elementwise activation: relevance passes unchanged, ``grad_x = grad * act(x) / x``, and act'(0) at 0.

    Holds for act(0) = 0; an activation with act(0) != 0 (``clamp(x, 1, 2)``) keeps its ordinary gradient.

    Args:
        grad: any shape, arriving at the output.
        x: the same shape, the input.
        function: the activation, called as ``function(x, *args, **kwargs)``.
        o: the same shape, the output; None computes it.

    Returns:
        The shape of ``x``; finite.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 3.0])
        >>> activation(torch.ones(3), x, function=torch.nn.functional.silu)
        tensor([0.1192, 0.5000, 0.9526])
    """
    with untraced():
        is_moving = bool(function(torch.zeros_like(x), *args, **kwargs).any())
    if is_moving:
        return linearised(lambda s: function(s, *args, **kwargs), x)[1](grad)
    zero = x == 0
    slope = (function(x, *args, **kwargs) if o is None else o) / torch.where(zero, 1, x)
    if holds(zero):
        at_zero = linearised(lambda s: function(s, *args, **kwargs), torch.zeros_like(x))[1](torch.ones_like(x))
        slope = torch.where(zero, at_zero, slope)
    return grad * slope


def shift(
    grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], o: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Constant added or subtracted: relevance passes unchanged, ``grad_x = grad * o / x``.

    So a network that normalises its own input, ``(x - mean) / std``, gets the map of the network that is fed the
    normalised image. (A constant factor needs no rule: its ordinary gradient passes relevance.)

    Args:
        grad: any shape, arriving at the output. ``x``: the input, broadcast to it.
        function: the operator, called as ``function(x, *args, **kwargs)``.
        o: the output; None computes it.

    Returns:
        The shape of ``x``; 0 where x = 0.

    Example:
        >>> shift(torch.ones(2), torch.tensor([2.0, 4.0]), 1.0, function=torch.sub)
        tensor([0.5000, 0.7500])
    """
    relevance = (grad * (function(x, *args, **kwargs) if o is None else o)).sum_to_size(x.shape)
    return torch.where(x == 0, 0, _over(relevance, x))


def gate(grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
    """Product of a signal and a gate: relevance goes to the signal, the gate is constant, ``grad_x = grad * gate``.

    Args:
        grad: any shape, arriving at the product. ``x``: the signal, broadcast to it.
        function: the product, called as ``function(x, *args, **kwargs)`` with the gate among ``args``; linear in ``x``.

    Returns:
        The shape of ``x``.

    Example:
        >>> gate(torch.ones(2), torch.tensor([5.0, 6.0]), torch.tensor([0.5, 0.1]), function=torch.mul)
        tensor([0.5000, 0.1000])
    """
    return linearised(lambda s: function(s, *args, **kwargs), x)[1](grad)


def _is_vector(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a convolution's input has one position."""
    return x.shape[2 - weight.dim() :].numel() == 1


def _output(weight: Tensor, x: Tensor, *args: Any) -> Tensor:
    return convolution(weight)(x, weight, *args)


def _share(relevance: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any], fields: int) -> Tensor:
    """`conv` from the relevance of its output, with the channels summed in so many fields."""
    if x.dim() < weight.dim():
        return _share(relevance[None], x[None], weight, geometry, fields)[0]
    function = convolution(weight)
    return shared(relevance, x, weight, fields, lambda size, ones: function(size, ones, None, *geometry, fields))


def shared(
    relevance: Tensor, x: Tensor, weight: Tensor, fields: int, seen: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Share the relevance of each position of the output among the positions it comes from, in proportion to ``|x|``.

    Args:
        relevance: (N, O, *out). ``x``: (N, C, *in). ``weight``: (., ., *k), of which the size alone counts.
        fields: the number of groups of channels that are treated by themselves.
        seen: the linear operator from (N, fields, *in) and a kernel of ones (fields, 1, *k) to (N, fields, *out).

    Returns:
        (N, C, *in), the gradient ``sign(x) * seen^T(c / (n + 1e-10))``.
    """
    c, size = _summed(relevance, fields), _summed(x.abs(), fields)
    ones = weight.new_ones(fields, 1, *weight.shape[2:])
    n, transpose = linearised(lambda s: seen(s, ones), size)
    # A fast convolution may return a rounding error below zero where n is 0.
    field = transpose(c / (n.clamp(min=0) + EPS))
    return x.sign() * field.repeat_interleave(x.shape[1] // fields, 1)


def _summed(x: Tensor, fields: int) -> Tensor:
    """Sums over the channels of each field: (N, C, *) to (N, fields, *)."""
    return x.reshape(len(x), fields, -1, *x.shape[2:]).sum(2)


def convolution(weight: Tensor) -> Callable[..., Tensor]:
    """Give torch's convolution of as many dimensions as a weight (O, C, *k) has."""
    return (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]


def convolution_transposed(weight: Tensor) -> Callable[..., Tensor]:
    """Give torch's transposed convolution of as many dimensions as a weight (C, O, *k) has."""
    return (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[weight.dim() - 3]


def linearised(function: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``function(x)`` and the transpose of its derivative there, by autograd."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        o = function(x)
    return o.detach(), lambda grad: torch.autograd.grad(o, x, grad, retain_graph=True)[0]


def product(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``; of many rows and large weights the other way round.

    On a CPU that takes a quarter less time, and with fewer rows many times as much.
    """
    if grad.dim() == 2 and len(grad) >= _ROWS and weight.numel() >= _LARGE:
        return (weight.T @ grad.T).T.contiguous()
    return grad @ weight


def _over(relevance: Tensor, x: Tensor) -> Tensor:
    """``relevance / x``, kept finite: x + 1e-10 may be 0, and relevance / x may be past the type's range."""
    largest = torch.finfo(x.dtype).max
    return (relevance / torch.where(x == 0, EPS, x)).clamp(-largest, largest)
