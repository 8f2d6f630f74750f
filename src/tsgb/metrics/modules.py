"""The metrics as torchmetrics classes: update with a batch, compute over all cases, synchronised between processes.

Each calls its function of this package, which says what is computed and where from, keeps one row a case, and averages
at the end. Under ``torch.distributed`` the rows of all processes are joined, also those of one that saw no case, so the
result is that of one process with all cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy.typing as npt
import torch
from torch import Tensor

from . import boxes as _boxes
from . import energy, perturbation, ranking, similarity
from .cases import Cases

__all__ = [
    "AveragePrecision",
    "BoxAccuracy",
    "Cascade",
    "Deletion",
    "Energy",
    "GridShare",
    "Insertion",
    "MaxBoxAccuracy",
    "Pointing",
    "RandomLogit",
    "Ratio",
    "Sensitivity",
]

_NUMBER = 8  # bytes of an image's number, before the hits of a row


class AveragePrecision(Cases):
    """Mean average precision of the pixels as a detector of masks, boxes or grid cells: mask AP, box AP, grid AP.

    See `tsgb.metrics.ranking.average_precision`. Cases with an empty mask are left out.

    Args:
        seed: Seed of the ties. ``kwargs`` here and below: torchmetrics' own, such as ``sync_on_compute``.

    Example:
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([[[0.9, 0.1], [0.8, 0.2]]]), torch.tensor([[[True, False], [False, True]]]))
        >>> metric.compute()  # (1 + 2 / 3) / 2
        tensor(0.8333, dtype=torch.float64)
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add cases: maps (N, H, W) floating, masks (N, H, W) bool."""
        found = ranking.average_precision(maps, masks, self.seed)
        self.add(found[~found.isnan()])


class Pointing(Cases):
    """Pointing game: share of the maps whose highest pixel points at the mask.

    See `tsgb.metrics.ranking.pointing`.

    Args:
        tolerance: In pixels of the original image, 0 or more; TorchRay's is 15.
        seed: Seed of the ties.

    Example:
        >>> metric = Pointing()
        >>> masks = torch.tensor([[[True, False]], [[True, False]], [[False, True]]])
        >>> metric.update(torch.tensor([[[2.0, 1.0]], [[3.0, 1.0]], [[3.0, 1.0]]]), masks, classes=[5, 5, 8])
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
        {'mean': 0.67, 'mean_over_classes': 0.5, 'difficult': nan, 'difficult_over_classes': nan}
    """

    width = 3

    def __init__(self, tolerance: float = 0.0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance, self.seed = tolerance, seed

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        classes: Tensor | Sequence[int] | None = None,
        difficult: Tensor | Sequence[bool] | None = None,
        scale: Sequence[float] | Tensor = (1.0, 1.0),
    ) -> None:
        """Add cases.

        Args:
            maps: (N, H, W), floating.
            masks: (N, H, W), bool.
            classes: (N,), integers of 0 or more; None, or one number for all, makes both means one.
            difficult: (N,), bool, the cases of the difficult subset; None: no case is.
            scale: Original pixels per map pixel, (vertical, horizontal), or (N, 2).
        """
        hits = ranking.pointing(maps, masks, self.tolerance, scale, self.seed)
        given = [torch.as_tensor([0] * len(maps) if v is None else v) for v in (classes, difficult)]
        for name, value in zip(("classes", "difficult"), given, strict=True):
            if value.shape != (len(maps),) or value.is_floating_point():
                kind = "integers" if name == "classes" else "bool"
                raise ValueError(f"{name} must be {kind} ({len(maps)},), got {value.dtype} {tuple(value.shape)}")
        self.add(hits, *given)

    def compute(self) -> dict[str, Tensor]:
        """Return "mean" over cases, "mean_over_classes" of hits / cases, and both of the difficult; NaN without any."""
        hits, classes, difficult = self.table().unbind(1)
        hard = difficult > 0
        return {
            "mean": hits.mean(),
            "mean_over_classes": _over_classes(hits, classes),
            "difficult": hits[hard].mean(),
            "difficult_over_classes": _over_classes(hits[hard], classes[hard]),
        }


class Energy(Cases):
    """Energy pointing game: mean share of the positive map inside the mask. See `tsgb.metrics.energy.energy`.

    Example:
        >>> metric = Energy()
        >>> metric.update(torch.tensor([[[3.0, -5.0, 1.0]]]), torch.tensor([[[True, True, False]]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add cases: maps (N, H, W) floating, masks (N, H, W) bool."""
        self.add(energy.energy(maps, masks))


class GridShare(Cases):
    """Grid pointing game: mean share of the positive map in the class's cell. See `tsgb.metrics.energy.grid`.

    Example:
        >>> metric = GridShare()
        >>> metric.update(torch.ones(4, 4, 4), energy.cells(2, 4, 4))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def update(self, maps: Tensor, cells: Tensor) -> None:
        """Add cases: maps (N, H, W) floating, cells (N, H, W) bool."""
        self.add(energy.grid(maps, cells))


class BoxAccuracy(Cases):
    """Share of the maps whose box meets one of the object's. See `tsgb.metrics.boxes.box_accuracy`.

    Args:
        iou: The least intersection over union that counts, above 0 and at most 1.

    Example:
        >>> metric, maps = BoxAccuracy(), torch.zeros(2, 4, 4)
        >>> maps[:, 1:3, 1:3] = 1
        >>> metric.update(maps, [[[1, 1, 4, 3]], [[0, 0, 1, 1], [3, 3, 4, 4]]])  # IoU 4 / 6 and 0
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, iou: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iou = iou

    def update(self, maps: Tensor, boxes: Sequence[Tensor | npt.ArrayLike]) -> None:
        """Add cases: maps (N, H, W) floating; of each its (n, 4) boxes, edges x0, y0, x1, y1 in the map's pixels."""
        self.add(torch.tensor([_boxes.box_accuracy(m, b, self.iou) for m, b in _each(maps, boxes)]))


class MaxBoxAccuracy(Cases):
    """MaxBoxAcc: box accuracy at the threshold that is best over one half of the cases, of the other half.

    See `tsgb.metrics.boxes.threshold_hits`. The cases of images of even number choose the threshold, the others are
    reported: all cases of an image are on one side, and no matter which process sees them.

    Args:
        version: 1, the largest piece's box at IoU 0.5; or 2, any piece's box, mean over IoU 0.3, 0.5 and 0.7.

    Example:
        >>> metric, maps = MaxBoxAccuracy(version=1), torch.tensor([[[5.0, 3.0], [1.0, 0.0]]])
        >>> metric.update(maps.expand(2, 2, 2), [[[0, 0, 1, 1]], [[0, 0, 1, 1]]], images=[0, 1])
        >>> metric.compute()  # from a fifth of the maximum on the region is the upper row, of IoU 1 / 2
        {'accuracy': tensor(1., dtype=torch.float64), 'thresholds': tensor(0.2000, dtype=torch.float64)}
    """

    kind = torch.uint8

    def __init__(self, version: int = 2, **kwargs: Any) -> None:
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version!r}")
        self._kept = slice(0, 1) if version == 1 else slice(1, 4)
        self.width = _NUMBER + _boxes.THRESHOLDS * (self._kept.stop - self._kept.start)
        super().__init__(**kwargs)

    def update(self, maps: Tensor, boxes: Sequence[Tensor | npt.ArrayLike], images: Tensor | Sequence[int]) -> None:
        """Add cases: maps and boxes as for `BoxAccuracy`; images (N,) integer, the number of each case's image."""
        numbers = torch.as_tensor(images).cpu()
        whole = not (numbers.is_floating_point() or numbers.dtype == torch.bool)
        if numbers.shape != (len(maps),) or (len(maps) and not whole):
            raise ValueError(f"images must be integers ({len(maps)},), got {numbers.dtype} {tuple(numbers.shape)}")
        for (map, given), number in zip(_each(maps, boxes), numbers.long().reshape(-1, 1), strict=True):
            hits = _boxes.threshold_hits(map, given)[self._kept].byte()
            self.keep(torch.cat([number.view(torch.uint8), hits.reshape(-1)])[None])

    def compute(self) -> dict[str, Tensor]:
        """Return "accuracy", and the "thresholds" chosen as shares of a map's maximum, (3,) for version 2.

        Raises:
            ValueError: If the images' numbers are all even or all odd.
        """
        table = self.table().cpu()
        tune = table[:, :_NUMBER].contiguous().view(torch.int64)[:, 0] % 2 == 0
        if tune.all() or not tune.any():
            raise ValueError(f"images must be of even and of odd number, got {int(tune.sum())} even of {len(tune)}")
        hits = table[:, _NUMBER:].bool().reshape(len(table), -1, _boxes.THRESHOLDS)
        best = [_boxes.max_box_accuracy(hits[:, row], tune) for row in range(hits.shape[1])]
        accuracies, indices = (torch.tensor(column, dtype=torch.float64) for column in zip(*best, strict=True))
        return {"accuracy": accuracies.mean(), "thresholds": indices / (_boxes.THRESHOLDS - 1)}


class _Perturbed(Cases):
    """Mean area under the scores of a perturbation."""

    _scores: ClassVar[Callable[..., Tensor]]

    def __init__(
        self, model: Callable[[Tensor], Tensor], batch_size: int = 32, steps: int = 224, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._model = (model,)  # in a tuple, as a submodule would be moved and saved along
        self._options = {"batch_size": batch_size, "steps": steps, "seed": seed}

    def update(self, images: Tensor, maps: Tensor, targets: Tensor) -> None:
        """Add cases: images (N, C, H, W) as the model takes them, maps (N, H, W) floating, targets (N,) integer."""
        self.add(perturbation.area(type(self)._scores(*self._model, images, maps, targets, **self._options)))


class Deletion(_Perturbed):
    """Mean area under the deletion curve; lower is better. See `tsgb.metrics.perturbation.deletion_scores`.

    Args:
        model: Network in eval mode; it is used as it is, neither moved nor saved with the metric.
        batch_size: Images that the model is given at a time.
        steps: Number of steps.
        seed: Seed of the ties.

    Example:
        >>> metric = Deletion(lambda x: torch.stack([x.sum((1, 2, 3)), torch.zeros(len(x))], 1), steps=4)
        >>> image = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
        >>> metric.update(image, image[:, 0], torch.tensor([0]))
        >>> metric.compute()  # (0.9975 / 2 + 0.9526 + 0.7311 + 0.5 + 0.5 / 2) / 4
        tensor(0.7331, dtype=torch.float64)
    """

    higher_is_better = False
    _scores = staticmethod(perturbation.deletion_scores)


class Insertion(_Perturbed):
    """Mean area under the insertion curve; higher is better. See `tsgb.metrics.perturbation.insertion_scores`.

    Arguments as for `Deletion`.

    Example:
        >>> metric = Insertion(lambda x: torch.stack([x.sum((1, 2, 3)), torch.zeros(len(x))], 1), steps=4)
        >>> image = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
        >>> metric.update(image, image[:, 0], torch.tensor([0]))
        >>> metric.compute() > 0.9  # the brightest pixels come first
        tensor(True)
    """

    _scores = staticmethod(perturbation.insertion_scores)


class Cascade(Cases):
    """Cascading randomisation: likeness of maps to those of the network randomised further and further down.

    Source: Adebayo et al. 2018. See `tsgb.metrics.similarity`. Lower is more faithful to the weights; no ranking of
    methods should rest on it alone (Binder et al. 2023).

    Example:
        >>> maps, metric = torch.arange(50.0).reshape(2, 5, 5) - 20, Cascade()
        >>> metric.update(maps, [maps, -maps])  # two stages: nothing changed, every sign changed
        >>> found = metric.compute()
        >>> found["spearman_curve"].round(decimals=6), found["spearman_abs"].round(decimals=6)
        (tensor([ 1., -1.], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    higher_is_better = None

    width = 4

    def update(self, originals: Tensor, randomised: Sequence[Tensor]) -> None:
        """Add cases: maps (N, H, W) of the network as it is, and as many of each stage, the head randomised first."""
        for stage, maps in enumerate(randomised):
            signed = similarity.spearman(originals, maps)
            absolute = similarity.spearman(originals.abs(), maps.abs())
            self.add(torch.full_like(signed, stage), signed, absolute, similarity.ssim(originals, maps))

    def compute(self) -> dict[str, Tensor]:
        """Return "spearman", "spearman_abs" and "ssim", means over stages and cases, and of each the "..._curve".

        A curve is (stages,), means over the cases; of one stage torchmetrics makes a scalar.
        """
        stages, *values = self.table().unbind(1)
        found: dict[str, Tensor] = {}
        for name, column in zip(("spearman", "spearman_abs", "ssim"), values, strict=True):
            curve = torch.stack([column[stages == stage].mean() for stage in torch.unique(stages)])
            found |= {name: curve.mean(), f"{name}_curve": curve}
        return found


class RandomLogit(Cases):
    """Random-logit test: mean structural similarity of the target's map and another class's; lower is more selective.

    Source: Sixt et al. 2020. See `tsgb.metrics.similarity.ssim`.

    Example:
        >>> metric, maps = RandomLogit(), torch.rand(2, 6, 6)
        >>> metric.update(maps, maps)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, maps: Tensor, others: Tensor) -> None:
        """Add cases: maps of the target and of another class of the same image, (N, H, W) each."""
        self.add(similarity.ssim(maps, others))


class Sensitivity(Cases):
    """Class sensitivity: mean correlation of the maps of the two most probable classes; lower is more selective.

    See `tsgb.metrics.similarity.correlation`.

    Example:
        >>> metric, maps = Sensitivity(), torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
        >>> metric.update(maps, 4 - maps)
        >>> round(float(metric.compute()), 6)
        -1.0
    """

    higher_is_better = False

    def update(self, maps: Tensor, seconds: Tensor) -> None:
        """Add cases: maps of the most probable and of the second most probable class, (N, H, W) each."""
        self.add(similarity.correlation(maps, seconds))


class Ratio(Cases):
    """Cost in multiples of a reference: median over rounds of the method's seconds (or bytes) over the reference's.

    Speed: seconds of the method and of one forward pass, of one round. Memory: peak bytes above the loaded model and
    input, of the method and of a plain input gradient.

    Example:
        >>> metric = Ratio()
        >>> metric.update([2.0, 2.2, 9.0], [1.0, 1.0, 3.0])
        >>> metric.compute()
        tensor(2.2000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, costs: float | Sequence[float] | Tensor, references: float | Sequence[float] | Tensor) -> None:
        """Add rounds: costs of the method, 0 or more, and of the reference, above 0; one number or (N,) each."""
        given = [torch.as_tensor(c, dtype=torch.float64).detach().reshape(-1) for c in (costs, references)]
        if given[0].shape != given[1].shape:
            raise ValueError(f"costs and references must be as many, got {len(given[0])} and {len(given[1])}")
        if not ((given[0] >= 0) & (given[1] > 0) & given[0].isfinite() & given[1].isfinite()).all():
            raise ValueError(f"costs must be 0 or more and references above 0, got {costs} and {references}")
        self.add(given[0] / given[1])

    def compute(self) -> Tensor:
        """Median over all rounds, a float64 scalar; of an even number the mean of the middle two."""
        return self.table()[:, 0].quantile(0.5)


def _over_classes(values: Tensor, classes: Tensor) -> Tensor:
    """Mean over the classes of each class's mean; NaN without any value."""
    kinds, own = torch.unique(classes, return_inverse=True)
    sums, counts = (torch.zeros_like(kinds).index_add_(0, own, v) for v in (values, torch.ones_like(values)))
    return (sums / counts).mean()


def _each(maps: Tensor, boxes: Sequence[Tensor | npt.ArrayLike]) -> Any:
    if len(maps) != len(boxes):
        raise ValueError(f"boxes must be a list of {len(maps)} arrays (n, 4), one a map, got {len(boxes)}")
    return zip(maps, boxes, strict=True)
