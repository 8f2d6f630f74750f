"""Tables of figures as HTML: each with its interval, in numbers and as a bar on the column's axis."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results_view import (
    KINDS,
    NONE,
    REFERENCE,
    Results,
    Row,
    absence,
    best,
    controls,
    is_control,
    methods,
    numbered,
    printable,
    rows,
    sections,
    title,
    usual_n,
    written,
)

__all__ = ["Axis", "differences", "escaped", "fit", "values"]

_BETTER = {"higher": "higher is better", "lower": "lower is better", "neither": "a check, no ranking"}
_MULTIPLES = 50  # a cost so many times the smallest gets a logarithmic axis


def escaped(value: object) -> str:
    """Make whatever comes from the data fit for an element's text or an attribute.

    Example:
        >>> print(escaped('<img src="a"> & \\x1b'))
        &lt;img src=&quot;a&quot;&gt; &amp; \\x1b
    """
    return html.escape(printable(value))


@dataclass(frozen=True)
class Axis:
    """The axis on which all intervals of a column lie.

    Attributes:
        start: The value at the left end.
        stop: The value at the right end, above `start`.
        logarithmic: Whether equal steps are equal ratios; then both ends are above 0.
    """

    start: float
    stop: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Find a value's place between the ends, in percent of the width, with room for a dot at either end.

        Example:
            >>> Axis(0, 100).place(50), Axis(1, 100, logarithmic=True).place(100)
            (50.0, 97.0)
        """
        start, stop, at = (math.log(x) if self.logarithmic else x for x in (self.start, self.stop, value))
        return round(3 + 94 * (at - start) / (stop - start), 2)


def fit(ends: Sequence[float], around: float | None = None, logarithmic: bool = False) -> Axis:
    """Find the shortest axis with round ends that holds all values.

    Args:
        ends: At least one finite number; above 0 for a logarithmic axis.
        around: A value to stand in the middle; None for no such value.
        logarithmic: Whether the ends are to be powers of 10.

    Example:
        >>> fit([52.1, 93.0])
        Axis(start=50.0, stop=100.0, logarithmic=False)
        >>> fit([-3.0, 1.0], around=0.0)
        Axis(start=-4.0, stop=4.0, logarithmic=False)
    """
    low, high = min(ends), max(ends)
    if logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return Axis(10.0**first, 10.0 ** max(last, first + 1), True)
    if around is not None:
        reach = max(high - around, around - low)
        low, high = around - reach, around + reach
    if math.isclose(low, high, rel_tol=1e-6, abs_tol=1e-9):
        margin = abs(low) if abs(low) > 1e-9 else 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def values(results: Results, metrics: Sequence[str], caption: str) -> str:
    """Write one table of values: methods down, metrics across, controls in a group of their own below.

    Args:
        results: The bench's results, as in ``results.json``.
        metrics: The columns.
        caption: What stands above the table.

    Returns:
        A ``div`` that scrolls by itself.

    Example:
        >>> metric = {"title": "Pointing", "unit": "%", "better": "higher", "kind": "order"}
        >>> protocol = {"methods": {"tsgb-fused": {"title": "TSGB (fused)"}}, "metrics": {"pointing": metric}}
        >>> row = {"method": "tsgb-fused", "metric": "pointing", "value": 90.0, "low": 75.0, "high": 100.0, "n": 20}
        >>> '<strong>90.0</strong>' in values({"protocol": protocol, "rows": [row]}, ["pointing"], "Order")
        True
    """
    there, known = rows(results), results["protocol"]["metrics"]
    axes = {metric: _axis(there, metric, known[metric]["kind"] == "cost") for metric in metrics}
    usual = {metric: usual_n(results, metric) for metric in metrics}
    bold = {metric: best(results, metric) for metric in metrics}

    def line(method: str) -> str:
        if (why := absence(results, method)) and not any((method, metric) in there for metric in metrics):
            return _line(results, method, f'<td class="why" colspan="{len(metrics)}"><div>{escaped(why)}</div></td>')
        cells = []
        for metric in metrics:
            row, mark = there.get((method, metric)), there.get((REFERENCE, metric))
            text = _figure(row, known[metric]["unit"], usual[metric], method in bold[metric])
            cells.append(_cell(row, text, axes[metric], mark["value"] if mark else None))
        return _line(results, method, "".join(cells))

    bodies = ["".join(map(line, methods(results)))]
    if powers := controls(results, metrics):
        heading = (
            f'<tr><th class="group" colspan="{len(metrics) + 1}" scope="rowgroup">Controls: maps to a power</th></tr>'
        )
        bodies.append(heading + "".join(map(line, powers)))
    heads = [_head(known[metric], f"n = {NONE if usual[metric] is None else usual[metric]}") for metric in metrics]
    return _framed(caption, heads, [axes[metric] for metric in metrics], bodies)


def differences(results: Results) -> str:
    """Write the paired differences to TSGB (fused), a table for each kind of metrics; nothing where there are none.

    Example:
        >>> differences({"protocol": {"metrics": {}}, "rows": []})
        ''
    """
    there = rows(results, "differences")
    if not there:
        return ""
    clear = sum(_is_clear(row) for row in there.values())
    blocks = [
        "<p>Each figure is the method's value minus that of TSGB (fused) over the same images, with its 95 % interval; "
        "the upright line is zero. An interval that excludes zero is bold, has a filled dot, and says whether the "
        f"method is <em>better</em> or <em>worse</em> than TSGB (fused). Of {len(there)} intervals {clear} exclude "
        "zero. None is corrected for their number: if no method differed from TSGB (fused), "
        f"about {len(there) / 20:.0f} would still exclude zero.</p>"
    ]
    for kind, names in sections(results):
        for part, number in numbered([name for name in names if any(metric == name for _, metric in there)]):
            caption = f"{KINDS.get(kind, (kind,))[0]}{number}: method minus TSGB (fused) [95 % interval]"
            blocks.append(_difference_table(results, part, caption))
    return "\n".join(blocks)


def _difference_table(results: Results, metrics: Sequence[str], caption: str) -> str:
    there, known = rows(results, "differences"), results["protocol"]["metrics"]
    axes = {metric: _axis(there, metric, around=0.0) for metric in metrics}
    usual = {metric: usual_n(results, metric, "differences") for metric in metrics}
    lines = []
    for method in [*methods(results), *controls(results, metrics)]:
        found = {metric: there.get((method, metric)) for metric in metrics}
        if any(found.values()):
            cells = (_difference(row, known[metric], usual[metric], axes[metric]) for metric, row in found.items())
            lines.append(_line(results, method, "".join(cells)))
    heads = [_head(known[metric], f"n = {usual[metric]}") for metric in metrics]
    return _framed(caption, heads, list(axes.values()), ["".join(lines)])


def _is_clear(row: Row) -> bool:
    """Whether both ends of the interval lie on one side of zero."""
    ends = [row["low"], row["high"]]
    return all(written(end, "") != NONE for end in ends) and (ends[0] > 0 or ends[1] < 0)


def _difference(row: Row | None, metric: Mapping[str, Any], usual: int | None, axis: Axis | None) -> str:
    if row is None or not _is_clear(row):
        return _cell(row, _figure(row, metric["unit"], usual, False), axis, 0.0, "open")
    word = "differs"
    if metric["better"] in ("higher", "lower"):
        word = "better" if (row["low"] > 0) == (metric["better"] == "higher") else "worse"
    figure = _figure(row, metric["unit"], usual, True)
    return _cell(row, f'<span class="aside">{word}</span>{figure}', axis, 0.0)


def _axis(
    there: Mapping[tuple[str, str], Row], metric: str, multiples: bool = False, around: float | None = None
) -> Axis | None:
    """The axis on which all intervals of a column lie; None for a column without figures."""
    column = [row for (_, name), row in there.items() if name == metric]
    ends = [row[end] for row in column for end in ("value", "low", "high") if written(row[end], "") != NONE]
    if not ends:
        return None
    return fit(ends, around, logarithmic=multiples and min(ends) > 0 and max(ends) > _MULTIPLES * min(ends))


def _figure(row: Row | None, unit: str, usual: int | None, bold: bool) -> str:
    if row is None:
        return NONE
    value, low, high = (written(row[end], unit, row["value"]).replace("-", "−") for end in ("value", "low", "high"))
    n = "" if row["n"] == usual else f'<span class="aside">n = {escaped(row["n"])}</span>'
    value = f"<strong>{value}</strong>" if bold else value
    interval = "" if low == high == NONE else f' <span class="interval">[{low}, {high}]</span>'
    return f"{n}<span>{value}{interval}</span>"


def _cell(row: Row | None, text: str, axis: Axis | None, mark: float | None, dot: str = "dot") -> str:
    """A figure with its bar below, and an upright line at the value that the column is compared with."""
    if row is None or axis is None:
        return f'<td class="none">{text}</td>'
    x = axis.place(row["value"])
    low, high = (axis.place(row[end]) if written(row[end], "") != NONE else x for end in ("low", "high"))
    at = None if mark is None else axis.place(mark)
    upright = "" if at is None else f'<line class="mark" x1="{at}%" x2="{at}%" y1="0" y2="12"/>'
    interval = f'<line x1="{low}%" x2="{high}%" y1="6" y2="6"/><circle class="{dot}" cx="{x}%" cy="6" r="3"/>'
    bar = f'<svg aria-hidden="true" width="100%" height="12">{upright}{interval}</svg>'
    return f'<td data-value="{row["value"]:.9g}"><div>{text}</div>{bar}</td>'


def _line(results: Results, method: str, cells: str) -> str:
    kind, label = "reference" if method == REFERENCE else "", escaped(title(results, method))
    if is_control(method):
        name, power, exponent = label.partition(" ^ ")
        raised = f"<sup>{exponent}</sup>" if power else ""
        kind, label = "control", f"{name}{raised} <small>control</small>"
    return f'<tr class="{kind}"><th scope="row">{label}</th>{cells}</tr>\n'


def _head(metric: Mapping[str, Any], below: str) -> str:
    unit = f", {escaped(metric['unit'])}" if metric["unit"] else ""
    arrow = {"higher": " ↑", "lower": " ↓"}.get(metric["better"], "")
    how = escaped(_BETTER.get(metric["better"], metric["better"]))
    name = f'<span title="{how}">{escaped(metric["title"])}{unit}{arrow}</span>'
    return f'<th scope="col" data-better="{escaped(metric["better"])}">{name}<small>{escaped(below)}</small></th>'


def _framed(caption: str, heads: Iterable[str], axes: Iterable[Axis | None], bodies: Iterable[str]) -> str:
    """A table in a box that scrolls by itself, with the ends of each column's axis below the heads."""
    ends = "".join(f"<td>{_ends(axis)}</td>" for axis in axes)
    groups = "".join(f"<tbody>\n{body}</tbody>\n" for body in bodies)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}">\n<table class="figures">\n'
        f'<caption>{escaped(caption)}</caption>\n<thead>\n<tr><th scope="col">Method</th>{"".join(heads)}</tr>\n'
        f'<tr class="axis" aria-hidden="true"><td></td>{ends}</tr>\n</thead>\n{groups}</table>\n</div>'
    )


def _ends(axis: Axis | None) -> str:
    if axis is None:
        return ""
    start, stop = (f"{end:.6g}".replace("-", "−") for end in (axis.start, axis.stop))
    between = "<span>log</span>" if axis.logarithmic else ""
    return f'<span class="ends"><span>{start}</span>{between}<span>{stop}</span></span>'
