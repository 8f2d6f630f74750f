"""What is out of scope, refused in one line where the model runs it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["CoverageError", "check_supported"]


class CoverageError(RuntimeError):
    """The rules do not cover the model, so that its map would not be TSGB's."""


# Every device has kernels of its own for these, under names of its own.
_ATTENTION = re.compile(r"attention|transformer_encoder")
_RECURRENT = re.compile(r"(^|_)(lstm|gru|rnn)(_|$)")
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "mm", "addmm", "addbmm", "einsum", "inner", "tensordot", "linear"})
_GO_ON = "To go on all the same, give it a rule: rules={{**tsgb.rules.FUSED, torch.ops.{}: tsgb.rules.ORDINARY}}"


def check_supported(overload: Any, args: Any, kwargs: Any, signals: int) -> None:
    """Refuse an operator that mixes positions by what they hold, draws random numbers, or hides its weights.

    Args:
        overload: no entry of the table is for it. ``args``, ``kwargs``: what it was called with.
        signals: how many of its operands depend on the image.

    Raises:
        CoverageError, RuntimeError: say what the model does, and what can be done.
    """
    namespace, name = overload._schema.name.split("::")
    if namespace.startswith("quantized") or _holds_script_object((*args, *kwargs.values())) or "quantize" in name:
        raise CoverageError(
            f"the model is quantised (`{name}`), and no gradient flows through packed weights: explain the float "
            "model that it was made of"
        )
    if _ATTENTION.search(name):
        does = f"computes attention (`{name}`)"
    elif _RECURRENT.search(name):
        does = f"runs a recurrent layer (`{name}`)"
    elif signals > 1 and name in _PRODUCTS:
        does = f"multiplies two tensors that both come from the image (`{name}`), as attention does"
    else:
        return
    raise CoverageError(
        f"the model {does}: TSGB explains convolutional networks, and vision transformers and recurrent networks are "
        f"out of its scope. {_GO_ON.format(f'{namespace}.{name}')}"
    )


def check_deterministic(overload: Any, arguments: dict[str, Any]) -> None:
    """Refuse what takes its statistics from the batch or draws random numbers.

    Raises:
        RuntimeError: names the operator.
    """
    name = overload._schema.name.split("::")[1].strip("_")
    is_norm = "batch_norm" in name
    training = arguments.get("training", arguments.get("train", False if is_norm or "dropout" in name else None))
    if training is None:
        training = "bernoulli" in name or "dropout" in name or name in ("rand_like", "randn_like", "normal", "uniform")
    if training and arguments.get("p", 1) != 0:
        reason = "takes its statistics from the batch" if is_norm else "draws random numbers"
        raise RuntimeError(
            f"the model calls {name} in training mode, which {reason}: call model.eval() first "
            "(a batch norm without running statistics has no evaluation mode and cannot be explained)"
        )


def check_plain(types: Any) -> None:
    """Refuse tensors of classes that compute by themselves, as quantised or distributed weights are.

    Raises:
        CoverageError: names the class.
    """
    for kind in types:
        if kind not in _PLAIN and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            if getattr(kind.__torch_dispatch__, "__func__", None) is getattr(Tensor.__torch_dispatch__, "__func__", 0):
                continue
            raise CoverageError(
                f"the model holds tensors of the class {kind.__name__}, which computes by itself, so that no operator "
                "is seen: explain the model with plain tensors as weights"
            )


_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


def _holds_script_object(values: Any) -> bool:
    return any(isinstance(value, torch.ScriptObject) for value in values)
