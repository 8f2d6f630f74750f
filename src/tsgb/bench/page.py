"""The bench's figures as one HTML file that needs nothing beside it and may fetch nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from PIL import Image, UnidentifiedImageError

from .bars import differences, escaped, values
from .results_view import (
    KINDS,
    NONE,
    Results,
    check,
    distant,
    grids,
    is_control,
    left_out,
    methods,
    metrics,
    numbered,
    rows,
    sections,
    title,
    written,
)

__all__ = ["html"]

_OPEN = 10  # problems that are shown unasked
_NUMBER = ' class="number"'

_READ = """
<p>Each figure stands with its 95 % interval: a bootstrap over images, for grid figures over grids; for time and
memory it is over rounds, and what was measured once has none. The number n counts these images, grids or rounds; it
stands beside a figure where it is not the column's. Dot and line show both on one axis for the column; the thin upright
line marks TSGB (fused). The best figure of a column is bold, with all that are printed alike. Compare methods by the
<a href="#differences">paired differences</a>, which are taken over the same images: two intervals that overlap here may
still differ clearly there.</p>
<p><strong>The headline is what depends only on the order of a map's pixels</strong>: average precision, pointing, boxes
at the best threshold, insertion and deletion. No rescaling of a map changes it. <strong>Shares</strong> (energy, grid)
are another matter: they reward any sharpening. Squaring a map lifts them and adds no knowledge, so they stand beside
<em>controls</em>, maps raised to a power; what a control gains too says nothing of a method.</p>
"""


def html(results: Results, gallery: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write the results as a complete HTML document: tables with interval bars, paired differences, protocol, gallery.

    Style, script and images are inside, and a Content-Security-Policy forbids everything else; whatever comes from
    the data is escaped. It reads without scripts, which only sort the tables.

    Args:
        results: The bench's results, as in ``results.json``.
        gallery: The images, worst first: dicts of ``image`` and ``target`` (text), ``score`` (a number or None),
            ``picture`` (a JPEG file's bytes) and ``cells``, a list of dicts of ``method``, ``overlay`` (a JPEG file's
            bytes) and ``note`` (text).

    Returns:
        The document, to be saved as UTF-8.

    Raises:
        ValueError: If the results lack the protocol or the rows, hold a row that the protocol does not know, or a
            image is no JPEG.

    Example:
        >>> metric = {"title": "Pointing", "text": "argmax in a box", "unit": "%", "better": "higher", "kind": "order"}
        >>> protocol = {"model": "vgg16", "data": "<photos>", "images": 20, "seed": 0, "metrics": {"pointing": metric}}
        >>> protocol["methods"] = {"tsgb-fused": {"title": "TSGB (fused)", "source": "tsgb.explain"}}
        >>> row = {"method": "tsgb-fused", "metric": "pointing", "value": 90.0, "low": 75.0, "high": 100.0, "n": 20}
        >>> page = html({"protocol": protocol, "rows": [row]})
        >>> "<title>vgg16 on &lt;photos&gt;: saliency maps on the bench</title>" in page
        True
    """
    check(results)
    protocol = results["protocol"]
    style, script = (_packaged(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    name = f"{escaped(protocol['model'])} on {escaped(protocol['data'])}"
    body = {
        "reading": ("How to read it", _READ),
        **{kind: _kind(results, kind, names) for kind, names in sections(results)},
        "differences": ("Paired differences to TSGB (fused)", differences(results)),
        "failures": ("Failures and problems", _failures(results)),
        "gallery": ("Gallery", _gallery(results, gallery)),
        "protocol": ("Protocol", _protocol(protocol)),
    }
    body = {key: (heading, content) for key, (heading, content) in body.items() if content}
    links = "".join(f'<li><a href="#{escaped(key)}">{heading}</a></li>' for key, (heading, _) in body.items())
    blocks = "\n".join(
        f'<section id="{escaped(key)}">\n<h2>{heading}</h2>\n{content}\n</section>'
        for key, (heading, content) in body.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: saliency maps on the bench</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kicker">Saliency maps on the bench</p>
<h1>{name}</h1>
{_facts(protocol, results)}
</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{blocks}
</main>
<script>{script}</script>
</body>
</html>
"""


def _packaged(name: str) -> str:
    text: str = (resources.files("tsgb") / "bench" / name).read_text("utf-8")
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _facts(protocol: Mapping[str, Any], results: Results) -> str:
    counts = f"{protocol['images']} images" + (f" of [{protocol['slice']}]" if "slice" in protocol else "")
    counts += f", {protocol['cases']} cases" if "cases" in protocol else ""
    done = len({method for method, _ in rows(results) if not is_control(method)})
    facts = {
        "Model": protocol["model"],
        "Weights": f"{protocol.get('weights') or NONE}, sha256 {str(protocol.get('weights_sha256') or NONE)[:12]}",
        "Data": f"{protocol['data']}, {counts}",
        "Grids": grids(protocol) or NONE,
        **({"Left out": distant(protocol)} if distant(protocol) else {}),
        "Methods": f"{done} of {len(methods(results))} with figures",
        "Metrics": len(metrics(results)),
        "Seed": protocol["seed"],
    }
    return (
        f'<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{escaped(v)}</dd></div>" for k, v in facts.items())}</dl>'
    )


def _kind(results: Results, kind: str, names: Sequence[str]) -> tuple[str, str]:
    heading, note = KINDS.get(kind, (kind, ""))
    blocks = [f"<p>{escaped(note)}</p>"] if note else []
    blocks += [values(results, part, f"{heading}{number}: value [95 % interval]") for part, number in numbered(names)]
    known = results["protocol"]["metrics"]
    terms = "".join(
        f"<dt>{escaped(known[name]['title'])}</dt><dd>{escaped(known[name]['text'])}</dd>" for name in names
    )
    return escaped(heading), "\n".join([*blocks, f'<dl class="terms">{terms}</dl>'])


def _failures(results: Results) -> str:
    blocks = []
    if failures := results.get("failures", ()):
        lines = [
            (title(results, failure["method"]), failure["reason"], failure["count"], ", ".join(failure["images"]))
            for failure in failures
        ]
        blocks.append(_plain("Failures", ("Method", "Reason", "Count", "First images"), lines))
    of_methods, of_metrics = left_out(results)
    gone = [(title(results, name), "method", why) for name, why in of_methods.items()]
    gone += [(name, "metric", why) for name, why in of_metrics.items()]
    if gone:
        blocks.append(_plain("Left out", ("Name", "Kind", "Reason"), gone))
    if problems := results.get("problems", ()):
        items = "".join(f"<li>{escaped(problem)}</li>" for problem in problems)
        opened = " open" if len(problems) <= _OPEN else ""
        blocks.append(f"<details{opened}><summary>Problems: {len(problems)}</summary><ul>{items}</ul></details>")
    return "\n".join(blocks) or "<p>None.</p>"


def _protocol(protocol: Mapping[str, Any]) -> str:
    known = [(name, method["title"], method["source"]) for name, method in protocol["methods"].items()]
    figures = [
        (name, metric["title"], metric["text"], metric["unit"] or NONE, metric["better"], metric["kind"])
        for name, metric in protocol["metrics"].items()
    ]
    rest = {key: value for key, value in protocol.items() if key not in ("methods", "metrics")}
    blocks = [
        _plain("Settings", ("Name", "Value"), list(_flat(rest))),
        _plain("Methods", ("Name", "Title", "How it was computed"), known),
        _plain("Metrics", ("Name", "Title", "How it was taken", "Unit", "Better", "Kind"), figures),
    ]
    return f"<details><summary>Protocol in full</summary>\n{chr(10).join(blocks)}\n</details>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names with dots, and values as JSON has them."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(caption: str, heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table of text, numbers to the right."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = ""
    for first, *others in lines:
        cells = "".join(f"<td{_NUMBER if isinstance(cell, int) else ''}>{escaped(cell)}</td>" for cell in others)
        body += f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>\n'
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def _gallery(results: Results, gallery: Sequence[Mapping[str, Any]]) -> str:
    if not gallery:
        return ""
    columns = list(dict.fromkeys(cell["method"] for entry in gallery for cell in entry["cells"]))
    names = {method: title(results, method) for method in columns}
    heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in names.values())
    lines = []
    for entry in gallery:
        cells = {cell["method"]: cell for cell in entry["cells"]}
        score = written(entry["score"], "")
        label = f"<b>{escaped(entry['target'])}</b>{escaped(entry['image'])}<br>score {score}"
        about = f"{entry['target']} in {entry['image']}"
        line = f'<th scope="row">{_shown(entry["picture"], f"Image: {about}", label)}</th>'
        for method, name in names.items():
            cell = cells.get(method)
            label = f"<b>{escaped(name)}</b>{escaped(cell['note'])}" if cell else ""
            shown = _shown(cell["overlay"], f"Map of {name} for {about}", label) if cell else NONE
            line += f"<td>{shown}</td>"
        lines.append(f"<tr>{line}</tr>\n")
    return (
        "<p>Worst first. Each map is laid over the image; methods go across, in the order of the tables.</p>\n"
        '<div class="scroll" role="region" tabindex="0" aria-label="Gallery">\n<table class="gallery">\n'
        "<caption>Images and maps, worst first</caption>\n"
        f'<thead><tr><th scope="col">Image</th>{heads}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>"
    )


def _shown(data: bytes, alternative: str, label: str) -> str:
    """An image with its caption; its size is written so that nothing moves as the images are decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise ValueError(f"gallery: a JPEG file's bytes were expected, got {data[:8]!r} ... ({alternative})") from None
    source = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img loading="lazy" decoding="async" width="{width}" height="{height}" alt="{escaped(alternative)}" '
        f'src="{source}"><figcaption>{label}</figcaption></figure>'
    )
