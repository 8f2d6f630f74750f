"""Annotated images: what a data set of any layout is to the rest of the package, and the layouts that are read.

>>> scenes = open_dataset()
>>> [scenes.categories[index].name for index in scenes.samples[1].categories]
['star', 'cross']
"""

from .dataset import Category, DataError, Dataset, Region, Sample
from .fingerprint import fingerprint
from .layouts import open_dataset

__all__ = ["Category", "DataError", "Dataset", "Region", "Sample", "fingerprint", "open_dataset"]
