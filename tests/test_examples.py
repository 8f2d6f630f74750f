"""The examples run as they stand, and what they print is so; the same questions of a real segmentation network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

import tsgb
from tsgb.models import load

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def printed(tmp_path):
    def run(name):
        ran = subprocess.run([sys.executable, EXAMPLES / name, tmp_path], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


def test_explain(printed, tmp_path):
    paths = [Path(line) for line in printed("explain.py").splitlines()]
    assert sorted(path.name for path in paths) == ["heart.png", "star.png"]
    for path in paths:
        assert path.parent == tmp_path / "explain"
        assert Image.open(path).size == (128, 128)


def test_series(printed, tmp_path):
    seconds = [float(found) for found in re.findall(r"in second ([\d.]+)", printed("series.py"))]
    assert seconds == pytest.approx([2.5, 4.5], abs=0.1)
    assert Image.open(tmp_path / "series" / "0_1.png").size == (1200, 216)


def test_volume(printed, tmp_path):
    (found,) = re.findall(r"slice (\d+), row (\d+), column (\d+)", printed("volume.py"))
    assert all(low <= int(place) <= low + 3 for place, low in zip(found, (5, 17, 3), strict=True))
    assert Image.open(tmp_path / "volume" / "0_1.png").size == (616, 616)


def test_targets(printed, tmp_path):
    rows = dict(re.findall(r"^(.{22}) (.*)$", printed("targets.py"), re.MULTILINE))
    assert len(rows) == len(list((tmp_path / "targets").iterdir())) == 6
    for name, row in rows.items():
        flower, heart = (int(share) for share in re.findall(r"(\d+)%", row))
        own, other = (heart, flower) if name.startswith("heart") else (flower, heart)
        assert own > max(15, 2 * other)


@pytest.mark.parametrize(("name", "label"), [("000000001353", 15), ("000000002006", 6), ("000000005001", 15)])
def test_a_class_within_the_mask_of_a_segmentation(name, label, shared):
    network = load(
        f"{shared / 'tools' / 'nets.py'}:deeplab_voc",
        shared / "weights" / "deeplabv3_mnv2_voc.pth",
        size=513,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    with Image.open(shared / "data" / "coco_voc" / "images" / f"{name}.jpg") as photo:
        image = network.preprocessing.tensor(photo.convert("RGB"))[None]
    with torch.no_grad():
        mask = network.model(image).argmax(1) == label
    found = tsgb.explain(network.model, image, lambda scores: (scores[:, label] * mask).sum((1, 2)) / mask.sum())
    assert not [row for row in found.coverage if row[1] is None]
    positive = functional.adaptive_avg_pool2d(found.maps[:, 0].clamp(min=0), mask.shape[1:])
    share, area = float(positive[mask].sum() / positive.sum()), float(mask.float().mean())
    assert share > area + 0.1
