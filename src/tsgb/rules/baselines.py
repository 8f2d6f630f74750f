"""Rules of other methods, to measure TSGB against: guided backprop, the deconvolutional network, excitation backprop.

Each is one table, runs on any spelling of a network, and serves `tsgb.explain` too. GUIDED and DECONVNET change the
gradient at rectifiers alone; their own maps are of ``|gradient|``, while `tsgb.explain` shows image * gradient under
them. EXCITATION and CONTRASTIVE are written as gradients: the probability of a tensor is tensor * gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .formulas import linearised
from .tables import CONVOLUTIONS, HEAD, ORDINARY, PAPER, PIXELS, RECTIFIERS, F, Rule, Table

__all__ = [
    "CONTRASTIVE",
    "DECONVNET",
    "EXCITATION",
    "GUIDED",
    "contrastive_head",
    "deconvnet",
    "excitation",
    "excitation_head",
    "guided",
]

aten = torch.ops.aten


def guided(grad: Tensor, x: Tensor, *args: Any, function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
    """Guided backprop: what arrives is rectified before the ordinary gradient, ``grad_x = max(grad, 0) * act'(x)``.

    Source: J. Springenberg, A. Dosovitskiy, T. Brox, M. Riedmiller, "Striving for Simplicity: The All Convolutional
    Net", ICLR workshop 2015, for ReLU; here for each activation that rectifies.

    Args:
        grad: any shape, arriving at the output.
        x: the same shape, the input.
        function: the activation, called as ``function(x, *args, **kwargs)``.

    Returns:
        The shape of ``x``.

    Example:
        >>> x, grad = torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([5.0, -5.0, 5.0])
        >>> guided(grad, x, function=functional.relu)
        tensor([0., 0., 5.])
    """
    return linearised(lambda s: function(s, *args, **kwargs), x)[1](grad.clamp(min=0))


def deconvnet(grad: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Deconvolutional network: what arrives is rectified, whatever the forward did, ``grad_x = max(grad, 0)``.

    Source: M. Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014.

    Args:
        grad: any shape, arriving at the output. ``x`` and the rest: as for `guided`, not read.

    Returns:
        The shape of ``x``.

    Example:
        >>> deconvnet(torch.tensor([5.0, -5.0]), torch.tensor([-1.0, 1.0]))
        tensor([5., 0.])
    """
    return grad.clamp(min=0)


def excitation(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    function: Callable[..., Tensor],
    o: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Excitation backprop: hand an output's probability to its inputs in proportion to what excites it.

    ::

        P = grad * o        Z = sum max(w x, 0)        (o includes the bias, Z does not)
        x * grad_x = sum over outputs of max(w x, 0) * P / Z

    which for x >= 0 is ``grad_x = W+^T (P / Z)``; for x < 0 the negative weights excite. An output with Z = 0 hands
    nothing on. Source: J. Zhang, Z. Lin, J. Brandt, X. Shen, S. Sclaroff, "Top-down Neural Attention by Excitation
    Backprop", ECCV 2016 and IJCV 2018, for features >= 0.

    Args:
        grad: arriving at the output. ``x``: the input, any sign. ``weight``, ``bias`` and the rest: as ``function``
            takes them.
        function: a convolution or ``functional.linear``.
        o: the output; None computes it.

    Returns:
        The shape of ``x``. The sums of ``x * grad_x`` and ``o * grad`` agree wherever Z > 0.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, -1.0]])
        >>> x * excitation(torch.ones(1, 1), x, weight, function=functional.linear)  # o = 1 in shares of 3 : 2
        tensor([[0.6000, 0.4000, 0.0000]])
    """
    o = function(x, weight, bias, *args, **kwargs) if o is None else o
    z, pull = _excited(lambda s, w: function(s, w, None, *args, **kwargs), x, weight)
    return pull(_ratio(grad * o, z))


def excitation_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    function: Callable[..., Tensor],
    f: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    """`excitation` at the head, where the gradient itself is the probability: ``grad_x = W+^T (grad / Z)``.

    Where the head has positions (a convolution before pooling) the class has one Z, as in `conv_head`::

        Z_k = sum over positions p of grad_k(p) z_k(p)        grad_x = W+^T (grad * sum over p of grad_k(p) / Z_k)

    which is the former under global pooling. For each position by itself every position would get the same share.

    Args:
        grad: (N, ..., O) or (N, O, *out), arriving at the logits. The rest as for `excitation`; ``f`` is not read.

    Returns:
        The shape of ``x``. For one target with seed 1 on a vector the relevance sums to 1, or is 0 where Z = 0.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, -1.0]])
        >>> x * excitation_head(torch.ones(1, 1), x, weight, function=functional.linear)
        tensor([[0.6000, 0.4000, 0.0000]])
    """
    z, pull = _excited(lambda s, w: function(s, w, None, *args, **kwargs), x, weight)
    positions = tuple(range(1, x.dim() - 1)) if weight.dim() == 2 else tuple(range(2, x.dim()))
    total, z = grad, grad * z
    if positions:
        total, z = (values.sum(positions, keepdim=True) for values in (total, z))
    return pull(grad * _ratio(total, z))


def contrastive_head(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    function: Callable[..., Tensor],
    f: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    """Contrastive excitation (c-MWP): what excites the class, less what would excite its opposite, of weights -W.

    ``grad_x`` is `excitation_head` with W less that with -W, each of which sums to the seed.

    Source: as for `excitation`.

    Args:
        grad, x, weight and the rest: as for `excitation_head`; ``f`` is not read.

    Returns:
        The shape of ``x``. The relevance sums to 0 where the class has evidence for and against.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, -1.0]])
        >>> x * contrastive_head(torch.ones(1, 1), x, weight, function=functional.linear)
        tensor([[ 0.6000,  0.4000, -1.0000]])
    """
    return excitation_head(grad, x, weight, None, *args, function=function, **kwargs) - excitation_head(
        grad, x, -weight, None, *args, function=function, **kwargs
    )


def _ratio(probability: Tensor, z: Tensor) -> Tensor:
    """``probability / z``, 0 where z is 0, kept finite."""
    info = torch.finfo(z.dtype)
    shared = z.abs() > info.tiny
    return torch.where(shared, probability / torch.where(shared, z, 1), 0).clamp(-info.max, info.max)


def _excited(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``Z = sum max(w x, 0)``, and the transpose that hands shares back along the weights that excite."""
    z, pull = linearised(lambda s: function(s, weight.clamp(min=0)), x.clamp(min=0))
    if not (x < 0).any():
        return z, pull
    z_below, pull_below = linearised(lambda s: function(s, weight.clamp(max=0)), x.clamp(max=0))
    return z + z_below, lambda share: torch.where(x < 0, pull_below(share), pull(share))


_FUNCTIONS = {
    aten.linear: functional.linear,
    aten.conv1d: functional.conv1d,
    aten.conv2d: functional.conv2d,
    aten.conv3d: functional.conv3d,
}


def _each(rule: Callable[..., Tensor]) -> Table:
    name = rule.__name__
    return {packet: Rule("formula", name, partial(rule, function=f)) for packet, f in _FUNCTIONS.items()}


def _heads(rule: Callable[..., Tensor]) -> Table:
    return {packet: partial(rule, function=f) for packet, f in _FUNCTIONS.items()}


_GRADIENT: Table = {
    **PAPER,
    **dict.fromkeys([*CONVOLUTIONS, aten.linear], ORDINARY),
    **dict.fromkeys((aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.batch_norm), ORDINARY),
    HEAD: dict.fromkeys(PAPER[HEAD], ORDINARY),
    F: None,
}

#: Guided backprop.
GUIDED: Table = {**_GRADIENT, **dict.fromkeys(RECTIFIERS, Rule("guided", "guided"))}

#: The deconvolutional network.
DECONVNET: Table = {**_GRADIENT, **dict.fromkeys(RECTIFIERS, Rule("formula", "deconvnet", deconvnet))}

#: Excitation backprop; batch norm, activations, constant shifts and gates pass the probability as under PIXELS.
EXCITATION: Table = {**PIXELS, **_each(excitation), HEAD: _heads(excitation_head), F: 1.0}

#: Contrastive excitation backprop.
CONTRASTIVE: Table = {**EXCITATION, HEAD: _heads(contrastive_head)}
