"""TSGB as rules: the formulas, and the tables that say which operator has which.

>>> import torch
>>> from tsgb import rules
>>> rules.PIXELS[torch.nn.functional.conv2d].__name__, rules.PAPER[torch.nn.functional.conv2d].__name__
('conv', 'conv_lumped')
"""

from .classic import (
    CONTRASTIVE,
    DECONVNET,
    EXCITATION,
    GUIDED,
    contrastive_head,
    deconvnet,
    excitation,
    excitation_head,
    guided,
)
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
from .heads import conv_head, conv_transposed_head, gradient, gradient_head, linear_head, selectivity
from .maps import claims, depths, rivalry
from .tables import (
    ACTIVATIONS,
    CONSTANT,
    DEFAULT,
    GATE,
    GATES,
    HEAD,
    KINKED,
    MAP,
    ORDINARY,
    PAPER,
    PIXELS,
    RELUS,
    RIVALS,
    TRANSPOSED,
    F,
    Table,
    plain,
)

__all__ = [
    "ACTIVATIONS",
    "CONSTANT",
    "CONTRASTIVE",
    "DECONVNET",
    "DEFAULT",
    "EXCITATION",
    "GATE",
    "GATES",
    "GUIDED",
    "HEAD",
    "KINKED",
    "MAP",
    "ORDINARY",
    "PAPER",
    "PIXELS",
    "RELUS",
    "RIVALS",
    "TRANSPOSED",
    "F",
    "Table",
    "activation",
    "avg_pool",
    "batch_norm",
    "claims",
    "contrastive_head",
    "conv",
    "conv_head",
    "conv_lumped",
    "conv_transposed",
    "conv_transposed_head",
    "deconvnet",
    "depths",
    "excitation",
    "excitation_head",
    "gate",
    "glu",
    "gradient",
    "gradient_head",
    "guided",
    "linear",
    "linear_head",
    "plain",
    "rivalry",
    "selectivity",
    "shift",
]
