"""The maps are those that the package made before, see golden/freeze.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tsgb
from golden.frozen_networks import NAMES, PROJECTIONS, build, kept
from golden.frozen_photographs import NETWORKS, TABLES, off, photographs, trained

GOLDEN = Path(__file__).parent / "golden"
CLOSE = 1e-6  # of the map's norm


@pytest.fixture(scope="module")
def frozen():
    with np.load(GOLDEN / "frozen.npz") as archive:
        return dict(archive)


def table(name):
    """A table by the name it has in the archive; FUSED is the default where it has no name of its own yet."""
    return getattr(tsgb.rules, name, None) or tsgb.rules.DEFAULT


@pytest.mark.parametrize("network", NAMES)
def test_maps_are_as_they_were(network, frozen):
    try:
        model, inputs, *targets = build(network)
    except ImportError as error:
        pytest.skip(f"needs the library that has the network: {error}")
    wrong = []
    for name in ("PAPER", "PIXELS", "FUSED"):
        for target, then in zip(targets, frozen.get(f"{network}/{name}", ()), strict=False):
            now = kept(tsgb.explain(model, inputs, target, rules=table(name)).maps)
            assert now.shape == then.shape
            off = np.abs(now - then) / then[0]
            if not off.max() <= CLOSE:
                count = len(target[0]) if isinstance(target, torch.Tensor) else "a function"
                parts = {
                    "norm": off[0],
                    "projections": off[1 : 1 + PROJECTIONS].max(),
                    "map": off[1 + PROJECTIONS :].max(),
                }
                wrong.append(f"{name}, {count}: " + ", ".join(f"{part} {value:.1e}" for part, value in parts.items()))
    assert not wrong


def test_the_archive_has_all_networks(frozen):
    assert {key.partition("/")[0] for key in frozen} == set(NAMES)
    assert all(np.isfinite(row).all() and (row[:, 0] > 0).all() for row in frozen.values())


@pytest.mark.parametrize("network", NETWORKS)
def test_float32_is_as_far_off_as_it_was(network, shared):
    try:
        model = trained(network, shared)
    except ValueError as error:
        pytest.skip(f"needs the library that has the network: {error}")
    then = json.loads((GOLDEN / "frozen_float32.json").read_text())
    images = photographs(shared)
    assert [name for name, _ in images] == then["photographs"]
    for name in TABLES:
        now = [off(model, network, image, getattr(tsgb.rules, name)) for _, image in images]
        before = then["off"][f"{network}/{name}"]
        if name == "DEFAULT":  # which is another map since: what rounding turns over has moved no map by more
            assert max(now) <= 2e-4, (name, now)
            continue
        assert np.median(now) <= 2 * before["median"], (name, now)
        # The farthest ones are those where rounding turns a ReLU or a pooling over: which, torch's kernels decide.
        assert max(now) <= 10 * before["max"], (name, now)
