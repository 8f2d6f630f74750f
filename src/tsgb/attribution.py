"""TSGB of a model and its images: `explain`, and `TSGB`, the same in Captum's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, targets
from . import rules as rule_tables
from .backprop import Backprop, CoverageError, Gradient, LostError, Product, Relevance, Summed, dense, recording, summed
from .explanation import Explanation, Row
from .targets import Target

__all__ = ["TSGB", "explain"]

# Stands for 0 in an image whose model shifts it, so that x * gradient can carry the evidence of a black pixel. It is
# used only where the logits are bit for bit those of the zeros. float16 has no such number, and keeps its zeros.
_NOTHING = 1e-30
_AT_ONCE = 2**26  # values of images times classes that go backward together


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
    request = _Request(model, rules, f, (), dict(forward_kwargs or {}), strict, whole=False)
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
            >>> torch.allclose(TSGB(model).attribute(x, 3).sum(1), tsgb.explain(model, x, 3).maps[:, 0], atol=1e-5)
            True
        """
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        args = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        request = _Request(self.forward_func, self._rules, self._f, args, {}, self._strict, whole=True)
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
    whole: bool  # whether the relevance of every value of an input is asked for, not its sum over the channels


@dataclass(frozen=True)
class _Part:
    """The explanation of the images that went through the model at once."""

    relevance: list[Tensor]  # for each input (n, K, ...)
    targets: Tensor
    logits: Tensor | None
    coverage: list[Row]
    why_empty: list[list[str | None]]
    f: float


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
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _explained(request, inputs, target, handing=True)
        except (LostError, RuntimeError) as error:
            if not isinstance(error, LostError) and "modified inplace" not in str(error):
                raise
        return _explained(request, inputs, target, handing=False)


def _explained(request: _Request, inputs: tuple[Tensor, ...], target: Target, handing: bool) -> _Part:
    count = len(inputs[0])
    leaves, run, output, logits, asked = _recorded(request, inputs, target, count, handing)
    if run.has_shifts and any((x == 0).any() for x in inputs):
        # Zeros carry nothing, and a shift may have given them evidence: a number in their place carries it.
        filled = _recorded(replace(request, whole=True), tuple(_filled(x) for x in inputs), target, count, handing)
        if _same(logits, filled[3]):
            leaves, run, output, logits, asked = filled
    if asked is not None:
        score, seeds = asked, torch.ones_like(asked)[None]
        indices = torch.full((count, 1), -1)
    else:
        score = targets.find_logits(output)
        indices = targets.resolve(target, checks.check_logits(score, count))
        seeds = _one_hot(indices, score)
    run.find_heads(score, count)
    run.check_positions()
    columns: list[list[Tensor]] = []
    reasons: list[list[str | None]] = []
    step = max(1, _AT_ONCE // max(1, inputs[0].numel())) if handing else 1
    for start in range(0, len(seeds), step):
        classes = seeds[start : start + step]
        is_last = start + step >= len(seeds)
        with torch.autocast(inputs[0].device.type, enabled=False):
            grads = _gradients(score, leaves, classes, not is_last, handing)
        found = [_relevance(x, leaf, g, len(classes)) for x, leaf, g in zip(inputs, leaves, grads, strict=True)]
        maps = [r.sum(2) if r.dim() == leaf.dim() + 1 > 3 else r for r, leaf in zip(found, leaves, strict=True)]
        checks.check_maps(maps)
        columns.append(found if request.whole else maps)
        reasons += _why_empty(run, leaves, maps)
    return _Part(
        relevance=[torch.cat(column).transpose(0, 1).contiguous() for column in zip(*columns, strict=True)],
        targets=indices,
        logits=logits,
        coverage=run.coverage(),
        why_empty=[list(row) for row in zip(*reasons, strict=True)],
        f=float(run.f if run.f is not None else 0.0),
    )


def _recorded(
    request: _Request, inputs: tuple[Tensor, ...], target: Target, count: int, handing: bool
) -> tuple[tuple[Tensor, ...], Backprop, Any, Tensor | None, Tensor | None]:
    """Run the model, and a callable target, under the rules: leaves, record, output, copied logits, and scores."""
    leaves = tuple(x.detach().as_subclass(Tensor).clone().requires_grad_() for x in inputs)
    with recording(request.table, request.f, handing) as run:
        images = tuple(run.enter(leaf, _format(leaf, handing), request.whole) for leaf in leaves)
        output = _forward(request.model, images, request.args, request.kwargs)
        found = _logits_if_any(output)
        logits = None if found is None else found.detach().clone()
        asked = targets.scores(target, output, count) if callable(target) else None
    return leaves, run, output, logits, asked


def _format(image: Tensor, handing: bool) -> torch.memory_format:
    """Channels last on a CPU, where convolutions and sums over channels are quicker so."""
    is_given = not image.is_contiguous()
    if handing and image.dim() == 4 and image.device.type == "cpu" and image.dtype != torch.float64 and not is_given:
        return torch.channels_last
    return torch.preserve_format


def _filled(image: Tensor) -> Tensor:
    return torch.where(image == 0, _NOTHING, image) if torch.finfo(image.dtype).tiny < _NOTHING else image


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one, other)


def _gradients(
    score: Tensor, leaves: tuple[Tensor, ...], seeds: Tensor, retain: bool, handing: bool
) -> tuple[Tensor | None, ...]:
    """What arrives at each leaf of K seeds (K, *shape of the score): a `Relevance`, or the gradient of one class."""
    seed = Relevance(score.shape, score.dtype, [Gradient(seeds)]) if handing else seeds[0]
    try:
        return torch.autograd.grad(score, leaves, seed, retain_graph=retain, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" in f"{type(error).__name__} {error}".lower():
            raise RuntimeError("the model uses gradient checkpointing, which runs it twice: switch it off") from error
        raise


def _relevance(image: Tensor, leaf: Tensor, grad: Tensor | None, count: int) -> Tensor:
    """The relevance of an image for ``count`` classes, (count, *shape) or summed over the channels, float32 at least.

    A zero pixel keeps what it carries if that is more than a trace.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    if grad is None:
        return torch.zeros_like(leaf, dtype=dtype).detach().expand(count, *leaf.shape)
    if not isinstance(grad, Relevance):
        relevance = leaf.detach().to(dtype) * grad[None].to(dtype)
    elif any(isinstance(part, Summed) or (isinstance(part, Product) and part.base is None) for part in grad.parts):
        return summed(grad.parts).squeeze(2)
    else:
        relevance = dense(grad.parts)
    return torch.where((image == 0) & (relevance.abs() < _NOTHING**0.5), 0, relevance)


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    """Seeds (K, N, classes) of targets (N, K)."""
    seeds = logits.new_zeros(classes.shape[1], *logits.shape)
    return seeds.scatter_(2, classes.T[:, :, None].to(logits.device), 1)


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


def _why_empty(run: Backprop, leaves: tuple[Tensor, ...], maps: list[Tensor]) -> list[list[str | None]]:
    """For each class and image why its map (K, N, ...) has no positive value, or None."""
    positive = torch.stack([values.flatten(2).amax(2) > 0 for values in maps]).any(0)
    filled = torch.stack([values.flatten(2).any(2) for values in maps]).any(0)
    arrived = run.arrived(*positive.shape)
    rows = zip(positive.tolist(), filled.tolist(), arrived, strict=True)
    return [[_reason(run, leaves, n, *flags) for n, flags in enumerate(zip(*row, strict=True))] for row in rows]


def _reason(
    run: Backprop, leaves: tuple[Tensor, ...], n: int, positive: bool, filled: bool, arrived: bool
) -> str | None:
    if positive:
        return None
    if all(not (leaf[n].abs() > _NOTHING).any() for leaf in leaves):
        return "the image is zero everywhere, and a map is image * gradient"
    if not arrived:
        cut = [name for name in run.above if name in ("relu", "hardtanh", "relu6", "clamp", "threshold")]
        what = "a ReLU" if "relu" in cut else cut[0] if cut else "what lies between the head and the target"
        return f"logit cut by {what} at the head: no gradient arrives there"
    if filled:
        return "evidence against the target outweighs the evidence for it at every pixel"
    return "no feature with evidence at the head is connected to a pixel that is not zero"
