"""Rules where the paper is silent, and layers in other spellings, each against a twin."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import plain
import tsgb
from test_handing import relative
from tsgb import rules


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def transposed_twin(grad, x, weight, bias, stride, padding, dilation, groups):
    """Each position of the output shares its relevance among those it comes from, in proportion to |x|."""
    size = grad.shape[2:]
    inputs, outputs = x.shape[1] // groups, weight.shape[1]
    o, sources = torch.zeros_like(grad), {}
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for a in range(weight.shape[2]):
                for b in range(weight.shape[3]):
                    row, column = i * stride + a * dilation - padding, j * stride + b * dilation - padding
                    if not (0 <= row < size[0] and 0 <= column < size[1]):
                        continue
                    sources.setdefault((row, column), []).append((i, j))
                    for g in range(groups):
                        source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
                        o[:, sink, row, column] += x[:, source, i, j] @ weight[source, :, a, b]
    if bias is not None:
        o = o + bias[:, None, None]
    below = torch.zeros_like(x)
    for n in range(len(x)):
        for g in range(groups):
            source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            for (row, column), seen in sources.items():
                c = (grad[n, sink, row, column] * o[n, sink, row, column]).sum()
                total = sum(x[n, source, i, j].abs().sum() for i, j in seen)
                for i, j in seen:
                    below[n, source, i, j] += c / (total + 1e-10) * x[n, source, i, j].sign()
    return o, below


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more", "groups", "dilation"),
    [(2, 2, 0, 0, 1, 1), (3, 2, 1, 1, 1, 1), (3, 1, 1, 0, 2, 1), (3, 2, 2, 1, 2, 2), (1, 2, 0, 1, 1, 1)],
)
def test_transposed_convolution_is_its_twin(kernel, stride, padding, more, groups, dilation, biased):
    torch.manual_seed(0)
    x, weight, bias = double(2, 4, 4, 3), double(4, 3, kernel, kernel), double(3 * groups) if biased else None
    arguments = (stride, padding, more, groups, dilation)
    o = functional.conv_transpose2d(x, weight, bias, *arguments)
    grad = torch.randn_like(o)
    expected, below = transposed_twin(grad, x, weight, bias, stride, padding, dilation, groups)
    assert torch.allclose(o, expected)
    assert torch.allclose(rules.conv_transposed(grad, x, weight, bias, *arguments), below)
    assert torch.allclose(rules.conv_transposed(grad[0], x[0], weight, bias, *arguments), below[0])


def test_transposed_convolution_of_one_and_three_dimensions_is_that_of_two():
    torch.manual_seed(0)
    x, weight, grad = double(2, 4, 5), double(4, 3, 3), double(2, 3, 11)
    flat = rules.conv_transposed(grad, x, weight, None, 2)
    deep = rules.conv_transposed(grad[:, :, None, None], x[:, :, None, None], weight[:, :, None, None], None, (1, 1, 2))
    assert torch.allclose(
        flat, rules.conv_transposed(grad[:, :, None], x[:, :, None], weight[:, :, None], None, (1, 2))[:, :, 0]
    )
    assert torch.allclose(flat, deep[:, :, 0, 0])


@pytest.mark.parametrize(
    ("norm", "arguments"),
    [
        (functional.group_norm, (2,)),
        (functional.layer_norm, ((6, 5),)),
        (functional.instance_norm, ()),
        (functional.local_response_norm, (3,)),
    ],
)
@pytest.mark.parametrize("table", [rules.PAPER, rules.PIXELS], ids=["PAPER", "PIXELS"])
def test_relevance_passes_norms(norm, arguments, table):
    torch.manual_seed(0)
    x, grad = double(2, 4, 6, 5), double(2, 4, 6, 5)
    x[0, 0, 0] = 0
    o, below = norm(x, *arguments), table[norm](grad, x, *arguments)
    assert torch.allclose(x * below, torch.where(x == 0, 0, o * grad))


def test_a_linear_layer_on_positions_is_the_convolution_of_one():
    torch.manual_seed(0)
    x, weight, bias, grad = double(2, 3, 4, 5), double(6, 5), double(6), double(2, 3, 4, 6)
    as_channels = [t.permute(0, 3, 1, 2) for t in (grad, x)]
    twin = plain.conv(*as_channels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    assert torch.allclose(rules.linear(grad, x, weight, bias), twin)


def test_a_convolution_of_one_position_is_a_linear_layer():
    torch.manual_seed(0)
    x, weight, bias, grad = double(2, 4, 1, 1), double(6, 4, 3, 3), double(6), double(2, 6, 1, 1)
    for rule in (rules.conv, rules.conv_lumped):
        below = rule(grad, x, weight, bias, padding=1)
        assert torch.allclose(below[..., 0, 0], grad[..., 0, 0] @ weight[..., 1, 1])
        assert torch.allclose(below, plain.conv(grad, x, weight, bias, padding=(1, 1)))
    below = rules.conv(double(2, 6, 1, 1), x, double(6, 2, 1, 1), None, groups=2)
    assert below.shape == x.shape


class Spelled(nn.Module):
    """One network, its second convolution, its third and the hidden layer above the pooling in several spellings."""

    def __init__(self, second="conv", third="conv", hidden="linear"):
        super().__init__()
        self.second, self.third, self.hidden = second, third, hidden
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.weight2, self.weight3 = nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(7, 8))
        self.bias3, self.weight4, self.bias4 = (nn.Parameter(torch.randn(*shape)) for shape in ((7,), (9, 7), (9,)))
        self.head = nn.Linear(9, 5)
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.first(x))
        n, _, height, width = x.shape
        if self.second == "conv":
            x = functional.conv2d(x, self.weight2, padding=1)
        else:
            seen, weight = functional.unfold(x, 3, padding=1), self.weight2.flatten(1)
            if self.second == "unfolded":
                x = torch.matmul(weight, seen)
            elif self.second == "at":
                x = weight @ seen
            else:
                x = functional.linear(seen.transpose(1, 2), weight).transpose(1, 2)
            x = x.reshape(n, 8, height, width)
        x = torch.relu(x)
        if self.third == "conv":
            x = functional.conv2d(x, self.weight3[:, :, None, None], self.bias3)
        elif self.third == "product":
            x = (x.permute(0, 2, 3, 1) @ self.weight3.T + self.bias3).permute(0, 3, 1, 2)
        elif self.third == "channels last":
            x = functional.linear(x.permute(0, 2, 3, 1), self.weight3, self.bias3).permute(0, 3, 1, 2)
        else:
            x = functional.linear(x.flatten(2).mT, self.weight3, self.bias3).mT.unflatten(2, (height, width))
        x = torch.relu(x).mean((2, 3), keepdim=True)
        if self.hidden == "conv":
            x = functional.conv2d(x, self.weight4[:, :, None, None], self.bias4).flatten(1)
        else:
            x = functional.linear(x.flatten(1), self.weight4, self.bias4)
        return self.head(torch.relu(x))


@pytest.mark.parametrize("table", [rules.PAPER, rules.PIXELS], ids=["PAPER", "PIXELS"])
@pytest.mark.parametrize(
    "spelling",
    [{"second": how} for how in ("unfolded", "at", "linear")]
    + [{"third": how} for how in ("channels last", "tokens")]
    + [{"hidden": "conv"}],
    ids=str,
)
def test_a_layer_in_another_spelling_has_the_same_map(spelling, table):
    x = torch.rand(2, 3, 7, 8, dtype=torch.float64)
    expected = tsgb.explain(Spelled(), x, [[0, 1], [2, 4]], rules=table)
    found = tsgb.explain(Spelled(**spelling), x, [[0, 1], [2, 4]], rules=table)
    assert expected.maps.abs().amax() > 0
    assert relative(found.maps, expected.maps) < 1e-9
    assert found.f == expected.f
    assert not [row for row in found.coverage if row[1] is None]


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS], ids=["DEFAULT", "PIXELS"])
def test_a_bias_added_by_hand_on_positions_is_the_layers(table):
    x = torch.rand(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    asked = [[0, 1], [2, 4]]
    found, expected = (tsgb.explain(Spelled(third=how), x, asked, rules=table) for how in ("product", "channels last"))
    assert expected.maps.any()
    assert relative(found.maps, expected.maps) < 1e-9


class Step(nn.Module):
    """Two convolutions and what is done between them."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.b, self.up, self.c = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.ConvTranspose2d(8, 8, 2),
            nn.Linear(8, 5),
        )
        self.norm = nn.BatchNorm2d(8)
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.uniform_(values, 0.2, 1)
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.how(self, torch.relu(self.a(x))))
        return self.c((torch.relu(self.b(x)) if x.shape[1] == 8 else x.repeat(1, 2, 1, 1)).mean((2, 3)))


def of(net):
    return net.norm.weight, net.norm.bias


def by_erf(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def by_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


NONE = (None, None)
STEPS = {
    "group norm": (
        lambda net, x: functional.group_norm(x, 4, *of(net)),
        lambda net, x: torch.group_norm(x, 4, *of(net), 1e-5, False),
    ),
    "layer norm": (
        lambda net, x: functional.layer_norm(x.movedim(1, -1), (8,), *of(net)).movedim(-1, 1),
        lambda net, x: torch.layer_norm(x.movedim(1, -1), (8,), *of(net), 1e-5, False).movedim(-1, 1),
    ),
    "instance norm": (
        lambda net, x: functional.instance_norm(x, *NONE, *of(net)),
        lambda net, x: torch.instance_norm(x, *of(net), *NONE, True, 0.1, 1e-5, False),
    ),
    "batch norm": (
        lambda net, x: net.norm(x),
        lambda net, x: torch.batch_norm(
            x, *of(net), net.norm.running_mean, running_var=net.norm.running_var, training=False, momentum=0.1,
            eps=1e-5, cudnn_enabled=False,
        ),
    ),
    "upsampling": (
        lambda net, x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda net, x: torch.ops.aten.upsample_bilinear2d.vec(x, None, False, [2.0, 2.0]),
    ),
    "convolution": (
        lambda net, x: net.b(x),
        lambda net, x: torch.convolution(x, net.b.weight, net.b.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
    "transposed convolution": (
        lambda net, x: net.up(x),
        lambda net, x: torch.convolution(x, net.up.weight, net.up.bias, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
    ),
    "gated linear unit": (
        lambda net, x: functional.glu(x - 0.1, 1),
        lambda net, x: (x - 0.1).chunk(2, 1)[0] * (x - 0.1).chunk(2, 1)[1].sigmoid(),
    ),
    "gelu": (
        lambda net, x: functional.gelu(x - 0.2),
        lambda net, x: by_erf(x - 0.2),
    ),
    "gelu of tanh": (
        lambda net, x: functional.gelu(x - 0.2, approximate="tanh"),
        lambda net, x: by_tanh(x - 0.2),
    ),
    "RMS norm": (
        lambda net, x: functional.rms_norm(x.movedim(1, -1), (8,), net.norm.weight, 1e-5).movedim(-1, 1),
        lambda net, x: x * torch.rsqrt(x.square().mean(1, True) + 1e-5) * net.norm.weight[:, None, None],
    ),
    "constant": (lambda net, x: x + 0.3, lambda net, x: torch.add(torch.tensor(0.3, dtype=torch.float64), x, alpha=1)),
    "cut": (lambda net, x: x[:, :, 1:], lambda net, x: x.narrow(2, 1, x.shape[2] - 1)),
}  # fmt: skip


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS], ids=["DEFAULT", "PIXELS"])
@pytest.mark.parametrize("name", STEPS)
def test_an_operator_of_torch_or_of_an_exported_graph_is_functionals(name, table):
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    one, other = STEPS[name]
    expected = tsgb.explain(Step(one), x, [[0, 1], [2, 4]], rules=table)
    assert expected.maps.any()
    for model in (Step(other), torch.export.export(Step(one), (x,)).module()):
        found = tsgb.explain(model, x, [[0, 1], [2, 4]], rules=table)
        assert relative(found.maps, expected.maps) < 1e-9
        assert not [row for row in found.coverage if row[1] is None]


class Decoder(nn.Module):
    """Scores of each pixel: by a convolution and its copies, or a transposed one, which may be the former's."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.score, self.end = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), end
        self.double().eval()

    def forward(self, x):
        x, weight, bias = torch.relu(self.b(torch.relu(self.a(x)))), self.score.weight, self.score.bias
        if self.end == "transposed":
            return functional.conv_transpose2d(x, weight.transpose(0, 1).repeat(1, 1, 2, 2), bias, 2)
        if self.end == "enlarged":
            return functional.conv_transpose2d(
                self.score(x), torch.ones_like(weight[:, :1]).repeat(1, 1, 2, 2), None, 2, groups=4
            )
        return functional.interpolate(self.score(x), scale_factor=2.0)


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS, rules.PAPER], ids=["DEFAULT", "PIXELS", "PAPER"])
@pytest.mark.parametrize("end", ["transposed", "enlarged"])
def test_a_transposed_convolution_is_a_head_or_enlarges_what_one_says(end, table):
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    expected, found = (
        tsgb.explain(Decoder(how), x, lambda logits: logits[:, 1].mean((1, 2)), rules=table) for how in ("copied", end)
    )
    assert torch.allclose(found.logits, expected.logits)
    assert expected.maps.any()
    assert relative(found.maps, expected.maps) < 1e-9


RANDOM = {
    "feature dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "feature alpha dropout": lambda x: functional.feature_alpha_dropout(x, 0.5, True),
    "dropout by name": lambda x: torch.dropout(x, p=0.5, train=True),
    "native dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_draws_random_numbers_is_refused(name):
    with pytest.raises(RuntimeError, match=r"draws random numbers: call model.eval\(\)"):
        tsgb.explain(Step(lambda _, x: RANDOM[name](x)), torch.rand(1, 3, 9, 9, dtype=torch.float64), 1)


class Attends(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.stem, self.qkv, self.head = how, nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.eval()

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "sdpa":
            x = functional.scaled_dot_product_attention(q, k, v)
        elif self.how == "matmul":
            x = (q @ k.mT).softmax(-1) @ v
        elif self.how == "bmm":
            x = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        elif self.how == "einsum":
            x = torch.einsum("nqk,nkc->nqc", torch.einsum("nqc,nkc->nqk", q, k).softmax(-1), v)
        else:
            x = self.attention(q, k, v, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.mark.parametrize("how", ["sdpa", "matmul", "bmm", "einsum", "module"])
def test_attention_is_refused(how):
    with pytest.raises(tsgb.CoverageError, match="vision transformers are out of its scope"):
        tsgb.explain(Attends(how), torch.rand(2, 3, 16, 16), 1)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(layer):
    class Rows(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x).flatten(2).mT)[0].mean(1))

    model = Rows(nn.Conv2d(3, 8, 4, 4), layer(8, 6, batch_first=True), nn.Linear(6, 5)).eval()
    with pytest.raises(tsgb.CoverageError, match=r"recurrent layer .* out of its scope"):
        tsgb.explain(model, torch.rand(2, 3, 16, 16), 1)


def test_attention_with_a_rule_of_the_users_own():
    table = {**rules.DEFAULT, functional.scaled_dot_product_attention: rules.ORDINARY}
    assert tsgb.explain(Attends("sdpa"), torch.rand(2, 3, 16, 16), 1, rules=table).maps.isfinite().all()
