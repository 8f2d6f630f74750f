"""Layout "voc": the folders of Pascal VOC."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import pictures
from .dataset import Category, DataError, Dataset, Region, Sample, box_array, shown, without_boxes
from .objects import Box, Size, broken, read_annotation

__all__ = ["VOC_CLASSES", "open_voc"]

VOC_CLASSES = {
    "aeroplane": 1,
    "bicycle": 2,
    "bird": 3,
    "boat": 4,
    "bottle": 5,
    "bus": 6,
    "car": 7,
    "cat": 8,
    "chair": 9,
    "cow": 10,
    "diningtable": 11,
    "dog": 12,
    "horse": 13,
    "motorbike": 14,
    "person": 15,
    "pottedplant": 16,
    "sheep": 17,
    "sofa": 18,
    "train": 19,
    "tvmonitor": 20,
}

_SPLITS = ("val", "test", "trainval", "train")
_SUFFIXES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png")


def open_voc(folder: Path) -> Dataset:
    """Open a folder with Annotations/*.xml and JPEGImages/ in the layout of Pascal VOC.

    The samples are those of the first of val, test, trainval and train that has a list in ImageSets/Main/, in its
    order; without any list, all of JPEGImages/ by name. The categories are the 20 classes, 1..20. A box is made of the
    pixels from xmin to xmax, both of them inside and the first one being 1: its edges are xmin - 1 and xmax. Objects
    marked as difficult are left out. Where SegmentationClass/ has a file, a class's mask are the pixels of its number
    in it (255, the void along the outlines, is in no mask); difficult objects have their pixels there all the same.

    Args:
        folder: The folder of one year, as VOC2012/.

    Raises:
        DataError: If the list cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("Annotations", "JPEGImages"):
        ...         (Path(folder) / name).mkdir()
        ...     open_voc(Path(folder)).categories[8].name
        'cat'
    """
    files = {path.stem: path for path in sorted((folder / "Annotations").glob("*.xml"))}
    photographs = {path.stem: path for path in _photographs(folder / "JPEGImages")}
    listed = _listed(folder / "ImageSets" / "Main")
    samples: list[Sample] = []
    problems: list[str] = []
    for stem in dict.fromkeys(sorted(photographs.keys() | files.keys()) if listed is None else listed):
        if stem not in photographs:
            problems.append(f"JPEGImages: no picture for {shown(stem)}")
        else:
            samples.append(_sample(folder, photographs[stem], files.get(stem), problems))
    categories = {index: Category(name) for name, index in VOC_CLASSES.items()}
    return Dataset(folder.resolve().name, "voc", categories, tuple(samples), tuple(problems))


def _photographs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))


def _listed(folder: Path) -> list[str] | None:
    file = next((folder / f"{split}.txt" for split in _SPLITS if (folder / f"{split}.txt").is_file()), None)
    if file is None:
        return None
    try:
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as a list of pictures: {error}") from error


def _sample(folder: Path, photograph: Path, file: Path | None, problems: list[str]) -> Sample:
    read = partial(pictures.read, photograph)
    if file is None:
        return Sample(photograph.name, (), read, partial(without_boxes, ()))
    try:
        found = read_annotation(file, VOC_CLASSES, first=1)
    except ValueError as error:
        problems.append(str(error))
        return Sample(photograph.name, (), read, partial(broken, str(error)))
    problems.extend(found.problems)
    painted = folder / "SegmentationClass" / f"{photograph.stem}.png"
    regions = partial(_regions, found.boxes, found.size, painted if painted.is_file() else None)
    return Sample(photograph.name, tuple(found.boxes), read, regions, found.size)


def _regions(boxes: Mapping[int, list[Box]], size: Size, painted: Path | None) -> tuple[Region, ...]:
    numbers = None if painted is None else _numbers(painted, size)
    regions = []
    for category, found in boxes.items():
        mask = None if numbers is None else numbers == category
        regions.append(Region(category, box_array(found, size), mask if mask is not None and mask.any() else None))
    return tuple(regions)


def _numbers(file: Path, size: Size) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"expected one class number for each pixel, got colours of mode {image.mode}")
            if image.size != (size or image.size) or image.width * image.height > pictures.MAX_PIXELS:
                raise ValueError(f"expected the annotation's size {size}, got {image.size}")
            return np.array(image, dtype=np.uint8)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"{file}: {' '.join(str(error).split()) or type(error).__name__}") from error
