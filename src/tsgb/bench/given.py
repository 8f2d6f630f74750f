"""Maps that someone else made: one .npy file for each picture and class."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

__all__ = ["given_map", "given_methods"]


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
    within = tuple(sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(sub.glob("*.npy"))))
    if within:
        return within
    if not any(folder.glob("*.npy")):
        raise ValueError(f"{folder} holds no maps: expected <picture>_<class>.npy, or folders of such, one a method")
    return (folder.resolve().name,)


def given_map(folder: Path, method: str, unit: str, classes: Sequence[int]) -> tuple[dict[int, Tensor], list[str]]:
    """Read the maps of a picture's classes from ``<picture's stem>_<class>.npy``, as `tsgb explain` writes them.

    Returns:
        The maps (H, W) by class, and one line for each that is missing or cannot be read.
    """
    place = folder / method if (folder / method).is_dir() else folder
    maps, errors = {}, []
    for target in classes:
        file = place / f"{PurePosixPath(unit).stem}_{target}.npy"
        try:
            values = np.load(file, allow_pickle=False)
            maps[target] = torch.from_numpy(np.asarray(values, dtype=np.float64))
        except FileNotFoundError:
            errors.append(f"class {target}: no map {file.name}")
        except (OSError, ValueError, TypeError, EOFError) as error:
            errors.append(f"class {target}: {file.name} is no array of numbers: {' '.join(str(error).split())}")
    return maps, errors
