"""Layout "imagenet": images with XML files that name objects by WordNet id, as in ILSVRC's localisation task."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from .. import images
from .dataset import Category, DataError, Dataset, Sample, shown, without_boxes
from .objects import box_regions, boxes_by_class, broken, read_annotation
from .wnids import imagenet_wnids

__all__ = ["annotation_files", "open_imagenet"]

_SUFFIXES = (".jpeg", ".jpg", ".png")


def open_imagenet(folder: Path) -> Dataset:
    """Open ILSVRC's validation set, or any folder of images annotated like it.

    The XML files lie in Annotations/CLS-LOC/val/, else anywhere below Annotations/, else in the folder or its
    subfolders; the images in Data/CLS-LOC/val/, else anywhere below the folder. They belong together by their stem.
    Samples are ordered by path; the categories are ImageNet's 0..999. The edges of a box are xmin and xmax as they
    stand, clipped to the image. Every annotation is read when the data set is opened: 50 000 take some seconds. Where
    one is broken, or has objects of which none can be used, the sample has no categories and its `regions` raise
    ValueError with the reason.

    Args:
        folder: The folder; ILSVRC's is the one that holds Annotations/ and Data/.

    Raises:
        DataError: If no file names a class of ImageNet.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     box = "<xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax>"
        ...     text = f"<a><object><name>n02123045</name><bndbox>{box}</bndbox></object></a>"
        ...     _ = (Path(folder) / "1.xml").write_text(text)
        ...     (Path(folder) / "1.jpg").touch()
        ...     open_imagenet(Path(folder)).samples[0].categories
        (281,)
    """
    files = annotation_files(folder)
    data = folder / "Data" / "CLS-LOC" / "val"
    root = data if data.is_dir() else folder
    everything = sorted(path for path in root.rglob("*") if not path.name.startswith("."))
    photographs = [path for path in everything if path.suffix.lower() in _SUFFIXES]
    problems: list[str] = []
    by_stem = _by_stem(folder, files, problems)
    samples = []
    for photograph in _by_stem(folder, photographs, problems).values():
        samples.append(_sample(photograph.relative_to(root).as_posix(), photograph, by_stem, problems))
    problems.extend(f"{file.name}: no image for it" for file in by_stem.values())
    if not any(sample.categories for sample in samples):
        reasons = [*_faults(samples), *problems]
        told = f" ({reasons[0]})" if reasons else ""
        raise DataError(f"{folder}: no XML file names a class of ImageNet by its wnid, such as n01440764{told}")
    categories = {index: Category(wnid, wnid) for wnid, index in imagenet_wnids().items()}
    return Dataset(folder.resolve().name, "imagenet", categories, tuple(samples), tuple(problems))


def annotation_files(folder: Path) -> list[Path]:
    """List the XML files that `open_imagenet` would read, sorted; [] where there are none."""
    for below in (folder / "Annotations" / "CLS-LOC" / "val", folder / "Annotations"):
        if found := sorted(below.rglob("*.xml")):
            return found
    return sorted([*folder.glob("*.xml"), *folder.glob("*/*.xml")])


def _by_stem(folder: Path, files: Sequence[Path], problems: list[str]) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for file in files:
        if by_stem.setdefault(file.stem, file) != file:
            problems.append(f"{shown(file.relative_to(folder).as_posix())}: another file has this stem already")
    return by_stem


def _sample(name: str, photograph: Path, files: dict[str, Path], problems: list[str]) -> Sample:
    read = partial(images.read, photograph)
    file = files.pop(photograph.stem, None)
    if file is None:
        return Sample(name, (), read, partial(without_boxes, ()))
    try:
        annotation = read_annotation(file, first=0)
        boxes, passed_over = boxes_by_class(annotation, imagenet_wnids())
    except ValueError as error:
        return Sample(name, (), read, partial(broken, str(error)))
    problems.extend(passed_over)
    return Sample(name, tuple(boxes), read, partial(box_regions, boxes, annotation.size), annotation.size)


def _faults(samples: Iterable[Sample]) -> Iterator[str]:
    for sample in samples:
        try:
            sample.regions()
        except ValueError as error:
            yield str(error)
