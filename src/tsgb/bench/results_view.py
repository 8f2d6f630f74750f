"""What the Markdown table and the page share: which results there are, and how they are named and formatted.

The results are the dict that the bench keeps as ``results.json``: ``protocol`` (with ``methods`` and ``metrics`` in the
order in which they are shown), ``rows`` (a figure for a method and a metric), ``differences`` (method minus TSGB
(fused), over the same images), ``failures``, ``problems`` and ``left_out`` (methods and metrics, each with the reason).
A method named ``gradcam^2`` is a *control*: the positive part of another method's map to a power. A power sharpens or
flattens a map and adds no knowledge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from .protocol import FIGURES, GRIDS, METRICS, NEAREST, REFERENCE

__all__ = [
    "KINDS",
    "NONE",
    "REFERENCE",
    "Results",
    "Row",
    "absence",
    "best",
    "check",
    "controls",
    "distant",
    "grids",
    "is_control",
    "left_out",
    "methods",
    "metrics",
    "numbered",
    "parts",
    "printable",
    "rows",
    "sections",
    "title",
    "usual_n",
    "written",
]

Results = Mapping[str, Any]
Row = Mapping[str, Any]
Section = Literal["rows", "differences"]

NONE = "–"  # what stands for a figure that is not there

# The kinds of metrics in the order in which they are shown: what stands above the table, and how to read it.
KINDS = {
    "order": (
        "Order of the pixels",
        "Headline figures: they depend only on the order of a map's pixels, which no sharpening changes.",
    ),
    "boxes": (
        "Boxes",
        "Boxes drawn around the map, against those of the class. A headline figure at the best threshold only.",
    ),
    "perturbation": (
        "Insertion and deletion",
        "Headline figures, always both together: maps of few scattered pixels win deletion and lose insertion.",
    ),
    "share": (
        "Shares of the map",
        "No headline: shares reward any sharpening. What a control gains too is no better knowledge.",
    ),
    "sanity": (
        "Sanity checks",
        "Whether the map follows the network's weights and the class. Randomisation alone ranks no method.",
    ),
    "cost": ("Cost", "Speed and memory on the machine of this run. Intervals are over its rounds, which n counts."),
}


def check(results: Results) -> None:
    """Refuse results that are incomplete, or whose rows and protocol do not agree.

    Raises:
        ValueError: If so, with what is wrong.

    Example:
        >>> check({"rows": []})
        Traceback (most recent call last):
        ValueError: results must have 'protocol' and 'rows', as results.json has them, got 'rows'
    """
    if not {"protocol", "rows"} <= set(results):
        got = ", ".join(map(repr, results)) or "nothing"
        raise ValueError(f"results must have 'protocol' and 'rows', as results.json has them, got {got}")
    missing = {"model", "data", "images", "seed", "methods", "metrics"} - set(results["protocol"])
    if missing:
        raise ValueError(f"the protocol of the results lacks {', '.join(map(repr, sorted(missing)))}")
    known = results["protocol"]["metrics"]
    for section in ("rows", "differences"):
        seen = set()
        for row in results.get(section, ()):
            key = (row["method"], row["metric"])
            if row["metric"] not in known:
                raise ValueError(f"{section}: metric {row['metric']!r} is none of the protocol's: {', '.join(known)}")
            if key in seen:
                raise ValueError(f"{section}: two rows for method {key[0]!r} and metric {key[1]!r}")
            seen.add(key)


def rows(results: Results, section: Section = "rows") -> dict[tuple[str, str], Row]:
    """Find the figures that are there, by method and metric; a value that is None, NaN or infinite is not.

    Example:
        >>> row = {"method": "tsgb-fused", "metric": "energy", "value": None, "low": None, "high": None, "n": 0}
        >>> rows({"rows": [row, {**row, "metric": "pointing", "value": 90.0}]}).keys()
        dict_keys([('tsgb-fused', 'pointing')])
    """
    return {(row["method"], row["metric"]): row for row in results.get(section, ()) if _is_number(row["value"])}


def methods(results: Results) -> list[str]:
    """List the methods in the protocol's order, then those that only failed or were left out; no controls.

    Example:
        >>> known = {"tsgb-fused": {}, "rise": {}}
        >>> methods({"protocol": {"methods": known}, "rows": [], "left_out": {"lrp": "no zennit"}})
        ['tsgb-fused', 'rise', 'lrp']
    """
    return [name for name in _named(results) if not is_control(name)]


def metrics(results: Results) -> list[str]:
    """List the figures that have a column, in the protocol's order: all but those left out, which no method has.

    Example:
        >>> known = {"mask_ap": {}, "grid": {}, "grid_3x3": {}, "energy": {}}
        >>> metrics({"protocol": {"metrics": known}, "rows": [], "left_out": {"mask_ap": "no masks", "grid": "few"}})
        ['energy']
    """
    there = {metric for _, metric in rows(results)}
    gone = {figure for name in left_out(results)[1] for figure in (name, *METRICS.get(name, ()))}
    return [name for name in results["protocol"]["metrics"] if name in there or name not in gone]


def left_out(results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find which methods and which metrics were left out, each with the reason.

    Example:
        >>> left_out({"protocol": {"metrics": {}}, "left_out": {"lrp": "no zennit", "mask_ap": "no masks"}})
        ({'lrp': 'no zennit'}, {'mask_ap': 'no masks'})
    """
    protocol, reasons = results["protocol"], results.get("left_out", {})
    known = {*METRICS, *FIGURES, *protocol.get("metrics", ()), *protocol.get("asked", ())}
    of_metrics = {name: why for name, why in reasons.items() if name in known}
    return {name: why for name, why in reasons.items() if name not in known}, of_metrics


def grids(protocol: Mapping[str, Any]) -> str:
    """Say how many grids there are of each size, and how sure the network is of their images; "" without grids.

    Example:
        >>> grids({"grids": {"grid": 48, "grid_3x3": 21}, "confidence": 0.9})
        '2 x 2: 48, 3 x 3: 21, confidence at least 0.9'
    """
    sides = {f"grid{suffix}": f"{side} x {side}" for suffix, side in GRIDS.items()}
    counts = [f"{sides.get(name, name)}: {count}" for name, count in protocol.get("grids", {}).items()]
    confidence = protocol.get("confidence") if counts else None
    return ", ".join([*counts, *([] if confidence is None else [f"confidence at least {confidence}"])])


def distant(protocol: Mapping[str, Any]) -> str:
    """Say how many instances were left out since the network is far from all of their classes; "" if none.

    Example:
        >>> distant({"distant": 3})
        "3 instances, none of their classes among the network's 20 most probable"
    """
    count = protocol.get("distant", 0)
    whose = "1 instance, none of its" if count == 1 else f"{count} instances, none of their"
    return f"{whose} classes among the network's {NEAREST} most probable" if count else ""


def is_control(method: str) -> bool:
    """Say whether a method is another one's map to a power.

    Example:
        >>> is_control("gradcam^2"), is_control("gradcam")
        (True, False)
    """
    return "^" in method


def controls(results: Results, among: Iterable[str]) -> list[str]:
    """List the controls that have a figure for one of the metrics.

    Example:
        >>> row = {"method": "gradcam^2", "metric": "energy", "value": 76.0}
        >>> controls({"protocol": {"methods": {}}, "rows": [row]}, ["energy"])
        ['gradcam^2']
    """
    there, wanted = rows(results), list(among)
    return [name for name in _named(results) if is_control(name) and any((name, metric) in there for metric in wanted)]


def sections(results: Results) -> list[tuple[str, list[str]]]:
    """Gather the metrics that have a column by kind, in the order of `KINDS` and then of the protocol.

    Example:
        >>> known = {"energy": {"kind": "share"}, "pointing": {"kind": "order"}, "grid": {"kind": "share"}}
        >>> sections({"protocol": {"metrics": known}, "rows": []})
        [('order', ['pointing']), ('share', ['energy', 'grid'])]
    """
    kind_of = {name: results["protocol"]["metrics"][name]["kind"] for name in metrics(results)}
    kinds = dict.fromkeys([*KINDS, *kind_of.values()])
    gathered = [(kind, [name for name in kind_of if kind_of[name] == kind]) for kind in kinds]
    return [(kind, names) for kind, names in gathered if names]


def title(results: Results, method: str) -> str:
    """Name a method as people do; a control after the method whose map it raises to a power.

    Example:
        >>> title({"protocol": {"methods": {"gradcam": {"title": "Grad-CAM"}}}}, "gradcam^0.5")
        'Grad-CAM ^ 0.5'
    """
    known = results["protocol"]["methods"]
    if method in known:
        return str(known[method]["title"])
    name, power, exponent = method.partition("^")
    return f"{title(results, name)} ^ {exponent}" if power else method


def absence(results: Results, method: str) -> str | None:
    """Say on one line why a method has no figures: it failed, or it was left out; None if neither.

    Example:
        >>> absence({"failures": [{"method": "rise", "reason": "out of memory"}]}, "rise")
        'failed: out of memory'
    """
    reasons = [failure["reason"] for failure in results.get("failures", ()) if failure["method"] == method]
    if reasons:
        return printable(f"failed: {'; '.join(dict.fromkeys(map(str, reasons)))}")
    gone = left_out(results)[0]
    return printable(f"left out: {gone[method]}") if method in gone else None


def usual_n(results: Results, metric: str, section: Section = "rows") -> int | None:
    """Find over how many images, grids or rounds most of a metric's figures are; None where there is no figure.

    Example:
        >>> rows = [{"method": name, "metric": "energy", "value": 1.0, "n": n} for name, n in zip("abc", (9, 8, 9))]
        >>> usual_n({"rows": rows}, "energy")
        9
    """
    counts = Counter(row["n"] for (_, name), row in rows(results, section).items() if name == metric)
    return counts.most_common(1)[0][0] if counts else None


def best(results: Results, metric: str) -> set[str]:
    """Find the methods with the best value of a metric: all that are printed alike, no controls.

    Example:
        >>> energy = {"unit": "%", "better": "higher"}
        >>> rows = [{"method": m, "metric": "energy", "value": v} for m, v in (("a", 7.01), ("b", 6), ("c", 6.99))]
        >>> sorted(best({"protocol": {"metrics": {"energy": energy}}, "rows": rows}, "energy"))
        ['a', 'c']
    """
    how = results["protocol"]["metrics"][metric]
    if how["better"] not in ("higher", "lower"):
        return set()
    printed = {
        method: float(written(row["value"], how["unit"]))
        for (method, name), row in rows(results).items()
        if name == metric and not is_control(method)
    }
    most = (max if how["better"] == "higher" else min)(printed.values(), default=None)
    return {method for method, value in printed.items() if value == most}


def written(value: float | None, unit: str, beside: float | None = None) -> str:
    """Write a number with as many decimals as its unit bears: one for %, three within -1..1, else three digits.

    Args:
        value: The number; None, NaN and infinity are written as a dash.
        unit: "%", "" for a number without a unit, or any other.
        beside: The number whose decimals are to be taken, for the ends of its interval; None: the number's own.

    Example:
        >>> written(91.96, "%"), written(0.12345, ""), written(2031.4, "x"), written(None, "%")
        ('92.0', '0.123', '2031', '–')
        >>> written(9.999, "x", beside=12)
        '10.0'
    """
    if value is None or not _is_number(value):
        return NONE
    size = abs(value if beside is None else beside)
    if unit == "%":
        decimals = 1
    elif unit == "" and size <= 1:
        decimals = 3
    else:
        decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def printable(text: object) -> str:
    """Write as visible escapes what would break a line, steer a terminal, turn the reading order or not be saved.

    Example:
        >>> print(printable("two\\nlines, \\x1b[31mred"))
        two\\nlines, \\x1b[31mred
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(text))


def parts(names: Sequence[str], most: int = 6) -> list[Sequence[str]]:
    """Cut the columns into as few tables of much the same width as there must be; more do not fit on a page.

    Example:
        >>> parts("abcdefg")
        ['abc', 'defg']
    """
    count = math.ceil(len(names) / most)
    cuts = [len(names) * k // count for k in range(count + 1)] if names else []
    return [names[first:last] for first, last in pairwise(cuts)]


def numbered(names: Sequence[str]) -> list[tuple[Sequence[str], str]]:
    """Cut the columns into tables as `parts` does, each with what tells its caption from the others'.

    Example:
        >>> numbered("abc"), numbered("abcdefg")
        ([('abc', '')], [('abc', ', 1 of 2'), ('defg', ', 2 of 2')])
    """
    tables = parts(names)
    return [(part, f", {k} of {len(tables)}" if len(tables) > 1 else "") for k, part in enumerate(tables, 1)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _named(results: Results) -> list[str]:
    spoken_of = [*results["rows"], *results.get("failures", ())]
    names = [*results["protocol"]["methods"], *(row["method"] for row in spoken_of)]
    return list(dict.fromkeys([*names, *left_out(results)[0]]))
