"""Write the results of a bench as JSON, as Markdown, and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .. import render
from . import gallery, page, rows, table
from .protocol import FIGURES, METRICS, figures
from .records import Record
from .work import Job

__all__ = ["summary", "write"]

#: Why a metric may have no values although not every method failed.
WHY_EMPTY = {
    "mask_ap": "no image has a mask of a class that the network knows",
    "box_ap": "no image has a box of a class that the network knows",
    "pointing": "no image has a mask or box of a class that the network knows",
    "energy": "no image has a mask or box of a class that the network knows",
    "box_accuracy": "no image has a box of a class that the network knows",
    "max_box_accuracy": "no image has a box of a class that the network knows",
    "grid": "too few images of distinct single classes of which the network is sure",
    "grid_ap": "too few images of distinct single classes of which the network is sure",
}
METRIC_OF = {FIGURES[figure].values: metric for metric, names in METRICS.items() for figure in names}


def write(job: Job, protocol: dict[str, Any], found: Sequence[Record], problems: Sequence[str]) -> dict[str, Any]:
    """Compute the results from the records and write ``results.json``, ``results.md`` and ``index.html``.

    Args:
        job: what ran. ``protocol``: what the results depend on.
        found: the records of all ranks. ``problems``: of the dataset, one line each.

    Returns:
        The results.

    Raises:
        OSError: a file cannot be written.
    """
    gathered, names = rows.gather(found), figures(job.metrics)
    notes = sorted((r for r in found if r["method"] == ""), key=lambda r: (r["index"], r["unit"]))
    failed = rows.failures(found, job.methods)
    evaluated = {METRIC_OF[name] for _, name in gathered if name in METRIC_OF}
    tried = [r for r in found if r["method"]]
    why = {} if tried and all(r["errors"] for r in tried) else WHY_EMPTY  # else the failures say why
    empty = {metric: reason for metric, reason in why.items() if metric in job.metrics and metric not in evaluated}
    results = {
        "protocol": {
            **protocol,
            "cases": sum(note.get("cases", 0) for note in notes),
            "distant": sum(note.get("distant", 0) for note in notes),
        },
        "rows": rows.rows(gathered, job.methods, names, job.seed),
        "differences": rows.differences(gathered, job.methods, names, job.seed),
        "failures": failed,
        "problems": [*problems, *(problem for note in notes for problem in note["problems"])],
        "left_out": {**dict(job.left_out), **empty},
    }
    render.save_text(json.dumps(results, indent=1, allow_nan=False) + "\n", job.out / "results.json")
    render.save_text(table.markdown(results), job.out / "results.md")
    render.save_text(page.html(results, gallery.rows(job.out, job.methods, found)), job.out / "index.html")
    return results


def summary(problems: Sequence[str]) -> list[str]:
    """Summarise problems ("image: what is wrong"), one line for each kind: the first image and the number of others.

    Example:
        >>> summary(["a.png: no annotation", "b.png: corrupt", "c.png: no annotation"])
        ['a.png: no annotation (and 1 more image)', 'b.png: corrupt']
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(": ")[2] or problem, []).append(problem)
    lines = []
    for same in kinds.values():
        more = len(same) - 1
        lines.append(same[0] + (f" (and {more} more image{'s' if more > 1 else ''})" if more else ""))
    return lines
