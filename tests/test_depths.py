"""The map of all depths: where classes compete, and what the fields of the convolutions make together."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

import plain
import plain_maps
import tsgb
from tsgb import passes, rules
from tsgb.backprop import relevance
from tsgb.metrics import order
from tsgb.rules.grids import painted, planes
from tsgb.vision import import_torchvision

DEFAULT = rules.DEFAULT


def guided_filter(maps, image, radius, epsilon):
    return painted(planes(maps, image, radius, epsilon), image)


@pytest.mark.parametrize("asked", [1, 3])
def test_rivalry_is_its_twin(asked):
    torch.manual_seed(asked)
    evidence = torch.randn(asked + 5, 2, 4, 3, dtype=torch.float64)
    evidence[-1] = 2 * evidence[0]  # a sibling
    for options in ({}, {"alike": 0.1, "temperature": 1.5, "floor": 0.0}):
        expected = plain_maps.rivalry(evidence, asked, **options)
        assert torch.allclose(rules.rivalry(evidence, asked, **options), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_tells_no_siblings_apart(dtype):
    """A network whose features are the same everywhere has evidence that differs by its last digits alone."""
    evidence = torch.tensor([0.3, 0.7, -0.2])[:, None, None, None].to(dtype).expand(3, 1, 7, 7)
    exact = rules.rivalry(evidence, 1)
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        digits = torch.finfo(dtype).eps * torch.randint(-1, 2, evidence.shape, generator=draw)
        assert torch.allclose(rules.rivalry(evidence * (1 + digits), 1), exact, rtol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ([(5, 4), (9, 8), (9, 8), (3, 2)], (18, 16)),
        ([(1, 1)], (6, 6)),
        ([(40, 36), (10, 9)], (40, 36)),
        ([(66, 72), (17, 18)], (33, 36)),  # a grid of its own, and coarser than the finest field
        ([(66, 72), (35, 37), (22, 23), (22, 40)], (33, 36)),  # finer than the grid, the grid, and neither
    ],
)
def test_depths_is_its_twin(sizes, size):
    torch.manual_seed(0)
    fields = [torch.randn(2, 1, *s, dtype=torch.float64) for s in sizes]
    fields[0][0] = -fields[0][0].abs()
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    claims = [torch.rand(2, 2, 1, *s, dtype=torch.float64) for s in (sizes[-1], (2, 3))]
    claims[0][0, 1] = claims[1][0, 1] = 0  # a class without any
    for held in ((), claims[:1], claims) if max(size) < 30 else (claims,):  # the twin takes its time
        expected = plain_maps.depths(fields, image, held)
        assert torch.allclose(rules.depths(fields, image, held), expected, atol=1e-10)


@pytest.mark.parametrize("asked", [1, 3])
def test_claims_are_their_twin(asked):
    torch.manual_seed(asked)
    evidence = torch.randn(asked + 5, 2, 4, 3, dtype=torch.float64) / 4
    evidence[-1] = 2 * evidence[0]  # a sibling
    gate = rules.rivalry(evidence, asked)
    found = rules.claims(evidence, gate)
    assert torch.allclose(found, plain_maps.claims(evidence, asked, gate), atol=1e-12)
    assert all(held.any() for held in found)


@pytest.mark.parametrize(
    ("channels", "grid", "size"), [(3, (6, 7), (12, 14)), (1, (5, 5), (5, 5)), (6, (4, 9), (9, 20))]
)
def test_the_guided_filter_is_its_twin(channels, grid, size):
    torch.manual_seed(0)
    maps, image = torch.randn(2, 2, *grid).double(), 100 + 30 * torch.rand(2, channels, *size).double()
    found = guided_filter(maps, image, 1, 0.05)
    for k in range(2):
        for n in range(2):
            expected = plain_maps.guided_filter(maps[k, n], image[n], 1, 0.05)
            assert torch.allclose(found[k, n], expected, atol=1e-10)


def test_the_guided_filter_in_one_and_three_dimensions():
    torch.manual_seed(0)
    line, image = torch.rand(1, 1, 9), torch.rand(1, 2, 18)
    # A plane whose rows are all the same is a line; so is a block.
    expected = guided_filter(line, image, 2, 0.02)
    plane = guided_filter(line[..., None, :].expand(1, 1, 5, 9), image[..., None, :].expand(1, 2, 10, 18), 2, 0.02)
    block = guided_filter(
        line[..., None, None, :].expand(1, 1, 5, 4, 9), image[..., None, None, :].expand(1, 2, 10, 8, 18), 2, 0.02
    )
    assert torch.allclose(plane, expected[..., None, :].expand_as(plane), atol=1e-4)
    assert torch.allclose(block, expected[..., None, None, :].expand_as(block), atol=1e-4)


def test_an_image_of_one_colour_guides_nothing():
    torch.manual_seed(0)
    maps = torch.rand(1, 1, 8, 8)
    expected = guided_filter(maps, torch.zeros(1, 3, 16, 16), 1, 0.02)
    assert torch.isfinite(expected).all()
    for colour in (0.1, 0.7, 255.0):
        found = guided_filter(maps, torch.full((1, 3, 16, 16), colour), 1, 0.02)
        assert torch.allclose(found, expected, atol=1e-3)


def test_the_map_keeps_to_the_edges_of_the_image():
    image, field = torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 16, 16)
    image[..., 22:41, 19:45] = 1  # the borders are not those of the field's positions
    field[..., 6:10, 5:11] = 1
    inside = image[0, 0] > 0
    found = rules.depths([field], image)[0, 0]
    assert order.average_precision(found[None], inside[None]) > 0.99


def test_what_is_nearer_to_a_rival_ranks_last():
    field, own, theirs = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    field[..., 8, 2] = own[..., 4, 1] = theirs[..., 4, 6] = 1
    image = torch.zeros(1, 3, 32, 32)
    with_rival = rules.depths([field], image, [torch.stack([own, theirs])])[0, 0]
    alone = rules.depths([field], image, [torch.stack([own, torch.zeros_like(own)])])[0, 0]
    assert with_rival[:, :13].min() > with_rival[:, 20:].max()
    assert alone[:, 20:].mean() > with_rival[:, 20:].mean()


def test_fields_finer_than_the_grid_count_as_one():
    torch.manual_seed(0)
    fine, grid, coarse = torch.rand(1, 1, 128, 128), torch.rand(1, 1, 64, 64), torch.rand(1, 1, 8, 8)
    sums = torch.nn.functional.avg_pool2d(fine, 2) * 4
    image = torch.rand(1, 3, 64, 64)
    found = rules.depths([fine, grid, coarse], image)
    assert torch.allclose(found, rules.depths([sums + grid, coarse], image), atol=1e-5)
    assert not torch.allclose(found, rules.depths([grid, coarse], image), atol=1e-2)


def test_depths_in_one_and_three_dimensions():
    line, block = torch.rand(2, 1, 9), torch.rand(1, 2, 3, 4, 5)
    assert rules.depths([line], torch.rand(1, 3, 18)).shape == (2, 1, 18)
    assert rules.depths([block, block[..., :2, :2, :2]], torch.rand(2, 1, 6, 8, 10)).shape == (1, 2, 6, 8, 10)
    # A plane whose rows are all the same is a line.
    plane, image = line[:, :, None].expand(2, 1, 9, 9), torch.rand(1, 3, 9)
    of_plane = rules.depths([plane], image[:, :, None].expand(1, 3, 9, 9))
    assert torch.allclose(of_plane[..., 4, :], rules.depths([line], image), atol=1e-5)


def test_depths_of_nothing():
    image = torch.rand(1, 3, 8, 8)
    against = rules.depths([-torch.rand(1, 1, 4, 4)], image)
    assert against.mean() < 0 < -against.min()
    with pytest.raises(ValueError, match="at least one field"):
        rules.depths([], image)


class Chain(nn.Module):
    """What can be written out layer by layer; ``scale`` makes its logits as large as a trained network's."""

    def __init__(self, classes=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1)
        self.c = nn.Linear(5, classes)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(x.mean((2, 3))) * 30


@pytest.mark.parametrize(
    ("seed", "place", "signs"), [(3, 3, (True, False)), (0, 3, (True, True)), (3, 2, (False, True))]
)
def test_a_network_written_out(seed, place, signs):
    torch.manual_seed(seed)
    model, x = Chain().double().eval(), torch.rand(1, 3, 12, 10, dtype=torch.float64)
    with torch.no_grad():
        target = int(model(x).argsort()[0, place])
        one = torch.relu(model.a(x))
        top = torch.relu(model.b(one))
        positions = top[0, 0].numel()
        weights = 30 * model.c.weight / positions
        evidence = torch.stack([(weights[k, :, None, None] * top[0]).sum(0) for k in range(4)])[:, None]
        ranked = model(x)[0].argsort(descending=True)
        rows = torch.cat([evidence[target][None], evidence[ranked]])
        gate = plain_maps.rivalry(rows, 1)[0]
        own = gate * (evidence[target] - evidence.mean(0))  # (1, h, w)
        gradient = gate[:, None] * (weights[target] - weights.mean(0))[:, None, None]  # at the top
        fields = [own[None]]
        below = plain.conv(gradient * (top > 0), one, model.b.weight, model.b.bias, padding=(1, 1))
        fields.append((below * one).sum(1)[None])
        found = plain_maps.depths(fields, x, [plain_maps.claims(rows, 1, gate[None])])
        sums = [(values.clamp(min=0).sum(), values.clamp(max=0).sum()) for values in (own, found)]
        scales = [wanted / is_ if is_ else 0 for wanted, is_ in zip(*sums, strict=True)]
        scales[1] = min(scales) if scales[0] else scales[1]
        found = found.clamp(min=0) * scales[0] + found.clamp(max=0) * scales[1]
    assert (own.max() > 0, own.min() < 0) == signs
    e = tsgb.explain(model, x, target, rules=DEFAULT)
    assert torch.allclose(e.maps, found, atol=1e-12)
    assert gate.min() < 0.9, "no rival had a say"


def _passed(model, x, target, handing):
    request = passes.Request(model, DEFAULT, None)
    with torch.enable_grad():
        return passes.backward(request, target, passes.forward(request, (x,), target, handing))[0]


def _architecture(name):
    torch.manual_seed(1)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = getattr(import_torchvision().models, name)(weights=None, **options).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize(
    "name", ["alexnet", "vgg11", "resnet18", "squeezenet1_1", "densenet121", "mobilenet_v3_small", "convnext_tiny"]
)
def test_handed_on_or_plainly_it_is_one_map(name):
    model, x = _architecture(name), torch.rand(2, 3, 96, 96, dtype=torch.float64)
    target = model(x).detach().topk(2).indices
    fast = _passed(model, x, target, True)
    for k in range(2):
        slow = _passed(model, x, target[:, k : k + 1], False)
        assert slow.relevance[0].any()
        error = (fast.relevance[0][k] - slow.relevance[0][0]).norm() / slow.relevance[0].norm()
        assert error < (1e-3 if name == "convnext_tiny" else 1e-8)
        assert torch.equal(fast.arrived[k], slow.arrived[0])


def test_a_convolution_right_below_pooling_is_a_top_itself():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    model, x = model.eval().double(), torch.rand(2, 3, 14, 14, dtype=torch.float64)
    target = model(x).detach().topk(1).indices
    fast, slow = (_passed(model, x, target, handing).relevance[0] for handing in (True, False))
    assert fast.any()
    assert torch.allclose(fast, slow, atol=1e-12)


@pytest.mark.parametrize("handing", [True, False])
def test_nothing_is_left_behind(handing):
    model, x, target = Chain().eval(), torch.rand(2, 3, 16, 16), torch.tensor([[1], [2]])
    _passed(model, x, target, handing)
    gc.collect()
    before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(3):
        _passed(model, x, target, handing)
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before


def test_a_class_has_one_map_whatever_else_is_asked(monkeypatch):
    torch.manual_seed(0)
    model, x = Chain(30).eval(), torch.rand(3, 3, 16, 16)
    alone = tsgb.explain(model, x[1:2], 7, rules=DEFAULT).maps[0, 0]
    together = tsgb.explain(model, x, [[3, 7, 9]] * 3, rules=DEFAULT).maps[1, 1]
    assert torch.allclose(alone, together, atol=1e-5 * float(alone.abs().max()))
    monkeypatch.setattr(passes, "_AT_ONCE", 1)  # classes go backward one by one
    by_one = tsgb.explain(model, x, [[3, 7, 9]] * 3, rules=DEFAULT).maps[1, 1]
    assert torch.allclose(alone, by_one, atol=1e-5 * float(alone.abs().max()))


def test_a_rival_elsewhere_takes_what_is_its_own():
    """One channel tells red, the other green; both classes share the first half of red's evidence."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
    model[4].weight.data = torch.tensor([[30.0, 10], [10, 30]])
    x = torch.zeros(1, 3, 16, 16)
    x[:, 0, :, :8], x[:, 1, :, 8:] = 1, 1
    with_rivals = tsgb.explain(model, x, 0, rules=DEFAULT).maps[0, 0]
    without = tsgb.explain(model, x, 0, rules={**DEFAULT, rules.RIVALS: lambda e, k: torch.ones_like(e[:k])}).maps[0, 0]
    assert with_rivals[:, :4].mean() > 0 > with_rivals[:, 12:].mean() > without[:, 12:].mean()


def test_the_map_sums_to_the_evidence_that_passed():
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.rand(2, 3, 16, 16)
    always = {**DEFAULT, rules.RIVALS: lambda evidence, asked: torch.ones_like(evidence[:asked])}
    maps = tsgb.explain(model, x, 1, rules=always).maps[:, 0]
    with torch.no_grad():
        top = torch.relu(model.b(torch.relu(model.a(x))))
        weight = 30 * (model.c.weight[1] - model.c.weight.mean(0))
        evidence = torch.einsum("nchw,c->nhw", top, weight)
    assert torch.allclose(maps.clamp(min=0).sum((1, 2)), evidence.clamp(min=0).mean((1, 2)), rtol=1e-4)
    assert maps.min() < 0, "nothing speaks against it"
    assert (maps.clamp(max=0).sum((1, 2)) > evidence.clamp(max=0).mean((1, 2)) - 1e-4).all()


def test_a_table_may_ask_for_one_of_the_two():
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    deep, ordinary = {**rules.PIXELS, rules.MAP: rules.depths}, {key: DEFAULT[key] for key in (rules.HEAD, rules.F)}
    maps = [tsgb.explain(model, x, 1, rules=table).maps for table in (deep, rules.plain(deep), rules.PIXELS, DEFAULT)]
    assert torch.allclose(maps[0], maps[1])
    assert all((maps[0] - other).norm() > 0.1 * other.norm() for other in maps[2:])
    e = tsgb.explain(model, x, 1, rules={**rules.PIXELS, **ordinary, rules.RIVALS: rules.rivalry})
    with torch.no_grad():
        top = torch.relu(model.b(torch.relu(model.a(x))))
        evidence = torch.einsum("nchw,kc->knhw", top, 30 * model.c.weight) / top[0, 0].numel()
        best = model(x).topk(4).indices
        rows = torch.stack([evidence[best[:, r], torch.arange(2)] for r in range(4)])
        gate = rules.rivalry(torch.cat([evidence[1:2], rows]), 1)[0]
    # Relevance is conserved below: the signed map at the image sums to the signed evidence that passed.
    assert torch.allclose(e.maps[:, 0].sum((1, 2)), (gate * (evidence[1] - evidence.mean(0))).sum((1, 2)))


class Vectors(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 6, 3, padding=1), nn.Linear(6, classes)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).amax(-1))


def test_other_dimensions_targets_and_heads():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 20)
    assert tsgb.explain(Vectors(5).eval(), x, "top2", rules=DEFAULT).maps.shape == (2, 2, 20)
    assert tsgb.explain(Vectors(1).eval(), x, 0, rules=DEFAULT).maps.shape == (2, 1, 20)  # no rival, no mean of classes
    assert tsgb.explain(Vectors(2).eval(), x, 1, rules=DEFAULT).maps.shape == (2, 1, 20)
    block = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    assert tsgb.explain(block, torch.rand(1, 1, 6, 6, 6), 2, rules=DEFAULT).maps.shape == (1, 1, 6, 6, 6)
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    image = torch.rand(2, 3, 9, 9)
    e = tsgb.explain(segmenter, image, lambda out: out[:, 2].sum((1, 2)), rules=DEFAULT)
    assert e.maps.shape == (2, 1, 9, 9)


@pytest.mark.parametrize("table", [DEFAULT, rules.plain(DEFAULT)], ids=["handing", "plain"])
def test_a_callable_of_the_logits_competes_as_its_classes_do(table):
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    asked = tsgb.explain(model, x, [[1, 2]] * 2, rules=table).maps
    assert torch.allclose(tsgb.explain(model, x, lambda out: 3 * out[:, 2], rules=table).maps[:, 0], 3 * asked[:, 1])
    pixels = {key: rule for key, rule in table.items() if key != rules.MAP}
    difference = tsgb.explain(model, x, lambda out: 5 * (out[:, 1] - out[:, 2]), rules=pixels)
    with torch.no_grad():
        top = torch.relu(model.b(torch.relu(model.a(x))))
        evidence = torch.einsum("nchw,kc->knhw", top, 30 * model.c.weight) / top[0, 0].numel()
        best = model(x).topk(4).indices
    rows = torch.stack([evidence[best[:, r], torch.arange(2)] for r in range(4)])
    own = (evidence[1] - evidence[2])[None]
    weighed = own * rules.rivalry(torch.cat([own, rows]), 1)
    assert torch.allclose(difference.maps.sum((2, 3))[:, 0], 5 * weighed[0].sum((1, 2)))  # which the pixels conserve


class Beside(nn.Module):
    """Logits, and features that they come from."""

    def __init__(self):
        super().__init__()
        self.net = Chain()

    def forward(self, x):
        features = torch.relu(self.net.b(torch.relu(self.net.a(x))))
        return self.net.c(features.mean((2, 3))) * 30, features


def test_a_callable_that_reads_more_than_the_logits_does_not_compete():
    torch.manual_seed(0)
    model, x = Beside().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    alone = {key: rule for key, rule in DEFAULT.items() if key != rules.RIVALS}

    for competes, target in (
        (False, lambda out: out[0][:, 1] + out[1].mean((1, 2, 3))),
        (True, lambda out: out[0][:, 1] + out[1].detach().mean((1, 2, 3))),
    ):
        maps = [tsgb.explain(model, x, target, rules=table).maps for table in (DEFAULT, alone)]
        assert torch.equal(*maps) != competes


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.out((torch.relu(self.a(x)) + torch.relu(self.b(y))).mean((2, 3)))


def test_of_several_inputs_each_has_its_relevance():
    torch.manual_seed(0)
    model, inputs = Two().double().eval(), (torch.rand(1, 3, 8, 8).double(), torch.rand(1, 1, 8, 8).double())
    e = tsgb.explain(model, inputs, 1, rules=DEFAULT)
    own = {**rules.PIXELS, **{key: DEFAULT[key] for key in (rules.HEAD, rules.F)}}
    share = tsgb.explain(model, inputs, lambda out: out[:, 1] - out.mean(1), rules=own)
    assert [m.shape for m in e.maps] == [m.shape for m in share.maps]
    assert all(torch.isfinite(m).all() and m.any() for m in e.maps)


class Tabled(nn.Module):
    """An image and what a table says of it; ``is_mixed``: what is made of the latter also weighs the channels."""

    def __init__(self, is_mixed):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(2, 4)
        self.out, self.is_mixed = nn.Linear(8 if is_mixed else 6, 3), is_mixed

    def forward(self, x, v):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if self.is_mixed:
            v = torch.relu(self.c(v))
            x = torch.relu(x + v[:, :, None, None])
        return self.out(torch.cat([x.mean((2, 3)), v], 1))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_has_no_positions_goes_past_where_classes_compete(is_mixed):
    torch.manual_seed(0)
    model, inputs = Tabled(is_mixed).double().eval(), (torch.rand(2, 3, 9, 9).double(), torch.rand(2, 2).double())
    e = tsgb.explain(model, inputs, [[0, 2], [1, 1]])
    for k in range(2):
        one = tsgb.explain(model, inputs, e.targets[:, k], rules=rules.plain(DEFAULT))
        assert all(torch.allclose(fast[:, k], slow[:, 0]) for fast, slow in zip(e.maps, one.maps, strict=True))
        if not is_mixed:
            weight = model.out.weight[:, 4:].detach()
            assert torch.allclose(e.maps[1][:, k], inputs[1] * (weight[e.targets[:, k]] - weight.mean(0)))


def test_of_channels_each_has_its_share():
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.rand(2, 3, 16, 16)
    x[0, :, 3, 3] = 0  # a black pixel may be evidence too
    whole = tsgb.TSGB(model, rules=DEFAULT).attribute(x, 1)
    maps = tsgb.explain(model, x, 1, rules=DEFAULT).maps
    assert torch.allclose(whole.sum(1), maps[:, 0], atol=1e-6)


def test_there_is_no_f():
    with pytest.raises(ValueError, match=r"these rules have no f.*got f=0.5: leave it out"):
        tsgb.explain(Chain().eval(), torch.rand(1, 3, 8, 8), 1, f=0.5, rules=DEFAULT)


def test_the_pixels_relevance_is_worked_out_where_it_is_asked_for(monkeypatch):
    """A map of all depths reads what convolutions share, and what the first hands to the image it does not."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    images, given = torch.rand(2, 3, 12, 12), []
    values = relevance.Owed.values
    monkeypatch.setattr(relevance.Owed, "values", property(lambda part: given.append(part) or values.fget(part)))
    tsgb.explain(net.eval(), images, [1, 2])
    assert not given
    tsgb.explain(net, images, [1, 2], rules=rules.PIXELS)
    assert len(given) == 1


def test_compiled():
    torch.manual_seed(0)
    model, x = Chain(25).eval(), torch.rand(2, 3, 16, 16)
    explainer = tsgb.compile(model, x, "top2", rules=DEFAULT, backend="eager")
    other = torch.rand(2, 3, 16, 16)
    expected = tsgb.explain(model, other, "top2", rules=DEFAULT).maps
    assert torch.allclose(explainer(other, "top2").maps, expected, atol=1e-4 * float(expected.abs().max()))


def test_in_half_precision():
    model = tsgb.load("bundled").model
    x = torch.rand(2, 3, 128, 128)
    expected = tsgb.explain(model, x, "top2", rules=DEFAULT).maps
    with torch.autocast("cpu", torch.bfloat16):
        found = tsgb.explain(model, x, tsgb.explain(model, x, "top2").targets, rules=DEFAULT).maps
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found[:, 0].flatten(), expected[:, 0].flatten()]))[0, 1] > 0.999


def test_a_model_that_loses_what_is_handed_on():
    """It writes on a view, and is run plainly."""

    class Writes(Chain):
        def forward(self, x):
            x = torch.relu(self.a(x))
            x[:, :, :2] *= 2
            return self.c(torch.relu(self.b(x)).mean((2, 3))) * 30

    class Spelled(Chain):
        def forward(self, x):
            x = torch.relu(self.a(x))
            x = torch.cat([x[:, :, :2] * 2, x[:, :, 2:]], 2)
            return self.c(torch.relu(self.b(x)).mean((2, 3))) * 30

    torch.manual_seed(0)
    writes, spelled = Writes().double().eval(), Spelled().double().eval()
    spelled.load_state_dict(writes.state_dict())
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    one, other = (tsgb.explain(m, x, [[0, 1]] * 2, rules=DEFAULT).maps for m in (writes, spelled))
    assert torch.allclose(one, other, atol=1e-12)


def test_functional_modules_shared_and_in_place():
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.rand(1, 3, 16, 16)

    def run(x):
        x = functional.relu(model.a(x), inplace=True)
        return 30 * model.c(functional.relu_(model.b(x)).mean((2, 3)))

    expected = tsgb.explain(model, x, 1, rules=DEFAULT).maps
    assert torch.allclose(tsgb.explain(run, x, 1, rules=DEFAULT).maps, expected, atol=1e-6)
