"""The defaults of a bench: which methods, which metrics, which images."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .. import methods as registry
from ..models import Network
from .precomputed_maps import MAP_METRICS, precomputed_methods, slice_of
from .work import Job

__all__ = ["METRICS", "SLOW", "job"]

#: Methods that need hundreds of forwards an image. They run only if requested by name.
SLOW = ("smoothgrad", "integrated-gradients", "occlusion", "rise")

#: Metrics that need only the map of each annotated class.
METRICS = ("mask_ap", "box_ap", "grid_ap", "pointing", "energy", "grid", "box_accuracy")


def _without_grids() -> tuple[str, ...]:
    return tuple(metric for metric in METRICS if metric in MAP_METRICS)


def job(
    load: Callable[[], Network],
    data: str | Path | None = None,
    methods: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    maps: Path | None = None,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path = "tsgb-bench",
    images: str | None = None,
) -> Job:
    """Describe a bench: fill in the defaults and check the arguments.

    Args:
        load: returns the network, such as ``functools.partial(tsgb.load, "resnet50")``. Must be picklable for more than
            one process.
        data: annotated images, see `tsgb.data.open_dataset`. By default, the bundled scenes.
        methods: names of `tsgb.methods.METHODS`. By default, all that are installed except `SLOW`; with ``maps``, all
            that have maps there.
        metrics: names of `tsgb.bench.protocol.METRICS`. By default, those that need only a map.
        maps: a folder of precomputed maps, ``<image>_<class>.npy`` with the network's class, in the input's pixels; or
            of such folders, one a method. The folder's name is the method's name.
        seed: for everything random. ``batch_size``: images in one forward.
        out: the folder for records and results.
        images: a Python slice of the dataset: "1::2" takes every other image, from the second on.

    Raises:
        TypeError: ``load`` is not callable, or names are one string instead of a list.
        ValueError: ``maps`` has no maps, or ``images`` is no slice.

    Example:
        >>> from functools import partial
        >>> import tsgb
        >>> job(partial(tsgb.load, "bundled"), methods=["tsgb", "lrp"]).methods
        ('tsgb-fused', 'lrp')
    """
    if not callable(load):
        raise TypeError(f"load must return the network when called, as partial(tsgb.load, 'bundled'), got {load!r}")
    for name, words in (("methods", methods), ("metrics", metrics)):
        if isinstance(words, str):
            raise TypeError(f"{name} must be a list of names, got {words!r}: write [{words!r}]")
    if images is not None:
        slice_of(images)
    left_out: list[tuple[str, str]] = []
    precomputed = () if maps is None else precomputed_methods(maps)
    if methods is None and maps is not None:
        methods = precomputed
    elif methods is None:
        missing = {name: [p for p in m.needs if find_spec(p) is None] for name, m in registry.METHODS.items()}
        left_out = [(name, f"needs {', '.join(packages)}") for name, packages in missing.items() if packages]
        left_out += [(name, "slow: ask for it by name") for name in SLOW if not missing[name]]
        methods = [name for name in registry.METHODS if name not in dict(left_out)]
    return Job(
        load=load,
        data=data,
        methods=tuple(name if name in precomputed else registry.ALIASES.get(name, name) for name in methods),
        metrics=tuple(metrics) if metrics is not None else METRICS if maps is None else _without_grids(),
        seed=seed,
        batch_size=batch_size,
        out=Path(out),
        maps=maps,
        left_out=tuple(left_out),
        images=images,
    )
