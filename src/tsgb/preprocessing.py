"""From an image to a network's input, and from a map of that input back to the image's own pixels."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_MAX_SCALED = 100_000_000  # pixels of the scaled image; a line one pixel high would else be scaled to gigabytes


@dataclass(frozen=True)
class Preprocessing:
    """One transform from an image's pixels to a network's input, with its way back.

    The image is scaled, antialiased, and of the scaled image a window of the network's size is taken. In either
    direction, for coordinates of pixel edges (0 is the left or upper edge of the first pixel),

        network = image * scale - offset

    - `squash`: scale = size / image size, offset = 0; the whole image, its shape distorted.
    - `crop`: the short side becomes `short_side`, the long side keeps the shape (rounded down to whole pixels), and the
      window lies in the middle. Where it is larger than the scaled image, it is filled up with black. Sizes and
      offsets are rounded as torchvision's `Resize` and `CenterCrop` round them.

    Then input = (colour / 255 - mean) / std.

    Attributes:
        size: Height and width of the network's input in pixels.
        mean: Mean of red, green, blue, in units of 0..1.
        std: Standard deviation of red, green, blue, in units of 0..1, above 0.
        resize: "squash" or "crop".
        short_side: Length of the scaled image's short side for "crop"; by default the longer side of `size`, so that
            nothing needs filling up. None for "squash".
        interpolation: "bilinear" or "bicubic", how the image is scaled.

    Raises:
        ValueError: If an argument is none of the above.

    Example:
        >>> preprocessing = Preprocessing(size=(224, 224), resize="crop", short_side=256)
        >>> image = Image.new("RGB", (512, 1024), "red")
        >>> preprocessing.tensor(image).shape
        torch.Size([3, 224, 224])
        >>> preprocessing.to_image((0, 0, 224, 224), image.size).tolist()
        [32.0, 288.0, 480.0, 736.0]
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: Literal["squash", "crop"] = "squash"
    short_side: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        """Check the arguments; lists, as JSON has them, become tuples."""
        object.__setattr__(self, "size", _pair(self.size, "size", "(height, width)"))
        if self.size[0] * self.size[1] > _MAX_SCALED:
            raise ValueError(f"size must be of at most 100 million pixels, got {self.size[0]} x {self.size[1]}")
        for name, allowed, fits in (
            ("mean", "from 0 to 1", lambda value: 0 <= value <= 1),
            ("std", "above 0 and at most 1", lambda value: 0 < value <= 1),
        ):
            values = getattr(self, name)
            if not (isinstance(values, Sequence) and len(values) == 3 and all(isinstance(v, Real) for v in values)):
                raise ValueError(f"{name} must be 3 numbers, got {values!r}")
            if not all(map(fits, values)):
                raise ValueError(f"{name} must be {allowed}, for colours scaled to 0..1, got {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))
        if self.resize not in ("squash", "crop"):
            raise ValueError(f"resize must be 'squash' or 'crop', got {self.resize!r}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")
        if self.resize == "squash":
            if self.short_side is not None:
                raise ValueError(f"short_side belongs to resize='crop'; it must be None here, got {self.short_side!r}")
        elif self.short_side is None:
            object.__setattr__(self, "short_side", max(self.size))
        elif not _is_length(self.short_side):
            raise ValueError(f"short_side must be an integer of at least 1, got {self.short_side!r}")

    def tensor(self, image: Image.Image) -> torch.Tensor:
        """Turn an image into the network's input.

        Args:
            image: Image of mode RGB.

        Returns:
            float32 tensor of shape (3, height, width).

        Raises:
            TypeError: If it is no Pillow image. ValueError: If its mode is not RGB, or if its short side is so short
                that the scaled image would have more than 100 million pixels.

        Example:
            >>> Preprocessing((2, 2), mean=(0, 0, 0), std=(1, 1, 1)).tensor(Image.new("RGB", (9, 5), "blue"))[:, 0, 0]
            tensor([0., 0., 1.])
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a Pillow image, as tsgb.images.read gives, got {type(image).__name__}")
        if image.mode != "RGB":
            raise ValueError(f"image must be of mode RGB, got {image.mode}; tsgb.images.read makes it so")
        (height, width), (scaled, (x, y)) = self.size, self._placed(image.size)
        if scaled[0] * scaled[1] > _MAX_SCALED:
            raise ValueError(
                f"image of {image.width} x {image.height} pixels is too long and thin: with short_side="
                f"{self.short_side} it would be scaled to {scaled[0]} x {scaled[1]}; take resize='squash' for it"
            )
        # The window reaches beyond the scaled image where it has to be filled up; Pillow's crop fills with black.
        seen = image.resize(scaled, _FILTERS[self.interpolation]).crop((x, y, x + width, y + height))
        colours = torch.from_numpy(np.array(seen)).permute(2, 0, 1).to(torch.float32).contiguous() / 255
        return (colours - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def restore(self, map: npt.ArrayLike, image_size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Lay a map of the network's input back on the pixels of the image.

        The map is linear between its pixels' centres and constant beyond the outermost ones. Where it is finer than
        the image, it is averaged (weights: a triangle of two image pixels' width), so that no pixel is passed over.

        Args:
            map: Map of the network's size, shape (height, width).
            image_size: Width and height of the image, as Pillow's `size`.

        Returns:
            float32 array of the image's (height, width); NaN where a pixel's centre lies outside of the window.

        Raises:
            ValueError: If the map is not of the network's size, or `image_size` not two integers of at least 1.

        Example:
            >>> Preprocessing(size=(1, 2)).restore([[1, 3]], image_size=(4, 1))
            array([[1. , 1.5, 2.5, 3. ]], dtype=float32)
        """
        values = np.asarray(map, dtype=np.float32)
        if values.shape != self.size:
            raise ValueError(f"map must be of shape {self.size}, got {values.shape}")
        scaled, offsets = self._placed(image_size)
        spans, pads, boxes = [], [], []
        for length, k, offset, n in zip(image_size, scaled, offsets, self.size[::-1], strict=True):
            centres = (np.arange(length) + 0.5) * k / length - offset
            inside = np.flatnonzero((centres >= 0) & (centres <= n))
            first, last = (inside[0], inside[-1] + 1) if len(inside) else (0, 0)
            pad = math.ceil(1.5 * max(k / length, 1)) + 1  # what the triangle reaches beyond the map
            spans.append(slice(first, last))
            pads.append((pad, pad))
            boxes.append((first * k / length - offset + pad, last * k / length - offset + pad))
        restored = np.full((image_size[1], image_size[0]), np.nan, np.float32)
        columns, rows = spans
        size = (columns.stop - columns.start, rows.stop - rows.start)
        if min(size) > 0:
            (x0, x1), (y0, y1) = boxes
            around = Image.fromarray(np.pad(values, pads[::-1], mode="edge"))
            restored[rows, columns] = np.asarray(around.resize(size, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))
        return restored

    def to_image(self, boxes: npt.ArrayLike, image_size: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Carry boxes from the network's input to the image.

        Coordinates are those of pixel edges: the box of the first pixel is (0, 0, 1, 1). Nothing is rounded or clipped.

        Args:
            boxes: Left, upper, right, lower edge; shape (..., 4).
            image_size: Width and height of the image, as Pillow's `size`.

        Returns:
            float64 array of the boxes' shape, the inverse of `to_network`.

        Raises:
            ValueError: If the last dimension is not 4, or `image_size` not two integers of at least 1.

        Example:
            >>> Preprocessing(size=(224, 224)).to_image((0, 0, 112, 224), image_size=(640, 480)).tolist()
            [0.0, 0.0, 320.0, 480.0]
        """
        scaled, offsets = self._placed(image_size)
        values = _boxes(boxes) + np.tile(offsets, 2)
        result: npt.NDArray[np.float64] = values * np.tile(image_size, 2) / np.tile(scaled, 2)
        return result

    def to_network(self, boxes: npt.ArrayLike, image_size: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Carry boxes from the image to the network's input, as `to_image` carries them back.

        Args:
            boxes: Left, upper, right, lower edge in the image; shape (..., 4).
            image_size: Width and height of the image, as Pillow's `size`.

        Returns:
            float64 array of the boxes' shape.

        Raises:
            ValueError: If the last dimension is not 4, or `image_size` not two integers of at least 1.

        Example:
            >>> Preprocessing(size=(224, 224)).to_network((0, 0, 320, 480), image_size=(640, 480)).tolist()
            [0.0, 0.0, 112.0, 224.0]
        """
        scaled, offsets = self._placed(image_size)
        values = _boxes(boxes) * np.tile(scaled, 2)
        result: npt.NDArray[np.float64] = values / np.tile(image_size, 2) - np.tile(offsets, 2)
        return result

    def record(self) -> dict[str, Any]:
        """Return the arguments as JSON has them; `Preprocessing(**record)` is equal to the original.

        Example:
            >>> Preprocessing(size=(224, 224)).record()["std"]
            [0.229, 0.224, 0.225]
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _placed(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return width and height of the scaled image, and the window's offset in it (negative: filled up)."""
        width, height = _pair(image_size, "image_size", "(width, height)")
        window = self.size[::-1]
        if self.short_side is None:
            return window, (0, 0)
        short = min(width, height)
        scaled = (self.short_side * width // short, self.short_side * height // short)
        margins = [k - n for k, n in zip(scaled, window, strict=True)]
        x, y = (round(margin / 2) if margin >= 0 else -(-margin // 2) for margin in margins)
        return scaled, (x, y)


def _is_length(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _pair(value: Sequence[int], name: str, order: str) -> tuple[int, int]:
    if not (isinstance(value, Sequence) and len(value) == 2 and all(map(_is_length, value))):
        raise ValueError(f"{name} must be two integers of at least 1, {order}, got {value!r}")
    return int(value[0]), int(value[1])


def _boxes(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(boxes, dtype=np.float64)
    if values.shape[-1:] != (4,):
        raise ValueError(f"boxes must be of shape (..., 4), got {values.shape}")
    return values
