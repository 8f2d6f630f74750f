"""Layout "folders": a subfolder of images for each class."""

from functools import partial
from pathlib import Path

from .. import images
from .dataset import Category, DataError, Dataset, Sample, without_boxes
from .wnids import imagenet_wnids

__all__ = ["class_folders", "open_folders"]


def open_folders(folder: Path) -> Dataset:
    """Open a folder whose subfolders hold the images of one class each.

    The classes are numbered from 0 on in the sorted order of the subfolders' names as text, as torchvision's
    ImageFolder has it: "10" comes before "2". Where every name is a wnid of ImageNet's 1000 classes, they have
    ImageNet's numbers. Hidden subfolders are passed over, as are images further below. The
    samples are ordered by class and name and have no boxes.

    Args:
        folder: The folder above those of the classes.

    Raises:
        DataError: If no subfolder holds an image.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     (Path(folder) / "n02123045").mkdir()
        ...     (Path(folder) / "n02123045" / "tabby.jpg").touch()
        ...     open_folders(Path(folder)).samples[0].categories
        (281,)
    """
    wnids = imagenet_wnids()
    classes = class_folders(folder)
    known = all(path.name in wnids for path in classes)
    categories, problems = {}, []
    samples: list[Sample] = []
    for place, path in enumerate(classes):
        index = wnids[path.name] if known else place
        categories[index] = Category(path.name, path.name if path.name in wnids else None)
        try:
            files = images.collect([path])
        except images.ImageError as error:
            problems.append(str(error))
            continue
        for file in files:
            name, regions = file.relative_to(folder).as_posix(), partial(without_boxes, (index,))
            samples.append(Sample(name, (index,), partial(images.read, file), regions))
    if not samples:
        raise DataError(f"{folder}: none of its subfolders holds an image")
    return Dataset(folder.resolve().name, "folders", categories, tuple(samples), tuple(problems))


def class_folders(folder: Path) -> list[Path]:
    """List the subfolders that are not hidden, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
