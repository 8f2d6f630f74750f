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
    # Of exported graphs.
    "slice": "narrow",
    "im2col": "unfold",
    "col2im": "fold",
    "grid_sampler": "grid_sample",
    **{
        f"upsample_{how}": "interpolate"
        for how in ("linear1d", "bilinear2d", "bilinear2d_aa", "trilinear3d", "bicubic2d", "bicubic2d_aa")
    },
    **{f"upsample_nearest{exact}{n}d": "interpolate" for exact in ("", "_exact") for n in (1, 2, 3)},
}

# Arguments of torch's own norms, as exported graphs call them; functional's have the same names in another order.
_TORCHS = {
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "instance_norm": ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
}

# Types that hold no tensors; a sequence of nothing else need not be gone through.
_SIMPLE = frozenset({int, float, bool, str, type(None)})


@dataclass(slots=True)
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
    return spelling(function).name


@dataclass(frozen=True, slots=True)
class Spelling:
    """What is known of a torch function by itself: its name, whether it writes on its operand, its arguments' names.

    The names are those of a Python function that may be told to write ``inplace``, by name or by position.
    """

    name: str
    is_inplace: bool
    arguments: tuple[str, ...] = ()


@lru_cache(maxsize=2048)
def spelling(function: Callable[..., Any]) -> Spelling:
    """Read a torch function's name and arguments.

    Example:
        >>> spelling(torch.relu_)
        Spelling(name='relu', is_inplace=True, arguments=())
    """
    word = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, torch._ops.OpOverload):  # of an exported graph: "relu_.default", "mean.dim"
        word = word.split(".")[0]
    is_inplace = word.endswith("_") and not word.endswith("__")
    if word == "__get__":
        word = function.__self__.__name__  # type: ignore[attr-defined]
    word = word.strip("_")
    try:
        names = tuple(inspect.signature(function).parameters) if inspect.isfunction(function) else ()
    except ValueError:  # it wraps a builtin, as `Tensor.__pow__` does
        names = ()
    return Spelling(_SYNONYMS.get(word, word), is_inplace, names if "inplace" in names else ())


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
    spelled = spelling(function)
    kwargs = dict(kwargs)
    inplace = (args[0] if args else kwargs.get("input")) if spelled.is_inplace else None
    if spelled.arguments or "inplace" in kwargs:
        args, inplace = _bound(args, kwargs, spelled.arguments, inplace)
    if spelled.name in _TORCHS and not inspect.isfunction(function):
        names = _TORCHS[spelled.name]
        given = {**dict(zip(names, args, strict=False)), **kwargs}  # and whether to use cudnn, which is torch's to know
        args, kwargs = (), {name: given[name] for name in names if name in given}
    if spelled.name in _TRAINING:
        _refuse_training(spelled.name, args, kwargs)
    if "input" in kwargs:
        args = (kwargs.pop("input"), *args)
    if len(args) == 1 and "other" in kwargs:
        args = (args[0], kwargs.pop("other"))
    call = Call(spelled.name, args, kwargs, inplace)
    swap = _SWAPS.get(call.name)
    return call if swap is None else swap(call)


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
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        if not _SIMPLE.issuperset(map(type, value)):
            for item in value:
                if isinstance(item, Tensor):
                    found.append(item)
                elif type(item) not in _SIMPLE:
                    _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors of an operator's arguments: themselves, in lists, tuples and dicts.

    Example:
        >>> mapped(torch.neg, (torch.tensor(1), [torch.tensor(2), 3]))
        (tensor(-1), [tensor(-2), 3])
    """
    if isinstance(value, Tensor):
        return function(value)
    kind = type(value)
    if kind is tuple or kind is list:
        if _SIMPLE.issuperset(map(type, value)):
            return value
        # What is met most is told apart here, as every call of a model comes by.
        return kind(
            [
                item
                if type(item) in _SIMPLE
                else function(item)
                if isinstance(item, Tensor)
                else mapped(function, item)
                for item in value
            ]
        )
    if kind is dict:
        return {key: item if type(item) in _SIMPLE else mapped(function, item) for key, item in value.items()}
    return value


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


def keeps_channels(call: Call) -> bool:
    """Tell a transposed convolution with as many channels before as after: above the head it enlarges what that says.

    Example:
        >>> keeps_channels(Call("conv_transpose2d", (torch.ones(1, 4, 2, 2), torch.ones(4, 1, 2, 2)), {"groups": 4}))
        True
    """
    weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
    groups = call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", 1)
    return bool(weight.shape[0] == weight.shape[1] * groups)


def _bound(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...], inplace: Tensor | None
) -> tuple[tuple[Any, ...], Tensor | None]:
    """Take ``inplace`` out; of a Python function bring what came by name to its place before."""
    placed = list(args)
    for name in names[len(placed) :]:
        if name not in kwargs:
            break
        placed.append(kwargs.pop(name))
    flag = kwargs.pop("inplace", None)
    if "inplace" in names[: len(placed)]:
        flag = placed.pop(names.index("inplace"))
    return tuple(placed), placed[0] if flag else inplace


# Where the flag for training stands among the arguments.
_TRAINING = {
    "batch_norm": 5,
    "dropout": 2,
    "dropout1d": 2,
    "dropout2d": 2,
    "dropout3d": 2,
    "alpha_dropout": 2,
    "feature_dropout": 2,
    "feature_alpha_dropout": 2,
    "native_dropout": 2,
    "rrelu": 3,
}


def _refuse_training(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    position = _TRAINING[name]
    training = args[position] if len(args) > position else kwargs.get("training", kwargs.get("train", False))
    batch = name == "batch_norm"
    rate = 1 if batch or name == "rrelu" else args[1] if len(args) > 1 else kwargs.get("p", 1)
    if training and rate != 0:
        reason = "takes its statistics from the batch" if batch else "draws random numbers"
        raise RuntimeError(
            f"the model calls {name} in training mode, which {reason}: call model.eval() first "
            "(a batch norm without running statistics has no evaluation mode and cannot be explained)"
        )


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _commuted(call: Call) -> Call:
    """``c + x`` as ``x + c``."""
    if len(call.args) == 2 and not _depends(call.args[0]) and call.kwargs in ({}, {"alpha": 1}):
        return replace(call, args=call.args[::-1], kwargs={})
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
    """``x @ W`` as ``linear(x, W.T)``; ``W @ x`` of (N, C, L), an unfolded image, as ``conv1d(x, W)``."""
    operands = (*call.args, *(call.kwargs[key] for key in ("mat2",) if key in call.kwargs))
    if len(operands) == 2 and _depends(operands[1]) and not _depends(operands[0]):
        weight, x = operands
        if isinstance(weight, Tensor) and weight.dim() == 2 and x.dim() == 3:
            return Call("conv1d", (x, weight[:, :, None]), {})
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


def _convolved(call: Call) -> Call:
    """An exported graph's ``convolution`` as ``conv2d`` or the like, or as a transposed one."""
    if len(call.args) != 9 or call.kwargs:
        return call
    x, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups = call.args
    if is_transposed:
        arguments = (x, weight, bias, stride, padding, output_padding, groups, dilation)
        return Call(f"conv_transpose{weight.dim() - 2}d", arguments, {})
    return Call(f"conv{weight.dim() - 2}d", (x, weight, bias, stride, padding, dilation, groups), {})


def _ordered(call: Call) -> Call:
    """``x.permute(0, 2, 1)`` with its dimensions as one argument."""
    if len(call.args) > 1 and isinstance(call.args[1], int):
        return replace(call, args=(call.args[0], call.args[1:]))
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
    "convolution": _convolved,
    "permute": _ordered,
}
