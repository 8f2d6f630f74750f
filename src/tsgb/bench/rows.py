"""From records to results: a row with its interval for each method and figure, and differences from TSGB (fused)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..metrics import boxes, intervals
from .protocol import CONTROLS, FIGURES, REFERENCE
from .records import Record

__all__ = ["differences", "failures", "gather", "rows"]

SHOWN = 5  # names in a list of failures

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass
class _Values:
    """The values of one method and figure, one a case; a case's unit is its image's index, or its grid's first."""

    units: list[int] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


Gathered = dict[tuple[str, str], _Values]


def gather(records: Iterable[Record]) -> Gathered:
    """Sort values by method and name, in the order of units and classes; a control's power is part of its method.

    Example:
        >>> found = gather([{"unit": "a", "index": 0, "method": "gradcam", "values": [["energy^2", 7, 0.5]]}])
        >>> list(found)
        [('gradcam^2', 'energy')]
    """
    found: Gathered = defaultdict(_Values)
    for record in sorted(records, key=lambda record: (record["index"], record["unit"], record["method"])):
        for name, category, value in record.get("values", ()):
            name, _, power = name.partition("^")
            kept = found[record["method"] + (f"^{power}" if power else ""), name]
            kept.units.append(record["index"])
            kept.categories.append(category)
            kept.values.append(value)
    return dict(found)


def rows(gathered: Gathered, methods: Sequence[str], figures: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Compute every figure of every method, with its 95 % bootstrap interval over images; n counts images or grids.

    Example:
        >>> records = [
        ...     {"unit": str(i), "index": i, "method": "tsgb-fused", "values": [["energy", 1, 0.5]]} for i in range(4)
        ... ]
        >>> rows(gather(records), ["tsgb-fused"], ["energy"], seed=0)
        [{'method': 'tsgb-fused', 'metric': 'energy', 'value': 50.0, 'low': 50.0, 'high': 50.0, 'n': 4}]
    """
    found = []
    for method in _with_controls(methods):
        for figure in figures:
            kept = gathered.get((method, FIGURES[figure].values))
            if kept is not None:
                found.append({"method": method, "metric": figure, **_figure(_cases(kept, figure), figure, seed)})
    return found


def differences(gathered: Gathered, methods: Sequence[str], figures: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Compare every method with TSGB (fused) over the cases that both have: the difference, with its 95 % interval."""
    found = []
    for method in _with_controls(methods):
        for figure in figures:
            mine, theirs = (gathered.get((name, FIGURES[figure].values)) for name in (method, REFERENCE))
            if method == REFERENCE or mine is None or theirs is None or FIGURES[figure].statistic == "median":
                continue
            paired = _paired(_cases(mine, figure), _cases(theirs, figure))
            if len(paired.values):
                found.append({"method": method, "metric": figure, **_figure(paired, figure, seed)})
    return found


def failures(records: Iterable[Record], methods: Sequence[str]) -> list[dict[str, Any]]:
    """List what went wrong: for each method and reason how often, and the first images."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record["index"], record["unit"])):
        for error in record.get("errors", ()):
            found[record["method"], error].append(record["unit"])
    order = {method: place for place, method in enumerate(methods)}
    return [
        {"method": method, "reason": reason, "count": len(units), "images": units[:SHOWN]}
        for (method, reason), units in sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


@dataclass(frozen=True)
class _Cases:
    units: Integers
    categories: Integers
    values: Floats


def _cases(kept: _Values, figure: str) -> _Cases:
    """The values as numbers: for best thresholds the hits at the threshold that other images chose."""
    units, categories = np.array(kept.units, dtype=np.int64), np.array(kept.categories, dtype=np.int64)
    if FIGURES[figure].statistic != "best threshold":
        return _Cases(units, categories, np.array(kept.values, dtype=np.float64))
    hits = np.stack([_hits(value) for value in kept.values])  # (cases, rows, thresholds)
    tune = units % 2 == 0
    if tune.all() or not tune.any():
        return _Cases(units[:0], categories[:0], np.zeros(0))
    best = [boxes.max_box_accuracy(row, torch.from_numpy(tune))[1] for row in torch.from_numpy(hits).unbind(1)]
    chosen = np.stack([hits[:, row, threshold] for row, threshold in enumerate(best)], 1).mean(1)
    return _Cases(units[~tune], categories[~tune], chosen[~tune])


def _hits(text: str) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(-1, -(-boxes.THRESHOLDS // 8))
    return np.unpackbits(packed, axis=1)[:, : boxes.THRESHOLDS].astype(bool)


def _figure(cases: _Cases, figure: str, seed: int) -> dict[str, Any]:
    """Value, interval and number of images of one figure, in its unit."""
    shown = FIGURES[figure]
    if not len(cases.values):
        return {"value": None, "low": None, "high": None, "n": 0}
    if shown.statistic == "median":
        value = float(np.median(cases.values))
        low, high = intervals.median_interval(cases.values, seed) if len(cases.values) > 1 else (None, None)
    elif shown.statistic == "class mean":
        value = intervals.mean_over_classes(cases.values, cases.categories)
        low, high = intervals.class_mean_interval(cases.values, cases.categories, cases.units, seed)
    else:
        value = float(cases.values.mean())
        low, high = intervals.mean_interval(cases.values, cases.units, seed)
    count = len(np.unique(cases.units))
    if count == 1:
        low = high = None  # no interval from one image
    factor = 100 if shown.unit == "%" else 1
    ends = {name: None if end is None else factor * end for name, end in (("low", low), ("high", high))}
    return {"value": factor * value, **ends, "n": count}


def _paired(mine: _Cases, theirs: _Cases) -> _Cases:
    """The differences of cases that both have."""
    other: Mapping[tuple[int, int], float] = dict(
        zip(zip(theirs.units.tolist(), theirs.categories.tolist(), strict=True), theirs.values.tolist(), strict=True)
    )
    shared = [
        (unit, category, value - other[unit, category])
        for unit, category, value in zip(
            mine.units.tolist(), mine.categories.tolist(), mine.values.tolist(), strict=True
        )
        if (unit, category) in other
    ]
    units, categories, values = zip(*shared, strict=True) if shared else ((), (), ())
    return _Cases(np.array(units, dtype=np.int64), np.array(categories, dtype=np.int64), np.array(values, dtype=float))


def _with_controls(methods: Sequence[str]) -> list[str]:
    powers = [f"{method}^{exponent:g}" for method in methods for exponent in CONTROLS.get(method, ())]
    return [*methods, *powers]
