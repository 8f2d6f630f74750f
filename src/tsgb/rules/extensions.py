"""Rules for operators of which the paper does not speak.

Normalisation by group, layer or instance, or by the response of the channels beside, needs no formula of its own: like
batch norm it is a factor and a shift, given by the image in place of the training, and relevance passes it by `shift`.
A linear layer on positions is a convolution, see `linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formulas import convolution_transposed, shared

__all__ = ["conv_transposed", "glu"]


def conv_transposed(
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
    o: Tensor | None = None,
) -> Tensor:
    """Transposed convolution: TSGB-Conv over what each position of the output comes from.

    ::

        c = sum over channels of grad * o                     (o includes the bias)
        n = conv_transpose(sum over channels of |x|, 1_k)
        grad_x = sign(x) * conv(c / (n + 1e-10), 1_k)

    The reason is that of `conv`: what a position of the output says is said by all that it sees, in proportion to
    ``|x|``; here it sees where the kernel reached it from. Each group is treated by itself.

    Args:
        grad: (N, O, *out), arriving at the output.
        x: (N, C, *in), the input; floating, any sign.
        weight: (C, O / groups, *k). ``bias``: (O,) or None. The rest as in ``torch.nn.functional.conv_transpose2d``.
        o: (N, O, *out), the output; None computes it.

    Returns:
        (N, C, *in), of the type of ``x``. The sums of ``x * grad_x`` and ``o * grad`` agree wherever n > 0.

    Example:
        >>> x, weight = torch.rand(1, 3, 4, 4), torch.randn(3, 2, 2, 2)
        >>> o = torch.nn.functional.conv_transpose2d(x, weight, stride=2)
        >>> grad_x = conv_transposed(torch.ones_like(o), x, weight, stride=2)
        >>> torch.allclose((x * grad_x).sum(), o.sum(), rtol=1e-3, atol=1e-3)
        True
    """
    if x.dim() < weight.dim():
        rest = (bias, stride, padding, output_padding, groups, dilation)
        return conv_transposed(grad[None], x[None], weight, *rest, o=None if o is None else o[None])[0]
    function = convolution_transposed(weight)
    geometry = (stride, padding, output_padding, groups, dilation)
    if o is None:
        o = function(x, weight, bias, *geometry)
    return shared(grad * o, x, weight, groups, lambda size, ones: function(size, ones, None, *geometry))


def glu(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Gated linear unit, ``a * sigmoid(b)`` of the halves of x: relevance goes to the signal a, as in `gate`.

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
    opened = x.chunk(2, dim)[1].sigmoid()
    return torch.cat([grad * opened, torch.zeros_like(opened)], dim)
