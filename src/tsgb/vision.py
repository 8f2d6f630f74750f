"""Torchvision, which does not load by itself beside every torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from .factories import IMPORTING
from .states import ModelError, reason

__all__ = ["import_torchvision"]

_schemas: list[torch.library.Library] = []  # a library's operators live as long as it does


def import_torchvision() -> Any:
    """Import torchvision, also where its operator library does not load beside a CPU torch.

    Built for CUDA, it asks there for operators that do not exist, and for no more than their schemas. What imports
    torchvision itself (torchmetrics, zennit) is to be imported after this.

    Returns:
        The module.

    Raises:
        ModelError: torchvision is missing or broken.

    Example:
        >>> import_torchvision().__name__
        'torchvision'
    """
    with IMPORTING:
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
            raise ModelError(f"torchvision does not import ({reason(error)}); {release}") from error
