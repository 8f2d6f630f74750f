"""One forward of a model under a table of rules, and one backward for all its targets: what `explain` is made of."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import checks, drawing, targets
from . import rules as rule_tables
from .backprop import (
    ApartError,
    Backprop,
    CoverageError,
    FoldedError,
    Gradient,
    Heads,
    LostError,
    Reading,
    Relevance,
    is_all_of,
    recording,
)
from .explanation import Row
from .targets import Target

__all__ = ["Facts", "Forward", "Pass", "Request", "backward", "forward", "plain_tensor", "refolded"]

#: Models whose batch norm is not folded, as it had been in vain; nothing but time depends on it.
_UNFOLDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_T = TypeVar("_T")
_LOCK, _STANCE, _running = threading.Lock(), ExitStack(), 0  # threads in which compiled code runs as it was written
_RIVALS = 20  # classes of the highest logits, which those asked for may have to compete with
_AT_ONCE = 2**26  # values of images times classes that go backward together


@dataclass(frozen=True)
class Request:
    """What is asked of a model, but for the images and the targets."""

    model: Callable[..., Any]
    table: rule_tables.Table
    f: float | None
    strict: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    whole: bool = False  # whether the relevance of every value of an input is asked for, not its sum over the channels
    folds: bool = True  # whether batch norm may be folded into convolutions
    apart: bool = False  # whether images that the model cuts apart or copies are explained together, by their pixels


@dataclass(frozen=True)
class Forward:
    """A forward, with what backward needs."""

    run: Backprop
    leaves: tuple[Tensor, ...]
    output: Any
    logits: Tensor | None  # a copy
    scores: Tensor | None  # (N,), of a callable target
    before: tuple[Tensor, GradientEdge] | None  # the logits as a callable found them, whatever it wrote on them
    handing: bool


@dataclass(frozen=True)
class Facts:
    """What is known once the model has run, the same for all images of a shape."""

    coverage: list[Row]
    above: tuple[str, ...]  # operators between the head and the target
    f: float | None
    has_shifts: bool
    of_all_depths: bool  # or of the pixels' own relevance


@dataclass(frozen=True)
class Pass:
    """What came of a forward and its backward, in tensors.

    Attributes:
        relevance: of each input (K, N, *), summed over the channels unless the whole was asked for.
        targets: (N, K), -1 for a callable. ``logits``: the model's, or None.
        arrived: (K, N), whether any gradient arrived at the head.
    """

    relevance: list[Tensor]
    targets: Tensor
    logits: Tensor | None
    arrived: Tensor


def forward(request: Request, inputs: tuple[Tensor, ...], target: Target, handing: bool) -> Forward:
    """Run the model, and a callable target, under the rules.

    Args:
        target: what `targets.prepare` returned. ``handing``: whether rules hand relevance on where they can.
    """
    return refolded(partial(_forward, inputs, target, handing), request)


def refolded(run: Callable[[Request], _T], request: Request) -> _T:
    """Run with batch norm folded where it may be; where that was in vain again without, which is remembered."""
    try:
        return run(request)
    except FoldedError:
        if isinstance(request.model, nn.Module):
            _UNFOLDED.add(request.model)
        return run(replace(request, folds=False))


def _forward(inputs: tuple[Tensor, ...], target: Target, handing: bool, request: Request) -> Forward:
    module = request.model if isinstance(request.model, nn.Module) else None  # what else is called may have no hash
    pools = None
    if request.folds and (module is None or module not in _UNFOLDED):
        pools = 0 if module is None else sum("MaxPool" in type(part).__name__ for part in module.modules())
    leaves = tuple(_leaf(x) for x in inputs)
    with recording(request.table, request.f, handing, pools) as run:
        images = tuple(run.enter(leaf, _format(leaf, handing), request.whole) for leaf in leaves)
        output = _called(request.model, images, request.args, request.kwargs or {})
        found = _logits_if_any(output)
        logits = None if found is None else found.detach().clone()
        scores, before = None, None
        if callable(target):
            if found is not None and found.requires_grad and rule_tables.RIVALS in request.table:
                with torch._C.DisableTorchFunction():
                    before = found.clone(), get_gradient_edge(found)
            run.in_target = True
            scores = targets.scores(target, output, len(leaves[0]))
    return Forward(run, leaves, output, logits, scores, before, handing)


def backward(request: Request, target: Target, done: Forward) -> tuple[Pass, Facts]:
    """Run back from the targets to the inputs, for as many classes at once as memory allows.

    Raises:
        TargetError: a class that the model does not have. CoverageError: the head cannot be told.
        FoldedError: batch norm was folded where it must not be, see `refolded`.
    """
    run, leaves, count = done.run, done.leaves, len(done.leaves[0])
    if done.scores is not None:
        score, indices = done.scores, torch.full((count, 1), -1)
    else:
        score = checks.check_logits(targets.find_logits(done.output), count)
        indices = targets.resolve(target, score)
    heads = run.find_heads(score, count, one_each=done.scores is None)
    run.coverage.check_positions()
    seeds = torch.ones_like(score)[None] if done.scores is not None else _one_hot(indices, score)
    counted, unit = _counted(done), None
    if counted is not None:
        score, weights = counted
        unit = weights.abs().amax(2)  # so that what competes is in logits
        seeds = weights / unit.clamp(min=drawing.NOTHING)[:, :, None]
    are_logits = done.scores is None or counted is not None
    parts = []
    step = max(1, _AT_ONCE // max(1, leaves[0].numel())) if done.handing else 1
    for start in range(0, len(seeds), step):
        classes, is_last = seeds[start : start + step], start + step >= len(seeds)
        with torch.autocast(leaves[0].device.type, enabled=False), _once():
            parts.append(_together(request, done, heads, score, classes, are_logits, retain=not is_last))
    of_all_depths = all(is_drawn for _, _, is_drawn in parts)
    facts = Facts(run.coverage.rows(), tuple(heads.above), heads.f, run.has_shifts, of_all_depths)
    maps = [torch.cat(column) for column in zip(*(found for found, _, _ in parts), strict=True)]
    if unit is not None:
        maps = [values * unit.to(values.device).reshape(*unit.shape, *(1,) * (values.dim() - 2)) for values in maps]
    return Pass(maps, indices, done.logits, torch.cat([arrived for _, arrived, _ in parts])), facts


def _together(
    request: Request, done: Forward, heads: Heads, score: Tensor, classes: Tensor, are_logits: bool, retain: bool
) -> tuple[list[Tensor], Tensor, bool]:
    """Maps of each input (K, N, *) for classes that go backward together; whether anything arrived, by class and image.

    And whether the maps are of all depths.

    Args:
        heads: of the forward. ``score``: what goes backward, from the seeds ``classes``, (K, *shape of the score).
        are_logits: whether the score holds one number for each class. ``retain``: whether more classes follow.
    """
    leaves, count = done.leaves, len(done.leaves[0])
    rows, reading = _rows(request.table, score, classes, are_logits)
    found = [] if reading is None else heads.read_by(reading)
    if reading is None or not found:
        reading = None
        grads = _gradients(score, leaves, classes, retain, done.handing)
        arrived = heads.arrived(len(classes), count)
    else:
        with reading.hooked(found, heads.past(found)):
            if done.handing:
                grads = _gradients(score, leaves, rows, retain, True)
                arrived = heads.arrived(len(rows), count)[: len(classes)]
            else:
                reading.listen(found, score, rows)
                arrived = heads.arrived(1, count)
                grads = _gradients(score, leaves, rows[:1] - rows[-1:] if len(rows) > 1 else rows, retain, False)
    rule, drawn = request.table.get(rule_tables.MAP), None
    if reading is not None and rule is not None and len(leaves) == 1:
        if count > 1 and not request.apart and reading.is_apart_from(leaves[0]):
            raise ApartError(
                "the model cuts its images apart along the batch, or copies them, so that several at once have no map "
                "of all depths: give it one image"
            )
        drawn = drawing.all_depths(rule, reading, leaves[0].detach(), request.whole)
    if drawn is not None:
        maps = [drawn]
    else:
        maps = [drawing.relevance(x, g, len(classes), request.whole) for x, g in zip(leaves, grads, strict=True)]
    if reading is not None:  # of a class that nothing arrives of, what all classes share is no evidence
        maps = [drawing.where(arrived, values) for values in maps]
    return maps, arrived, drawn is not None


def plain_tensor(x: Tensor) -> Tensor:
    """An image without its graph and its own class."""
    return x.detach() if type(x) is Tensor else x.detach().as_subclass(Tensor)  # which a trace cannot follow


def _leaf(x: Tensor) -> Tensor:
    """An image as a leaf of a graph; it is not copied, as the model is given a copy."""
    image = plain_tensor(x)
    return (image.clone() if image.is_inference() else image).requires_grad_()


def _format(image: Tensor, handing: bool) -> torch.memory_format:
    """Channels last on a CPU, where convolutions and sums over channels are quicker so."""
    is_given = not image.is_contiguous()
    if handing and image.dim() == 4 and image.device.type == "cpu" and image.dtype != torch.float64 and not is_given:
        return torch.channels_last
    return torch.preserve_format


def _gradients(
    score: Tensor, leaves: Sequence[Tensor] | Sequence[GradientEdge], seeds: Tensor, retain: bool, handing: bool
) -> tuple[Tensor | None, ...]:
    """What arrives at each leaf of K seeds (K, *shape of the score): a `Relevance`, or the gradient of one class."""
    seed = Relevance(score.shape, score.dtype, [Gradient(seeds)]) if handing else seeds[0]
    return torch.autograd.grad(score, leaves, seed, retain_graph=retain, allow_unused=True)


@contextmanager
def _once() -> Iterator[None]:
    """Say in a line why a graph cannot go backward whose forward runs again there."""
    try:
        yield
    except RuntimeError as error:
        if "checkpoint" in f"{type(error).__name__} {error}".lower():
            raise RuntimeError("the model uses gradient checkpointing, which runs it twice: switch it off") from error
        raise


def _rows(table: rule_tables.Table, score: Tensor, classes: Tensor, is_logits: bool) -> tuple[Tensor, Reading | None]:
    """What goes backward for the classes asked for: they alone, or with what they compete with.

    Args:
        table: of rules. ``classes``: seeds (K, *shape of the score).
        is_logits: whether the score holds one number for each class.

    Returns:
        The seeds of the classes, of the highest logits, and of the mean of all; and what reads them.
    """
    rule, count = table.get(rule_tables.RIVALS), len(score)
    if rule is None or not is_logits or score.shape[1] < 2:
        is_read = rule is not None or rule_tables.MAP in table
        return classes, Reading(None, len(classes), 0, count) if is_read else None
    rivals = _one_hot(score.detach().topk(min(_RIVALS, score.shape[1])).indices, score)
    mean = (classes[:1].sum(2, keepdim=True) / score.shape[1]).expand(1, *score.shape)
    return torch.cat([classes, rivals, mean]), Reading(rule, len(classes), len(rivals), count)


def _counted(done: Forward) -> tuple[Tensor, Tensor] | None:
    """The logits that a callable's scores come from, and how much each counts in them: (1, N, classes).

    So the classes compete as where they are asked for by number. None where nothing competes, the target is no
    callable, or its scores read something else of the model too.
    """
    if done.scores is None or done.before is None:
        return None
    logits, edge = done.before
    if logits.dim() != 2 or len(logits) != len(done.scores) or not is_all_of(done.scores, edge, done.leaves):
        return None
    (grad,) = _gradients(done.scores, (edge,), torch.ones_like(done.scores)[None], True, done.handing)
    if grad is None:
        return None
    return logits, (grad.gradients() if isinstance(grad, Relevance) else grad[None])


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    """Seeds (K, N, classes) of targets (N, K)."""
    seeds = logits.new_zeros(classes.shape[1], *logits.shape)
    return seeds.scatter_(2, classes.T[:, :, None].to(logits.device), 1)


def _called(
    model: Callable[..., Any], images: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        with _as_written() if _is_compiled(model) else nullcontext():
            return model(*images, *args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        if "created inside a custom Function" in str(error):
            raise LostError("the model writes on a view of what passed a rule") from error
        if "TorchScript interpreter" in str(error):
            raise CoverageError(
                "the model runs a scripted module, whose operators do not pass through torch's functions: explain the "
                "module before scripting"
            ) from error
        weights = model.parameters() if isinstance(model, nn.Module) else ()
        held = next((p for p in weights if p.is_floating_point()), None)
        if held is not None and held.device != images[0].device:
            raise ValueError(
                f"images must be on the model's device {held.device}, got {images[0].device}: "
                f"call images.to({str(held.device)!r})"
            ) from error
        if held is not None and held.dtype != images[0].dtype and "type" in str(error).lower():
            raise TypeError(f"images must be of the model's dtype {held.dtype}, got {images[0].dtype}") from error
        if isinstance(error, TypeError) and "required positional argument" in str(error):
            raise TypeError(
                f"{error}: pass what else the model takes as forward_kwargs={{name: value}}, or several inputs to be "
                "explained as a tuple"
            ) from error
        if images[0].dim() == 3 and len(images[0]) in (1, 3):
            raise ValueError(
                f"the model refused images of shape {tuple(images[0].shape)} ({error}): one picture (C, H, W) is given "
                "as images[None]"
            ) from error
        raise


def _is_compiled(model: Callable[..., Any]) -> bool:
    """Tell whether torch.compile made the model, or a part of it."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return False
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_torchdynamo_orig_callable")
        for part in parts
    )


@contextmanager
def _as_written() -> Iterator[None]:
    """Run the body with what torch.compile compiled as it was written; torch knows this for all threads alone."""
    global _running
    with _LOCK:
        if _running == 0:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _running += 1
    try:
        yield
    finally:
        with _LOCK:
            _running -= 1
            if _running == 0:
                _STANCE.close()  # to what it was


def _logits_if_any(output: Any) -> Tensor | None:
    try:
        return targets.find_logits(output)
    except targets.TargetError:
        return None
