"""A compiled explainer gives what `explain` gives, on images that it was not traced with."""

import shutil
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsgb
from helpers import REAL, SPELLED, Branched, Drawn, NormalisesItsInput, mean, printed, real, relative
from tsgb import compiled, rules
from tsgb.passes import Pass


class Small(nn.Sequential):
    names = ("a", "b", "c", "d", "e")

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip
        self.eval()


def images(count=2, size=14, seed=0):
    """Of both signs, with black pixels."""
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    x[:, :, 2:4] = 0
    return x


def traced(model, example, target=None, **options):
    return tsgb.compile(model, example, target, backend="eager", **options)


def counting():
    """A backend that tells how often it was asked to compile."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return backend, graphs


def assert_same(ours, theirs, tolerance=1e-5):
    assert (ours.maps - theirs.maps).norm() <= tolerance * theirs.maps.norm()
    assert torch.equal(ours.targets, theirs.targets)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert (ours.coverage, ours.why_empty, ours.f) == (theirs.coverage, theirs.why_empty, theirs.f)


@pytest.mark.parametrize("target", [None, 3, "top2", "d", [[0, 1, 4], [2, 2, 3]], lambda output: output[:, 0]])
def test_every_target_that_explain_takes(target):
    model, x = Small(), images()
    explainer = traced(model, torch.rand(2, 3, 14, 14), target)
    theirs = tsgb.explain(model, x, target)
    ours = explainer(x, target)
    assert_same(ours, theirs)
    assert ours.maps.shape == theirs.maps.shape
    assert ours.maps.dtype == theirs.maps.dtype


@pytest.mark.slow
@pytest.mark.parametrize("table", ["FUSED", "PIXELS", "PAPER"])
@pytest.mark.parametrize("network", SPELLED)
def test_every_spelling(network, table):
    model, table = network(), getattr(rules, table)
    explainer = traced(model, torch.rand(2, 3, 12, 12).double(), [[0, 1]] * 2, rules=table)
    x = images(2, 12).double()
    assert_same(explainer(x, [[2, 1], [3, 4]]), tsgb.explain(model, x, [[2, 1], [3, 4]], rules=table), 1e-9)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.data(), st.integers(0, 2**31))
def test_a_network_drawn_at_random(data, seed):
    torch.manual_seed(seed)
    model = Drawn(data.draw).double().eval()
    explainer = traced(model, torch.rand(2, 3, 23, 21).double(), [[0, 1]] * 2)
    x = torch.randn(2, 3, 23, 21).double()
    assert_same(explainer(x, [[3, 1]] * 2), tsgb.explain(model, x, [[3, 1]] * 2), 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_networks(name, shared):
    model, x = real(name, shared, slice(2))
    explainer = traced(model, x.flip(0), [[3, 281], [281, 7]])
    assert_same(explainer(x, [[7, 9], [281, 7]]), tsgb.explain(model, x, [[7, 9], [281, 7]]), 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor():
    # In a process of its own, as the compiler leaves threads behind.
    program = """if True:
        import tsgb, torch
        from test_compiled import Small, assert_same, images
        explainer = tsgb.compile(Small(), torch.rand(2, 3, 14, 14), [[0, 1]] * 2)
        assert_same(explainer(images(), [[4, 1], [3, 0]]), tsgb.explain(Small(), images(), [[4, 1], [3, 0]]), 1e-4)
        print("same")"""
    assert printed(program, Path(__file__).parent) == "same"


def test_a_head_that_batch_norm_follows():
    def forward(net, x):
        return mean(torch.relu(net.norm(net.b(torch.relu(net.a(x))))))

    net, x = Branched(forward), torch.rand(1, 3, 16, 16)
    net.b = nn.Conv2d(6, 6, 3, bias=False)
    found = traced(net, x)(x)  # of the class that the last rectifier lets pass
    assert relative(found.maps, tsgb.explain(net, x).maps) < 1e-4


def test_images_one_by_one_are_refused_where_several_come():
    def one_by_one(net, x):
        return torch.cat([net.head(mean(torch.relu(net.b(torch.relu(net.a(one)))))) for one in x.split(1)])

    with pytest.raises(RuntimeError, match="give it one image"):
        traced(Branched(one_by_one), torch.rand(3, 3, 16, 16))


def test_it_is_traced_once_for_a_shape_a_number_of_classes_and_a_precision():
    backend, graphs = counting()
    model = Small()
    explainer = tsgb.compile(model, images(), backend=backend, rules=rules.PIXELS)
    for seed in (1, 2):
        explainer(images(seed=seed))
    assert len(graphs) == 1
    for count, target in ((3, None), (2, 1), (2, 4), (2, "top2"), (2, [[1, 2]] * 2), (2, [[3, 4]] * 2), (3, None)):
        assert_same(explainer(images(count), target), tsgb.explain(model, images(count), target, rules=rules.PIXELS))
    assert len(graphs) == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explainer(images(), 1).logits.dtype == torch.bfloat16
    assert explainer(images(), 1).logits.dtype == torch.float32
    assert len(graphs) == 6


def test_the_graphs_last_used_are_kept(monkeypatch):
    monkeypatch.setattr(compiled, "_KEPT", 4)
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)).eval()
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))  # runs when it is traced
    x = torch.rand(1, 3, 8, 8)
    explainer = tsgb.compile(model, x, 1, backend="eager", rules=rules.PIXELS)
    for channel in range(6):
        explainer(x, lambda logits, channel=channel: logits[:, channel])
        explainer(x, 1)
    assert len(explainer._programs) == 4
    del calls[:]
    explainer(x, 1)
    assert not calls


def test_black_pixels_of_a_model_that_normalises_its_input():
    model, x = NormalisesItsInput(), images().double()
    theirs = tsgb.explain(model, x, 1)
    assert theirs.maps[:, :, 2:4].abs().max() > 0
    assert_same(traced(model, torch.rand(2, 3, 14, 14).double(), 1)(x, 1), theirs, 1e-9)


@pytest.mark.parametrize("change", ["written", "zeroed", "replaced", "buffer"])
def test_a_changed_weight_is_seen(change):
    model, x = Small(), images()
    explainer = traced(model, x, 1)
    before = explainer(x, 1).maps
    with torch.no_grad():
        if change == "written":
            model[0].weight *= 0.5
        elif change == "zeroed":
            model[0].weight[0, 0] = 0
        elif change == "replaced":
            model[4].weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        else:
            model[1].running_mean += 1
    assert_same(explainer(x, 1), tsgb.explain(model, x, 1))
    assert not torch.equal(explainer(x, 1).maps, before)


def test_weights_written_to_behind_a_function_are_seen():
    model, x = Small(), images()
    explainer = traced(lambda image: model(image), x, 1)
    with torch.no_grad():
        model[0].weight *= 0.5
    assert_same(explainer(x, 1), tsgb.explain(model, x, 1))


class ByValue(Small):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Drawing(Small):
    def forward(self, x):
        return super().forward(x + 1e-3 * torch.randn_like(x))


class ByNumpy(Small):
    def forward(self, x):
        return super().forward(x * torch.from_numpy((x.detach().numpy() > 0) + 0.5).float())


class LogitsByNumpy(Small):
    def forward(self, x):
        return super().forward(x) + torch.from_numpy(x.detach().numpy().reshape(len(x), -1)[:, :5] * 10)


class CountByNumpy(Small):
    def forward(self, x):
        return super().forward(x * float((x.detach().numpy() > 0).mean()))


def test_a_target_that_cannot_be_hashed():
    @dataclass
    class Score:
        k: int

        def __call__(self, output):
            return output[:, self.k]

    model, x = Small(), images()
    explainer = traced(model, x, Score(1))
    assert_same(explainer(x, Score(3)), tsgb.explain(model, x, Score(3)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ByValue(), "depends on the values"),
        (CountByNumpy(), "by numpy"),
        (Drawing(), "draws random"),
        (torch.compile(Small()), "compiled itself"),
    ],
)
def test_what_cannot_be_traced_is_refused(model, words):
    with pytest.raises(RuntimeError, match=f"{words}.*tsgb.explain"):
        traced(model, images(), 1)


@pytest.mark.parametrize("model", [ByNumpy(), LogitsByNumpy()])
def test_what_comes_by_numpy_is_refused(model):
    with pytest.raises(RuntimeError, match="NumPy"):
        traced(model, images(), 1)
    with pytest.raises(tsgb.CoverageError, match="NumPy"):
        tsgb.explain(model, images(), 1)


def test_the_graph_may_differ_where_the_last_digit_decides():
    torch.manual_seed(0)
    relevance, targets, arrived = torch.randn(2, 3, 8, 8), torch.tensor([[1, 2]] * 3), torch.ones(2, 3, dtype=bool)
    logits, one_map = torch.randn(3, 5), torch.zeros(2, 3, 1, 1)
    are_close = partial(compiled._are_close, rounding=torch.finfo(torch.float32).eps)
    one_map[1, 2] = 1
    eager = Pass([relevance], targets, logits, arrived)
    assert are_close(Pass([relevance * (1 + 0.01 * one_map)], targets, logits * (1 + 1e-5), arrived), eager)
    noise, nothing = (torch.cat([relevance[:1], size * relevance[1:]]) for size in (1e-9, 0))
    of_rounding = Pass([noise], targets, logits, arrived)  # a class without evidence
    assert are_close(of_rounding, Pass([nothing], targets, logits, arrived))
    for found in (
        Pass([relevance * (1 + 0.3 * one_map)], targets, logits, arrived),
        Pass([relevance], targets, logits * 1.01, arrived),
        Pass([relevance], targets + 1, logits, arrived),
        Pass([relevance], targets, logits, ~arrived),
    ):
        assert not are_close(found, eager)


def test_a_deep_network_under_autocast_may_differ_by_its_rounding():
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()) for _ in range(16)
    ]
    for layer in layers:
        nn.init.kaiming_normal_(layer[0].weight)
        nn.init.uniform_(layer[1].running_var, 0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 48, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = traced(model, images(), 1)(images(), 1), tsgb.explain(model, images(), 1)
    rounding = torch.finfo(torch.bfloat16).eps
    assert (ours.maps - theirs.maps).norm() <= 40 * rounding * theirs.maps.norm()
    assert (ours.logits - theirs.logits).norm() <= 4 * rounding * theirs.logits.norm()


@pytest.mark.parametrize("which", [0, -1])  # the map, the logits
def test_a_backend_that_makes_wrong_code_is_found_out(which):
    def backend(graph, inputs):
        def call(*given):
            found = list(graph(*given))
            found[which] = 2 * found[which]
            return found

        return call

    with pytest.raises(RuntimeError, match=r'of torch.compile made code .* another map: .* backend="eager"'):
        tsgb.compile(Small(), images(), 1, backend=backend)


def test_errors_are_those_of_explain():
    model, x = Small(), images()
    explainer = traced(model, x, 1)
    for wrong in (5, [1], "zebra", [[0, 9], [1, 1]]):
        with pytest.raises(tsgb.TargetError) as ours:
            explainer(x, wrong)
        with pytest.raises(tsgb.TargetError) as theirs:
            tsgb.explain(model, x, wrong)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="NaN"):
        explainer(torch.full_like(x, torch.nan), 1)
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        explainer(x, 1)
    with pytest.raises(tsgb.CoverageError, match="strict"):
        traced(
            nn.Sequential(nn.Conv2d(3, 4, 3), Cosine(), *list(model)[-3:-1], nn.Linear(4, 5)).eval(), x, 1, strict=True
        )


class Cosine(nn.Module):
    def forward(self, x):
        return x.cos()


def test_the_callers_modes_and_the_model_are_left_alone():
    model, x = Small(), images()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    explainer = traced(model, x, 1)
    alone = explainer(x, 1).maps
    leaf = x.clone().requires_grad_()
    with torch.inference_mode():
        assert torch.equal(explainer(x, 1).maps, alone)
    with torch.no_grad():
        assert torch.equal(explainer(leaf, 1).maps, alone)
    assert leaf.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_threads_share_an_explainer():
    model = Small()
    explainer = traced(model, images(), 1)
    alone = [explainer(images(1 + n % 2, seed=n), 1).maps for n in range(8)]
    found = [None] * 8

    def work(n):
        found[n] = traced_again(images(1 + n % 2, seed=n), 1).maps

    traced_again = traced(model, images(3), 1)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
