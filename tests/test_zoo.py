"""A sample of the zoo, `benchmarks/zoo.py`, which asks the same of all networks."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "zoo.py"


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIDE = 64  # half the pixels, for time
    return module


SAMPLE = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
SAMPLE += [f"timm/test_{name}" for name in ("byobnet", "convnext", "efficientnet_gn", "mambaout", "nfnet", "resnet")]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name, zoo):
    row = zoo.row(name)
    assert not row.failures
    assert not row.refusal
    assert row.compiled == "same"


def test_a_vision_transformer_is_refused(zoo):
    row = zoo.row("timm/test_vit")
    assert row.refusal == "refused: attention"
    assert not row.failures


class Wrong(nn.Module):
    """A network that the zoo has to find fault with."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.conv, self.head = fault, nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(1))
        self.eval()

    def forward(self, x):
        if self.fault == "state":
            self.seen.add_(1)
        x = functional.relu(self.conv(x))
        if self.fault == "batch":
            x = x - x.mean(0, keepdim=True) + torch.cos(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("fault", "words"), [("", ""), ("state", "weights or modes changed"), ("batch", "FUSED: no rule for cos")]
)
def test_the_zoo_finds_fault(fault, words, zoo):
    result = zoo.Row("wrong")
    zoo.check(Wrong(fault), torch.rand(2, 3, 12, 12), result)
    assert bool(result.failures) == bool(fault)
    assert words in "; ".join(result.failures)
    if fault == "batch":
        assert any("alone" in failure for failure in result.failures)
