"""Batch norm folded into convolutions: the same logits and maps, whatever else reads a convolution's output."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from test_handing import relative
from tsgb import rules
from tsgb.backprop.folding import Waiting
from tsgb.backprop.nodes import Handed


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


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


@pytest.fixture
def folded(monkeypatch):
    """What was folded."""
    found = []
    monkeypatch.setattr(
        Waiting, "folded", lambda self, *a, f=Waiting.folded, **kw: found.append(self) or f(self, *a, **kw)
    )
    return found


def assert_plain(model, x, targets=([0, 1], [3, 2])):
    """The logits of the model, and the maps of the plain form, which folds nothing."""
    ours = tsgb.explain(model, x, list(targets), rules=rules.PIXELS)
    theirs = tsgb.explain(model, x, list(targets), rules=rules.plain(rules.PIXELS))
    assert relative(ours.maps, theirs.maps) < 1e-5
    with torch.no_grad():
        assert torch.allclose(ours.logits, model(x), atol=1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_whatever_reads_what_is_folded(how, folded):
    model, x = Reading(how), torch.rand(2, 3, 16, 16)
    assert_plain(model, x)
    assert len(folded) == 1 + (how not in ("viewed", "written on", "shown", "without grad"))
    assert all(torch.allclose(torch.tensor(a), torch.tensor(model.seen[-1]), atol=1e-5) for a in model.seen)
    if how == "kept":
        expected = model.kept
        tsgb.explain(model, x, 1)
        assert torch.allclose(model.kept, expected, atol=1e-5)


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
            x = self.norm2(raw) * scale[:, None, None]
        elif self.how == "caught":
            try:
                x = functional.max_pool2d(x, 2)
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
    assert_plain(Odd(how), torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("error", [KeyError, None])
def test_what_a_caller_holds_is_worked_out_even_if_the_run_was_in_vain(error):
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
    assert len(held) == (2 if error is None else 1)
    assert all(torch.allclose(raw, model.conv1(x), atol=1e-5) for raw in held)


def test_weights_in_half_precision_under_autocast():
    model, x = Reading("nothing"), torch.rand(2, 3, 16, 16)
    for layer in (model.conv1, model.conv2):
        layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tsgb.explain(model, x, 1)
        assert torch.allclose(found.logits.float(), model(x).float(), atol=0.02)


@pytest.mark.parametrize("norm", [{"affine": False}, {"eps": 0.5, "momentum": None}])
def test_every_batch_norm(norm, folded):
    assert_plain(Reading("nothing", **norm), torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert len(folded) == 2


def test_an_output_that_nothing_read_is_worked_out():
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
        self.eval()

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
def test_a_rectifier_that_writes_on_what_waits(rectifier, how):
    torch.manual_seed(1)
    model = Rectified(RECTIFIERS[rectifier], how)
    assert_plain(model, torch.rand(2, 3, 8, 8))
    if how == "gating":
        assert ("mul", "gate", 1) in tsgb.explain(model, torch.rand(1, 3, 8, 8), 1).coverage


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_rectifier_runs_with_its_convolution_in_any_dimension(dims, nodes):
    torch.manual_seed(1)
    assert_plain(Rectified(nn.ReLU(True), "nothing", dims), torch.rand(2, 3, *(64 // dims**2,) * dims))
    assert nodes[:4] == ["image", "conv", "conv", "conv"]


@pytest.fixture
def nodes(monkeypatch):
    """What the operators are that have a node of their own."""
    found = []
    run = Handed.forward

    def forward(ctx, job, *signals):
        found.append(job.ruling.name[:5].rstrip("123d"))
        return run(ctx, job, *signals)

    monkeypatch.setattr(Handed, "forward", staticmethod(forward))
    return found


@pytest.mark.parametrize("rectifier", ["ReLU", "ReLU6"])
def test_what_is_not_a_number_is_not_rectified_away(rectifier):
    model = Rectified(RECTIFIERS[rectifier], "nothing")
    model.norm2.running_var[1] = -1
    with pytest.raises(ValueError, match="logits for image 0 are NaN"):
        tsgb.explain(model, torch.rand(2, 3, 8, 8), 1)


@pytest.mark.parametrize("is_module", [True, False])
def test_a_head_that_batch_norm_follows_keeps_the_derivative_of_what_is_above(is_module, folded):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_var.uniform_(0.2, 3)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias)
    x, called = torch.rand(2, 3, 8, 8), model if is_module else lambda x: model(x)
    for table in (rules.PIXELS, rules.DEFAULT):
        ours, theirs = (tsgb.explain(called, x, [[0, 1], [3, 2]], rules=t) for t in (table, rules.plain(table)))
        assert relative(ours.maps, theirs.maps) < 1e-5
        assert ours.coverage == theirs.coverage
    assert len(folded) == (2 if is_module else 4)  # which is remembered of a module


class Pooling(Reading):
    def __init__(self, pool):
        super().__init__("nothing")
        self.pool = pool

    def forward(self, x):
        return super().forward(self.pool(functional.relu(self.norm1(self.conv1(x)))).repeat(1, 1, 4, 4)[:, :3])


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        (nn.MaxPool2d(2), 2),
        (lambda x: functional.max_pool2d(x, 2), 0),
        (lambda x: functional.max_pool2d(x, 2, return_indices=True)[0], 0),
        (lambda x: torch.maximum(x[..., ::2, ::2], x[..., 1::2, 1::2]), 0),
        (nn.AdaptiveMaxPool2d(4), 2),
        (nn.AvgPool2d(2), 3),
    ],
)
def test_nothing_is_folded_below_max_pooling(pool, count, folded):
    model, x = Pooling(pool), torch.rand(2, 3, 16, 16)
    run = tsgb.explain(model, x, 1)
    alone = len(folded)
    assert_plain(model, x)
    assert run.maps.abs().sum() > 0
    assert alone == (count if isinstance(pool, nn.Module) else 1)  # the first, in vain
    del folded[:]
    tsgb.explain(model, x, 1)
    assert len(folded) == (count if isinstance(pool, nn.Module) else 0)  # which is remembered of the model


@pytest.mark.parametrize("change", ["float64", "zeros", "PAPER", "bias"])
def test_where_nothing_is_folded(change, folded):
    model, x, table = Reading("nothing"), torch.rand(2, 3, 16, 16), rules.DEFAULT
    if change == "float64":
        model, x = model.double(), x.double()
    elif change == "zeros":
        table = rules.PIXELS  # under DEFAULT a 0 of one of several groups is no loss
        for conv in (model.conv1, model.conv2):
            conv.weight.data[0, 0, 0, 0] = 0
    elif change == "PAPER":
        table = rules.PAPER
    elif change == "bias":
        for conv in (model.conv1, model.conv2):
            conv.bias = nn.Parameter(torch.rand(6))
    tsgb.explain(model, x, 1, rules=table)
    assert not folded


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("pruned", [False, True])
def test_weights_are_not_scaled_where_they_are_more_than_the_output(size, kernel, pruned, folded):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 40, kernel, 4, padding=kernel // 2, bias=False)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(40)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)
    model = nn.Sequential(conv[0], norms[0], nn.ReLU(), conv[1], norms[1], nn.ReLU(), *head).eval()
    for norm in norms:
        nn.init.uniform_(norm.bias)
    if pruned:
        conv[1].weight.data[3:9] = 0  # outputs that are 0, of which a shift makes numbers
    x = torch.rand(2, 3, size, size)
    outputs = 2 * 40 * (size // 4) ** 2
    spared = pruned or outputs < conv[1].weight.numel()
    tsgb.explain(model, x, 1)
    assert len(folded) == 2 - spared
    assert_plain(model, x)


def test_what_is_folded_under_autocast_runs_in_float32(folded):
    model, x = Reading("nothing"), torch.rand(2, 3, 16, 16)
    single = tsgb.explain(model, x, 1).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tsgb.explain(model, x, 1).maps
    assert len(folded) == 4
    assert relative(half, single) < 1e-2
