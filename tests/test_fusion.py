"""The competition of classes and the fusion of depths, against twins written out in loops."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tsgb.fusion import Fusion, competition_gate, fuse_depths, fused_map

SMALL = Fusion(side=6, octaves=3, reach=1.3, radius=2)
CASES = {
    "1d": ([(5,), (9,), (30,)], (23,), 3),
    "2d": ([(1, 2), (2, 2), (4, 4), (6, 6), (12, 12), (13, 12)], (11, 11), 3),
    "one position": ([(1, 1), (3, 3)], (9, 9), 1),
    "wide": ([(2, 4), (4, 8), (8, 16)], (10, 20), 2),
    "five channels": ([(3, 3), (7, 7)], (8, 8), 5),
    "many channels": ([(3, 3), (7, 7)], (8, 8), 6),
    "finer and coarser": ([(3, 3), (3, 13)], (8, 8), 1),
    "small image": ([(2, 2), (4, 4)], (4, 4), 3),
    "3d": ([(2, 3, 3), (4, 6, 6)], (5, 7, 7), 2),
}


def draw(sizes, size, channels, classes=2, images=2, sign=0.0):
    """Fields of which each size comes twice, evidence for and against, and images, in float64."""
    fields = [torch.randn(classes, images, *s, dtype=torch.float64) + sign for s in sizes for _ in range(2)]
    evidence = torch.rand(2, classes, images, dtype=torch.float64)
    return fields, torch.stack([evidence[0], -evidence[1]]), torch.randn(images, channels, *size, dtype=torch.float64)


# the twins


def slow_gate(evidence, requested, fusion):
    gate = torch.zeros(requested, *evidence.shape[1:], dtype=evidence.dtype).flatten(2)
    rows = evidence.flatten(2).double().numpy()
    count = rows.shape[2]
    for k, n in itertools.product(range(requested), range(rows.shape[1])):
        weights = [np.clip(1 - corr(rows[r, n], rows[k, n]) / fusion.alike, 0, 1) for r in range(requested, len(rows))]
        for p in range(count):
            own, *others = (math.exp(count * rows[r, n, p]) for r in (k, *range(requested, len(rows))))
            share = own / (own + sum(w * other for w, other in zip(weights, others, strict=True)))
            gate[k, n, p] = fusion.floor + (1 - fusion.floor) * share
    return gate.reshape(requested, *evidence.shape[1:])


def corr(a, b):
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt((a * a).sum() * (b * b).sum())
    return (a * b).sum() / size if size else 0.0


def slow_fused(fields, evidence, image, fusion):
    classes, images = fields[0].shape[:2]
    out = torch.zeros(classes, images, *image.shape[2:], dtype=torch.float64)
    for k, n in itertools.product(range(classes), range(images)):
        speaks_for, against = evidence[:, k, n].tolist()
        sign = 1 if speaks_for > 0 else -1
        found = sign * slow_depths([sign * f[k, n].numpy() for f in fields], image[n].numpy(), fusion)
        raised = speaks_for / max(found.clip(min=0).sum(), 1e-30)
        lowered = abs(against) / max(abs(found.clip(max=0).sum()), 1e-30)
        if raised > 0:
            lowered = min(raised, lowered)
        out[k, n] = torch.from_numpy(np.where(found > 0, found * raised, found * lowered))
    return out


def slow_depths(fields, image, fusion):
    """The map (size) of the fields of one class and image."""
    size = image.shape[1:]
    scale = fusion.side / math.prod(size) ** (1 / len(size))
    grid = [max(1, round(n * scale)) for n in size]
    octaves = {}
    for field in fields:
        octave = max(0, math.ceil(math.log2(math.prod(grid) / field.size) / len(grid)))
        octaves[octave] = octaves.get(octave, 0) + slow_resized(field, grid) * field.size
    octaves = {octave: octaves[octave] for octave in sorted(octaves)[-fusion.octaves :]}
    if max(field.max() for field in octaves.values()) <= 0:
        return -slow_depths([-field for field in fields], image, fusion)
    total = over_largest(sum(over_largest(field) for field in octaves.values()))
    around = slow_smoothed(total.clip(min=0), lambda x: math.erf(x / fusion.reach / 2**0.5) / 2)
    value = total + fusion.halo * over_largest(around)
    if len(image) > 2 * fusion.radius + 1:
        image = image.mean(0, keepdims=True)
    slopes, offset = slow_fit(value, np.stack([slow_resized(channel, grid) for channel in image]), fusion)
    factor = 1 + total.clip(min=0)
    guided = slow_resized(offset * factor, size)
    for slope, channel in zip(slopes, image, strict=True):
        guided = guided + slow_resized(slope * factor, size) * channel
    return np.maximum(guided, slow_resized(value.clip(max=0) * factor, size))


def slow_fit(value, image, fusion):
    """Ridge regression on the standardised channels in each window, then means over the windows, by loops."""
    middle = image.reshape(len(image), -1).mean(1)
    spread = image.reshape(len(image), -1).std(1)
    flat = (1,) * value.ndim
    colors = (image - middle.reshape(-1, *flat)) / spread.reshape(-1, *flat)
    reach = range(-fusion.radius, fusion.radius + 1)

    def window(p):
        offsets = itertools.product(reach, repeat=value.ndim)
        return [tuple(min(max(a + o, 0), n - 1) for a, o, n in zip(p, at, value.shape, strict=True)) for at in offsets]

    fits = np.zeros((len(image) + 1, *value.shape))
    for p in np.ndindex(value.shape):
        x = np.array([[color[q] for color in colors] for q in window(p)])
        y = np.array([value[q] for q in window(p)])
        cov = (x - x.mean(0)).T @ (x - x.mean(0)) / len(y) + fusion.noise * np.eye(len(image))
        a = np.linalg.solve(cov, (x - x.mean(0)).T @ (y - y.mean()) / len(y))
        fits[:, *p] = [*a, y.mean() - a @ x.mean(0)]
    means = np.zeros_like(fits)
    for p in np.ndindex(value.shape):
        means[:, *p] = np.mean([fits[:, *q] for q in window(p)], axis=0)
    slopes = means[:-1] / spread.reshape(-1, *flat)
    return slopes, means[-1] - (slopes * middle.reshape(-1, *flat)).sum(0)


def slow_smoothed(map, cumulative):
    """Along each dimension the mean of the neighbors, by the integral of the window over each; the border goes on."""

    def smooth(line):
        reach = range(-8 * len(line) - 8, 8 * len(line) + 9)
        weights = [cumulative(o + 0.5) - cumulative(o - 0.5) for o in reach]
        at = [[min(max(i + o, 0), len(line) - 1) for o in reach] for i in range(len(line))]
        return np.array([sum(w * line[j] for w, j in zip(weights, row, strict=True)) for row in at])

    for axis in range(map.ndim):
        map = np.apply_along_axis(smooth, axis, map)
    return map


def slow_resized(map, size):
    is_finer = all(n >= m for n, m in zip(map.shape, size, strict=True))
    for axis, count in enumerate(size):
        map = np.apply_along_axis(area if is_finer else linear, axis, map, count)
    return map


def area(line, count):
    n = len(line)
    return np.array([line[i * n // count : -(-(i + 1) * n // count)].mean() for i in range(count)])


def linear(line, count):
    n = len(line)
    places = [max((i + 0.5) * n / count - 0.5, 0) for i in range(count)]
    return np.array([line[int(x)] * (1 - x % 1) + line[min(int(x) + 1, n - 1)] * (x % 1) for x in places])


def over_largest(map):
    return map / map.max() if map.max() > 0 else 0 * map


# the formulas


@pytest.mark.parametrize(("positions", "rivals"), [((9,), 4), ((3, 4), 3), ((2, 3, 2), 2), ((1, 1), 2)])
def test_the_gate_is_its_formula(positions, rivals):
    evidence = torch.randn(2 + rivals, 2, *positions, dtype=torch.float64) + 0.3
    evidence[2] = evidence[0] * 1.5 + 0.1 * torch.randn(2, *positions)  # a sibling
    for fusion in (Fusion(), Fusion(alike=0.9, floor=0.1)):
        torch.testing.assert_close(
            competition_gate(evidence, 2, fusion), slow_gate(evidence, 2, fusion), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sign", [0.0, 0.7, -9.0])
def test_the_map_is_its_formula(case, sign):
    fields, evidence, image = draw(*CASES[case], sign=sign)
    evidence[0, 1, 0] = 0  # all evidence is against this class
    fusion = replace(SMALL, radius=1, side=4) if case == "3d" else SMALL
    found, expected = fused_map(fields, evidence, image, fusion), slow_fused(fields, evidence, image, fusion)
    assert expected.flatten(2).any(2).sum() >= 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_every_number_counts():
    fields, evidence, image = draw(*CASES["2d"])
    before = fused_map(fields, evidence, image, SMALL)
    for name in ("side", "octaves", "halo", "reach", "radius", "noise"):
        changed = fused_map(fields, evidence, image, replace(SMALL, **{name: getattr(SMALL, name) * 2}))
        assert (changed - before).abs().max() > 1e-4 * before.abs().max(), name
    rows = torch.randn(6, 1, 3, 3)
    for name in ("alike", "floor"):
        changed = competition_gate(rows, 2, replace(SMALL, **{name: getattr(SMALL, name) * 1.5}))
        assert (changed - competition_gate(rows, 2, SMALL)).abs().max() > 1e-3, name


# the gate


def test_the_gate_closes_where_a_rival_claims_and_not_for_siblings():
    left, right = torch.tensor([[[9.0, 0, 0, 0]]]), torch.tensor([[[0, 0, 0, 9.0]]])
    gate = competition_gate(torch.cat([left, left * 2, right]), 1, Fusion())[0, 0]
    assert gate[0] > 0.99
    assert gate[3] < Fusion().floor + 0.01
    assert torch.equal(competition_gate(torch.cat([left, left]), 1, Fusion()), torch.ones_like(left))


def test_the_gate_of_classes_together_is_that_of_each_alone():
    rows = torch.randn(3 + 5, 4, 3, 3, dtype=torch.float64)
    together = competition_gate(rows, 3, Fusion())
    for k in range(3):
        alone = competition_gate(torch.cat([rows[k : k + 1], rows[3:]]), 1, Fusion())
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-12)
    order, images = torch.tensor([2, 0, 1]), torch.tensor([3, 1])
    permuted = competition_gate(torch.cat([rows[order], rows[3:].flip(0)])[:, images], 3, Fusion())
    torch.testing.assert_close(permuted, together[order][:, images], rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 3e4])
def test_the_gate_of_flat_evidence_is_the_softmax(value):
    rows = torch.full((4, 1, 7, 7), value) * torch.tensor([1.0, 0.1, 0.2, 0.3])[:, None, None, None] ** (value > 0)
    gate = competition_gate(rows, 1, Fusion())
    assert gate.isfinite().all()
    torch.testing.assert_close(gate, competition_gate(rows.double(), 1, Fusion()).float(), rtol=1e-4, atol=1e-5)


# the map


def test_maps_of_classes_and_images_together_are_those_of_each_alone():
    fields, evidence, image = draw(*CASES["2d"], classes=3, images=3)
    together = fused_map(fields, evidence, image, SMALL)
    for k, n in itertools.product(range(3), range(3)):
        alone = fused_map(
            [f[k : k + 1, n : n + 1] for f in fields], evidence[:, k : k + 1, n : n + 1], image[n : n + 1], SMALL
        )
        torch.testing.assert_close(together[k : k + 1, n : n + 1], alone, rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 1])
    permuted = fused_map(
        [f[order][:, order] for f in fields[::-1]], evidence[:, order][:, :, order], image[order], SMALL
    )
    torch.testing.assert_close(permuted, together[order][:, order], rtol=0, atol=1e-12)


def test_classes_in_chunks(monkeypatch):
    fields, evidence, image = draw(*CASES["2d"], classes=5)
    whole = fused_map(fields, evidence, image, SMALL)
    monkeypatch.setattr("tsgb.fusion._CHUNK", 500)
    torch.testing.assert_close(fused_map(fields, evidence, image, SMALL), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-9, 7.0, 1e9])
def test_the_scale_of_the_fields_and_of_the_channels_does_not_count(factor):
    fields, evidence, image = draw(*CASES["wide"])
    before = fused_map(fields, evidence, image, SMALL)
    scaled = fused_map([f * factor for f in fields], evidence, image * torch.tensor([factor, 1])[:, None, None], SMALL)
    torch.testing.assert_close(scaled, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused_map(fields, evidence * factor, image, SMALL), before * factor)


def test_positive_values_sum_to_the_evidence_and_negative_ones_to_no_more():
    fields, evidence, image = draw(*CASES["2d"])
    found = fused_map(fields, evidence, image, SMALL)
    torch.testing.assert_close(found.clamp(min=0).sum((2, 3)), evidence[0])
    assert (found.clamp(max=0).sum((2, 3)) >= evidence[1] - 1e-9).all()
    evidence[0] = 0
    found = fused_map([-f.abs() for f in fields], evidence, image, SMALL)
    assert (found <= 0).all()
    torch.testing.assert_close(found.sum((2, 3)), evidence[1])


def test_channels_share_each_pixel():
    fields, evidence, image = draw(*CASES["2d"])
    image[0, :, 3, 4] = 0
    found = fused_map(fields, evidence, image, SMALL, per_channel=True)
    total = fused_map(fields, evidence, image, SMALL)
    assert found.shape == (2, 2, 3, 11, 11)
    torch.testing.assert_close(found.sum(2), total)
    torch.testing.assert_close(found[:, 0, :, 3, 4], (total[:, 0, None, 3, 4] / 3).expand(-1, 3))
    torch.testing.assert_close(found[:, 1, 0] * image[1, 1].abs(), found[:, 1, 1] * image[1, 0].abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("image", [0.0, 1e-30, 1.0, -250.3])
def test_images_of_one_color_guide_nothing(dtype, image):
    fields, evidence, _ = draw(*CASES["2d"])
    fields, evidence = [f.to(dtype) for f in fields], evidence.to(dtype)
    found = fused_map(fields, evidence, torch.full((2, 3, 11, 11), image, dtype=dtype), SMALL, per_channel=True)
    plain = fused_map(fields, evidence, torch.zeros(2, 3, 11, 11, dtype=dtype), SMALL, per_channel=True)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_fields_make_a_zero_map(dtype):
    fields, evidence, image = draw(*CASES["2d"])
    zeros = [torch.zeros_like(f, dtype=dtype) for f in fields]
    assert not fused_map(zeros, evidence.to(dtype), image.to(dtype), SMALL).any()
    assert not fused_map([f.to(dtype) for f in fields], evidence.to(dtype) * 0, image.to(dtype), SMALL).any()


def test_float32_is_float64():
    fields, evidence, image = draw([(7, 7), (14, 14), (28, 28)], (56, 56), 3)
    expected = fused_map(fields, evidence, image, Fusion())
    found = fused_map([f.float() for f in fields], evidence.float(), image.float(), Fusion())
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_an_edge_of_the_image_bounds_the_map():
    image = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    image[..., 21:] = 1
    field = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    field[..., 3:] = 1  # from pixel 24 on
    found = fuse_depths([field], image, Fusion(halo=0.0))[0, 0, 32]
    blurred = fuse_depths([field], torch.zeros_like(image), Fusion(halo=0.0))[0, 0, 32]
    assert found[21] - found[20] > 0.4 > 0.3 > blurred.diff().max()


def test_what_makes_no_map():
    fields, evidence, image = draw(*CASES["2d"])
    assert fused_map(fields, None, image, SMALL) is None
    assert fused_map([], evidence, image, SMALL) is None
    assert fused_map(fields, evidence[:, :, :1], image, SMALL) is None
    tokens, others = torch.randn(2, 2, 9, dtype=torch.float64), torch.randn(2, 7, 3, 3, dtype=torch.float64)
    assert torch.equal(
        fused_map([tokens, others, *fields], evidence, image, SMALL), fused_map(fields, evidence, image, SMALL)
    )
    with pytest.raises(ValueError, match="at least one field"):
        fuse_depths([], image, SMALL)


def test_elongated_images_have_a_bounded_grid():
    for size in ((3, 3000), (4, 30, 30), (1, 1, 500)):
        fields = [torch.rand(1, 1, *(max(1, n // 2) for n in size))]
        assert fuse_depths(fields, torch.rand(1, 1, *size), Fusion(side=16)).shape == (1, 1, *size)


# what it costs


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        if not (returned and returned[0].alias_info) and func is not torch.ops.aten._unsafe_view.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_few_calls_and_none_that_waits_for_the_device():
    sizes = [(n, n) for n, count in ((112, 5), (56, 8), (28, 10), (14, 20), (7, 9)) for _ in range(count)]
    fields = [torch.randn(1, 1, *size) for size in sizes]
    rows, evidence, image = torch.randn(21, 1, 7, 7), torch.ones(2, 1, 1), torch.randn(1, 3, 224, 224)
    with Calls() as calls:
        competition_gate(rows, 1, Fusion())
        fused_map(fields, evidence, image, Fusion())
    assert len(calls.names) <= 160
    assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name or "linalg" in name]


def test_it_can_be_traced():
    fields, evidence, image = draw(*CASES["2d"])
    graph = make_fx(lambda *x: fused_map(x[:-2], *x[-2:], SMALL))(*fields, evidence, image)
    fields, evidence, image = draw(*CASES["2d"], sign=-9)
    torch.testing.assert_close(graph(*fields, evidence, image), fused_map(fields, evidence, image, SMALL))
    rows = torch.randn(5, 1, 3, 3)
    assert torch.equal(
        make_fx(lambda x: competition_gate(x, 2, SMALL))(rows)(rows * 2), competition_gate(rows * 2, 2, SMALL)
    )
