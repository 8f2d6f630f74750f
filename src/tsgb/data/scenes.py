"""The bundled data set: rendered scenes of one and two objects, with the exact pixels of each."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import overload

import numpy as np
from PIL import Image

from .. import scenes
from .dataset import Category, Dataset, Region, Sample

__all__ = ["open_scenes"]

_FIRST_SEED = 2_000_000_000  # none of these seeds took part in the training or the testing of the bundled networks
_COUNT, _SIZE = 1000, 128


def open_scenes() -> Dataset:
    """Return the bundled data set: 1000 scenes of 128 x 128 pixels, each rendered when it is asked for.

    Scene i is `tsgb.scenes.render(2_000_000_000 + i, count)` with one object for even i, two for odd.

    Example:
        >>> data = open_scenes()
        >>> data.samples[12].name, len(data.samples[12].categories), len(data.samples)
        ('scene-000012', 1, 1000)
    """
    return Dataset(
        name="scenes",
        layout="scenes",
        categories={index: Category(name) for index, name in enumerate(scenes.CLASSES)},
        samples=_Scenes(range(_COUNT)),
    )


class _Scenes(Sequence[Sample]):
    """The scenes of these numbers: rendering all of them for a look at the first would be a waste."""

    def __init__(self, indices: range) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(place, slice):
            return _Scenes(self._indices[place])
        index = self._indices[place]
        return Sample(
            name=f"scene-{index:06}",
            categories=tuple(sorted(_scene(index).classes)),
            read=partial(_image, index),
            regions=partial(_regions, index),
            size=(_SIZE, _SIZE),
        )


@lru_cache(maxsize=16)
def _scene(index: int) -> scenes.Scene:
    return scenes.render(_FIRST_SEED + index, count=1 + index % 2, size=_SIZE)


def _image(index: int) -> Image.Image:
    return Image.fromarray(_scene(index).image)


def _regions(index: int) -> tuple[Region, ...]:
    scene = _scene(index)
    found = zip(scene.classes, scene.boxes.astype(np.float64), scene.masks, strict=True)
    regions = [Region(category, box[None], mask.copy()) for category, box, mask in found]
    return tuple(sorted(regions, key=lambda region: region.category))
