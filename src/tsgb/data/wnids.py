"""The 1000 classes of ImageNet by their WordNet ids."""

from functools import cache
from importlib import resources

__all__ = ["imagenet_wnids"]


@cache
def imagenet_wnids() -> dict[str, int]:
    """Return the class index, 0..999, of each of ImageNet's 1000 WordNet ids, which are in sorted order.

    Example:
        >>> imagenet_wnids()["n02084071"]
        Traceback (most recent call last):
            ...
        KeyError: 'n02084071'
        >>> imagenet_wnids()["n01440764"], len(imagenet_wnids())
        (0, 1000)
    """
    lines = (resources.files("tsgb") / "classes" / "imagenet_wnids.txt").read_text(encoding="ascii").split()
    return {wnid: index for index, wnid in enumerate(lines)}
