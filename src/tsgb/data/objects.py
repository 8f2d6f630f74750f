"""The objects in an XML annotation of Pascal VOC's form, which ImageNet uses too."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from .. import images
from .dataset import Region, box_array, is_number, shown
from .files import read_xml

__all__ = ["Annotation", "Item", "box_regions", "boxes_by_class", "broken", "read_annotation"]

Size = tuple[int, int] | None
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Item:
    """One object of an image; its box is None where it is none."""

    name: str
    box: Box | None
    is_difficult: bool


@dataclass(frozen=True)
class Annotation:
    """What an XML file says of its image: the size, and the objects in their order."""

    file: Path
    size: Size
    items: tuple[Item, ...]


def read_annotation(file: Path, first: int) -> Annotation:
    """Read the objects that an XML file names, each with its box.

    Args:
        file: The XML file.
        first: Number of the first pixel: 1 for Pascal VOC, so that the left edge is xmin - 1; 0 where xmin is the edge.

    Raises:
        ValueError: If the file is no XML annotation; one line that names it.
    """
    root = read_xml(file)
    items = []
    for item in root.findall("object"):
        name = " ".join((item.findtext("name") or "").split())
        items.append(Item(name, _box(item, first), (item.findtext("difficult") or "").strip() == "1"))
    return Annotation(file, _size(root), tuple(items))


def boxes_by_class(annotation: Annotation, classes: Mapping[str, int]) -> tuple[dict[int, list[Box]], list[str]]:
    """Sort the boxes of an annotation by class.

    Objects that are marked as difficult are left out; those of an unknown name, or with a box that is broken or lies
    outside of the image, become problems.

    Args:
        annotation: What was read.
        classes: Number of each class by its name.

    Returns:
        The boxes by number, ascending, and the problems, one line each.

    Raises:
        ValueError: If there are objects, but none is left; one line that names the file and says why.

    Example:
        >>> cat = Item("cat", (0, 0, 9, 2), is_difficult=False)
        >>> boxes_by_class(Annotation(Path("a.xml"), None, (cat, Item("yeti", None, False))), {"cat": 8})
        ({8: [(0, 0, 9, 2)]}, ["a.xml: object[1]: unknown class 'yeti'"])
    """
    boxes: dict[int, list[Box]] = {}
    faults = []
    for place, item in enumerate(annotation.items):
        if item.is_difficult:
            continue
        if item.name not in classes:
            faults.append(f"object[{place}]: unknown class {shown(item.name)}")
        elif item.box is None:
            faults.append(f"object[{place}]: expected a bndbox with the numbers xmin, ymin, xmax and ymax")
        elif len(box_array([item.box], annotation.size)) == 0:
            faults.append(f"object[{place}]: nothing of the box {shown(list(item.box))} lies in the image")
        else:
            boxes.setdefault(classes[item.name], []).append(item.box)
    if annotation.items and not boxes:
        raise ValueError(f"{annotation.file}: no object can be used: {_reasons(annotation, faults)}")
    return {category: boxes[category] for category in sorted(boxes)}, [f"{annotation.file.name}: {f}" for f in faults]


def box_regions(boxes: Mapping[int, list[Box]], size: Size) -> tuple[Region, ...]:
    """Return a region without mask for each class, in their order.

    Example:
        >>> box_regions({3: [(0, 0, 9, 2)]}, size=(4, 4))[0].boxes.tolist()
        [[0.0, 0.0, 4.0, 2.0]]
    """
    return tuple(Region(category, box_array(found, size)) for category, found in boxes.items())


def broken(problem: str) -> tuple[Region, ...]:
    """Raise ValueError with what is wrong with an image's annotation, in place of its regions.

    Example:
        >>> broken("cat.xml: not an XML annotation")
        Traceback (most recent call last):
            ...
        ValueError: cat.xml: not an XML annotation
    """
    raise ValueError(problem)


def _reasons(annotation: Annotation, faults: list[str]) -> str:
    difficult, more = sum(item.is_difficult for item in annotation.items), len(faults) - 1
    reasons = [f"{difficult} marked as difficult"] if difficult else []
    return ", ".join([*reasons, *faults[:1], *([f"{more} more faults"] if more > 0 else [])])


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if is_number(value) else None


def _size(root: Element) -> Size:
    width, height = (_number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
    whole = width >= 1 and height >= 1 and width * height <= images.MAX_PIXELS
    return (int(width), int(height)) if whole else None


def _box(item: Element, first: int) -> Box | None:
    x0, y0, x1, y1 = (_number(item.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x0 is None or y0 is None or x1 is None or y1 is None:
        return None
    return x0 - first, y0 - first, x1, y1
