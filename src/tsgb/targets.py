"""What a map is asked for: from a caller's ``target`` to class indices, from a model's output to logits."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine.private import is_traced

__all__ = [
    "Target",
    "TargetError",
    "check_range",
    "class_index",
    "find_logits",
    "is_top",
    "names_of",
    "prepare",
    "resolve",
    "scores",
]

Target = int | str | Sequence[Any] | Tensor | Callable[[Any], Tensor] | None

_TOP = re.compile(r"top(\d+)", re.IGNORECASE)


class TargetError(ValueError):
    """A target that the model's output does not allow, or that does not fit the images."""


def find_logits(output: Any) -> Tensor:
    """Find the logits in a model's output.

    Understood are a tensor; a mapping with "logits" or "out", or with a single tensor; an object with ``.logits``; a
    tuple or list that begins with a tensor; a dataclass with a single tensor.

    Args:
        output: whatever the model returned.

    Returns:
        The tensor, of any shape.

    Raises:
        TargetError: no such tensor is there.

    Example:
        >>> find_logits({"out": torch.zeros(1, 3), "aux": torch.ones(1, 3)}).sum()
        tensor(0.)
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        fields = dict(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        fields = {}
    for key in ("logits", "out"):
        found = fields.get(key, getattr(output, key, None))
        if isinstance(found, Tensor):
            return found
    found_tensors = [value for value in fields.values() if isinstance(value, Tensor)]
    if len(found_tensors) == 1:
        return found_tensors[0]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    held = f" with {', '.join(map(str, fields))}" if fields else ""
    raise TargetError(
        f"the model's output must be the logits (N, classes), or hold them as 'logits' or 'out', got "
        f"{type(output).__name__}{held}: in Python, pass target=fn(output) -> (N,) tensor"
    )


def names_of(model: Any) -> list[str] | None:
    """Find a model's class names: ``model.names`` (a sequence or {index: name}) or ``model.config.id2label``.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> model.names = ("cat", "dog")
        >>> names_of(model)
        ['cat', 'dog']
    """
    for names in (getattr(model, "names", None), getattr(getattr(model, "config", None), "id2label", None)):
        if isinstance(names, Mapping):
            return [str(names[key]) for key in sorted(names, key=int)]
        if isinstance(names, (list, tuple)):
            return [str(name) for name in names]
    return None


def class_index(name: str, names: Sequence[str] | None) -> int:
    """Look a class name up, whatever its case.

    Args:
        name: as the user wrote it. ``names``: the class names by index, None if the model has none.

    Raises:
        TargetError: there are no names, none of them fits (the nearest are listed), or several do.

    Example:
        >>> class_index("Dog", ["cat", "dog"])
        1
    """
    if not names:
        raise TargetError(
            f"target {name!r} is a class name, but the model has no names: give the class index, or "
            "set model.names, a list of them in the order of the classes"
        )
    wanted = name.strip().casefold()
    hits = [index for index, known in enumerate(names) if known.casefold() == wanted]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise TargetError(f"target {name!r} names the classes {', '.join(map(str, hits))}: give the class index")
    near = difflib.get_close_matches(wanted, [known.casefold() for known in names], n=3, cutoff=0.5)
    near += [known.casefold() for known in names if wanted and wanted in known.casefold()]
    listed = list(dict.fromkeys(next(known for known in names if known.casefold() == match) for match in near))[:4]
    hint = (
        f"the nearest are {', '.join(map(repr, listed))}"
        if listed
        else f"the names are {', '.join(map(repr, names))}"
        if len(names) <= 20
        else f"its {len(names)} names begin with {', '.join(map(repr, names[:3]))}"
    )
    raise TargetError(f"target {name!r} is no class of the model: {hint}")


def is_top(word: str) -> bool:
    """Tell whether a target asks for the K most probable classes.

    Example:
        >>> is_top("top5"), is_top("laptop")
        (True, False)
    """
    return _TOP.fullmatch(word.strip()) is not None


def prepare(target: Target, count: int, names: Sequence[str] | None = None) -> Target:
    """Check a target as far as that goes without a model's output; nothing is broadcast or cut.

    Args:
        target: None (the predicted class), an int (for all images), N ints (one for each image), an (N, K) tensor or
            nested list (K for each image), a class name in the place of any int, "top5" (the five most probable), or a
            callable.
        count: the number N of images.
        names: class names by index, None if the model has none.

    Returns:
        The target, with ints and names as an int64 tensor (N, K) on the CPU.

    Raises:
        TargetError: a wrong type, length or name.

    Example:
        >>> prepare([2, 0], 2), prepare("top2", 2)
        (tensor([[2],
                [0]]), 'top2')
    """
    if target is None or (callable(target) and not isinstance(target, Tensor)):
        return target
    if isinstance(target, str):
        if is_top(target) and target not in (names or ()):
            return target
        target = class_index(target, names)
    came = indices = _integers(target, count, names)
    if indices.dim() == 0:
        indices = indices.expand(count)
    if indices.dim() == 1:
        indices = indices[:, None]
    if indices.dim() != 2 or len(indices) != count or indices.shape[1] == 0:
        raise TargetError(f"target must be {_wanted(count)}, got shape {tuple(came.shape)}")
    return indices.to(torch.int64)


def resolve(target: Target, logits: Tensor) -> Tensor:
    """Turn a prepared target into class indices.

    Args:
        target: what `prepare` returned; no callable.
        logits: (N, classes).

    Returns:
        (N, K) int64, of the most probable classes on the device of the logits.

    Raises:
        TargetError: logits of another shape, or a class that the model does not have.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
        >>> resolve("top2", logits).tolist(), resolve(None, logits).tolist()
        ([[1, 2], [0, 2]], [[1], [0]])
    """
    if logits.dim() != 2:
        raise TargetError(
            f"a class target needs logits of shape (N, classes), got {tuple(logits.shape)}: in Python, pass "
            "target=fn(output) -> (N,) tensor; of a segmentation's class 1, where it wins, "
            "lambda output: (output[:, 1] * (output.argmax(1) == 1)).sum((1, 2))"
        )
    classes = logits.shape[1]
    if target is None:
        return logits.detach().argmax(1, keepdim=True)
    if isinstance(target, str):
        k = int(target.strip()[3:])
        if not 1 <= k <= classes:
            raise TargetError(f"target {target!r} must ask for 1 to {classes} classes, as the model has {classes}")
        return logits.detach().topk(k, dim=1).indices
    assert isinstance(target, Tensor)
    if not is_traced():
        check_range(target, classes)
    return target.clone()


def check_range(target: Target, classes: int) -> None:
    """Refuse a class that a model does not have.

    Raises:
        TargetError: names it.

    Example:
        >>> check_range(torch.tensor([[4]]), 5)
    """
    if isinstance(target, Tensor):
        for wrong in target[(target < 0) | (target >= classes)].tolist()[:1]:
            raise TargetError(f"target {wrong} is no class of the model: its {classes} classes are 0 to {classes - 1}")


def _wanted(count: int) -> str:
    several = [[1, 2]] * count if count < 3 else "[[1, 2], ...]"
    return f"int64 of shape ({count},), one class an image, or ({count}, K), as in target={several}; or one int for all"


def _integers(target: Any, count: int, names: Sequence[str] | None) -> Tensor:
    if isinstance(target, (list, tuple)):
        target = [_named(item, names) for item in target]
    elif hasattr(target, "__array__") and not isinstance(target, Tensor):
        target = torch.as_tensor(target)
    try:
        indices = target.detach().cpu() if isinstance(target, Tensor) else torch.tensor(target)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"target must be {_wanted(count)}, got {type(target).__name__} {_short(target)}") from None
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        dtype = str(indices.dtype).removeprefix("torch.")
        raise TargetError(f"target must be {_wanted(count)}, got {dtype} {tuple(indices.shape)}")
    return indices


def _named(item: Any, names: Sequence[str] | None) -> Any:
    if isinstance(item, str):
        return class_index(item, names)
    if isinstance(item, (list, tuple)):
        return [_named(part, names) for part in item]
    if callable(item) and not isinstance(item, Tensor):
        raise TargetError("a target is one function of the output: explain several of them one after the other")
    return item.tolist() if isinstance(item, Tensor) else item


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def scores(target: Callable[[Any], Tensor], output: Any, count: int) -> Tensor:
    """Evaluate a callable target on a model's output.

    Args:
        target: ``fn(output) -> (N,)`` floating tensor, one score an image.
        output: what the model returned for N = ``count`` images.

    Raises:
        TargetError: the result is something else.

    Example:
        >>> scores(lambda output: output[:, 0] - output[:, 1], torch.ones(2, 3), 2).tolist()
        [0.0, 0.0]
    """
    value = target(output)
    expected = f"target=fn(output) must return a floating tensor of shape ({count},), one score an image"
    if not isinstance(value, Tensor):
        raise TargetError(f"{expected}, got {type(value).__name__}")
    if tuple(value.shape) != (count,) or not value.is_floating_point():
        raise TargetError(f"{expected}, got {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}")
    return value
