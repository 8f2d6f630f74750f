"""Layout "coco": one JSON file with the lists images, annotations and categories."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..images import MAX_PIXELS
from ..images import read as read_image
from .dataset import Category, DataError, Dataset, Region, Sample, box_array, is_number, shown
from .files import inside, read_json
from .segmentation import union_mask

__all__ = ["open_coco"]

Record = dict[str, Any]
Key = int | str
Size = tuple[int, int] | None


def open_coco(file: Path) -> Dataset:
    """Open an annotation file in COCO's layout.

    Samples are in the order of `images`. The images lie in the first of these folders that has one of them: images/
    beside the file, the file's folder, images/ one folder up, and, for instances_val2017.json, val2017/ one folder up.
    An image that is not there stays a sample, and reading it fails; one without annotation has the categories ().

    Boxes are clipped to the image; an annotation whose box is empty then is left out with its mask. Annotations with
    `iscrowd` 1, which stand for unknown many objects, are left out of boxes and masks alike, so a class of which there
    is nothing else is not among the categories. Segmentations are polygons or run lengths, compressed or not, and a
    class whose annotations all have one gets a mask, their union; reading it needs pycocotools. Boxes and masks refer
    to the size in the file, which for an image with an EXIF orientation is that of the stored pixels.

    Args:
        file: The JSON file. Every entry that is broken, that repeats another or refers to an unknown one is passed
            over and listed in `problems`.

    Raises:
        DataError: If the file cannot be read or has no list `images`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     written = (Path(folder) / "pets.json").write_text('{"images": [{"id": 1, "file_name": "cat.jpg"}]}')
        ...     open_coco(Path(folder) / "pets.json").samples[0].name
        'cat.jpg'
    """
    record = read_json(file)
    if not isinstance(record.get("images"), list):
        raise DataError(f"{file}: not in COCO layout: expected a list 'images', got the keys {shown([*record])}")
    problems: list[str] = []
    categories = _categories(record, problems)
    images = _images(record, problems)
    found = _annotations(record, categories, images, problems)
    root = _image_folder(file, [name for name, _ in images.values()])
    samples = []
    for key, (name, size) in images.items():
        by_category = {category: found[key][category] for category in sorted(found[key])}
        read = partial(read_image, root / name)
        regions = partial(_regions, by_category, size, f"{file}: {shown(name)}")
        samples.append(Sample(name, tuple(by_category), read, regions, size))
    title = file.resolve().parent.name if file.name == "annotations.json" else file.stem
    return Dataset(title, "coco", categories, tuple(samples), tuple(f"{file.name}: {problem}" for problem in problems))


def _image_folder(file: Path, names: Sequence[str]) -> Path:
    folders = [file.parent / "images", file.parent, file.parent / ".." / "images"]
    if file.stem.startswith("instances_"):
        folders.append(file.parent / ".." / file.stem.removeprefix("instances_"))
    return next((folder for name in names for folder in folders if os.path.isfile(folder / name)), folders[0])


def _entries(record: Record, key: str, needed: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Record]]:
    entries = record.get(key, [])
    if not isinstance(entries, list):
        problems.append(f"{key!r} must be a list, got {shown(entries)}")
        return
    for place, entry in enumerate(entries):
        where = f"{key}[{place}]"
        if not isinstance(entry, dict):
            problems.append(f"{where} must be an object, got {shown(entry)}")
        elif missing := [name for name in needed if name not in entry]:
            problems.append(f"{where} has no {', '.join(map(repr, missing))}")
        else:
            yield where, entry


def _categories(record: Record, problems: list[str]) -> dict[int, Category]:
    categories: dict[int, Category] = {}
    for where, entry in _entries(record, "categories", ["id", "name"], problems):
        index, name, wnid = entry["id"], entry["name"], entry.get("wnid")
        if type(index) is not int or not isinstance(name, str):
            problems.append(f"{where}: expected an integer id and a text as name, got {shown(index)} and {shown(name)}")
        elif index in categories:
            problems.append(f"{where}: the id {shown(index)} is that of another category")
        else:
            categories[index] = Category(name, wnid if isinstance(wnid, str) else None)
    return categories


def _images(record: Record, problems: list[str]) -> dict[Key, tuple[str, Size]]:
    images: dict[Key, tuple[str, Size]] = {}
    names = set()
    for where, entry in _entries(record, "images", ["id", "file_name"], problems):
        key, name, size = entry["id"], inside(entry["file_name"]), _size(entry)
        if type(key) not in (int, str) or key in images:
            problems.append(f"{where}: expected an id of its own, got {shown(key)}")
        elif name is None or name in names:
            got = shown(entry["file_name"])
            problems.append(f"{where}: expected a file_name of its own, inside of the folder, got {got}")
        else:
            if size is None:
                got = f"{shown(entry.get('width'))} x {shown(entry.get('height'))}"
                problems.append(f"{where}: its masks are left out, as no image can be of width x height {got}")
            images[key] = name, size
            names.add(name)
    return images


def _size(image: Record) -> Size:
    width, height = (_side(image.get(side)) for side in ("width", "height"))
    return (width, height) if 1 <= width * height <= MAX_PIXELS else None


def _side(value: Any) -> int:
    return int(value) if is_number(value) and value >= 1 and value == int(value) else 0


def _annotations(
    record: Record, categories: dict[int, Category], images: dict[Key, tuple[str, Size]], problems: list[str]
) -> dict[Key, dict[int, list[Record]]]:
    found: dict[Key, dict[int, list[Record]]] = {key: {} for key in images}
    for where, entry in _entries(record, "annotations", ["image_id", "category_id", "bbox"], problems):
        key, category, box = entry["image_id"], entry["category_id"], entry["bbox"]
        if type(key) not in (int, str) or key not in images:
            problems.append(f"{where}: no image has the id {shown(key)}")
        elif type(category) is not int or category not in categories:
            problems.append(f"{where}: no category has the id {shown(category)}")
        elif not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            problems.append(f"{where}: bbox must be four numbers x, y, width, height, got {shown(box)}")
        elif entry.get("iscrowd") == 1:
            continue
        elif len(box_array([_edges(box)], images[key][1])) == 0:
            problems.append(f"{where}: nothing of the bbox {shown(box)} lies in the image")
        else:
            found[key].setdefault(category, []).append(entry)
    return found


def _edges(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _regions(found: dict[int, list[Record]], size: Size, where: str) -> tuple[Region, ...]:
    regions = []
    for category, entries in found.items():
        boxes = box_array([_edges(entry["bbox"]) for entry in entries], size)
        segmentations = [entry.get("segmentation") for entry in entries]
        mask = None
        if size is not None and all(segmentations):
            try:
                mask = union_mask(segmentations, size)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        regions.append(Region(category, boxes, mask))
    return tuple(regions)
