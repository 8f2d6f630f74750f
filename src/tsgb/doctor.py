"""Examine a model: which operators have a rule, and whether its maps pass six checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import rules
from .attribution import explain
from .explanation import Row

__all__ = ["Check", "Diagnosis", "examine"]

TOLERANCE = 1e-3  # of a map's norm, for the rest of the batch, in float32


@dataclass(frozen=True)
class Check:
    """One check of a model's maps: its name, whether it passed, and what was observed."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found: the coverage rows, and the checks."""

    coverage: list[Row]
    checks: list[Check]


def examine(model: nn.Module, images: Tensor, table: rules.Table = rules.FUSED) -> Diagnosis:
    """Explain some images and check the maps.

    Args:
        model: a module in evaluation mode.
        images: (N, C, H, W) floating, two images or more.
        table: see `tsgb.rules`.

    Raises:
        CoverageError, TargetError, RuntimeError and ValueError as `explain` does.

    Example:
        >>> import tsgb
        >>> found = examine(tsgb.load("bundled").model, torch.rand(2, 3, 128, 128))
        >>> [check.name for check in found.checks if not check.passed]
        []
    """
    before = _fingerprint(model)
    random_before = torch.get_rng_state()
    e = explain(model, images, rules=table)
    after, random_after = _fingerprint(model), torch.get_rng_state()
    again = explain(model, images, e.targets, rules=table)
    alone = torch.cat(
        [explain(model, images[n : n + 1], e.targets[n : n + 1], rules=table).maps for n in range(len(images))]
    )
    missed = [f"{name} ({count})" for name, rule, count in e.coverage if rule is None]
    change = float(((alone - e.maps).flatten(1).norm(dim=1) / e.maps.flatten(1).norm(dim=1).clamp(min=1e-30)).max())
    empty = [reason for row in e.why_empty for reason in row if reason]
    same = before == after and torch.equal(random_before, random_after)
    checks = [
        Check(
            "every operator has a rule", not missed, "yes" if not missed else f"ordinary gradient: {', '.join(missed)}"
        ),
        Check("maps are finite", bool(e.maps.isfinite().all()), f"largest value {float(e.maps.abs().max()):.3g}"),
        Check("maps are not empty", not empty, empty[0] if empty else "all have positive values"),
        Check(
            "model is unchanged",
            same,
            "bit for bit" if same else "weights, buffers, hooks, modes or random state differ",
        ),
        Check("maps are repeatable", torch.equal(again.maps, e.maps), "two runs, bit for bit"),
        Check("maps do not depend on the batch", change <= TOLERANCE, f"difference {change:.1e} of the norm"),
    ]
    return Diagnosis(e.coverage, checks)


def _fingerprint(model: nn.Module) -> str:
    """Hash everything that an explanation must not change."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    for name, module in model.named_modules():
        hooks = [list(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        attributes = sorted(key for key in vars(module) if not key.startswith("_"))
        add(name, type(module), module.training, hooks, attributes, _forward_of(module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        add(name, tensor.dtype, tensor.shape, tensor.requires_grad, tensor.grad is None)
        for value in (tensor, tensor.grad):
            if value is not None:
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    return getattr(module.forward, "__func__", module.forward)
