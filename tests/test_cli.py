import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import helpers
import tsgb
from tsgb import images, render, report, scenes
from tsgb.cli import SCENE, app

TINY = str(Path(helpers.__file__))
CNN = f"{TINY}:cnn"

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def explained(*arguments):
    """The entries of the record after a run without complaints."""
    result = run("explain", *arguments, "--out", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    return entries("out")


def entries(folder):
    return json.loads(Path(folder, "record.json").read_text())["entries"]


def names(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def scene(path, seed=0, size=96):
    """An image that is wider than high, whose rows and columns differ."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(scenes.render(seed, count=2, size=size).image).crop((0, 0, size, size - 20))
    image.save(path)
    return image


def started(*arguments):
    return subprocess.run([sys.executable, "-m", "tsgb", *map(str, arguments)], capture_output=True, text=True)


# good calls


def test_targets_of_every_kind_once_each():
    scene("cat.png")
    found = explained("cat.png", "--model", CNN, "--target", 3, "--target", "top2", "--target", " DOG", "--target", "3")
    logits = tsgb.load(CNN).model(tsgb.load(CNN).preprocessing.tensor(images.read("cat.png"))[None])[0]
    expected = list(dict.fromkeys([3, *logits.topk(2).indices.tolist(), 1]))
    assert [entry["target"] for entry in found] == expected
    assert [entry["target_name"] for entry in found] == [helpers.NAMES[index] for index in expected]
    files = {f"cat_{index}.{kind}" for index in expected for kind in ("png", "npy")}
    assert set(names("out")) == files | {"cat_sheet.png", "record.json"}


@pytest.mark.parametrize("target", [["2"], ["owl"], ["top1"], [], ["2", "owl"]])
def test_one_target_has_no_sheet(target):
    scene("cat.png")
    (entry,) = explained("cat.png", "--model", CNN, *(part for word in target for part in ("--target", word)))
    assert names("out") == sorted(["record.json", entry["overlay"], entry["map"]])
    assert (entry["overlay"], entry["map"]) == (f"cat_{entry['target']}.png", f"cat_{entry['target']}.npy")


def test_the_predicted_class_is_the_default():
    scene("cat.png")
    (best,) = explained("cat.png", "--model", CNN)
    everything = explained("cat.png", "--model", CNN, "--target", "top5")
    assert best == everything[0]
    assert [entry["probability"] for entry in everything] == sorted(
        (entry["probability"] for entry in everything), reverse=True
    )


def test_folders_and_equal_stems():
    for path in ("a/cat.png", "b/cat.jpg", "b/dog.png"):
        scene(path)
    Path("b/notes.txt").write_text("no image")
    found = explained("a/cat.png", "b", "b/dog.png", "--model", CNN, "--target", 0)
    assert [(entry["image"], entry["overlay"]) for entry in found] == [
        ("a/cat.png", "a-cat_0.png"),
        (str(Path("b/cat.jpg")), "b-cat_0.png"),
        (str(Path("b/dog.png")), "dog_0.png"),
    ]
    assert len(names("out")) == 7


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
def test_overlay_lies_on_the_original_image(orientation, crop):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene("cat.png")
    stored.save("turned.jpg", exif=exif, quality=95)
    size = stored.size if orientation == 1 else stored.size[::-1]
    options = ["--resize", "crop", "--size", "32x24"] if crop else []
    (entry,) = explained("turned.jpg", "--model", CNN, "--target", 1, *options)
    assert tuple(entry["image_size"]) == size
    overlay = Image.open(Path("out", entry["overlay"]))
    assert overlay.size == size
    network = tsgb.load(CNN, size=(32, 24) if crop else None, resize="crop" if crop else None)
    restored = network.preprocessing.restore(np.load(Path("out", entry["map"])), size)
    assert np.array_equal(overlay, render.overlay(images.read("turned.jpg"), restored))


def test_map_is_the_raw_one_in_the_networks_pixels():
    scene("cat.png")
    (entry,) = explained("cat.png", "--model", CNN, "--target", 4, "--method", "tsgb-pixels")
    network = tsgb.load(CNN)
    image = network.preprocessing.tensor(images.read("cat.png"))[None]
    e = tsgb.explain(network.model, image, 4, rules=tsgb.rules.PIXELS)
    stored = np.load(Path("out", entry["map"]), allow_pickle=False)
    assert (stored.dtype, stored.shape) == (np.float32, (32, 32))
    assert np.array_equal(stored, e.maps[0, 0].numpy())
    assert (stored < 0).any()


def test_record_tells_what_was_run():
    scene("cat.png")
    torch.save(helpers.chain().state_dict(), "mine.pth")
    options = ["--model", CNN, "--weights", "mine.pth", "--target", 1, "--target", 3]
    pixels = ["--method", "tsgb-pixels", "--f", "0.5"]
    found = explained("cat.png", *options, "--size", "32", "--mean", "0.25", "--std", "0.5,0.25,1", *pixels)
    network = tsgb.load(CNN, size=32, mean=(0.25, 0.25, 0.25), std=(0.5, 0.25, 1))
    tensor = network.preprocessing.tensor(images.read("cat.png"))[None]
    e = tsgb.explain(network.model, tensor, [[1, 3]], rules=tsgb.rules.PIXELS, f=0.5)
    with torch.inference_mode():
        logits = network.model(tensor)[0]
    for k, (entry, target) in enumerate(zip(found, (1, 3), strict=True)):
        assert entry["image"] == "cat.png"
        assert entry["image_sha256"] == hashlib.sha256(Path("cat.png").read_bytes()).hexdigest()
        assert (entry["model"], entry["weights"]) == (CNN, "mine.pth")
        assert entry["weights_sha256"] == hashlib.sha256(Path("mine.pth").read_bytes()).hexdigest()
        assert entry["preprocessing"] == network.preprocessing.record()
        assert entry["preprocessing"]["std"] == [0.5, 0.25, 1]
        assert (entry["target"], entry["target_name"]) == (target, helpers.NAMES[target])
        assert entry["logit"] == pytest.approx(float(logits[target]), abs=1e-6)
        assert entry["probability"] == pytest.approx(float(logits.softmax(0)[target]), abs=1e-6)
        assert (entry["method"], entry["rules"], entry["f"]) == ("tsgb-pixels", "PIXELS", 0.5)
        assert entry["coverage"] == [list(row) for row in e.coverage]
        assert ["conv2d", "conv", 1] in entry["coverage"]
        assert entry["why_empty"] is None
        assert entry["versions"].keys() >= {"tsgb", "torch", "numpy", "pillow", "python"}
        assert np.array_equal(np.load(Path("out", entry["map"])), e.maps[0, k].numpy())


def test_weights_without_a_file_have_their_sha256():
    scene("cat.png")
    (tiny,) = explained("cat.png", "--model", CNN)
    assert tiny["weights_sha256"] == tsgb.load(CNN).weights_sha256
    bundled = explained("cat.png")[-1]  # after what the record has of the other class's map
    file = Path(tsgb.__file__).parent / "weights" / "bundled.safetensors"
    assert bundled["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_method_of_the_paper():
    scene("cat.png")
    (default,) = explained("cat.png", "--model", CNN, "--target", 0)
    usual = np.load("out/cat_0.npy")
    (paper,) = explained("cat.png", "--model", CNN, "--target", 0, "--method", "tsgb-paper")
    assert (default["rules"], default["f"], paper["rules"], paper["f"]) == ("FUSED", None, "PAPER", 1.0)
    assert (default["method"], paper["method"]) == ("tsgb-fused", "tsgb-paper")
    assert default["of_all_depths"]
    assert not paper["of_all_depths"]
    assert not np.allclose(usual, np.load("out/cat_0.npy"))


def test_the_default_method_has_a_short_name():
    scene("cat.png")
    (default,) = explained("cat.png", "--model", CNN, "--target", 0)
    usual = np.load("out/cat_0.npy")
    (short,) = explained("cat.png", "--model", CNN, "--target", 0, "--method", "tsgb")
    assert (short["method"], short["rules"]) == (default["method"], default["rules"]) == ("tsgb-fused", "FUSED")
    assert np.array_equal(usual, np.load("out/cat_0.npy"))


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "alpha.png", "cmyk.jpg", "deep.png"])
def test_images_of_every_kind(name):
    image = scene("cat.png")
    grey = np.asarray(image.convert("L"))
    made = {
        "grey.png": image.convert("L"),
        "palette.png": image.convert("P"),
        "alpha.png": Image.merge("RGBA", [*image.split(), Image.fromarray(grey)]),
        "cmyk.jpg": image.convert("CMYK"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    made[name].save(name)
    assert Image.open(name).mode == made[name].mode
    (entry,) = explained(name, "--model", CNN)
    assert Image.open(Path("out", entry["overlay"])).size == image.size
    assert np.isfinite(np.load(Path("out", entry["map"]))).all()
    if name == "deep.png":  # white is white: as the 8-bit image of the same grey
        made["grey.png"].save("grey.png")
        assert explained("grey.png", "--model", CNN)[0]["logit"] == entry["logit"]


def test_an_image_without_evidence_says_why():
    Image.new("RGB", (40, 30), (128, 128, 128)).save("flat.png")
    torch.save({**helpers.chain().state_dict(), "6.weight": -torch.ones(5, 8)}, "against.pth")
    result = run("explain", "flat.png", "--model", CNN, "--weights", "against.pth", "--target", 1)
    assert result.exit_code == 0
    (entry,) = entries("tsgb-out")
    assert entry["why_empty"]
    assert f"empty map: {entry['why_empty']}" in result.stdout


def test_output_names_what_was_written():
    scene("cat.png")
    result = run("explain", "cat.png", "--model", CNN, "--target", 1, "--target", 2)
    assert result.exit_code == 0
    for name in ("cat_1.png", "cat_2.png", "cat_sheet.png", "record.json"):
        assert str(Path("tsgb-out", name)) in result.stdout
    assert "1 dog, " in result.stdout
    assert " %" in result.stdout


def test_an_operator_without_a_rule_is_told():
    scene("cat.png")
    result = run("explain", "cat.png", "--model", f"{TINY}:cosine")
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "no rule for cos" in result.stderr
    assert f"tsgb doctor --model {TINY}:cosine" in result.stderr


def test_version():
    assert run("--version").stdout.strip() == f"tsgb {tsgb.__version__}"


def test_without_a_command_the_help_is_shown():
    result = run()
    assert "explain" in result.output
    assert "doctor" in result.output


# the program itself


def test_without_images_a_bundled_scene_for_its_two_objects_the_same_every_time(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        ran = subprocess.run([sys.executable, "-m", "tsgb", "explain"], capture_output=True, text=True, cwd=folder)
        assert (ran.returncode, ran.stderr) == (0, "")
    first, second = ({file.name: file.read_bytes() for file in (folder / "tsgb-out").iterdir()} for folder in folders)
    assert first == second

    found = json.loads(first["record.json"])["entries"]
    objects = [entry["target"] for entry in found]
    assert len(set(objects)) == 2
    files = {f"scene_{index}.{kind}" for index in objects for kind in ("png", "npy")}
    assert set(first) == files | {"record.json", "scene.png", "scene_sheet.png"}
    seed, size = SCENE
    truth = scenes.render(seed, count=2, size=size)
    assert np.array_equal(truth.image, Image.open(folders[0] / "tsgb-out" / "scene.png"))
    assert sorted(objects) == sorted(truth.classes)
    for entry in found:
        assert entry["probability"] > 0.3


def test_started_as_a_program_bad_input_is_one_line():
    ran = started("explain", "none.png", "--model", CNN)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "tsgb: none.png: no such file\n")


# input that cannot be used


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def gif_bomb():
    size = struct.pack("<HH", 65535, 65535)
    return b"GIF89a" + size + b"\0\0\0" + b",\0\0\0\0" + size + b"\0\x02\x02L\x01\0;"


class Sneaky:
    """A pickle that makes a file where it is executed."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture
def inputs():
    """Files for the table of bad inputs."""
    scene("cat.png").save("whole.jpg")
    Path("text.jpg").write_text("this is no image\n")
    Path("cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:900])
    Path("zero.png").touch()
    Path("bomb.png").write_bytes(bomb(10_001, 10_000))
    Path("bomb.gif").write_bytes(gif_bomb())
    Path("empty").mkdir()
    Path("file").write_text("no folder")
    state = helpers.chain().state_dict()
    torch.save({f"net.{key}": value for key, value in state.items()}, "other.pth")
    torch.save({**state, "6.weight": Sneaky()}, "sneaky.pth")
    torch.save({0: torch.ones(1)}, "numbers.pth")


BAD = [
    (["none.png"], ["none.png", "no such file"]),
    (["text.jpg"], ["text.jpg", "not an image"]),
    (["cut.jpg"], ["cut.jpg", "truncated"]),
    (["zero.png"], ["zero.png", "is empty"]),
    (["bomb.png"], ["bomb.png", "too large", "10001 x 10000", "100000000"]),
    (["bomb.gif"], ["bomb.gif", "too large"]),
    (["empty"], ["empty", "holds no image files"]),
    (["none.png", "--target", "top2", "--target", "0"], ["none.png", "no such file"]),
    (["cat.png", "--model", f"{TINY}:cn"], ["helpers.py", "no function cn", "cnn"]),
    (["cat.png", "--model", "none.py:cnn"], ["none.py", "does not exist"]),
    (["cat.png", "--model", f"{TINY}:mlp"], ["no convolution", "flatten, linear, relu"]),
    (["cat.png", "whole.jpg", "--model", f"{TINY}:mlp"], ["no convolution"]),
    (["cat.png", "--model", f"{TINY}:raising"], [":raising raised ValueError: no weights here (line "]),
    (["cat.png", "--model", f"{TINY}:failing"], ["cat.png: LookupError: no such layer in this network"]),
    (["cat.png", "--model", f"{TINY}:training"], ["cat.png", "training mode"]),
    (["cat.png", "--model", f"{TINY}:too_few_names"], ["5 classes, but 3 names"]),
    (["cat.png", "--model", f"{TINY}:too_many_names"], ["5 classes, but 6 names"]),
    (["cat.png", "--model", f"{TINY}:unnamed", "--target", "cat"], ["'cat'", "no names", "class index"]),
    (["cat.png", "--weights", "none.pth"], ["none.pth", "does not exist"]),
    (["cat.png", "--weights", "numbers.pth"], ["numbers.pth", "holds no state dict but a dict of 0"]),
    (["cat.png", "--weights", "other.pth"], ["missing: 0.weight, 0.bias", "unexpected: net.0.weight, net.0.bias"]),
    (["cat.png", "--weights", "sneaky.pth"], ["sneaky.pth", "holds more than tensors", "can run code"]),
    (["cat.png", "--target", "5"], ["target 5 is no class of the model", "5 classes are 0 to 4"]),
    (["cat.png", "--target", "0", "--target", "-1"], ["target -1 is no class of the model", "0 to 4"]),
    (["cat.png", "--target", "top6"], ["'top6'", "1 to 5 classes"]),
    (["cat.png", "--target", "top0"], ["'top0'", "1 to 5 classes"]),
    (["cat.png", "--target", "0", "--target", "cow"], ["'cow' is no class", "nearest are 'owl'"]),
    (["cat.png", "--target", "²"], ["'²' is no class"]),
    (["cat.png", "--size", "0"], ["size", "at least 1"]),
    (["cat.png", "--mean", "2"], ["mean must be from 0 to 1"]),
    (["cat.png", "--std", "0"], ["std must be above 0"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=[" ".join(arguments).replace(TINY, "") for arguments, _ in BAD]
)
def test_bad_input_is_one_line_and_nothing_written(inputs, arguments, words):
    before = names(".")
    model = [] if "--model" in arguments else ["--model", CNN]
    result = run("explain", *arguments, *model, "--out", "out")
    check_one_line(result, words)
    assert names(".") == before


def check_one_line(result, words):
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("tsgb: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@needs_torchvision
def test_unknown_model_comes_with_the_nearest_names():
    scene("cat.png")
    check_one_line(run("explain", "cat.png", "--model", "resnet5"), ["unknown model 'resnet5'", "resnet50"])
    assert names(".") == ["cat.png"]


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_must_not_be_a_file(inputs, out):
    before = names(".")
    check_one_line(run("explain", "cat.png", "--model", CNN, "--out", out), [f"{out} is not a folder"])
    assert names(".") == before
    assert Path("file").read_text() == "no folder"


@pytest.mark.parametrize("reverse", [False, True])
def test_no_output_replaces_an_image(reverse):
    for path in ("cat.png", "cat_0.png"):
        scene(path)
    before = {name: Path(name).read_bytes() for name in names(".")}
    order = ["cat_0.png", "cat.png"] if reverse else ["cat.png", "cat_0.png"]
    result = run("explain", *order, "--model", CNN, "--target", 0, "--out", ".")
    check_one_line(result, ["cat_0.png is one of the images", "choose another --out"])
    assert {name: Path(name).read_bytes() for name in names(".")} == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--nonsense"], ["--nonsense"]),
        (["--method", "nonsense"], ["--method", "tsgb-fused, tsgb-pixels, tsgb-paper", "'nonsense'"]),
        (["--size", "abc"], ["--size", "'abc'"]),
        (["--size", "3x4x5"], ["--size", "'3x4x5'"]),
        (["--mean", "1,2"], ["--mean", "'1,2'"]),
        (["--std", "red"], ["--std", "'red'"]),
        (["--resize", "fit"], ["--resize", "squash or crop", "'fit'"]),
        (["--f", "2"], ["--f", "from 0 to 1", "2.0"]),
        (["--f", "0.5"], ["--f", "tsgb-pixels or tsgb-paper", "no f"]),
        (["--f", "nan"], ["--f", "from 0 to 1", "nan"]),
        (["--f", "half"], ["--f"]),
        (["--target"], ["--target"]),
    ],
    ids=" ".join,
)
def test_wrong_call(wrong, words):
    scene("cat.png")
    result = run("explain", "cat.png", "--model", CNN, *wrong)
    assert (result.exit_code, result.stdout) == (2, "")
    told = " ".join(result.stderr.replace("│", "").split())  # out of its frame
    for word in words:
        assert word in told
    assert names(".") == ["cat.png"]


def test_unknown_command_is_a_wrong_call():
    assert run("explian").exit_code == 2


def test_a_bad_image_among_good_ones():
    scene("cat.png")
    scene("dog.png", seed=1)
    Path("bad.png").write_text("no image")
    result = run("explain", "cat.png", "bad.png", "dog.png", "--model", CNN, "--target", 0, "--out", "out")
    assert result.exit_code == 1
    assert result.stderr == "tsgb: bad.png: not an image in a format that can be read\n"
    assert [entry["image"] for entry in entries("out")] == ["cat.png", "dog.png"]
    assert names("out") == ["cat_0.npy", "cat_0.png", "dog_0.npy", "dog_0.png", "record.json"]
    assert "bad.png" not in result.stdout


def test_an_interrupted_run_keeps_what_was_done(monkeypatch):
    for name in ("cat.png", "dog.png", "owl.png"):
        scene(name)
    real, calls = report.explain, []

    def explain(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(report, "explain", explain)
    result = run("explain", "cat.png", "dog.png", "owl.png", "--model", CNN, "--target", 0, "--out", "out")
    assert result.exit_code == 130
    assert result.stderr == "tsgb: interrupted\n"
    assert [entry["image"] for entry in entries("out")] == ["cat.png"]
    assert names("out") == ["cat_0.npy", "cat_0.png", "record.json"]


# doctor


def test_doctor_passes_a_network_and_lists_its_operators():
    result = run("doctor", "--model", CNN)
    assert (result.exit_code, result.stderr) == (0, "")
    checks = [line for line in result.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert len(checks) == 6
    assert not [line for line in checks if line.startswith("FAIL")]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["conv2d", "conv_merged_groups", "1"] in rows
    assert ["linear", "gradient_head", "1"] in rows


@pytest.mark.parametrize("model", ["bundled", "bundled-vgg"])
def test_doctor_passes_the_bundled_networks(model):
    result = run("doctor", "--model", model)
    assert result.exit_code == 0
    assert "FAIL" not in result.stdout


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("mlp", ["no convolution", "flatten, linear, relu"]),
        ("training", ["training mode", "BatchNorm2d", "model.eval()"]),
        ("failing", ["LookupError: no such layer in this network"]),
        ("raising", ["raised ValueError: no weights here"]),
    ],
)
def test_doctor_refuses_in_one_line(factory, words):
    check_one_line(run("doctor", "--model", f"{TINY}:{factory}"), words)


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        ("cosine", "FAIL every operator has a rule: ordinary gradient: cos (1)"),
        ("counting", "FAIL model is unchanged: "),
        ("batch_dependent", "FAIL maps do not depend on the batch: "),
    ],
)
def test_doctor_says_what_fails(factory, line):
    result = run("doctor", "--model", f"{TINY}:{factory}")
    assert (result.exit_code, result.stderr) == (1, "")
    assert [found for found in result.stdout.splitlines() if found.startswith(line)]


# the networks and photographs of ../shared


@pytest.fixture
def mobilenet(shared):
    return ["--model", "mobilenet_v2", "--weights", shared / "weights" / "mobilenet_v2_qat_dequant.pth"]


@needs_torchvision
def test_cat_and_dog(shared, mobilenet):
    found = explained(shared / "data/two_class/tsgb_cat_dog.png", *mobilenet, "--target", 243, "--target", 282)
    files = [f"tsgb_cat_dog_{target}.{kind}" for target in (243, 282) for kind in ("npy", "png")]
    assert names("out") == [*["record.json"], *files, "tsgb_cat_dog_sheet.png"]
    assert [(entry["target"], entry["target_name"]) for entry in found] == [(243, "bull mastiff"), (282, "tiger cat")]
    dog, cat = (np.maximum(np.load(Path("out", entry["map"])), 0) for entry in found)
    assert dog.shape == cat.shape == (224, 224)
    assert dog[:112].sum() >= 0.75 * dog.sum()
    assert cat[112:].sum() >= 0.75 * cat.sum()


@needs_torchvision
def test_class_1000_of_1000(shared, mobilenet):
    image = shared / "data/two_class/tsgb_cat_dog.png"
    result = run("explain", image, *mobilenet, "--target", 1000)
    check_one_line(result, ["target 1000 is no class", "1000 classes are 0 to 999"])
    assert names(".") == []


@pytest.mark.parametrize("weights", [True, False])
def test_tiny_darknet(shared, weights):
    options = ["--weights", shared / "weights/tiny_darknet_imagenet.pth", "--target", 282] if weights else []
    image = shared / "data/two_class/tsgb_cat_dog.png"
    model = ["--model", f"{shared}/tools/nets.py:tiny_darknet", "--mean", 0, "--std", 1]
    (entry,) = explained(image, *model, *options)
    assert entry["preprocessing"]["mean"] == [0, 0, 0]
    assert entry["preprocessing"]["std"] == [1, 1, 1]
    assert np.load(Path("out", entry["map"])).shape == (224, 224)
    assert Image.open(Path("out", entry["overlay"])).size == Image.open(image).size


def test_the_scene_replaces_nobodys_image(tmp_path):
    out = tmp_path / "keep"
    out.mkdir()
    Image.new("RGB", (9, 9), "red").save(out / "scene.png")
    before = (out / "scene.png").read_bytes()
    for target in ("nosuch", "3"):
        result = CliRunner().invoke(app, ["explain", "--target", target, "--out", str(out)])
        assert result.exit_code == 1
        assert (out / "scene.png").read_bytes() == before
    other = tmp_path / "new"
    assert CliRunner().invoke(app, ["explain", "--target", "nosuch", "--out", str(other)]).exit_code == 1
    assert not other.exists()
