"""TSGB of a model and its images: `explain`, and `TSGB`, the same in Captum's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, passes, targets
from . import rules as rule_tables
from .engine.supported import CoverageError
from .engine.walk import ApartError
from .explanation import Explanation
from .passes import Pass, Request, RunInfo
from .targets import Target

_SAME = 1e-3  # of the largest logit: what lies nearer is said of an image alone as among others

__all__ = ["TSGB", "explain"]


@torch.inference_mode(False)
def explain(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor, ...],
    target: Target = None,
    *,
    rules: rule_tables.Table | str = rule_tables.FUSED,
    f: float | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    strict: bool = False,
) -> Explanation:
    """Explain a convolutional network's output: which pixels of each image speak for each target.

    map = the relevance of all depths, fused (see `tsgb.fusion`); under `PIXELS` and `PAPER` the sum over channels of
    image * gradient, where the gradient is TSGB's. One forward and one backward for all targets. The model is only
    read: its modules, hooks, flags, weights, ``.grad``, mode and the random state are the same afterwards. Safe in
    threads that share a model.

    Args:
        model: a module in evaluation mode, or any callable that runs one.
        images: (N, C, H, W) floating, as the model expects them, on its device; also one or three spatial dimensions. A
            tuple where the model takes several inputs, all of which are explained.
        target: None for the predicted class; an int for all images; a list or tensor of N ints; K for each image as (N,
            K); a class name where the model has ``names``; "top5"; or ``fn(output) -> (N,)``.
        rules: a table, `tsgb.rules.FUSED`, `PIXELS`, `PAPER` or one of your own; or "fused", "pixels", "paper".
        f: how much of the evidence for the target the evidence against it is to balance, 0..1; None takes the table's.
            `FUSED` has none.
        forward_kwargs: what else the model's forward takes. Tensors of length N count as one row an image.
        batch_size: images that go through the model at once; None takes all.
        strict: raise where a weighted or curved operator met no rule.

    Returns:
        An `Explanation`.

    Raises:
        TargetError: the target does not fit the images or the output.
        CoverageError: no rule met anything, no head was found, or ``strict`` and an operator met no rule.
        TypeError: images that are no floating tensors, or of another type than the model; rules that are no table.
        ValueError: images of a wrong shape, not finite, or on another device than the model.
        RuntimeError: the model is in training mode.

    Example:
        >>> import tsgb
        >>> model = tsgb.load("bundled").model
        >>> e = tsgb.explain(model, torch.rand(2, 3, 128, 128), target=[[0, 4], [1, 2]])
        >>> e.maps.shape, e.targets.tolist()
        (torch.Size([2, 2, 128, 128]), [[0, 4], [1, 2]])
    """
    inputs = images if isinstance(images, tuple) else (images,)
    request = Request(model, checks.table_of(rules), f, strict, kwargs=dict(forward_kwargs or {}))
    return joined(list(_parts(request, inputs, target, batch_size)), images)


class TSGB:
    """TSGB in the shape of a Captum attribution method: a number for each value of the input.

    Works inside Captum's NoiseTunnel, infidelity and sensitivity_max.

    Args:
        model: as in `explain`. ``rules``, ``f``, ``strict``: as in `explain`.

    Example:
        >>> import tsgb
        >>> method = TSGB(tsgb.load("bundled").model)
        >>> method.attribute(torch.rand(2, 3, 128, 128), target=3).shape
        torch.Size([2, 3, 128, 128])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rules: rule_tables.Table | str = rule_tables.FUSED,
        f: float | None = None,
        strict: bool = False,
    ) -> None:
        self.forward_func = model
        self._rules, self._f, self._strict = checks.table_of(rules), f, strict

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: the attribution is evidence, not a gradient."""
        return True

    def has_convergence_delta(self) -> bool:
        """Tell Captum that no convergence delta is returned."""
        return False

    @torch.inference_mode(False)  # a decorator also gives it __wrapped__, which Captum's NoiseTunnel calls
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        batch_size: int | None = None,
    ) -> Any:
        """Attribute a target to every value of the input.

        Args:
            inputs: (N, C, ...) floating, or a tuple of such.
            target: one class an image, as in `explain`.
            additional_forward_args: what the model's forward takes after the inputs; a tuple, or the one argument.
            batch_size: images that go through the model at once.

        Returns:
            Of the shape and type of the input, a tuple for a tuple: input * gradient, or a pixel of the map of all
            depths, shared among its channels by their size.

        Raises:
            TargetError: more than one target an image. Otherwise as `explain`.

        Example:
            >>> import tsgb
            >>> model = tsgb.load("bundled").model
            >>> x = torch.rand(1, 3, 128, 128)
            >>> torch.allclose(TSGB(model).attribute(x, 3).sum(1), tsgb.explain(model, x, 3).maps[:, 0], atol=1e-5)
            True
        """
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        args = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        request = Request(self.forward_func, self._rules, self._f, self._strict, args, per_channel=True)
        parts = list(_parts(request, values, target, batch_size))
        if parts[0].targets.shape[1] != 1:
            raise targets.TargetError(
                f"attribute takes one class an image, got {parts[0].targets.shape[1]}: tsgb.explain takes several"
            )
        found = tuple(
            torch.cat([part.relevance[i] for part in parts])[:, 0].to(value.dtype) for i, value in enumerate(values)
        )
        return found if isinstance(inputs, tuple) else found[0]


@dataclass(frozen=True)
class Part:
    """The explanation of the images that went through the model at once."""

    relevance: list[Tensor]  # for each input (n, K, ...)
    targets: Tensor
    logits: Tensor | None
    why_empty: list[list[str | None]]
    info: RunInfo


def joined(parts: Sequence[Part], images: Tensor | tuple[Tensor, ...]) -> Explanation:
    """Put the parts of an explanation together."""
    inputs = images if isinstance(images, tuple) else (images,)
    maps = tuple(torch.cat([part.relevance[i] for part in parts]) for i in range(len(inputs)))
    rows: dict[tuple[str, str | None], int] = {}
    for operator, rule, count in (row for part in parts for row in part.info.coverage):
        rows[operator, rule] = max(count, rows.get((operator, rule), 0))
    return Explanation(
        maps=maps if isinstance(images, tuple) else maps[0],
        targets=torch.cat([part.targets for part in parts]),
        logits=None
        if parts[0].logits is None
        else torch.cat([part.logits for part in parts if part.logits is not None]),
        coverage=[(operator, rule, count) for (operator, rule), count in rows.items()],
        why_empty=[reasons for part in parts for reasons in part.why_empty],
        f=parts[0].info.f,
        images=images,
        of_all_depths=parts[0].info.of_all_depths,
    )


def part(done: Pass, info: RunInfo, inputs: tuple[Tensor, ...], request: Request) -> Part:
    """Check what a pass found, and say why a map is empty.

    Raises:
        CoverageError, ValueError, FloatingPointError: see `explain`.
    """
    checks.check_values(None if -1 in done.targets else done.logits, done.relevance)
    missed = sorted({operator for operator, rule, _ in info.coverage if rule is None})
    if request.strict and missed:
        raise CoverageError(
            f"strict: no rule for {', '.join(missed)}; give one as rules={{**tsgb.rules.FUSED, operator: rule}}, "
            "rule(grad, x, *args, **kwargs) -> grad_x, or tsgb.rules.ORDINARY to keep its own gradient on purpose"
        )
    return Part(
        relevance=[values.transpose(0, 1).contiguous() for values in done.relevance],
        targets=done.targets.cpu(),
        logits=done.logits,
        why_empty=_why_empty(done, info, inputs, request.per_channel),
        info=info,
    )


def _parts(request: Request, inputs: tuple[Tensor, ...], target: Target, batch_size: int | None) -> Iterator[Part]:
    count = checks.check_inputs(inputs)
    checks.check_mode(request.model)
    checks.check_table(request.table, request.f)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive int or None, got {batch_size!r}")
    target = targets.prepare(target, count, targets.names_of(request.model))
    step = batch_size or count
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        try:
            yield _explained(request, inputs, target, rows)
        except ApartError:
            yield from _apart(request, inputs, target, rows)


def _apart(request: Request, inputs: tuple[Tensor, ...], target: Target, rows: slice) -> list[Part]:
    """Explain images one by one, as the model takes them; together, by their pixels, if it says else of each alone."""
    together = _explained(replace(request, apart=True), inputs, target, rows)
    try:
        parts = [_explained(request, inputs, target, slice(n, n + 1)) for n in range(rows.start, rows.stop)]
    except Exception:  # the model's or the target's own, which may not be made for one image
        return [together]
    logits = [part.logits for part in parts if part.logits is not None]
    if together.logits is None or not torch.equal(torch.cat([part.targets for part in parts]), together.targets):
        return [together]
    error = (torch.cat(logits).flatten(1) - together.logits.flatten(1)).abs().amax()
    return parts if error <= _SAME * together.logits.abs().amax() else [together]


def _explained(request: Request, inputs: tuple[Tensor, ...], target: Target, rows: slice) -> Part:
    count = len(inputs[0])

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()  # of a graph of the caller's own, which is none of the explanation's
        return value[rows] if value.dim() > 0 and len(value) == count else value

    args = tuple(map(cut, request.args))
    kwargs = {key: cut(value) for key, value in (request.kwargs or {}).items()}
    images = tuple(x[rows] for x in inputs)
    now, wanted = replace(request, args=args, kwargs=kwargs), cut(target)
    with torch.inference_mode(False):
        done, info = passes.backward(now, wanted, passes.forward(now, images, wanted))
    return part(done, info, images, request)


def _why_empty(done: Pass, info: RunInfo, inputs: tuple[Tensor, ...], per_channel: bool) -> list[list[str | None]]:
    """For each image and class why its map has no positive value, or None."""
    maps = [r.sum(2) if per_channel and x.dim() > 2 else r for r, x in zip(done.relevance, inputs, strict=True)]
    positive = torch.stack([values.flatten(2).amax(2) > 0 for values in maps]).any(0).T.tolist()
    if all(flag for row in positive for flag in row):
        return [[None] * len(row) for row in positive]
    reached = torch.stack([values.flatten(2).any(2) for values in maps]).any(0).T.tolist()
    arrived = done.arrived.T.tolist()
    return [
        [None if p else _reason(info, inputs, n, r, a) for p, r, a in zip(*flags, strict=True)]
        for n, flags in enumerate(zip(positive, reached, arrived, strict=True))
    ]


def _reason(info: RunInfo, inputs: tuple[Tensor, ...], n: int, is_reached: bool, has_arrived: bool) -> str:
    if not is_reached and all(not x[n].any() for x in inputs):
        return "the image is zero everywhere, and a map is image * gradient"
    if not has_arrived:
        cut = [name for name in info.above if name in ("relu", "hardtanh", "relu6", "clamp", "threshold")]
        if not cut:
            return "the target does not depend on the head here: no gradient arrives there"
        what = "a ReLU" if "relu" in cut else cut[0]
        return f"logit cut by {what} at the head: no gradient arrives there"
    if is_reached:
        return "evidence against the target outweighs the evidence for it at every pixel"
    balanced = "; or the evidence for and against, which f = 1 balances, meets in one position: give f=0.75"
    return (
        "no feature with evidence at the head is connected to a pixel that is not zero: the features there are all 0 "
        "(a dead ReLU, or images that are not prepared as the model was trained), or what they see of the image is"
        f"{balanced if info.f == 1 else ''}"
    )
