"""What is given to a bench: which pictures, and maps that someone else made, a .npy file for each picture and class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .protocol import METRICS

__all__ = ["JUDGED", "folder_of", "given_maps", "given_methods", "slice_of"]

#: Metrics that given maps can be judged by: the others need maps of grids, of a randomised network, or the method.
JUDGED = tuple(name for name in METRICS if name not in ("grid", "grid_ap", "cascade", "speed", "memory"))


def slice_of(text: str) -> slice:
    """Read a Python slice, as it stands between brackets.

    Raises:
        ValueError: it is none.

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
        raise ValueError(f"pictures must be a Python slice, as '1::2' or ':100', got {text!r}")
    return slice(*numbers)


def given_methods(folder: Path) -> tuple[str, ...]:
    """Name the methods whose maps lie in a folder: its subfolders that hold .npy files, else the folder itself.

    Raises:
        ValueError: there is no .npy file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "cat_281.npy", np.zeros((2, 2)))
        >>> given_methods(folder) == (folder.name,)
        True
    """
    if folder.is_dir():
        within = tuple(sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(sub.glob("*.npy"))))
        if within:
            return within
        if any(folder.glob("*.npy")):
            return (folder.resolve().name,)
    raise ValueError(f"{folder} holds no maps: expected <picture>_<class>.npy, or folders of such, one a method")


def folder_of(folder: Path, method: str) -> Path:
    """Where a method's maps lie: in its subfolder, or in the folder itself where the method has its name."""
    return folder / method if (folder / method).is_dir() else folder


def given_maps(folder: Path, label: str, classes: Sequence[int]) -> tuple[dict[int, Tensor], list[str]]:
    """Read the maps of a picture's classes from ``<label>_<class>.npy``, as `tsgb explain` writes them.

    Args:
        folder: see `folder_of`. ``label``: the picture's file stem; see `tsgb.pictures.labels` where stems are alike.
        classes: the network's classes.

    Returns:
        The maps by class, float64, and one line for each that is missing or cannot be read.

    Example:
        >>> given_maps(Path("nowhere"), "cat", [281])
        ({}, ["no map: expected <picture>_<class>.npy, of the network's class"])
    """
    maps, errors = {}, []
    for target in classes:
        file = folder / f"{label}_{target}.npy"
        try:
            maps[target] = torch.from_numpy(_read(file))
        except FileNotFoundError:
            errors.append("no map: expected <picture>_<class>.npy, of the network's class")
        except Exception as error:  # whatever numpy makes of a broken file
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
