import json
import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn

import reference_metrics as plain
from tsgb.metrics import boxes, energy, perturbation, ranking, similarity

pytest.importorskip("tsgb.metrics.modules", reason="needs torchmetrics")

from tsgb.metrics import cases, modules

CASES = 7
# The cases' images: some have two cases, and even and odd numbers do not take turns.
NUMBERS = [4, 4, 7, 9, 9, 2, 3]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def maps(seed=0):
    """Maps with a bright patch, ties and both signs."""
    chance = torch.Generator().manual_seed(seed)
    made = torch.randint(-3, 4, (CASES, 8, 8), generator=chance).double() / 4
    for n in range(CASES):
        made[n, n % 4 : n % 4 + 4, 2:6] += n % 3
    return made


def masks():
    made = torch.zeros(CASES, 8, 8, dtype=torch.bool)
    for n in range(CASES - 1):
        made[n, 2:5, n % 3 : n % 3 + 4] = True
    return made  # the last is empty


def arguments(name):
    """What each metric is made with, and what it is updated with: one entry a case."""
    found = [[[n % 3, 2, n % 3 + 4, 5], [0, 0, 2, 2]] for n in range(CASES)]
    images = torch.randn(CASES, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    rounds = [1.0 + n * n for n in range(CASES)]
    perturbed = ({"model": network(), "steps": 9}, (images, maps(), torch.arange(CASES) % 4))
    return {
        "AveragePrecision": ({"seed": 2}, (maps(), masks())),
        "Pointing": ({"tolerance": 1.5}, (maps(), masks(), [n % 3 for n in range(CASES)], torch.arange(CASES) < 3)),
        "Energy": ({}, (maps(), masks())),
        "GridShare": ({}, (maps(), masks())),
        "BoxAccuracy": ({"iou": 0.4}, (maps(), found)),
        "MaxBoxAccuracy": ({}, (maps(), found, NUMBERS)),
        "Deletion": perturbed,
        "Insertion": perturbed,
        "Cascade": ({}, (maps(), (maps() + maps(1), maps(1), maps(2)))),
        "RandomLogit": ({}, (maps(), maps(1))),
        "Sensitivity": ({}, (maps(), maps(1))),
        "Ratio": ({}, (rounds, [2.0] * CASES)),
    }[name]


def part(values, chosen):
    """The cases of a slice, of what an update is given."""
    if isinstance(values, tuple):  # of Cascade: the stages
        return tuple(stage[chosen] for stage in values)
    return values[chosen]


def metric_of(name, *slices):
    """A metric that has been updated with these cases, slice by slice."""
    options, given = arguments(name)
    metric = getattr(modules, name)(**options)
    for chosen in slices:
        metric.update(*(part(values, chosen) for values in given))
    return metric


def numbers(computed):
    """What compute returned, as JSON has it: a dict of numbers, a curve's points one by one."""
    found = computed if isinstance(computed, dict) else {"value": computed}
    return {
        f"{name}{place or ''}": v for name, values in found.items() for place, v in enumerate(values.view(-1).tolist())
    }


def means(name):
    """The same from the functions, case by case, and averaged by hand."""
    _, given = arguments(name)
    rows = []
    for n in range(CASES):
        one = [part(values, slice(n, n + 1)) for values in given]
        if name == "AveragePrecision":
            rows += [v for v in ranking.average_precision(*one, seed=2).tolist() if not math.isnan(v)]
        elif name in ("Energy", "GridShare"):
            rows += (energy.energy if name == "Energy" else energy.grid)(*one).tolist()
        elif name == "BoxAccuracy":
            rows.append(boxes.box_accuracy(one[0][0], one[1][0], 0.4))
        elif name in ("Deletion", "Insertion"):
            function = perturbation.deletion_scores if name == "Deletion" else perturbation.insertion_scores
            rows += perturbation.area(function(network(), *one, steps=9)).tolist()
        elif name in ("RandomLogit", "Sensitivity"):
            rows += (similarity.ssim if name == "RandomLogit" else similarity.correlation)(*one).tolist()
    return sum(rows) / len(rows)


SPECIAL = ("Pointing", "MaxBoxAccuracy", "Cascade", "Ratio")


@pytest.mark.parametrize("name", [name for name in modules.__all__ if name not in SPECIAL])
def test_compute_is_the_mean_over_the_cases(name):
    computed = metric_of(name, slice(0, 3), slice(3, CASES)).compute()
    assert computed.dtype == torch.float64
    assert computed.shape == ()
    assert computed.item() == pytest.approx(means(name), abs=1e-9)


def test_pointing_over_cases_and_classes_worked_by_hand():
    # 4 x 4 maps whose highest pixel is at (0, n); the mask is the left half, so n = 0 and 1 hit, 2 and 3 miss.
    # Class 7: n = 0, 1, 2, so 2 hits of 3; class 9: n = 3, 0 of 1. Mean 2/4, over classes (2/3 + 0) / 2 = 1/3.
    # Difficult: n = 1, 2, 3: mean 1/3; class 7 has 1 of 2, class 9 0 of 1: 1/4.
    peaks, left = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool)
    peaks[range(4), 0, range(4)] = 1
    left[:, :, :2] = True
    metric = modules.Pointing()
    metric.update(peaks[:1], left[:1], torch.tensor([7]))
    metric.update(peaks[1:], left[1:], [7, 7, 9], [True, True, True])
    expected = {"mean": 1 / 2, "mean_over_classes": 1 / 3, "difficult": 1 / 3, "difficult_over_classes": 1 / 4}
    assert numbers(metric.compute()) == pytest.approx(expected, abs=1e-12)
    near = modules.Pointing(tolerance=3.1)  # two original pixels a column: n = 2 is 2 away and hits, n = 3 is 4 away
    near.update(peaks, left, scale=(1, 2))
    assert near.compute()["mean"] == near.compute()["mean_over_classes"] == 3 / 4
    assert math.isnan(near.compute()["difficult"])


def test_pointing_is_its_twin():
    _, given = arguments("Pointing")
    hits = ranking.pointing(*given[:2], tolerance=1.5).tolist()
    pairs = list(zip(hits, given[2], strict=True))
    found = numbers(metric_of("Pointing", slice(0, 4), slice(4, CASES)).compute())
    assert found["mean"] == pytest.approx(sum(hits) / CASES, abs=1e-12)
    assert found["mean_over_classes"] == pytest.approx(plain.mean_of_classes(pairs), abs=1e-12)
    assert found["difficult_over_classes"] == pytest.approx(plain.mean_of_classes(pairs[:3]), abs=1e-12)


def test_the_best_threshold_is_of_the_even_and_the_accuracy_of_the_odd_images():
    # The left column is 4, the one beside it 2. Up to below 0.5 of the maximum the box is both columns, of IoU 4 / 8
    # with the left one, from there on it is the left one alone. Even images have the left column as their object, of
    # the odd ones one has the middle, of IoU 4 / 12 with both columns, or the right half, which no box meets.
    map = torch.zeros(4, 4)
    map[:, 0], map[:, 1] = 4, 2
    left, middle, right = [[0, 0, 1, 4]], [[1, 0, 3, 4]], [[2, 0, 4, 4]]
    metric = modules.MaxBoxAccuracy(version=1)
    metric.update(map.expand(3, 4, 4), [left, left, left], torch.tensor([6, 301, 6], dtype=torch.int32))
    metric.update(map.expand(3, 4, 4), [middle, left, left], [5, 2**40, 301])
    # IoU 0.5 is enough from t = 0 on, the lowest of the best.
    assert numbers(metric.compute()) == pytest.approx({"accuracy": 2 / 3, "thresholds": 0.0}, abs=1e-12)
    # Version 2: at IoU 0.3 and 0.5 the same, at 0.7 it takes the left column alone.
    metric = modules.MaxBoxAccuracy()
    metric.update(map.expand(4, 4, 4), [left, left, left, right], [0, 1, 0, 1])
    expected = {"accuracy": 1 / 2, "thresholds": 0.0, "thresholds1": 0.0, "thresholds2": 0.5}
    assert numbers(metric.compute()) == pytest.approx(expected, abs=1e-12)


def test_box_accuracy_of_many_maps_is_the_functions():
    metric = metric_of("MaxBoxAccuracy", slice(0, 2), slice(2, CASES))
    _, (given, found, _) = arguments("MaxBoxAccuracy")
    hits = torch.stack([boxes.threshold_hits(m, b) for m, b in zip(given, found, strict=True)])
    even = torch.tensor([True, True, False, False, False, True, False])
    best = [boxes.max_box_accuracy(hits[:, row], even) for row in (1, 2, 3)]
    computed = numbers(metric.compute())
    assert computed["accuracy"] == pytest.approx(sum(value for value, _ in best) / 3, abs=1e-12)
    assert [computed[f"thresholds{row or ''}"] for row in range(3)] == [index / 1000 for _, index in best]
    for chosen in ((slice(0, 1), slice(1, CASES)), (slice(1, CASES, 2), slice(0, CASES, 2)), (slice(0, CASES),)):
        assert numbers(metric_of("MaxBoxAccuracy", *chosen).compute()) == computed


def test_box_accuracy_takes_no_cases_and_keeps_the_images_numbers():
    metric = metric_of("MaxBoxAccuracy", slice(0, 0), slice(0, CASES))
    assert metric.table()[:, :8].contiguous().view(torch.int64)[:, 0].tolist() == NUMBERS
    metric = modules.MaxBoxAccuracy()
    metric.update(maps()[:2], [[], []], [-3, 10**12 + 1])
    assert metric.table()[:, :8].contiguous().view(torch.int64)[:, 0].tolist() == [-3, 10**12 + 1]
    with pytest.raises(ValueError, match="images must be of even and of odd number, got 0 even of 2"):
        metric.compute()
    metric = modules.MaxBoxAccuracy()
    metric.update(maps()[:2], [[], []], [8, 2])
    with pytest.raises(ValueError, match="images must be of even and of odd number, got 2 even of 2"):
        metric.compute()


def test_box_accuracy_takes_the_iou_asked_for():
    # The mean is 18 / 16, so the box is (1, 1, 3, 3), of IoU 4 / 6 with the object.
    map = torch.zeros(1, 4, 4)
    map[0, 1:3, 1:3] = torch.tensor([[3.0, 6.0], [6.0, 3.0]])
    for iou, expected in ((0.5, 1), (0.66, 1), (0.67, 0)):
        metric = modules.BoxAccuracy(iou=iou)
        metric.update(map, [[[1, 1, 4, 3]]])
        assert metric.compute() == expected


def test_cascade_averages_cases_then_stages():
    computed = metric_of("Cascade", slice(0, 2), slice(2, CASES)).compute()
    _, (originals, stages) = arguments("Cascade")
    curves = {
        "spearman": [similarity.spearman(originals, stage).mean().item() for stage in stages],
        "spearman_abs": [similarity.spearman(originals.abs(), stage.abs()).mean().item() for stage in stages],
        "ssim": [statistics.mean(plain.ssim(a, b) for a, b in zip(originals, stage, strict=True)) for stage in stages],
    }
    for name, curve in curves.items():
        assert computed[f"{name}_curve"].tolist() == pytest.approx(curve, abs=1e-9)
        assert computed[name].item() == pytest.approx(sum(curve) / 3, abs=1e-9)


def test_the_ratio_is_the_median_over_rounds():
    metric = modules.Ratio()
    costs, references = [3.0, 1.0, 8.0, 2.5], [1.0, 1.0, 2.0, 1.0]
    for cost, reference in zip(costs, references, strict=True):
        metric.update(cost, reference)
    expected = statistics.median(c / r for c, r in zip(costs, references, strict=True))
    assert metric.compute().item() == expected == 2.75
    metric.update(torch.tensor([9.0]), torch.tensor([1.0]))
    assert metric.compute().item() == 3.0


@pytest.mark.parametrize("name", modules.__all__)
def test_reset_forgets_and_calling_accumulates(name):
    whole = numbers(metric_of(name, slice(0, 4), slice(4, CASES)).compute())
    metric = metric_of(name, slice(1, 3))
    metric.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match=f"{name} has seen no case"):
        metric.compute()
    _, given = arguments(name)
    for chosen in (slice(0, 4), slice(4, CASES)):
        of_batch = metric(*(part(values, chosen) for values in given))
        assert repr(numbers(of_batch)) == repr(numbers(metric_of(name, chosen).compute()))
    assert numbers(metric.compute()) == pytest.approx(whole, abs=1e-12, nan_ok=True)
    assert numbers(metric.clone().compute()) == pytest.approx(whole, abs=1e-12, nan_ok=True)


def test_the_model_is_not_part_of_the_metric():
    metric = metric_of("Deletion", slice(0, 1))
    assert not list(metric.parameters())
    assert not metric.state_dict()


# Each process is a copy of one that has imported everything; the second one sees fewer cases, or none. At last every
# other case goes to each, as a DistributedSampler deals them out.
PROGRAM = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
import test_metrics_modules as own
torch.set_num_threads(1)
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
found = {{}}
for name in own.modules.__all__:
    for first in (5, own.CASES):
        shares = (slice(0, 2), slice(2, first)) if rank == 0 else (slice(first, own.CASES),)
        metric = own.metric_of(name, *(s for s in shares if s.start < s.stop))
        found[f"{{name}} {{first}}"] = own.numbers(metric.compute())
    found[f"{{name}} strided"] = own.numbers(own.metric_of(name, slice(rank, own.CASES, 2)).compute())
every = [None, None]
dist.all_gather_object(every, found)
dist.barrier()
dist.destroy_process_group()
if rank:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps(every))
"""


@pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs fork and gloo")
def test_two_processes_compute_what_one_does(tmp_path):
    folder = str(modules.__file__).rpartition("src")[0] + "tests"
    program = PROGRAM.format(tests=folder, store=str(tmp_path / "store"))
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for found in json.loads(ran.stdout):
        assert len(found) == 3 * len(modules.__all__)
        for key, computed in found.items():
            alone = numbers(metric_of(key.split()[0], slice(0, CASES)).compute())
            assert computed == pytest.approx(alone, abs=1e-12, nan_ok=True), key


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchmetrics: pip install 'tsgb\[bench\]'"):
        cases._torchmetrics()


def test_wrong_arguments_are_named():
    given, inside = maps(), masks()
    with pytest.raises(ValueError, match=r"classes must be integers \(7,\), got torch.int64 \(1,\)"):
        modules.Pointing().update(given, inside, [3])
    with pytest.raises(ValueError, match=r"classes must be integers"):
        modules.Pointing().update(given, inside, [0.5] * CASES)
    with pytest.raises(ValueError, match=r"difficult must be bool \(7,\)"):
        modules.Pointing().update(given, inside, difficult=[True])
    for metric, more in ((modules.BoxAccuracy(), ()), (modules.MaxBoxAccuracy(), (NUMBERS,))):
        with pytest.raises(ValueError, match="boxes must be a list of 7 arrays"):
            metric.update(given, [[[0, 0, 1, 1]]], *more)
    for wrong, got in (([3], r"torch.int64 \(1,\)"), (given[:, 0, 0], "torch.float64"), ([True] * CASES, "torch.bool")):
        with pytest.raises(ValueError, match=r"images must be integers \(7,\), got " + got):
            modules.MaxBoxAccuracy().update(given, [[]] * CASES, wrong)
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        modules.MaxBoxAccuracy(version=3)
    for wrong in (([1.0, 2.0], 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match=r"costs (must be 0 or more )?and references"):
            modules.Ratio().update(*wrong)
