"""What the metric classes share: torchmetrics, and a metric that keeps one row of numbers a case."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..vision import import_torchvision

__all__ = ["Cases"]


def _torchmetrics() -> Any:
    """Import torchmetrics, which imports torchvision where that is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    try:
        return importlib.import_module("torchmetrics")
    except ModuleNotFoundError as error:
        text = "tsgb.metrics.modules needs torchmetrics: pip install 'tsgb[bench]'"
        raise ModuleNotFoundError(text, name=error.name) from error


if TYPE_CHECKING:
    from torchmetrics import Metric
else:
    Metric = _torchmetrics().Metric


class Cases(Metric):
    """A metric that keeps one row of numbers a case; `compute` is the mean of the first.

    Attributes:
        width: Numbers a row.
        kind: Their type.
        rows: What was kept, (n, width) each.

    Example:
        >>> class Highest(Cases):
        ...     def update(self, maps):
        ...         self.add(maps.amax((1, 2)))
        >>> metric = Highest()
        >>> metric.update(torch.tensor([[[1.0, 5.0]], [[2.0, 0.0]]]))
        >>> metric.compute()
        tensor(3.5000, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = True

    width = 1
    kind = torch.float64
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._begin()

    def reset(self) -> None:
        """Forget all cases."""
        super().reset()
        self._begin()

    def compute(self) -> Any:
        """Mean over all cases, a float64 scalar."""
        return self.table()[:, 0].mean()

    def add(self, *columns: Tensor) -> None:
        """Keep n rows, given as columns (n,)."""
        self.keep(torch.stack([column.to(self.device, self.kind) for column in columns], 1))

    def keep(self, rows: Tensor) -> None:
        """Keep rows (n, width)."""
        self.rows.append(rows.to(self.device, self.kind))

    def table(self) -> Tensor:
        """Join all rows, (cases, width).

        Raises:
            RuntimeError: If there are none.
        """
        table = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows  # a tensor once synchronised
        if not len(table):
            raise RuntimeError(f"{type(self).__name__} has seen no case: call update before compute")
        return table

    def _begin(self) -> None:
        # An empty part of the right width and type, without which a process without cases could not be joined.
        self.keep(torch.zeros(0, self.width))
