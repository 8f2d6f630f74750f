"""The bench from end to end: what it writes, after a kill, with several processes, and with bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tsgb
from tsgb import bench, methods
from tsgb.bench import records
from tsgb.data import open_dataset

SOURCE = str(Path(tsgb.__file__).parents[1])
CHEAP = ["tsgb-fused", "gradcam", "random"]


def job(out, metrics=("pointing", "energy", "mask_ap"), **options):
    return bench.job(
        partial(tsgb.load, "bundled"), metrics=metrics, out=out, **{"methods": CHEAP, "batch_size": 3, **options}
    )


def command(out, *options):
    given = [
        "--methods",
        ",".join(CHEAP),
        "--metrics",
        "pointing,energy,grid,grid_ap,box_accuracy",
        "--batch-size",
        "3",
    ]
    return ["-m", "tsgb", "bench", *given, "--limit", "24", "--out", str(out), *options]


def started(arguments, **options):
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        **options,
    )


def finished(arguments):
    process = started(arguments)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def row(results, method, metric):
    return next(row for row in results["rows"] if (row["method"], row["metric"]) == (method, metric))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    code, printed, errors = finished(command(out))
    assert code == 0, errors
    assert "Energy" in printed
    return out


def test_figures_are_those_of_a_plain_recomputation(tmp_path):
    results = bench.run(job(tmp_path / "b"), limit=5, workers=1)
    network = tsgb.load("bundled")
    shares, hits = [], []
    for sample in open_dataset(None).samples[:5]:
        image = network.preprocessing.tensor(sample.read())[None]
        for region in sample.regions():
            map = tsgb.explain(network.model, image, region.category).maps[0, 0].numpy()
            positive = np.clip(map, 0, None)
            shares.append(100 * positive[region.mask].sum() / positive.sum())
            hits.append(100 * region.mask[np.unravel_index(map.argmax(), map.shape)])
    assert row(results, "tsgb-fused", "energy")["value"] == pytest.approx(np.mean(shares), abs=1e-3)
    assert row(results, "tsgb-fused", "pointing")["value"] == pytest.approx(np.mean(hits), abs=1e-9)
    assert row(results, "tsgb-fused", "energy")["n"] == 5
    assert json.loads((tmp_path / "b" / "results.json").read_text()) == results


def test_every_metric_gives_its_figures(tmp_path):
    every = list(bench.protocol.METRICS)
    results = bench.run(job(tmp_path / "b", every, methods=["tsgb-fused", "gradcam"], batch_size=2), limit=4, workers=1)
    assert not results["failures"]
    found = {r["metric"] for r in results["rows"] if r["method"] == "tsgb-fused" and r["value"] is not None}
    assert found == {figure for figure in bench.protocol.figures(every) if not figure.startswith("grid")}  # too few
    assert all(r["low"] <= r["value"] <= r["high"] for r in results["rows"] if r["n"] > 1)
    controls = {"tsgb-fused^0.5", "tsgb-fused^2", "gradcam^2", "gradcam^3"}
    assert {d["method"] for d in results["differences"]} == {"gradcam", *controls}
    assert row(results, "gradcam", "cascade")["value"] < 0.9
    page = (tmp_path / "b" / "index.html").read_text()
    assert "data:image/jpeg;base64," in page


def test_after_a_kill_it_goes_on_and_ends_with_the_same_bytes(undisturbed, tmp_path):
    out, journal = tmp_path / "out", tmp_path / "out" / "records.jsonl"
    process = started(command(out), start_new_session=True)
    while process.poll() is None and not (journal.exists() and len(journal.read_bytes().splitlines()) > 20):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()
    before = journal.read_text().splitlines()
    journal.write_text("\n".join(before)[:-9])  # and the last line is torn
    code, _, errors = finished(command(out))
    assert code == 0, errors
    assert (out / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    kept = [records.key(record) for record in records.read(journal)]
    assert len(kept) == len(set(kept)), "something was done twice"


def group_is_gone(process, seconds=30):
    """Whether all processes of a session end within a time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def running(out):
    """A bench of two processes that has written something and has much before it; in a session of its own."""
    long = ["--limit", "600", "--methods", "tsgb-fused,gradcam", "--metrics", "energy", "--out", str(out)]
    process = started(["-m", "tsgb", "bench", *long], start_new_session=True)
    while process.poll() is None and not (out / "records.jsonl").exists():
        time.sleep(0.01)
    return process


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs a system that tells its cores")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    process = running(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert group_is_gone(process)


def test_an_interrupt_ends_it_at_once_and_says_how_to_go_on(tmp_path):
    process = running(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same arguments resume" in errors
    assert "Traceback" not in errors
    assert group_is_gone(process)
    lines = (tmp_path / "out" / "records.jsonl").read_text().count("\n")
    assert lines < 600 * 3


def test_started_again_it_does_nothing(undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "results.json").unlink()
    code, _, errors = finished(command(out))
    assert code == 0, errors
    assert (out / "records.jsonl").read_bytes() == (undisturbed / "records.jsonl").read_bytes()
    assert (out / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_two_ranks_give_the_same_rows(undisturbed, tmp_path):
    code, printed, errors = finished(
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command(tmp_path / "out")]
    )
    assert code == 0, errors
    assert printed.count("page: ") == 1
    assert (tmp_path / "out" / "records-1.jsonl").exists()
    assert (tmp_path / "out" / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_another_bench_does_not_mix_with_it(undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    code, _, errors = finished(command(out, "--seed", "1"))
    assert code == 1
    assert "holds another bench" in errors
    assert (out / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no bench"):
        bench.run(job(tmp_path), limit=1, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["tsgb-fused", "gradcum"]}, "'gradcum' is no method: choose among tsgb-fused,"),
        ({"metrics": ["energie"]}, "'energie' is no metric: choose among mask_ap,"),
        ({"methods": ["tsgb-fused", "tsgb-fused"]}, "each once"),
        ({"methods": []}, "one or more"),
        ({"images": "odd"}, "images must be a Python slice, as '1::2' or ':100', got 'odd'"),
        ({"images": "::0"}, "must be a Python slice"),
        ({"images": "5000:"}, "takes none of the 1000 of scenes"),
    ],
)
def test_a_wrong_name_says_which_are_right(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench.run(job(tmp_path / "b", **options), limit=1, workers=1)
    assert not (tmp_path / "b").exists()


def test_a_slice_of_the_images_is_judged_and_named(tmp_path):
    found = bench.run(job(tmp_path / "b", metrics=["pointing"], images="1::2"), limit=3, workers=1)
    assert {record["unit"] for record in records.read(tmp_path / "b" / "records.jsonl")} == {
        "scene-000001",
        "scene-000003",
        "scene-000005",
    }
    assert "3 images of [1::2]" in bench.markdown(found)
    assert "3 images of [1::2]" in (tmp_path / "b" / "index.html").read_text()


@pytest.fixture
def annotated(tmp_path):
    """Four scenes in COCO layout: one whole, one corrupt, one not annotated, one of a class that the model lacks."""
    folder, scenes = tmp_path / "data", open_dataset(None).samples
    (folder / "images").mkdir(parents=True)
    images, boxes = [], []
    for k in range(4):
        scenes[2 * k].read().save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "width": 128, "height": 128})
        (region,) = scenes[2 * k].regions()
        x0, y0, x1, y1 = region.boxes[0].tolist()
        category = 99 if k == 3 else region.category
        if k != 2:
            boxes.append({"id": k, "image_id": k, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    (folder / "images" / "1.png").write_bytes(b"no image")
    categories = [{"id": k, "name": name} for k, name in enumerate(tsgb.load("bundled").names)]
    content = {"images": images, "annotations": boxes, "categories": [*categories, {"id": 99, "name": "unicorn"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_what_cannot_be_judged_is_named_and_the_rest_goes_on(annotated, tmp_path):
    out = tmp_path / "b"
    code, _, errors = finished(
        [
            "-m",
            "tsgb",
            "bench",
            "--data",
            str(annotated),
            "--methods",
            "tsgb-fused,center",
            "--metrics",
            "pointing,box_ap",
            "--out",
            str(out),
        ]
    )
    assert code == 1
    results = json.loads((out / "results.json").read_text())
    assert [row(results, m, "box_ap")["n"] for m in ("tsgb-fused", "center")] == [1, 1]
    problems = "\n".join(results["problems"])
    assert len(results["problems"]) == 3
    for told in ("1.png", "2.png: no annotation", "3.png: the network has no class 'unicorn' (99)"):
        assert told in problems
        assert told in errors
    assert "Traceback" not in errors


def test_maps_of_others_are_judged(annotated, tmp_path):
    maps, network = tmp_path / "mine", tsgb.load("bundled")
    maps.mkdir()
    image = network.preprocessing.tensor(open_dataset(None).samples[0].read())[None]
    category = open_dataset(annotated).samples[0].categories[0]
    map = tsgb.explain(network.model, image, category).maps[0, 0].numpy()
    np.save(maps / f"0_{category}.npy", map)
    options = {"data": annotated, "maps": maps, "metrics": ("box_ap", "insertion"), "methods": None}
    theirs = bench.run(job(tmp_path / "theirs", **options), workers=1)
    ours = bench.run(job(tmp_path / "ours", **{**options, "maps": None, "methods": ["tsgb-fused"]}), workers=1)
    # One class alone and among others agree but for the last digits.
    assert row(theirs, "mine", "box_ap")["value"] == pytest.approx(row(ours, "tsgb-fused", "box_ap")["value"], rel=1e-5)

    map[3, 4] = np.nan
    np.save(maps / f"0_{category}.npy", map)
    broken = bench.run(job(tmp_path / "broken", **options), workers=1)
    reasons = [failure["reason"] for failure in broken["failures"]]
    assert any("1 values that are not finite" in reason for reason in reasons)
    assert not [r for r in broken["rows"] if r["metric"] == "box_ap"]


def test_given_maps_are_told_apart_by_their_folders(tmp_path):
    data, maps = tmp_path / "data", tmp_path / "m"
    maps.mkdir()
    network = tsgb.load("bundled")
    for index, name in enumerate(("cat", "dog")):
        (data / name).mkdir(parents=True)
        image = open_dataset(None).samples[index].read()
        image.save(data / name / "a.png")
    with torch.inference_mode():
        predicted = int(network.model(network.preprocessing.tensor(image)[None]).argmax())
    np.save(maps / f"dog-a_{predicted}.npy", np.random.default_rng(0).random((128, 128)))
    results = bench.run(
        job(tmp_path / "b", data=data, maps=tmp_path / "m", methods=["m"], metrics=["deletion"]), workers=1
    )
    (missing,) = results["failures"]
    assert missing["reason"].startswith("no map: expected <image>_<class>.npy")
    assert missing["images"] == ["cat/a.png"]  # that of the dog is there


def test_given_maps_cannot_be_judged_by_what_needs_the_method(tmp_path):
    np.save(tmp_path / "a_1.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="precomputed maps cannot be evaluated with cascade: choose among mask_ap, "):
        bench.run(job(tmp_path / "b", maps=tmp_path, methods=None, metrics=["cascade"]), workers=1)


def test_a_method_that_fails_is_reported_with_its_reason(tmp_path, monkeypatch):
    def broken(model, images, targets, seed=0):
        raise RuntimeError("out of\nluck")

    monkeypatch.setitem(methods.METHODS, "broken", methods.Method("Broken", "nowhere", broken))
    asked = {"methods": ["tsgb-fused", "broken"], "metrics": ["pointing", "energy", "grid"]}
    results = bench.run(job(tmp_path / "b", **asked), limit=4, workers=1)
    (failure,) = results["failures"]
    assert (failure["method"], failure["reason"], failure["count"]) == ("broken", "out of luck", 4)
    assert {r["method"] for r in results["rows"]} == {"tsgb-fused", "tsgb-fused^0.5", "tsgb-fused^2"}
    assert results["left_out"]["grid"].startswith("too few images of distinct single classes")
    assert "out of luck" in (tmp_path / "b" / "results.md").read_text()
    assert "out of luck" in (tmp_path / "b" / "index.html").read_text()


def test_one_image_that_fails_does_not_take_its_batch_with_it(tmp_path, monkeypatch):
    def picky(model, images, targets, seed=0):
        if (images[:, 0, 0, 0] == first).any():
            raise RuntimeError("not this one")
        return torch.ones(*targets.shape, *images.shape[2:])

    first = tsgb.load("bundled").preprocessing.tensor(open_dataset(None).samples[1].read())[0, 0, 0]
    monkeypatch.setitem(methods.METHODS, "picky", methods.Method("Picky", "nowhere", picky))
    results = bench.run(job(tmp_path / "b", methods=["picky"], metrics=["pointing"]), limit=4, workers=1)
    assert results["failures"][0]["count"] == 1
    assert row(results, "picky", "pointing")["n"] == 3


def test_an_annotation_of_another_size_than_the_image_is_named(annotated, tmp_path):
    Image.new("RGB", (64, 64)).save(annotated / "images" / "0.png")
    results = bench.run(job(tmp_path / "b", data=annotated), workers=1)
    assert any("0.png: annotated as 128 x 128, but the image is 64 x 64" in p for p in results["problems"])


def test_the_help_names_every_method_and_metric():
    code, printed, _ = finished(["-m", "tsgb", "bench", "--help"])
    assert code == 0
    words = set(printed.replace(",", " ").replace(".", " ").split())
    assert {*methods.METHODS, *bench.protocol.METRICS} <= words


def test_what_was_asked_for_and_could_not_be_judged_is_a_failure(tmp_path):
    arguments = [
        "-m",
        "tsgb",
        "bench",
        "--limit",
        "2",
        "--methods",
        "center",
        "--out",
        str(tmp_path / "b"),
        "--metrics",
    ]
    code, _, told = finished([*arguments, "pointing,grid_ap"])
    assert (code, "tsgb: grid_ap is left out: too few images" in told) == (1, True)
