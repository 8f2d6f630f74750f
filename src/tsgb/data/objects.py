"""The objects in an XML annotation of Pascal VOC's form, which ImageNet uses too."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from .. import pictures
from .dataset import Region, box_array, is_number, shown
from .files import read_xml

__all__ = ["Annotation", "box_regions", "broken", "read_annotation"]

Size = tuple[int, int] | None
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """What an XML file says of its picture: the size, the boxes by class, and what had to be passed over."""

    size: Size
    boxes: dict[int, list[Box]]
    problems: tuple[str, ...]


def read_annotation(file: Path, classes: Mapping[str, int], first: int) -> Annotation:
    """Read the objects that an XML file names, each with its box.

    Objects that are marked as difficult are left out; those of an unknown name, or with a box that is broken or lies
    outside of the picture, become problems.

    Args:
        file: The XML file.
        classes: Number of each class by its name.
        first: Number of the first pixel: 1 for Pascal VOC, so that the left edge is xmin - 1; 0 where xmin is the edge.

    Raises:
        ValueError: If the file is no XML annotation; one line that names it.
    """
    root = read_xml(file)
    size = _size(root)
    boxes: dict[int, list[Box]] = {}
    problems = []
    for place, item in enumerate(root.findall("object")):
        where, name = f"{file.name}: object[{place}]", (item.findtext("name") or "").strip()
        box = _box(item, first)
        if (item.findtext("difficult") or "").strip() == "1":
            continue
        if name not in classes:
            problems.append(f"{where}: unknown class {shown(name)}")
        elif box is None:
            problems.append(f"{where}: expected a bndbox with the numbers xmin, ymin, xmax and ymax")
        elif len(box_array([box], size)) == 0:
            problems.append(f"{where}: nothing of the box {shown(list(box))} lies in the picture")
        else:
            boxes.setdefault(classes[name], []).append(box)
    return Annotation(size, {category: boxes[category] for category in sorted(boxes)}, tuple(problems))


def box_regions(boxes: Mapping[int, list[Box]], size: Size) -> tuple[Region, ...]:
    """Return a region without mask for each class, in their order.

    Example:
        >>> box_regions({3: [(0, 0, 9, 2)]}, size=(4, 4))[0].boxes.tolist()
        [[0.0, 0.0, 4.0, 2.0]]
    """
    return tuple(Region(category, box_array(found, size)) for category, found in boxes.items())


def broken(problem: str) -> tuple[Region, ...]:
    """Raise ValueError with what is wrong with a picture's annotation, in place of its regions.

    Example:
        >>> broken("cat.xml: not an XML annotation")
        Traceback (most recent call last):
            ...
        ValueError: cat.xml: not an XML annotation
    """
    raise ValueError(problem)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if is_number(value) else None


def _size(root: Element) -> Size:
    width, height = (_number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
    whole = width >= 1 and height >= 1 and width * height <= pictures.MAX_PIXELS
    return (int(width), int(height)) if whole else None


def _box(item: Element, first: int) -> Box | None:
    x0, y0, x1, y1 = (_number(item.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x0 is None or y0 is None or x1 is None or y1 is None:
        return None
    return x0 - first, y0 - first, x1, y1
