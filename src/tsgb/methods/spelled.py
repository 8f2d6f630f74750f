"""The calls of torch functions as a model spells them: their names, their arguments, and what they write on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "name", "read", "tensors"]

_SYNONYMS = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "arctan": "atan"}


@dataclass(frozen=True)
class Call:
    """One call, ``name(*args, **kwargs)``.

    Attributes:
        name: the same for all spellings of a function.
        args: the positional arguments, the operands among them.
        kwargs: the other arguments, without ``inplace``.
        inplace: the tensor that the call writes on, or None.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: Tensor | None = None


def name(function: Callable[..., Any]) -> str:
    """Name a function, the same for all its spellings.

    Example:
        >>> import torch
        >>> [name(f) for f in (torch.nn.functional.relu, torch.relu_, torch.Tensor.true_divide)]
        ['relu', 'relu', 'div']
    """
    word = getattr(function, "__name__", type(function).__name__)
    if word == "__get__":
        word = function.__self__.__name__  # type: ignore[attr-defined]
    word = word.strip("_")
    return _SYNONYMS.get(word, word)


def read(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Read a call: bring the operands to the front and take ``inplace`` out.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> call = read(torch.nn.functional.relu, (x, True), {})
        >>> call.name, len(call.args), call.kwargs, call.inplace is x
        ('relu', 1, {}, True)
    """
    kwargs = dict(kwargs)
    word = getattr(function, "__name__", "")
    is_inplace = word.endswith("_") and not word.endswith("__")
    if inspect.isfunction(function):
        names = list(inspect.signature(function).parameters)
        if "inplace" in names:
            place = names.index("inplace")
            is_inplace |= bool(args[place] if len(args) > place else kwargs.pop("inplace", False))
            args = args[:place] + args[place + 1 :]
    for key in ("input", "other"):
        if key in kwargs and len(args) == ("input", "other").index(key):
            args = (*args, kwargs.pop(key))
    return Call(name(function), args, kwargs, args[0] if is_inplace else None)


def tensors(arguments: Any) -> list[Tensor]:
    """List the tensors in a function's arguments."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
