"""Networks from a Python file: `path/file.py:factory`, whose function is called without arguments."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tsgb.states import ModelError, kind, reason

META = ("size", "mean", "std", "resize", "names")  # what a factory may say of its network

#: Held while sys.modules or sys.path is changed; a factory may itself call `tsgb.load`.
IMPORTING = threading.RLock()

_numbers = itertools.count()
_helpers: set[str] = set()  # modules that lie beside the latest factory file


def make(spec: str) -> tuple[nn.Module, dict[str, Any]]:
    """Call the factory that `path/file.py:factory` names.

    Returns:
        The module, and what the factory says of it: any of `META`.

    Raises:
        ModelError: If there is no such function, or its file or it raises, or it returns something else.

    Example:
        >>> make("nets.py")
        Traceback (most recent call last):
            ...
        tsgb.states.ModelError: nets.py names no function: expected path/file.py:factory
    """
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
            raise ModelError(f"{path} cannot be imported: {reason(error, file)}") from error
        function = getattr(module, name, None)
        if not callable(function) or isinstance(function, nn.Module):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            own = [key for key in own if not key.startswith("_")]
            near = difflib.get_close_matches(name, own, cutoff=0.3) or own[:3]
            raise ModelError(f"{path} has no function {name}; it has {', '.join(near) or 'none'}")
        try:
            made = function()
        except (Exception, SystemExit) as error:
            raise ModelError(f"{spec} raised {reason(error, file)}") from error
    model, meta = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module) or not isinstance(meta, dict):
        raise ModelError(f"{spec} must return a torch.nn.Module or (module, dict), got {kind(made)}")
    if unknown := [key for key in meta if key not in META]:
        raise ModelError(f"{spec} returned the unknown key {unknown[0]!r}; it may give {', '.join(META)}")
    names = meta.get("names") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(label, str) for label in names):
        raise ModelError(f"{spec} must give names as a list of strings, by class index, got {kind(names)}")
    return model, meta


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Let the modules in a folder be imported for a while, those of the folder before being forgotten."""
    with IMPORTING:
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
