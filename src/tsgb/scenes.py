"""Rendered scenes: one to four textured objects on a cluttered background, with the exact pixels of each object.

The scenes serve as images of which everything is known: what is in them, and where to the pixel. They train the
bundled networks, and their masks are ground truth for a saliency map.

A scene is planned first, in units of the image's side and without regard to its size, and painted then; so one seed
shows the same scene at every size, only sharper. Painting uses nothing but additions, products, quotients, square
roots and comparisons, which IEEE 754 rounds in one way only; so a seed gives the same bits on every machine.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.floating[Any]]  # float32 throughout
Colour = tuple[float, float, float]
Shape = Callable[[Field, Field], Field]

LARGEST_COUNT = 4
SMALLEST_SIZE = 96
SMALLEST_SHARE = 0.6  # of each object's pixels, the part that no later object hides


@dataclass(frozen=True)
class Scene:
    """An image, the classes of the objects in it, and the visible pixels of each.

    `image` is (H, W, 3) uint8, RGB; `classes` are n distinct indices into `CLASSES`, from the hindmost object to the
    foremost; `masks` is (n, H, W) bool, true where the object covers more than half of the pixel and is not hidden, so
    no pixel belongs to two objects.

    >>> scene = render(7, classes=[2, 5])
    >>> scene.image.shape, scene.classes, scene.masks.shape
    ((128, 128, 3), (2, 5), (2, 128, 128))
    """

    image: npt.NDArray[np.uint8]
    classes: tuple[int, ...]
    masks: npt.NDArray[np.bool_]

    @property
    def boxes(self) -> npt.NDArray[np.int64]:
        """The smallest box around each mask: (n, 4) int64, in pixels, as x0, y0, x1, y1 with x1 and y1 exclusive.

        >>> scene = render(7, classes=[2])
        >>> x0, y0, x1, y1 = scene.boxes[0]
        >>> bool(scene.masks[0, y0:y1, x0:x1].sum() == scene.masks[0].sum())
        True
        """
        boxes = []
        for mask in self.masks:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return np.array(boxes, dtype=np.int64)


def render(seed: int, classes: Sequence[int] | None = None, count: int | None = None, size: int = 128) -> Scene:
    """Render the scene of a seed: `size` x `size` pixels with one to four objects of distinct classes.

    The objects are those of `classes` (1 to 4 distinct indices into `CLASSES`), else `count` (1 to 4) classes drawn at
    random, else a random number of them. Each is 20 to 45 % of the side across, lies inside the image, and has at
    least 60 % of its pixels visible. The same seed and arguments give the same image, bit for bit; another `size`
    (at least 96) gives the same scene at another resolution.

    Raises ValueError for a negative seed, for classes that are unknown, repeated, none or more than four, for a count
    outside 1 to 4, for classes and count together, and for a size below 96.

    >>> scene = render(3, count=2, size=96)
    >>> scene.image.shape, scene.image.dtype, len(scene.classes)
    ((96, 96, 3), dtype('uint8'), 2)
    >>> [CLASSES[index] for index in render(3, classes=[1, 3]).classes]
    ['star', 'heart']
    """
    size = operator.index(size)
    if size < SMALLEST_SIZE:
        raise ValueError(f"size must be at least {SMALLEST_SIZE} pixels, got {size}; try render(seed, size=128)")
    return _paint(_plan(seed, classes, count), size)


# Planning: what is where, in units of the image's side.


@dataclass(frozen=True)
class _Thing:
    outline: Shape
    pattern: Shape
    centre: tuple[float, float]
    radius: float
    turn: tuple[float, float]  # cosine and sine
    pitch: float  # of the pattern; 1 is as drawn
    colours: tuple[Colour, Colour]
    shade: tuple[float, float]  # how the brightness grows along the thing's two axes
    opacity: float


@dataclass(frozen=True)
class _Plan:
    classes: tuple[int, ...]
    colours: tuple[Colour, Colour]  # of the background
    axis: tuple[float, float]  # along which the background goes from one colour to the other
    grains: tuple[Field, ...]  # lattices of noise
    clutter: tuple[_Thing, ...]
    objects: tuple[_Thing, ...]
    light: tuple[float, float, float]  # brightness in the middle, and how it grows to the right and down


def _plan(seed: int, classes: Sequence[int] | None, count: int | None) -> _Plan:
    seed = operator.index(seed)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; try render(0)")
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = _choice(rng, classes, count)
    return _Plan(
        classes=chosen,
        colours=(_colour(rng, (0.1, 0.6), (0.2, 0.85)), _colour(rng, (0.1, 0.6), (0.2, 0.85))),
        axis=_direction(rng, 1.0),
        grains=tuple(((rng.random((n, n)) - 0.5) * _between(rng, 0.0, most)).astype(np.float32) for n, most in _GRAINS),
        clutter=tuple(_fragment(rng) for _ in range(int(_between(rng, 6.0, 15.0)))),
        objects=_placement(rng, chosen),
        light=(_between(rng, 0.85, 1.1), _between(rng, -0.35, 0.35), _between(rng, -0.35, 0.35)),
    )


def _choice(rng: np.random.Generator, classes: Sequence[int] | None, count: int | None) -> tuple[int, ...]:
    if classes is not None and count is not None:
        raise ValueError(f"give classes or count, got {classes!r} and {count!r}; try render(0, count=2)")
    if classes is not None:
        chosen = tuple(operator.index(index) for index in classes)
        known = all(0 <= index < len(CLASSES) for index in chosen)
        if not known or not 1 <= len(chosen) <= LARGEST_COUNT or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"classes must be 1 to {LARGEST_COUNT} distinct indices from 0 to {len(CLASSES) - 1}, got {chosen}; "
                f"try render(0, classes=[1]) for one {CLASSES[1]}"
            )
        return chosen
    count = int(_between(rng, 1.0, LARGEST_COUNT + 1.0)) if count is None else operator.index(count)
    if not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"count must be from 1 to {LARGEST_COUNT}, got {count}; try render(0, count=2)")
    draws = [rng.random() for _ in CLASSES]
    return tuple(sorted(range(len(CLASSES)), key=draws.__getitem__)[:count])


def _placement(rng: np.random.Generator, classes: tuple[int, ...]) -> tuple[_Thing, ...]:
    # The share is checked on the coarsest grid there is, with a margin for what a finer one counts differently.
    objects: list[_Thing] = []
    coverages: list[Field] = []
    for index in classes:
        while True:
            thing = _thing(rng, *_OBJECTS[CLASSES[index]], _between(rng, 0.105, 0.225))
            trial = [*coverages, _coverage(thing, SMALLEST_SIZE)]
            pairs = zip(_visible(trial), trial, strict=True)
            if min(np.sum(seen > 0.5) / np.sum(whole > 0.5) for seen, whole in pairs) >= SMALLEST_SHARE + 0.05:
                break
        objects.append(thing)
        coverages = trial
    return tuple(objects)


def _thing(rng: np.random.Generator, outline: Shape, pattern: Shape, radius: float) -> _Thing:
    first = _colour(rng, (0.35, 0.95), (0.5, 1.0))
    second = _colour(rng, (0.0, 0.95), (0.05, 1.0))
    while abs(first[1] - second[1]) < 0.35:  # green, which makes most of the brightness
        second = _colour(rng, (0.0, 0.95), (0.05, 1.0))
    return _Thing(
        outline=outline,
        pattern=pattern,
        centre=(_between(rng, radius, 1.0 - radius), _between(rng, radius, 1.0 - radius)),
        radius=radius,
        turn=_direction(rng, 0.35),
        pitch=_between(rng, 0.85, 1.2),
        colours=(first, second) if rng.random() < 0.5 else (second, first),
        shade=(_between(rng, -0.25, 0.25), _between(rng, -0.25, 0.25)),
        opacity=1.0,
    )


def _fragment(rng: np.random.Generator) -> _Thing:
    outline, pattern, sizes = _CLUTTER[int(_between(rng, 0.0, len(_CLUTTER)))]
    thing = _thing(rng, outline, pattern, _between(rng, *sizes))
    opacity = _between(rng, 0.2, 0.6)
    return replace(thing, centre=(rng.random(), rng.random()), turn=_direction(rng, 1.0), opacity=opacity)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _direction(rng: np.random.Generator, most: float) -> tuple[float, float]:
    # Cosine and sine from the tangent of half the angle, |tangent| <= most: a library's cosine may differ in its last
    # bit from machine to machine, this cannot.
    tangent = _between(rng, -most, most)
    square = tangent * tangent
    return (1.0 - square) / (1.0 + square), 2.0 * tangent / (1.0 + square)


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    hue, strength, brightest = 6.0 * rng.random(), _between(rng, *saturation), _between(rng, *value)

    def channel(offset: float) -> float:
        place = (offset + hue) % 6.0
        return brightest * (1.0 - strength * max(0.0, min(place, 4.0 - place, 1.0)))

    return channel(5.0), channel(3.0), channel(1.0)


# Painting: signed distances, negative inside, become coverages from 0 to 1.


def _paint(plan: _Plan, size: int) -> Scene:
    across, down = _grid(size)
    blend = np.clip(0.5 + plan.axis[0] * (across - 0.5) + plan.axis[1] * (down - 0.5), 0.0, 1.0)
    grain = reduce(np.add, [_noise(lattice, size) for lattice in plan.grains])
    planes = [first + (second - first) * blend + grain for first, second in zip(*plan.colours, strict=True)]
    canvas = np.clip(planes, 0.0, 1.0)
    for thing in (*plan.clutter, *plan.objects):
        _lay(canvas, thing)
    canvas *= plan.light[0] + plan.light[1] * (across - 0.5) + plan.light[2] * (down - 0.5)
    image = np.floor(np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    masks = np.stack(_visible([_coverage(thing, size) for thing in plan.objects])) > 0.5
    return Scene(np.ascontiguousarray(image.transpose(1, 2, 0)), plan.classes, masks)


def _noise(lattice: Field, size: int) -> Field:
    place = (np.arange(size, dtype=np.float32) + 0.5) / size * (len(lattice) - 1)
    part = place - np.floor(place)
    part = part * part * (3.0 - 2.0 * part)
    cell = place.astype(np.intp)
    rows = lattice[cell] + (lattice[cell + 1] - lattice[cell]) * part[:, None]
    return rows[:, cell] + (rows[:, cell + 1] - rows[:, cell]) * part


def _grid(size: int) -> tuple[Field, Field]:
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    return place[None, :], place[:, None]


def _lay(canvas: Field, thing: _Thing) -> None:
    size = canvas.shape[-1]
    u, v = _axes(thing, size)
    alpha = _soft(thing.outline(u, v), thing, size) * thing.opacity
    mix = _soft(thing.pattern(u * thing.pitch, v * thing.pitch) / thing.pitch, thing, size)
    shade = 1.0 + thing.shade[0] * u + thing.shade[1] * v
    for plane, first, second in zip(canvas[:, *_window(thing, size)], *thing.colours, strict=True):
        plane += ((first + (second - first) * mix) * shade - plane) * alpha


def _coverage(thing: _Thing, size: int) -> Field:
    coverage = np.zeros((size, size), dtype=np.float32)
    coverage[_window(thing, size)] = _soft(thing.outline(*_axes(thing, size)), thing, size)
    return coverage


def _visible(coverages: Sequence[Field]) -> Sequence[Field]:
    free = np.ones_like(coverages[0])
    visible = []
    for coverage in reversed(coverages):
        visible.append(coverage * free)
        free = free * (1.0 - coverage)
    return visible[::-1]


def _soft(distance: Field, thing: _Thing, size: int) -> Field:
    coverage: Field = np.clip(0.5 - distance * (thing.radius * size), 0.0, 1.0)
    return coverage


def _window(thing: _Thing, size: int) -> tuple[slice, slice]:
    (x, y), radius = thing.centre, thing.radius
    columns = slice(max(0, math.floor((x - radius) * size) - 1), math.ceil((x + radius) * size) + 1)
    rows = slice(max(0, math.floor((y - radius) * size) - 1), math.ceil((y + radius) * size) + 1)
    return rows, columns


def _axes(thing: _Thing, size: int) -> tuple[Field, Field]:
    rows, columns = _window(thing, size)
    across, down = _grid(size)
    x = (across[:, columns] - thing.centre[0]) / thing.radius
    y = (down[rows] - thing.centre[1]) / thing.radius
    return thing.turn[0] * x + thing.turn[1] * y, thing.turn[0] * y - thing.turn[1] * x


# Outlines and patterns, in axes that run from -1 to 1 across the thing, v downwards.


def _union(*parts: Field) -> Field:
    return reduce(np.minimum, parts)


def _overlap(*parts: Field) -> Field:
    return reduce(np.maximum, parts)


def _disc(u: Field, v: Field, radius: float, x: float = 0.0, y: float = 0.0) -> Field:
    distance: Field = np.sqrt((u - x) * (u - x) + (v - y) * (v - y))
    return distance - radius


def _box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    return _overlap(np.abs(u) - half_width, np.abs(v) - half_height)


def _off(place: Field, period: float) -> Field:
    nearest: Field = np.floor(place / period + 0.5)
    return place - period * nearest


def _lines(place: Field, period: float, width: float) -> Field:
    return np.abs(_off(place, period)) - width / 2


def _stripes(place: Field, period: float) -> Field:
    return _lines(place, period, period / 2)


def _checks(u: Field, v: Field, period: float) -> Field:
    first, second = _stripes(u, period), _stripes(v, period)
    return _overlap(_union(first, second), -_overlap(first, second))


def _dots(u: Field, v: Field, period: float) -> Field:
    return _disc(_off(u, period), _off(v, period), 0.3 * period)


def _craters(u: Field, v: Field) -> Field:
    places = ((0.14, -0.6, -0.4), (0.2, -0.65, 0.1), (0.16, -0.3, 0.62), (0.12, -0.15, -0.8), (0.1, 0.2, 0.82))
    return _union(*(_disc(u, v, *place) for place in places))


def _plain(u: Field, v: Field) -> Field:
    return np.ones_like(u)


def _spokes(count: int, shape: Shape) -> Shape:
    """Repeat a shape around the middle: it is given the places along and across the nearest spoke; one points up."""
    turns = [2.0 * math.pi * spoke / count for spoke in range(count)]
    tips = [(round(math.sin(turn), 6), -round(math.cos(turn), 6)) for turn in turns]

    def repeated(u: Field, v: Field) -> Field:
        along = _overlap(*(u * x + v * y for x, y in tips))
        return shape(along, np.sqrt(np.maximum(u * u + v * v - along * along, 0.0)))

    return repeated


# By class, the outline and the pattern. Each outline stays within the circle of radius 1.
_OBJECTS: dict[str, tuple[Shape, Shape]] = {
    "ball": (lambda u, v: _disc(u, v, 0.98), lambda u, v: _stripes(u, 0.5)),
    "star": (_spokes(5, lambda a, b: 0.49 * (a - 1.0) + 0.87 * b), lambda u, v: _checks(u, v, 0.56)),
    "ring": (lambda u, v: np.abs(_disc(u, v, 0.73)) - 0.27, _spokes(5, lambda a, b: 0.951 * b - 0.309 * a)),
    "heart": (
        lambda u, v: _union(_disc(np.abs(u), v, 0.5, 0.3536, -0.3536), (np.abs(u) + np.abs(v)) * 0.7071 - 0.5),
        lambda u, v: _dots(u, v, 0.46),
    ),
    "cross": (
        lambda u, v: _union(_box(u, v, 0.95, 0.31), _box(u, v, 0.31, 0.95)),
        lambda u, v: _union(_lines(u, 0.42, 0.13), _lines(v, 0.42, 0.13)),
    ),
    "moon": (lambda u, v: _overlap(_disc(u, v, 1.0), -_disc(u, v, 0.8, 0.6, -0.1)), _craters),
    "flower": (
        _spokes(6, lambda a, b: _union(_disc(a, b, 0.34, 0.66), _disc(a, b, 0.5))),
        _spokes(6, lambda a, b: _union(_disc(a, b, 0.3), _overlap(a - 0.8, b - 0.06))),
    ),
    "leaf": (
        lambda u, v: _disc(np.abs(u), v, 1.1413, -0.55),
        lambda u, v: _union(np.abs(u) - 0.06, _lines(v + 0.8 * np.abs(u), 0.34, 0.1)),
    ),
    "gear": (
        _spokes(8, lambda a, b: _overlap(_union(_disc(a, b, 0.76), _overlap(a - 0.98, b - 0.17)), -_disc(a, b, 0.2))),
        lambda u, v: _stripes(_disc(u, v, 0.0), 0.36),
    ),
    "pyramid": (
        lambda u, v: _overlap(v, np.abs(u) * 0.866 - v * 0.5) - 0.5,
        lambda u, v: _union(_lines(u + 0.35 * np.floor(v / 0.4), 0.7, 0.12), _lines(v, 0.4, 0.12)),
    ),
}

CLASSES = tuple(_OBJECTS)

# Fragments of the background, with their least and largest radius: none has the outline of a class, but some have its
# pattern.
_CLUTTER: tuple[tuple[Shape, Shape, tuple[float, float]], ...] = (
    (lambda u, v: _box(u, v, 0.98, 0.035), _plain, (0.2, 0.6)),
    (lambda u, v: _box(u, v, 0.98, 0.01), _plain, (0.3, 0.8)),
    (lambda u, v: _box(u, v, 0.8, 0.5), _plain, (0.1, 0.35)),
    (lambda u, v: _overlap(_disc(u, v, 1.0), -u, -v), _plain, (0.1, 0.4)),
    (lambda u, v: _union(_disc(u, v, 0.55, -0.4, 0.1), _disc(u, v * 1.4, 0.6, 0.35, -0.1)), _plain, (0.06, 0.2)),
    (lambda u, v: _disc(u, v * 2.2, 0.98) / 2.2, _plain, (0.08, 0.25)),
    (lambda u, v: _box(u, v, 0.95, 0.3), lambda u, v: _stripes(u, 0.4), (0.08, 0.25)),
    (lambda u, v: _overlap(_disc(u, v, 1.0), -v), lambda u, v: _dots(u, v, 0.5), (0.07, 0.22)),
)

# Points along a side of each lattice of noise, and how far it spreads.
_GRAINS = ((5, 0.5), (15, 0.3), (49, 0.2))
