"""The bench's page, read by an HTML parser: well formed, closed to the network, escaped, and true to the figures."""

import base64
import copy
import hashlib
import html
import io
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import helpers
from tsgb.bench import bars, page

VOID = {"meta", "img", "br", "line", "circle"}


class Tree(HTMLParser):
    """Every element with its attributes and the text below it; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        element = {"tag": tag, **dict(attributes), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def results():
    return helpers.results()


@pytest.fixture(scope="module")
def text(results):
    return page.html(results, helpers.gallery(images=3))


@pytest.fixture(scope="module")
def tree(text):
    return Tree(text)


def part(text, name):
    return text[text.index(f'<section id="{name}">') :].partition("</section>")[0]


def grid(text):
    """Rows of a table's texts."""
    return [
        [
            " ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row)
        ]
        for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    ]


def small(value=1.0, low=0.0, high=2.0, **metric):
    known = {"title": "Metric", "text": "how", "unit": "", "better": "higher", "kind": "order"} | metric
    methods = {"tsgb-fused": {"title": "TSGB", "source": "?"}, "b": {"title": "B", "source": "?"}}
    row = {"method": "b", "metric": "x", "value": value, "low": low, "high": high, "n": 2}
    return {
        "protocol": {"model": "m", "data": "d", "images": 2, "seed": 0, "methods": methods, "metrics": {"x": known}},
        "rows": [row],
        "differences": [dict(row)],
    }


def test_the_document_is_closed_and_well_formed(text, tree):
    assert text.startswith('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    style, script = tree.all("style"), tree.all("script")
    assert (len(style), len(script)) == (1, 1)
    policy = next(e["content"] for e in tree.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for name, (element,) in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(element["text"].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
        assert "</" not in element["text"]
        assert "\r" not in element["text"]
    assert {name: rules[name] for name in ("default-src", "img-src", "base-uri", "form-action")} == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip


def test_nothing_is_fetched_and_nothing_runs_but_the_script(text, tree):
    for element in tree.elements:
        assert not any(name.startswith("on") or name in ("style", "srcset", "action") for name in element)
        assert re.match("data:image/jpeg;base64,", element.get("src", "data:image/jpeg;base64,"))
        assert element.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)
    assert not {e["tag"] for e in tree.elements} & {"link", "iframe", "object", "embed", "base", "form", "template"}


def test_links_lead_somewhere(tree):
    there = [element["id"] for element in tree.elements if "id" in element]
    assert len(set(there)) == len(there)
    assert {element["href"][1:] for element in tree.all("a")} == set(there)
    assert there == [
        "reading", "order", "boxes", "perturbation", "share", "sanity", "cost", "differences", "failures", "gallery",
        "protocol",
    ]  # fmt: skip


def test_tables_are_named_and_their_heads_scoped(tree):
    tables, boxes = tree.all("table"), tree.all("div", class_="scroll")
    assert len(tables) == len(boxes) == len(tree.all("caption"))
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)
    assert all(head["scope"] in ("col", "row", "rowgroup") for head in tree.all("th"))
    assert all(image["alt"] and image["loading"] == "lazy" for image in tree.all("img"))
    assert {(image["width"], image["height"]) for image in tree.all("img")} == {("224", "224")}
    assert all(drawing["aria-hidden"] == "true" for drawing in tree.all("svg"))


def test_every_figure_stands_in_its_cell(results, text):
    metrics = results["protocol"]["metrics"]
    shown = 0
    for kind in ("order", "boxes", "perturbation", "share", "sanity", "cost"):
        for table in part(text, kind).split("<table")[1:]:
            lines = grid(table)
            titles = [re.split(r", %| ↑| ↓| n =", head)[0] for head in lines[0][1:]]
            names = [next(name for name, metric in metrics.items() if metric["title"] == t) for t in titles]
            by_method = {line[0]: line[1:] for line in lines}
            for row in results["rows"]:
                if row["metric"] in names:
                    base, _, power = row["method"].partition("^")
                    label = helpers.METHODS[base] + (f" {power} control" if power else "")
                    cell = by_method[label][names.index(row["metric"])]
                    shown += 1
                    if row["value"] is None:
                        assert cell == "–"
                        continue
                    if row["high"] is None:
                        assert re.fullmatch(r"[\d.]+", cell)
                        continue
                    found = re.search(r"([\d.]+) \[([\d.–]+), ([\d.–]+)\]", cell).groups()
                    for number, end in zip(found, (row["value"], row["low"], row["high"]), strict=True):
                        if end is None or math.isnan(end):
                            assert number == "–"
                        else:
                            assert float(number) == pytest.approx(end, rel=0.006, abs=0.05)
                    assert cell.startswith("n =") == (row["method"] == "rise")
    assert shown == len(results["rows"])


def test_the_best_are_bold_and_controls_are_apart(results, text):
    share = part(text, "share")
    values, controls = share.split("Controls: maps to a power")
    assert "control</small>" not in values
    assert [line[0] for line in grid(controls) if "control" in line[0]] == [
        "Grad-CAM 2 control", "Grad-CAM 3 control", "TSGB 0.5 control", "TSGB 2 control",
    ]  # fmt: skip
    rows = [row for row in results["rows"] if row["metric"] == "energy" and "^" not in row["method"]]
    most = max(row["value"] for row in rows)
    assert f"<strong>{most:.1f}</strong>" in values
    assert share.count("<strong>") == 2
    assert "<strong>" not in part(text, "sanity")


def test_a_control_with_a_title_of_its_own_keeps_it():
    results = small()
    results["rows"].append({**results["rows"][0], "method": "b^2"})
    results["protocol"]["methods"]["b^2"] = {"title": "B squared", "source": "?"}
    assert [line[0] for line in grid(bars.values(results, ["x"], "Order"))][-1] == "B squared control"


def test_methods_without_figures_say_why(text):
    for kind in ("order", "cost"):
        lines = {line[0]: line[1] for line in grid(part(text, kind)) if len(line) > 1}
        assert lines["DeepLIFT"].startswith("failed: RuntimeError: a module was used more than once")
        assert lines["LRP"] == "left out: needs zennit: pip install 'tsgb[zennit]'"
    failures = part(text, "failures")
    assert ["RISE", "out of memory", "13", "a_long_name_of_a_picture.jpg"] in grid(failures)
    assert "<li>images/&lt;img src=x onerror=alert(1)&gt;.jpg: not a picture</li>" in failures


@pytest.mark.parametrize(
    ("better", "low", "high", "word"),
    [
        ("higher", 0.1, 0.3, "better"), ("higher", -0.3, -0.1, "worse"), ("lower", 0.1, 0.3, "worse"),
        ("lower", -0.3, -0.1, "better"), ("neither", 0.1, 0.3, "differs"), ("higher", -0.1, 0.3, None),
        ("higher", 0.0, 0.3, None), ("higher", -0.3, 0.0, None), ("higher", None, 0.3, None),
        ("higher", math.nan, math.nan, None),
    ],
)  # fmt: skip
def test_differences_that_leave_zero_out_are_marked(better, low, high, word):
    text = bars.differences(small(0.2 if (high or 0) > 0 else -0.2, low, high, better=better))
    cell = next(line for line in grid(text) if line[0] == "B")[1]
    assert re.findall("better|worse|differs", cell) == ([word] if word else [])
    assert ("<strong>" in text) == (word is not None)
    assert ('class="open"' in text) == (word is None)
    assert f"Of 1 intervals {int(word is not None)} exclude zero" in text


def test_differences_are_drawn_around_zero():
    text = bars.differences(small(3.0, 1.0, 4.5))
    assert [end for line in grid(text) for end in line if "−" in end] == ["−6 6"]  # round, in steps of 2
    assert '<line class="mark" x1="50.0%" x2="50.0%"' in text
    # 3 is 9 of 12 from the left: 3 + 94 * 9 / 12 = 73.5; 1 and 4.5 are 7 and 10.5 of 12.
    assert '<line x1="57.83%" x2="85.25%" y1="6" y2="6"/><circle class="dot" cx="73.5%"' in text


def test_differences_have_their_own_number_of_cases():
    results = small(3.0, 1.0, 4.5)
    results["differences"] = [{**results["rows"][0], "n": 1}, {**results["rows"][0], "method": "c", "n": 1}]
    lines = grid(bars.differences(results))
    assert lines[0] == ["Method", "Metric ↑ n = 1"]
    assert [line for line in lines if line[0] == "B"] == [["B", "better 3.00 [1.00, 4.50]"]]


def test_costs_far_apart_have_a_logarithmic_axis():
    results = small(200.0, 150.0, 300.0, kind="cost", better="lower")
    results["rows"].append({**results["rows"][0], "method": "tsgb-fused", "value": 2.0, "low": 1.5, "high": 3.0})
    assert "1 log 1000" in [end for line in grid(bars.values(results, ["x"], "Cost")) for end in line]
    results["rows"][1] |= {"value": 150.0, "low": 140.0, "high": 160.0}
    assert "100 300" in [end for line in grid(bars.values(results, ["x"], "Cost")) for end in line]
    results["rows"][1] |= {"value": 2.0, "low": 1.5, "high": 3.0}
    results["protocol"]["metrics"]["x"]["kind"] = "order"
    assert "0 300" in [end for line in grid(bars.values(results, ["x"], "Order")) for end in line]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.booleans())
def test_an_axis_holds_all_and_is_no_longer_than_it_must_be(ends, centred):
    axis = bars.fit(ends, around=0.0 if centred else None)
    assert all(3 - 1e-2 <= axis.place(end) <= 97 + 1e-2 for end in ends)
    assert axis.place(axis.start) == 3
    assert axis.place(axis.stop) == 97
    reach = 2 * max(map(abs, ends)) if centred else max(ends) - min(ends)
    if reach > 1e-3:
        assert axis.stop - axis.start <= 2.01 * reach
    if centred:
        assert axis.start == -axis.stop


def test_an_axis_of_one_value_has_a_length():
    assert bars.fit([0.0, 5e-324]) == bars.Axis(-1.0, 1.0)
    assert bars.fit([40.0]) == bars.Axis(0.0, 80.0)
    assert bars.fit([1.0], logarithmic=True) == bars.Axis(1.0, 10.0, True)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_a_logarithmic_axis_ends_at_powers_of_ten(ends):
    axis = bars.fit(ends, logarithmic=True)
    assert all(3 - 1e-2 <= axis.place(end) <= 97 + 1e-2 for end in ends)
    assert math.log10(axis.start).is_integer()
    assert axis.start > min(ends) / 10.01
    assert axis.stop <= max(max(ends), 10 * axis.start) * 10.01


HOSTILE = "<img src=x onerror=alert(1)>\"'</style></script></details>&amp;\x1b\u202e\udc80\n|"


def everywhere(text):
    """Results and gallery with a text wherever the data may bring one."""
    name = f"-{text.replace('^', '')}"
    results = small() | {"problems": [text], "left_out": {name: text}}
    results["failures"] = [{"method": f"-{name}", "reason": text, "count": 1, "images": [text]}]
    results["protocol"] |= {
        "model": text,
        "data": text,
        "weights": text,
        "weights_sha256": text,
        f"-{text}": {text: [text]},
    }
    results["protocol"]["grids"] = {text: text}
    results["protocol"]["methods"]["b"] = {"title": text, "source": text}
    results["protocol"]["metrics"]["x"] |= dict.fromkeys(("title", "text", "unit", "better", "kind"), text)
    results["rows"].append({**results["rows"][0], "method": "tsgb-fused", "n": text})
    cell = {"method": "b", "overlay": helpers.jpeg(), "note": text}
    image = {"image": text, "target": text, "score": None, "picture": helpers.jpeg(), "cells": [cell]}
    return results, [image]


def test_hostile_text_stays_text():
    text = page.html(*everywhere(HOSTILE))
    text.encode()  # lone surrogates could not be saved
    tree, plain = Tree(text), Tree(page.html(*everywhere("plain")))
    assert [e["tag"] for e in tree.elements] == [e["tag"] for e in plain.elements]
    assert [sorted(e) for e in tree.elements] == [sorted(e) for e in plain.elements]
    assert "<img src=x onerror=alert(1)>" in tree.all("title")[0]["text"]
    assert not re.search("[\x1b\u202e\udc80]", text)


@settings(max_examples=25)
@given(st.text(alphabet=st.characters(), min_size=1))
def test_any_text_leaves_the_elements_as_they_are(text):
    found = [e["tag"] for e in Tree(page.html(*everywhere(text))).elements]
    plain = [e["tag"] for e in Tree(page.html(*everywhere("plain"))).elements]
    assert found == plain


def test_the_head_tells_grids_and_what_was_left_out(text):
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd></div>", text))
    assert facts["Grids"] == "2 x 2: 12, 3 x 3: 4, confidence at least 0.9"
    assert html.unescape(facts["Left out"]).startswith("3 instances, none of their classes among the network's 20")
    assert facts["Metrics"] == "16"
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd></div>", page.html(small())))
    assert facts["Grids"] == "–"
    assert "Left out" not in facts


def test_a_metric_left_out_has_no_column_and_a_reason(text):
    lines = grid(part(text, "failures"))
    assert ["LRP", "method", "needs zennit: pip install 'tsgb[zennit]'"] in lines
    assert ["sensitivity", "metric", "no second class"] in lines
    assert "Class sensitivity" not in part(text, "sanity")
    assert "sanity" not in {e.get("id") for e in Tree(page.html(small() | {"left_out": {"x": "?"}})).elements}
    alone = small(kind="sanity") | {"rows": [], "differences": [], "left_out": {"x": "?"}}
    assert "sanity" not in {e.get("id") for e in Tree(page.html(alone)).elements}


def test_intervals_of_costs_are_over_rounds(text):
    assert "for time and\nmemory it is over rounds" in part(text, "reading")
    assert "over its rounds" in part(text, "cost")
    assert not re.search(r"number n of cases|interval, over images", text)


def test_the_protocol_is_there_in_full(results, text):
    lines = grid(part(text, "protocol"))
    assert ["preprocessing.mean", "[0.485, 0.456, 0.406]"] in lines
    assert ["weights_sha256", "7ebf99e0" * 8] in lines
    assert ["versions.torch", "2.13.0"] in lines
    for name, method in results["protocol"]["methods"].items():
        assert [name, method["title"], method["source"]] in lines
    for name, metric in results["protocol"]["metrics"].items():
        assert [name, metric["title"], metric["text"], metric["unit"] or "–", metric["better"], metric["kind"]] in lines


def test_the_gallery_keeps_its_order_and_names_what_it_shows(tree, text):
    alternatives = [image["alt"] for image in tree.all("img")]
    assert len(alternatives) == 3 * 18
    assert alternatives[0] == "Image: 200 bull mastiff in <img src=x onerror=alert(1)>.jpg"
    assert alternatives[1] == "Map of TSGB for 200 bull mastiff in <img src=x onerror=alert(1)>.jpg"
    assert [name for name in alternatives if name.startswith("Image")][1:] == [
        f"Image: {200 + k} bull mastiff in ILSVRC2012_val_{k:08}.jpg" for k in (1, 2)
    ]
    first = base64.b64decode(tree.all("img")[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert first == helpers.jpeg(0)
    assert "score 0.170" in part(text, "gallery")


def test_a_method_missing_for_an_image_leaves_its_column():
    images = helpers.gallery(images=2, methods=("tsgb", "gradcam"))
    del images[0]["cells"][0]
    images[1]["score"] = None
    lines = grid(part(page.html(helpers.results(), images), "gallery"))
    assert lines[0] == ["Image", "Grad-CAM", "TSGB"]
    assert lines[1][2] == "–"
    assert lines[2][0].endswith("score –")


def test_no_gallery_and_no_differences_no_sections():
    text = page.html(small() | {"differences": []})
    assert "gallery" not in {e.get("id") for e in Tree(text).elements}
    assert "differences" not in {e.get("id") for e in Tree(text).elements}
    assert "<p>None.</p>" in part(text, "failures")


def test_images_must_be_jpeg():
    images = copy.deepcopy(helpers.gallery(images=1, methods=("tsgb-fused",)))
    images[0]["cells"][0]["overlay"] = b"<svg onload=alert(1)>"
    with pytest.raises(ValueError, match=r"a JPEG file's bytes were expected, got b'<svg onl' ... \(Map of TSGB"):
        page.html(small(), images)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    images[0]["picture"] = file.getvalue()
    with pytest.raises(ValueError, match=r"got b'.x89PNG"):
        page.html(small(), images)


def test_incomplete_results_are_refused():
    with pytest.raises(ValueError, match="must have 'protocol' and 'rows'"):
        page.html({"protocol": {}})
