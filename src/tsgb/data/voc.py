"""Layout "voc": the folders of Pascal VOC."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import images
from .dataset import Category, DataError, Dataset, Region, Sample, box_array, shown, without_boxes
from .objects import Annotation, Box, Size, boxes_by_class, broken, read_annotation

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
    order; without any list, all of JPEGImages/ by name. A box is made of the pixels from xmin to xmax, both of them
    inside and the first one being 1: its edges are xmin - 1 and xmax. Objects marked as difficult are left out.

    The categories are the 20 classes, 1..20, if all objects in Annotations/ have their names. Otherwise they are the
    names of all objects there, listed or not, difficult or not, sorted as text and numbered from 0.

    With the 20 classes, and where SegmentationClass/ has a file, a class's mask are the pixels of its number in it
    (255, the void along the outlines, is in no mask); difficult objects have their pixels there all the same. With
    other names there are no masks, as nothing says which number is whose.

    Every annotation is read once, when the data set is opened: 20 000 take some seconds. Where one is broken, or has
    objects of which none can be used, the sample has no categories and its `regions` raise ValueError with the reason.

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
    photographs = {path.stem: path for path in _visible(folder / "JPEGImages") if path.suffix in _SUFFIXES}
    listed = _listed(folder / "ImageSets" / "Main")
    annotations: dict[str, Annotation] = {}
    faults: dict[str, str] = {}
    for file in _visible(folder / "Annotations"):
        if file.suffix == ".xml":
            try:
                annotations[file.stem] = read_annotation(file, first=1)
            except ValueError as error:
                faults[file.stem] = str(error)
    classes = _classes(annotations.values())
    samples: list[Sample] = []
    problems: list[str] = []
    everything = sorted(photographs.keys() | annotations.keys() | faults.keys())
    for stem in dict.fromkeys(everything if listed is None else listed):
        if stem not in photographs:
            problems.append(f"JPEGImages: no image for {shown(stem)}")
        elif stem in faults:
            photograph = photographs[stem]
            read, regions = partial(images.read, photograph), partial(broken, faults.pop(stem))
            samples.append(Sample(photograph.name, (), read, regions))
        else:
            samples.append(_sample(folder, photographs[stem], annotations.get(stem), classes, problems))
    problems.extend(faults.values())
    categories = {index: Category(name) for name, index in classes.items()}
    return Dataset(folder.resolve().name, "voc", categories, tuple(samples), tuple(problems))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _classes(annotations: Iterable[Annotation]) -> Mapping[str, int]:
    names = {item.name for annotation in annotations for item in annotation.items} - {""}
    own = {name: index for index, name in enumerate(sorted(names))}
    return VOC_CLASSES if names <= VOC_CLASSES.keys() else own


def _listed(folder: Path) -> list[str] | None:
    file = next((folder / f"{split}.txt" for split in _SPLITS if (folder / f"{split}.txt").is_file()), None)
    if file is None:
        return None
    try:
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as a list of images: {error}") from error


def _sample(
    folder: Path, photograph: Path, annotation: Annotation | None, classes: Mapping[str, int], problems: list[str]
) -> Sample:
    read = partial(images.read, photograph)
    if annotation is None:
        return Sample(photograph.name, (), read, partial(without_boxes, ()))
    try:
        boxes, passed_over = boxes_by_class(annotation, classes)
    except ValueError as error:
        return Sample(photograph.name, (), read, partial(broken, str(error)), annotation.size)
    problems.extend(passed_over)
    painted = folder / "SegmentationClass" / f"{photograph.stem}.png"
    has_masks = classes is VOC_CLASSES and painted.is_file()
    regions = partial(_regions, boxes, annotation.size, painted if has_masks else None)
    return Sample(photograph.name, tuple(boxes), read, regions, annotation.size)


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
            if image.size != (size or image.size) or image.width * image.height > images.MAX_PIXELS:
                raise ValueError(f"expected the annotation's size {size}, got {image.size}")
            return np.array(image, dtype=np.uint8)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"{file}: {' '.join(str(error).split()) or type(error).__name__}") from error
