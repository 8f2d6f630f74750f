"""Maps as images: colours, overlays, contact sheets, and files that are whole or not there."""

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

# Colours at equal steps from nothing to the full scale (bwr: from -scale over nothing to +scale), linear in between.
COLORMAPS = {
    "jet": ("00007f", "0000ff", "007fff", "00ffff", "7fff7f", "ffff00", "ff7f00", "ff0000", "7f0000"),
    "viridis": ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"),
    "bwr": ("0000ff", "ffffff", "ff0000"),
}

_GREYED, _DIMMED = 0.4, 0.85  # colour and brightness that an overlay leaves to the image
_TILE_MIN, _TILE_MAX, _COLUMNS, _GAP, _FONT_SIZE = 256, 512, 4, 12, 16  # of a contact sheet, in pixels


def full_scale(map: npt.ArrayLike, colormap: str = "jet") -> float:
    """Return the value that gets the full colour: the 99th percentile of a map's positive values.

    Not the largest value, as one pixel would then darken all others. For "bwr" it is that of the absolute values. To
    show several maps on one scale, take the largest of theirs.

    Args:
        map: Map of any shape; NaN and infinite values are left out.
        colormap: "jet", "viridis" or "bwr".

    Returns:
        A positive number, or 0.0 for a map without evidence.

    Raises:
        ValueError: If there is no such colormap.

    Example:
        >>> full_scale(np.arange(-100.0, 101.0))
        99.01
    """
    values = np.abs(map) if _signed(colormap) else np.asarray(map)
    evidence = values[(values > 0) & np.isfinite(values)]
    return float(np.percentile(evidence, 99)) if evidence.size else 0.0


def smooth(map: npt.ArrayLike, sigma: float | None = None) -> npt.NDArray[np.float32]:
    """Blur a map with a Gaussian for display; beyond the edges there is nothing.

    From sigma = 12 on the map is averaged over blocks of sigma / 6 pixels first and enlarged at the end, which makes
    large photographs as quick as small ones and the result right to a few percent of its largest value.

    Args:
        map: Map (H, W); NaN and infinite values count as 0.
        sigma: Standard deviation in pixels, 0 or more; by default 0.6 % of the longer side.

    Returns:
        float32 map (H, W), exactly 0 beyond the reach of 3 sigma.

    Raises:
        ValueError: If the map is not two-dimensional or sigma negative.

    Example:
        >>> smooth([[0, 0, 0, 1, 0, 0, 0]], sigma=0.5).round(2)
        array([[0.  , 0.  , 0.08, 0.62, 0.08, 0.  , 0.  ]], dtype=float32)
    """
    values = np.nan_to_num(_map(map).astype(np.float32), posinf=0, neginf=0)
    sigma = 0.006 * max(values.shape) if sigma is None else sigma
    if not sigma >= 0:
        raise ValueError(f"sigma must be 0 or more, got {sigma}")
    block = max(1, int(sigma / 6))
    if block == 1:
        return _convolved(values, sigma)
    height, width = values.shape
    padded = np.pad(values, ((block, block - height % block), (block, block - width % block)))
    # Averaging and enlarging blur too, but add less than a hundredth to the Gaussian's variance.
    small = Image.fromarray(_convolved(np.asarray(Image.fromarray(padded).reduce(block)), sigma / block))
    inner = (1, 1, 1 + width / block, 1 + height / block)
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR, inner))


def colours(map: npt.ArrayLike, colormap: str = "jet", scale: float | None = None) -> npt.NDArray[np.uint8]:
    """Colour a map: its positive part divided by `scale`, at most 1, through the colormap.

    For "bwr" the signed map, from blue at -scale over white at 0 to red at +scale. NaN counts as 0.

    Args:
        map: Map (H, W).
        colormap: "jet", "viridis" or "bwr".
        scale: Value that gets the full colour; by default `full_scale` of the map.

    Returns:
        uint8 array (H, W, 3), red, green, blue.

    Raises:
        ValueError: If the map is not two-dimensional, the colormap unknown, or the scale not a positive number.

    Example:
        >>> colours([[-5.0, 0.0, 1.0]], "bwr", scale=1).tolist()
        [[[0, 0, 255], [255, 255, 255], [255, 0, 0]]]
    """
    return _coloured(_strength(_map(map), colormap, scale), colormap)


def overlay(
    image: Image.Image,
    map: npt.ArrayLike,
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
    scale: float | None = None,
    sigma: float | None = None,
) -> Image.Image:
    """Lay a map's colours over an image: the image itself, paler and darker, shows where the map has nothing.

    The positive part of the map (for "bwr" all of it) is blurred by `smooth`, as single pixels would be lost on a
    photograph; then opacity = alpha * sqrt(|value| / scale).

    Args:
        image: Image of mode RGB.
        map: Map (H, W) of the image's size; NaN, as outside of a crop, is nothing.
        colormap: "jet", "viridis" or "bwr".
        alpha: Opacity of the full colour, 0 to 1.
        scale: Value of the blurred map that gets the full colour; by default `full_scale` of it.
        sigma: Blur in pixels of the image; by default 0.6 % of the longer side. 0 shows the map's own pixels.

    Returns:
        Image of mode RGB and the same size.

    Raises:
        ValueError: If the image's mode is not RGB, the map not of its size, or another argument out of range.

    Example:
        >>> overlay(Image.new("RGB", (4, 3), "grey"), np.zeros((3, 4))).getpixel((0, 0))
        (108, 108, 108)
    """
    values = _map(map)
    if image.mode != "RGB":
        raise ValueError(f"image must be of mode RGB, got {image.mode}")
    if values.shape != (image.height, image.width):
        raise ValueError(f"map must be of the image's shape {(image.height, image.width)}, got {values.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    blurred = smooth(values if _signed(colormap) else np.maximum(values, 0), sigma)
    strength = _strength(np.where(np.isfinite(values), blurred, 0), colormap, scale)
    opacity = Image.fromarray(np.rint(255 * alpha * np.sqrt(np.abs(strength))).astype(np.uint8))
    below = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(_GREYED)).enhance(_DIMMED)
    return Image.composite(Image.fromarray(_coloured(strength, colormap)), below, opacity)


def sheet(image: Image.Image, columns: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put an image and its overlays side by side, four in a row, with a caption below each.

    Args:
        image: Image of mode RGB; shown enlarged by a whole number up to 256 pixels, or reduced to 512.
        columns: Caption and overlay for each target. Captions may have several lines; too long ones are cut short.

    Returns:
        Image of mode RGB, on white.

    Raises:
        ValueError: If an overlay is not of the image's size.

    Example:
        >>> cat = Image.new("RGB", (32, 32), "tan")
        >>> sheet(cat, [("tabby", cat)]).size
        (548, 306)
    """
    for caption, overlay in columns:
        if overlay.size != image.size:
            raise ValueError(f"overlay {caption!r} must be of the image's size {image.size}, got {overlay.size}")
    cells = [("image", image), *columns]
    captions = [[" ".join(line.split()) for line in caption.split("\n")] for caption, _ in cells]
    font, tile = ImageFont.load_default(_FONT_SIZE), _tile(image.size)
    filter = Image.Resampling.NEAREST if tile[0] > image.width else Image.Resampling.LANCZOS
    width, line_height = max(tile[0], _TILE_MIN), round(1.25 * _FONT_SIZE)
    height = tile[1] + _GAP // 2 + line_height * max(map(len, captions))
    rows = -(-len(cells) // _COLUMNS)
    size = (_GAP + min(len(cells), _COLUMNS) * (width + _GAP), _GAP + rows * (height + _GAP))
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    for index, ((_, shown), lines) in enumerate(zip(cells, captions, strict=True)):
        left, top = _GAP + index % _COLUMNS * (width + _GAP), _GAP + index // _COLUMNS * (height + _GAP)
        result.paste(shown.resize(tile, filter), (left + (width - tile[0]) // 2, top))
        for number, line in enumerate(lines):
            place = (left + width / 2, top + tile[1] + _GAP // 2 + number * line_height)
            draw.text(place, _shortened(line, font, width), "black", font, anchor="ma")
    return result


def save(image: Image.Image, path: str | Path) -> None:
    """Write an image in the format of the path's extension: whole, or not at all.

    Missing folders are made. A file that is there already stays as it was if anything fails.

    Raises:
        ValueError: If the extension is not one of a format that Pillow writes.
        OSError: If the file cannot be written; the message says which and why.

    Example:
        >>> save(Image.new("RGB", (2, 2)), "map.xyz")
        Traceback (most recent call last):
            ...
        ValueError: cannot write map.xyz: '.xyz' is not the extension of an image format
    """
    suffix = Path(path).suffix
    name = Image.registered_extensions().get(suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"cannot write {path}: {suffix!r} is not the extension of an image format")
    _write(path, lambda file: image.save(file, name))


def save_map(map: npt.ArrayLike, path: str | Path) -> None:
    """Write a map as a NumPy file of float32, as `save` does and with its OSError."""
    values = np.asarray(map, dtype=np.float32)
    _write(path, lambda file: np.save(file, values, allow_pickle=False))


def save_text(text: str, path: str | Path) -> None:
    """Write a text in UTF-8, what that cannot hold as an escape, as `save` does and with its OSError."""
    data = text.encode(errors="backslashreplace")
    _write(path, lambda file: file.write(data))


def _write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    path = Path(path)
    beside = path.parent / f".{uuid.uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "xb") as file:  # and not tempfile, whose files nobody else may read
                write(file)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"cannot write {path}: {path.parent} is not a folder") from error
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error


def _map(map: npt.ArrayLike) -> npt.NDArray[Any]:
    values = np.asarray(map)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"map must be of shape (H, W), got {values.shape}")
    return values


def _signed(colormap: str) -> bool:
    if colormap not in COLORMAPS:
        raise ValueError(f"colormap must be one of {', '.join(COLORMAPS)}, got {colormap!r}")
    return colormap == "bwr"


def _strength(values: npt.NDArray[Any], colormap: str, scale: float | None) -> npt.NDArray[Any]:
    if scale is None:
        scale = full_scale(values, colormap) or 1.0  # of nothing, nothing is shown
    elif not 0 < scale < np.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")
    return np.nan_to_num(np.clip(values / scale, -1 if _signed(colormap) else 0, 1))


def _coloured(strength: npt.NDArray[Any], colormap: str) -> npt.NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(colour)) for colour in COLORMAPS[colormap]])
    steps = np.linspace(0, len(anchors) - 1, 255)  # an odd number, for bwr to have its white
    table = np.stack([np.interp(steps, np.arange(len(anchors)), channel) for channel in anchors.T], -1)
    level = (strength + 1) / 2 if _signed(colormap) else strength
    return np.asarray(np.rint(table).astype(np.uint8)[np.rint(254 * level).astype(np.intp)])


def _convolved(values: npt.NDArray[np.float32], sigma: float) -> npt.NDArray[np.float32]:
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    for _ in range(2):  # down the columns, then, transposed, along the rows
        padded = np.pad(values, ((reach, reach), (0, 0)))
        total = np.zeros_like(values)
        for start, weight in enumerate((weights / weights.sum()).astype(np.float32)):
            total += weight * padded[start : start + len(values)]
        values = np.ascontiguousarray(total.T)
    return values


def _tile(size: tuple[int, int]) -> tuple[int, int]:
    longer = max(size)
    factor = _TILE_MAX / longer if longer > _TILE_MAX else max(1, _TILE_MIN // longer)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _shortened(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    kept = line[:width]  # no letter is narrower than a pixel
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1].rstrip()
    return kept + "…"
