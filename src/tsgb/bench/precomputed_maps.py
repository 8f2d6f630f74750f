"""Maps that were computed elsewhere, a .npy file for each image and class; and slices of a dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .protocol import METRICS

__all__ = ["MAP_METRICS", "folder_of", "precomputed_methods", "read_maps", "slice_of"]

#: Metrics for precomputed maps. The others need maps of grids or of a randomised network, or the method itself.
MAP_METRICS = tuple(name for name in METRICS if name not in ("grid", "grid_ap", "cascade", "speed", "memory"))


def slice_of(text: str) -> slice:
    """Parse a Python slice, as written between brackets.

    Raises:
        ValueError: the text is no slice.

    Example:
        >>> list(range(6))[slice_of("1::2")], list(range(6))[slice_of(":3")]
        ([1, 3, 5], [0, 1, 2])
    """
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or numbers[2:] == [0]:
        raise ValueError(f"images must be a Python slice, as '1::2' or ':100', got {text!r}")
    return slice(*numbers)


def precomputed_methods(folder: Path) -> tuple[str, ...]:
    """Name the methods with maps in a folder: its subfolders that have .npy files, else the folder itself.

    Raises:
        ValueError: the folder has no .npy file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "cat_281.npy", np.zeros((2, 2)))
        >>> precomputed_methods(folder) == (folder.name,)
        True
    """
    if folder.is_dir():
        within = tuple(sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(sub.glob("*.npy"))))
        if within:
            return within
        if any(folder.glob("*.npy")):
            return (folder.resolve().name,)
    raise ValueError(f"{folder} holds no maps: expected <image>_<class>.npy, or folders of such, one a method")


def folder_of(folder: Path, method: str) -> Path:
    """Return the folder of a method's maps: its subfolder, else the folder itself."""
    return folder / method if (folder / method).is_dir() else folder


def read_maps(folder: Path, label: str, classes: Sequence[int]) -> tuple[dict[int, Tensor], list[str]]:
    """Read the maps of an image's classes from ``<label>_<class>.npy``, as `tsgb explain` writes them.

    Args:
        folder: see `folder_of`. ``label``: the image's file stem; see `tsgb.images.labels` where stems are alike.
        classes: the network's classes.

    Returns:
        The maps by class, float64, and one line for each that is missing or cannot be read.

    Example:
        >>> read_maps(Path("nowhere"), "cat", [281])
        ({}, ["no map: expected <image>_<class>.npy, of the network's class"])
    """
    maps, errors = {}, []
    for target in classes:
        file = folder / f"{label}_{target}.npy"
        try:
            maps[target] = torch.from_numpy(_read(file))
        except FileNotFoundError:
            errors.append("no map: expected <image>_<class>.npy, of the network's class")
        except Exception as error:  # numpy may raise anything for a broken file
            errors.append(f"{file.name}: {' '.join(str(error).split()) or type(error).__name__}")
    return maps, errors


def _read(file: Path) -> npt.NDArray[np.float64]:
    with open(file, "rb") as opened:
        if opened.read(6) != b"\x93NUMPY":
            raise ValueError("not a .npy file")
    values = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a header may promise more than memory holds
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise ValueError(f"expected real numbers (H, W), got {values.dtype} {values.shape}")
    return np.array(values, dtype=np.float64)
