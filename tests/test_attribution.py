"""The contract of `explain` and `TSGB`, line by line."""

import contextlib
import dataclasses
import gc
import resource
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from tsgb import networks, rules, scenes


class Small(nn.Module):
    """In-place, skip and pooling in a few layers, with names, a buffer and a dropout."""

    names = ("cat", "dog", "laptop", "top2", "Dog house")

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu, self.dropout = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.to(dtype).eval()

    def features(self, x):
        x = self.relu(self.norm(self.conv1(x)))
        x += self.conv2(x)
        return self.relu(x)

    def forward(self, x):
        return self.head(self.dropout(self.features(x).mean((2, 3))))


def images(count=4, dtype=torch.float32, side=12):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)).to(dtype)


def state_of(model):
    """All that may not change, by value."""
    hooks = {
        (name, key): dict(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks")
    }
    return (
        [
            (name, id(module), type(module), module.training, sorted(vars(module)))
            for name, module in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, p.grad, p.detach().clone()) for name, p in model.named_parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        [module.forward.__func__ for module in model.modules()],
        hooks,
        torch.get_rng_state(),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# The result.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_types(dtype):
    e = tsgb.explain(Small(dtype), images(dtype=dtype), [[0, 1], [2, 3], [4, 4], [1, 0]])
    assert e.maps.shape == (4, 2, 12, 12)
    assert e.maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert e.targets.dtype == torch.int64
    assert e.targets.tolist() == [[0, 1], [2, 3], [4, 4], [1, 0]]
    assert e.logits.shape == (4, 5)
    assert not e.maps.requires_grad
    assert not e.logits.requires_grad
    assert e.maps.min() < 0 < e.maps.max()
    assert torch.equal(e.maps[2, 0], e.maps[2, 1])


def test_the_logits_are_the_models_own():
    model, x = Small(), images()
    with torch.no_grad():
        found, own = tsgb.explain(model, x, 0).logits, model(x)
        assert torch.allclose(found, own, rtol=1e-5, atol=1e-6)  # float32 may round otherwise in another memory format
        assert torch.equal(tsgb.explain(model.double(), x.double(), 0).logits, model(x.double()))


def test_f_in_one_word():
    model, x = Small(), images()
    assert tsgb.explain(model, x, 0).f is None
    assert tsgb.explain(model, x, 0, rules=rules.PIXELS).f == 0.75
    assert tsgb.explain(model, x, 0, rules=rules.PAPER).f == 1.0
    model, x = model.double(), x.double()
    sums = {f: float(tsgb.explain(model, x, 0, rules=rules.PIXELS, f=f).maps.sum()) for f in (0.0, 0.5, 1.0)}
    assert sums[0.5] == pytest.approx((sums[0.0] + sums[1.0]) / 2, rel=1e-9)
    assert tsgb.explain(model, x, 0, rules={**rules.PIXELS, rules.F: 0.5}).f == 0.5


# Targets.


def test_targets_as_users_write_them():
    model, x = Small(), images()
    logits = model(x)
    predicted = logits.argmax(1, keepdim=True)
    cases = {
        "none": (None, predicted.tolist()),
        "int": (3, [[3]] * 4),
        "numpy int": (np.int64(3), [[3]] * 4),
        "list": ([0, 1, 2, 3], [[0], [1], [2], [3]]),
        "tensor": (torch.tensor([0, 1, 2, 3], dtype=torch.int32), [[0], [1], [2], [3]]),
        "array": (np.array([[0, 1]] * 4), [[0, 1]] * 4),
        "nested": ([[0, 1]] * 4, [[0, 1]] * 4),
        "name": ("DOG", [[1]] * 4),
        "names": (["cat", "dog", 2, "laptop"], [[0], [1], [2], [2]]),
        "name like topK": ("top2", [[3]] * 4),
        "topK": ("top3", logits.topk(3).indices.tolist()),
    }
    for name, (target, expected) in cases.items():
        assert tsgb.explain(model, x, target).targets.tolist() == expected, name


def test_a_callable_target():
    model, x = Small(), images()
    e = tsgb.explain(model, x, lambda output: output[:, 1])
    assert e.targets.tolist() == [[-1]] * 4
    assert torch.equal(e.maps, tsgb.explain(model, x, 1).maps)
    model, x, table = model.double(), x.double(), rules.PIXELS
    difference = tsgb.explain(model, x, lambda output: output[:, 1] - output[:, 2], rules=table).maps
    parts = [tsgb.explain(model, x, k, rules=table).maps for k in (1, 2)]
    assert torch.allclose(difference, parts[0] - parts[1], rtol=1e-9, atol=1e-12)


WRONG_TARGETS = {
    "float tensor": (torch.zeros(3, 1), r"target must be int64 of shape \(4,\).*got float32 \(3, 1\)"),
    "bool": (True, "got bool"),
    "one too few": ([0, 1, 2], r"got shape \(3,\)"),
    "one for four": ([0], r"got shape \(1,\)"),
    "K for one image": ([[0, 1]], r"got shape \(1, 2\)"),
    "ragged": ([[0], [1, 2], [0], [0]], "got list"),
    "empty": (torch.zeros(4, 0, dtype=torch.long), r"got shape \(4, 0\)"),
    "too deep": (torch.zeros(4, 1, 1, dtype=torch.long), r"got shape \(4, 1, 1\)"),
    "negative": (-1, "target -1 is no class of the model: its 5 classes are 0 to 4"),
    "too large": ([[0, 1], [0, 5], [0, 1], [0, 1]], "target 5 is no class"),
    "top 6 of 5": ("top6", "must ask for 1 to 5 classes"),
    "top 0": ("top0", "must ask for 1 to 5 classes"),
    "unknown name": ("dig", "'dig' is no class of the model: the nearest are 'dog'"),
    "object": (object(), "got object"),
    "wrong score": (lambda output: output, r"shape \(4,\), one score an image, got float32 \(4, 5\)"),
    "score of a list": (lambda output: [1.0], "got list"),
    "constant score": (lambda output: torch.zeros(4), "does not depend on the image"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_a_wrong_target_is_refused(case):
    target, message = WRONG_TARGETS[case]
    with pytest.raises(tsgb.TargetError, match=message):
        tsgb.explain(Small(), images(), target)


def test_a_name_needs_names_and_may_not_be_ambiguous():
    model = Small()
    model.names = None
    with pytest.raises(tsgb.TargetError, match="the model has no names"):
        tsgb.explain(model, images(), "cat")
    model.names = ["crane", "dog", "crane", "a", "b"]
    with pytest.raises(tsgb.TargetError, match="names the classes 0, 2: give the class index"):
        tsgb.explain(model, images(), "crane")
    model.names = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    assert tsgb.explain(model, images(), "c").targets[0, 0] == 2


# Outputs.


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


OUTPUTS = {
    "dict logits": lambda x: {"logits": x, "features": x * 2},
    "dict out": lambda x: OrderedDict(out=x, aux=x * 2),
    "dict of one": lambda x: {"scores": x},
    "tuple": lambda x: (x, x * 2),
    "list": lambda x: [x],
    "dataclass": lambda x: Output(x, x * 2),
    "tensor": lambda x: x,
}


@pytest.mark.parametrize("wrap", OUTPUTS)
def test_outputs_are_understood(wrap):
    model, x = Small(), images()
    assert torch.equal(tsgb.explain(lambda x: OUTPUTS[wrap](model(x)), x, 2).maps, tsgb.explain(model, x, 2).maps)


def test_other_outputs_say_how():
    model, x = Small(), images()
    for output, message in (
        (lambda x: {"a": model(x), "b": model(x)}, "got dict with a, b: in Python, pass target=fn"),
        (lambda x: None, "got NoneType"),
        (
            lambda x: model.conv1(x),
            r"logits of shape \(N, classes\), got \(4, 6, 12, 12\): in Python, pass target=fn",
        ),
        (lambda x: model(x)[:2], r"one row of logits an image, 4, got \(2, 5\)"),
    ):
        with pytest.raises(tsgb.TargetError, match=message):
            tsgb.explain(output, x, 0)
    table = rules.PIXELS
    e = tsgb.explain(lambda x: {"a": model(x), "b": model(x)}, x, lambda output: output["b"][:, 0], rules=table)
    assert e.logits is None
    assert torch.equal(e.maps, tsgb.explain(model, x, 0, rules=table).maps)


def test_a_region_of_a_segmentation():
    model, x = Small(), images()

    def region(output):
        return output[:, 2, 3:6, 3:6].mean((1, 2))

    e = tsgb.explain(lambda x: model.conv2(model.features(x)), x, region, rules=rules.PIXELS)
    assert e.logits.shape == (4, 6, 12, 12)
    assert not e.maps[:, 0, 10:].any()  # out of reach of the region


# Inputs.


def test_several_inputs_and_keyword_arguments():
    class Two(Small):
        def forward(self, x, y, scale=1.0, *, offset=None):
            return self.head(self.features(x).mean((2, 3)) * scale + self.features(y).mean((2, 3)) + offset)

    model, x, y = Two(torch.float64), images(dtype=torch.float64), images(dtype=torch.float64, side=9).flip(0)
    offset = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
    e = tsgb.explain(model, (x, y), [0, 1, 2, 3], forward_kwargs={"offset": offset, "scale": 2.0})
    assert [m.shape for m in e.maps] == [(4, 1, 12, 12), (4, 1, 9, 9)]
    chunked = tsgb.explain(model, (x, y), [0, 1, 2, 3], forward_kwargs={"offset": offset, "scale": 2.0}, batch_size=3)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(e.maps, chunked.maps, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("target", [None, [3, 2, 1, 0], "top3"])
def test_chunks_change_nothing(batch_size, target):
    model, x = Small(torch.float64), images(dtype=torch.float64)
    whole, parts = tsgb.explain(model, x, target), tsgb.explain(model, x, target, batch_size=batch_size)
    assert torch.allclose(whole.maps, parts.maps, rtol=1e-9, atol=1e-12)
    assert torch.equal(whole.targets, parts.targets)
    assert torch.allclose(whole.logits, parts.logits)
    assert whole.coverage == parts.coverage
    assert whole.why_empty == parts.why_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_does_not_depend_on_its_batch(dtype):
    model, x = Small(dtype), images(dtype=dtype)
    x[1] *= 100
    x[2] = 0
    together = tsgb.explain(model, x, 2).maps
    for n in range(len(x)):
        alone = tsgb.explain(model, x[n : n + 1], 2).maps[0]
        bound = 1e-9 if dtype == torch.float64 else 1e-3
        assert float((alone - together[n]).norm()) <= bound * float(together[n].norm())


WRONG_IMAGES = {
    "no tensor": (np.zeros((1, 3, 8, 8)), TypeError, "floating tensor"),
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "must be floating.*got uint8"),
    "one dimension": (torch.zeros(8), ValueError, r"shape \(N, C, H, W\), got \(8,\)"),
    "none": (torch.zeros(0, 3, 8, 8), ValueError, "at least 1"),
    "no inputs": ((), ValueError, "empty tuple"),
    "lengths": ((torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)), ValueError, "N and all sizes"),
    "nan": (torch.full((2, 3, 8, 8), float("nan")), ValueError, "image 0 holds NaN"),
    "other dtype": (
        torch.zeros(1, 3, 8, 8, dtype=torch.float64),
        TypeError,
        "model's dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_refused(case):
    value, kind, message = WRONG_IMAGES[case]
    with pytest.raises(kind, match=message):
        tsgb.explain(Small(), value, 0)


def test_another_device_is_named():
    with pytest.raises(
        ValueError, match=r"images must be on the model's device meta, got cpu: call images.to\('meta'\)"
    ):
        tsgb.explain(Small().to("meta"), images(), 0)


def test_a_wrong_batch_size_and_a_models_own_errors():
    with pytest.raises(ValueError, match="batch_size must be a positive int or None, got 0"):
        tsgb.explain(Small(), images(), 0, batch_size=0)
    with pytest.raises(RuntimeError, match="expected input"):
        tsgb.explain(Small(), images()[:, :2], 0)

    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tsgb.explain(broken, images(), 0)
    with pytest.raises(ValueError, match="logits for image 0 are NaN"):
        tsgb.explain(lambda x: Small()(x) * float("nan"), images(), 0)


def test_wrong_rules_are_refused():
    for table, kind, message in (
        (
            "PAPPER",
            (TypeError, ValueError),
            "rules must be a table, or one of 'fused', 'pixels', 'paper', got 'PAPPER'",
        ),
        (3, TypeError, "rules must be a table, such as tsgb.rules.FUSED .*got int"),
        ({functional.relu: rules.ORDINARY}, ValueError, "lacks head, f"),
    ):
        with pytest.raises(kind, match=message):
            tsgb.explain(Small(), images(), 0, rules=table)
    for f in ("1", float("nan"), 2, -0.5):
        with pytest.raises(ValueError, match="f must be a number, 0 to 1"):
            tsgb.explain(Small(), images(), 0, rules=rules.PIXELS, f=f)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a module .*got Network: give its \.model"):
        tsgb.explain(tsgb.load("bundled"), images(), 0)
    with pytest.raises(TypeError, match=r"got dict$"):
        tsgb.explain({}, images(), 0)


def test_a_callers_graph_is_left_alone():
    class Scaled(Small):
        def forward(self, x, scale):
            return super().forward(x * scale)

    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    scale = (weight * 2).square()  # no leaf
    tsgb.explain(Scaled(), images(), 0, forward_kwargs={"scale": scale})
    scale.sum().backward()
    assert weight.grad.item() == 8


def test_three_and_one_dimensions():
    for conv, pool, shape in ((nn.Conv1d, (2,), (2, 3, 16)), (nn.Conv3d, (2, 3, 4), (2, 3, 5, 6, 7))):
        layer, head = conv(3, 4, 3), nn.Linear(4, 2)
        e = tsgb.explain(lambda x, c=layer, h=head, d=pool: h(c(x).relu().mean(d)), torch.rand(shape), 1)
        assert e.maps.shape == (2, 1, *shape[2:])


# The model is only read.


class Failing(Small):
    def forward(self, x):
        super().forward(x)
        torch.rand(3)
        raise self.error


@pytest.mark.parametrize(
    "error", [None, RuntimeError("mine"), KeyboardInterrupt()], ids=["success", "exception", "Ctrl-C"]
)
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_the_model_is_as_it_was(error, during):
    model = Small() if error is None or during == "backward" else Failing()
    model.error = error
    model.conv2.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.conv1.register_forward_hook(lambda *args: None)

    def interrupted(grad, x, *args, **kwargs):
        raise error

    table = {**rules.FUSED, functional.batch_norm: interrupted} if error and during == "backward" else rules.FUSED
    x = images()
    x_before, before = x.clone(), state_of(model)
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        tsgb.explain(model, x, 0, rules=table)
    assert same(state_of(model), before)
    assert torch.equal(x, x_before)


def test_a_model_that_writes_on_its_input_leaves_the_callers_image():
    class Writing(Small):
        def forward(self, x):
            return super().forward(x.mul_(2).sub_(1))

    x = images().requires_grad_()
    before = x.detach().clone()
    assert tsgb.explain(Writing(), x, 0).maps.any()
    assert torch.equal(x.detach(), before)
    assert x.grad is None


def test_a_model_that_draws_random_numbers_leaves_the_random_state():
    class Drawing(Small):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(())

    model = Drawing()
    before = torch.get_rng_state()
    tsgb.explain(model, images(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_mode_is_refused():
    for module in ("norm", "dropout"):
        model = Small()
        getattr(model, module).train()
        with pytest.raises(RuntimeError, match=f"training mode: .*'{module}'.*model.eval()"):
            tsgb.explain(model, images(), 0)
    model = Small().train()
    model.norm.eval()
    model.dropout.p = 0.0
    assert tsgb.explain(model, images(), 0).maps.any()
    model = Small()
    model.norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    with pytest.raises(RuntimeError, match="statistics from the batch"):
        tsgb.explain(model, images(), 0)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        tsgb.explain(lambda x: functional.dropout(Small()(x)), images(), 0)


# Callers.


def test_threads_get_what_they_get_alone():
    model = networks.bundled()
    inputs = [torch.randn(1 + n % 2, 3, 128, 128, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    alone = [tsgb.explain(model, x, "top2").maps for x in inputs]
    found: list = [None] * 8
    start = threading.Barrier(8)

    def work(n):
        start.wait()
        found[n] = [tsgb.explain(model, inputs[n], "top2").maps for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(maps, alone[n]) for n in range(8) for maps in found[n])


def test_memory_does_not_grow():
    model, x = Small(), images(2, side=48)

    def call(count):
        for _ in range(count):
            tsgb.explain(model, x, "top3")

    gc.disable()  # what only the collector frees grows, too
    try:
        call(20)
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call(100)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) == tensors
    finally:
        gc.enable()
    assert grown < 20 * 1024  # KiB


def test_a_failed_call_keeps_nothing():
    model, x = Small(), images(2)
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(3):
        with pytest.raises(tsgb.TargetError):
            tsgb.explain(model, x, 99)  # known to be wrong after the forward, of which no backward is run
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_gradient_modes(caller):
    model, x = Small(), images()
    expected = tsgb.explain(model, x, "top2")
    with caller():
        found = tsgb.explain(model, x.clone(), "top2")
        made_inside = tsgb.explain(Small(), images(), "top2")  # weights that are inference tensors
    assert torch.equal(found.maps, expected.maps)
    assert torch.equal(made_inside.maps, expected.maps)
    assert not found.maps.is_inference()


def test_frozen_parameters():
    model, x = Small(), images()
    expected = tsgb.explain(model, x, 0).maps
    assert torch.equal(tsgb.explain(model.requires_grad_(False), x, 0).maps, expected)


def test_channels_last():
    model, x = Small(torch.float64), images(dtype=torch.float64)
    expected = tsgb.explain(model, x, 0).maps
    found = tsgb.explain(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 0).maps
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_bfloat16_autocast():
    model, x = networks.bundled(), _scenes(4)
    expected = tsgb.explain(model, x, [0, 1, 2, 3]).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tsgb.explain(model, x, [0, 1, 2, 3])
        assert torch.is_autocast_enabled("cpu")
    assert found.maps.dtype == torch.float32
    assert found.logits.dtype == torch.bfloat16
    for n in range(4):
        assert float(torch.corrcoef(torch.stack([found.maps[n].flatten(), expected[n].flatten()]))[0, 1]) > 0.999


def _scenes(count):
    return networks.inputs(np.stack([scenes.render(seed, count=2).image for seed in range(count)]))


def test_a_training_loop_is_not_disturbed():
    def train(explaining):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(600, 5)).eval()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(images()), torch.arange(4))
            if explaining:
                tsgb.explain(model, images(), "top2")
            loss.backward()
            optimiser.step()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


# Empty maps.


def test_why_a_map_is_empty():
    class Cut(Small):
        def forward(self, x):
            return functional.relu(functional.conv2d(self.features(x), self.head.weight[:, :, None, None])).mean((2, 3))

    model, x = Cut(), images()
    with torch.no_grad():
        model.head.weight[1] = -1
        model.head.weight[2] = 1
    for table in (rules.FUSED, rules.PIXELS):
        e = tsgb.explain(model, x, [[1, 2]] * 4, rules=table)
        assert all(cut is not None and cut.startswith("logit cut by a ReLU at the head") for cut, _ in e.why_empty)
        assert all(fine is None for _, fine in e.why_empty)
        assert not e.maps[:, 0].any()
    nothing = tsgb.explain(model, torch.zeros_like(x), 2, rules=rules.PIXELS)
    assert nothing.why_empty[0][0].startswith("the image is zero everywhere")
    against = tsgb.explain(Small(), x, lambda output: -output[:, 0], rules=rules.PIXELS, f=0.0)
    assert {reason for row in against.why_empty for reason in row} <= {
        None, "evidence against the target outweighs the evidence for it at every pixel",
    }  # fmt: skip


# Captum's shape.


def test_attribute_is_image_times_gradient():
    model, x = Small(), images()
    method = tsgb.TSGB(model)
    found = method.attribute(x, torch.tensor([0, 1, 2, 3]))
    assert found.shape == x.shape
    assert torch.allclose(found.sum(1), tsgb.explain(model, x, [0, 1, 2, 3]).maps[:, 0], rtol=1e-4, atol=1e-7)
    assert isinstance(method.attribute((x,), 1), tuple)
    with pytest.raises(tsgb.TargetError, match="one class an image, got 2"):
        method.attribute(x, [[0, 1]] * 4)
    assert tsgb.TSGB(Small(torch.bfloat16)).attribute(x.bfloat16(), 1).dtype == torch.bfloat16


def test_attribute_takes_additional_arguments():
    class Scaled(Small):
        def forward(self, x, scale, offset=0.0):
            return super().forward(x * scale) + offset

    model, x = Scaled(torch.float64), images(dtype=torch.float64)
    scale = torch.linspace(1, 2, 4, dtype=torch.float64)[:, None, None, None]
    whole = tsgb.TSGB(model).attribute(x, 1, (scale, 0.5))
    assert torch.allclose(whole, tsgb.TSGB(model).attribute(x, 1, (scale, 0.5), batch_size=1), rtol=1e-9, atol=1e-12)
    assert torch.allclose(tsgb.TSGB(model).attribute(x[:1], 1, scale[:1]), whole[:1], rtol=1e-9, atol=1e-12)


def test_captum_uses_it():
    captum_attr = pytest.importorskip("captum.attr", reason="needs captum, a test dependency")
    from captum.metrics import infidelity, sensitivity_max

    model, x = Small(), images()
    method = tsgb.TSGB(model)
    torch.manual_seed(0)
    tunnel = captum_attr.NoiseTunnel(method)
    smooth = tunnel.attribute(x, nt_samples=3, nt_type="smoothgrad", stdevs=0.01, target=torch.tensor([0, 1, 2, 3]))
    assert smooth.shape == x.shape
    assert (
        float(torch.nn.functional.cosine_similarity(smooth.flatten(), method.attribute(x, [0, 1, 2, 3]).flatten(), 0))
        > 0.9
    )
    assert sensitivity_max(method.attribute, x, perturb_radius=0.01, target=1).isfinite().all()

    def perturb(inputs):
        noise = torch.randn_like(inputs) * 0.01
        return noise, inputs - noise

    assert infidelity(model, perturb, x, method.attribute(x, 1), target=1).isfinite().all()
