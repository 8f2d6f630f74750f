"""Target-Selective Gradient Backprop: which pixels of an image speak for a class, for any convolutional network.

>>> import tsgb, torch
>>> network = tsgb.load("bundled")
>>> e = tsgb.explain(network.model, torch.rand(1, 3, 128, 128), target="top2")
>>> e.maps.shape
torch.Size([1, 2, 128, 128])
"""

from importlib.metadata import version

from . import rules
from .attribution import TSGB, explain
from .backprop import CoverageError
from .compiled import compile
from .explanation import Explanation
from .models import load
from .targets import TargetError

__all__ = ["TSGB", "CoverageError", "Explanation", "TargetError", "compile", "explain", "load", "rules"]
__version__ = version("tsgb")
