"""State dicts: read from a file, fetched, told by their SHA-256, filled into a module.

Whatever is wrong is a `ModelError` of one line.
"""

import hashlib
import http.client
import importlib
import pickle
import re
import sys
import traceback
import urllib.error
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A model specification or weights file that cannot be used: one line that says which and why."""

    def __init__(self, message: str) -> None:
        """Keep the message, put on one line."""
        super().__init__(" ".join(message.split()))


class State(NamedTuple):
    """A state dict and the file it was read from."""

    tensors: dict[str, Tensor]
    file: Path


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


def fetched(url: str, spec: str, check: bool = True) -> Path:
    """Return the file in torch's cache that a URL stands for; fetch it first, and check it by its name, if need be."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(url).path).name)
    if not file.exists():
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name) if check else None
        print(f"fetching {url}", file=sys.stderr)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest[1] if digest else None)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ModelError(unfetched(spec, error)) from error
    return file


def unfetched(spec: str, error: Exception) -> str:
    """Say why weights could not be fetched."""
    lost = isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.HTTPException)
    lost = lost or type(error).__name__ == "LocalEntryNotFoundError"  # what timm's hub says without a network
    why = reason(error)
    if lost and not isinstance(error, urllib.error.HTTPError):
        why = f"the network could not be reached ({why})"
    return f"could not fetch the weights of {spec}: {why}; pass --weights FILE"


def read(file: Path) -> State:
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
        raise ModelError(
            f"weights file {file} is damaged or of another kind "
            f"({type(error).__name__}): expected a state dict, by torch.save or as .safetensors"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    pairs = content.items() if isinstance(content, dict) else ()
    if not pairs or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ModelError(f"weights file {file} holds no state dict but {kind(content)}")
    if all(key.startswith("module.") for key in content):
        nn.modules.utils.consume_prefix_in_state_dict_if_present(content, "module.")
    return State(content, file)


def filled(build: Callable[..., nn.Module], state: State, spec: str) -> nn.Module:
    """Build a network with as many classes as a state dict has, and fill it."""
    model = build()
    given = state.tensors.get(head(model))
    if given is not None and given.ndim > 0 and len(given) != len(model.state_dict()[head(model)]):
        model = build(num_classes=len(given))
    fill(model, state, spec)
    return model


def head(model: nn.Module) -> str:
    """Return the name of a network's last weight of a linear layer or convolution."""
    return [key for key, value in model.state_dict().items() if key.endswith("weight") and value.ndim in (2, 4)][-1]


def fill(model: nn.Module, state: State, spec: str) -> None:
    """Load a state dict into a module; where it does not fit, say which keys."""
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
        said = [f"{fault}: {first(keys)}" for fault, keys in faults.items() if keys] or [reason(error)]
        raise ModelError(f"{state.file.name} does not fit {spec}; {'; '.join(said)}") from error


def first(items: Sequence[str]) -> str:
    """Name the first three items."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def kind(value: object) -> str:
    """Name a value's type, and a dict's first keys."""
    return f"a {type(value).__name__}" + (
        f" of {first([str(key) for key in value])}" if isinstance(value, dict) else ""
    )


def reason(error: BaseException, file: Path | None = None) -> str:
    """Return an error's type, the first line of its message, and the line of a file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ") + place
