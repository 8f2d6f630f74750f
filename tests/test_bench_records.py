"""The journal, and what is computed from it."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tsgb.bench import records, rows
from tsgb.metrics import intervals


def record(index, method, *values, errors=()):
    return {"unit": f"{index}.png", "index": index, "method": method, "values": list(values), "errors": list(errors)}


def test_a_torn_line_is_lost_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, [record(0, "tsgb-fused"), record(1, "tsgb-fused")])
    path.write_bytes(path.read_bytes()[:-5])
    records.truncate_partial_line(path)
    records.append(path, [record(2, "tsgb-fused")])
    assert [r["index"] for r in records.read(path)] == [0, 2]


def test_an_empty_journal_is_whole(tmp_path):
    path = tmp_path / "records.jsonl"
    path.touch()
    records.truncate_partial_line(path)
    assert path.read_bytes() == b""


def test_a_folder_has_one_writer(tmp_path):
    writes = pytest.raises(RuntimeError, match="another bench writes to")
    with records.lock(tmp_path), writes, records.lock(tmp_path):
        pass
    with records.lock(tmp_path):
        pass


def test_writers_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: records.append(path, [record(k, "m", ["energy", 1, 0.5])] * 20), range(40)))
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 800


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.append(tmp_path / "records.jsonl", [record(0, "m", ["energy", 1, float("nan")])])
    assert not (tmp_path / "records.jsonl").exists()


def some():
    rng = np.random.default_rng(0)
    for index in range(20):
        for method in ("tsgb-fused", "gradcam"):
            hits = [["pointing", c, float(rng.random() > 0.4)] for c in range(1 + index % 3)]
            yield record(index, method, *hits, ["energy", 0, float(rng.random())], ["energy^2", 0, 0.25])


def value(found, method, metric):
    return next(row for row in found if (row["method"], row["metric"]) == (method, metric))


def test_rows_are_means_over_cases_and_over_classes():
    found = rows.rows(rows.gather(some()), ["tsgb-fused", "gradcam"], ["pointing", "pointing_class", "energy"], seed=3)
    cases = [
        (r["index"], c, v)
        for r in some()
        for name, c, v in r["values"]
        if r["method"] == "tsgb-fused" and name == "pointing"
    ]
    index, classes, hits = (np.array(column) for column in zip(*cases, strict=True))
    overall = value(found, "tsgb-fused", "pointing")
    assert overall["value"] == pytest.approx(100 * hits.mean(), abs=1e-12)
    assert (overall["low"], overall["high"]) == tuple(100 * x for x in intervals.mean_interval(hits, index, 3))
    assert overall["n"] == 20
    by_class = [hits[classes == c].mean() for c in range(3)]
    assert value(found, "tsgb-fused", "pointing_class")["value"] == pytest.approx(100 * np.mean(by_class), abs=1e-12)
    assert value(found, "gradcam^2", "energy")["value"] == 25
    assert [row["method"] for row in found[-2:]] == ["tsgb-fused^2", "gradcam^2"]


def test_rows_do_not_depend_on_the_order_of_the_records():
    shuffled = list(some())
    np.random.default_rng(1).shuffle(shuffled)
    for compute in (rows.rows, rows.differences):
        assert compute(rows.gather(shuffled), ["tsgb-fused", "gradcam"], ["pointing", "energy"], 0) == compute(
            rows.gather(some()), ["tsgb-fused", "gradcam"], ["pointing", "energy"], 0
        )


def test_differences_are_paired_over_the_cases_that_both_have():
    kept = [
        record(0, "tsgb-fused", ["energy", 1, 0.5], ["energy", 2, 0.9]),
        record(0, "gradcam", ["energy", 1, 0.7]),
        record(1, "gradcam", ["energy", 1, 0.1]),
        record(2, "tsgb-fused", ["energy", 1, 0.3]),
        record(2, "gradcam", ["energy", 1, 0.1]),
    ]
    (found,) = rows.differences(rows.gather(kept), ["tsgb-fused", "gradcam"], ["energy"], 0)
    assert found["method"] == "gradcam"
    assert found["value"] == pytest.approx(100 * (0.2 - 0.2) / 2, abs=1e-12)
    assert found["n"] == 2


def packed(*hits):
    return np.packbits(np.array(hits, dtype=bool), axis=1).tobytes().hex()


def test_the_best_threshold_is_chosen_on_other_images_than_it_is_judged_on():
    first, second = np.zeros(1001, bool), np.zeros(1001, bool)
    first[100], second[900] = True, True
    # Even images choose threshold 100; of the odd ones half has a hit there, and all at 900.
    kept = [record(k, "tsgb-fused", ["max_box_accuracy", 1, packed(first)]) for k in (0, 2)]
    kept += [
        record(1, "tsgb-fused", ["max_box_accuracy", 1, packed(first | second)]),
        record(3, "tsgb-fused", ["max_box_accuracy", 1, packed(second)]),
    ]
    (found,) = rows.rows(rows.gather(kept), ["tsgb-fused"], ["max_box_accuracy"], 0)
    assert (found["value"], found["n"]) == (50, 2)
    (alone,) = rows.rows(rows.gather(kept[:2]), ["tsgb-fused"], ["max_box_accuracy"], 0)
    assert (alone["value"], alone["n"]) == (None, 0)


def test_version_2_is_the_mean_over_three_overlaps_each_at_its_own_threshold():
    lines = np.zeros((3, 1001), bool)
    lines[0, 10], lines[1, 20] = True, True
    kept = [record(k, "tsgb-fused", ["max_box_accuracy_v2", 1, packed(*lines)]) for k in (0, 1)]
    (found,) = rows.rows(rows.gather(kept), ["tsgb-fused"], ["max_box_accuracy_v2"], 0)
    assert found["value"] == pytest.approx(200 / 3)


def test_failures_are_counted_by_reason():
    kept = [record(k, "lrp", errors=["no canonizer"]) for k in range(7)] + [record(8, "tsgb-fused", errors=["NaN"])]
    assert rows.failures(kept, ["tsgb-fused", "lrp"]) == [
        {"method": "tsgb-fused", "reason": "NaN", "count": 1, "images": ["8.png"]},
        {"method": "lrp", "reason": "no canonizer", "count": 7, "images": [f"{k}.png" for k in range(5)]},
    ]
