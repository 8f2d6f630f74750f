"""Target-Selective Gradient Backprop: which pixels of an image speak for a class, for any convolutional network.

>>> import tsgb, torch
>>> network = tsgb.load("bundled")
>>> e = tsgb.explain(network.model, torch.rand(1, 3, 128, 128), target="top2")
>>> e.maps.shape
torch.Size([1, 2, 128, 128])
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from . import rules
from .attribution import TSGB, explain
from .compiled import compile
from .engine.supported import CoverageError
from .explanation import Explanation
from .models import load
from .targets import TargetError

__all__ = ["TSGB", "CoverageError", "Explanation", "TargetError", "compile", "explain", "load", "rules"]
__version__ = version("tsgb")

_LATER = (
    "bench",
    "data",
    "methods",
    "metrics",
    "images",
    "plots",
    "regions",
    "render",
    "scenes",
)  # imported when first asked for


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
