"""Layer-wise relevance propagation by Zennit, with what the network does outside of modules shared out too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import rules
from ..targets import find_logits
from ..vision import import_torchvision
from . import spelled as operators
from .activations import twin_of

__all__ = ["lrp"]

_STABILIZER = 1e-6  # Zennit's own


def lrp(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Layer-wise relevance propagation, epsilon, z+ and flat, by Zennit: sum over the channels of the relevance.

    Zennit's EpsilonPlusFlat on a copy of the model with batch norms merged into the convolutions whose output they take
    (Zennit's sequential merge goes by the order in which modules are written, which fails for DenseNet); a batch norm
    that stays passes relevance on. Zennit rules modules; sums, means and pooling that the network calls as
    functions get Zennit's rule of norm here (shares in proportion), and functional activations pass relevance on. The
    seed is 1 for the target's logit. Source: S. Bach et al., "On Pixel-Wise Explanations", PLoS ONE 2015;
    M. Kohlbrenner et al., "Towards Best Practice in Explaining Neural Network Decisions with LRP", IJCNN 2020.

    Args:
        model: a classifier in eval mode. ``images``: (N, 3, H, W). ``targets``: (N, K) int64. ``seed``: not read.

    Returns:
        (N, K, H, W), signed.

    Raises:
        ValueError: the model multiplies two signals, or applies weights as a function, for which there is no rule.

    Example:
        >>> import tsgb
        >>> lrp(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 128, 128])
    """
    import_torchvision()  # zennit imports it, and by itself it may not load beside a CPU torch
    from zennit.canonizers import NamedMergeBatchNorm
    from zennit.composites import EpsilonPlusFlat

    twin = twin_of(model)
    composite = EpsilonPlusFlat(_STABILIZER, _STABILIZER, canonizers=[NamedMergeBatchNorm(_followed(twin, images))])
    columns = []
    with composite.context(twin) as ruled:
        for target in targets.T:
            # Anew for each target, as a hook of Zennit's holds one run's tensors.
            leaf = images.detach().clone().requires_grad_()
            image = leaf.clone()
            with _Sharing(ruled):
                logits = find_logits(ruled(image))
            one_hot = torch.zeros_like(logits).scatter_(1, target[:, None], 1)
            columns.append(torch.autograd.grad(logits, leaf, one_hot)[0].sum(1))
    return torch.stack(columns, 1)


def _followed(model: nn.Module, images: Tensor) -> list[tuple[list[str], str]]:
    """Names of convolutions and linear layers, each with that of the batch norm which takes its output, in one run."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors too, so that no other gets their numbers
    pairs: list[tuple[list[str], str]] = []

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if id(args[0]) in outputs:
                pairs.append(([outputs[id(args[0])][0]], name))
        else:
            outputs[id(output)] = (name, output)

    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, module, args, output))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model(images[:1].clone())
    for handle in handles:
        handle.remove()
    return pairs


_SHARED = {
    operators.name(function): function
    for function in (
        *(torch.add, torch.sub, torch.rsub, torch.mul, torch.div, torch.neg, torch.mean, torch.sum),
        *(functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.interpolate),
    )
}
_PASSED = {str(packet).split(".")[1].strip("_") for packet in rules.ACTIVATIONS} | {
    "batch_norm",
    "layer_norm",
    "group_norm",
    "softplus",
}
_WITHOUT_RULE = {"conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "addmm", "bmm"}


class _Sharing(TorchFunctionMode):
    """Gives relevance a rule where the network calls functions, outside of the modules that Zennit has hooked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._inside = 0
        self._hooked = [module for module in model.modules() if module._forward_hooks and not any(module.children())]
        self._handles: list[Any] = []

    def __enter__(self) -> _Sharing:
        for module in self._hooked:
            self._handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self._inside += 1

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._inside -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        signals = [t for t in operators.tensors((args, kwargs)) if t.requires_grad]
        if self._inside or not signals:
            return func(*args, **kwargs)
        call = operators.read(func, args, kwargs)
        is_quotient = call.name == "div" and len(call.args) > 1 and not _depends(call.args[0])  # 1 / x: no share
        if call.name in _WITHOUT_RULE or (len(signals) > 1 and call.name in ("mul", "div")):
            what = "multiplies two signals (a gate)" if len(signals) > 1 else "applies weights as a function"
            raise ValueError(f"lrp: the model {what} in `{call.name}`, for which Zennit's EpsilonPlusFlat has no rule")
        if call.name in _PASSED:
            values = [t.detach() if isinstance(t, Tensor) else t for t in args]
            o = _Passed.apply(signals[0].clone(), func(*values, **kwargs))  # type: ignore[no-untyped-call]
        elif call.name in _SHARED and not is_quotient:
            operands = [t.clone() for t in call.args if _depends(t)]
            others = [None if _depends(t) else t for t in call.args]
            o = _Shared.apply(partial(_SHARED[call.name], **call.kwargs), others, *operands)  # type: ignore[no-untyped-call]
        else:
            return func(*args, **kwargs)
        return o if call.inplace is None else call.inplace.copy_(o)


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Passed(torch.autograd.Function):
    """Returns ``o``, and hands its relevance to ``x`` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor) -> Tensor:
        return o.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    """A function that is linear in its operands, None among the ``others``: relevance in proportion to their parts."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], others: list[Any], *operands: Tensor) -> Tensor:
        ctx.function = lambda *values: _filled(function, others, values)
        ctx.save_for_backward(*operands)
        o: Tensor = ctx.function(*operands)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            operands = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            o = ctx.function(*operands)
        divisor = o.detach() + torch.where(o < 0, -_STABILIZER, _STABILIZER)
        pulled = torch.autograd.grad(o, operands, grads[0] / divisor)
        return None, None, *(t.detach() * grad for t, grad in zip(operands, pulled, strict=True))


def _filled(function: Callable[..., Tensor], others: list[Any], values: tuple[Tensor, ...]) -> Tensor:
    ahead = iter(values)
    return function(*(next(ahead) if other is None else other for other in others))
