import json
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from tsgb import networks, scenes

MAKERS = {"bundled": networks.bundled, "bundled-vgg": networks.bundled_vgg}
FRESH = 7_000_000  # neither trained on nor in the record


@pytest.fixture(scope="module", params=sorted(MAKERS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def fresh():
    return {
        count: [scenes.render(seed, count=count) for seed in range(FRESH + 1000 * count, FRESH + 1000 * count + 200)]
        for count in (1, 2)
    }


def record_of(name):
    return json.loads((resources.files("tsgb") / "weights" / f"{name}.json").read_text())


def share_right(network, images, classes):
    with torch.no_grad():
        best = network(networks.inputs(np.stack(images))).topk(len(classes[0])).indices.tolist()
    return np.mean([set(found) == set(present) for found, present in zip(best, classes, strict=True)])


@pytest.mark.parametrize(("count", "least"), [(1, 0.97), (2, 0.95)])
def test_accuracy_on_fresh_scenes(name, fresh, count, least):
    found = fresh[count]
    assert share_right(MAKERS[name](), [s.image for s in found], [s.classes for s in found]) >= least


def test_accuracy_on_large_scenes_squashed(name):
    found = [scenes.render(seed, count=1, size=384) for seed in range(FRESH, FRESH + 100)]
    small = [np.asarray(Image.fromarray(s.image).resize((128, 128), Image.Resampling.BILINEAR)) for s in found]
    assert share_right(MAKERS[name](), small, [s.classes for s in found]) >= 0.97


def test_loaded_networks_are_ready_to_use(name):
    network = MAKERS[name]()
    assert not any(module.training for module in network.modules())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in network.parameters())
    assert network.names == scenes.CLASSES
    assert network(torch.zeros(2, 3, 128, 128)).shape == (2, 10)
    again = MAKERS[name]().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in network.state_dict().items())


def test_without_pretraining_weights_are_random(name):
    torch.manual_seed(1)
    first = MAKERS[name](pretrained=False)
    second = MAKERS[name](pretrained=False)
    assert not first.training
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_bundled_is_residual_with_one_linear_head():
    network = networks.bundled()
    layers = list(network.modules())
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == 1
    assert any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in layers)
    blocks = [layer for layer in layers if isinstance(layer, networks.Residual)]
    assert {block.conv1.stride for block in blocks} == {(1, 1), (2, 2)}
    plain = blocks[2]
    with torch.no_grad():
        plain.norm2.weight.zero_()
        plain.norm2.bias.zero_()
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(plain(x), x)


def test_bundled_vgg_is_a_plain_chain_with_three_linear_layers():
    network = networks.bundled_vgg()
    leaves = [layer for layer in network.modules() if not list(layer.children())]
    allowed = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear)
    assert all(isinstance(layer, allowed) for layer in leaves)
    assert sum(isinstance(layer, nn.Linear) for layer in leaves) == 3
    x = torch.rand(2, 3, 128, 128)
    assert torch.allclose(nn.Sequential(*leaves)(x), network(x))


def test_inputs_scale_each_channel():
    image = np.zeros((1, 128, 128, 3), dtype=np.uint8)
    image[0, 3, 5] = (0, 51, 255)
    x = networks.inputs(image)
    assert x.shape == (1, 3, 128, 128)
    assert x.dtype == torch.float32
    assert torch.allclose(x[0, :, 3, 5], torch.tensor([-1.0, -0.6, 1.0]))


def test_record_agrees_with_network_and_reaches_the_goal(name):
    record = record_of(name)
    assert record["classes"] == list(scenes.CLASSES)
    assert record["parameters"] == sum(p.numel() for p in MAKERS[name]().parameters())
    assert record["preprocessing"]["mean"] == list(networks.INPUT["mean"])
    assert record["preprocessing"]["std"] == list(networks.INPUT["std"])
    trained = networks.TRAINING_SEEDS
    assert record["training"]["scene_seeds"] == f"{trained.start} to {trained.stop - 1}"
    figures = {(figure["objects"], figure["rendered_at"]): figure for figure in record["held_out"]}
    assert set(figures) == {(1, 128), (2, 128), (1, 384), (2, 384)}
    for (objects, _), figure in figures.items():
        assert figure["scenes"] == 2000
        assert int(figure["scene_seeds"].split(" to ")[1]) < trained.start
        assert figure[f"all_in_top_{objects}"] >= {1: 0.97, 2: 0.95}[objects]


def test_weights_are_small_and_half_precision(name):
    with resources.as_file(resources.files("tsgb") / "weights" / f"{name}.safetensors") as path:
        assert path.stat().st_size <= 2_000_000
        with safe_open(path, framework="pt") as stored:
            dtypes = {stored.get_tensor(key).dtype for key in stored.keys() if "num_batches" not in key}  # noqa: SIM118
    assert dtypes == {torch.float16}
