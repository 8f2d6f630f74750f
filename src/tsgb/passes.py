"""One forward of a model, recorded under a table of rules, and one walk back for all its targets."""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from . import checks, fusion, targets
from . import rules as rule_tables
from .engine.heads import Head, check_positions, coverage
from .engine.kinds import Gradient
from .engine.lookup import head_rules, rules_of
from .engine.private import below_autograd, without_tape
from .engine.provenance import storages_before
from .engine.supported import CoverageError
from .engine.tape import CHANNEL_SUM, PER_CHANNEL, LayoutError, Tape, Value
from .engine.terms import Cotangent, channel_sum, dense
from .engine.walk import ApartError, FieldRecorder, gradient_at, walk
from .explanation import Row
from .targets import Target

__all__ = ["Forward", "Pass", "Request", "RunInfo", "backward", "forward", "plain_tensor", "recording"]

_LOCK, _STANCE, _running = threading.Lock(), ExitStack(), 0  # threads in which compiled code runs as it was written
_AT_ONCE = 2**26  # values of images times classes that go backward together
_NOTHING = 1e-30  # makes 0 / 0 a zero, and changes no other number


@dataclass(frozen=True)
class Request:
    """What is asked of a model, but for the images and the targets.

    Attributes:
        per_channel: whether the relevance of every value of an image is asked for, not its sum over the channels.
        apart: whether images that the model cuts apart or copies are explained together, by their pixels.
    """

    model: Callable[..., Any]
    table: rule_tables.Table
    f: float | None
    strict: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    per_channel: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Forward:
    """A recorded forward.

    Attributes:
        inputs: the images. ``output``: what the model returned.
        logits: a copy of the model's logits, or None; ``logits_value``: what they are on the tape.
        score: (N,), of a callable target; ``score_value``: what it is on the tape.
    """

    tape: Tape
    inputs: tuple[Tensor, ...]
    output: Any
    logits: Tensor | None
    logits_value: Value | None
    score: Tensor | None
    score_value: Value | None


@dataclass(frozen=True)
class RunInfo:
    """What is known once the model has run, the same for all images of a shape."""

    coverage: list[Row]
    above: tuple[str, ...]  # operators between the head and the target
    f: float | None
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


def forward(request: Request, inputs: tuple[Tensor, ...], target: Target) -> Forward:
    """Run the model, and a callable target, on a tape.

    Args:
        target: what `targets.prepare` returned.
    """
    relays = keeps_hooks = True
    with ExitStack() as hooks:
        while True:  # again seldom, so that no other forward pays for it
            try:
                return _forward(request, inputs, target, relays)
            except LayoutError:
                relays = False
            except RuntimeError as error:
                is_known = re.search(r"register a hook on a tensor|retain_grad", str(error)) is not None
                if not is_known or not keeps_hooks:
                    raise
                keeps_hooks = False
                hooks.enter_context(_WithoutHooks())


class _WithoutHooks(TorchFunctionMode):
    """Leaves out hooks on gradients, of which there are none below autograd."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad"):
            return RemovableHandle(OrderedDict())
        return func(*args, **(kwargs or {}))


def _forward(request: Request, inputs: tuple[Tensor, ...], target: Target, relays: bool) -> Forward:
    inputs = tuple(plain_tensor(x) for x in inputs)
    held = (request.args, request.kwargs, target if callable(target) else None)
    score = score_value = None
    needs = [PER_CHANNEL if request.per_channel or x.dim() < 3 else CHANNEL_SUM for x in inputs]
    with recording(request.table, request.model, inputs, needs, held, relays) as (tape, images):
        output = _call(tape, request.model, images, request.args, request.kwargs or {})
        logits = _logits_if_any(output)
        logits_value = None if logits is None else tape.value_of(logits)
        kept = None if logits is None else without_tape(logits)
        if callable(target):
            tape.in_target = True
            score = targets.scores(target, output, len(inputs[0]))
            score_value = tape.value_of(score)
            score = without_tape(score)
    return Forward(tape, inputs, output, kept, logits_value, score, score_value)


@contextmanager
def recording(
    table: rule_tables.Table,
    model: Callable[..., Any],
    inputs: Sequence[Tensor],
    needs: Sequence[str],
    held: Any = None,
    relays: bool = False,
) -> Iterator[tuple[Tape, list[Tensor]]]:
    """Record the body, which runs the model on copies of the inputs.

    Args:
        needs: what is to arrive at each input, see `engine.tape`. ``held``: what else the model is given.
        relays: whether images may lie in memory as is quickest.

    Yields:
        The tape, and the copies. `Tape.close` is the caller's, once the body has ended well.
    """
    tape = Tape(rules_of(table), head_rules(table), Gradient(None), storages_before(model, held))
    layouts = [_layout(x) if relays else torch.preserve_format for x in inputs]
    tape.is_relaid = torch.channels_last in layouts
    copies = [x.clone(memory_format=layout) for x, layout in zip(inputs, layouts, strict=True)]
    images = [tape.enter(x, need) for x, need in zip(copies, needs, strict=True)]
    try:
        with torch.inference_mode(False), below_autograd(), _without_autocast_cache(), tape:
            yield tape, images
    except BaseException:
        tape.close()
        raise
    finally:
        tape.restore_random_state()


def backward(request: Request, target: Target, done: Forward) -> tuple[Pass, RunInfo]:
    """Walk back from the targets to the inputs, for as many classes at once as memory allows.

    Raises:
        TargetError: a class that the model does not have. CoverageError: the head cannot be told.
    """
    try:
        with torch.autocast(done.inputs[0].device.type, enabled=False), torch.no_grad():
            return _backward(request, target, done)
    finally:
        done.tape.close()


def _backward(request: Request, target: Target, done: Forward) -> tuple[Pass, RunInfo]:
    tape, count = done.tape, len(done.inputs[0])
    table, rows, unit = request.table, None, None
    score, source = done.score, done.score_value
    if score is not None:
        indices = torch.full((count, 1), -1)
    else:
        if done.logits is None:
            targets.find_logits(done.output)  # says what is missing
        score, source = done.logits, done.logits_value
    assert score is not None
    if source is None and done.score is not None:
        raise targets.TargetError(
            f"target=fn(output) must return a floating tensor of shape ({count},), one score an image, got one that "
            "does not depend on the images through torch operators"
        )
    source = checks.check_source(source, score, count)
    if done.score is None:
        indices = targets.resolve(target, score)
        rows = indices.T.to(score.device)
        seeds = _one_hot(rows, score)
    else:
        seeds = torch.ones_like(score)[None]
        counted = _counted(done) if table.get(rule_tables.FUSION) else None
        if counted is not None:
            score, source, weights = done.logits, done.logits_value, counted
            assert score is not None
            assert source is not None
            unit = weights.abs().amax(2)  # so that what competes is in logits
            seeds = weights / unit.clamp(min=_NOTHING)[:, :, None]
    head = Head(tape, source, head_rules(table), table[rule_tables.F] if request.f is None else request.f)
    check_positions(tape)
    info = coverage(tape, source, head)
    parts = []
    step = max(1, _AT_ONCE // max(1, done.inputs[0].numel()))
    for start in range(0, len(seeds), step):
        part = slice(start, start + step)
        frees = start + step >= len(seeds)
        chunk = seeds[part], None if rows is None else rows[part]
        parts.append(_backward_chunk(request, done, head, score, *chunk, frees))
    maps = [torch.cat(column) for column in zip(*(found for found, _, _ in parts), strict=True)]
    if unit is not None:
        maps = [values * unit.to(values.device).reshape(*unit.shape, *(1,) * (values.dim() - 2)) for values in maps]
    f = None if head.f is None else float(head.f)
    above = tuple(node.name for node in head.above)
    found = Pass(maps, indices, done.logits, torch.cat([arrived for _, arrived, _ in parts]))
    return found, RunInfo(info, above, f, all(is_fused for _, _, is_fused in parts))


def _backward_chunk(
    request: Request, done: Forward, head: Head, score: Tensor, seeds: Tensor, rows: Tensor | None, frees: bool
) -> tuple[list[Tensor], Tensor, bool]:
    """Explain classes that go backward together: maps of each input (K, N, *), what arrived, and whether all depths."""
    tape, count, classes = done.tape, len(done.inputs[0]), len(seeds)
    numbers: fusion.Fusion | None = request.table.get(rule_tables.FUSION)
    tape.recorder = recorder = None
    if numbers is not None:
        recorder = FieldRecorder(None, classes, 0, count)
        if score.dim() == 2 and score.shape[1] > 1 and (rows is not None or seeds.dim() == 3):
            rivals = score.topk(min(numbers.rivals, score.shape[1])).indices.T
            mean = (seeds[:1].sum(2, keepdim=True) / score.shape[1]).expand(1, *score.shape)
            seeds = torch.cat([seeds, _one_hot(rivals, score).to(seeds.dtype), mean])
            rows = None if rows is None else torch.cat([rows, rivals])
            recorder = FieldRecorder(partial(_gate, numbers), classes, len(rivals), count)
        if not recorder.plan(head):
            recorder, seeds, rows = None, seeds[:classes], None if rows is None else rows[:classes]
        tape.recorder = recorder
    arrived_at = walk(tape, head.target, seeds.to(_wide(seeds.dtype)), head, classes, rows, frees)
    arrived = head.arrivals(classes, count)
    fused = None
    if recorder is not None and numbers is not None and len(done.inputs) == 1:
        if count > 1 and not request.apart and recorder.is_apart_from(done.inputs[0]):
            raise ApartError(
                "the model cuts its images apart along the batch, or copies them, so that several at once have no "
                "fused map: give it one image"
            )
        fused = fusion.fused_map(recorder.fields, recorder.evidence, done.inputs[0], numbers, request.per_channel)
    pairs = zip(done.inputs, arrived_at, strict=True)
    maps = [fused] if fused is not None else [_relevance(x, g, classes, request.per_channel) for x, g in pairs]
    if recorder is not None:  # of a class that nothing arrives of, what all classes share is no evidence
        maps = [torch.where(_like(arrived.to(values.device), values), values, 0) for values in maps]
    return maps, arrived, fused is not None


def _gate(numbers: fusion.Fusion, evidence: Tensor, requested: int) -> Tensor:
    return fusion.competition_gate(evidence, requested, numbers)


def _relevance(image: Tensor, given: Cotangent | None, count: int, per_channel: bool) -> Tensor:
    """Give the relevance of an image for ``count`` classes: (count, *shape), or summed over the channels."""
    if given is None:
        values = torch.zeros_like(image, dtype=_wide(image.dtype)).expand(count, *image.shape)
        return values if per_channel or image.dim() < 3 else values.sum(2)
    assert not isinstance(given, Tensor)
    return dense(given) if per_channel or image.dim() < 3 else channel_sum(given).squeeze(2)


def _counted(done: Forward) -> Tensor | None:
    """How much each logit counts in a callable's scores: (1, N, classes).

    So the classes compete as where they are asked for by number. None where the scores read something else too.
    """
    logits, source = done.logits, done.logits_value
    if logits is None or source is None or done.score_value is None or logits.dim() != 2 or source is done.score_value:
        return None
    return gradient_at(done.tape, done.score_value, source) if len(logits) == len(done.inputs[0]) else None


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    """Give seeds (K, N, classes) of classes (K, N)."""
    seeds = logits.new_zeros(len(classes), *logits.shape)
    return seeds.scatter_(2, classes[:, :, None].to(logits.device), 1)


def _like(flags: Tensor, values: Tensor) -> Tensor:
    return flags.reshape(*flags.shape, *(1,) * (values.dim() - 2))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def plain_tensor(x: Tensor) -> Tensor:
    """Give an image without its graph and its own class."""
    x = x.detach() if type(x) is Tensor else x.detach().as_subclass(Tensor)  # which a trace cannot follow
    return x.clone() if x.is_inference() else x


def _layout(image: Tensor) -> torch.memory_format:
    """Channels last on a CPU, where convolutions and sums over channels are quicker so."""
    if image.dim() == 4 and image.device.type == "cpu" and image.dtype != torch.float64 and image.is_contiguous():
        return torch.channels_last
    return torch.preserve_format


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Leave autocast's cache of weights alone: what is cast below autograd would have no gradient in later training."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _call(
    tape: Tape, model: Callable[..., Any], images: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        with _as_written() if _is_compiled(model) else nullcontext():
            return model(*images, *args, **kwargs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if tape.refusal is not None:
            raise tape.refusal from None
        raise_understood(error, model, images)
        raise


def raise_understood(error: Exception, model: Callable[..., Any], images: Sequence[Tensor]) -> None:
    """Say in a line what a model's error is about, where that is known."""
    text = str(error)
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    held = next((p for p in weights if p.is_floating_point()), None)
    if "does not require grad" in text or ("requires_grad" in text and "autograd.grad" in text):
        raise CoverageError(
            "the model differentiates inside its forward (torch.autograd.grad, backward), where no graph is built: "
            "explain the part of it that runs forward alone"
        ) from error
    if "vmap" in text or "functorch" in text or "There was no rule registered for HOP" in text:
        raise CoverageError(
            f"the model calls a transformation of functions ({text.splitlines()[0][:80]}), below which no operator is "
            "seen: write the loop out"
        ) from error
    if held is not None and held.device != images[0].device:
        raise ValueError(
            f"images must be on the model's device {held.device}, got {images[0].device}: "
            f"call images.to({str(held.device)!r})"
        ) from error
    if held is not None and held.dtype != images[0].dtype and "type" in text.lower():
        raise TypeError(f"images must be of the model's dtype {held.dtype}, got {images[0].dtype}") from error
    if isinstance(error, TypeError) and "required positional argument" in text:
        raise TypeError(
            f"{error}: pass what else the model takes as forward_kwargs={{name: value}}, or several inputs to be "
            "explained as a tuple"
        ) from error
    if images[0].dim() == 3 and len(images[0]) in (1, 3):
        raise ValueError(
            f"the model refused images of shape {tuple(images[0].shape)} ({error}): one image (C, H, W) is given as "
            "images[None]"
        ) from error


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
