"""What a model specification stands for: the network, how its images are prepared, the names of its classes.

`bundled` and `bundled-vgg` come with the package, `resnet50` is torchvision's, `timm:resnet50` timm's, and
`path/file.py:factory` is what that function returns. Whatever is wrong with a specification or a weights file is a
`ModelError` of one line.
"""

import difflib
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tsgb import factories
from tsgb.preprocessing import Preprocessing
from tsgb.states import ModelError, State, fetched, fill, filled, head, read, reason, sha256, unfetched
from tsgb.vision import import_torchvision

__all__ = ["BUNDLED", "ModelError", "Network", "load", "sha256"]

BUNDLED = ("bundled", "bundled-vgg")

_PLAIN = Preprocessing(size=(224, 224))  # squash, ImageNet mean and std


@dataclass(frozen=True)
class Network:
    """What a model specification stands for.

    Attributes:
        model: The network in eval mode.
        preprocessing: How an image becomes its input.
        names: Name of each class, by index; None where they are not known.
        spec: The specification as given.
        weights: What the weights are: a file's name, a URL, or words.
        weights_sha256: SHA-256 of the weights' file; where the weights are no single file, of the state dict.
    """

    model: nn.Module
    preprocessing: Preprocessing
    names: tuple[str, ...] | None
    spec: str
    weights: str
    weights_sha256: str


class _Found(NamedTuple):
    """A network before its weights are accounted for; they are in a file, or are what the state dict holds."""

    model: nn.Module
    preprocessing: Preprocessing
    names: tuple[str, ...] | None
    weights: str = ""
    file: Path | None = None


def load(
    spec: str = "bundled",
    weights: str | Path | None = None,
    *,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: str | None = None,
) -> Network:
    """Return the network that a specification stands for, with its preprocessing and class names.

    The preprocessing is that of the weights where it is known: the bundled networks', torchvision's for the weights it
    fetches, timm's for the network. Else it is a squash to 224 x 224 (299 x 299 for `inception_v3`, which is made for
    it), /255, ImageNet mean and std. The class names are ImageNet's for a torchvision or timm network of 1000 outputs,
    also with weights from a file. They are also ``model.names``, so that `explain` takes them for targets.

    Args:
        spec: `bundled`, `bundled-vgg`, the name of a torchvision classifier or segmentation network, `timm:NAME`, or
            `path/file.py:factory`. The factory is called without arguments and returns the module or `(module,
            {"size", "mean", "std", "resize", "names"})`, each key optional. Modules beside its file can be imported by
            it, in both forms, until it returns; each load reads the files anew. **The factory's module itself is put
            to eval mode.**
        weights: File of a state dict: `.safetensors`, or what `torch.save` writes, read with `weights_only=True`; also
            nested under `state_dict` or `model`, or with `module.` before every key. A torchvision or timm network is
            built with as many classes as the file has. GoogLeNet and Inception v3 then transform their input as they do
            with torchvision's own weights. None takes the package's or the library's own, fetched with a progress bar
            on standard error, or leaves a factory's module as it is.
        size: Side of the square input in pixels, or (height, width). This and the following win over everything else.
        mean: Three numbers, subtracted from RGB in [0, 1].
        std: Three numbers, divided by.
        resize: `squash` to the size, or `crop`: the short side first, then the centre.

    Returns:
        The network in eval mode, and on the CPU and in float32 unless a factory made it otherwise.

    Raises:
        ModelError: If the specification stands for nothing, a library it needs is missing or broken, a factory's file
            or the weights cannot be read or do not fit, nothing can be fetched, or the preprocessing makes no sense.

    Example:
        >>> network = load("bundled")
        >>> network.model.training, network.preprocessing.size, network.names[1]
        (False, (128, 128), 'star')
        >>> load("nets.py")
        Traceback (most recent call last):
            ...
        tsgb.states.ModelError: nets.py names no function: expected path/file.py:factory
    """
    state = None if weights is None else read(Path(weights))
    if spec in BUNDLED:
        found = _bundled(spec, state)
    elif spec.startswith("timm:"):
        found = _timm(spec, state)
    elif spec.endswith(".py") or ".py:" in spec:
        found = _factory(spec, state)
    else:
        found = _torchvision(spec, state)
    preprocessing = _changed(found.preprocessing, {"size": size, "mean": mean, "std": std, "resize": resize})
    name, file = (found.weights, found.file) if state is None else (state.file.name, state.file)
    try:
        digest = sha256(found.model.state_dict() if file is None else file)
    except Exception as error:  # a factory's lazy layers have no weights yet
        raise ModelError(f"the weights of {spec} cannot be read ({reason(error)})") from error
    if found.names and not hasattr(found.model, "names"):
        found.model.names = found.names  # type: ignore[assignment]  # so that `explain` takes them as targets
    return Network(found.model.eval(), preprocessing, found.names, spec, name, digest)


def _bundled(spec: str, state: State | None) -> _Found:
    from tsgb import networks

    build = {"bundled": networks.bundled, "bundled-vgg": networks.bundled_vgg}[spec]
    model: Any = build(pretrained=state is None)
    if state is not None:
        fill(model, state, spec)
    file = Path(networks.__file__).parent / "weights" / f"{spec}.safetensors"
    return _Found(model, _changed(_PLAIN, networks.INPUT), tuple(model.names), file.name, file)


def _factory(spec: str, state: State | None) -> _Found:
    model, meta = factories.make(spec)
    try:
        preprocessing = _changed(_PLAIN, {key: value for key, value in meta.items() if key != "names"})
    except ModelError as error:
        raise ModelError(f"{spec}: {error}") from error
    if state is not None:
        fill(model, state, spec)
    return _Found(model, preprocessing, tuple(meta.get("names") or ()) or None, "state dict of the factory")


def _torchvision(spec: str, state: State | None) -> _Found:
    try:
        api = import_torchvision().models
    except ModelError as error:
        raise ModelError(f"{spec!r} is neither {' nor '.join(BUNDLED)}, and {error}") from error
    name, known = spec.lower(), [*api.list_models(api), *api.list_models(api.segmentation)]
    if name not in known:
        raise ModelError(_unknown(spec, [*BUNDLED, *known]))
    default = api.get_model_weights(name).DEFAULT
    categories = tuple(default.meta["categories"])
    if state is None:
        file = fetched(default.url, spec)
        try:
            model = api.get_model(name, weights=default)
        except Exception as error:
            told = f"{file} does not hold the weights of {spec} ({reason(error)}); delete it to have it fetched again"
            raise ModelError(told) from error
        return _Found(model, _preset(default.transforms()), categories, default.url, file)

    build, keys = partial(api.get_model, name, weights=None), list(state.tensors)
    if name in ("googlenet", "inception_v3"):  # as torchvision builds them for its own weights
        auxiliary = any(key.startswith(("aux", "Aux")) for key in keys)
        build = partial(build, init_weights=False, transform_input=True, aux_logits=auxiliary)
    if name not in api.list_models(api):  # for segmentation; the backbone's own weights would be fetched
        build = partial(build, weights_backbone=None, aux_loss=any(key.startswith("aux_classifier.") for key in keys))
    for key in keys:  # torchvision's own DenseNet files have names that modules may no longer have
        state.tensors[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)] = state.tensors.pop(key)
    model = filled(build, state, spec)
    names = categories if len(model.state_dict()[head(model)]) == len(categories) == 1000 else None
    return _Found(model, _changed(_PLAIN, {"size": 299 if name == "inception_v3" else 224}), names)


def _preset(transforms: Any) -> Preprocessing:
    """Return the preprocessing of torchvision's own weights; those for segmentation take the whole image."""
    (side,), crop = transforms.resize_size, getattr(transforms, "crop_size", None)
    mean, std, interpolation = transforms.mean, transforms.std, transforms.interpolation.value
    if crop is None:
        return Preprocessing((side, side), mean, std, interpolation=interpolation)
    return Preprocessing((crop[0], crop[0]), mean, std, "crop", side, interpolation)


def _timm(spec: str, state: State | None) -> _Found:
    if importlib.util.find_spec("timm") is None:
        raise ModelError(f'{spec} needs timm, which is not installed: pip install "tsgb[timm]"')
    categories = import_torchvision().models.ResNet50_Weights.DEFAULT.meta["categories"]
    try:
        timm = importlib.import_module("timm")
    except Exception as error:
        raise ModelError(f"timm does not import ({reason(error)})") from error
    name = spec.removeprefix("timm:")
    if ":" not in name:  # with a prefix of timm's own, the network is described elsewhere
        known = {*timm.list_models(), *timm.list_models(include_tags=True)}
        if name not in known and ("." in name or not timm.is_model(name)):
            tagged = [other for other in known if other.partition(".")[0] == name.partition(".")[0]]
            raise ModelError(_unknown(spec, [*BUNDLED, *(f"timm:{other}" for other in tagged or known)]))
        origin = timm.get_pretrained_cfg(name)  # None for an old name, which timm maps to the present one
        if state is None and origin is not None:
            if not origin.has_weights:
                raise ModelError(f"timm has no weights for {spec}; pass --weights FILE")
            if origin.url and not origin.hf_hub_id:
                fetched(origin.url, spec, check=False)  # here, as timm's way prints to standard output
    build = partial(timm.create_model, name)
    try:
        model: Any = build(pretrained=True) if state is None else filled(build, state, spec)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(unfetched(spec, error)) from error

    own, names = model.pretrained_cfg, None
    if model.num_classes == own.get("num_classes"):
        subset = timm.data.infer_imagenet_subset(model)
        if labels := own.get("label_names"):
            names = tuple((own.get("label_descriptions") or {}).get(label, label) for label in labels)
        elif model.num_classes == 1000:  # in torchvision's words, so that a name means the same class with both
            names = tuple(categories)
        elif subset:
            names = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    source = f"timm's own ({own.get('hf_hub_id') or own.get('url') or name})"
    return _Found(model, _timm_preprocessing(timm.data.resolve_model_data_config(model)), names, source)


def _timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    size, crop = config["input_size"][1:], config["crop_mode"] == "center"
    side = math.floor(min(size) / config["crop_pct"]) if crop else None  # as timm rounds; its few others squash or pad
    interpolation: Any = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    try:
        return Preprocessing(size, config["mean"], config["std"], "crop" if crop else "squash", side, interpolation)
    except ValueError as error:
        raise ModelError(f"timm's preprocessing for this network is not for RGB images: {error}") from error


def _changed(base: Preprocessing, changes: Mapping[str, Any]) -> Preprocessing:
    """Change a preprocessing where a value is given; a crop keeps the share of the short side that it takes."""
    new = {key: value for key, value in changes.items() if value is not None}
    try:
        if isinstance(size := new.get("size", base.size), int):
            size = (size, size)
        short_side = base.short_side and round(base.short_side * min(size) / min(base.size))
        new |= {"size": size, "short_side": None if new.get("resize") == "squash" else short_side}
        return replace(base, **new)
    except (TypeError, ValueError) as error:
        raise ModelError(f"preprocessing: {error}") from error


def _unknown(spec: str, known: Iterable[str]) -> str:
    near = ", ".join(difflib.get_close_matches(spec.lower(), known))
    expected = "expected bundled, a torchvision name, timm:NAME or path/file.py:factory"
    return f"unknown model {spec!r}; {f'the nearest names are {near}' if near else expected}"
