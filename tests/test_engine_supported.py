"""What is out of scope is refused in one line, whatever names a device has for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from helpers import Step
from tsgb import rules

RANDOM = {
    "feature dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "feature alpha dropout": lambda x: functional.feature_alpha_dropout(x, 0.5, True),
    "dropout by name": lambda x: torch.dropout(x, p=0.5, train=True),
    "dropout of functional": lambda x: functional.dropout(x, 0.5),
    "dropout of channels": lambda x: functional.dropout2d(x, 0.5),
    "native dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "random slopes": lambda x: functional.rrelu(x, training=True),
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
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
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
        elif self.how == "baddbmm":
            x = torch.bmm(torch.baddbmm(torch.zeros(1), q, k.mT).softmax(-1), v)
        elif self.how == "einsum":
            x = torch.einsum("nqk,nkc->nqc", torch.einsum("nqc,nkc->nqk", q, k).softmax(-1), v)
        elif self.how == "encoder":
            x = self.encoder(x)
        else:
            x = self.attention(q, k, v, need_weights=self.how == "module with weights")[0]
        return self.head(x.mean(1))


ATTENTION = ["sdpa", "matmul", "bmm", "baddbmm", "einsum", "module", "module with weights", "encoder"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ATTENTION)
def test_attention_is_refused(how, dtype):
    with pytest.raises(tsgb.CoverageError, match="out of its scope"):
        tsgb.explain(Attends(how).to(dtype), torch.rand(2, 3, 16, 16).to(dtype), 1)


def test_attention_that_is_scripted_is_refused():
    traced = torch.jit.trace(Attends("sdpa"), torch.rand(2, 3, 16, 16))
    with pytest.raises(tsgb.CoverageError, match="out of its scope"):
        tsgb.explain(traced, torch.rand(2, 3, 16, 16), 1)


def test_a_vision_transformer_is_refused():
    from tsgb.vision import import_torchvision

    model = import_torchvision().models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    with pytest.raises(tsgb.CoverageError, match="out of its scope"):
        tsgb.explain(model, torch.rand(1, 3, 32, 32), 1)


class Rows(nn.Sequential):
    """A recurrent layer along the positions."""

    def forward(self, x):
        return self[2](self[1](self[0](x).flatten(2).mT)[0].mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(layer, dtype):
    model = Rows(nn.Conv2d(3, 8, 4, 4), layer(8, 6, batch_first=True), nn.Linear(6, 5)).eval().to(dtype)
    with pytest.raises(tsgb.CoverageError, match=r"recurrent .*out of its scope"):
        tsgb.explain(model, torch.rand(2, 3, 16, 16).to(dtype), 1)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells_are_refused_or_covered(cell):
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.cell, self.head = nn.Conv2d(3, 8, 4, 4), cell(8, 6), nn.Linear(6, 5)

        def forward(self, x):
            state = self.cell(self.stem(x).mean((2, 3)))
            return self.head(state[0] if isinstance(state, tuple) else state)

    try:
        found = tsgb.explain(Once().eval(), torch.rand(2, 3, 16, 16), 1)
    except tsgb.CoverageError:
        return
    assert found.maps.isfinite().all()
    assert found.coverage


def test_attention_with_a_rule_of_the_users_own():
    for key in (functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention):
        table = {**rules.FUSED, key: rules.ORDINARY}
        assert tsgb.explain(Attends("sdpa"), torch.rand(2, 3, 16, 16), 1, rules=table).maps.isfinite().all()


def test_products_of_two_signals_are_refused_as_attention_is():
    torch.manual_seed(0)
    stem, scores, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1), nn.Linear(4, 3)

    def model(x):
        x = torch.relu(stem(x))
        return head(torch.einsum("ncp,nop->nc", x.flatten(2), scores(x).flatten(2).softmax(2)))

    with pytest.raises(tsgb.CoverageError, match="as attention does"):
        tsgb.explain(model, torch.rand(2, 3, 7, 7), 1)


@pytest.mark.parametrize(
    "inner",
    [
        lambda x: torch.autograd.grad(x.sum(), x)[0] * x if x.requires_grad else x,
        lambda x: torch.vmap(lambda one: one * 2)(x),
        lambda x: torch.func.vmap(torch.relu)(x),
    ],
    ids=["grad", "vmap", "vmap of relu"],
)
def test_what_torch_transforms_inside_is_right_or_refused(inner):
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
    x = torch.rand(2, 3, 7, 7)
    try:
        found = tsgb.explain(lambda x: head(inner(stem(x)).mean((2, 3))), x, 1)
    except (tsgb.CoverageError, RuntimeError) as error:
        assert "\n" not in str(error).strip(), "refused in one line"  # noqa: PT017
        return
    with torch.no_grad():
        assert torch.allclose(found.logits, head(inner(stem(x)).mean((2, 3))), atol=1e-5)
    assert found.maps.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_networks_are_refused():
    x = torch.rand(2, 3, 16, 16)
    float_model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 5)).eval()
    dynamic = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(tsgb.CoverageError, match=r"quantised.*explain the float model"):
        tsgb.explain(dynamic, x, 1)
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), torch.ao.quantization.DeQuantStub()
    ).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(model)
    prepared(x)
    converted = torch.ao.quantization.convert(prepared)
    with pytest.raises(tsgb.CoverageError, match="quantised"):
        tsgb.explain(nn.Sequential(converted, nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval(), x, 1)


# ---- what comes by a way that no operator shows


class Side(nn.Module):
    """A branch beside the network that the image takes without torch, or in another thread."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.stem, self.b, self.head = how, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.eval()

    def forward(self, x):
        y = torch.relu(self.stem(x))
        if self.how == "numpy":
            side = torch.from_numpy(y.detach().cpu().numpy() * 2)
        elif self.how == "list":
            side = torch.tensor(y.tolist())
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool:
                side = pool.submit(lambda: self.stem(x) * 2).result()
        return self.head(self.b(y + side).mean((2, 3)))


@pytest.mark.parametrize("how", ["numpy", "list", "thread"])
def test_what_came_by_another_way_is_no_constant(how):
    """It is refused, or said; never taken for a constant in silence."""
    with pytest.raises((tsgb.CoverageError, RuntimeError)):
        tsgb.explain(Side(how), torch.rand(2, 3, 12, 12), 1, strict=True)
