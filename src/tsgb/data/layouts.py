"""Which layout lies under a path, and opening it."""

from pathlib import Path

from .coco import open_coco
from .dataset import DataError, Dataset
from .folders import class_folders, open_folders
from .imagenet import annotation_files, open_imagenet
from .labels import open_labels
from .scenes import open_scenes
from .voc import open_voc

__all__ = ["open_dataset"]

_UNDERSTOOD = (
    "understood are: annotations.json or another .json file in COCO layout; labels.json, {file name: class index}; "
    "Pascal VOC (Annotations/*.xml and JPEGImages/); ImageNet (XML files whose objects are named by wnid); a folder "
    "with a subfolder of images for each class"
)


def open_dataset(path: str | Path | None = None) -> Dataset:
    """Open the data set under a path, in the layout that is recognised there.

    Args:
        path: A .json file in COCO layout, or a folder with, looked for in this order: annotations.json ("coco"),
            labels.json ("labels"), Annotations/ and JPEGImages/ ("voc"), XML files ("imagenet"), subfolders of
            images ("folders"). None opens the bundled scenes.

    Returns:
        The data set; annotations are checked now as far as `problems` lists, images and masks are read later.

    Raises:
        DataError: If there is nothing, or nothing of these layouts.

    Example:
        >>> data = open_dataset()
        >>> data.layout, len(data.samples), data.samples[0].read().size
        ('scenes', 1000, (128, 128))
        >>> open_dataset("no such folder")
        Traceback (most recent call last):
            ...
        tsgb.data.dataset.DataError: no such folder: no such file or folder
    """
    if path is None:
        return open_scenes()
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".json":
            raise DataError(f"{path}: not a data set; {_UNDERSTOOD}")
        return open_coco(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / "annotations.json").is_file():
        return open_coco(path / "annotations.json")
    if (path / "labels.json").is_file():
        return open_labels(path)
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return open_voc(path)
    if annotation_files(path):
        return open_imagenet(path)
    if class_folders(path):
        try:
            return open_folders(path)
        except DataError as error:
            raise DataError(f"{error}; {_UNDERSTOOD}") from error
    raise DataError(f"{path}: no data set was found there; {_UNDERSTOOD}")
