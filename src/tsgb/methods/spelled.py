"""The names of torch functions as a model calls them, and the tensors among their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["name", "tensors"]

_SYNONYMS = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "arctan": "atan"}


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


def tensors(arguments: Any) -> list[Tensor]:
    """List the tensors in a function's arguments."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
