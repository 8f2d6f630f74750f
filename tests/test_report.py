import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import helpers
import tsgb
from tsgb import images, render, report, scenes
from tsgb.preprocessing import Preprocessing
from tsgb.report import caption, explain_files, one_line, versions


def network(model=None, names=helpers.NAMES):
    return tsgb.models.Network(
        model or helpers.chain(), Preprocessing((32, 32)), names and tuple(names), "tiny", "none", "0" * 64
    )


def image(folder, name, seed=0):
    path = Path(folder, name)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(scenes.render(seed, count=2, size=96).image).save(path)
    return path


@pytest.fixture
def two(tmp_path):
    return [image(tmp_path, "cat.png"), image(tmp_path, "dog.png", 1)]


def record(out):
    return json.loads((out / "record.json").read_text())["entries"]


def test_files_are_those_written_and_each_image_counts_once(tmp_path, two):
    (tmp_path / "bad.png").write_text("no image")
    done = []
    out = tmp_path / "new" / "out"
    found = explain_files(
        network(), [two[0], tmp_path / "bad.png", two[1]], ["cat", "top1", "2"], out, done=done.append
    )
    assert done == [1, 1, 1]
    assert sorted(found.files) == sorted(out.iterdir())
    assert found.entries == record(out)
    assert {entry["target"] for entry in found.entries} >= {0, 2}
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{tmp_path / 'bad.png'}: ")


def test_the_record_keeps_what_it_has_of_other_maps(tmp_path, two):
    out = tmp_path / "out"
    first = explain_files(network(), two, ["0", "1"], out).entries
    again = explain_files(network(), two[:1], ["1", "2"], out, method="tsgb-pixels").entries
    kept = [entry for entry in first if entry["map"] != "cat_1.npy"]
    assert record(out) == [*kept, *again]
    for entry in record(out):
        assert entry["map_sha256"] == images.sha256(out / entry["map"])
    (out / "dog_0.npy").unlink()
    explain_files(network(), two[:1], ["1"], out)
    assert sorted(entry["map"] for entry in record(out)) == ["cat_0.npy", "cat_1.npy", "cat_2.npy", "dog_1.npy"]
    (out / "record.json").write_text('{"entries": [3]}')
    assert explain_files(network(), two[:1], ["1"], out).entries == record(out)


def test_every_entry_has_its_overlay_and_map(tmp_path, two):
    found = explain_files(network(), two, ["0", "1"], tmp_path / "out")
    stems = [(entry["overlay"], entry["map"]) for entry in found.entries]
    assert stems == [(f"{stem}_{k}.png", f"{stem}_{k}.npy") for stem in ("cat", "dog") for k in (0, 1)]
    maps = [np.load(tmp_path / "out" / name) for _, name in stems]
    assert len({values.tobytes() for values in maps}) == 4


def test_sheet_shows_the_image_and_its_overlays(tmp_path, two):
    found = explain_files(network(), two[:1], ["0", "1"], tmp_path / "out")
    overlays = [(caption(entry), Image.open(tmp_path / "out" / entry["overlay"])) for entry in found.entries]
    expected = render.sheet(Image.open(two[0]).convert("RGB"), overlays)
    assert np.array_equal(Image.open(tmp_path / "out" / "cat_sheet.png"), expected)


def test_top_k_is_that_of_each_image(tmp_path, two):
    model = helpers.chain()
    with torch.no_grad():  # evidence for the first two classes only, and of opposite sign
        model[-1].weight.zero_()
        model[-1].bias.zero_()
        model[-1].weight[0], model[-1].weight[1] = 1.0, -1.0
        model[1].bias.fill_(-0.1)
        model[0].weight[:] = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None]
    Image.new("RGB", (40, 40), "red").save(two[0])
    found = explain_files(network(model), two[:1], ["top1", "1"], tmp_path / "out")
    assert [entry["target"] for entry in found.entries] == [0, 1]


def test_a_network_without_names(tmp_path, two):
    (entry,) = explain_files(network(names=None), two[:1], ["3"], tmp_path / "out").entries
    assert (entry["target"], entry["target_name"]) == (3, None)


def test_double_precision_networks_are_fed_in_their_own(tmp_path, two):
    (entry,) = explain_files(network(helpers.chain().double()), two[:1], ["3"], tmp_path / "out").entries
    assert np.load(tmp_path / "out" / entry["map"]).dtype == np.float32


def test_a_logit_that_is_no_number_is_left_out_of_the_record(tmp_path, two):
    def infinite(x):
        return x + torch.tensor([torch.inf, 0, 0, 0, 0])

    model = torch.nn.Sequential(helpers.chain(), helpers.Act(infinite)).eval()
    (entry,) = explain_files(network(model), two[:1], ["0"], tmp_path / "out").entries
    assert (entry["logit"], entry["probability"]) == (None, None)
    assert record(tmp_path / "out") == [entry]
    assert caption(entry) == "0 cat"


def test_nothing_is_written_where_no_image_is_good(tmp_path):
    found = explain_files(network(), [tmp_path / "none.png"], ["0"], tmp_path / "out")
    assert (found.entries, found.files, len(found.problems)) == ([], [], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "names", "wanted", "error"),
    [
        (helpers.chain(), helpers.NAMES, ["5"], tsgb.TargetError),
        (helpers.chain(), helpers.NAMES, ["cow"], tsgb.TargetError),
        (helpers.chain(), helpers.NAMES[:4], ["0"], tsgb.TargetError),
        (helpers.mlp()[0].eval(), helpers.NAMES, ["0"], tsgb.CoverageError),
    ],
)
def test_what_would_fail_for_every_image_ends_the_run(tmp_path, two, model, names, wanted, error):
    done = []
    with pytest.raises(error):
        explain_files(network(model, names), two, wanted, tmp_path / "out", done=done.append)
    assert done == []
    assert not (tmp_path / "out").exists()


def test_whatever_the_network_raises_is_a_problem_of_the_image(tmp_path, two):
    def grumble(x):
        if x.mean() > 0:
            raise KeyError("head")
        return x

    Image.new("RGB", (40, 40), "white").save(two[0])
    Image.new("RGB", (40, 40), "#101828").save(two[1])
    model = helpers.chain()
    model.insert(0, helpers.Act(grumble))
    found = explain_files(network(model), two, ["0"], tmp_path / "out")
    assert found.problems == [f"{two[0]}: KeyError: 'head'"]
    assert [entry["image"] for entry in found.entries] == [str(two[1])]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_record_holds_what_was_done_when_the_run_breaks_off(tmp_path, two, monkeypatch, error):
    real = render.save_map

    def save_map(map, path):
        if "dog" in path.name:
            raise error
        real(map, path)

    monkeypatch.setattr(render, "save_map", save_map)
    with pytest.raises((KeyboardInterrupt, OSError)):
        explain_files(network(), two, ["0"], tmp_path / "out")
    assert [entry["image"] for entry in record(tmp_path / "out")] == [str(two[0])]


@pytest.mark.parametrize("name", ["cat_0.png", "cat_12.png", "cat_sheet.png"])
def test_an_image_that_an_output_could_replace_is_refused_first(tmp_path, name):
    images = [image(tmp_path / "out", name), image(tmp_path, "cat.png")]
    with pytest.raises(ValueError, match=rf"{name} is one of the images to explain and could be replaced"):
        explain_files(network(), images, ["0"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_images_may_lie_in_the_output_folder_otherwise(tmp_path):
    images = [image(tmp_path, name) for name in ("cat.png", "catalogue_1.png", "dog_0.png")]
    explain_files(network(), images, ["0"], tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_two_runs_are_the_same_bit_for_bit(tmp_path, two):
    for out in ("first", "second"):
        explain_files(network(), two, ["top2", "hen"], tmp_path / out)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("first", "second")
    )
    assert first == second
    assert len(first) > 8


def test_versions_name_the_libraries_that_were_loaded(monkeypatch):
    for name in ("torchvision", "timm"):
        monkeypatch.delitem(report.sys.modules, name, raising=False)
    assert set(versions()) == {"tsgb", "torch", "numpy", "pillow", "python"}
    assert versions()["numpy"] == np.__version__
    monkeypatch.setitem(report.sys.modules, "safetensors", None)
    assert "safetensors" not in versions()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size must be\n  positive"), "size must be positive"),
        (MemoryError(), "MemoryError"),
        (AssertionError("224 expected"), "AssertionError: 224 expected"),
        (KeyError("head"), "KeyError: 'head'"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line


def test_an_image_that_was_not_asked_for_is_not_replaced(tmp_path):
    network = tsgb.load("bundled")
    for name, colour in (("cat.png", "red"), ("cat_3.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    before = (tmp_path / "cat_3.png").read_bytes()
    with pytest.raises(ValueError, match=r"cat_3\.png is there and no result of the last run: choose another --out"):
        explain_files(network, [tmp_path / "cat.png"], ["3"], tmp_path)
    assert (tmp_path / "cat_3.png").read_bytes() == before
    for _ in range(2):  # its own results it may replace
        assert explain_files(network, [tmp_path / "cat.png"], ["4"], tmp_path).entries
