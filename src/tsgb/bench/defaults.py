"""What a bench does where it is not told: which methods, which metrics, which pictures."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .. import methods as rivals
from ..models import Network
from .given import JUDGED, given_methods, slice_of
from .work import Job

__all__ = ["METRICS", "SLOW", "job"]

#: Methods that need hundreds of forwards for a picture; they run where they are asked for by name.
SLOW = ("smoothgrad", "integrated-gradients", "occlusion", "rise")

#: Metrics that need nothing but a map of each class in a picture.
METRICS = ("mask_ap", "box_ap", "grid_ap", "pointing", "energy", "grid", "box_accuracy")


def _without_grids() -> tuple[str, ...]:
    return tuple(metric for metric in METRICS if metric in JUDGED)


def job(
    load: Callable[[], Network],
    data: str | Path | None = None,
    methods: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    maps: Path | None = None,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path = "tsgb-bench",
    pictures: str | None = None,
) -> Job:
    """Say what a bench is to do.

    Args:
        load: gives the network, as ``functools.partial(tsgb.load, "resnet50")``; picklable for more than one process.
        data: annotated pictures, see `tsgb.data.open_dataset`; None for the bundled scenes.
        methods: names of `tsgb.methods.METHODS`; None for all that are installed and need no hundreds of forwards, and
            with ``maps`` for all that lie there.
        metrics: names of `tsgb.bench.protocol.METRICS`; None for those that need nothing but a map.
        maps: a folder of given maps, ``<picture>_<class>.npy`` of the network's class, in the input's pixels; or of
            such folders, one a method. They are methods by the folder's name, beside others that are named.
        seed: of everything that is drawn. ``batch_size``: pictures that go through the network at once.
        out: the folder for records and results.
        pictures: which of the dataset, as a Python slice: "1::2" for every other one from the second on.

    Raises:
        TypeError: ``load`` cannot be called, or names are given as one text.
        ValueError: ``maps`` holds no maps, or ``pictures`` is no slice.

    Example:
        >>> from functools import partial
        >>> import tsgb
        >>> job(partial(tsgb.load, "bundled"), methods=["tsgb"]).metrics == METRICS
        True
    """
    if not callable(load):
        raise TypeError(f"load must give the network when called, as partial(tsgb.load, 'bundled'), got {load!r}")
    for name, words in (("methods", methods), ("metrics", metrics)):
        if isinstance(words, str):
            raise TypeError(f"{name} must be a list of names, got {words!r}: write [{words!r}]")
    if pictures is not None:
        slice_of(pictures)
    left_out: list[tuple[str, str]] = []
    if methods is None and maps is not None:
        methods = given_methods(maps)
    elif methods is None:
        missing = {name: [p for p in m.needs if find_spec(p) is None] for name, m in rivals.METHODS.items()}
        left_out = [(name, f"needs {', '.join(packages)}") for name, packages in missing.items() if packages]
        left_out += [(name, "slow: ask for it by name") for name in SLOW if not missing[name]]
        methods = [name for name in rivals.METHODS if name not in dict(left_out)]
    return Job(
        load=load,
        data=data,
        methods=tuple(methods),
        metrics=tuple(metrics) if metrics is not None else METRICS if maps is None else _without_grids(),
        seed=seed,
        batch_size=batch_size,
        out=Path(out),
        maps=maps,
        left_out=tuple(left_out),
        pictures=pictures,
    )
