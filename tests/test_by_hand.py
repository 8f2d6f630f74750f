"""The method in one file of plain torch, `examples/by_hand.py`, has the maps of the table PAPER."""

import ast
import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tsgb
from tsgb import models, vision

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "examples" / "by_hand.py"
NAMES = ["resnet18", "vgg11_bn", "mobilenet_v2"]


@pytest.fixture(scope="module")
def by_hand():
    return runpy.run_path(str(FILE))


def torchvision():
    try:
        return vision.import_torchvision()
    except models.ModelError:
        pytest.skip("needs torchvision, an extra")


def network(name):
    """Random weights and plausible statistics, drawn in the order of the golden networks."""
    torch.manual_seed(0)
    model = torchvision().models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model


def relative(maps, expected):
    return float((maps - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_by_hand_is_paper(name, by_hand):
    model = network(name).double()
    images, targets = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([3, 7])
    for f in (1.0, 0.75):
        expected = tsgb.explain(model, images, targets, rules=tsgb.rules.PAPER, f=f).maps
        assert relative(by_hand["tsgb_map"](model, images, targets, f), expected) < 1e-9
    one = by_hand["tsgb_map"](model, images, 3)
    assert relative(one, tsgb.explain(model, images, 3, rules=tsgb.rules.PAPER).maps) < 1e-9


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_by_hand_is_the_authors_map(name, by_hand, shared):
    golden = np.load(shared / "golden" / f"random_{name}_authors.npz")
    model = network(name)
    images = torch.randn(1, 3, 224, 224)
    for target in (3, 7):
        expected = torch.tensor(golden[f"target_{target}"])
        assert relative(by_hand["tsgb_map"](model, images, target), expected) < 1e-4


class Pooled(nn.Module):
    """Grouped and dilated convolutions, average pooling over windows, a gate on a vector, a hidden linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(True))
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4), nn.AvgPool2d(3, 2, 1))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.linear = nn.Sequential(nn.Linear(8, 32), nn.ReLU(True), nn.Linear(32, 5))

    def forward(self, x):
        x = self.grouped(self.stem(x))
        x += 0.5
        return self.linear((x * self.gate(x)).mean((2, 3)))


def test_by_hand_is_paper_on_what_the_three_networks_lack(by_hand):
    model, images = Pooled().eval().double(), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    expected = tsgb.explain(model, images, 2, rules=tsgb.rules.PAPER).maps
    assert relative(by_hand["tsgb_map"](model, images, 2), expected) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_untouched(name, by_hand):
    model = network(name)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    images = torch.randn(2, 3, 64, 64)
    state, given = copy.deepcopy(model.state_dict()), images.clone()
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        logits = model(images)
        by_hand["tsgb_map"](model, images, 3)
        assert torch.equal(model(images), logits)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    first, *others = model.parameters()
    assert bool((first.grad == 1).all())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in others)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(images, given)
    assert not images.requires_grad


def test_what_it_does_not_cover_is_refused(by_hand):
    image = torch.randn(1, 3, 8, 8)
    convolution_head = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    on_positions = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.Flatten(), nn.Linear(15, 4)).eval()
    for model, message in [
        (convolution_head, "no linear layer"),
        (on_positions, r"vectors \(N, C\)"),
        (Pooled().train(), "eval mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_hand["tsgb_map"](model, image, 1)


def test_it_is_short_and_imports_torch_alone():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 200
    statements = ast.parse(text).body
    imported = {
        name.partition(".")[0]
        for statement in statements
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in statement.names] if isinstance(statement, ast.Import) else [statement.module])
    }
    assert imported == {"argparse", "torch"}
    inside = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert {node.module.partition(".")[0] for node in inside} == {"torch", "torchvision"}


def test_the_method_quotes_it():
    """The page's first section shows the equations beside this very code."""
    section = (ROOT / "docs" / "method.md").read_text().split("\n## ")[1]
    quotes = [part.split("```")[0] for part in section.split("```python\n")[1:]]
    own = FILE.read_text()
    assert len(quotes) >= 3
    for quote in quotes:
        assert quote.strip("\n") in own


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """The weights that torchvision would fetch are random ones, already in its cache."""
    vision_models = torchvision().models
    model = network("resnet18")
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / Path(vision_models.ResNet18_Weights.DEFAULT.url).name)
    Image.fromarray(tsgb.scenes.render(5, [1, 3]).image).save(tmp_path / "scene.png")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "map.png"
    monkeypatch.setattr(sys, "argv", ["by_hand.py", str(tmp_path / "scene.png"), "--target", "1", "--out", str(out)])
    runpy.run_path(str(FILE), run_name="__main__")
    assert capsys.readouterr().out == f"{out}: the evidence for goldfish\n"
    map = Image.open(out)
    assert map.size == (224, 224)
    assert map.getextrema()[0] == (0, 255)
