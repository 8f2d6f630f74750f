"""TSGB and its rivals by name, all through one door: `attribute`.

>>> from tsgb import methods
>>> list(methods.METHODS)[:4]
['tsgb', 'tsgb-pixels', 'tsgb-paper', 'gradcam']
"""

from .registry import METHODS, Method, attribute

__all__ = ["METHODS", "Method", "attribute"]
