"""TSGB by hand: which pixels of an image speak for a class, in one file of plain torch, to read beside the paper.

    python examples/by_hand.py photo.jpg --model resnet18 --target 243 --out map.png

TSGB is the ordinary backward pass with three replacements. Let o be the output of an operator, x its input, and g the
gradient that arrives at o. "Relevance" is a tensor times its gradient, elementwise.

TSGB-FC, for the head, which is the last linear layer. W+ = max(W, 0) and W- = min(W, 0); the bias is left out:

    z+ = W+ x        z- = W- x        beta = f * z+ / |z-|
    g_x = W+^T g + W-^T (beta * g)

TSGB-Conv, for every convolution. 1_k is a kernel of ones of the convolution's size, stride, padding and dilation:

    c = sum over channels of g * o        n = conv(sum over channels of |x|, 1_k)
    g_x = sign(x) * conv_transpose(c / (n + 1e-10), 1_k)

Batch norm passes relevance unchanged. Average pooling over a window smaller than the map has the same form:

    g_x = g * o / (x + 1e-10)             g_x = avg_pool_transpose(g * o) / (x + 1e-10)

Every other operator keeps its ordinary gradient. The map is the sum over channels of x * g at the image.

Source: L. Cheng, P. Fang, Y. Liang, L. Zhang, C. Shen, H. Wang, "TSGB: Target-Selective Gradient Backprop for Probing
CNN Visual Saliency", IEEE Transactions on Image Processing 31 (2022), 2529-2540, arXiv 2110.05182.

The network is not modified: while it runs, torch hands each call of a function to the mode below. The map is that of
`tsgb.explain(model, images, target, rules=tsgb.rules.PAPER)`. This file covers classifiers of images whose head is a
linear layer; tsgb covers the rest.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

EPS = 1e-10


def head(g: Tensor, x: Tensor, weight: Tensor, f: float) -> Tensor:
    """TSGB-FC: weigh the evidence against the class so that it balances the share f of the evidence for it."""
    w_pos, w_neg = weight.clamp(min=0), weight.clamp(max=0)
    z_pos, z_neg = x @ w_pos.T, x @ w_neg.T
    beta = torch.where(z_neg == 0, 0, f * z_pos / z_neg.abs())
    return g @ w_pos + (beta * g) @ w_neg


def conv2d(g, x, o, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """TSGB-Conv: share the relevance of each output position among the inputs it sees, in proportion to |x|."""
    ones = torch.ones_like(weight[:1, :1])
    c, size = (g * o).sum(1, keepdim=True), x.abs().sum(1, keepdim=True)
    n, conv_transpose = transposed(lambda size: F.conv2d(size, ones, None, stride, padding, dilation), size)
    return x.sign() * conv_transpose(c / (n + EPS))


def batch_norm(g: Tensor, x: Tensor, o: Tensor, *args, **kwargs) -> Tensor:
    """Batch norm passes relevance unchanged: x * g_x = o * g."""
    return g * o / (x + EPS)


def avg_pool2d(g: Tensor, x: Tensor, o: Tensor, *args, **kwargs) -> Tensor:
    """Average pooling spreads relevance over its window. Pooling of the whole map keeps its ordinary gradient."""
    _, pool_transpose = transposed(lambda x: F.avg_pool2d(x, *args, **kwargs), x)
    if o.shape[2:].numel() == 1:
        return pool_transpose(g)
    return pool_transpose(g * o) / (x + EPS)


def transposed(operator, x: Tensor):
    """Return operator(x) of a linear operator, and its transpose as a function."""
    o, vjp = torch.func.vjp(operator, x)
    return o, lambda g: vjp(g)[0]


class Operator(torch.autograd.Function):
    """An operator whose gradient is replaced by a formula."""

    @staticmethod
    def forward(ctx, x, operator, formula):
        """Run the operator as it is."""
        o = operator(x)
        ctx.formula = formula
        ctx.save_for_backward(x, o)
        return o

    @staticmethod
    def backward(ctx, g):
        """Return the formula's g_x in place of the gradient."""
        x, o = ctx.saved_tensors
        return ctx.formula(g, x, o), None, None


class TSGB(TorchFunctionMode):
    """While active, torch's convolution, batch norm, average pooling and linear layer have TSGB's gradients."""

    def __init__(self, f: float = 1.0) -> None:
        super().__init__()
        self.f = f
        self.head_is_found = False
        self.formulas = {
            F.conv2d: conv2d,
            F.batch_norm: batch_norm,
            F.avg_pool2d: avg_pool2d,
            F.linear: self.linear,
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Receive each call of a torch function that the model makes."""
        kwargs = kwargs or {}
        formula = self.formulas.get(function)
        if formula is None:
            return function(*args, **kwargs)
        x, *rest = args
        if function is F.conv2d and x.shape[2:].numel() == 1:  # a hidden linear layer, as in squeeze-and-excitation
            return function(*args, **kwargs)
        o = Operator.apply(x, lambda x: function(x, *rest, **kwargs), lambda g, x, o: formula(g, x, o, *rest, **kwargs))
        return o.clone()  # the model may write to its copy, as nn.ReLU(inplace=True) does

    def linear(self, g: Tensor, x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The backward pass starts at the logits, so the first linear layer that it reaches is the head."""
        if x.dim() != 2:
            raise ValueError(f"linear layers take vectors (N, C) in this file, got {tuple(x.shape)}")
        if self.head_is_found:
            return g @ weight  # the ordinary gradient
        self.head_is_found = True
        return head(g, x, weight, self.f)


def tsgb_map(model: torch.nn.Module, images: Tensor, target: int | Tensor, f: float = 1.0) -> Tensor:
    """Map the evidence for a class, one forward and one backward pass.

    Args:
        model: a classifier in eval mode, with logits (N, classes).
        images: (N, C, H, W).
        target: a class, or one class for each image, (N,).
        f: the share of the evidence for the class that the evidence against it cancels.

    Returns:
        (N, 1, H, W), signed: positive values speak for the class.
    """
    if model.training:
        raise ValueError("the model must be in eval mode: call model.eval()")
    images = images.detach().requires_grad_()
    rows = torch.arange(len(images), device=images.device)
    with torch.enable_grad(), TSGB(f) as mode:
        score = model(images)[rows, target].sum()  # so the seed is 1 on the target's logit
    (g,) = torch.autograd.grad(score, images)
    if not mode.head_is_found:
        raise ValueError("the model has no linear layer, which would be the head")
    return (images.detach() * g).sum(1, keepdim=True)


def main() -> None:
    """Draw the map of a photograph for a class of ImageNet, with a network of torchvision."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("image", help="a photograph")
    parser.add_argument("--model", default="resnet18", help="the name of a network of torchvision")
    parser.add_argument("--target", type=int, help="a class index; by default the predicted class")
    parser.add_argument("--out", default="map.png", help="where the map goes, in grey")
    options = parser.parse_args()

    from torchvision.datasets.folder import default_loader
    from torchvision.models import get_model, get_model_weights
    from torchvision.utils import save_image

    weights = get_model_weights(options.model).DEFAULT
    model = get_model(options.model, weights=weights).eval()
    images = weights.transforms()(default_loader(options.image))[None]
    with torch.no_grad():
        target = options.target if options.target is not None else int(model(images).argmax())
    positive = tsgb_map(model, images, target)[0].clamp(min=0)
    save_image((positive / positive.quantile(0.99)).clamp(max=1), options.out)
    print(f"{options.out}: the evidence for {weights.meta['categories'][target]}")


if __name__ == "__main__":
    main()
