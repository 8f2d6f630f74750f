"""What a forward is made of does not matter: scripts, checkpoints, views, NumPy, what a model keeps or writes on."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tsgb
from helpers import Branched, Functions, InPlaceModules, NormalisesItsInput, assert_literal, mean, relative
from tsgb import rules

TABLES = (rules.DEFAULT, rules.PIXELS, rules.PAPER)


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


# ---- where operators come from


class OwnLinear(torch.autograd.Function):
    """A linear layer whose derivative is written by hand."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Block(nn.Module):
    """A convolution and a ReLU, as one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.eval()

    def forward(self, x):
        return functional.relu(self.conv(x))


class Checkpointed(nn.Module):
    """The same, which training would run twice."""

    def __init__(self, **options):
        super().__init__()
        self.block, self.options = Block(), options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


WAYS = {
    "scripted": lambda: torch.jit.script(Block()),
    "traced": lambda: torch.jit.trace(Block(), torch.rand(1, 6, 8, 8)),
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(use_reentrant=True),
    "without gradients": lambda: torch.no_grad()(Block()),
    "in inference mode": lambda: torch.inference_mode()(Block()),
    "exported": lambda: torch.export.export(Block(), (torch.rand(2, 6, 8, 8),)).module(),
    "compiled": lambda: torch.compile(Block(), backend="eager"),
    "symbolically traced": lambda: torch.fx.symbolic_trace(Block()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("table", TABLES, ids=["FUSED", "PIXELS", "PAPER"])
@pytest.mark.parametrize("way", WAYS)
def test_a_part_may_come_in_any_way(way, table):
    def forward(net, x):
        return net.head(mean(functional.relu(net.b(net.block(functional.relu(net.a(x)))))))

    net, x = Branched(forward), torch.rand(2, 3, 16, 16)
    net.block = Block()
    expected = tsgb.explain(net, x, [[1, 2], [0, 4]], rules=table)
    del net.block
    net.block = WAYS[way]()
    found = tsgb.explain(net, x, [[1, 2], [0, 4]], rules=table)
    assert torch.allclose(found.logits, expected.logits, atol=1e-6)
    assert relative(found.maps, expected.maps) < 1e-5


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_network(how):
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)), images()
    net = net.double().eval()
    expected = tsgb.explain(net, x, [[0, 1], [3, 2]])
    found = tsgb.explain(torch.jit.script(net) if how == "script" else torch.jit.trace(net, x), x, [[0, 1], [3, 2]])
    assert relative(found.maps, expected.maps) < 1e-9


def test_the_head_may_be_scripted_or_a_function_of_its_own():
    model, x = Functions(), images()

    def pooled(x):
        return functional.relu(model.norm1(model.conv1(x))).mean((2, 3))

    expected = tsgb.explain(lambda x: functional.linear(pooled(x), model.head.weight), x, 2)
    script = torch.jit.script(nn.Linear(4, 5, bias=False).double())
    script.weight.data.copy_(model.head.weight)
    for head in (lambda y: OwnLinear.apply(y, model.head.weight), script):
        found = tsgb.explain(lambda x, head=head: head(pooled(x)), x, 2)
        assert relative(found.maps, expected.maps) < 1e-9


def test_what_was_made_of_weights_before_is_constant():
    def forward(net, x):
        return net.head(mean(net.b(functional.relu(net.a(x)) + net.cached)))

    net, x = Branched(forward), torch.rand(1, 3, 16, 16)
    net.cached = torch.full((1, 6, 1, 1), 0.1)
    expected = tsgb.explain(net, x, 1)
    net.cached = nn.Parameter(net.cached) * 1
    found = tsgb.explain(net, x, 1)
    assert torch.equal(found.maps, expected.maps)
    assert found.coverage == expected.coverage


def test_a_call_that_returns_its_operand_hides_nothing():
    def forward(net, x):
        return net.head(mean(net.b(functional.dropout(torch.cos(net.a(x)), 0.5, net.training))))

    x = torch.rand(1, 3, 16, 16)
    assert ("cos", None, 1) in tsgb.explain(Branched(forward), x, 1).coverage
    with pytest.raises(tsgb.CoverageError, match="no rule for cos"):
        tsgb.explain(Branched(forward), x, 1, strict=True)


def test_hooks_on_modules_are_called():
    seen = []
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(True), nn.Conv2d(6, 6, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(864, 5)
    ).eval()
    x = torch.rand(1, 3, 16, 16)
    expected = tsgb.explain(net, x, 1).maps
    for module in net:
        module.register_full_backward_hook(lambda module, given, got: seen.append("backward"))
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    assert relative(tsgb.explain(net, x, 1).maps, expected) < 1e-6
    assert seen == [type(module).__name__ for module in net]


# ---- what else is done with a convolution's output, or with what went in


class Reading(nn.Module):
    """What happens between a convolution and its batch norm, or to what went in."""

    def __init__(self, how, **norm):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.seen = how, []
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6, **norm)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.conv3, self.head = nn.Conv2d(6, 6, 1, bias=False), nn.Linear(6, 4)
        for norm in (self.norm1, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        raw = self.conv2(x)
        assert raw.shape == x.shape
        if self.how == "also summed":
            x = self.norm2(raw) + raw
        elif self.how == "summed before":
            x = raw + self.norm2(raw)
        elif self.how == "viewed":
            x = self.norm2(raw.view(len(raw), 6, -1).reshape(raw.shape))
        elif self.how == "written on":
            x = self.norm2(raw.mul_(2))
        elif self.how == "written on later":
            y = self.norm2(raw)
            raw += 1
            x = y + raw
        elif self.how == "input written on":
            x *= 3
            x = self.norm2(raw) + x
        elif self.how == "shown":
            self.seen.append(raw.detach().cpu().numpy().copy())
            x = self.norm2(raw)
        elif self.how == "shown later":
            x = self.norm2(raw)
            self.seen.append(raw.tolist())
        elif self.how == "without grad":
            with torch.no_grad():
                self.seen.append((raw + 0).tolist())
            x = self.norm2(raw)
        elif self.how == "scripted":
            x = self.norm2(raw) + scripted(raw)
        elif self.how == "normed twice":
            x = self.norm2(raw) + self.norm1(raw)
        elif self.how == "by name":
            norm = self.norm2
            x = functional.batch_norm(
                raw, running_var=norm.running_var, running_mean=norm.running_mean, bias=norm.bias, eps=0.1
            )
        elif self.how == "kept":
            self.kept = raw
            x = self.norm2(raw)
        else:
            x = self.norm2(raw)
        x = self.conv3(functional.relu(x))
        return self.head(x.mean((2, 3)))


HOWS = [
    "nothing", "also summed", "summed before", "viewed", "written on", "written on later", "input written on", "shown",
    "shown later", "without grad", "scripted", "normed twice", "by name", "kept",
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_whatever_reads_a_convolutions_output(how):
    model, x = Reading(how).double(), images(side=16)
    twin = Reading("nothing" if how in ("shown", "shown later", "without grad", "kept") else how).double()
    assert_literal(model, x, (0, 3), twin=twin, tables=["PIXELS"] if how == "scripted" else ["PIXELS", "PAPER"])
    single = copy.deepcopy(model).float()
    found = tsgb.explain(single, x.float(), [[0, 3]] * 2, rules=rules.PIXELS)
    assert relative(found.maps, tsgb.explain(model, x, [[0, 3]] * 2, rules=rules.PIXELS).maps) < 1e-4
    assert all(
        torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(model.seen[-1]).double(), atol=1e-5)
        for a in model.seen
    )
    with torch.no_grad():
        assert torch.allclose(found.logits.double(), model(x), atol=1e-4)


def test_what_a_model_keeps_outlives_the_call():
    model, x = Reading("kept"), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        model(x)
    expected = model.kept
    tsgb.explain(model, x, 1)
    assert model.kept is not expected
    assert torch.allclose(model.kept, expected, atol=1e-5)
    copied = copy.deepcopy(model)  # which a tensor with a graph would not let be
    assert torch.equal(copied.kept, model.kept)
    assert not model.kept.requires_grad
    gc.collect()
    assert (model.kept * 2).isfinite().all()


class Odd(Reading):
    """What other code does around a convolution."""

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        if self.how == "weight rewritten":
            weight = self.conv2.weight.detach().clone()
            raw = functional.conv2d(x, weight, None, 1, "same", 1, 2)
            weight *= -2
            x = self.norm2(raw) + self.norm1(functional.conv2d(x, weight, None, 1, "same", 1, 2))
        elif self.how == "without storage":
            raw = self.conv2(x)
            scale = torch.eye(6).to_sparse().to_dense().sum(1) + torch.vmap(lambda a: a * 2)(torch.ones(6))
            x = self.norm2(raw) * scale.to(x)[:, None, None]
        elif self.how == "caught":
            try:
                x = functional.max_pool2d(x, 99)
            except Exception:
                x = x[:, :, ::2, ::2]
        elif self.how == "refused":
            try:
                raw = self.conv2(x.permute(0, 2, 3, 1))
            except RuntimeError:
                raw = self.conv2(x)
            x = self.norm2(raw)
        return self.head(self.conv3(functional.relu(x)).mean((2, 3)))


@pytest.mark.parametrize("how", ["weight rewritten", "without storage", "caught", "refused"])
def test_whatever_a_model_does_around_it(how):
    assert_literal(Odd(how).double(), images(side=16), (0, 3), single=1e-4)


@pytest.mark.parametrize("error", [KeyError, None])
def test_what_a_caller_holds_is_its_value_even_if_the_run_was_in_vain(error):
    held = []

    class Holding(Reading):
        def forward(self, x):
            held.append(self.conv1(x))
            if error is not None:
                raise error
            x = functional.relu(self.norm1(held[-1]))
            return self.head(functional.max_pool2d(x, 2).mean((2, 3)))

    model, x = Holding("nothing"), torch.rand(2, 3, 16, 16)
    if error is None:
        tsgb.explain(model, x, 1)
    else:
        with pytest.raises(error):
            tsgb.explain(model, x, 1)
    assert held
    assert all(torch.allclose(raw, model.conv1(x), atol=1e-5) for raw in held)


@pytest.mark.parametrize("norm", [{"affine": False}, {"eps": 0.5, "momentum": None}])
def test_every_batch_norm(norm):
    x = images(side=16).to(memory_format=torch.channels_last)
    assert_literal(Reading("nothing", **norm).double(), x, (0, 3), single=1e-4)


def test_an_output_that_nothing_read_is_given():
    class Headless(nn.Sequential):
        def forward(self, x):
            return {"out": super().forward(x)}

    model = Headless(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    x = torch.rand(2, 3, 8, 8)
    found = tsgb.explain(model, x, lambda output: output["out"][:, 1].mean((1, 2)))
    with torch.no_grad():
        assert torch.allclose(found.logits, model(x)["out"], atol=1e-6)


class Rectified(Reading):
    """What a rectifier does that writes on the output of a batch norm."""

    def __init__(self, rectifier, how, dims=2):
        super().__init__("nothing")
        kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d
        self.conv1 = kinds[dims - 1](3, 6, 3, padding="same" if how == "by name" else 1, bias=False)
        self.conv2 = kinds[dims - 1](6, 6, 3, (2,) * dims, 1, groups=2, bias=False)
        self.conv3 = kinds[dims - 1](6, 6, 1, bias=how == "head")
        self.norm1, self.norm2 = ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.bias, -0.5, 0.5)
        self.rectifier, self.rectified = rectifier, how
        self.double().eval()

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        if self.rectified == "read before":
            before = x * 0.5
            x = self.rectifier(x) + before
        else:
            x = self.rectifier(x)
        raw = self.norm2(self.conv2(x))
        if self.rectified == "twice":
            x = self.rectifier(functional.hardtanh(raw, 0, 0.3, inplace=True))
        elif self.rectified == "shifted":  # where zeros become numbers
            x = self.norm1(self.rectifier(raw))
        elif self.rectified == "written through another name":
            other = raw
            self.rectifier(other)
            x = raw
        elif self.rectified == "gating":
            x = self.rectifier(raw) * self.norm1(self.conv3(x[:, :, ::2, ::2]))
        elif self.rectified == "added to":
            x = self.rectifier(raw)
            x += x.mean((2, 3), keepdim=True)
        elif self.rectified == "unruled":  # which takes gradients of what is before the batch norm and after it
            convolved = self.conv2(x)
            x = torch.cumsum(self.rectifier(self.norm2(convolved)), 2) + torch.cumsum(convolved, 3)
        else:
            x = self.rectifier(raw)
        x = self.conv3(x)
        if self.rectified == "head":
            return x.flatten(2).mean(2)
        return self.head(x.flatten(2).mean(2))


RECTIFIERS = {
    "ReLU": nn.ReLU(True),
    "ReLU6": nn.ReLU6(True),
    "relu_": torch.relu_,
    "below": nn.Hardtanh(0, 0.5, True),
    "by name": lambda x: functional.hardtanh(x, min_val=0, max_val=1, inplace=True),
    "around 0": nn.Hardtanh(-0.5, 0.5, True),
    "leaky": nn.LeakyReLU(0.2, True),
    "apart": nn.ReLU(),
}
RECTIFIED = [
    "read before",
    "twice",
    "shifted",
    "written through another name",
    "added to",
    "unruled",
    "by name",
    "head",
]


@pytest.mark.parametrize(
    ("rectifier", "how"),
    [*((name, "nothing") for name in RECTIFIERS), *(("ReLU6", how) for how in RECTIFIED), ("ReLU", "gating")],
)
def test_a_rectifier_that_writes_on_what_a_norm_gave(rectifier, how):
    torch.manual_seed(1)
    model, x = Rectified(RECTIFIERS[rectifier], how), images(side=8)
    assert_literal(model, x, (0, 3), single=1e-4)
    if how == "gating":
        assert ("mul", "gate", 1) in tsgb.explain(model, x, 1).coverage


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_rectifier_in_any_dimension(dims):
    torch.manual_seed(1)
    x = torch.rand(2, 3, *(64 // dims**2,) * dims, dtype=torch.float64)
    assert_literal(Rectified(nn.ReLU(True), "nothing", dims), x, (0, 3), single=1e-4)


@pytest.mark.parametrize("rectifier", ["ReLU", "ReLU6"])
def test_what_is_not_a_number_is_not_rectified_away(rectifier):
    model = Rectified(RECTIFIERS[rectifier], "nothing").float()
    model.norm2.running_var[1] = -1
    with pytest.raises(ValueError, match="logits for image 0 are NaN"):
        tsgb.explain(model, torch.rand(2, 3, 8, 8), 1)


def test_a_head_that_batch_norm_follows_keeps_the_derivative_of_what_is_above():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double().eval()  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_var.uniform_(0.2, 3)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, 0.5, 1)
    assert_literal(model, images(side=8), (0, 3), single=1e-4)


POOLS = {
    "module": nn.MaxPool2d(2),
    "function": lambda x: functional.max_pool2d(x, 2),
    "indices": lambda x: functional.max_pool2d(x, 2, return_indices=True)[0],
    "maximum": lambda x: torch.maximum(x[..., ::2, ::2], x[..., 1::2, 1::2]),
    "adaptive": nn.AdaptiveMaxPool2d(4),
    "average": nn.AvgPool2d(2),
}


class Pooling(Reading):
    def __init__(self, pool):
        super().__init__("nothing")
        self.pool = pool

    def forward(self, x):
        return super().forward(self.pool(functional.relu(self.norm1(self.conv1(x)))).repeat(1, 1, 4, 4)[:, :3])


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_of_what_a_norm_gave(pool):
    assert_literal(Pooling(POOLS[pool]).double(), images(side=16), (0, 3), single=1e-3)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("pruned", [False, True])
def test_few_positions_and_many_weights(size, kernel, pruned):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 40, kernel, 4, padding=kernel // 2, bias=False)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(40)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)
    model = nn.Sequential(conv[0], norms[0], nn.ReLU(), conv[1], norms[1], nn.ReLU(), *head).double().eval()
    for norm in norms:
        nn.init.uniform_(norm.bias)
    if pruned:
        conv[1].weight.data[3:9] = 0  # outputs that are 0, of which a shift makes numbers
    assert_literal(model, images(side=size), (0, 3), single=1e-4)


def test_weights_in_half_precision_under_autocast():
    model, x = Reading("nothing"), torch.rand(2, 3, 16, 16)
    for layer in (model.conv1, model.conv2):
        layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tsgb.explain(model, x, 1)
        assert torch.allclose(found.logits.float(), model(x).float(), atol=0.02)


def test_a_map_under_autocast_is_near_that_of_float32():
    model, x = Reading("nothing"), torch.rand(2, 3, 16, 16)
    single = tsgb.explain(model, x, 1).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tsgb.explain(model, x, 1).maps
    assert relative(half, single) < 1e-2


def test_autocast_of_the_caller_still_trains_afterwards():
    """Autocast caches the weights it casts; recording must not leave casts without a graph there."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)).eval()
    x = torch.rand(2, 3, 10, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tsgb.explain(model, x, 1)
        model(x).float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


# ---- memory


class Strided(nn.Module):
    """What reads or writes memory as if the image were contiguous."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.how = nn.Conv2d(3, 4, 3), nn.Linear(4 * 64, 3), how
        self.double().eval()

    def forward(self, x):
        x = functional.relu(self.conv(x))
        if self.how == "view":
            return self.head(x.view(len(x), -1))
        if self.how == "written view":
            flat = x.view(len(x), -1)
            flat[:, ::2] *= 0.5
            return self.head(x.flatten(1))
        if self.how == "chunks":
            a, b = x.chunk(2, 1)
            a.mul_(2)
            return self.head(torch.cat([b, a], 1).flatten(1))
        if self.how == "written moved":
            moved = x.permute(0, 2, 3, 1)
            moved[..., 1:] *= 3
            return self.head(x.flatten(1))
        if self.how == "written moved twice":
            last = x.permute(0, 2, 3, 1)
            last.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x)).add_(0.5)
            return self.head(last.permute(0, 3, 1, 2).flatten(1))
        if self.how == "scaled in place":
            x.mul_(torch.tensor([1.0, 0.0, 3.0, 4.0]).to(x)[:, None, None]).add_(0.5)
            return self.head(x.flatten(1))
        if self.how == "copy written on":  # which shows nowhere
            x.permute(0, 2, 3, 1).contiguous().add_(1)
            x.reshape(len(x), 2, 2, 64).flip(1).mul_(3)
            return self.head(x.flatten(1))
        if self.how == "into zeros":
            around = torch.zeros(len(x), 4, 8, 8).to(x)
            around[:, :, 1:7] = x[:, :, 1:7] * 2
            return self.head(around.flatten(1))
        if self.how == "into empty":
            around = torch.empty(len(x), 4, 8, 8).to(x)
            around[:, :, :4], around[:, :, 4:] = x[:, :, 4:], x[:, :, :4]
            return self.head(around.flatten(1))
        windows = torch.as_strided(x, (len(x), 4, 64), (256, 64, 1))
        return self.head(windows.flatten(1))


MEMORY = [
    "view", "written view", "written moved", "written moved twice", "scaled in place", "chunks", "as_strided",
    "copy written on", "into zeros", "into empty",
]  # fmt: skip


@pytest.mark.parametrize("how", MEMORY)
def test_how_the_model_lays_its_tensors_out_does_not_matter(how):
    model, x = Strided(how), images()
    assert_literal(model, x, single=1e-4)
    with torch.no_grad():
        assert torch.equal(tsgb.explain(model, x, 0).logits, model(x))
        if how in ("written moved", "chunks", "into zeros", "into empty"):  # which do not depend on the layout
            expected, last = tsgb.explain(model, x, 0).maps, x.to(memory_format=torch.channels_last)
            assert relative(tsgb.explain(model, last, 0).maps, expected) < 1e-9


def test_half_of_a_tensor_is_written_on():
    class Writes(InPlaceModules):
        def forward(self, x):
            x = torch.relu(self.conv1(x))
            x[:, :, :2] *= 2
            return self.head(torch.relu(self.conv2(x)).mean((2, 3)))

    class Computes(Writes):
        def forward(self, x):
            x = torch.relu(self.conv1(x))
            x = torch.cat([x[:, :, :2] * 2, x[:, :, 2:]], 2)
            return self.head(torch.relu(self.conv2(x)).mean((2, 3)))

    writes, computes, x = Writes(), Computes(), images()
    for table in TABLES:
        one, other = (tsgb.explain(m, x, [[0, 1]] * 2, rules=table).maps for m in (writes, computes))
        assert torch.allclose(one, other, atol=1e-12)


# ---- what came by another way


def test_a_model_may_read_its_features_by_numpy():
    class Reads(InPlaceModules):
        def forward(self, x):
            y = self.conv1(x)
            seen.append(float(y.detach().cpu().numpy().mean()))
            return self.head(self.relu(self.norm1(y)).mean((2, 3)))

    class Silent(Reads):
        def forward(self, x):
            return self.head(self.relu(self.norm1(self.conv1(x))).mean((2, 3)))

    seen, x = [], images()
    found = tsgb.explain(Reads(), x, 1)
    assert torch.equal(found.maps, tsgb.explain(Silent(), x, 1).maps)
    assert seen


def test_zeros_of_the_image_are_the_models_zeros():
    model, x = NormalisesItsInput(), images()
    x[:, :, 2:5] = 0

    def choosing(x):
        return model(torch.where(x == 0, torch.full_like(x, -5.0), x))

    with torch.no_grad():
        assert torch.equal(tsgb.explain(choosing, x, 2).logits, choosing(x))


@pytest.mark.parametrize("table", TABLES, ids=["FUSED", "PIXELS", "PAPER"])
def test_nothing_is_left_behind(table):
    model, x, target = Branched(lambda net, x: net.head(mean(net.b(net.a(x))))), torch.rand(2, 3, 16, 16), [[1], [2]]
    tsgb.explain(model, x, target, rules=table)
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    gc.disable()  # what only the collector frees is left behind, too
    try:
        for _ in range(3):
            tsgb.explain(model, x, target, rules=table)
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before
    finally:
        gc.enable()
