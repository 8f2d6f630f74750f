"""Evaluate the maps of an image or a grid: the values that the figures are computed from."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import boxes, energy, perturbation, ranking, similarity
from .protocol import CONTROLS, GRIDS, TOLERANCE, is_asked
from .samples import Case, EvalSample

__all__ = [
    "PER_CASE",
    "PER_IMAGE",
    "ImageContext",
    "Value",
    "evaluate_case",
    "evaluate_grid",
    "evaluate_image",
    "other_class",
    "seed_of",
]

#: (name of the value, category or -1, value): one case of one figure; hits at every threshold are a hexadecimal text.
Value = tuple[str, int, Any]

PER_CASE = ("mask_ap", "box_ap", "pointing", "energy", "box_accuracy", "max_box_accuracy")
PER_IMAGE = ("insertion", "deletion", "sensitivity", "random_logit", "cascade")


def seed_of(seed: int, *of: object) -> int:
    """Derive a seed from names, so that it does not depend on the order of the work.

    Example:
        >>> seed_of(0, "cat.png"), seed_of(1, "cat.png")
        (2709416577, 3053813442)
    """
    return zlib.crc32("/".join(map(str, (seed, *of))).encode(errors="surrogatepass"))


def evaluate_case(
    map: Tensor, case: Case, sample: EvalSample, method: str, metrics: Sequence[str], seed: int
) -> list[Value]:
    """Evaluate a map (H, W) as a detector of the class of one case.

    Raises:
        ValueError: the map is not finite, or not of the input's size.
    """
    _check(map, case.region.shape)
    maps, masks = map[None], case.region[None].to(map.device)
    case_seed = seed_of(seed, sample.unit, case.category)
    found: list[tuple[str, Any]] = []
    if "mask_ap" in metrics and case.has_mask:
        found.append(("mask_ap", ranking.average_precision(maps, masks, case_seed)))
    if "box_ap" in metrics and case.box_region.any():
        found.append(("box_ap", ranking.average_precision(maps, case.box_region[None].to(map.device), case_seed)))
    if case.region.any():
        if "pointing" in metrics:
            for name, tolerance in (("pointing", 0.0), ("pointing_15", TOLERANCE)):
                hit = ranking.pointing(maps, masks, tolerance, sample.scale, case_seed)
                found.append((name, hit))
                if case.is_difficult:
                    found.append((f"{name}_difficult", hit))
        if "energy" in metrics:
            found += [(f"energy{power}", energy.energy(m, masks)) for power, m in _powers(maps, method)]
    if len(case.boxes):
        if "box_accuracy" in metrics:
            found.append(("box_accuracy", boxes.box_accuracy(map, case.boxes)))
        if "max_box_accuracy" in metrics:
            hits = boxes.threshold_hits(map, case.boxes).numpy()
            found.append(("max_box_accuracy", _hex(hits[:1])))
            found.append(("max_box_accuracy_v2", _hex(hits[1:])))
    return [(name, case.category, value if isinstance(value, str) else float(value)) for name, value in found]


def evaluate_grid(
    maps: Tensor, classes: Sequence[int], unit: str, method: str, metrics: Sequence[str], seed: int
) -> list[Value]:
    """Evaluate the maps (n * n, H, W) of a grid's classes, each as a detector of its class's cell."""
    _check(maps, maps.shape)
    side = round(len(classes) ** 0.5)
    suffix = next(suffix for suffix, n in GRIDS.items() if n == side)
    cells = energy.cells(side, *maps.shape[1:]).to(maps.device)
    found: list[Value] = []
    if "grid" in metrics:
        for power, m in _powers(maps, method):
            values = energy.grid(m, cells).tolist()
            found += [(f"grid{suffix}{power}", c, value) for c, value in zip(classes, values, strict=True)]
    if "grid_ap" in metrics:
        values = ranking.average_precision(maps, cells, seed_of(seed, unit)).tolist()
        found += [(f"grid_ap{suffix}", c, value) for c, value in zip(classes, values, strict=True)]
    return found


@dataclass(frozen=True)
class ImageContext:
    """What the sanity and perturbation metrics of one image need beside its maps."""

    model: torch.nn.Module
    image: Tensor  # (C, H, W)
    predicted: int
    second: int
    other: int
    after: Sequence[Tensor]  # the predicted class's map at each stage of the cascade, (H, W)


def evaluate_image(maps: Mapping[int, Tensor], context: ImageContext, metrics: Sequence[str], seed: int) -> list[Value]:
    """Evaluate the maps (H, W) of an image with the metrics that need no annotation."""
    found: list[Value] = []
    for name, value in _of_image(maps, context, metrics, seed):
        found.append((name, -1, float(value)))
    return found


def _of_image(
    maps: Mapping[int, Tensor], context: ImageContext, metrics: Sequence[str], seed: int
) -> Iterator[tuple[str, Any]]:
    map = maps[context.predicted][None]
    _check(map[0], context.image.shape[1:])
    images, targets = context.image[None], torch.tensor([context.predicted], device=context.image.device)
    scores: dict[str, Callable[..., Tensor]] = {
        "insertion": perturbation.insertion_scores,
        "deletion": perturbation.deletion_scores,
    }
    for name, function in scores.items():
        if is_asked(metrics, *scores):
            yield name, perturbation.area(function(context.model, images, map, targets, seed=seed))
    if "sensitivity" in metrics and context.second in maps:
        yield "sensitivity", similarity.correlation(map, maps[context.second][None])
    if "random_logit" in metrics and context.other in maps:
        yield "random_logit", similarity.ssim(map, maps[context.other][None])
    if is_asked(metrics, "cascade") and context.after:
        after = torch.stack(list(context.after))
        before = map.expand_as(after)
        unsigned = similarity.spearman(before.abs(), after.abs())
        yield "cascade", unsigned.mean()
        yield "cascade_signed", similarity.spearman(before, after).mean()
        yield "cascade_ssim", similarity.ssim(before, after).mean()
        yield "cascade_last", unsigned[-1]


def other_class(predicted: int, count: int, seed: int) -> int:
    """Choose a class other than the predicted one.

    Example:
        >>> {other_class(1, 3, seed) for seed in range(20)}
        {0, 2}
    """
    return (predicted + 1 + seed % (count - 1)) % count if count > 1 else predicted


def _powers(maps: Tensor, method: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the maps, and their powers that serve as a method's controls."""
    yield "", maps
    for exponent in CONTROLS.get(method, ()):
        yield f"^{exponent:g}", energy.power(maps, exponent)


def _check(map: Tensor, shape: Sequence[int]) -> None:
    if map.shape != torch.Size(shape):
        raise ValueError(f"the map must be of the network's input size {tuple(shape)}, got {tuple(map.shape)}")
    if not map.isfinite().all():
        raise ValueError(f"the map has {int((~map.isfinite()).sum())} values that are not finite (NaN or infinity)")


def _hex(hits: Any) -> str:
    """Hits (rows, thresholds) as hexadecimal digits, one row after the other, each row filled up to whole bytes."""
    return bytes(np.packbits(np.asarray(hits, dtype=bool), axis=1)).hex()
