"""How torch spells its operators: one name, one order of arguments for functions, methods, `+=` and in-place calls.

`rules` is keyed by torch functions, and a model may call the same operator as ``F.relu(x)``, ``F.relu(x, True)``,
``torch.relu(x)``, ``x.relu()`` or ``x.relu_()``. The last word of the name without underscores is the same for all of
them; what is left (synonyms, a bias that comes first, operands that change places) is written down here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: Names of autograd's nodes that carry weights or bend, of which none should come about unseen.
BENDING = re.compile(
    r"^(Convolution|Addmm|Mm|Mv|Addmv|Bmm|Baddbmm|Linear|\w*BatchNorm|Sigmoid|Tanh|Relu|LeakyRelu|Hardtanh|Hardswish"
    r"|Hardsigmoid|Silu|Gelu|Elu|Softplus|Mish|Exp|Log|Pow|Sqrt|Softmax|DifferentiableGraph|CompiledFunction)\w*Backward"
    r"|DifferentiableGraph"
)

_SYNONYMS = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "arctan": "atan",
    "negative": "neg",
    "expit": "sigmoid",
}


@dataclass(frozen=True)
class Call:
    """One call of an operator in its canonical spelling, ``name(x, *args, **kwargs)``.

    ``inplace`` is the tensor that an in-place call writes to, or None.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: Tensor | None = None


def name(function: Callable[..., Any]) -> str:
    """Name an operator, the same for all its spellings.

    Example:
        >>> from torch.nn import functional
        >>> [name(f) for f in (functional.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.__getitem__)]
        ['relu', 'relu', 'relu', 'getitem']
    """
    word = getattr(function, "__name__", type(function).__name__)
    if word == "__get__":
        word = function.__self__.__name__  # type: ignore[attr-defined]
    word = word.strip("_")
    return _SYNONYMS.get(word, word)


def read(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Read one call: bind its arguments, take ``inplace`` out, and put the operand that depends on the image first.

    Args:
        function: the torch function or method that was called, with ``args`` and ``kwargs`` as they came. Tensors that
            depend on the image require grad, no others do.

    Raises:
        RuntimeError: the call is random or depends on the rest of the batch (``training=True``).

    Example:
        >>> from torch.nn import functional
        >>> x = torch.ones(2, requires_grad=True)
        >>> call = read(functional.relu, (x, True), {})
        >>> call.name, len(call.args), call.kwargs, call.inplace is x
        ('relu', 1, {}, True)
    """
    word = getattr(function, "__name__", "")
    is_inplace = word.endswith("_") and not word.endswith("__")
    inplace = (args[0] if args else kwargs.get("input")) if is_inplace else None
    call = _bound(function, Call(name(function), args, kwargs, inplace))
    _refuse_training(call)
    if function is torch.batch_norm:
        x, weight, bias, mean, var, training, momentum, eps = args[:8]
        return replace(call, args=(x, mean, var, weight, bias, training, momentum, eps), kwargs={})
    if "input" in call.kwargs:
        rest = {key: value for key, value in call.kwargs.items() if key != "input"}
        call = replace(call, args=(call.kwargs["input"], *call.args), kwargs=rest)
    if len(call.args) == 1 and "other" in call.kwargs:
        rest = {key: value for key, value in call.kwargs.items() if key != "other"}
        call = replace(call, args=(call.args[0], call.kwargs["other"]), kwargs=rest)
    return _SWAPS.get(call.name, _same)(call)


def plain(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function; pooling of the whole map as the mean that it is, as torch restrides its result.

    Example:
        >>> plain(torch.nn.functional.adaptive_avg_pool2d, (torch.ones(1, 2, 3, 3), 1), {}).shape
        torch.Size([1, 2, 1, 1])
    """
    if name(function) == "adaptive_avg_pool2d" and len(args) == 2 and not kwargs and args[1] in (1, (1, 1), [1, 1]):
        return args[0].mean((-2, -1), keepdim=True)
    return function(*args, **kwargs)


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in an operator's arguments: themselves, in lists, tuples and dicts.

    Example:
        >>> [t.item() for t in tensors((torch.tensor(1), [torch.tensor(2)], {"a": 3}, torch.tensor(4)))]
        [1, 2, 4]
    """
    found: list[Tensor] = []
    ahead = [value]
    while ahead:
        item = ahead.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            ahead += reversed(item)
        elif isinstance(item, dict):
            ahead += reversed(item.values())
    return found


def on_vector(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a linear layer or convolution acts on a vector or a 1 x 1 map, not on positions.

    Args:
        x: (N, ..., C) for a linear layer, (N, C, ...) for a convolution. ``weight``: (O, C) or (O, C, *k).

    Example:
        >>> on_vector(torch.zeros(2, 8, 1, 1), torch.zeros(4, 8, 1, 1))
        True
        >>> on_vector(torch.zeros(2, 7, 8), torch.zeros(4, 8))
        False
    """
    positions = x.shape[1:-1] if weight.dim() == 2 else x.shape[2:]
    return positions.numel() == 1


@lru_cache(maxsize=512)
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    # Only Python functions have both a signature and an `inplace` that may come by position.
    return inspect.signature(function) if inspect.isfunction(function) else None


def _bound(function: Callable[..., Any], call: Call) -> Call:
    signature = _signature(function)
    if signature is not None and "inplace" in signature.parameters:
        bound = signature.bind(*call.args, **call.kwargs)
        inplace = bound.arguments.pop("inplace", False)
        target = next(iter(bound.arguments.values())) if inplace else call.inplace
        return Call(call.name, bound.args, bound.kwargs, target)
    if call.kwargs.get("inplace") is not None:
        rest = {key: value for key, value in call.kwargs.items() if key != "inplace"}
        return replace(call, kwargs=rest, inplace=call.args[0] if call.kwargs["inplace"] else call.inplace)
    return call


# Where the flag for training stands among the arguments.
_TRAINING = {
    "batch_norm": 5,
    "dropout": 2,
    "dropout1d": 2,
    "dropout2d": 2,
    "dropout3d": 2,
    "alpha_dropout": 2,
    "rrelu": 3,
}


def _refuse_training(call: Call) -> None:
    if call.name not in _TRAINING:
        return
    position = _TRAINING[call.name]
    training = call.args[position] if len(call.args) > position else call.kwargs.get("training", False)
    batch = call.name == "batch_norm"
    rate = 1 if batch or call.name == "rrelu" else call.args[1] if len(call.args) > 1 else call.kwargs.get("p", 1)
    if training and rate != 0:
        reason = "takes its statistics from the batch" if batch else "draws random numbers"
        raise RuntimeError(
            f"the model calls {call.name} in training mode, which {reason}: call model.eval() first "
            "(a batch norm without running statistics has no evaluation mode and cannot be explained)"
        )


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _same(call: Call) -> Call:
    return call


def _commuted(call: Call) -> Call:
    """``c + x`` as ``x + c``."""
    if len(call.args) == 2 and not _depends(call.args[0]) and not call.kwargs:
        return replace(call, args=call.args[::-1])
    return call


def _subtracted(call: Call) -> Call:
    """``c - x`` as ``rsub(x, c)``."""
    commuted = _commuted(call)
    return call if commuted is call else replace(commuted, name="rsub" if call.name == "sub" else "sub")


def _divided(call: Call) -> Call:
    """``c / x``, which is curved, told apart from ``x / c``."""
    commuted = _commuted(call)
    return call if commuted is call else replace(commuted, name="reciprocal")


def _multiplied_by_weight(call: Call) -> Call:
    """``x @ W`` as ``linear(x, W.T)``."""
    operands = (*call.args, *(call.kwargs[key] for key in ("mat2",) if key in call.kwargs))
    if len(operands) == 2 and _depends(operands[0]) and not _depends(operands[1]):
        x, weight = operands
        if weight.dim() == 2 and x.dim() >= 2:
            return Call("linear", (x, weight.mT), {})
    return call


def _added_to_product(call: Call) -> Call:
    """``addmm(b, x, W)`` as ``linear(x, W.T, b)``."""
    if len(call.args) == 3 and not call.kwargs:
        bias, x, weight = call.args
        if bias.dim() == 1 and _depends(x) and not _depends(bias) and not _depends(weight):
            return Call("linear", (x, weight.mT, bias), {})
    return call


_SWAPS: dict[str, Callable[[Call], Call]] = {
    "add": _commuted,
    "mul": _commuted,
    "sub": _subtracted,
    "rsub": _subtracted,
    "div": _divided,
    "matmul": _multiplied_by_weight,
    "mm": _multiplied_by_weight,
    "addmm": _added_to_product,
}
