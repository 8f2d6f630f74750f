import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference_metrics as plain
from tsgb.metrics.perturbation import area, deletion_scores, insertion_scores


def network(classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(6), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(30, classes)).double().eval()


def cases(count, height, width, seed=0):
    chance = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, generator=chance, dtype=torch.float64)
    maps = torch.randn(count, height, width, generator=chance)
    return images, maps, torch.randint(0, 4, (count,), generator=chance)


def brightness(images):
    """Two logits: the sum of the image, and nothing."""
    total = images.sum((1, 2, 3))
    return torch.stack([total, torch.zeros_like(total)], 1)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# steps of one pixel, that divide, of uneven numbers of pixels, more than pixels, one for all
SIZES = [(6, 6, 36), (6, 6, 12), (6, 6, 8), (5, 7, 12), (5, 7, 50), (4, 3, 1)]


@pytest.mark.parametrize(("height", "width", "steps"), SIZES)
def test_scores_are_their_twins(height, width, steps):
    model = network()
    images, maps, targets = cases(3, height, width)
    maps[1] = maps[1].round()  # many ties
    maps[2] = 0
    deleted = deletion_scores(model, images, maps, targets, batch_size=7, steps=steps, seed=3)
    inserted = insertion_scores(model, images, maps, targets, batch_size=7, steps=steps, seed=3)
    assert deleted.shape == inserted.shape == (3, steps + 1)
    assert deleted.dtype == inserted.dtype == torch.float64
    for n, (image, map, target) in enumerate(zip(images, maps, targets.tolist(), strict=True)):
        nothing, blurred = torch.zeros_like(image), plain.blurred(image)
        away = plain.perturbed_scores(model, image, nothing, map, target, steps, seed=3)
        back = plain.perturbed_scores(model, blurred, image, map, target, steps, seed=3)
        assert deleted[n].tolist() == pytest.approx(away, abs=1e-10)
        assert inserted[n].tolist() == pytest.approx(back, abs=1e-10)


def test_a_four_by_four_image_worked_by_hand():
    # The map ranks row by row, backwards. Four steps delete four pixels each, the last row first; the logit is the sum
    # of what is left: 10 + 6 + 3 + 1 = 20, then 10, 4, 1, 0 as rows 4 (10), 3 (6), 2 (3), 1 (1) go.
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :, 2] = torch.tensor([1.0, 3.0, 6.0, 10.0])
    maps = torch.arange(16.0).reshape(1, 4, 4)
    scores = deletion_scores(brightness, image, maps, torch.tensor([0]), steps=4)
    expected = [sigmoid(20), sigmoid(10), sigmoid(4), sigmoid(1), 0.5]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-12)
    # (0.99999999794 / 2 + 0.9999546 + 0.9820138 + 0.7310586 + 0.5 / 2) / 4
    assert area(scores).item() == pytest.approx(0.8657567, abs=1e-7)
    # Inserted in that order over an image that the model sees nothing in: 0, 10, 16, 19, 20.
    scores = insertion_scores(lambda x: brightness(x * (x == x.round())), image, maps, torch.tensor([0]), steps=4)
    expected = [0.5, sigmoid(10), sigmoid(16), sigmoid(19), sigmoid(20)]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_full_protocol_changes_224_pixels_a_step():
    images = torch.full((1, 1, 224, 224), 1 / 224)
    share = deletion_scores(brightness, images, torch.rand(1, 224, 224), torch.tensor([0]))
    left = torch.logit(share[0].clamp(max=1 - 1e-15))
    assert share.shape == (1, 225)
    assert left[-20:].tolist() == pytest.approx(list(range(19, -1, -1)), abs=1e-2)


def test_insertion_starts_from_the_blurred_and_ends_with_the_whole_image():
    seen = []

    def model(images):
        seen.append(images.clone())
        return brightness(images)

    image, maps, targets = cases(1, 13, 9)
    insertion_scores(model, image, maps, targets.clamp(max=1), steps=5)
    first, last = seen[0][0], seen[-1][-1]
    assert torch.allclose(first, plain.blurred(image[0]), atol=1e-12)
    assert torch.equal(last, image[0])
    flat = torch.ones(1, 1, 15, 15)
    insertion_scores(model, flat, flat[:, 0], targets.clamp(max=1), steps=5)
    assert seen[-1][0, 0, 7, 7] == pytest.approx(1, abs=1e-6)  # the kernel sums to 1


def test_scores_do_not_depend_on_the_batch():
    model, (images, maps, targets) = network(), cases(3, 6, 5)
    maps = maps.round()
    together = deletion_scores(model, images, maps, targets, batch_size=1000, steps=10)
    alone = [deletion_scores(model, images[n : n + 1], maps[n : n + 1], targets[n : n + 1], 3, 10) for n in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


def test_batches_are_full_and_counted_over_images():
    sizes = []

    def model(images):
        sizes.append(len(images))
        return brightness(images)

    images, maps, _ = cases(3, 4, 4)
    deletion_scores(model, images, maps, torch.zeros(3, dtype=torch.int64), batch_size=20, steps=16)
    assert sizes == [20, 20, 11]


def test_ties_are_drawn_by_the_seed():
    images, _, _ = cases(1, 6, 6)
    maps, targets = torch.zeros(1, 6, 6), torch.tensor([0])
    scores = [deletion_scores(brightness, images, maps, targets, steps=36, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    state = torch.get_rng_state()
    deletion_scores(brightness, images, maps, targets, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_single_precision_and_the_results_kind():
    images, maps, targets = cases(2, 6, 6)
    model = network()
    exact = insertion_scores(model, images, maps, targets, steps=6)
    single = insertion_scores(model.float(), images.float(), maps.double(), targets.int(), steps=6)
    assert single.dtype == torch.float64
    assert torch.allclose(exact, single, atol=1e-5)
    assert not exact.is_inference()
    assert not exact.requires_grad
    wanted = insertion_scores(model.double(), images.requires_grad_(), maps.requires_grad_(), targets, steps=6)
    assert torch.equal(wanted, exact)


def test_no_image_gives_no_scores():
    images, maps, targets = cases(0, 6, 6)
    assert deletion_scores(network(), images, maps, targets, steps=6).shape == (0, 7)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_area_is_the_trapezoids(scores):
    assert area(torch.tensor(scores, dtype=torch.float64)).item() == pytest.approx(plain.trapezoids(scores), abs=1e-12)


def test_area_keeps_the_leading_shape():
    assert area(torch.ones(2, 3, 4)).tolist() == [[1.0] * 3] * 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.5, 2.0, -1.0]))
def test_only_the_order_of_the_map_counts(seed, slope):
    images, maps, targets = cases(1, 4, 4, seed)
    targets = targets.clamp(max=1)
    scores = deletion_scores(brightness, images, maps, targets, steps=16)
    bent = deletion_scores(brightness, images, (maps * abs(slope)).exp(), targets, steps=16)
    assert torch.equal(scores, bent)
    if slope < 0:  # backwards: what was deleted first is now deleted last
        backwards = deletion_scores(brightness, images, -maps, targets, steps=16)
        total = torch.logit(scores[:, :1])
        assert torch.allclose(torch.logit(scores) + torch.logit(backwards.flip(1)), total, atol=1e-6)


BAD = {
    "images must be floating": {"images": torch.zeros(2, 6, 6)},
    "images must be floating .N": {"images": torch.zeros(2, 3, 6, 6, dtype=torch.uint8)},
    "maps must be .N, H, W. of the images": {"maps": torch.zeros(2, 6, 5)},
    "targets must be .2,., one class": {"targets": torch.zeros(1, dtype=torch.int64)},
    "targets must be 0 or more": {"targets": torch.tensor([0, -1])},
    "targets must be below the 2 classes": {"targets": torch.tensor([0, 2])},
    "maps must be finite": {"maps": torch.full((2, 6, 6), math.nan)},
    "batch_size and steps": {"steps": 0},
    "batch_size and steps must": {"batch_size": 0},
    "model must be in eval mode": {"model": nn.Flatten()},
    "model must return": {"model": lambda images: images},
    "model returned NaN": {"images": torch.full((2, 3, 6, 6), math.nan)},
}


@pytest.mark.parametrize("function", [deletion_scores, insertion_scores])
@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(function, message):
    good = {"model": brightness, "images": torch.zeros(2, 3, 6, 6), "maps": torch.zeros(2, 6, 6)}
    arguments = good | {"targets": torch.tensor([0, 1])} | BAD[message]
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_wrong_types_are_named():
    images, maps, targets = torch.zeros(2, 3, 6, 6), torch.zeros(2, 6, 6), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="maps must be a floating tensor"):
        deletion_scores(brightness, images, maps.long(), targets)
    for wrong in (targets.float(), targets.bool()):
        with pytest.raises(TypeError, match="targets must be integer"):
            deletion_scores(brightness, images, maps, wrong)
    for scores in (torch.tensor(1.0), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="2 or more"):
            area(scores)
