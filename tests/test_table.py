"""The Markdown of the bench, read back cell by cell; and what its accounts agree on, against literal twins."""

import copy
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
from tsgb.bench import results_view
from tsgb.bench.table import markdown

# Two methods, one metric, worked by hand: 2 of 3 hits are 66.7 %, and 66.66 is printed alike, so both are bold.
BY_HAND = """\
Model `vgg16`, data `photos`, 3 images, seed 7. Value [95 % interval]; ↑ higher is better, ↓ lower; best bold.

| method   |       Pointing ↑ %, n = 3 |
| :------- | ------------------------: |
| TSGB     |     **66.7** [33.3, 90.0] |
| Grad-CAM |     **66.7** [33.3, 90.0] |
| RISE     |             -0.1 [-2.0, –] |
| LRP      | left out: no zennit |
"""


def small(values, unit="%", better="higher", kind="order"):
    """One metric, with a method a, b, c ... for each value."""
    names = [chr(ord("a") + k) for k in range(len(values))]
    metric = {"title": "Metric", "text": "how", "unit": unit, "better": better, "kind": kind}
    known = {name: {"title": name.upper(), "source": "?"} for name in names}
    return {
        "protocol": {"model": "m", "data": "d", "images": 2, "seed": 0, "methods": known, "metrics": {"x": metric}},
        "rows": [
            {"method": name, "metric": "x", "value": value, "low": value, "high": value, "n": 2}
            for name, value in zip(names, values, strict=True)
        ],
    }


def cells(text):
    """The cells of every table line, escaped pipes and all."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_an_example_by_hand():
    results = small([200 / 3, 66.66, -0.1])
    results["protocol"] |= {"model": "vgg16", "data": "photos", "images": 3, "seed": 7}
    results["protocol"]["metrics"]["x"]["title"] = "Pointing"
    for row, title in zip(results["rows"], ("TSGB", "Grad-CAM", "RISE"), strict=True):
        results["protocol"]["methods"][row["method"]]["title"] = title
        row |= {"low": 100 / 3, "high": 90.0, "n": 3}
    results["rows"][2] |= {"low": -2.04, "high": None}
    results["left_out"] = {"LRP": "no zennit"}
    got = markdown(results)
    head = got[: got.index("\n\n## Left out")]
    assert [line.split() for line in head.splitlines()][:3] == [line.split() for line in BY_HAND.splitlines()][:3]
    assert cells(head)[2:] == cells(BY_HAND)[2:]
    lines = [line for line in head.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert all(line.endswith("] |") for line in lines[2:5])  # values to the right
    assert got.endswith(
        "## Left out\n\n- LRP: no zennit\n\n## Protocol\n\n- **Pointing**: how\n- **TSGB**: ?\n- **Grad-CAM**: ?\n"
        "- **RISE**: ?\n\nSeed 7.\n"
    )


def test_every_figure_stands_in_its_cell():
    results = helpers.results()
    lines = cells(markdown(results))
    where, head = {}, []
    for line in lines:
        head = line if line[0] == "method" else head
        where |= {
            (line[0], head[k].split(" ↑")[0].split(" ↓")[0].split(", n =")[0]): line[k] for k in range(1, len(line))
        }
    titles = {name: metric["title"] for name, metric in results["protocol"]["metrics"].items()}
    shown = 0
    for row in results["rows"]:
        base, _, power = row["method"].partition("^")
        name = helpers.METHODS[base] + (f" ^ {power}" if power else "")
        cell = where[f"*{name}* (control)" if power else name, titles[row["metric"]]]
        if row["value"] is None:
            assert cell == "–"
            continue
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell.replace("**", ""))]
        ends = [end for end in (row["value"], row["low"], row["high"]) if end is not None and not math.isnan(end)]
        assert numbers[: len(ends)] == pytest.approx(ends, rel=0.006, abs=0.05)
        assert ("n =" in cell) == (row["method"] == "rise")
        shown += 1
    assert shown == 279


def test_lines_of_a_table_are_of_one_width():
    tables = re.split(r"\n\n", markdown(helpers.results()))
    tables = [table.splitlines() for table in tables if table.startswith("|")]
    assert len(tables) == 7  # seven metrics of order in two tables, and five other kinds
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert re.fullmatch(r"\| :-+ (\| -+: )+\|", table[1])


def test_six_metrics_make_one_table():
    results = helpers.results()
    names = list(results["protocol"]["metrics"])

    def cut(count):
        part = copy.deepcopy(results)
        kept = [name for name in names if name != "sensitivity"][-count:]
        part["protocol"]["metrics"] = {name: results["protocol"]["metrics"][name] for name in kept}
        part["rows"] = [row for row in part["rows"] if row["metric"] in part["protocol"]["metrics"]]
        part["differences"] = []
        return markdown(part)

    assert cut(6).count("| method") == 1
    assert cut(7).count("| method") == 4
    assert "## Cost" in cut(7)


def test_methods_that_failed_or_were_left_out_say_so():
    text = markdown(helpers.results())
    assert text.count("| DeepLIFT                        | failed: ") == 7
    assert "pip install 'tsgb[zennit]'" in text
    assert "- DeepLIFT, 101 times: RuntimeError: a module was used more than once in the forward pass, which" in text
    assert "- RISE, 13 times: out of memory" in text


def test_what_the_figures_depend_on_stands_below():
    results = helpers.results()
    head, _, text = markdown(results).partition("\n\n## Protocol\n\n")
    bullets, _, line = text.partition("\n\n")
    metrics = [metric for name, metric in results["protocol"]["metrics"].items() if name != "sensitivity"]
    assert bullets.splitlines() == [
        *(f"- **{metric['title']}**: {metric['text']}" for metric in metrics),
        *(f"- **{method['title']}**: {method['source']}" for method in results["protocol"]["methods"].values()),
    ]
    assert line == (
        "Batch size 8; seed 0; grids 2 x 2: 12, 3 x 3: 4, confidence at least 0.9; left out 3 instances, none of their "
        "classes among the network's 20 most probable; preprocessing "
        '`{"size": [224, 224], "mean": [0.485, 0.456, 0.406], "resize": "squash"}`; weights sha256 `7ebf99e07ebf`; '
        "data sha256 `0123456789ab`.\n"
    )
    assert "## Problems" in head


def test_a_metric_left_out_has_no_column_and_a_reason():
    text = markdown(helpers.results())
    assert "- LRP: needs zennit: pip install 'tsgb[zennit]'\n- metric `sensitivity`: no second class\n" in text
    assert "Class sensitivity" not in text
    assert "| sensitivity" not in text


def left(asked, figures, there, left_out):
    """The columns of results with these figures, of which some are there."""
    results = small([1.0])
    results["protocol"] |= {"asked": asked, "metrics": dict.fromkeys(figures, results["protocol"]["metrics"]["x"])}
    results["rows"] = [{**results["rows"][0], "metric": name} for name in there]
    results["left_out"] = dict.fromkeys(left_out, "why")
    return results_view.metrics(results)


def test_a_metric_takes_its_own_figures_along():
    figures = ["grid_ap", "grid_ap_3x3", "grid", "grid_3x3"]
    assert left(["grid_ap", "grid"], figures, [], ["grid"]) == ["grid_ap", "grid_ap_3x3"]
    assert left(["grid_ap", "grid"], figures, [], ["grid_ap"]) == ["grid", "grid_3x3"]
    assert left(["grid_ap", "grid"], figures, ["grid"], ["grid", "grid_ap"]) == ["grid"]
    assert left(["grid_ap", "grid"], figures, [], ["grid_3x3"]) == ["grid_ap", "grid_ap_3x3", "grid"]
    assert left(["grid_ap", "grid"], figures, [], []) == figures


def test_all_metrics_may_be_left_out():
    results = small([]) | {"left_out": {"x": "no masks"}}
    assert "|" not in markdown(results)
    assert markdown(results).endswith("\n\n## Left out\n\n- metric `x`: no masks\n\n## Protocol\n\nSeed 0.\n")
    assert results_view.methods(results) == []


def test_a_method_may_have_a_metrics_name():
    results = small([1.0]) | {"left_out": {"energy": "no masks"}}
    results["protocol"]["methods"]["energy"] = {"title": "energy", "source": "precomputed maps"}
    assert results_view.absence(results, "energy") is None
    assert results_view.left_out(results) == ({}, {"energy": "no masks"})


def test_a_single_measurement_stands_alone():
    results = small([2.5, 3.0, 4.0], unit="", better="lower", kind="cost")
    results["rows"][0] |= {"low": None, "high": None, "n": 1}
    results["rows"][1] |= {"low": 2.0, "high": None, "n": 1}
    results["rows"][2] |= {"low": None, "high": 5.0, "n": 1}
    assert [line[1] for line in cells(markdown(results))][2:] == ["**2.50**", "3.00 [2.00, –]", "4.00 [–, 5.00]"]


def test_controls_stand_below_and_are_never_best():
    results = small([10.0, 20.0], kind="share")
    results["rows"].insert(0, {"method": "a^2", "metric": "x", "value": 99.0, "low": 98.0, "high": 100.0, "n": 2})
    names = [line[0] for line in cells(markdown(results))]
    assert names[2:] == ["A", "B", "*A ^ 2* (control)"]
    assert results_view.best(results, "x") == {"b"}


def test_long_lists_of_problems_are_cut():
    results = small([1.0]) | {"problems": [f"image{k}.jpg: broken" for k in range(50)]}
    text = markdown(results)
    assert text.count("broken") == 20
    assert "- and 30 more, see results.json\n" in text


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.sampled_from(["higher", "lower", "neither"]))
def test_best_is_its_twin(values, better):
    results = small(values, better=better)
    expected = set()
    for row in results["rows"]:
        rivals = [float(f"{other['value']:.1f}") for other in results["rows"]]
        mine = float(f"{row['value']:.1f}")
        beaten = any(rival > mine if better == "higher" else rival < mine for rival in rivals)
        if better != "neither" and not beaten:
            expected.add(row["method"])
    assert results_view.best(results, "x") == expected
    assert markdown(results).partition("## Protocol")[0].count("**") == 2 * len(expected)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_figures_that_are_not_there(nothing):
    results = small([1.0, 2.0])
    results["rows"][1]["value"] = nothing
    assert cells(markdown(results))[-1] == ["B", "–"]
    assert results_view.best(results, "x") == {"a"}
    assert results_view.rows(results).keys() == {("a", "x")}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (100.0, "%", "100.0"), (0.05, "%", "0.1"), (-0.04, "%", "0.0"), (-3.0, "%", "-3.0"), (0.5, "", "0.500"),
        (1.0, "", "1.000"), (1.5, "", "1.50"), (9.996, "", "10.0"), (99.96, "x", "100"), (0.5, "x", "0.50"),
        (5431.4, "", "5431"), (None, "%", "–"), (math.nan, "", "–"),
    ],
)  # fmt: skip
def test_numbers_as_written(value, unit, text):
    assert results_view.written(value, unit) == text


@given(st.text(), st.integers(1, 30))
def test_reasons_are_cut_to_the_table(reason, width):
    results = small([1.0]) | {"left_out": {"lrp": reason}}
    results["protocol"]["metrics"]["x"]["title"] = "x" * width
    lines = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"left out:.*", cells(lines[-1])[0][1])


@given(st.integers(0, 40))
def test_parts_are_as_few_and_as_even_as_can_be(count):
    parts = results_view.parts(range(count))
    assert [k for part in parts for k in part] == list(range(count))
    assert len(parts) == -(-count // 6)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(len(part) <= 6 for part in parts)


def test_a_columns_n_is_that_of_most_figures():
    results = small([1.0, 2.0, 3.0])
    results["rows"][1]["n"] = 1
    assert results_view.usual_n(results, "x") == 2
    assert results_view.usual_n(results, "x", "differences") is None
    assert [line[1] for line in cells(markdown(results))[2:]] == [
        "1.0 [1.0, 1.0]", "2.0 [2.0, 2.0] n = 1", "**3.0** [3.0, 3.0]",
    ]  # fmt: skip


HOSTILE = "a|b\n| **x** <img src=x onerror=alert(1)> `code` [link](http://x) \x1b[31m \u202e \udc80 _y_"


def test_text_from_the_data_stays_text():
    results = small([1.0]) | {"problems": [HOSTILE], "left_out": {"lrp": HOSTILE}}
    results |= {"failures": [{"method": "b", "reason": HOSTILE, "count": 1, "images": [HOSTILE]}]}
    results["protocol"] |= {"model": f"``{HOSTILE}", "data": HOSTILE}
    results["protocol"]["methods"]["a"]["title"] = HOSTILE
    results["protocol"]["metrics"]["x"]["title"] = HOSTILE
    text = markdown(results)
    text.encode()  # lone surrogates could not be saved
    assert all(sign.isprintable() or sign == "\n" for sign in text)
    heading, _, rest = text.partition("\n")
    assert heading.startswith("Model ``` ``a|b")
    for line in rest.splitlines():
        for special in ("<", "*", "`", "](", "_y"):
            if "onerror" in line or "link" in line:
                bare = re.sub(r"\*\*1\.0\*\*|^- \*\*|\*\*(?=: )", "", line)
                assert not re.search(r"(?<!\\)" + re.escape(special), bare), special
    assert [len(line) for line in cells(text)] == [2, 2, 2, 2, 2]


@given(st.text())
def test_printable_text_can_be_shown_and_saved(text):
    line = results_view.printable(text)
    assert line.isprintable()
    line.encode()
    assert results_view.printable(line) == line
    expected = ""
    for sign in text:
        code = ord(sign)
        short = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
        escape = short or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
        expected += sign if sign.isprintable() else escape
    assert line == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb\r\tc", r"a\nb\r\tc"), ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("a\udc80", r"a\udc80"), ("\x00\x7f\x9b", r"\x00\x7f\x9b"), ("\u2028\u200f", r"\u2028\u200f"),
        ("ä 漢 🙂", "ä 漢 🙂"), (ValueError("two\nlines"), r"two\nlines"),
    ],
)  # fmt: skip
def test_what_steers_a_terminal_is_written_out(text, line):
    assert results_view.printable(text) == line


def test_grids_and_distant_instances_in_words():
    assert results_view.grids({"grids": {"grid": 48, "grid_3x3": 0}}) == "2 x 2: 48, 3 x 3: 0"
    assert results_view.grids({"grids": {}, "confidence": 0.99}) == results_view.grids({}) == ""
    assert results_view.distant({}) == results_view.distant({"distant": 0}) == ""
    assert results_view.distant({"distant": 1}).startswith("1 instance, none of its classes")


def test_incomplete_results_are_refused():
    with pytest.raises(ValueError, match=r"must have 'protocol' and 'rows', .* got 'rows'"):
        markdown({"rows": []})
    results = small([1.0])
    results["rows"].append({**results["rows"][0], "metric": "y"})
    with pytest.raises(ValueError, match="rows: metric 'y' is none of the protocol's: x"):
        markdown(results)
    results["rows"][-1]["metric"] = "x"
    with pytest.raises(ValueError, match="two rows for method 'a' and metric 'x'"):
        markdown(results)
    results = small([1.0])
    del results["protocol"]["seed"], results["protocol"]["data"]
    with pytest.raises(ValueError, match="lacks 'data', 'seed'"):
        markdown(results)
