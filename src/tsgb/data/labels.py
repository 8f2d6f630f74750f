"""Layout "labels": images with one class each, listed in labels.json."""

from functools import partial
from pathlib import Path

from .. import images
from .dataset import Category, Dataset, Sample, shown, without_boxes
from .files import inside, read_json

__all__ = ["open_labels"]


def open_labels(folder: Path) -> Dataset:
    """Open a folder with labels.json, `{file name: class index}`, and its images in images/ or beside it.

    The samples have the order of the file and no boxes; an image that is not there stays a sample, and reading it
    fails. A class is named by its index, as there is no other name for it.

    Args:
        folder: The folder that holds labels.json.

    Raises:
        DataError: If labels.json cannot be read, is no JSON, or no object.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     written = (Path(folder) / "labels.json").write_text('{"cat.jpg": 281}')
        ...     open_labels(Path(folder)).samples[0].categories
        (281,)
    """
    file = folder / "labels.json"
    labels = read_json(file)
    root = folder / "images" if (folder / "images").is_dir() else folder
    samples: dict[str, Sample] = {}
    problems = []
    for key, index in labels.items():
        name = inside(key)
        if name is None or name in samples:
            problems.append(f"{file.name}: {shown(key)} is not a path of its own inside of the image folder")
        elif isinstance(index, bool) or not isinstance(index, int) or index < 0:
            problems.append(f"{file.name}: {shown(key)}: class index must be an integer from 0 on, got {shown(index)}")
        else:
            read, regions = partial(images.read, root / name), partial(without_boxes, (index,))
            samples[name] = Sample(name, (index,), read, regions)
    found = sorted({sample.categories[0] for sample in samples.values()})
    categories = {index: Category(str(index)) for index in found}
    return Dataset(folder.resolve().name, "labels", categories, tuple(samples.values()), tuple(problems))
