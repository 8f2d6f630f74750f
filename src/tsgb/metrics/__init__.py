"""Maps in, figures out: how well a map shows where a class is, and what it means to the model.

Each file holds functions that return one value a map; nothing is averaged before `intervals` or the classes in
`modules`, which need torchmetrics and are loaded when one is asked for here by name: `AveragePrecision`, `BoxAccuracy`,
`Cascade`, `Deletion`, `Energy`, `GridShare`, `Insertion`, `MaxBoxAccuracy`, `Pointing`, `RandomLogit`, `Ratio`,
`Sensitivity`.

- `ranking`: what depends on the ranking of the pixels alone, average precision and the pointing game.
- `energy`: how much of the positive map lies inside a mask, the energy and grid pointing games.
- `boxes`: whether the box of a thresholded map is the object's.
- `perturbation`: insertion and deletion. `similarity`: how alike two maps are. `intervals`: bootstrap.

>>> import torch
>>> from tsgb.metrics import ranking
>>> map, mask = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]]), torch.tensor([[[True, False], [False, True]]])
>>> ranking.average_precision(map, mask)
tensor([0.8333], dtype=torch.float64)
"""

from typing import Any

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """Load `modules` for a metric class, which are the capitalised names here."""
    if name[0].isupper():
        from . import modules

        if name in modules.__all__:
            return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
