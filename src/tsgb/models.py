"""What a model specification stands for: the network, how its pictures are prepared, the names of its classes.

`bundled` and `bundled-vgg` come with the package, `resnet50` is torchvision's, `timm:resnet50` timm's, and
`path/file.py:factory` is what that function returns. Whatever is wrong with a specification or a weights file is a
`ModelError` of one line.
"""

import contextlib
import difflib
import hashlib
import http.client
import importlib.machinery
import importlib.util
import itertools
import math
import pickle
import re
import sys
import threading
import traceback
import urllib.error
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsgb.preprocessing import Preprocessing

BUNDLED = ("bundled", "bundled-vgg")

_META = ("size", "mean", "std", "resize", "names")  # what a factory may say of its network

_PLAIN = Preprocessing(size=(224, 224))  # squash, ImageNet mean and std

_imports = threading.RLock()  # held while sys.modules or sys.path is changed; a factory may itself call `load`
_schemas: list[torch.library.Library] = []  # a library's operators live as long as it does
_numbers = itertools.count()
_helpers: set[str] = set()  # modules that lie beside the latest factory file


class ModelError(ValueError):
    """A model specification or weights file that cannot be used: one line that says which and why."""

    def __init__(self, message: str) -> None:
        """Keep the message, put on one line."""
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Network:
    """What a model specification stands for.

    Attributes:
        model: The network in eval mode.
        preprocessing: How a picture becomes its input.
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


class _State(NamedTuple):
    """A state dict and the file it was read from."""

    tensors: dict[str, Tensor]
    file: Path


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
    also with weights from a file.

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
        tsgb.models.ModelError: nets.py names no function: expected path/file.py:factory
    """
    state = None if weights is None else _read(Path(weights))
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
        raise ModelError(f"the weights of {spec} cannot be read ({_reason(error)})") from error
    return Network(found.model.eval(), preprocessing, found.names, spec, name, digest)


def sha256(source: str | Path | Mapping[str, Any]) -> str:
    """Return the SHA-256 of a file, read piece by piece, or of a state dict, as 64 hexadecimal digits.

    A state dict's depends on the names, dtypes, shapes and bytes of its tensors and on nothing else, such as their
    order, their device, the layout of their memory, or entries that are no tensors.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> sha256({"a": torch.zeros(2), "b": torch.ones(1)}) == sha256({"b": torch.ones(1), "a": torch.zeros(2)})
        True
    """
    if not isinstance(source, Mapping):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name, tensor in sorted((name, value) for name, value in source.items() if isinstance(value, Tensor)):
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bundled(spec: str, state: _State | None) -> _Found:
    from tsgb import networks

    build = {"bundled": networks.bundled, "bundled-vgg": networks.bundled_vgg}[spec]
    model: Any = build(pretrained=state is None)
    if state is not None:
        _fill(model, state, spec)
    file = Path(networks.__file__).parent / "weights" / f"{spec}.safetensors"
    return _Found(model, _changed(_PLAIN, networks.INPUT), tuple(model.names), file.name, file)


def _torchvision(spec: str, state: _State | None) -> _Found:
    try:
        api = _import_torchvision().models
    except ModelError as error:
        raise ModelError(f"{spec!r} is neither {' nor '.join(BUNDLED)}, and {error}") from error
    name, known = spec.lower(), [*api.list_models(api), *api.list_models(api.segmentation)]
    if name not in known:
        raise ModelError(_unknown(spec, [*BUNDLED, *known]))
    default = api.get_model_weights(name).DEFAULT
    categories = tuple(default.meta["categories"])
    if state is None:
        file = _fetched(default.url, spec)
        try:
            model = api.get_model(name, weights=default)
        except Exception as error:
            reason = f"does not hold the weights of {spec} ({_reason(error)}); delete it to have it fetched again"
            raise ModelError(f"{file} {reason}") from error
        return _Found(model, _preset(default.transforms()), categories, default.url, file)

    build, keys = partial(api.get_model, name, weights=None), list(state.tensors)
    if name in ("googlenet", "inception_v3"):  # as torchvision builds them for its own weights
        auxiliary = any(key.startswith(("aux", "Aux")) for key in keys)
        build = partial(build, init_weights=False, transform_input=True, aux_logits=auxiliary)
    if name not in api.list_models(api):  # for segmentation; the backbone's own weights would be fetched
        build = partial(build, weights_backbone=None, aux_loss=any(key.startswith("aux_classifier.") for key in keys))
    for key in keys:  # torchvision's own DenseNet files have names that modules may no longer have
        state.tensors[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)] = state.tensors.pop(key)
    model = _filled(build, state, spec)
    names = categories if len(model.state_dict()[_head(model)]) == len(categories) == 1000 else None
    return _Found(model, _changed(_PLAIN, {"size": 299 if name == "inception_v3" else 224}), names)


def _preset(transforms: Any) -> Preprocessing:
    """Return the preprocessing of torchvision's own weights; those for segmentation take the whole picture."""
    (side,), crop = transforms.resize_size, getattr(transforms, "crop_size", None)
    mean, std, interpolation = transforms.mean, transforms.std, transforms.interpolation.value
    if crop is None:
        return Preprocessing((side, side), mean, std, interpolation=interpolation)
    return Preprocessing((crop[0], crop[0]), mean, std, "crop", side, interpolation)


def _import_torchvision() -> Any:
    """Import torchvision, also where its operator library does not load beside a CPU torch."""
    with _imports:
        try:
            try:
                return importlib.import_module("torchvision")
            except RuntimeError as error:
                if "torchvision::nms does not exist" not in str(error):
                    raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]  # half imported
            if not _schemas:
                _schemas.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
                for name in ("nms", "qnms"):
                    schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    _schemas[0].define(schema)  # type: ignore[no-untyped-call]
            return importlib.import_module("torchvision")
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
                raise ModelError('torchvision is not installed: pip install "tsgb[torchvision]"') from error
            release = f"is it the release that goes with torch {torch.__version__}?"
            raise ModelError(f"torchvision does not import ({_reason(error)}); {release}") from error


def _timm(spec: str, state: _State | None) -> _Found:
    if importlib.util.find_spec("timm") is None:
        raise ModelError(f'{spec} needs timm, which is not installed: pip install "tsgb[timm]"')
    categories = _import_torchvision().models.ResNet50_Weights.DEFAULT.meta["categories"]
    try:
        timm = importlib.import_module("timm")
    except Exception as error:
        raise ModelError(f"timm does not import ({_reason(error)})") from error
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
                _fetched(origin.url, spec, check=False)  # here, as timm's way prints to standard output
    build = partial(timm.create_model, name)
    try:
        model: Any = build(pretrained=True) if state is None else _filled(build, state, spec)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_unfetched(spec, error)) from error

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
        raise ModelError(f"timm's preprocessing for this network is not for RGB pictures: {error}") from error


def _factory(spec: str, state: _State | None) -> _Found:
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ModelError(f"{spec} names no function: expected path/file.py:factory")
    file = Path(path).resolve()
    if not file.is_file():
        raise ModelError(f"{path} {'is no regular file' if file.exists() else 'does not exist'}")
    with _beside(file.parent):
        try:
            module = _imported(file)
        except (Exception, SystemExit) as error:
            raise ModelError(f"{path} cannot be imported: {_reason(error, file)}") from error
        make = getattr(module, name, None)
        if not callable(make) or isinstance(make, nn.Module):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            own = [key for key in own if not key.startswith("_")]
            near = difflib.get_close_matches(name, own, cutoff=0.3) or own[:3]
            raise ModelError(f"{path} has no function {name}; it has {', '.join(near) or 'none'}")
        try:
            made = make()
        except (Exception, SystemExit) as error:
            raise ModelError(f"{spec} raised {_reason(error, file)}") from error
    model, meta = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module) or not isinstance(meta, dict):
        raise ModelError(f"{spec} must return a torch.nn.Module or (module, dict), got {_kind(made)}")
    if unknown := [key for key in meta if key not in _META]:
        raise ModelError(f"{spec} returned the unknown key {unknown[0]!r}; it may give {', '.join(_META)}")
    names = meta.get("names")
    if names is not None:
        if not isinstance(names, list | tuple) or not all(isinstance(label, str) for label in names):
            raise ModelError(f"{spec} must give names as a list of strings, by class index, got {_kind(names)}")
        names = tuple(names)
    try:
        preprocessing = _changed(_PLAIN, {key: value for key, value in meta.items() if key != "names"})
    except ModelError as error:
        raise ModelError(f"{spec}: {error}") from error
    if state is not None:
        _fill(model, state, spec)
    return _Found(model, preprocessing, names, "state dict of the factory")


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Let the modules in a folder be imported for a while, those of the folder before being forgotten."""
    with _imports:
        for name in _helpers:
            sys.modules.pop(name, None)
        _helpers.clear()
        path, before = list(sys.path), set(sys.modules)
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = path
            # They stay in sys.modules, where torch.compile and pickle look for them, until another file is loaded: its
            # folder may hold others of the same names. What the caller can import as well is not ours to forget.
            if folder not in {Path(entry).resolve() for entry in path}:
                new = set(sys.modules) - before
                tops = {top for top in {name.partition(".")[0] for name in new} & new if _lies_in(folder, top)}
                _helpers.update(name for name in new if name.partition(".")[0] in tops)


def _lies_in(folder: Path, name: str) -> bool:
    there = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    loaded = getattr(sys.modules[name], "__spec__", None)
    return there is not None and loaded is not None and there.origin == loaded.origin


def _imported(file: Path) -> ModuleType:
    """Import a file into a package of its own that has the file's folder, so that `from .helper import x` works."""
    package = ModuleType(f"tsgb_factory_{next(_numbers)}")
    package.__path__ = [str(file.parent)]
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file.stem.replace('.', '_')}", file)
    assert spec is not None
    assert spec.loader is not None  # as the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({package.__name__: package, module.__name__: module})
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package.__name__], sys.modules[module.__name__]
        raise
    return module


def _fetched(url: str, spec: str, check: bool = True) -> Path:
    """Return the file in torch's cache that a URL stands for; fetch it first, and check it by its name, if need be."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(url).path).name)
    if not file.exists():
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name) if check else None
        print(f"fetching {url}", file=sys.stderr)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest[1] if digest else None)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ModelError(_unfetched(spec, error)) from error
    return file


def _unfetched(spec: str, error: Exception) -> str:
    lost = isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.HTTPException)
    lost = lost or type(error).__name__ == "LocalEntryNotFoundError"  # what timm's hub says without a network
    reason = _reason(error)
    if lost and not isinstance(error, urllib.error.HTTPError):
        reason = f"the network could not be reached ({reason})"
    return f"could not fetch the weights of {spec}: {reason}; pass --weights FILE"


def _read(file: Path) -> _State:
    """Read the state dict in a file."""
    try:
        if not file.is_file():
            raise ModelError(f"weights file {file} {'is no regular file' if file.exists() else 'does not exist'}")
        with open(file, "rb") as opened:
            start = opened.read(2)
    except OSError as error:
        raise ModelError(f"weights file {file} cannot be read ({error.strerror})") from error
    if not start:
        raise ModelError(f"weights file {file} is empty")
    try:
        if file.suffix == ".safetensors":
            content = importlib.import_module("safetensors.torch").load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file leads the readers to anything
        refused = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        if refused and start[:1] in (b"P", b"\x80"):  # an archive of torch's, a pickle
            raise ModelError(
                f"weights file {file} holds more than tensors, and reading such a file can run code; if you trust it, "
                "take its state dict out once: whole = torch.load(FILE, weights_only=False); torch.save("
                'whole.state_dict(), NEW), or whole["state_dict"] for a checkpoint'
            ) from error
        raise ModelError(f"weights file {file} is damaged or of another kind ({type(error).__name__})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"weights file {file} holds no state dict but {_kind(content)}")
    if all(key.startswith("module.") for key in content):
        nn.modules.utils.consume_prefix_in_state_dict_if_present(content, "module.")
    return _State(content, file)


def _filled(build: Callable[..., nn.Module], state: _State, spec: str) -> nn.Module:
    """Build a network with as many classes as a state dict has, and fill it."""
    model = build()
    head = _head(model)
    given = state.tensors.get(head)
    if given is not None and given.ndim > 0 and len(given) != len(model.state_dict()[head]):
        model = build(num_classes=len(given))
    _fill(model, state, spec)
    return model


def _head(model: nn.Module) -> str:
    """Return the name of a network's last weight of a linear layer or convolution."""
    return [key for key, value in model.state_dict().items() if key.endswith("weight") and value.ndim in (2, 4)][-1]


def _fill(model: nn.Module, state: _State, spec: str) -> None:
    own, tensors = model.state_dict(), OrderedDict(state.tensors)
    # A file without version notes is taken for the present version where the outermost module asks for it (MNASNet).
    notes = getattr(state.tensors, "_metadata", None) or {"": own._metadata[""]}  # type: ignore[attr-defined]
    tensors._metadata = notes  # type: ignore[attr-defined]
    try:
        model.load_state_dict(tensors)
    except Exception as error:
        shapes = [
            f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
            for key, value in own.items()
            if key in tensors and tensors[key].shape != value.shape
        ]
        faults = {
            "missing": [key for key in own if key not in tensors],
            "unexpected": [key for key in tensors if key not in own],
            "of another shape": shapes,
        }
        said = [f"{fault}: {_first(keys)}" for fault, keys in faults.items() if keys] or [_reason(error)]
        raise ModelError(f"{state.file.name} does not fit {spec}; {'; '.join(said)}") from error


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
    near = difflib.get_close_matches(spec.lower(), known)
    there = (
        f"the nearest names are {', '.join(near)}" if near else "expected bundled, a torchvision name, timm:NAME or "
    )
    return f"unknown model {spec!r}; {there}{'' if near else 'path/file.py:factory'}"


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" + (
        f" of {_first([str(key) for key in value])}" if isinstance(value, dict) else ""
    )


def _reason(error: BaseException, file: Path | None = None) -> str:
    """Return an error's type, the first line of its message, and the line of a file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ") + place
