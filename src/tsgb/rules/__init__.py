"""TSGB as rules: the formulas, and the tables that say which operator has which.

>>> import torch
>>> from tsgb import rules
>>> rules.PIXELS[torch.ops.aten.conv2d].name, rules.PAPER[torch.ops.aten.conv2d].name
('conv', 'conv_merged_groups')
"""

from .baselines import CONTRASTIVE, DECONVNET, EXCITATION, GUIDED
from .formulas import selectivity
from .tables import (
    ACTIVATIONS,
    DEFAULT,
    FUSED,
    FUSION,
    GATES,
    HEAD,
    ORDINARY,
    PAPER,
    PIXELS,
    RECTIFIERS,
    TABLES,
    F,
    Rule,
    Table,
)

__all__ = [
    "ACTIVATIONS",
    "CONTRASTIVE",
    "DECONVNET",
    "DEFAULT",
    "EXCITATION",
    "FUSED",
    "FUSION",
    "GATES",
    "GUIDED",
    "HEAD",
    "ORDINARY",
    "PAPER",
    "PIXELS",
    "RECTIFIERS",
    "TABLES",
    "F",
    "Rule",
    "Table",
    "selectivity",
]
