"""Where the classes compete: wherever the channels stand, at one place on every path, in a callable's logits too."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from test_depths import Chain
from test_handing import relative
from tsgb import rules

DEFAULT = rules.DEFAULT


def assert_twins(model, twin, x):
    """Check that two networks which compute the same have one map, in either form of the rules."""
    expected = tsgb.explain(twin, x, [[0, 1], [2, 3]]).maps
    for table in (DEFAULT, rules.plain(DEFAULT)):
        assert relative(tsgb.explain(model, x, [[0, 1], [2, 3]], rules=table).maps, expected) < 1e-9


class Net(nn.Module):
    """Two convolutions and a head, told by ``end`` how to come from features (N, 8, 8, W) to logits."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.LayerNorm(8)
        self.c, self.end = nn.Linear(8, 5), end
        self.double().eval()

    def forward(self, x):
        return 30 * self.end(self, torch.relu(self.b(torch.relu(self.a(x)))))


MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: torch.moveaxis(x, 1, -1),
    "swapaxes": lambda x: x.swapaxes(1, 2).swapaxes(2, 3),
    "transpose": lambda x: x.transpose(1, 3).transpose(1, 2),
    "einsum": lambda x: torch.einsum("nchw->nhwc", x),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).movedim(1, 3),
    "in place": lambda x: x.permute(0, 2, 3, 1).mul_(1.0),
}


@pytest.mark.parametrize("side", [8, 6])  # as many rows as channels, and fewer
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_the_classes_compete_wherever_the_channels_stand(move, normed, side):
    def end(net, x):
        x = MOVES[move](x)
        x = torch.relu(net.norm(x)) if normed else x
        return net.c(x.mean((1, 2)))

    def first(net, x):
        x = (
            functional.layer_norm(x.movedim(1, -1), (8,), net.norm.weight, net.norm.bias).movedim(-1, 1)
            if normed
            else x
        )
        return net.c((torch.relu(x) if normed else x).mean((2, 3)))

    x = torch.rand(2, 3, 16, 2 * side, dtype=torch.float64)
    assert_twins(Net(end), Net(first), x)


def test_tokens_are_positions():
    def tokens(net, x):
        return net.c(x.flatten(2).mT.mean(1))

    x = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    assert_twins(Net(tokens), Net(lambda net, x: net.c(x.mean((2, 3)))), x)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean(3).mean(2),
        lambda x: x.mean(-1, keepdim=True).mean(-2, keepdim=True).flatten(1),
        lambda x: x.sum(2).sum(2) / 48,
        lambda x: x.movedim(1, -1).mean(1).mean(1),
    ],
)
def test_pooling_may_take_one_dimension_after_the_other(pool):
    x = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    assert_twins(Net(lambda net, x: net.c(pool(x))), Net(lambda net, x: net.c(x.mean((2, 3)))), x)


class Series(nn.Module):
    """A layer on (T, N, C) between two convolutions, or the same on (N, T, C)."""

    def __init__(self, sequence_first):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(3, 8, 3, 1, 1), nn.Conv1d(8, 8, 3, 1, 1)
        self.middle, self.c, self.sequence_first = nn.Linear(8, 8), nn.Linear(8, 5), sequence_first
        self.double().eval()

    def forward(self, x):
        there, back = ((2, 0, 1), (1, 2, 0)) if self.sequence_first else ((0, 2, 1), (0, 2, 1))
        x = torch.relu(self.middle(torch.relu(self.a(x)).permute(there))).permute(back)
        return 30 * self.c(torch.relu(self.b(x)).mean(2))


def test_a_layer_of_a_sequence_first_has_its_field_too():
    x = torch.rand(2, 3, 20, dtype=torch.float64)
    assert_twins(Series(True), Series(False), x)


class Reduced(nn.Module):
    """A block that leaves one position, whose branches have theirs at several heights; and a convolution beside."""

    def __init__(self, beside):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 4)
        self.side = nn.Conv2d(3, 6, 8) if beside else None
        self.c = nn.Linear(12, 5)
        self.double().eval()

    def forward(self, x):
        y = torch.relu(self.stem(x))
        z = self.b(torch.relu(self.a(y)))
        z = z + self.side(x) if self.side is not None else z
        return 30 * self.c(torch.cat([functional.max_pool2d(y, 4), torch.relu(z)], 1).flatten(1))


def test_where_one_top_lies_below_another_the_classes_compete_once():
    model, x = Reduced(False), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    maps = [tsgb.explain(model, x, [[0, 1], [2, 3]], rules=table).maps for table in (DEFAULT, rules.plain(DEFAULT))]
    assert relative(*maps) < 1e-9
    evidence = {}

    def seen(rows, asked):
        evidence["shape"], evidence["count"] = rows.shape, evidence.get("count", 0) + 1
        return rules.rivalry(rows, asked)

    tsgb.explain(model, x, 1, rules={**DEFAULT, rules.RIVALS: seen})
    assert (evidence["shape"], evidence["count"]) == ((6, 2, 4, 4), 1)  # at the stem's output


def test_where_the_image_alone_is_below_all_paths_the_classes_compete_there():
    model, x = Reduced(True), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    maps = [tsgb.explain(model, x, [[0, 1], [2, 3]], rules=table).maps for table in (DEFAULT, rules.plain(DEFAULT))]
    assert relative(*maps) < 1e-9
    rows = []
    tsgb.explain(model, x, 1, rules={**DEFAULT, rules.RIVALS: lambda r, k: rows.append(r) or rules.rivalry(r, k)})
    own = {**rules.PIXELS, rules.HEAD: DEFAULT[rules.HEAD], rules.F: None}
    assert torch.allclose(rows[0][0], tsgb.explain(model, x, 1, rules=own).maps[:, 0])


def test_what_only_speaks_against_is_below_zero():
    model, x = Chain().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.c.weight.abs_()
        model.c.weight[1] = 0
        model.c.weight[2] = model.c.weight.mean(0)
        model.c.weight[2, 0] += 1e-9  # a hair more than what all classes share, where a feature is on
    for table in (DEFAULT, rules.plain(DEFAULT)):
        e = tsgb.explain(model, x, [[0, 1, 2]] * 2, rules=table)
        assert e.maps[:, 0].amax() > 0 >= e.maps[:, 1].amax() > e.maps[:, 1].amin()
        assert e.why_empty[0][1] == "evidence against the target outweighs the evidence for it at every pixel"
        with torch.no_grad():
            top = torch.relu(model.b(torch.relu(model.a(x))))
            against = torch.einsum("nchw,c->nhw", top, 30 * (model.c.weight[1] - model.c.weight.mean(0))).mean((1, 2))
        passed = e.maps[:, 1].sum((1, 2))
        assert ((passed < 0.3 * against.clamp(max=0) * 0.999) & (passed > 1.001 * against)).all()


class Parted(Chain):
    """Logits in two parts of one call."""

    def forward(self, x):
        return super().forward(x).split([2, 2], 1)


def test_a_target_of_two_parts_of_one_call_is_more_than_the_first():
    torch.manual_seed(0)
    model, x = Parted().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    one, both = (lambda out: out[0][:, 1]), (lambda out: out[0][:, 1] + 5 * out[1][:, 0])
    maps = [tsgb.explain(model, x, target).maps for target in (one, both)]
    assert relative(*maps) > 0.1


@pytest.mark.parametrize("table", [DEFAULT, rules.plain(DEFAULT)], ids=["handing", "plain"])
def test_a_target_may_write_on_the_logits(table):
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)

    def zeroed(out):
        out[:, 0] = 0
        return out[:, 1]

    asked = tsgb.explain(model, x, 1, rules=table).maps
    doubled = tsgb.explain(model, x, lambda out: out.mul_(2)[:, 1], rules=table).maps
    assert relative(doubled, 2 * asked) < 1e-9
    assert relative(tsgb.explain(model, x, zeroed, rules=table).maps, asked) < 1e-9
