"""The results of a bench, for programs, for a terminal, and for people: JSON, Markdown, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import render
from . import page, rows, table
from .protocol import FIGURES, figures
from .records import Record
from .work import Job, thumbnail

__all__ = ["summary", "write"]

SHOWN = 12  # pictures in the gallery
_WORST_BY = ("mask_ap", "box_ap", "pointing", "energy")


def write(job: Job, protocol: dict[str, Any], found: Sequence[Record], problems: Sequence[str]) -> dict[str, Any]:
    """Compute the results from the records and write ``results.json``, ``results.md`` and ``index.html``.

    Args:
        job: what was done. ``protocol``: what the results depend on.
        found: the records of all ranks. ``problems``: of the dataset, one line each.

    Returns:
        The results.

    Raises:
        OSError: a file cannot be written.
    """
    gathered, asked = rows.gather(found), figures(job.metrics)
    notes = sorted((r for r in found if r["method"] == ""), key=lambda r: (r["index"], r["unit"]))
    results = {
        "protocol": {**protocol, "cases": sum(note.get("cases", 0) for note in notes)},
        "rows": rows.rows(gathered, job.methods, asked, job.seed),
        "differences": rows.differences(gathered, job.methods, asked, job.seed),
        "failures": rows.failures(found, job.methods),
        "problems": [*problems, *(problem for note in notes for problem in note["problems"])],
        "left_out": dict(job.left_out),
    }
    render.save_text(json.dumps(results, indent=1, allow_nan=False) + "\n", job.out / "results.json")
    render.save_text(table.markdown(results), job.out / "results.md")
    render.save_text(page.html(results, _gallery(job, found, notes)), job.out / "index.html")
    return results


def summary(problems: Sequence[str]) -> list[str]:
    """Say problems ("picture: what is wrong") in one line for each kind: how many pictures, and the first.

    Example:
        >>> summary(["a.png: no annotation", "b.png: corrupt", "c.png: no annotation"])
        ['a.png: no annotation (and 1 more picture)', 'b.png: corrupt']
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(": ")[2] or problem, []).append(problem)
    lines = []
    for same in kinds.values():
        more = len(same) - 1
        lines.append(same[0] + (f" (and {more} more picture{'s' if more > 1 else ''})" if more else ""))
    return lines


def _gallery(job: Job, found: Sequence[Record], notes: Sequence[Record]) -> list[dict[str, Any]]:
    """The pictures on which the first method does worst, under all methods."""
    name = next((m for m in _WORST_BY if any(_value(r, m) is not None for r in found)), None)
    by_key = {(record["unit"], record["method"]): record for record in found}
    scored = []
    for note in notes:
        first = by_key.get((note["unit"], job.methods[0]))
        score = None if first is None or name is None else _value(first, name)
        if score is not None and thumbnail(job.out, note["index"], "").exists():
            scored.append((score, note["index"], note))
    return [
        {
            "image": note["unit"],
            "target": note["shown"],
            "score": score,
            "picture": thumbnail(job.out, note["index"], "").read_bytes(),
            "cells": [
                _cell(job.out, note, by_key[note["unit"], method])
                for method in job.methods
                if thumbnail(job.out, note["index"], method).exists()
            ],
        }
        for score, _, note in sorted(scored, key=lambda item: item[:2])[:SHOWN]
    ]


def _cell(out: Path, note: Record, record: Record) -> dict[str, Any]:
    said = [_said(record, name) for name in _WORST_BY if _value(record, name) is not None]
    return {
        "method": record["method"],
        "overlay": thumbnail(out, note["index"], record["method"]).read_bytes(),
        "note": ", ".join([*said, *record["errors"][:1]]),
    }


def _value(record: Record, name: str) -> float | None:
    """The mean of a picture's values of one name."""
    values = [value for kind, _, value in record.get("values", ()) if kind == name]
    return sum(values) / len(values) if values else None


def _said(record: Record, name: str) -> str:
    value = _value(record, name)
    assert value is not None
    if name == "pointing" and value in (0, 1):
        return "hit" if value else "miss"
    return f"{FIGURES[name].title} {100 * value:.0f}"
