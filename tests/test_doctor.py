import pytest
import torch

import helpers
import tsgb
from helpers import Act, chain
from tsgb import doctor
from tsgb.doctor import examine

CHECKS = [
    "every operator has a rule",
    "maps are finite",
    "maps are not empty",
    "model is unchanged",
    "maps are repeatable",
    "maps do not depend on the batch",
]


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32)


def failed(found):
    return [check.name for check in found.checks if not check.passed]


def test_a_sound_network_passes_every_check(images):
    found = examine(chain(), images)
    assert [check.name for check in found.checks] == CHECKS
    assert failed(found) == []
    e = tsgb.explain(chain(), images)
    assert found.coverage == e.coverage


def test_table_is_the_one_asked_for(images):
    found = examine(chain(), images, tsgb.rules.PAPER)
    e = tsgb.explain(chain(), images, rules=tsgb.rules.PAPER)
    assert found.coverage == e.coverage
    assert found.coverage != examine(chain(), images).coverage


def test_operators_without_a_rule_are_named_and_counted(images):
    found = examine(chain(Act(torch.erfc), Act(torch.cos), Act(torch.erfc)), images)
    assert failed(found)[0] == "every operator has a rule"  # and all evidence is against the class, which it tells too
    assert found.checks[0].seen == "ordinary gradient: cos (1), erfc (2)"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[-1].weight.data.mul_(1.001),
        lambda model: model[1].running_mean.add_(1e-3),
        lambda model: setattr(model[0].weight, "grad", torch.ones_like(model[0].weight)),
        lambda model: model[-1].requires_grad_(False),
        lambda model: model[2].train(),
        lambda model: model[0].register_forward_hook(print),
        lambda model: setattr(model, "note", 1),
        lambda model: setattr(model[2], "forward", torch.nn.functional.relu),
        lambda model: torch.rand(1),
    ],
    ids=["weight", "buffer", "grad", "frozen", "mode", "hook", "attribute", "forward", "random state"],
)
def test_an_explanation_that_leaves_a_trace_fails(images, monkeypatch, change):
    model = chain()
    model[2].forward = torch.relu

    def explain(*arguments, **options):
        change(model)
        return tsgb.explain(*arguments, **options)

    monkeypatch.setattr(doctor, "explain", explain)
    assert "model is unchanged" in failed(examine(model, images))


def test_a_network_that_counts_its_calls_fails(images):
    assert failed(examine(helpers.counting()[0].eval(), images)) == ["model is unchanged"]


def test_a_network_that_mixes_its_images_fails(images):
    found = examine(chain(Act(lambda x: x - x.mean(0, keepdim=True) / 2)), images)
    assert failed(found) == ["maps do not depend on the batch"]


def test_a_network_that_differs_from_call_to_call_fails(images):
    scales = iter(range(1, 100))
    found = examine(chain(Act(lambda x: x * next(scales))), images)
    assert {"maps are repeatable", "maps do not depend on the batch"} <= set(failed(found))


def test_random_numbers_alone_are_no_fault(images):
    """An explanation restores the random state, so that each draws the same."""
    found = examine(chain(Act(lambda x: x * torch.rand(()))), images)
    assert failed(found) == []


def test_empty_maps_fail_with_their_reason(images):
    model = torch.nn.Sequential(chain(), torch.nn.ReLU())
    with torch.no_grad():
        model[0][-1].bias.fill_(-100)
    found = examine(model, images)
    assert failed(found) == ["maps are not empty"]
    assert found.checks[2].seen == "logit cut by a ReLU at the head: no gradient arrives there"


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (helpers.mlp()[0].eval(), tsgb.CoverageError, "no convolution"),
        (chain().train(), RuntimeError, "training mode"),
    ],
)
def test_what_cannot_be_explained_is_not_examined(images, model, error, words):
    with pytest.raises(error, match=words):
        examine(model, images)
