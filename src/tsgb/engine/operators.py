"""What the engine knows of ATen operators by name, beside the table of rules: how a call is spelled, what is refused.

A convolution, a linear layer and an in-place write have several names each. Here they get one, so that the table needs
one entry and the tape no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .private import can_decompose

__all__ = [
    "AS_STRIDED",
    "SCATTER",
    "SPELLINGS",
    "Operator",
    "Twin",
    "operator_of",
    "packet_of",
]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operator:
    """Static facts of an ATen overload.

    Attributes:
        functional: the overload that computes the same and writes nothing.
        packet: what the table of rules is keyed by.
        writes: whether the first argument is written.
        is_out: whether the results are written into ``out=``.
        decomposes: whether it is a composite of other operators.
        is_random: whether it may draw random numbers, or take its statistics from the batch.
        role: in what is known of constants, see `_ROLES`; "" for most.
        is_uninitialised: whether its result holds no values yet.
    """

    functional: Any
    packet: Any
    writes: bool
    is_out: bool
    decomposes: bool
    is_random: bool
    role: str
    is_uninitialised: bool


class Twin:
    """A functional operator with a derivative, where ATen's own has none (torch 2.13)."""

    def __init__(self, packet: Any, function: Callable[..., Tensor]) -> None:
        self.overloadpacket, self._function = packet, function
        self._schema = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the function."""
        return self._function(*args, **kwargs)

    def name(self) -> str:
        """Name it as ATen does."""
        return str(self.overloadpacket).replace(".", "::")


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.empty_like(target).copy_(source)


def _filled(target: Tensor, value: Any) -> Tensor:
    return torch.empty_like(target).copy_(value) if isinstance(value, Tensor) else torch.full_like(target, value)


def _scattered(whole: Tensor, part: Tensor, *place: Any) -> Tensor:
    """Replace a part of a tensor; ``as_strided_scatter`` has a wrong derivative in torch 2.13."""
    whole = whole.clone()
    whole.as_strided(*place).copy_(part)
    return whole


COPY, FILL = Twin(aten.copy, _copied), Twin(aten.fill, _filled)
SCATTER, AS_STRIDED = Twin(aten.as_strided_scatter, _scattered), aten.as_strided.default
_TWINS = {"copy_": COPY, "fill_": FILL, "zero_": Twin(aten.fill, torch.zeros_like)}


def _roles(role: str, names: str) -> dict[str, str]:
    return {f"aten.{name}": role for name in names.split()}


_ROLES = {
    # reads the shape of a tensor alone
    **_roles("constructor", "empty_like new_empty new_empty_strided zeros_like ones_like full_like new_zeros new_ones"),
    **_roles("constructor", "new_full rand_like randn_like randint_like"),
    **_roles("cast", "to _to_copy"),  # changes the type of a tensor, as autocast does
    **_roles("dropout", "dropout alpha_dropout feature_dropout feature_alpha_dropout"),  # nothing outside of training
    **_roles("cut", "detach"),  # cuts a tensor off from the image on purpose
    **_roles("fresh", "lift_fresh lift"),  # a tensor made of numbers or of an array
    **_roles("leaving", "resolve_neg"),  # called as `Tensor.numpy` and `tolist` give values away
}
_UNINITIALISED = {"aten.resize_", "aten.new_empty_strided"} | {
    f"aten.{name}" for name in ("empty", "empty_strided", "empty_permuted", "empty_like", "new_empty")
}


@lru_cache(maxsize=4096)
def operator_of(overload: Any) -> Operator:
    """Read an overload's schema."""
    schema = overload._schema
    name, packet = schema.name.split("::")[1], overload.overloadpacket
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    is_out = bool(written) and all(a.kwarg_only for a in written)
    functional = overload
    if is_out:
        functional = _without_out(overload, len(written))
    elif written:
        in_family = getattr(torch.ops, overload.namespace)
        twin = getattr(in_family, name[:-1], None) if name.endswith("_") else None
        functional = getattr(twin, overload._overloadname, None)
        if written[0] is not schema.arguments[0] or len(written) > 1:
            functional = None
    functional = _TWINS.get(name, functional)
    if overload is aten.view.default:  # which channels last, a choice of the engine's, need not allow
        functional = aten.reshape.default
    packet = getattr(functional, "overloadpacket", packet)
    is_random = torch.Tag.nondeterministic_seeded in getattr(overload, "tags", ())
    is_random |= any(a.name in ("training", "train") for a in schema.arguments)
    role, is_uninitialised = _ROLES.get(str(packet), ""), str(packet) in _UNINITIALISED
    decomposes = can_decompose(overload)
    return Operator(functional, packet, bool(written), is_out, decomposes, is_random, role, is_uninitialised)


def _without_out(overload: Any, count: int) -> Any:
    """Find the overload of the same arguments that returns what this one writes into ``out=``."""
    wanted = [(a.name, str(a.type)) for a in overload._schema.arguments[:-count]]
    for name in overload.overloadpacket.overloads():
        other = getattr(overload.overloadpacket, name)
        if [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other
    return None


# ---- one name for each operator


def _convolution(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, is_transposed: bool,
                 output_padding: Any, groups: int, *flags: Any) -> Any:  # fmt: skip
    dims = weight.dim() - 2
    if is_transposed:
        packets = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
        overload = packets[dims - 1].default if dims == 1 else packets[dims - 1].input
        return overload, (x, weight, bias, stride, padding, output_padding, groups, dilation)
    packets = (aten.conv1d, aten.conv2d, aten.conv3d)
    return packets[dims - 1].default, (x, weight, bias, stride, padding, dilation, groups)


def _product(x: Any, other: Any) -> Any:
    if not isinstance(other, Tensor):  # W @ x of an unfolded image (N, C, L)
        if isinstance(x, Tensor) and x.dim() == 2 and len(other.shape) == 3:
            return aten.conv1d.default, (other, x[:, :, None])
        return None
    if isinstance(x, Tensor) or other.dim() != 2 or len(x.shape) < 2:
        return None
    return aten.linear.default, (x, other.mT)


def _added_product(bias: Any, x: Any, weight: Any) -> Any:
    is_layer = isinstance(bias, Tensor) and isinstance(weight, Tensor) and bias.dim() == 1 and not isinstance(x, Tensor)
    return (aten.linear.default, (x, weight.mT, bias)) if is_layer else None


def _unbatched(function: Callable[..., Tensor], dims: int) -> Callable[..., Any]:
    """Give a convolution of one image without a batch that of a batch of one."""

    def spelled(x: Any, *args: Any, **kwargs: Any) -> Any:
        if len(x.shape) != dims + 1:
            return None
        return lambda x, *args, **kwargs: function(x.unsqueeze(0), *args, **kwargs).squeeze(0)

    return spelled


#: Other names of convolutions and linear layers: called with the arguments, of which those that depend on the image are
#: no tensors but values; each gives the operator and its arguments, a function that computes the same, or None.
SPELLINGS: dict[Any, Callable[..., Any]] = {
    aten._convolution: _convolution,
    aten.convolution: _convolution,
    aten.matmul: _product,
    aten.mm: _product,
    aten.addmm: _added_product,
    **{getattr(aten, f"conv{n}d"): _unbatched(getattr(torch, f"conv{n}d"), n) for n in (1, 2, 3)},
    **{getattr(aten, f"conv_transpose{n}d"): _unbatched(getattr(torch, f"conv_transpose{n}d"), n) for n in (1, 2, 3)},
}

# Functions of torch whose operator has another name.
_SYNONYMS = {
    torch.nn.functional.unfold: aten.im2col,
    torch.nn.functional.fold: aten.col2im,
    torch.arctan: aten.atan,
    torch.negative: aten.neg,
    torch.multiply: aten.mul,
    torch.subtract: aten.sub,
    torch.divide: aten.div,
    torch.true_divide: aten.div,
    torch.clip: aten.clamp,
    torch.concat: aten.cat,
    torch.concatenate: aten.cat,
    torch.special.expit: aten.sigmoid,
}
# Functions of torch that bear an operator's name, and run others.
_SPELLED_OUT = {
    "softsign", "local_response_norm", "normalize", "interpolate", "upsample", "multi_head_attention_forward",
}  # fmt: skip


def packet_of(key: Any) -> Any:
    """Find the operator that a key of a table stands for, a torch function or an operator; None if none does.

    Example:
        >>> packet_of(torch.nn.functional.gelu)
        <OpOverloadPacket(op='aten.gelu')>
    """
    if isinstance(key, torch._ops.OpOverloadPacket):
        return key
    if isinstance(key, torch._ops.OpOverload):
        return key.overloadpacket
    if key in _SYNONYMS:
        return _SYNONYMS[key]
    name = getattr(key, "__name__", "")
    if name == "__get__":
        name = key.__self__.__name__
    name = name.strip("_")
    return None if name in _SPELLED_OUT or not name else getattr(aten, name, None)
