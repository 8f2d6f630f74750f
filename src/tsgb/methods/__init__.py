"""Saliency methods by name, TSGB among them: `attribute` runs any of them.

>>> from tsgb import methods
>>> list(methods.METHODS)[:4]
['tsgb-fused', 'tsgb-pixels', 'tsgb-paper', 'gradcam']
"""

from .registry import ALIASES, METHODS, Method, attribute

__all__ = ["ALIASES", "METHODS", "Method", "attribute"]
