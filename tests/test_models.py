import dataclasses
import hashlib
import http.server
import importlib.util
import io
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import printed, refused, same, saved, written
from tsgb import models, vision
from tsgb.models import load, sha256
from tsgb.preprocessing import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="session")
def torchvision():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return vision.import_torchvision()


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine; `served` maps paths to bytes, `asked` lists what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            body = web.served.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.served, web.asked, web.url = {}, [], f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    yield web
    web.shutdown()
    web.server_close()
    thread.join()


# the bundled networks


@pytest.mark.parametrize("spec", models.BUNDLED)
def test_bundled_network_comes_with_its_weights_names_and_preprocessing(spec):
    network = load(spec)
    file = Path(models.__file__).parent / "weights" / f"{spec}.safetensors"
    assert not network.model.training
    assert network.names == network.model.names
    assert len(network.names) == 10
    assert (network.spec, network.weights) == (spec, file.name)
    assert network.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert network.preprocessing.size == (128, 128)
    assert network.preprocessing.mean == network.preprocessing.std == (0.5, 0.5, 0.5)
    assert network.preprocessing.resize == "squash"
    assert same(network.model, load(spec).model)


def test_bundled_network_takes_weights_of_a_file(tmp_path):
    model = type(load("bundled").model)()
    network = load("bundled", saved(model, tmp_path / "mine.pth"))
    assert same(network.model, model)
    assert (network.weights, network.weights_sha256) == ("mine.pth", sha256(tmp_path / "mine.pth"))


def test_bundled_network_and_factories_need_no_torchvision_and_no_timm(tmp_path):
    file = written(tmp_path, "import torch\ndef net(): return torch.nn.Conv2d(3, 2, 1)\n")
    program = f"""
import sys
sys.modules["torchvision"] = sys.modules["timm"] = None
from tsgb import models
models.load("bundled"), models.load({str(file)!r} + ":net")
for spec in ("resnet50", "timm:resnet50"):
    try:
        models.load(spec)
    except models.ModelError as error:
        print(error)
"""
    lines = printed(program).split("\n")
    assert "'resnet50'" in lines[0]
    assert 'pip install "tsgb[torchvision]"' in lines[0]
    assert 'pip install "tsgb[timm]"' in lines[1]


# importing torchvision


def fake_torchvision(folder, text):
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(text)
    program = "from tsgb import vision\ntry: print(vision.import_torchvision().mark)\n"
    program += "except vision.ModelError as error: print(error)"
    return printed(program, folder)


def test_healthy_torchvision_is_imported_plainly(tmp_path):
    text = "import torch\nmark = hasattr(torch.ops.torchvision, 'nms')\n"
    assert fake_torchvision(tmp_path, text) == "False"


def test_torchvision_without_operators_gets_their_schemas_and_no_half_imported_module(tmp_path):
    text = """
import sys
import torch
from torchvision import half
half.count += 1
if not hasattr(torch.ops.torchvision, "nms"):
    raise RuntimeError("operator torchvision::nms does not exist")
mark = (half.count, str(torch.ops.torchvision.qnms.default._schema))
"""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "half.py").write_text("count = 0\n")
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    program = "from tsgb import vision\nprint(vision.import_torchvision().mark, vision.import_torchvision().half.count)"
    schema = "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert printed(program, tmp_path) == f"(1, '{schema}') 1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('no luck\\ntoday')", "torchvision does not import (RuntimeError: no luck)"),
        (
            "import no_such_helper",
            "torchvision does not import (ModuleNotFoundError: No module named 'no_such_helper')",
        ),
        ("raise OSError('libcudart')", "(OSError: libcudart); is it the release that goes with torch"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision does not import (RuntimeError"),
    ],
)
def test_torchvision_broken_otherwise_is_one_clear_line(tmp_path, text, reason):
    assert reason in fake_torchvision(tmp_path, text)


def test_threads_may_import_torchvision_at_once(torchvision):
    program = """
import threading
from tsgb import vision
found = []
threads = [threading.Thread(target=lambda: found.append(vision.import_torchvision())) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(map(id, found))), found[0].models.resnet18.__name__)
"""
    assert printed(program).split() == ["8", "1", "resnet18"]


# torchvision's networks with weights from a file


def test_weights_file_means_squash_to_224_with_imagenet_mean_and_names(torchvision, tmp_path):
    network = load("SqueezeNet1_1", saved(torchvision.models.squeezenet1_1(), tmp_path / "net.pth"))
    assert network.preprocessing.size == (224, 224)
    assert (network.preprocessing.mean, network.preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert network.preprocessing.resize == "squash"
    assert (network.names[0], network.names[243], len(network.names)) == ("tench", "bull mastiff", 1000)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_number_of_classes_is_the_files(torchvision, tmp_path, name, suffix):
    model = torchvision.models.get_model(name, num_classes=10).eval()
    network = load(name, saved(model, tmp_path / f"ten{suffix}"))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.model(images), model(images))
    assert network.model(images).shape == (2, 10)
    assert network.names is None


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize(("name", "side"), [("inception_v3", 299), ("googlenet", 224)])
def test_inceptions_transform_their_input_and_the_third_is_made_for_299(torchvision, tmp_path, name, side, auxiliary):
    model = torchvision.models.get_model(name, init_weights=False, aux_logits=auxiliary)
    network = load(name, saved(model, tmp_path / "net.pth"))
    assert same(network.model, model)
    assert network.model.transform_input
    assert network.preprocessing.size == (side, side)
    assert len(network.names) == 1000


@pytest.mark.parametrize(
    ("name", "auxiliary", "classes"),
    [("fcn_resnet50", False, 21), ("fcn_resnet50", True, 5), ("lraspp_mobilenet_v3_large", False, 5)],
)
def test_segmentation_network_fetches_no_backbone(torchvision, tmp_path, monkeypatch, name, auxiliary, classes):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it fetched"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it fetched"))
    model = torchvision.models.get_model(name, weights_backbone=None, num_classes=classes, aux_loss=auxiliary)
    network = load(name, saved(model, tmp_path / "net.pth"))
    assert same(network.model, model)
    assert network.names is None


def test_version_notes_are_kept_and_may_be_missing(torchvision, tmp_path):
    model = torchvision.models.mnasnet0_5()
    assert same(load("mnasnet0_5", saved(model, tmp_path / "net.safetensors")).model, model)
    assert same(load("mnasnet0_5", saved(nn.DataParallel(model), tmp_path / "net.pth")).model, model)


def test_densenet_weights_may_have_the_old_names(torchvision, tmp_path):
    model = torchvision.models.densenet121()
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    old = {pattern.sub(r"\1.\2.", key): value for key, value in model.state_dict().items()}
    assert old.keys() != model.state_dict().keys()
    torch.save(old, tmp_path / "old.pth")
    assert same(load("densenet121", tmp_path / "old.pth").model, model)


def test_every_torchvision_network_has_a_preprocessing(torchvision):
    api = torchvision.models
    for name in [*api.list_models(api), *api.list_models(api.segmentation)]:
        preset = api.get_model_weights(name).DEFAULT.transforms()
        found = models._preset(preset)
        assert found.mean == tuple(preset.mean), name
        if hasattr(preset, "crop_size"):
            assert found.size == (preset.crop_size[0], preset.crop_size[0]), name
            assert (found.resize, found.short_side) == ("crop", preset.resize_size[0]), name
        else:
            assert (found.resize, found.size) == ("squash", (520, 520)), name
        assert found.interpolation == preset.interpolation.value, name


# fetching


def serve(server, monkeypatch, weights, model, digest=None):
    """Let a torchvision weights entry point to the server."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    path = f"/models/net-{digest or hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    server.served[path] = buffer.getvalue()
    monkeypatch.setattr(weights.value, "url", server.url + path)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_torchvision_weights_are_fetched_once_with_their_preprocessing(
    torchvision, server, monkeypatch, tmp_path, capfd
):
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    model = torchvision.models.resnet18()
    digest = serve(server, monkeypatch, weights, model)
    network = load("resnet18")
    assert same(network.model, model)
    assert not network.model.training
    assert (network.weights, network.weights_sha256) == (weights.url, digest)
    assert network.names == tuple(weights.meta["categories"])
    assert (network.preprocessing.size, network.preprocessing.short_side) == ((224, 224), 256)
    assert network.preprocessing.resize == "crop"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err
    assert [file.name for file in (tmp_path / "home/hub/checkpoints").iterdir()] == [Path(weights.url).name]

    assert load("resnet18").weights_sha256 == digest
    assert len(server.asked) == 1
    assert capfd.readouterr().err == ""


def test_fetched_inception_is_torchvisions_own(torchvision, server, monkeypatch):
    model = torchvision.models.inception_v3(init_weights=False, aux_logits=True)
    serve(server, monkeypatch, torchvision.models.Inception_V3_Weights.DEFAULT, model)
    network = load("inception_v3")
    assert network.model.transform_input
    assert (network.preprocessing.size, network.preprocessing.short_side) == ((299, 299), 342)


def test_what_was_fetched_must_be_what_was_asked_for(torchvision, server, monkeypatch, tmp_path):
    model = torchvision.models.squeezenet1_1()
    serve(server, monkeypatch, torchvision.models.SqueezeNet1_1_Weights.DEFAULT, model, digest="0" * 8)
    assert "invalid hash value" in refused("squeezenet1_1")
    assert list((tmp_path / "home/hub/checkpoints").iterdir()) == []


def test_missing_download_and_missing_network_are_told_apart(torchvision, server, monkeypatch):
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(weights.value, "url", server.url + "/nothing.pth")
    message = refused("resnet18")
    assert "HTTP Error 404" in message
    assert "network" not in message
    assert message.endswith("pass --weights FILE")

    monkeypatch.setattr(weights.value, "url", "http://127.0.0.1:9/net.pth")  # the discard port: nobody listens
    message = refused("resnet18")
    assert message.startswith("could not fetch the weights of resnet18: the network could not be reached")
    assert message.endswith("pass --weights FILE")


def test_damaged_file_in_the_cache_is_named(torchvision, server, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.value, "url", server.url + "/net.pth")
    server.served["/net.pth"] = b"<html>"
    message = refused("resnet18")
    assert str(tmp_path / "home/hub/checkpoints/net.pth") in message
    assert "delete it" in message


# timm


def test_timm_network_with_weights_from_a_file(timm, tmp_path):
    model = timm.create_model("test_resnet")
    network = load("timm:test_resnet", saved(model, tmp_path / "net.safetensors"))
    assert same(network.model, model)
    assert not network.model.training
    assert (network.preprocessing.size, network.preprocessing.short_side) == ((160, 160), 168)  # 160 / 0.95
    assert network.preprocessing.mean == (0.5, 0.5, 0.5)
    assert (network.preprocessing.resize, network.preprocessing.interpolation) == ("crop", "bilinear")
    assert (len(network.names), network.names[243]) == (1000, "bull mastiff")


def test_timm_network_has_as_many_classes_as_the_file(timm, tmp_path):
    model = timm.create_model("test_convnext", num_classes=7).eval()
    network = load("timm:test_convnext", saved(model, tmp_path / "net.pth"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(network.model(images), model(images))
    assert network.names is None


def test_timm_names_of_other_label_sets(timm, tmp_path):
    name = "mobilenetv3_large_100.miil_in21k"
    network = load(f"timm:{name}", saved(timm.create_model(name), tmp_path / "net.pth"))
    assert len(network.names) == network.model.num_classes == 11221
    assert network.names[0] == timm.data.ImageNetInfo("imagenet-21k-miil").label_descriptions()[0]


def test_timm_names_of_the_network_itself(timm, tmp_path, monkeypatch):
    entry = sys.modules["timm.models._registry"]._model_pretrained_cfgs["test_resnet"]
    monkeypatch.setattr(entry, "num_classes", 2)
    monkeypatch.setattr(entry, "label_names", ("n1", "n2"))
    monkeypatch.setattr(entry, "label_descriptions", {"n2": "a two"})
    network = load("timm:test_resnet", saved(timm.create_model("test_resnet", num_classes=2), tmp_path / "net.pth"))
    assert network.names == ("n1", "a two")


def test_every_timm_preprocessing_is_understood_or_refused(timm):
    for name in timm.list_models(include_tags=True):
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        if config["input_size"][0] == 3:
            found = models._timm_preprocessing(config)
            assert found.size == config["input_size"][1:], name
            assert found.resize == ("crop" if config["crop_mode"] == "center" else "squash"), name
            assert found.interpolation == config["interpolation"], name
            if found.resize == "crop":
                assert found.short_side == int(min(found.size) / config["crop_pct"]), name


def test_timm_weights_are_fetched(timm, server, monkeypatch, capfd):
    model = timm.create_model("test_resnet")
    entry = sys.modules["timm.models._registry"]._model_pretrained_cfgs["test_resnet"]
    monkeypatch.setattr(entry, "hf_hub_id", None)
    serve(server, monkeypatch, types.SimpleNamespace(value=entry), model)
    network = load("timm:test_resnet")
    assert same(network.model, model)
    assert network.weights == f"timm's own ({entry.url})"
    assert network.weights_sha256 == sha256(model.state_dict())
    assert capfd.readouterr().out == ""

    monkeypatch.setattr(entry, "url", "http://127.0.0.1:9/other.pth")
    message = refused("timm:test_resnet")
    assert message.startswith("could not fetch the weights of timm:test_resnet: the network could not be reached")
    assert message.endswith("pass --weights FILE")

    monkeypatch.setattr(entry, "url", server.url + "/nothing.pth")
    assert "HTTP Error 404" in refused("timm:test_resnet")


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_an_old_timm_name_is_left_for_timm_to_map(timm, monkeypatch, tmp_path):
    model = timm.create_model("tf_efficientnet_b0.ns_jft_in1k", num_classes=3)
    assert same(load("timm:tf_efficientnet_b0_ns", saved(model, tmp_path / "net.pth")).model, model)

    def create(name, pretrained):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", create)
    message = refused("timm:tf_efficientnet_b0_ns")
    assert "the network could not be reached (ConnectionError: no route)" in message


def test_timm_network_without_weights(timm):
    name = next(name for name in timm.list_models("resnet*") if not timm.is_model_pretrained(name))
    assert refused(f"timm:{name}") == f"timm has no weights for timm:{name}; pass --weights FILE"


# names nobody has


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("resnet5", "resnet50"),
        ("bundle", "bundled"),
        ("bundled_vgg", "bundled-vgg"),
        ("fcn_resnet5", "fcn_resnet50"),
        ("Mobilnet_v2", "mobilenet_v2"),
        ("resnet50.pth", "resnet50"),
    ],
)
def test_unknown_name_comes_with_the_nearest(torchvision, spec, near):
    message = refused(spec)
    assert message.startswith(f"unknown model {spec!r}; the nearest names are")
    assert re.search(rf"\b{near}(,|$)", message)
    assert "timm:" not in message


def test_unknown_name_like_no_other(torchvision):
    assert "path/file.py:factory" in refused("qqqqqqqqqqqq")


@pytest.mark.parametrize(
    ("spec", "near"), [("timm:resnet5", "timm:resnet50"), ("timm:test_resnet.r16", "test_resnet.r160_in1k")]
)
def test_unknown_timm_name_comes_with_the_nearest(timm, spec, near):
    message = refused(spec)
    assert message.startswith(f"unknown model {spec!r}")
    assert near in message


# what the caller says wins


def test_overrides_win():
    network = load("bundled", size=64, mean=[0, 0, 0], std=(1, 1, 1))
    assert network.preprocessing == dataclasses.replace(
        load("bundled").preprocessing, size=(64, 64), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    assert load("bundled", size=(64, 96)).preprocessing.size == (64, 96)


def test_a_crop_of_another_size_takes_the_same_share(timm, tmp_path):
    file = saved(timm.create_model("test_resnet"), tmp_path / "net.pth")
    found = load("timm:test_resnet", file, size=320).preprocessing
    assert (found.size, found.resize, found.short_side) == ((320, 320), "crop", 336)
    found = load("timm:test_resnet", file, resize="squash").preprocessing
    assert (found.size, found.resize, found.short_side) == ((160, 160), "squash", None)


def test_crop_without_a_known_short_side_fills_the_size():
    found = load("bundled", size=(64, 96), resize="crop").preprocessing
    assert (found.resize, found.short_side) == ("crop", 96)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": (1, 2, 3)}, {"mean": (1, 2)}, {"std": (0, 1, 1)}, {"std": "abc"}, {"resize": "fit"}],
)
def test_bad_override_is_a_model_error(change):
    assert refused("bundled", **change).startswith("preprocessing: ")


# the networks of ../shared


@pytest.mark.parametrize(
    ("name", "file"), [("mobilenet_v2", "mobilenet_v2_qat_dequant.pth"), ("squeezenet1_1", "squeezenet1_1_mxnet.pth")]
)
def test_shared_torchvision_weights(torchvision, shared, name, file):
    network = load(name, shared / "weights" / file)
    assert len(network.names) == 1000
    assert network.model(torch.zeros(1, 3, 224, 224)).isfinite().all()


def test_shared_factories(shared):
    weights, factories = shared / "weights", shared / "tools" / "nets.py"
    darknet = load(f"{factories}:tiny_darknet", weights / "tiny_darknet_imagenet.pth", mean=(0, 0, 0), std=(1, 1, 1))
    assert (darknet.preprocessing.mean, darknet.preprocessing.std) == ((0, 0, 0), (1, 1, 1))
    assert darknet.model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    deeplab = load(f"{factories}:deeplab_voc", weights / "deeplabv3_mnv2_voc.pth", size=513)
    assert deeplab.preprocessing.size == (513, 513)
    assert deeplab.model(torch.zeros(1, 3, 65, 65)).shape[:2] == (1, 21)
