import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsgb import scenes

WHITE, BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
GOLDEN = "e55c5fc3b5b757c52a7f7f5112a9c3968107e86e85b09a2bbc8575e6d71bf26e"


def silhouettes(plan, size):
    return np.stack([scenes._coverage(thing, size) > 0.5 for thing in plan.objects])


def painted_alone(plan, index, size):
    # White without shading, everything else black: the red channel is then 255 times the object's visible coverage.
    things = [replace(thing, colours=(BLACK, BLACK)) for thing in plan.objects]
    things[index] = replace(things[index], colours=(WHITE, WHITE), shade=(0.0, 0.0))
    stage = replace(
        plan,
        colours=(BLACK, BLACK),
        grains=tuple(0 * grain for grain in plan.grains),
        clutter=(),
        objects=tuple(things),
        light=(1.0, 0.0, 0.0),
    )
    return scenes._paint(stage, size).image[..., 0]


def test_one_seed_gives_the_same_bits_everywhere():
    digest = hashlib.sha256()
    for seed in range(24):
        scene = scenes.render(seed)
        digest.update(scene.image.tobytes())
        digest.update(np.packbits(scene.masks).tobytes())
        digest.update(bytes(scene.classes))
    assert digest.hexdigest() == GOLDEN


def test_global_generator_plays_no_part():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = scenes.render(11)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert np.array_equal(first.image, scenes.render(11).image)


def test_seeds_give_different_scenes():
    images = {scenes.render(seed, classes=[0]).image.tobytes() for seed in range(20)}
    assert len(images) == 20


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64), size=st.integers(96, 200))
def test_every_scene_keeps_its_promises(seed, size):
    scene = scenes.render(seed, size=size)
    n = len(scene.classes)
    assert 1 <= n <= 4
    assert len(set(scene.classes)) == n
    assert set(scene.classes) <= set(range(10))
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.image.flags["C_CONTIGUOUS"]
    assert scene.masks.shape == (n, size, size)
    assert scene.masks.dtype == np.bool_
    assert scene.masks.sum(axis=0).max() == 1
    whole = silhouettes(scenes._plan(seed, None, None), size)
    assert (scene.masks <= whole).all()
    assert (scene.masks.sum(axis=(1, 2)) >= 0.6 * whole.sum(axis=(1, 2))).all()
    for mask in whole:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert 0.14 * size <= extent <= 0.45 * size + 2


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_masks_are_the_pixels_painted(seed):
    plan = scenes._plan(seed, None, 1 + seed % 4)
    scene = scenes._paint(plan, 128)
    for index, mask in enumerate(scene.masks):
        assert np.array_equal(painted_alone(plan, index, 128) > 127, mask)


@pytest.mark.parametrize("seed", range(8))
def test_an_object_changes_its_pixels_and_no_others(seed):
    plan = scenes._plan(seed, None, 2 + seed % 3)
    scene = scenes._paint(plan, 128)
    for index, mask in enumerate(scene.masks):
        without = replace(plan, objects=plan.objects[:index] + plan.objects[index + 1 :])
        change = scenes._paint(without, 128).image.astype(int) - scene.image
        changed = np.abs(change).max(axis=2) > 1
        assert not changed[painted_alone(plan, index, 128) == 0].any()
        assert changed[mask].mean() > 0.97


@pytest.mark.parametrize("seed", range(8))
def test_clutter_stays_behind_the_objects(seed):
    plan = scenes._plan(seed, None, None)
    cluttered, bare = (scenes._paint(p, 128).image for p in (plan, replace(plan, clutter=())))
    for index in range(len(plan.objects)):
        covered = painted_alone(plan, index, 128) == 255
        assert np.array_equal(cluttered[covered], bare[covered])
    assert not np.array_equal(cluttered, bare)


def test_edges_stay_one_pixel_wide():
    partial = {128: 0, 384: 0}
    for seed in range(10):
        for size in partial:
            white = painted_alone(scenes._plan(seed, None, 1), 0, size)
            partial[size] += int(((white > 0) & (white < 255)).sum())
    assert 2.5 < partial[384] / partial[128] < 3.5


def test_later_objects_hide_earlier_ones():
    hidden = 0
    for seed in range(30):
        plan = scenes._plan(seed, None, 4)
        whole = silhouettes(plan, 128)
        masks = scenes._paint(plan, 128).masks
        assert np.array_equal(masks[-1], whole[-1])
        hidden += int((whole[0] & ~masks[0]).sum())
    assert hidden > 500


def test_sizes_show_the_same_scene():
    for seed in range(12):
        small, large = scenes.render(seed), scenes.render(seed, size=384)
        assert small.classes == large.classes
        pooled = large.image.reshape(128, 3, 128, 3, 3).mean(axis=(1, 3))
        assert np.abs(pooled - small.image).mean() < 4
        shares = large.masks.reshape(-1, 128, 3, 128, 3).mean(axis=(2, 4)) > 0.5
        assert (shares & small.masks).sum() / (shares | small.masks).sum() > 0.95


def test_objects_have_texture_inside():
    for seed in range(4):
        for index in range(10):
            scene = scenes.render(seed, classes=[index])
            inside = scene.image[scene.masks[0]].astype(float)
            assert inside.std(axis=0).max() > 20


def test_no_class_has_a_colour_of_its_own():
    means = []
    for index in range(10):
        found = [scenes.render(1000 * index + seed, classes=[index]) for seed in range(60)]
        means.append(np.mean([scene.image[scene.masks[0]].mean(axis=0) for scene in found], axis=0))
    assert np.ptp(means, axis=0).max() < 50


def test_objects_are_everywhere_and_of_many_sizes():
    boxes = np.concatenate([scenes.render(seed).boxes for seed in range(120)])
    centres = (boxes[:, :2] + boxes[:, 2:]) // 2
    cells = {tuple(cell) for cell in (centres * 3 // 128).tolist()}
    assert len(cells) == 9
    widths = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert np.percentile(widths, 10) < 34
    assert np.percentile(widths, 90) > 46


def test_boxes_fit_the_masks():
    for seed in range(10):
        scene = scenes.render(seed)
        assert scene.boxes.shape == (len(scene.classes), 4)
        assert scene.boxes.dtype == np.int64
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
            points = [(x, y) for y in range(128) for x in range(128) if mask[y, x]]
            assert x0 == min(x for x, _ in points)
            assert y0 == min(y for _, y in points)
            assert x1 == max(x for x, _ in points) + 1
            assert y1 == max(y for _, y in points) + 1


def test_choice_of_classes_is_obeyed():
    assert scenes.render(0, classes=[7, 2, 4]).classes == (7, 2, 4)
    assert scenes.render(0, classes=np.array([9])).classes == (9,)
    for count in (1, 2, 3, 4):
        assert {len(scenes.render(seed, count=count).classes) for seed in range(5)} == {count}
    free = [scenes.render(seed, size=96).classes for seed in range(80)]
    assert {len(classes) for classes in free} == {1, 2, 3, 4}
    assert {index for classes in free for index in classes} == set(range(10))


def test_names():
    assert len(scenes.CLASSES) == len(set(scenes.CLASSES)) == 10
    assert all(name.isalpha() and name.islower() for name in scenes.CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed must not be negative, got -1; try render\(0\)"),
        ({"seed": 0, "classes": [10]}, r"indices from 0 to 9, got \(10,\); try render\(0, classes=\[1\]\)"),
        ({"seed": 0, "classes": [-1]}, r"indices from 0 to 9, got \(-1,\)"),
        ({"seed": 0, "classes": [3, 3]}, r"distinct indices .* got \(3, 3\)"),
        ({"seed": 0, "classes": []}, r"1 to 4 distinct indices .* got \(\)"),
        ({"seed": 0, "classes": [0, 1, 2, 3, 4]}, r"1 to 4 distinct indices .* got \(0, 1, 2, 3, 4\)"),
        ({"seed": 0, "count": 0}, r"count must be from 1 to 4, got 0; try render\(0, count=2\)"),
        ({"seed": 0, "count": 5}, r"count must be from 1 to 4, got 5"),
        ({"seed": 0, "classes": [1], "count": 1}, r"classes or count, got \[1\] and 1; try render\(0, count=2\)"),
        ({"seed": 0, "size": 95}, r"size must be at least 96 pixels, got 95; try render\(seed, size=128\)"),
    ],
)
def test_wrong_arguments_say_what_is_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.render(**arguments)
