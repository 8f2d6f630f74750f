"""Explain image files into a folder: overlays, raw maps, contact sheets, and one record of it all."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import images, render, rules, targets
from .attribution import explain
from .engine.supported import CoverageError
from .explanation import Explanation
from .models import Network

#: The name of each method's table in `tsgb.rules`.
METHODS = {"tsgb-fused": "FUSED", "tsgb-pixels": "PIXELS", "tsgb-paper": "PAPER"}

#: Errors whose message is enough. A network's own code may raise anything else.
_CLEAR = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, MemoryError)


@dataclass
class Report:
    """The outcome of a run: the entries of the record, the files written, and one line for each problem."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def explain_files(
    network: Network,
    paths: Sequence[Path],
    wanted: Sequence[str],
    out: Path,
    *,
    method: str = "tsgb-fused",
    f: float | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Report:
    """Explain image files one by one. A bad one is reported, and the rest is explained.

    For each image and target ``<stem>_<class>.png`` (the overlay on the original image) and ``.npy`` (the raw
    signed map in the network's pixels, float32); for several targets ``<stem>_sheet.png``; for all of them
    ``record.json``, which is also written for what was done when the run is interrupted, and keeps what it has of other
    maps in the folder. If no image can be explained nothing is written.

    Args:
        network: what `tsgb.load` returns.
        paths: the images, see `images.collect`.
        wanted: targets for every image: class indices, class names, "top5". Empty for the predicted class.
        out: the folder, made when the first file is written.
        method: a key of `METHODS`. ``f``: as in `explain`.
        done: called with 1 after each image, good or bad.

    Raises:
        TargetError: a target is no class of the model, or the model has not as many classes as names.
        CoverageError: as `explain` does.
        ValueError: an output could replace one of the images.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile, tsgb
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     render.save(Image.new("RGB", (200, 100), "red"), f"{folder}/red.png")
        ...     report = explain_files(tsgb.load("bundled"), [Path(f"{folder}/red.png")], ["0", "1"], Path(folder))
        ...     [file.name for file in report.files]
        ['red_0.png', 'red_0.npy', 'red_1.png', 'red_1.npy', 'red_sheet.png', 'record.json']
    """
    asked = [_asked(word, network.names) for word in wanted]
    stems = images.labels(paths)
    _check_inputs_stay(paths, stems, out)
    kept = _earlier(out)
    names = {entry[kind] for entry in kept for kind in ("overlay", "map")}
    earlier = names | {f"{name.rsplit('_', 1)[0]}_sheet.png" for name in names}
    report, table = Report(), getattr(rules, METHODS[method])
    try:
        for path, stem in zip(paths, stems, strict=True):
            try:
                image = images.read(path)
                digest = images.sha256(path)
                tensor = network.preprocessing.tensor(image)[None]
                held = next(network.model.parameters(), tensor)
                tensor = tensor.to(held.device, held.dtype)
                explanation = explain(network.model, tensor, _target(network.model, tensor, asked), rules=table, f=f)
                entries = _entries(network, path, digest, image, explanation, method, stem)
            except (targets.TargetError, CoverageError):
                raise  # it would fail for every image
            except Exception as error:
                report.problems.append(_line(path, error))
                done(1)
                continue
            report.files += _write(image, explanation, entries, out, stem, network, earlier)
            report.entries += entries
            done(1)
    finally:
        if report.entries:
            made = {entry["map"] for entry in report.entries}
            entries = [entry for entry in kept if entry["map"] not in made] + report.entries
            text = json.dumps({"entries": entries}, indent=1, allow_nan=False) + "\n"
            render.save_text(text, out / "record.json")
            report.files.append(out / "record.json")
    return report


def _check_inputs_stay(paths: Sequence[Path], stems: Sequence[str], out: Path) -> None:
    """Refuse images that lie in the output folder under a name that an output may have."""
    outputs = re.compile(rf"(({'|'.join(map(re.escape, stems))})_(\d+|sheet)\.(png|npy)|record\.json)")
    for path in paths:
        if path.resolve().parent == out.resolve() and outputs.fullmatch(path.resolve().name):
            raise ValueError(f"{path} is one of the images to explain and could be replaced: choose another --out")


def _earlier(out: Path) -> list[dict[str, Any]]:
    """The entries of earlier runs into this folder whose files are still there."""
    try:
        entries = json.loads((out / "record.json").read_text())["entries"]
        return [entry for entry in entries if all((out / entry[kind]).is_file() for kind in ("overlay", "map"))]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _asked(word: str, names: Sequence[str] | None) -> int | str:
    """A target as the command line gives it: an index, a name or topK."""
    if re.fullmatch(r"\s*-?\d+\s*", word):
        return int(word)
    if targets.is_top(word) and word not in (names or ()):
        return word.strip().lower()
    return targets.class_index(word, names)


def _target(model: Any, tensor: Tensor, asked: Sequence[int | str]) -> Any:
    """The targets of one image as `explain` takes them; topK beside others needs the logits first."""
    if not asked:
        return None
    if len(asked) == 1:
        return asked[0]
    if all(isinstance(item, int) for item in asked):
        return [list(dict.fromkeys(asked))]
    with torch.inference_mode():
        logits = targets.find_logits(model(tensor))
    found = [
        index
        for item in asked
        for index in ([item] if isinstance(item, int) else targets.resolve(item, logits)[0].tolist())
    ]
    return [list(dict.fromkeys(found))]


def _entries(
    network: Network, path: Path, digest: str, image: Image.Image, e: Explanation, method: str, stem: str
) -> list[dict[str, Any]]:
    probabilities = e.logits.float().softmax(1) if e.logits.shape[1] > 1 else torch.full_like(e.logits, float("nan"))
    if network.names and len(network.names) != probabilities.shape[1]:
        classes = f"{probabilities.shape[1]} classes, but {len(network.names)} names"
        raise targets.TargetError(f"{network.spec} has {classes}: give one name for each class, or none")
    entries = []
    for k, index in enumerate(e.targets[0].tolist()):
        entries.append(
            {
                "image": str(path),
                "image_sha256": digest,
                "image_size": list(image.size),
                "model": network.spec,
                "weights": network.weights,
                "weights_sha256": network.weights_sha256,
                "preprocessing": network.preprocessing.record(),
                "target": index,
                "target_name": network.names[index] if network.names else None,
                "logit": _number(e.logits[0, index]),
                "probability": _number(probabilities[0, index]),
                "method": method,
                "rules": METHODS[method],
                "f": e.f,
                "of_all_depths": e.of_all_depths,
                "coverage": [list(row) for row in e.coverage],
                "why_empty": e.why_empty[0][k],
                "overlay": f"{stem}_{index}.png",
                "map": f"{stem}_{index}.npy",
                "versions": versions(),
            }
        )
    return entries


def _write(
    image: Image.Image,
    e: Explanation,
    entries: list[dict[str, Any]],
    out: Path,
    stem: str,
    network: Network,
    earlier: set[str],
) -> list[Path]:
    names = [entry[kind] for entry in entries for kind in ("overlay", "map")]
    if len(entries) > 1:
        names.append(f"{stem}_sheet.png")
    for name in names:
        if (
            (out / name).exists()
            and out.resolve() == Path(entries[0]["image"]).resolve().parent
            and name not in earlier
        ):
            raise ValueError(f"{out / name} is there and no result of the last run: choose another --out")
    overlays = []
    for k, entry in enumerate(entries):
        map = e.maps[0, k].cpu().numpy()
        overlay = render.overlay(image, network.preprocessing.restore(map, image.size))
        render.save(overlay, out / entry["overlay"])
        render.save_map(map, out / entry["map"])
        entry["map_sha256"] = images.sha256(out / entry["map"])
        overlays.append((caption(entry), overlay))
    if len(entries) > 1:
        render.save(render.sheet(image, overlays), out / names[-1])
    return [out / name for name in names]


def caption(entry: dict[str, Any]) -> str:
    """Name an entry's target, with its probability.

    Example:
        >>> caption({"target": 3, "target_name": "cat", "probability": 0.25})
        '3 cat, 25.0 %'
    """
    name = f" {entry['target_name']}" if entry["target_name"] else ""
    share = "" if entry["probability"] is None else f", {100 * entry['probability']:.1f} %"
    return f"{entry['target']}{name}{share}"


def versions() -> dict[str, str]:
    """Name the releases that a map depends on.

    Example:
        >>> sorted(versions())[:3]
        ['numpy', 'pillow', 'python']
    """
    loaded = [name for name in ("torchvision", "timm") if name in sys.modules]
    found = {name: version(name) for name in ("tsgb", "torch", "numpy", "pillow", *loaded)}
    return {**found, "python": platform.python_version()}


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def one_line(error: Exception) -> str:
    """Say what went wrong on one line, with the error's type where the message alone may say nothing.

    Example:
        >>> one_line(KeyError("head")), one_line(ValueError("no\\nhead"))
        ("KeyError: 'head'", 'no head')
    """
    message = " ".join(str(error).split())
    if message and isinstance(error, _CLEAR):
        return message
    return f"{type(error).__name__}: {message}".rstrip(": ")


def _line(path: Path, error: Exception) -> str:
    """One line for a problem, which names the file."""
    message = one_line(error)
    return message if str(path) in message else f"{path}: {message}"
