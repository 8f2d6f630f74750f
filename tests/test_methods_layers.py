"""Where the last features lie, in networks of all the libraries."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from tsgb import vision
from tsgb.methods.layers import Place, last_features, twice_as_large


@pytest.fixture(scope="module")
def torchvision():
    try:
        return vision.import_torchvision()
    except vision.ModelError as error:
        pytest.skip(str(error))


def named(model, size=64):
    """The name on the meta device, which has shapes and no numbers."""
    return last_features(model.eval(), torch.zeros(1, 3, size, size, device="meta"))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer4"),
        ("resnet50", "layer4"),
        ("vgg11", "features"),
        ("vgg16_bn", "features"),
        ("squeezenet1_1", "features"),
        ("mobilenet_v2", "features"),
        ("mobilenet_v3_large", "features"),
        ("densenet121", "features"),
        ("efficientnet_b0", "features"),
        ("convnext_tiny", "features"),
        ("shufflenet_v2_x1_0", "conv5"),
        ("googlenet", "inception5b"),
    ],
)
def test_torchvision(torchvision, name, expected):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(**({"init_weights": False} if name == "googlenet" else {}))
    assert named(model) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", "layer4"), ("mobilenetv3_small_050", "blocks"), ("convnext_atto", "stages"), ("vgg11", "features")],
)
def test_timm(torchvision, name, expected):
    timm = pytest.importorskip("timm", reason="the network is timm's")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert named(model, 224 if name == "vgg11" else 64) == expected


def test_networks_of_shared(shared, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(shared / "tools"), *sys.path])
    import nets

    with torch.device("meta"):
        darknet, deeplab = nets.tiny_darknet(), nets.deeplab_voc()
    assert named(darknet) == "features"
    assert named(deeplab, 65) == "proj"


def test_bundled_networks():
    for name, expected, place in (
        ("bundled", "blocks", Place("blocks.2", 0, (16, 16))),
        ("bundled-vgg", "features", Place("features.24", 0, (8, 8))),
    ):
        model, images = tsgb.load(name).model, torch.zeros(1, 3, 128, 128)
        assert last_features(model, images)[0] == expected
        assert twice_as_large(model, images) == place


class Shared(nn.Module):
    """One ReLU for all, pooling as functions, the head in a container with pooling and dropout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.drop = nn.ReLU(), nn.Dropout2d()
        self.classifier = nn.Sequential(nn.Identity(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = functional.max_pool2d(x, 2)
        return self.classifier(self.drop(self.relu(self.conv2(x))))


def test_of_a_module_used_twice_the_call_is_told():
    model, images = Shared().eval(), torch.rand(2, 3, 16, 16)
    assert last_features(model, images)[0] == "relu"
    assert twice_as_large(model, images) == Place("relu", 0, (16, 16))


def test_only_the_image_may_be_twice_as_large():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    assert last_features(model, torch.zeros(1, 3, 16, 16))[0] == "0"
    assert twice_as_large(model, torch.zeros(1, 3, 16, 16)) is None


def test_a_head_that_is_used_twice_is_none_of_its_own_features():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.head(self.head(self.body(x))).mean((2, 3))

    assert last_features(Twice().eval(), torch.zeros(1, 3, 8, 8))[0] == "body"


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)),
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 16, 3)),
        nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()),
    ],
    ids=["vector", "pooling alone", "head alone"],
)
def test_a_model_without_features_is_refused(model):
    with pytest.raises(ValueError, match="no module below its head whose output is a map"):
        last_features(model.eval(), torch.zeros(1, 3, 8, 8))


def test_the_image_is_not_written_to():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    images = -torch.ones(1, 3, 8, 8)
    assert last_features(model, images)[0] == "1"
    assert (images == -1).all()


def test_the_model_is_left_clean_where_it_fails():
    def fail(x):
        raise LookupError("broken")

    model = Shared().eval()
    model.drop.forward = fail
    with pytest.raises(LookupError):
        last_features(model, torch.zeros(1, 3, 16, 16))
    assert not any(module._forward_hooks for module in model.modules())
