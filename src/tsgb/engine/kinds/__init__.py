"""The five kinds of rule: `copying`, `passing`, `sharing`, `summing`, `gradient`; which operator has which is a table.

A rule has `record`, called as the operator has run, which keeps what the backward needs and says what is to arrive at
the output; and `backward`, from what arrives there to what each input is given.
"""

from __future__ import annotations

from .copying import Concatenate, Constant, Copy, MaxPool, Permute, Reshape, Restride
from .gradient import Elementwise, Formula, Gradient, Guided, RelevanceRule
from .passing import Activation, Product, Shift
from .sharing import HiddenLayer, Share
from .summing import Average, Mean, Sum

__all__ = [
    "Activation",
    "Average",
    "Concatenate",
    "Constant",
    "Copy",
    "Elementwise",
    "Formula",
    "Gradient",
    "Guided",
    "HiddenLayer",
    "MaxPool",
    "Mean",
    "Permute",
    "Product",
    "RelevanceRule",
    "Reshape",
    "Restride",
    "Share",
    "Shift",
    "Sum",
]
