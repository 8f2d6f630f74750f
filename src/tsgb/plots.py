"""Maps of one and of three dimensions as images: a series drawn over its evidence, and the slices of a volume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from . import render

__all__ = ["montage", "series"]

_ROW, _GAP, _NARROW, _WIDE = 96, 8, 640, 1600  # height of a channel, space between, least and most columns, in pixels
_SLICES, _SIDE, _LABEL = 36, 128, 11  # shown of a volume; least side of a slice, and size of its number, in pixels


def series(
    signal: npt.ArrayLike,
    map: npt.ArrayLike,
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
    scale: float | None = None,
) -> Image.Image:
    """Draw a time series in black over the colours of its map, one row a channel.

    A long series is drawn in 1600 columns: of the samples that share one, the line spans the smallest to the largest,
    and the map shows the strongest.

    Args:
        signal: (C, L), C channels of L samples, each row stretched to the range of its channel.
        map: (L,), signed evidence.
        colormap, alpha, scale: as for `render.overlay`.

    Returns:
        RGB image, 640 to 1600 pixels wide, 96 high for each channel with 8 between.

    Raises:
        ValueError: the signal is not (C, L), the map not (L,), or another argument out of range.

    Example:
        >>> series(np.sin(np.arange(500) / 20)[None], np.linspace(-1, 1, 500)).size
        (1000, 112)
    """
    values, evidence = np.asarray(signal, np.float32), np.asarray(map, np.float32)
    if values.ndim != 2 or evidence.shape != values.shape[1:] or evidence.size == 0:
        raise ValueError(f"signal must be (C, L) and the map (L,), got {values.shape} and {evidence.shape}")
    length = evidence.size
    columns = min(_WIDE, length * math.ceil(_NARROW / length))
    starts = np.arange(columns) * length // columns
    ends = np.maximum(starts + 1, (np.arange(columns) + 1) * length // columns)
    shown = np.array([_strongest(evidence[a:b]) for a, b in zip(starts, ends, strict=True)])
    height = _GAP + len(values) * (_ROW + _GAP)
    below = Image.new("RGB", (columns, height), "white")
    scale = scale or render.full_scale(evidence, colormap) or None
    image = render.overlay(below, np.tile(shown, (height, 1)), colormap=colormap, alpha=alpha, scale=scale, sigma=0)
    draw = ImageDraw.Draw(image)
    for row, channel in enumerate(values):
        low, span = float(channel.min()), float(np.ptp(channel)) or 1.0
        bottom = (row + 1) * (_ROW + _GAP)
        last: float | None = None
        for x, (a, b) in enumerate(zip(starts, ends, strict=True)):
            part = [bottom - _ROW * (float(v) - low) / span for v in (channel[a:b].min(), channel[a:b].max())]
            reach = part if last is None else [*part, last]  # joined to the column before
            draw.line([(x, min(reach)), (x, max(reach))], "black")
            last = part[0]
    return image


def montage(
    volume: npt.ArrayLike,
    map: npt.ArrayLike,
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
    scale: float | None = None,
) -> Image.Image:
    """Lay the map of a volume over its slices, side by side and numbered, all on one scale.

    Of more than 36 slices as many are shown at even steps.

    Args:
        volume: (C, D, H, W), D slices; grey but for C = 3, stretched to its range.
        map: (D, H, W), signed evidence.
        colormap, alpha, scale: as for `render.overlay`.

    Returns:
        RGB image; slices smaller than 128 pixels are enlarged by a whole number.

    Raises:
        ValueError: the volume is not (C, D, H, W), the map not (D, H, W), or another argument out of range.

    Example:
        >>> montage(np.zeros((1, 8, 64, 64)), np.zeros((8, 64, 64))).size
        (416, 416)
    """
    values, evidence = np.asarray(volume, np.float32), np.asarray(map, np.float32)
    if values.ndim != 4 or evidence.shape != values.shape[1:] or evidence.size == 0:
        raise ValueError(f"volume must be (C, D, H, W) and the map (D, H, W), got {values.shape} and {evidence.shape}")
    span = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    channels = span if len(span) == 3 else np.repeat(span.mean(0, keepdims=True), 3, 0)
    images = np.rint(255 * channels).astype(np.uint8).transpose(1, 2, 3, 0)
    depth, height, width = evidence.shape
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, _SLICES)).round().astype(int))
    across = math.ceil(math.sqrt(len(chosen)))
    factor = math.ceil(_SIDE / min(height, width))
    cell = width * factor + _GAP, height * factor + _GAP
    result = Image.new("RGB", (_GAP + across * cell[0], _GAP + -(-len(chosen) // across) * cell[1]), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(_LABEL)
    scale = scale or render.full_scale(evidence, colormap) or None
    for place, number in enumerate(chosen):
        image = Image.fromarray(np.ascontiguousarray(images[number]))
        shown = render.overlay(image, evidence[number], colormap=colormap, alpha=alpha, scale=scale, sigma=0)
        left, top = _GAP + place % across * cell[0], _GAP + place // across * cell[1]
        result.paste(shown.resize((cell[0] - _GAP, cell[1] - _GAP), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 3, top + 2), str(number), "white", font, stroke_width=1, stroke_fill="black")
    return result


def _strongest(values: npt.NDArray[np.float32]) -> Any:
    return values[np.abs(values).argmax()]
