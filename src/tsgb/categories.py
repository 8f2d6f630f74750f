"""Which classes of a model a data set's category stands for."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

from .data import Category
from .data.wnids import imagenet_wnids

__all__ = ["classes_of", "has_kinds"]

_IMAGENET = 1000

# Other names of Pascal VOC's classes, COCO's first of all, without the spaces.
_SYNONYMS = {
    "airplane": "aeroplane",
    "couch": "sofa",
    "motorcycle": "motorbike",
    "tv": "tvmonitor",
}

_HOMONYMS = {"kite"}  # a toy in COCO, a bird in ImageNet


def classes_of(category: Category, index: int, names: Sequence[str] | None, count: int) -> tuple[int, ...]:
    """Return the model's classes that a category of a data set stands for, none where the model lacks it.

    The first of these rules that applies decides; the names are compared without regard to case, underscores, hyphens,
    spaces and apostrophes, and of a name with commas each part counts as a name too. A model is ImageNet's if it has
    1000 classes, and class 0, if named, is a tench.

    1. A category without name, called by its own index, is the class of that index.
    2. One of the 20 categories of Pascal VOC (also as COCO spells them) without wnid is, for ImageNet's model, the
       group of its classes, of which a person has none.
    3. If the class at the category's own index has its name, it is that class.
    4. A category with a wnid is, for ImageNet's model, the class of that wnid.
    5. If the model's classes are named, it is all those that have its name; but COCO's kite is no bird.
    6. If they are not named, it is the class of the category's own index.

    The groups of 2 are in `classes/voc_in_imagenet.json`: what is a kind of the category, by VOC's guidelines on what
    to annotate (a bus is no car; a moped is a motorbike), and no mere part or place of it.

    Args:
        category: The category.
        index: Its number in the data set.
        names: The model's class names, one for each logit; None where they are not known.
        count: Number of logits.

    Returns:
        Distinct class indices, ascending, each 0..count - 1.

    Raises:
        ValueError: If `names` are not `count`.

    Example:
        >>> classes_of(Category("cat"), 8, None, count=1000)
        (281, 282, 283, 284, 285)
        >>> classes_of(Category("ball"), 1, ["star", "ball"], count=2), classes_of(Category("bat"), 1, ["star"], 1)
        ((1,), ())
    """
    if names is not None and len(names) != count:
        raise ValueError(f"names must be of the model's {count} classes, got {len(names)}; give None if unknown")
    own = (index,) if 0 <= index < count else ()
    if category.name == str(index):
        return own
    key = _key(category.name)
    if has_kinds(category, names, count):
        return _voc_groups()[key]
    imagenet = _is_imagenet(names, count)
    if own and names is not None and key in _keys(names[index]):
        return own
    if imagenet and category.wnid in imagenet_wnids():
        return (imagenet_wnids()[category.wnid],)
    if names is None:
        return own
    if imagenet and key in _HOMONYMS:
        return ()
    return tuple(place for place, name in enumerate(names) if key in _keys(name))


def has_kinds(category: Category, names: Sequence[str] | None, count: int) -> bool:
    """Tell whether the model knows a category by its kinds alone, as ImageNet's knows a cat as five breeds (rule 2).

    Example:
        >>> has_kinds(Category("cat"), None, count=1000), has_kinds(Category("cat"), None, count=21)
        (True, False)
    """
    return _is_imagenet(names, count) and category.wnid is None and _key(category.name) in _voc_groups()


def _is_imagenet(names: Sequence[str] | None, count: int) -> bool:
    return count == _IMAGENET and (names is None or "tench" in _keys(names[0]))


def _key(name: str) -> str:
    plain = name.casefold().translate(dict.fromkeys(map(ord, " _-'’")))
    return _SYNONYMS.get(plain, plain)


def _keys(name: str) -> set[str]:
    return {_key(name), *map(_key, name.split(","))} - {""}


@cache
def _voc_groups() -> dict[str, tuple[int, ...]]:
    text = (resources.files("tsgb") / "classes" / "voc_in_imagenet.json").read_text(encoding="ascii")
    groups = {}
    for name, ranges in json.loads(text).items():
        ends = [[int(end) for end in part.split("-")] for part in ranges.split()]
        groups[name] = tuple(number for end in ends for number in range(end[0], end[-1] + 1))
    return groups
