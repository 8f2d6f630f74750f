"""The bench's figures as Markdown, for a file or the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .results_view import (
    KINDS,
    NONE,
    Results,
    Row,
    absence,
    best,
    check,
    controls,
    distant,
    grids,
    is_control,
    left_out,
    methods,
    metrics,
    parts,
    printable,
    rows,
    sections,
    title,
    usual_n,
    written,
)

__all__ = ["markdown"]

_ONE_TABLE = 6  # metrics that need no table for each kind
_LISTED = 20  # problems that the Markdown names
_ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def markdown(results: Results) -> str:
    """Write the results as Markdown tables, methods down and metrics across, with the protocol below.

    A cell is ``value [low, high]``, or the value alone where it has no interval, with n where it is not the column's;
    the best value of a column is bold, as are all that are printed alike. Up to 6 metrics make one table, more a table
    for each kind. Controls stand below, in italics; a method without figures says why.

    Args:
        results: The bench's results, as in ``results.json``.

    Returns:
        The text, with a newline at the end.

    Raises:
        ValueError: If the results lack the protocol or the rows, or hold a row that the protocol does not know.

    Example:
        >>> metric = {"title": "Pointing", "text": "argmax in a box", "unit": "%", "better": "higher", "kind": "order"}
        >>> protocol = {"model": "vgg16", "data": "photos", "images": 20, "seed": 0, "metrics": {"pointing": metric}}
        >>> protocol["methods"] = {"tsgb-fused": {"title": "TSGB (fused)", "source": "tsgb.explain"}}
        >>> row = {"method": "tsgb-fused", "metric": "pointing", "value": 90.0, "low": 75.0, "high": 100.0, "n": 20}
        >>> print(markdown({"protocol": protocol, "rows": [row]}))
        Model `vgg16`, data `photos`, 20 images, seed 0. Value [95 % interval]; ↑ higher is better, ↓ lower; best bold.
        <BLANKLINE>
        | method       |   Pointing ↑ %, n = 20 |
        | :----------- | ---------------------: |
        | TSGB (fused) | **90.0** [75.0, 100.0] |
        <BLANKLINE>
        ## Protocol
        <BLANKLINE>
        - **Pointing**: argmax in a box
        - **TSGB (fused)**: tsgb.explain
        <BLANKLINE>
        Seed 0.
        <BLANKLINE>
    """
    check(results)
    blocks = [_heading(results["protocol"])]
    columns = metrics(results)
    if len(columns) <= _ONE_TABLE:
        blocks.extend(_table(results, part) for part in parts(columns))
    else:
        for kind, names in sections(results):
            heading, note = KINDS.get(kind, (kind, ""))
            blocks.append(f"## {_escaped(heading)}" + (f"\n\n{note}" if note else ""))
            blocks.extend(_table(results, part) for part in parts(names))
    blocks += [*_lists(results), *_protocol(results)]
    return "\n\n".join(blocks) + "\n"


def _heading(protocol: Mapping[str, Any]) -> str:
    images = f"{protocol['images']} image" + ("" if protocol["images"] == 1 else "s")
    images += f" of [{protocol['slice']}]" if "slice" in protocol else ""
    run = f"Model {_code(protocol['model'])}, data {_code(protocol['data'])}, {images}, seed {protocol['seed']}."
    return f"{run} Value [95 % interval]; ↑ higher is better, ↓ lower; best bold."


def _table(results: Results, columns: Sequence[str]) -> str:
    there = rows(results)
    known = results["protocol"]["metrics"]
    usual = {metric: usual_n(results, metric) for metric in columns}
    bold = {metric: best(results, metric) for metric in columns}
    lines: list[tuple[str, Sequence[str] | str]] = []
    for method in [*methods(results), *controls(results, columns)]:
        name = _escaped(title(results, method))
        name = f"*{name}* (control)" if is_control(method) else name
        if (why := absence(results, method)) and not any((method, metric) in there for metric in columns):
            lines.append((name, why))
            continue
        cells = []
        for metric in columns:
            row = there.get((method, metric))
            cells.append(_cell(row, known[metric]["unit"], usual[metric], method in bold[metric]) if row else NONE)
        lines.append((name, cells))
    return _padded(lines, ["method", *(_column(known[metric], usual[metric]) for metric in columns)])


def _column(metric: Mapping[str, Any], n: int | None) -> str:
    signs = [_escaped(metric["title"]), _ARROWS.get(metric["better"], ""), _escaped(metric["unit"])]
    return " ".join(filter(None, signs)) + ("" if n is None else f", n = {n}")


def _cell(row: Row, unit: str, usual: int | None, bold: bool) -> str:
    value, low, high = (written(row[name], unit, beside=row["value"]) for name in ("value", "low", "high"))
    interval = "" if low == high == NONE else f" [{low}, {high}]"
    return (f"**{value}**" if bold else value) + interval + ("" if row["n"] == usual else f" n = {row['n']}")


def _padded(lines: Sequence[tuple[str, Sequence[str] | str]], head: Sequence[str]) -> str:
    """Align the columns; a line with a text in place of cells has it across all columns, cut to what fits."""
    cells = [head, *([name, *rest] for name, rest in lines if not isinstance(rest, str))]
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    widths[0] = max(widths[0], *(len(name) for name, _ in lines))
    across = sum(widths[1:]) + 3 * (len(widths) - 2)
    texts = [_aligned(head, widths), [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]]
    for name, rest in lines:
        if isinstance(rest, str):
            texts.append([name.ljust(widths[0]), _fitted(rest, across)])
        else:
            texts.append(_aligned([name, *rest], widths))
    return "\n".join(f"| {' | '.join(text)} |" for text in texts)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def _fitted(text: str, width: int) -> str:
    """Cut a text to fit, whole escapes only; Markdown fills a line of too few cells up."""
    if len(_escaped(text)) > width:
        while text and len(_escaped(text)) > width - 1:
            text = text[:-1].rstrip()
        text += "…"
    return _escaped(text).ljust(width)


def _lists(results: Results) -> list[str]:
    blocks = []
    failures = [
        f"{_escaped(title(results, failure['method']))}, {failure['count']} times: {_escaped(failure['reason'])}"
        for failure in results.get("failures", ())
    ]
    of_methods, of_metrics = left_out(results)
    gone = [f"{_escaped(title(results, name))}: {_escaped(why)}" for name, why in of_methods.items()]
    gone += [f"metric {_code(name)}: {_escaped(why)}" for name, why in of_metrics.items()]
    problems = [_escaped(problem) for problem in results.get("problems", ())]
    for heading, lines in (("Failures", failures), ("Left out", gone), ("Problems", problems)):
        if lines:
            more = [f"and {len(lines) - _LISTED} more, see results.json"] if len(lines) > _LISTED else []
            blocks.append(f"## {heading}\n\n" + "\n".join(f"- {line}" for line in [*lines[:_LISTED], *more]))
    return blocks


def _protocol(results: Results) -> list[str]:
    """How each figure is taken and each method's map is made, and what else the figures depend on."""
    protocol = results["protocol"]
    terms = [(protocol["metrics"][name]["title"], protocol["metrics"][name]["text"]) for name in metrics(results)]
    terms += [(method["title"], method["source"]) for method in protocol["methods"].values()]
    batch_size, preprocessing = protocol.get("batch_size"), protocol.get("preprocessing")
    rest = [
        batch_size and f"batch size {_escaped(batch_size)}",
        f"seed {_escaped(protocol['seed'])}",
        grids(protocol) and f"grids {_escaped(grids(protocol))}",
        distant(protocol) and f"left out {distant(protocol)}",
        preprocessing and f"preprocessing {_code(json.dumps(preprocessing, ensure_ascii=False))}",
        *(
            f"{_escaped(key.removesuffix('_sha256'))} sha256 {_code(str(digest)[:12])}"
            for key, digest in protocol.items()
            if key.endswith("_sha256") and digest
        ),
    ]
    line = "; ".join(filter(None, rest))
    bullets = "\n".join(f"- **{_escaped(name)}**: {_escaped(text)}" for name, text in terms)
    return ["## Protocol", *([bullets] if bullets else []), f"{line[0].upper()}{line[1:]}."]


def _escaped(text: object) -> str:
    """Text that Markdown shows as it is; an underscore within a word, or brackets that begin no link, need nothing."""
    return re.sub(r"([\\`*<>|&~]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(printable(text).split()))


def _code(text: object) -> str:
    """Text as code, in a fence that it does not hold itself."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"
