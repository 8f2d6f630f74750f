"""What `tsgb.explain` returns: maps, and what is needed to judge, draw and keep them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from .preprocessing import Preprocessing

__all__ = ["Explanation", "Row"]

Row = tuple[str, str | None, int]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns: maps, and what is needed to judge them.

    Attributes:
        maps: (N, K, *spatial) float32 (float64 for float64 images), signed, raw: see `explain`.
            A tuple of such tensors for several inputs.
        targets: (N, K) int64 class indices, -1 for a callable target.
        logits: the model's logits, (N, classes) for a classifier; None where a callable target reads an output without
        them.
        coverage: rows (operator, rule or None, count), which operator met which rule. None: a weighted or curved
            operator that met none and kept its ordinary gradient.
        why_empty: N lists of K, for a map without positive values the reason, else None.
        f: the number f of the head's rule, None where the rules have none.
        images: the input (or tuple of inputs) explained, as it was given.
        of_all_depths: whether the maps are made of the relevance of all depths, as `FUSED` asks. Else they are the
            pixels' own: under other rules, of several inputs, and where no convolution shares anything on their grid.
    """

    maps: Any
    targets: Tensor
    logits: Any
    coverage: list[Row]
    why_empty: list[list[str | None]]
    f: float | None
    images: Any
    of_all_depths: bool = False

    def __repr__(self) -> str:
        """Summarise: an explanation holds too many numbers to print."""
        shape = [tuple(m.shape) for m in self.maps] if isinstance(self.maps, tuple) else tuple(self.maps.shape)
        return f"Explanation(maps={shape}, targets={self.targets.tolist()}, f={self.f})"

    def overlay(
        self,
        image: Image.Image | str | Path | None = None,
        index: int = 0,
        target: int = 0,
        *,
        colormap: str = "jet",
        alpha: float = 0.5,
        scale: float | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Image.Image:
        """Lay one map over its original image; of a series or a volume, over the input itself.

        A series (C, L) is drawn over the colours of its map, see `tsgb.plots.series`; of a volume (C, D, H, W) the
        slices are shown side by side, see `tsgb.plots.montage`.

        Args:
            image: the original of the input (a Pillow image or a file), of any size. By default, the input itself is
                shown, stretched to the range of its own values.
            index: of the image, 0..N-1. ``target``: index of the target, 0..K-1.
            colormap: "jet", "viridis", or "bwr" for the signed map.
            alpha: opacity of the strongest evidence, 0..1.
            scale: the value that gets the full colour, by default the map's 99th percentile.
            preprocessing: how the input was made of the original, as ``network.preprocessing``. By default, squashed to
                the network's size; a warning says if that changed the shape.

        Returns:
            An RGB image of the size of ``image``.

        Raises:
            ValueError: the maps have no one to three dimensions, an image is given for a series or a volume, or a
                preprocessing of another size or without an image. IndexError: no such index or target. TypeError: an
                index is no integer, or the image is neither a Pillow image nor a file.

        Example:
            >>> import torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128))
            >>> e.overlay().size
            (128, 128)
        """
        from . import plots, render

        self._check_place(index, target)
        maps, images = (value[0] if isinstance(value, tuple) else value for value in (self.maps, self.images))
        if maps.dim() in (3, 5):
            if image is not None or preprocessing is not None:
                raise ValueError(f"an image can be given for maps (N, K, H, W) alone, got {tuple(maps.shape)}")
            draw = plots.series if maps.dim() == 3 else plots.montage
            shown = images[index].detach().float().cpu().numpy(), maps[index, target].cpu().numpy()
            return draw(*shown, colormap=colormap, alpha=alpha, scale=scale)
        below, map = self._image(index, image), self._map(index, target)
        way = self._way(preprocessing, image is not None)
        if preprocessing is None:
            _tell_if_distorted(below.size, way)
        laid = way.restore(map, below.size)
        return render.overlay(below, laid, colormap=colormap, alpha=alpha, scale=scale)

    def save(
        self,
        folder: str | Path,
        images: Sequence[Image.Image | str | Path] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> list[Path]:
        """Write every map as an overlay and as an array: ``<image>_<class>.png`` and ``.npy``.

        Args:
            folder: where to; made if missing. Files of the same name are replaced, each as a whole.
            images: the original of each input, as in `overlay`; file names start with their stems, else with the index.
            preprocessing: as in `overlay`.

        Returns:
            The paths written.

        Raises:
            ValueError: not as many images as inputs. OSError: the folder cannot be written.

        Example:
            >>> import tempfile, torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), target=3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     [path.name for path in e.save(folder)]
            ['0_3.png', '0_3.npy']
        """
        from pathlib import Path

        from . import render

        count, k = self.targets.shape
        if images is not None and len(images) != count:
            raise ValueError(f"images must be {count}, one for each input, got {len(images)}")
        maps = self.maps[0] if isinstance(self.maps, tuple) else self.maps
        shown = [self._image(n, image) for n, image in enumerate(images)] if images else [None] * count
        written = []
        for n, stem in enumerate(_stems(images, count)):
            for j in range(k):
                label = str(int(self.targets[n, j])) if self.targets[n, j] >= 0 else "target"
                png, npy = (Path(folder) / f"{stem}_{label}.{kind}" for kind in ("png", "npy"))
                render.save(self.overlay(shown[n], n, j, preprocessing=preprocessing), png)
                render.save_map(maps[n, j].cpu().numpy(), npy)
                written += [png, npy]
        return written

    def boxes(
        self,
        threshold: float | Literal["mean"] = "mean",
        component: Literal["largest", "all"] = "largest",
        images: Sequence[Image.Image | str | Path | tuple[int, int]] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> list[list[Any]]:
        """Draw boxes around each map's evidence, in the pixels of the original images.

        They are found in the network's pixels, see `tsgb.regions.boxes`, and carried over.

        Args:
            threshold: evidence above it counts: "mean", of the map's positive part, or 0..1, the share of its maximum.
            component: "largest", the connected piece of the most pixels, or "all".
            images: the original of each input: a Pillow image, a file, or its (width, height) in pixels. By default,
                boxes are in the network's pixels.
            preprocessing: how the inputs were made of the originals. By default, each was squashed to the network's
                size; a warning says if that changed its shape.

        Returns:
            N lists of K float64 arrays (n, 4): left, upper, right, lower edge in pixels, the largest piece first; (0,
            4) for a map without positive values. Boxes end where the image ends.

        Raises:
            ValueError: the maps are not two-dimensional or not finite, an argument is none of the above, not as
            many images as inputs, or a preprocessing of another size. ImageError: a file cannot be read.

        Example:
            >>> import torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128))
            >>> e.boxes(images=[(512, 512)])[0][0].shape
            (1, 4)
        """
        from . import regions

        ways = self._ways(images, preprocessing)
        found = [[regions.boxes(map, threshold, component) for map in self._arrays(n)] for n in range(len(ways))]
        return [
            [_clipped(way.to_image(each, size), size) for each in row]
            for row, (way, size) in zip(found, ways, strict=True)
        ]

    def mask(
        self,
        threshold: float | Literal["mean"] = "mean",
        images: Sequence[Image.Image | str | Path | tuple[int, int]] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> list[list[Any]]:
        """Mark where each map's evidence exceeds a threshold, in the pixels of the original images.

        It is found in the network's pixels, see `tsgb.regions.mask`, and each pixel of the image takes what the
        network's pixel at its centre has.

        Args:
            threshold, images, preprocessing: as for `boxes`.

        Returns:
            N lists of K bool arrays (height, width); False where the network did not see the image.

        Raises:
            ValueError, ImageError: as for `boxes`.

        Example:
            >>> import torch, tsgb
            >>> e = tsgb.explain(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128))
            >>> e.mask(images=[(512, 512)])[0][0].shape
            (512, 512)
        """
        from . import regions

        ways = self._ways(images, preprocessing)
        return [
            [_carried(regions.mask(map, threshold), way, size) for map in self._arrays(n)]
            for n, (way, size) in enumerate(ways)
        ]

    def _arrays(self, index: int) -> list[Any]:
        """All maps of one image, in the network's pixels."""
        return [self._map(index, target) for target in range(self.targets.shape[1])]

    def _ways(self, images: Any, preprocessing: Preprocessing | None) -> list[tuple[Preprocessing, tuple[int, int]]]:
        """For each input the preprocessing that leads back to its original, and its (width, height)."""
        way = self._way(preprocessing, images is not None)
        if images is None:
            return [(way, way.size[::-1])] * len(self.targets)
        got = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
        if got != len(self.targets):
            raise ValueError(f"images must be a list of {len(self.targets)}, one for each input, got {got}")
        sizes = [_size(image) for image in images]
        for size in sizes if preprocessing is None else ():
            _tell_if_distorted(size, way)
        return [(way, size) for size in sizes]

    def _way(self, preprocessing: Preprocessing | None, has_images: bool) -> Preprocessing:
        """The preprocessing that leads from the maps back to the originals: as given, or squashed."""
        from .preprocessing import Preprocessing

        if preprocessing is not None and not has_images:
            raise ValueError("preprocessing needs the original images too, one for each input")
        height, width = self._drawable().shape[2:]
        way = preprocessing or Preprocessing(size=(height, width))
        if way.size != (height, width):
            raise ValueError(f"preprocessing must be of the maps' size {(height, width)}, got {way.size}")
        return way

    def _check_place(self, index: int, target: int) -> None:
        """Refuse the index of an image or a target that there is none of; targets are counted, not named by class."""
        for name, value in (("index", index), ("target", target)):
            if not hasattr(value, "__index__"):
                raise TypeError(f"{name} counts those asked for, 0 for the first, got {value!r}")
        count, k = self.targets.shape
        if not (-count <= index < count and -k <= target < k):
            classes = self.targets[index].tolist() if -count <= index < count else self.targets.tolist()
            raise IndexError(
                f"index must be below {count} and target, which counts the classes asked for, {classes}, below {k}; "
                f"got index={index}, target={target}"
            )

    def _map(self, index: int, target: int) -> Any:
        """One map, in the network's pixels."""
        return self._drawable()[index, target].cpu().numpy()

    def _drawable(self) -> Tensor:
        """The maps (N, K, H, W), of several inputs those of the first."""
        maps: Tensor = self.maps[0] if isinstance(self.maps, tuple) else self.maps
        if maps.dim() != 4:
            raise ValueError(f"overlays on images, boxes and masks are of maps (N, K, H, W), got {tuple(maps.shape)}")
        return maps

    def _image(self, index: int, image: Any) -> Image.Image:
        """The image to draw on: as given, read from a file, or made from the input."""
        from pathlib import Path

        from PIL import Image

        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if isinstance(image, (str, Path)):
            from .images import read

            return read(image)
        if image is not None:
            raise TypeError(f"image must be a Pillow image or a file, got {type(image).__name__}")
        images = self.images[0] if isinstance(self.images, tuple) else self.images
        values = images[index].detach().float().cpu()
        span = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
        channels = span if len(span) == 3 else span.mean(0, keepdim=True).expand(3, *span.shape[1:])
        return Image.fromarray((channels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _stems(images: Sequence[Any] | None, count: int) -> list[str]:
    """File stems for the inputs: those of their originals where all are files, else their indices."""
    from pathlib import Path

    if images is None or not all(isinstance(image, (str, Path)) for image in images):
        return [str(n) for n in range(count)]
    from .images import labels

    return labels([Path(image) for image in images])


def _size(image: Any) -> tuple[int, int]:
    """Width and height of an image, of an image file, or as they are given."""
    from pathlib import Path

    from PIL import Image

    from .images import read

    size = read(image).size if isinstance(image, (str, Path)) else image
    size = size.size if isinstance(size, Image.Image) else size
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(_counts(n) for n in size)):
        raise ValueError(f"images must be Pillow images, files, or (width, height), at least 1, got {image!r}")
    return int(size[0]), int(size[1])


def _tell_if_distorted(size: tuple[int, int], way: Preprocessing) -> None:
    """Warn where an image (width, height) is taken as squashed though it may have been cropped."""
    height, width = way.size
    if abs(size[0] * height / (size[1] * width) - 1) > 0.02:
        warnings.warn(
            f"an image of {size[0]} x {size[1]} pixels is taken as squashed to the network's {width} x {height}; if "
            "it was cropped, the map lies elsewhere: say which by preprocessing=, a tsgb.preprocessing.Preprocessing",
            stacklevel=4,
        )


def _counts(number: Any) -> bool:
    """Whether it is an integer, Python's or numpy's, of 1 or more."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


def _clipped(boxes: Any, size: tuple[int, int]) -> Any:
    """What of the boxes lies in an image (width, height); a crop may have filled up beyond it."""
    clipped = boxes.clip(0, (*size, *size))
    return clipped[(clipped[:, 2:] > clipped[:, :2]).all(1)]


def _carried(mask: Any, way: Preprocessing, size: tuple[int, int]) -> Any:
    """A mask of the network's pixels at the centres of the pixels of an image (width, height)."""
    import numpy as np

    centres = np.arange(max(size))[:, None] + np.full(4, 0.5)
    carried, (height, width) = way.to_network(centres, size), mask.shape
    columns, rows = carried[: size[0], 0], carried[: size[1], 1]
    seen = ((rows >= 0) & (rows <= height))[:, None] & (columns >= 0) & (columns <= width)
    nearest = np.ix_(rows.clip(0, height - 1).astype(int), columns.clip(0, width - 1).astype(int))
    return mask[nearest] & seen
