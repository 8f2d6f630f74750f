"""What the bench measures: the name of each figure, its definition, and the values that it is computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTROLS", "FIGURES", "GRIDS", "METRICS", "REFERENCE", "Figure", "figures", "is_asked"]

Kind = Literal["order", "share", "boxes", "perturbation", "sanity", "cost"]

TOLERANCE = 15.0  # pixels of the original image, Zhang et al. 2016
CONFIDENCES = (0.99, 0.9)  # of a grid's images: the first where it leaves enough images, else the second
LARGEST_GRIDS = 500
NEAREST = 20  # an instance of a group of classes counts if one of them is among so many most probable ones
REFERENCE = "tsgb-fused"  # every other method is compared with this one
STAGES = 8  # of the cascading randomisation

#: Side of each grid in images, by the metric's name.
GRIDS = {"": 2, "_3x3": 3}

#: Powers of a method's positive map, as controls for shares of the map, which reward any sharpening.
CONTROLS: dict[str, tuple[float, ...]] = {"gradcam": (2, 3), "tsgb-fused": (0.5, 2)}


@dataclass(frozen=True)
class Figure:
    """One figure of a method, a row of the results.

    Attributes:
        title: its display name.
        text: its definition, with every parameter.
        unit: "%" of 0..100, or "" for a correlation, an area or a multiple.
        better: "higher", "lower", or "neither" for a check.
        kind: the table that shows it.
        values: name of the values that it is computed from, one a case.
        statistic: the mean over cases, the mean over classes of the mean over a class's cases, the accuracy at the best
            threshold, or the median.
    """

    title: str
    text: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    kind: Kind
    values: str
    statistic: Literal["mean", "class mean", "best threshold", "median"] = "mean"


_AP = "average precision of the pixels, ranked by the map, as a detector of"
_POINTING = "a hit if the map's largest value lies in the class's mask, or boxes where there is no mask"
_NEAR = f"{_POINTING}, or nearer than {TOLERANCE:g} pixels of the original image"
_DIFFICULT = "classes whose boxes cover less than 1/4 of an image that shows another class too"
_CASCADE = (
    f"weights randomised from the head downwards in up to {STAGES} stages; between the map before and after, mean over "
    "stages; predicted class"
)
_GRID = "grid of images of distinct classes, each predicted with confidence of at least the protocol's"


def _grid(side: int, suffix: str) -> dict[str, Figure]:
    return {
        f"grid_ap{suffix}": Figure(
            f"Grid AP {side} x {side}", f"{_AP} the class's cell; {side} x {side} {_GRID}", "%", "higher", "order",
            f"grid_ap{suffix}",
        ),
        f"grid{suffix}": Figure(
            f"Grid share {side} x {side}",
            f"share of the positive map in the class's cell, chance {100 / side**2:.0f} %; {side} x {side} {_GRID}",
            "%", "higher", "share", f"grid{suffix}",
        ),
    }  # fmt: skip


FIGURES: dict[str, Figure] = {
    "mask_ap": Figure("Mask AP", f"{_AP} the class's mask", "%", "higher", "order", "mask_ap"),
    "box_ap": Figure("Box AP", f"{_AP} the class's boxes", "%", "higher", "order", "box_ap"),
    **_grid(2, ""),
    **_grid(3, "_3x3"),
    "pointing": Figure("Pointing", _POINTING, "%", "higher", "order", "pointing"),
    "pointing_class": Figure(
        "Pointing, classes", f"{_POINTING}; mean over classes", "%", "higher", "order", "pointing", "class mean"
    ),
    "pointing_15": Figure("Pointing +15", _NEAR, "%", "higher", "order", "pointing_15"),
    "pointing_15_class": Figure(
        "Pointing +15, classes", f"{_NEAR}; mean over classes", "%", "higher", "order", "pointing_15", "class mean"
    ),
    "pointing_difficult": Figure(
        "Pointing, difficult", f"{_POINTING}; {_DIFFICULT}; mean over classes", "%", "higher", "order",
        "pointing_difficult", "class mean",
    ),
    "pointing_15_difficult": Figure(
        "Pointing +15, difficult", f"{_NEAR}; {_DIFFICULT}; mean over classes", "%", "higher", "order",
        "pointing_15_difficult", "class mean",
    ),
    "energy": Figure(
        "Energy", "share of the positive map in the class's mask, or boxes where there is no mask", "%", "higher",
        "share", "energy",
    ),
    "box_accuracy": Figure(
        "Box accuracy",
        "box of the largest 8-connected component above the mean of the positive map, IoU of at least 0.5 with any box "
        "of the class",
        "%", "higher", "boxes", "box_accuracy",
    ),
    "max_box_accuracy": Figure(
        "MaxBoxAcc",
        "box of the largest component above 0, 0.001 .. 1 of the maximum, IoU of at least 0.5; threshold chosen on the "
        "images of even index, reported on the others",
        "%", "higher", "boxes", "max_box_accuracy", "best threshold",
    ),
    "max_box_accuracy_v2": Figure(
        "MaxBoxAcc v2",
        "as MaxBoxAcc, every component's box, mean over IoU of at least 0.3, 0.5 and 0.7, each at its best threshold",
        "%", "higher", "boxes", "max_box_accuracy_v2", "best threshold",
    ),
    "insertion": Figure(
        "Insertion",
        "area under the predicted class's softmax as pixels come back, the map's largest first, in 224 steps from the "
        "image blurred by an 11 x 11 Gaussian of sigma 5",
        "", "higher", "perturbation", "insertion",
    ),
    "deletion": Figure(
        "Deletion",
        "area under the predicted class's softmax as pixels become 0 (normalised), the map's largest first, in 224 "
        "steps",
        "", "lower", "perturbation", "deletion",
    ),
    "sensitivity": Figure(
        "Class sensitivity", "correlation between the maps of the two most probable classes", "", "lower", "sanity",
        "sensitivity",
    ),
    "random_logit": Figure(
        "Random logit", "SSIM between the maps of the predicted class and of another, drawn at random", "", "neither",
        "sanity", "random_logit",
    ),
    "cascade": Figure("Cascade", f"rank correlation of |map|; {_CASCADE}", "", "neither", "sanity", "cascade"),
    "cascade_signed": Figure(
        "Cascade, signed", f"rank correlation; {_CASCADE}", "", "neither", "sanity", "cascade_signed"
    ),
    "cascade_ssim": Figure("Cascade, SSIM", f"SSIM; {_CASCADE}", "", "neither", "sanity", "cascade_ssim"),
    "cascade_last": Figure(
        "All weights random", "rank correlation of |map| before and after all weights were randomised; predicted class",
        "", "neither", "sanity", "cascade_last",
    ),
    "speed": Figure(
        "Time", "multiples of one forward under inference mode, one target an image, medians of interleaved rounds in "
        "one process", "", "lower", "cost", "speed", "median",
    ),
    "memory": Figure(
        "Memory", "highest resident set beyond the loaded model and input, each in a fresh process, as a multiple of a "
        "plain input gradient's", "", "lower", "cost", "memory", "median",
    ),
}  # fmt: skip

#: What `--metrics` takes: the figures that each metric gives.
METRICS: dict[str, tuple[str, ...]] = {
    "mask_ap": ("mask_ap",),
    "box_ap": ("box_ap",),
    "grid_ap": ("grid_ap", "grid_ap_3x3"),
    "pointing": tuple(name for name in FIGURES if name.startswith("pointing")),
    "energy": ("energy",),
    "grid": ("grid", "grid_3x3"),
    "box_accuracy": ("box_accuracy",),
    "max_box_accuracy": ("max_box_accuracy", "max_box_accuracy_v2"),
    "insertion": ("insertion", "deletion"),  # always both: a map of single pixels wins the one and loses the other
    "deletion": ("insertion", "deletion"),
    "cascade": ("cascade", "cascade_signed", "cascade_ssim", "cascade_last"),
    "random_logit": ("random_logit",),
    "sensitivity": ("sensitivity",),
    "speed": ("speed",),
    "memory": ("memory",),
}


def figures(metrics: Sequence[str]) -> list[str]:
    """List the figures that metrics give, in the order of `FIGURES`.

    Example:
        >>> figures(["energy", "mask_ap"])
        ['mask_ap', 'energy']
    """
    asked = {figure for metric in metrics for figure in METRICS[metric]}
    return [name for name in FIGURES if name in asked]


def is_asked(metrics: Sequence[str], *among: str) -> bool:
    """Tell whether any of these metrics is requested."""
    return any(metric in metrics for metric in among)
