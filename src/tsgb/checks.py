"""What an explanation asks of its arguments and the model, and promises of its maps; a refusal says what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import rules, targets
from .engine.supported import CoverageError


def check_inputs(inputs: tuple[Tensor, ...]) -> int:
    """Refuse images of a wrong kind, shape or value; return how many there are.

    Raises:
        TypeError: no floating tensors. ValueError: a wrong shape, or values that are not finite.

    Example:
        >>> import torch
        >>> check_inputs((torch.zeros(2, 3, 8, 8),))
        2
    """
    if not inputs:
        raise ValueError("images must be a tensor (N, C, H, W) or a tuple of tensors, got an empty tuple")
    for x in inputs:
        if not isinstance(x, Tensor):
            how = (
                "one of a picture is network.preprocessing.tensor(picture)[None], several inputs are a tuple of tensors"
            )
            raise TypeError(f"images must be a floating tensor (N, C, H, W), got {type(x).__name__}: {how}")
        if not x.is_floating_point():
            dtype = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"images must be floating, as the model expects them, got {dtype}: preprocess them first")
    first = inputs[0]
    if first.dim() not in (3, 4, 5) and len(inputs) == 1:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(first.shape)}")
    count = len(first) if first.dim() else 0
    if any(x.dim() < 2 or len(x) != count for x in inputs) or count == 0 or any(x.numel() == 0 for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"images must have shape (N, C, H, W) with N and all sizes at least 1, got {shapes}")
    for x in inputs:
        if _are_finite(x):
            continue
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"images must be finite, but image {int((~finite).nonzero()[0])} holds NaN or infinity")
    return count


def _are_finite(x: Tensor) -> bool:
    """Tell in one pass that all values are finite; where it does not, they may be nevertheless, and their sum not."""
    return bool(x.detach().sum().isfinite())


_OPTIONS = (rules.HEAD, rules.F, rules.FUSION)
_STOCHASTIC_DEPTH = ("StochasticDepth", "DropPath")  # torchvision's, timm's


def table_of(table: Any) -> Any:
    """Give the table that a name stands for; any other value as it is.

    Raises:
        ValueError: no table has the name.

    Example:
        >>> table_of("pixels") is rules.PIXELS
        True
    """
    if not isinstance(table, str):
        return table
    if table not in rules.TABLES:
        raise ValueError(f"rules must be a table, or one of {', '.join(map(repr, rules.TABLES))}, got {table!r}")
    return rules.TABLES[table]


def check_table(table: Any, f: Any) -> None:
    """Refuse rules that are no table, and an f that is no number.

    Raises:
        TypeError, ValueError: says what a table is, or what f must be.

    Example:
        >>> check_table(rules.PIXELS, 0.5)
    """
    how = "such as tsgb.rules.FUSED or {**tsgb.rules.FUSED, operator: rule}"
    if not isinstance(table, dict):
        raise TypeError(f"rules must be a table, {how}, got {type(table).__name__}")
    missing = [key for key in (rules.HEAD, rules.F) if key not in table]
    if missing:
        raise ValueError(f"rules must be a table with the keys HEAD and F, {how}; it lacks {', '.join(missing)}")
    for key in () if any(table is known for known in rules.TABLES.values()) else table:
        owner = getattr(key, "__self__", key)
        is_module = isinstance(key, type) or isinstance(owner, (nn.Module, type(torch.autograd.Function)))
        if key not in _OPTIONS and (is_module or not callable(key)):
            raise TypeError(f"rules are by torch function, such as torch.nn.functional.gelu, got {key!r}{_hint(key)}")
        if key not in _OPTIONS and not callable(table[key]) and not isinstance(table[key], rules.Rule):
            name = getattr(key, "__name__", key)
            raise TypeError(f"the rule of {name} must be callable, or tsgb.rules.ORDINARY, got {table[key]!r}")
    if f is not None and (not isinstance(f, (int, float)) or not 0 <= f <= 1):
        raise ValueError(f"f must be a number, 0 to 1, or None, got {f!r}")
    if f is not None and table[rules.F] is None:
        raise ValueError(
            f"these rules have no f, as their head keeps its own gradient, got f={f!r}: leave it out, or take "
            "tsgb.rules.PIXELS (--method tsgb-pixels)"
        )


def _hint(key: Any) -> str:
    """What a module that stands for an operator calls, where torch has it by that name."""
    module = getattr(key, "__self__", key)
    name = module.__name__ if isinstance(module, type) else key if isinstance(key, str) else type(module).__name__
    return f": take torch.nn.functional.{name.lower()}" if hasattr(nn.functional, name.lower()) else ""


def check_mode(model: Any) -> None:
    """Refuse what is no model, and a module whose batch norm or dropout is in training mode.

    Raises:
        TypeError: it cannot be called. RuntimeError: names the module.

    Example:
        >>> check_mode(nn.Dropout(0.5).eval())
    """
    if not callable(model):
        inside = ": give its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model must be a module or another callable, got {type(model).__name__}{inside}")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if not getattr(module, "training", False):  # which a frozen script lacks
            continue
        rate = getattr(module, "p", getattr(module, "drop_prob", 1.0))
        random = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in _STOCHASTIC_DEPTH
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (random and rate):
            raise RuntimeError(
                f"the model is in training mode: {type(module).__name__} {name!r} would use the batch or "
                "random numbers. Call model.eval() first"
            )


def check_source(source: Any, score: Tensor, count: int) -> Any:
    """Refuse logits or scores that do not come from the images, or are not one row for each.

    Args:
        source: what they are on the tape; None for what does not depend on the images. ``score``: their values.

    Raises:
        CoverageError: they do not depend on the images. TargetError: another number of rows.

    Example:
        >>> import torch
        >>> check_source("a value", torch.zeros(2, 5), 2)
        'a value'
    """
    if source is None:
        raise CoverageError(
            "the model's output does not depend on the images through torch operators in this thread: it came through "
            "NumPy or another thread, or is a constant"
        )
    if score.dim() == 2 and len(score) != count:
        raise targets.TargetError(
            f"the model must return one row of logits an image, {count}, got {tuple(score.shape)}"
        )
    return source


def check_values(logits: Tensor | None, maps: list[Tensor]) -> None:
    """Refuse logits that are NaN, and maps that are not finite.

    Args:
        logits: (N, ...), or None. ``maps``: (K, N, ...) each.

    Raises:
        ValueError, FloatingPointError: names the image.

    Example:
        >>> import torch
        >>> check_values(torch.zeros(2, 5), [torch.zeros(3, 2, 8, 8)])
    """
    if logits is not None:
        broken = logits.isnan().flatten(1).any(1) if logits.dim() > 1 else logits.isnan()
        if broken.any():
            raise ValueError(f"the model's logits for image {int(broken.nonzero()[0])} are NaN")
    for values in maps:
        if _are_finite(values):
            continue
        broken = ~values.isfinite().flatten(2).all(2).all(0)
        if broken.any():
            raise FloatingPointError(
                f"the map of image {int(broken.nonzero()[0])} is not finite: the model's values leave the range of "
                "its type (use float32), or a rule of your own gives such values"
            )
