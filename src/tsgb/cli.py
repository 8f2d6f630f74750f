"""The command `tsgb`: parse, call, print."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Show which pixels of an image speak for a class, for any convolutional network.",
)

SCENE = 11, 384  # the bundled scene's seed and size

Model = Annotated[
    str,
    typer.Option(help="bundled, bundled-vgg, a torchvision name, timm:NAME, or path/file.py:factory.", metavar="M"),
]
Weights = Annotated[
    Path | None, typer.Option(help="State dict, .pth or .safetensors. Default: the library's own.", metavar="FILE")
]
Size = Annotated[str | None, typer.Option(help="Input size of the network: 224, or HEIGHTxWIDTH.", metavar="N")]
Mean = Annotated[str | None, typer.Option(help="Mean of the pixels in 0..1: one number or R,G,B.", metavar="X")]
Std = Annotated[
    str | None, typer.Option(help="Standard deviation of the pixels in 0..1: one number or R,G,B.", metavar="X")
]
Resize = Annotated[str | None, typer.Option(help="squash the whole image, or crop its centre.", metavar="squash|crop")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"tsgb {__version__}")
        raise typer.Exit


@app.command()
def explain(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, or folders of them. Default: a bundled scene.", metavar="IMAGE"),
    ] = None,
    model: Model = "bundled",
    weights: Weights = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Class index, class name or topK; may be repeated. Default: the predicted class.", metavar="T"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="tsgb-fused (also tsgb): one map of all depths; tsgb-pixels: relevance of each pixel; "
            "tsgb-paper: as published.",
            metavar="NAME",
        ),
    ] = "tsgb-fused",
    f: Annotated[
        float | None,
        typer.Option(help="Share of the evidence for the class that evidence against it balances, 0..1.", metavar="F"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.", metavar="DIR")] = Path("tsgb-out"),
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
) -> None:
    """Explain images: for each target an overlay (.png) and the raw map (.npy), and one record.json.

    A bad image is reported and the rest is explained. The limit is 100 million pixels an image.
    """
    from . import report
    from .images import collect

    method = "tsgb-fused" if method == "tsgb" else method
    if method not in report.METHODS:
        _wrong_call(f"--method must be one of {', '.join(report.METHODS)}, got {method!r}")
    if f is not None and not 0 <= f <= 1:
        _wrong_call(f"--f must be from 0 to 1, got {f}")
    if f is not None and method == "tsgb-fused":
        _wrong_call("--f needs --method tsgb-pixels or tsgb-paper: the rules of tsgb-fused have no f")
    with report_errors():
        network = _load(model, weights, size, mean, std, resize)
        with contextlib.nullcontext((images, ())) if images else _scene(out) as (files, shown):
            paths, wanted = collect(files), list(target or [])
            if not wanted and tuple(network.names or ()) == _scene_classes():
                wanted = [str(index) for index in shown]
            quiet = len(paths) == 1 or not sys.stderr.isatty()
            with typer.progressbar(length=len(paths), file=sys.stderr, label="explaining", hidden=quiet) as bar:
                found = report.explain_files(network, paths, wanted, out, method=method, f=f, done=bar.update)
            if found.problems and not images:
                raise ValueError(found.problems[0])
    for line in _lines(found.entries, out):
        typer.echo(line)
    for file in found.files:
        if file.stem.endswith("_sheet"):
            typer.echo(f"all targets of an image: {file}")
    for line in found.problems:
        typer.echo(f"tsgb: {line}", err=True)
    for name in sorted({row[0] for entry in found.entries for row in entry["coverage"] if row[1] is None}):
        hint = f"see tsgb doctor --model {model}"
        typer.echo(f"tsgb: no rule for {name}, its gradient is used as a fallback: {hint}", err=True)
    if found.entries:
        typer.echo(f"record: {out / 'record.json'}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Model = "bundled",
    weights: Weights = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
) -> None:
    """List the rule of each operator of a model, and check its maps."""
    with report_errors():
        network = _load(model, weights, size, mean, std, resize)
        from . import doctor as examination

        found = examination.examine(network.model, _sample(network))
    typer.echo(f"{network.spec}, weights {network.weights}\n")
    width = max(len(name) for name, _, _ in found.coverage)
    typer.echo(f"{'operator':{width}}  {'rule':18} calls")
    for name, rule, count in found.coverage:
        typer.echo(f"{name:{width}}  {rule or 'none':18} {count:5}")
    typer.echo("")
    for check in found.checks:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}")
    if not all(check.passed for check in found.checks):
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model = "bundled",
    weights: Weights = None,
    data: Annotated[
        Path | None,
        typer.Option(help="COCO-layout, VOC, ImageNet or class folders. Default: bundled scenes.", metavar="PATH"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas. Default: all that are installed except smoothgrad, "
            "integrated-gradients, occlusion, rise.",
            metavar="A,B",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas. Default: those that need only a map.", metavar="A,B"),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            help="Evaluate precomputed maps too: <image>_<class>.npy in this folder, or in a folder for each method.",
            metavar="DIR",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="The first N images. Default: all, or 100 of the bundled scenes.", metavar="N", min=1),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help='A Python slice of the images: "1::2" takes every other one.', metavar="SLICE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.", metavar="N", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images in one forward.", metavar="N", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for records and results.", metavar="DIR")] = Path("tsgb-bench"),
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
) -> None:
    """Evaluate saliency methods on the same annotated images.

    Methods: tsgb-fused (also tsgb), tsgb-pixels, tsgb-paper, gradcam, layercam, gradient, inputxgradient, smoothgrad,
    integrated-gradients, guided, deconvnet, guided-gradcam, ebp, cebp, deeplift, lrp, occlusion, rise, center, random.

    Metrics: mask_ap, box_ap, grid_ap, pointing, energy, grid, box_accuracy, max_box_accuracy, insertion, deletion,
    cascade, random_logit, sensitivity, speed, memory.

    Precomputed maps are in the pixels of the network's input and named as tsgb explain names its own, with the index of
    the network's class. The bundled scenes need no data. A killed run resumes when it is started again with the same
    arguments. Exit status 1 if anything requested was left out or failed; the results name it.
    """
    from . import bench as benches

    with report_errors("interrupted: the same arguments resume the bench"):
        job = benches.job(
            load=_loading(model, weights, size, mean, std, resize), data=data, methods=_words(methods),
            metrics=_words(metrics), maps=maps, seed=seed, batch_size=batch_size, out=out, images=images,
        )  # fmt: skip
        limit = 100 if limit is None and data is None else limit
        found = benches.run(job, limit, begun=_progress)
    if not found:
        return  # rank 0 says it all
    typer.echo(benches.markdown(found))
    typer.echo(f"page: {out / 'index.html'}")
    for line in benches.summary(found["problems"]):
        typer.echo(benches.printable(f"tsgb: {line}"), err=True)
    for failure in found["failures"]:
        first = f"{failure['images'][0]}{' and others' if failure['count'] > 1 else ''}"
        typer.echo(benches.printable(f"tsgb: {failure['method']} failed on {first}: {failure['reason']}"), err=True)
    gone = found["left_out"]
    missed = [name for name in (*(_words(methods) or ()), *(_words(metrics) or ())) if name in gone]
    for name in missed:  # what is left out by itself is no failure
        typer.echo(benches.printable(f"tsgb: {name} is left out: {gone[name]}"), err=True)
    if found["problems"] or found["failures"] or missed:
        raise typer.Exit(1)


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield _lines_of(count)
        return
    with typer.progressbar(length=count, file=sys.stderr, label="evaluating", hidden=not count) as bar:
        yield bar.update


def _lines_of(count: int) -> Callable[[int], None]:
    """Report progress in a log: one line for each tenth."""
    done = 0

    def update(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if 10 * before // count < 10 * done // count:
            typer.echo(f"evaluated {done} of {count}", err=True)

    return update


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _load(
    model: str, weights: Path | None, size: str | None, mean: str | None, std: str | None, resize: str | None
) -> Any:
    return _loading(model, weights, size, mean, std, resize)()


def _loading(
    model: str, weights: Path | None, size: str | None, mean: str | None, std: str | None, resize: str | None
) -> Callable[[], Any]:
    from . import models

    if resize not in (None, "squash", "crop"):
        _wrong_call(f"--resize must be squash or crop, got {resize!r}")
    sides = None if size is None else _numbers("--size", size, "x", int, (1, 2))
    return partial(
        models.load,
        model,
        weights,
        size=sides[0] if sides and len(sides) == 1 else sides,
        mean=_colours("--mean", mean),
        std=_colours("--std", std),
        resize=resize,
    )


def _colours(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    values = _numbers(option, text, ",", float, (1, 3))
    return values * 3 if len(values) == 1 else values


def _numbers(
    option: str, text: str, separator: str, kind: Callable[[str], Any], counts: tuple[int, int]
) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(separator))
    except ValueError:
        values = ()
    if len(values) not in counts:
        _wrong_call(f"{option} must be {counts[0]} or {counts[1]} numbers with {separator!r} between, got {text!r}")
    return values


def _scene_classes() -> tuple[str, ...]:
    from .scenes import CLASSES

    return CLASSES


@contextmanager
def _scene(out: Path) -> Iterator[tuple[list[Path], tuple[int, ...]]]:
    """Write the bundled scene to the output folder and yield its classes; remove it if it cannot be explained."""
    import numpy as np
    from PIL import Image

    from . import images, render, scenes

    seed, size = SCENE
    scene, path, had_folder = scenes.render(seed, count=2, size=size), out / "scene.png", out.exists()
    if path.exists():
        if not np.array_equal(np.asarray(images.read(path)), scene.image):
            raise ValueError(f"{path} is another image, which the bundled scene would replace: choose another --out")
        yield [path], scene.classes
        return
    render.save(Image.fromarray(scene.image), path)
    try:
        yield [path], scene.classes
    except BaseException:
        path.unlink()
        with contextlib.suppress(OSError):  # not empty: another run writes there
            if not had_folder:
                out.rmdir()
        raise


def _sample(network: Any) -> Any:
    """Make two images that any network takes: a bundled scene, and the same in other colours and upside down."""
    import torch
    from PIL import Image

    from . import scenes

    image = Image.fromarray(scenes.render(SCENE[0], count=2, size=SCENE[1]).image)
    other = Image.merge("RGB", image.split()[::-1]).transpose(Image.Transpose.ROTATE_180)
    images = torch.stack([network.preprocessing.tensor(shown) for shown in (image, other)])
    held = next(network.model.parameters(), images)
    return images.to(held.device, held.dtype)


def _lines(entries: list[dict[str, Any]], out: Path) -> list[str]:
    from .report import caption

    lines = []
    for entry in entries:
        empty = f": empty map: {entry['why_empty']}" if entry["why_empty"] else ""
        lines.append(f"{entry['image']}: {caption(entry)} -> {out / entry['overlay']}{empty}")
    return lines


@contextmanager
def report_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Report an error as one line on standard error, and exit with status 1."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"tsgb: {interrupted}", err=True)
        raise typer.Exit(130) from None
    except typer.BadParameter:
        raise
    except Exception as error:  # a network's own code may raise anything
        from .report import one_line

        typer.echo(f"tsgb: {one_line(error)}", err=True)
        raise typer.Exit(1) from None


def _wrong_call(message: str) -> NoReturn:
    raise typer.BadParameter(message)


def main() -> None:
    """Run the command, as `tsgb` and `python -m tsgb` do."""
    app(prog_name="tsgb")
