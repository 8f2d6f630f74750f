"""TSGB of a model and its images: `explain`, and `TSGB`, the same in Captum's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, targets
from . import rules as rule_tables
from .backprop import Backprop, CoverageError, recording
from .explanation import Explanation, Row
from .targets import Target

__all__ = ["TSGB", "explain"]

# Stands for 0 in an image whose model shifts it, so that x * gradient can carry the evidence of a black pixel. It is
# used only where the logits are bit for bit those of the zeros. float16 has no such number, and keeps its zeros.
_NOTHING = 1e-30


@torch.inference_mode(False)
def explain(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor, ...],
    target: Target = None,
    *,
    rules: rule_tables.Table = rule_tables.DEFAULT,
    f: float | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    strict: bool = False,
) -> Explanation:
    """Explain a convolutional network's output: which pixels of each image speak for each target.

    map = sum over channels of image * gradient, where the gradient is TSGB's (see `tsgb.rules`): one forward for all
    targets and one backward for each. The model is only read: its modules, hooks, flags, weights, ``.grad``, mode and
    the random state are the same afterwards. Safe in threads that share a model.

    Args:
        model: a module in evaluation mode, or any callable that runs one.
        images: (N, C, H, W) floating, as the model expects them, on its device; also one or three spatial dimensions. A
            tuple where the model takes several inputs, all of which are explained.
        target: None for the predicted class; an int for all images; a list or tensor of N ints; K for each image as (N,
            K); a class name where the model has ``names``; "top5"; or ``fn(output) -> (N,)``.
        rules: a table, `tsgb.rules.DEFAULT` or `tsgb.rules.PAPER` or one of your own.
        f: how much of the evidence for the target the evidence against it is to balance, 0..1; None takes the table's.
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
    request = _Request(model, rules, f, (), dict(forward_kwargs or {}), strict, _pooled)
    parts = list(_parts(request, inputs, target, batch_size))
    maps = tuple(torch.cat([part.relevance[i] for part in parts]) for i in range(len(inputs)))
    rows: dict[tuple[str, str | None], int] = {}
    for operator, rule, count in (row for part in parts for row in part.coverage):
        rows[operator, rule] = max(count, rows.get((operator, rule), 0))
    return Explanation(
        maps=maps if isinstance(images, tuple) else maps[0],
        targets=torch.cat([part.targets for part in parts]),
        logits=None
        if parts[0].logits is None
        else torch.cat([part.logits for part in parts if part.logits is not None]),
        coverage=[(operator, rule, count) for (operator, rule), count in rows.items()],
        why_empty=[reasons for part in parts for reasons in part.why_empty],
        f=parts[0].f,
        images=images,
    )


class TSGB:
    """TSGB in the shape of a Captum attribution method: image * gradient, as large as the input.

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
        rules: rule_tables.Table = rule_tables.DEFAULT,
        f: float | None = None,
        strict: bool = False,
    ) -> None:
        self.forward_func = model
        self._rules, self._f, self._strict = rules, f, strict

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: the attribution is input * gradient, not the gradient."""
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
            input * gradient, of the shape and type of the input; a tuple for a tuple.

        Raises:
            TargetError: more than one target an image. Otherwise as `explain`.

        Example:
            >>> import tsgb
            >>> model = tsgb.load("bundled").model
            >>> x = torch.rand(1, 3, 128, 128)
            >>> torch.equal(TSGB(model).attribute(x, 3).sum(1), tsgb.explain(model, x, 3).maps[:, 0])
            True
        """
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        args = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        request = _Request(self.forward_func, self._rules, self._f, args, {}, self._strict, _whole)
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
class _Request:
    """What is asked of a model, but for the images and the targets."""

    model: Callable[..., Any]
    table: rule_tables.Table
    f: float | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    strict: bool
    reduce: Callable[[Tensor], Tensor]  # from the relevance of an input to what is kept of it


@dataclass(frozen=True)
class _Part:
    """The explanation of the images that went through the model at once."""

    relevance: list[Tensor]  # for each input (n, K, ...)
    targets: Tensor
    logits: Tensor | None
    coverage: list[Row]
    why_empty: list[list[str | None]]
    f: float


def _pooled(relevance: Tensor) -> Tensor:
    """A map of the relevance of an input: the sum over channels, where it has channels and positions."""
    return relevance.sum(1) if relevance.dim() > 2 else relevance


def _whole(relevance: Tensor) -> Tensor:
    return relevance


def _parts(request: _Request, inputs: tuple[Tensor, ...], target: Target, batch_size: int | None) -> Iterator[_Part]:
    count = checks.check_inputs(inputs)
    checks.check_mode(request.model)
    checks.check_table(request.table, request.f)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive int or None, got {batch_size!r}")
    target = targets.prepare(target, count, targets.names_of(request.model))
    step = batch_size or count
    for start in range(0, count, step):
        rows = slice(start, start + step)

        def cut(value: Any, rows: slice = rows) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach()  # of a graph of the caller's own, which is none of the explanation's
            return value[rows] if value.dim() > 0 and len(value) == count else value

        args, kwargs = tuple(map(cut, request.args)), {key: cut(value) for key, value in request.kwargs.items()}
        part = _explain(replace(request, args=args, kwargs=kwargs), tuple(x[rows] for x in inputs), cut(target))
        missed = sorted({operator for operator, rule, _ in part.coverage if rule is None})
        if request.strict and missed:
            raise CoverageError(
                f"strict: no rule for {', '.join(missed)}; give one as rules={{**tsgb.rules.DEFAULT, operator: rule}}, "
                "rule(grad, x, *args, **kwargs) -> grad_x, or tsgb.rules.ORDINARY to keep its own gradient on purpose"
            )
        yield part


def _explain(request: _Request, inputs: tuple[Tensor, ...], target: Target) -> _Part:
    count = len(inputs[0])
    with torch.inference_mode(False), torch.enable_grad():
        leaves, run, output, logits, asked = _recorded(request, inputs, target, count)
        if run.has_shifts and any((x == 0).any() for x in inputs):
            # Zeros carry nothing, and a shift may have given them evidence: a number in their place carries it.
            filled = _recorded(request, tuple(_filled(x) for x in inputs), target, count)
            if _same(logits, filled[3]):
                leaves, run, output, logits, asked = filled
        if asked is not None:
            scores, seeds = [asked], [torch.ones_like(asked)]
            indices = torch.full((count, 1), -1)
        else:
            answer = targets.find_logits(output)
            indices = targets.resolve(target, checks.check_logits(answer, count))
            scores = [answer] * indices.shape[1]
            seeds = [_one_hot(indices[:, k], answer) for k in range(indices.shape[1])]
        run.find_heads(scores[0], count)
        run.check_positions()
        columns: list[list[Tensor]] = []
        reasons: list[list[str | None]] = []
        for k, (score, seed) in enumerate(zip(scores, seeds, strict=True)):
            with torch.autocast(inputs[0].device.type, enabled=False):
                grads = _gradients(score, leaves, seed, retain=k + 1 < len(scores))
            relevance = [_relevance(x, leaf, grad) for x, leaf, grad in zip(inputs, leaves, grads, strict=True)]
            maps = [_pooled(r) for r in relevance]
            checks.check_maps(maps)
            columns.append([request.reduce(r) for r in relevance])
            reasons.append(_why_empty(run, leaves, maps))
    return _Part(
        relevance=[torch.stack(column, 1) for column in zip(*columns, strict=True)],
        targets=indices,
        logits=logits,
        coverage=run.coverage(),
        why_empty=[list(row) for row in zip(*reasons, strict=True)],
        f=float(run.f if run.f is not None else 0.0),
    )


def _recorded(
    request: _Request, inputs: tuple[Tensor, ...], target: Target, count: int
) -> tuple[tuple[Tensor, ...], Backprop, Any, Tensor | None, Tensor | None]:
    """Run the model, and a callable target, under the rules: leaves, record, output, copied logits, and scores."""
    leaves = tuple(x.detach().as_subclass(Tensor).clone().requires_grad_() for x in inputs)
    images = tuple(leaf.clone() for leaf in leaves)
    with recording(request.table, request.f) as run:
        output = _forward(request.model, images, request.args, request.kwargs)
        found = _logits_if_any(output)
        logits = None if found is None else found.detach().clone()
        asked = targets.scores(target, output, count) if callable(target) else None
    return leaves, run, output, logits, asked


def _filled(image: Tensor) -> Tensor:
    return torch.where(image == 0, _NOTHING, image) if torch.finfo(image.dtype).tiny < _NOTHING else image


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one, other)


def _gradients(score: Tensor, leaves: tuple[Tensor, ...], seed: Tensor, retain: bool) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(score, leaves, seed, retain_graph=retain, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" in f"{type(error).__name__} {error}".lower():
            raise RuntimeError("the model uses gradient checkpointing, which runs it twice: switch it off") from error
        raise


def _relevance(image: Tensor, leaf: Tensor, grad: Tensor | None) -> Tensor:
    """Image * gradient in float32 at least; a zero pixel keeps what it carries if that is more than a trace."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    if grad is None:
        return torch.zeros_like(leaf, dtype=dtype).detach()
    relevance = leaf.detach().to(dtype) * grad.to(dtype)
    return torch.where((image == 0) & (relevance.abs() < _NOTHING**0.5), 0, relevance)


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, classes[:, None].to(logits.device), 1)


def _forward(
    model: Callable[..., Any], images: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        return model(*images, *args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        held = next((p for p in getattr(model, "parameters", list)() if p.is_floating_point()), None)
        if held is not None and held.device != images[0].device:
            raise ValueError(
                f"images must be on the model's device {held.device}, got {images[0].device}: "
                f"call images.to({str(held.device)!r})"
            ) from error
        if held is not None and held.dtype != images[0].dtype and "type" in str(error).lower():
            raise TypeError(f"images must be of the model's dtype {held.dtype}, got {images[0].dtype}") from error
        raise


def _logits_if_any(output: Any) -> Tensor | None:
    try:
        return targets.find_logits(output)
    except targets.TargetError:
        return None


def _why_empty(run: Backprop, leaves: tuple[Tensor, ...], maps: list[Tensor]) -> list[str | None]:
    positive = torch.stack([values.flatten(1).amax(1) > 0 for values in maps]).any(0)
    arrived = run.arrived(len(positive))
    reasons: list[str | None] = []
    for n in range(len(positive)):
        if positive[n]:
            reasons.append(None)
        elif all(not (leaf[n].abs() > _NOTHING).any() for leaf in leaves):
            reasons.append("the image is zero everywhere, and a map is image * gradient")
        elif not arrived[n]:
            cut = [name for name in run.above if name in ("relu", "hardtanh", "relu6", "clamp", "threshold")]
            what = "a ReLU" if "relu" in cut else cut[0] if cut else "what lies between the head and the target"
            reasons.append(f"logit cut by {what} at the head: no gradient arrives there")
        elif any(values[n].any() for values in maps):
            reasons.append("evidence against the target outweighs the evidence for it at every pixel")
        else:
            reasons.append("no feature with evidence at the head is connected to a pixel that is not zero")
    return reasons
