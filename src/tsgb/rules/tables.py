"""The tables that say which operator has which rule.

A table maps ATen operators to rules, ``torch.ops.aten.conv2d`` for one, so that one entry serves every spelling of an
operator (``F.relu``, ``torch.relu``, ``x.relu_()``, a scripted module's). A torch function may stand for its operator.
To change a rule, make a table of your own::

    {**tsgb.rules.FUSED, torch.nn.functional.gelu: my_rule}          my_rule(grad, x, *args) -> grad_x

`ORDINARY` marks operators for which the gradient is the right rule. An operator that the table does not name, and that
is no composite of those, has its gradient as a fallback, and is reported. Three keys are no operators:

- `HEAD`: the operators with weights, and their rules where they are the last before the target;
- `F`: the number f of the head's rule, or a function that chooses it (see `selectivity`), or None where there is none;
- `FUSION`: how classes compete and depths are fused, a `tsgb.fusion.Fusion`; None for the relevance of the pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..fusion import Fusion
from . import formulas
from .formulas import Split, selectivity

aten = torch.ops.aten
Table = dict[Any, Any]

HEAD, F, FUSION = "head", "f", "fusion"


@dataclass(frozen=True)
class Rule:
    """What a table says of an operator.

    Attributes:
        kind: of the kinds in `tsgb.engine.kinds`.
        name: in the coverage.
        formula: of the kind "formula", ``formula(grad, x, ...) -> grad_x``.
    """

    kind: str
    name: str = "ordinary"
    formula: Callable[..., Tensor] | None = None


class _Named(Table):
    """A table that signatures and messages name, as its entries fill pages."""

    def __init__(self, name: str, entries: Table) -> None:
        super().__init__(entries)
        self._name = name

    def __repr__(self) -> str:
        return f"tsgb.rules.{self._name}"


def _packets(names: str) -> list[Any]:
    """Find operators by name; not every release of torch has them all."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


def _each(names: Iterable[Any] | str, rule: Any) -> Table:
    return dict.fromkeys(_packets(names) if isinstance(names, str) else names, rule)


ORDINARY = Rule("gradient")

#: Elementwise functions with act(0) = 0 for most arguments; where it is not, they keep their own derivative.
ACTIVATIONS = _packets(
    "relu relu6 hardtanh leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish hardswish threshold clamp "
    "clamp_min clamp_max hardshrink softshrink tanh abs atan erf pow square"
)
#: Activations that let a signal through above a bend and hold it back below.
RECTIFIERS = _packets(
    "relu relu6 hardtanh leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish hardswish threshold clamp "
    "clamp_min clamp_max"
)
#: Rectifiers that change no number but by a factor: relevance passes them in every table.
_HOMOGENEOUS = _packets("relu leaky_relu")
#: What opens and closes: a factor that comes from one of these is a gate.
GATES = _packets("sigmoid hardsigmoid softmax _softmax sign")

CONVOLUTIONS = _packets("conv1d conv2d conv3d")
TRANSPOSED = _packets("conv_transpose1d conv_transpose2d conv_transpose3d")
_POOLS = _packets("avg_pool1d avg_pool2d avg_pool3d")

#: What every table has: copies, averages, sums and products, and operators whose own derivative is right.
_COMMON: Table = {
    **_each(
        "view _unsafe_view reshape flatten unflatten view_as reshape_as squeeze unsqueeze clone contiguous to _to_copy "
        "type_as alias lift_fresh positive ravel cpu cuda",
        Rule("reshape"),
    ),
    **_each("permute transpose t numpy_T", Rule("permute")),
    **_each(
        "slice select split split_with_sizes chunk tensor_split unbind narrow index index_select diagonal unfold "
        "expand expand_as repeat repeat_interleave tile constant_pad_nd pad reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d flip roll rot90 pixel_shuffle "
        "pixel_unshuffle channel_shuffle im2col upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d stack as_strided "
        "as_strided_scatter copy hstack vstack slice_scatter select_scatter gather take",
        Rule("copy"),
    ),
    **_each("fill", Rule("constant")),
    **_each("cat concat concatenate", Rule("concatenate")),
    **_each("max_pool2d", Rule("max_pool")),
    **_each("mean adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", Rule("mean")),
    **_each(_POOLS, Rule("average")),
    **_each(
        "sum upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa",
        Rule("average"),
    ),
    **_each(
        "batch_norm layer_norm group_norm instance_norm rms_norm native_batch_norm native_layer_norm native_group_norm "
        "_native_batch_norm_legit_no_training",
        Rule("shift", "shift"),
    ),
    **_each("sigmoid hardsigmoid softplus exp log sqrt rsqrt neg reciprocal log_sigmoid", Rule("elementwise")),
    **_each(
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d max_pool3d max_pool1d_with_indices "
        "max_pool2d_with_indices max_pool3d_with_indices softmax _softmax log_softmax _log_softmax where maximum "
        "minimum max min amax amin masked_fill cumsum lerp grid_sampler_2d grid_sampler_3d grid_sampler col2im var std "
        "var_mean std_mean norm linalg_vector_norm logsumexp nanmean cosine_similarity pairwise_distance cdist "
        "_cdist_forward dist mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy "
        "binary_cross_entropy_with_logits cosine_embedding_loss index_put masked_scatter scatter scatter_add sort topk "
        "dropout alpha_dropout feature_dropout feature_alpha_dropout glu dot mv sign round floor ceil trunc eq ne lt "
        "le gt ge argmax argmin logical_not logical_and logical_or bitwise_not item isnan isfinite any all nonzero "
        "count_nonzero special_logit logit",
        ORDINARY,
    ),
}


def _head_rules(split: Split) -> Table:
    return {
        aten.linear: partial(formulas.linear_head, split=split),
        **_each(CONVOLUTIONS, partial(formulas.conv_head, split=split)),
        **_each(TRANSPOSED, partial(formulas.conv_transposed_head, split=split)),
    }


#: The method as the authors run it.
PAPER: Table = _Named(
    "PAPER",
    {
        **_COMMON,
        **_each(ACTIVATIONS, Rule("elementwise")),
        **_each(_HOMOGENEOUS, Rule("activation", "ordinary")),
        **_each("add sub rsub", Rule("sum")),
        **_each("mul div", Rule("product")),
        **_each(CONVOLUTIONS, Rule("share", "conv_merged_groups")),
        **_each(TRANSPOSED, Rule("share", "conv_transposed")),
        **_each(_POOLS, Rule("formula", "avg_pool", formulas.avg_pool)),
        aten.batch_norm: Rule("formula", "batch_norm", formulas.batch_norm),
        aten._native_batch_norm_legit_no_training: Rule("formula", "batch_norm", formulas.batch_norm),
        aten.linear: Rule("share", "linear"),
        HEAD: _head_rules("weights"),
        F: 1.0,
        FUSION: None,
    },
)

#: The paper's map with our corrections, down to the pixels: groups apart, contributions split, relevance passing
#: activations, shifts and gates.
PIXELS: Table = _Named(
    "PIXELS",
    {
        **PAPER,
        **_each(ACTIVATIONS, Rule("activation", "activation")),
        **_each("add sub rsub", Rule("sum", "shift")),
        **_each("mul div", Rule("product", "gate")),
        **_each(CONVOLUTIONS, Rule("share", "conv")),
        **_each(_POOLS, Rule("average")),
        **_each("batch_norm _native_batch_norm_legit_no_training", Rule("shift", "shift")),
        aten.glu: Rule("formula", "glu", formulas.glu),
        HEAD: _head_rules("contributions"),
        F: selectivity,
    },
)

#: Beyond the paper: the head's own gradient less what all classes share, classes that compete, all depths fused.
FUSED: Table = _Named(
    "FUSED",
    {
        **PIXELS,
        # Groups apart are dear where channels are many groups, and a map of whole fields is no better for it.
        **_each(CONVOLUTIONS, Rule("share", "conv_merged_groups")),
        HEAD: dict.fromkeys(PIXELS[HEAD], ORDINARY),
        F: None,
        FUSION: Fusion(),
    },
)

#: The table that is taken where none is named.
DEFAULT = FUSED

#: Tables by name.
TABLES = {"fused": FUSED, "pixels": PIXELS, "paper": PAPER}
