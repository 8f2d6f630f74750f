"""TSGB written again, slow and literal, for the tests to hold the library against.

Rules loop over positions as the formulas do; networks are spelled out in these operators, layer by layer, with no
mechanism at all. Nothing here uses the library.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-10


def conv_output(x, weight, bias, stride, padding, dilation, groups):
    """Convolution of (N, C, H, W) by its definition, one output position at a time, and what each position sees."""
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    reach = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    size = [(padded.shape[2 + d] - reach[d]) // stride[d] + 1 for d in (0, 1)]
    inputs, outputs = x.shape[1] // groups, weight.shape[0] // groups
    o = x.new_zeros(len(x), len(weight), *size)
    seen = {}
    for i in range(size[0]):
        for j in range(size[1]):
            taps = []
            for a in range(kernel[0]):
                for b in range(kernel[1]):
                    row, column = i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]
                    for g in range(groups):
                        part = padded[:, g * inputs : (g + 1) * inputs, row, column]
                        o[:, g * outputs : (g + 1) * outputs, i, j] += (
                            part @ weight[g * outputs : (g + 1) * outputs, :, a, b].T
                        )
                    row, column = row - padding[0], column - padding[1]
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        taps.append((row, column))
            seen[i, j] = taps
    return (o if bias is None else o + bias[:, None, None]), seen


def conv(grad, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, lumped=False):
    """TSGB-Conv: each position's relevance shared among all that it sees, in proportion to |x|."""
    o, seen = conv_output(x, weight, bias, stride, padding, dilation, groups)
    fields = 1 if lumped else groups
    inputs, outputs = x.shape[1] // fields, o.shape[1] // fields
    below = torch.zeros_like(x)
    if x.shape[2:].numel() == 1:  # a linear layer, whose gradient is the ordinary one
        inputs, outputs = x.shape[1] // groups, o.shape[1] // groups
        for i, j in seen:
            a, b = ((padding[d] - place * stride[d]) // dilation[d] for d, place in enumerate((i, j)))
            for g in range(groups if seen[i, j] else 0):
                source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
                below[:, source, 0, 0] += grad[:, sink, i, j] @ weight[sink, :, a, b]
        return below
    for n in range(len(x)):
        for g in range(fields):
            source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            for (i, j), taps in seen.items():
                c = (grad[n, sink, i, j] * o[n, sink, i, j]).sum()
                total = sum((x[n, source, row, column].abs().sum() for row, column in taps), x.new_zeros(()))
                for row, column in taps:
                    below[n, source, row, column] += c / (total + EPS) * x[n, source, row, column].sign()
    return below


def head(grad, x, weight, f, contributions):
    """TSGB-FC on (N, P, C): one beta for each image and class, summed over the positions P."""
    below = torch.zeros_like(x)
    for n in range(len(x)):
        for k in range(len(weight)):
            arriving = grad[n, :, k]
            sign = -1 if len(arriving) > 1 and arriving.sum() < 0 else 1
            z_for, z_against = 0.0, 0.0
            for p in range(x.shape[1]):
                for c in range(x.shape[2]):
                    w, value = weight[k, c], x[n, p, c]
                    speaks_for = w * value > 0 if contributions else w > 0
                    share = w * value * (sign * arriving[p] if x.shape[1] > 1 else 1)
                    z_for, z_against = (z_for + share, z_against) if speaks_for else (z_for, z_against + share)
            beta = 0.0 if z_against == 0 else f * z_for / abs(z_against)
            for p in range(x.shape[1]):
                for c in range(x.shape[2]):
                    w, value = weight[k, c], x[n, p, c]
                    speaks_for = w > 0 if not contributions or value == 0 else w * value > 0
                    below[n, p, c] += w * arriving[p] * (1 if speaks_for else beta)
    return below


def linear_head(grad, x, weight, bias=None, *, f, split="contributions"):
    """`head` for a linear layer on vectors."""
    return head(grad[:, None], x[:, None], weight, f, split == "contributions")[:, 0]


def conv_head(grad, x, weight, bias=None, *, f, split="contributions"):
    """`head` for a 1 x 1 convolution."""
    below = head(grad.flatten(2).mT, x.flatten(2).mT, weight[:, :, 0, 0], f, split == "contributions")
    return below.mT.reshape(x.shape)


def batch_norm(grad, x, mean, var, weight, bias, eps, guard=EPS):
    """Relevance passes unchanged, value by value, but for the authors' guard."""
    o = torch.empty_like(x)
    for c in range(x.shape[1]):
        o[:, c] = (x[:, c] - mean[c]) / (var[c] + eps).sqrt() * weight[c] + bias[c]
    return grad * o / (x + guard)


def avg_pool(grad, x, kernel, stride, padding):
    """The authors' average pooling: the relevance of each window spread evenly over it, over x."""
    spread = torch.zeros_like(x)
    for i in range(grad.shape[2]):
        for j in range(grad.shape[3]):
            rows = [i * stride + a - padding for a in range(kernel)]
            columns = [j * stride + b - padding for b in range(kernel)]
            window = [(r, c) for r in rows for c in columns if 0 <= r < x.shape[2] and 0 <= c < x.shape[3]]
            o = sum(x[:, :, r, c] for r, c in window) / kernel**2
            for r, c in window:
                spread[:, :, r, c] += grad[:, :, i, j] * o / kernel**2
    return spread / (x + EPS)


def activation(grad, x, function: Callable[[float], float], slope_at_zero: float):
    """Relevance passes unchanged, one number at a time."""
    flat = [function(value) / value if value != 0 else slope_at_zero for value in x.flatten().tolist()]
    return grad * torch.tensor(flat, dtype=x.dtype).reshape(x.shape)


class _Operator(torch.autograd.Function):
    """An operator with another backward, as one would edit it into a copy of a network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable, backward: Callable) -> Tensor:
        ctx.x, ctx.back = x.detach().clone(), backward
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return ctx.back(grads[0], ctx.x), None, None


class Plain:
    """The operators of a network under one of the two tables, for float64 images of a few pixels."""

    def __init__(self, paper: bool, f: float) -> None:
        self.paper, self.f = paper, f
        self.split = "weights" if paper else "contributions"

    def conv(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        geometry = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
        return _Operator.apply(
            x,
            lambda s: functional.conv2d(s, weight, bias, *geometry, groups),
            lambda grad, s: conv(grad, s, weight, bias, *geometry, groups, lumped=self.paper),
        )

    def layer(self, x, module: nn.Conv2d):
        return self.conv(x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)

    def norm(self, x, module: nn.BatchNorm2d):
        settings = (module.running_mean, module.running_var, module.weight, module.bias)
        return _Operator.apply(
            x,
            lambda s: functional.batch_norm(s, *settings, False, 0.0, module.eps),
            lambda grad, s: batch_norm(grad, s, *settings, module.eps, EPS if self.paper else 0),
        )

    def passing(self, x, function, slope_at_zero=0.0):
        """An elementwise activation."""
        if self.paper:
            return function(x)
        one = lambda value: float(function(torch.tensor(value, dtype=torch.float64)))  # noqa: E731
        return _Operator.apply(x, function, lambda grad, s: activation(grad, s, one, slope_at_zero))

    def shift(self, x, function):
        """A constant added or subtracted."""
        if self.paper:
            return function(x)
        return _Operator.apply(x, function, lambda grad, s: torch.where(s == 0, 0, grad * function(s) / s))

    def gated(self, signal, gate):
        return signal * (gate if self.paper else gate.detach())

    def linear_head(self, x, weight, bias=None):
        return _Operator.apply(
            x,
            lambda s: functional.linear(s, weight, bias),
            lambda grad, s: linear_head(grad, s, weight, f=self.f, split=self.split),
        )

    def conv_head(self, x, weight, bias=None):
        return _Operator.apply(
            x,
            lambda s: functional.conv2d(s, weight, bias),
            lambda grad, s: conv_head(grad, s, weight, f=self.f, split=self.split),
        )


def explain(network: Callable[[Plain, Tensor], Tensor], images: Tensor, target: int, paper: bool, f: float) -> Tensor:
    """Maps (N, H, W) of a network written in plain operators."""
    leaf = images.detach().clone().requires_grad_()
    logits = network(Plain(paper, f), leaf)
    (grad,) = torch.autograd.grad(logits[:, target].sum(), leaf)
    return (leaf * grad).sum(1).detach()
