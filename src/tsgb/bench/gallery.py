"""Small overlays for the page, of the images on which the first method does worst."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .. import render
from .protocol import FIGURES
from .records import Record

__all__ = ["Gallery", "rows"]

SHOWN = 12  # images on the page
SIDE = 176  # pixels of an overlay's longer side
SCORES = ("mask_ap", "box_ap", "pointing", "energy")  # the first that an image has says how bad it is


class Gallery:
    """The overlays of the worst images that one process has seen; those of others are removed as worse ones come.

    Every process keeps as many as the page shows, so the worst of all are among them.

    Example:
        >>> import tempfile
        >>> gallery = Gallery(Path(tempfile.mkdtemp()))
        >>> for index in range(20):
        ...     gallery.admit(index, {"values": [["energy", 1, index / 20]]})
        >>> [index in gallery for index in (0, 11, 12)]
        [True, True, False]
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._worst: list[tuple[float, int]] = []

    def __contains__(self, index: int) -> bool:
        return any(index == kept for _, kept in self._worst)

    def admit(self, index: int, record: Record) -> None:
        """Take an image in if the first method's record of it is among the worst so far."""
        value = score(record)
        if value is None:
            return
        bisect.insort(self._worst, (value, index))
        for _, better in self._worst[SHOWN:]:
            for file in (self.out / "thumbnails").glob(f"{better:06d}*.jpg"):
                file.unlink(missing_ok=True)
        del self._worst[SHOWN:]

    def draw(self, index: int, method: str, image: Image.Image, map: Tensor | None) -> None:
        """Keep an image, with "" for the method, or a map laid over it; a map that cannot be drawn is left out."""
        if map is not None:
            if not map.isfinite().all() or map.shape != (image.height, image.width):
                return
            image = render.overlay(image, map.cpu().numpy())
        image = image.copy()
        image.thumbnail((SIDE, SIDE))
        render.save(image, _file(self.out, index, method))


def rows(out: Path, methods: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
    """List what the page shows: for each of the worst images the image and its overlays, the worst first."""
    by_key = {(record["unit"], record["method"]): record for record in records}
    return [
        {
            "image": note["unit"],
            "target": note["shown"],
            "score": value,
            "picture": _file(out, note["index"], "").read_bytes(),
            "cells": [
                {
                    "method": method,
                    "overlay": _file(out, note["index"], method).read_bytes(),
                    "note": _said(by_key[note["unit"], method]),
                }
                for method in methods
                if _file(out, note["index"], method).exists()
            ],
        }
        for value, note in _worst(methods[0], records)
        if _file(out, note["index"], "").exists()
    ]


def lacking(out: Path, methods: Sequence[str], records: Sequence[Record]) -> list[tuple[int, list[str]]]:
    """List the worst images of which drawings are not there, each with the methods; "" for the image itself."""
    failed = {(record["unit"], record["method"]) for record in records if record.get("errors")}
    found = []
    for _, note in _worst(methods[0], records):
        missing = [m for m in ("", *methods) if not _file(out, note["index"], m).exists()]
        found.append((note["index"], [method for method in missing if (note["unit"], method) not in failed]))
    return [entry for entry in found if entry[1]]


def _worst(method: str, records: Sequence[Record]) -> list[tuple[float, Record]]:
    """The images that a method does worst on, by one score for all, each with what was noted of it."""
    notes = {record["unit"]: record for record in records if not record["method"]}
    evaluated = [record for record in records if record["method"] == method and record["unit"] in notes]
    name = next((name for name in SCORES if any(_mean(record, name) is not None for record in evaluated)), "")
    scored = [(_mean(record, name), record) for record in evaluated]
    worst = sorted(((value, record["index"], record["unit"]) for value, record in scored if value is not None))[:SHOWN]
    return [(value, notes[unit]) for value, _, unit in worst]


def score(record: Record) -> float | None:
    """How well a method did on an image, 0..1: the mean of its values of the first of `SCORES` that it has."""
    return next((value for name in SCORES if (value := _mean(record, name)) is not None), None)


def _mean(record: Mapping[str, Any], name: str) -> float | None:
    values = [value for kind, _, value in record.get("values", ()) if kind == name]
    return sum(values) / len(values) if values else None


def _said(record: Record) -> str:
    """An image's values in words, and the first thing that went wrong."""
    words = []
    for name in SCORES:
        value = _mean(record, name)
        if name == "pointing" and value in (0, 1):
            words.append("hit" if value else "miss")
        elif value is not None:
            words.append(f"{FIGURES[name].title} {100 * value:.0f}")
    return ", ".join([*words, *record["errors"][:1]])


def _file(out: Path, index: int, method: str) -> Path:
    return out / "thumbnails" / f"{index:06d}{'-' if method else ''}{method}.jpg"
