"""The tables that say which operator has which rule.

A table maps torch functions to rules. One entry serves every spelling of an operator (``F.relu``, ``torch.relu``,
``x.relu_()``). ``ORDINARY`` marks operators that keep their own gradient on purpose; an operator that the table does
not name keeps it too, but is reported. Three keys are no functions but roles that an operator plays in a network:

- ``HEAD``: a table of the operators that carry weights, and their rules where they are the last before the target;
- ``CONSTANT``: operators one of whose operands does not depend on the image (``x - mean``);
- ``GATE``: products of a signal and a gate (``x * sigmoid(y)``).

``F`` holds the number f of the head's rule, or a function that chooses it (see `selectivity`), or None where there is
none. To change a rule, make a table of your own: ``{**DEFAULT, torch.nn.functional.gelu: mine}``.

Two say how the map is read of the backward; without them it is the relevance at the image:

- ``RIVALS``: how classes compete where their evidence meets the map, see `rivalry`;
- ``MAP``: how the fields of all depths make one map, see `depths`.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .extensions import conv_transposed, glu
from .formulas import (
    activation,
    avg_pool,
    batch_norm,
    conv,
    conv_lumped,
    gate,
    linear,
    shift,
)
from .heads import Split, conv_head, conv_transposed_head, gradient_head, linear_head, selectivity
from .maps import depths, rivalry

Table = dict[Any, Any]


class _Named(Table):
    """A table that signatures and messages name, as its entries fill pages."""

    def __init__(self, name: str, entries: Table) -> None:
        super().__init__(entries)
        self._name = name

    def __repr__(self) -> str:
        return f"tsgb.rules.{self._name}"


ORDINARY = "ordinary"
HEAD, CONSTANT, GATE, F = "head", "constant", "gate", "f"
RIVALS, MAP = "rivals", "map"

#: What opens and closes: a factor that comes from one of these is a gate.
GATES = (torch.sigmoid, functional.hardsigmoid, functional.softmax)


#: Activations that let a signal through above a bend and hold it back below.
RECTIFIERS = (
    functional.relu,
    functional.relu6,
    functional.hardtanh,
    functional.leaky_relu,
    functional.prelu,
    functional.rrelu,
    functional.elu,
    functional.selu,
    functional.celu,
    functional.gelu,
    functional.silu,
    functional.mish,
    functional.hardswish,
    functional.threshold,
    torch.clamp,
    torch.clamp_min,
    torch.clamp_max,
    torch.clip,
)

#: Activations whose output is never negative, the first of which changes no number but to 0.
RELUS = (functional.relu, functional.relu6)

#: Activations whose derivative at their input is that at their output.
KINKED = (*RELUS, functional.hardtanh, functional.leaky_relu)

#: Elementwise functions that bend.
ACTIVATIONS = (
    *RECTIFIERS,
    functional.softsign,
    functional.hardshrink,
    functional.softshrink,
    functional.tanhshrink,
    torch.tanh,
    torch.abs,
    torch.atan,
    torch.erf,
    torch.square,
    torch.pow,
)

#: Transposed convolutions.
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)

# Weightless and linear, or a choice among its inputs: the ordinary gradient is what the method asks for.
_KEEPING = (
    (torch.add, torch.sub, torch.rsub, torch.neg, torch.mul, torch.div, torch.sum, torch.mean, torch.nanmean),
    (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.where, torch.maximum),
    (torch.minimum, torch.max, torch.min, torch.amax, torch.amin, torch.Tensor.masked_fill, torch.cumsum, torch.lerp),
    (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.adaptive_max_pool1d),
    (functional.max_pool1d_with_indices, functional.max_pool2d_with_indices, functional.max_pool3d_with_indices),
    (functional.adaptive_max_pool2d, functional.adaptive_max_pool3d, functional.adaptive_avg_pool1d),
    (functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d, functional.avg_pool1d, functional.avg_pool2d),
    (functional.avg_pool3d, functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
    (
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        functional.interpolate,
        functional.upsample,
        functional.grid_sample,
    ),
    (functional.pad, functional.pixel_shuffle, functional.pixel_unshuffle, torch.channel_shuffle, functional.unfold),
    (functional.fold, torch.flatten, torch.Tensor.unflatten, torch.reshape, torch.Tensor.view, torch.Tensor.view_as),
    (torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.reshape_as, torch.permute, torch.transpose, torch.t),
    (torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis, torch.squeeze, torch.unsqueeze, torch.narrow),
    (torch.select, torch.index_select, torch.gather, torch.take, torch.chunk, torch.split, torch.tensor_split),
    (torch.split_with_sizes, torch.unbind, torch.roll, torch.flip, torch.rot90, torch.clone, torch.Tensor.contiguous),
    (torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.double),
    (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.repeat, torch.tile),
    (torch.repeat_interleave, torch.diagonal, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_),
    # Statistics, by which a norm that is spelled out divides.
    (torch.var, torch.std, torch.var_mean, torch.std_mean, torch.norm, torch.linalg.norm, torch.linalg.vector_norm),
    (torch.sqrt, torch.rsqrt, torch.logsumexp),
    # Comparisons with a tensor that is given, which a target may be made of.
    (functional.cosine_similarity, functional.pairwise_distance, torch.cdist, torch.dist, functional.mse_loss),
    (functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss, functional.kl_div),
    (functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits, functional.cosine_embedding_loss),
    (torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.positive, torch.ravel),  # type: ignore[attr-defined]
)
_KEPT: Table = {operator: ORDINARY for group in _KEEPING for operator in group}


def _head_table(split: Split) -> Table:
    convolutions = dict.fromkeys(
        (functional.conv1d, functional.conv2d, functional.conv3d), partial(conv_head, split=split)
    )
    transposed = dict.fromkeys(TRANSPOSED, partial(conv_transposed_head, split=split))
    return {functional.linear: partial(linear_head, split=split), **convolutions, **transposed}


# Operators of which the paper does not speak, with a rule of the same kind as those it speaks of.
_NORMS: tuple[Callable[..., Any], ...] = (
    functional.group_norm,
    functional.layer_norm,
    functional.instance_norm,
    functional.local_response_norm,
    functional.normalize,
)
if hasattr(functional, "rms_norm"):  # since torch 2.4
    _NORMS = (*_NORMS, functional.rms_norm)
_EXTENSIONS: Table = {
    **{norm: partial(shift, function=norm) for norm in _NORMS},
    **dict.fromkeys(TRANSPOSED, conv_transposed),
}

#: The method as the authors run it.
PAPER: Table = _Named(
    "PAPER",
    {
        **_KEPT,
        **_EXTENSIONS,
        **dict.fromkeys((*ACTIVATIONS, functional.glu), ORDINARY),
        **dict.fromkeys((torch.sigmoid, functional.hardsigmoid, functional.softplus, functional.softmax), ORDINARY),
        **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), conv_lumped),
        **dict.fromkeys((functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d), avg_pool),
        functional.batch_norm: batch_norm,
        functional.linear: linear,
        HEAD: _head_table("weights"),
        F: 1.0,
    },
)

#: The paper's map with our corrections, down to the pixels: groups apart, contributions split, relevance passing
#: activations, shifts and gates.
PIXELS: Table = _Named(
    "PIXELS",
    {
        **PAPER,
        **{act: partial(activation, function=act) for act in ACTIVATIONS},
        **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), conv),
        **dict.fromkeys((functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d), ORDINARY),
        functional.batch_norm: partial(shift, function=functional.batch_norm),
        functional.glu: glu,
        CONSTANT: {operator: partial(shift, function=operator) for operator in (torch.add, torch.sub, torch.rsub)},
        GATE: {operator: partial(gate, function=operator) for operator in (torch.mul, torch.div)},
        HEAD: _head_table("contributions"),
        F: selectivity,
    },
)


#: Beyond the paper: the head's own gradient less what all classes share, classes that compete, the map of all depths.
DEFAULT: Table = _Named(
    "DEFAULT",
    {
        **PIXELS,
        # Groups apart are dear where channels are many groups, and a map of whole fields is no better for it.
        **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), conv_lumped),
        HEAD: {operator: partial(gradient_head, function=operator) for operator in PIXELS[HEAD]},
        F: None,
        RIVALS: rivalry,
        MAP: depths,
    },
)


def plain(table: Table) -> Table:
    """The same table, whose rules run as they are written, from gradient to gradient.

    The mechanism knows the rules of this package, and hands relevance on for them, which is faster. What it does not
    know it calls as it is; so this table gives the same maps the slow way, to compare with.

    Args:
        table: of any rules.

    Returns:
        A table of the same operators and roles.

    Example:
        >>> import tsgb
        >>> model, images = tsgb.load("bundled").model, torch.rand(1, 3, 128, 128)
        >>> fast, slow = tsgb.explain(model, images, 1), tsgb.explain(model, images, 1, rules=plain(DEFAULT))
        >>> torch.allclose(fast.maps, slow.maps, atol=1e-4)
        True
    """

    def called(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return wraps(getattr(rule, "func", rule))(lambda *args, **kwargs: rule(*args, **kwargs))

    roles = {
        role: {operator: called(rule) for operator, rule in table.get(role, {}).items()} for role in (CONSTANT, GATE)
    }
    rules = {key: called(rule) if callable(key) and callable(rule) else rule for key, rule in table.items()}
    return {**rules, **roles}
