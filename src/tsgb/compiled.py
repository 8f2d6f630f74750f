"""A compiled explainer: forward and backward of `explain`, traced into one graph and compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from . import checks, passes, targets
from . import rules as rule_tables
from .attribution import joined, part
from .explanation import Explanation
from .passes import Pass, Request, RunInfo
from .targets import Target

__all__ = ["CompiledExplainer", "compile"]

# How far the graph may lie from `explain`, relative: at least so far, and so many roundings of its arithmetic.
_LOGITS, _MAPS = (1e-3, 4), (0.05, 40)
_TF32 = 2**-10  # the rounding of float32 where convolutions may run in TF32, as on a GPU
_KEPT = 16  # graphs; a caller who gives a new lambda at each call would fill the memory


@dataclass(frozen=True)
class _Program:
    """A graph compiled for images of one shape and targets of one kind."""

    call: Callable[..., tuple[Tensor, ...]]
    graph: GraphModule  # which holds the weights
    inputs: int
    has_logits: bool
    classes: int
    info: RunInfo
    target: Target  # held, as a callable is known by its identity

    def run(self, tensors: tuple[Tensor, ...]) -> Pass:
        """Run it on the images, with a target's indices after them if it takes any."""
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            found = self.call(*tensors)
        relevance, (indices, arrived), logits = found[: self.inputs], found[self.inputs :][:2], found[self.inputs + 2 :]
        return Pass(list(relevance), indices, logits[0] if self.has_logits else None, arrived)


class CompiledExplainer:
    """`tsgb.explain` of one model, compiled; made by `tsgb.compile`.

    A graph is traced and compiled at the first call with images of a shape, type and device, a number of classes or a
    callable target, in or out of autocast; the last sixteen are kept for later calls. All graphs are traced anew once a
    weight or buffer of the module was replaced or written to; of a function that runs a module, once one was written
    to. Other changes (code, hooks, attributes, writes through ``.data``) are not seen. Safe in threads.

    Example:
        >>> import tsgb
        >>> model = tsgb.load("bundled").model
        >>> x = torch.rand(1, 3, 128, 128)
        >>> explainer = CompiledExplainer(Request(model, tsgb.rules.FUSED, None), backend="eager")
        >>> torch.allclose(explainer(x, 3).maps, tsgb.explain(model, x, 3).maps, atol=1e-5)
        True
    """

    def __init__(self, request: Request, backend: str | Callable[..., Any] = "inductor") -> None:
        self._request, self._backend = request, backend
        self._programs: dict[Any, _Program] = {}
        self._weights: list[Any] = []
        self._lock = threading.Lock()

    @property
    def graph(self) -> GraphModule:
        """The graph that was traced last: from images, and class indices (N, K) if any, to what `explain` knows.

        It is made of ATen operators, holds the model's weights, and returns the maps (K, N, ...) of each input, the
        targets (N, K), whether any gradient arrived at the head (K, N), and the logits.

        Example:
            >>> import tsgb
            >>> explainer = tsgb.compile(tsgb.load("bundled").model, torch.rand(1, 3, 128, 128), 3, backend="eager")
            >>> len(explainer.graph(torch.rand(1, 3, 128, 128), torch.tensor([[3]])))
            4
        """
        return next(reversed(self._programs.values())).graph

    @torch.inference_mode(False)
    def __call__(self, images: Tensor | tuple[Tensor, ...], target: Target = None) -> Explanation:
        """Explain images; `images`, `target`, result and errors are those of `tsgb.explain`.

        Raises:
            RuntimeError: the model cannot be traced, as it decides by its values or draws random numbers.
        """
        request = self._request
        inputs = images if isinstance(images, tuple) else (images,)
        count = checks.check_inputs(inputs)
        checks.check_mode(request.model)
        checks.check_table(request.table, request.f)
        target = targets.prepare(target, count, targets.names_of(request.model))
        plain = tuple(passes.plain_tensor(x).clone(memory_format=torch.contiguous_format) for x in inputs)
        kind = target.shape[1] if isinstance(target, Tensor) else id(target) if callable(target) else target
        key = (*((x.shape, x.dtype, x.device) for x in plain), kind, _cast(plain[0].device.type))
        tensors = (*plain, target.to(plain[0].device)) if isinstance(target, Tensor) else plain
        with self._lock:
            if self._programs and self._weights != self._now():
                self._programs.clear()
            known = self._programs.pop(key, None)
            program = self._made(plain, target, tensors) if known is None else known
            while len(self._programs) >= _KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = program  # the last used comes last
            if known is None:
                self._weights = self._now()
        targets.check_range(target, program.classes)
        return joined([part(program.run(tensors), program.info, plain, request)], images)

    def _made(self, inputs: tuple[Tensor, ...], target: Target, tensors: tuple[Tensor, ...]) -> _Program:
        """Trace and compile, and compare with `explain` what comes of it for these images."""
        program = _traced(self._request, inputs, target)
        targets.check_range(target, program.classes)
        traced, rounding = program.run(tensors), _rounding(inputs[0])
        if not _are_close(traced, _passed(self._request, inputs, target)[0], rounding):
            raise RuntimeError(
                "the model cannot be traced into a graph, as it takes values out of its tensors (by numpy, say): use "
                "tsgb.explain"
            )
        if self._backend != "eager":
            call = torch.compile(program.graph, backend=self._backend, dynamic=False, fullgraph=True)
            program = replace(program, call=call)
            if not _are_close(program.run(tensors), traced, rounding):
                raise RuntimeError(
                    f"the backend {self._backend!r} of torch.compile made code of the model's graph that gives another "
                    'map: use tsgb.explain, or tsgb.compile(..., backend="eager")'
                )
        return program

    def _now(self) -> list[Any]:
        """Which weights the model has, and how often they were written to."""
        model = getattr(self._request.model, "__self__", self._request.model)
        modules = [model] if isinstance(model, nn.Module) else [p.graph for p in self._programs.values()]
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return [(id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in held]


def compile(
    model: Callable[..., Any],
    example: Tensor | tuple[Tensor, ...],
    target: Target = None,
    *,
    rules: rule_tables.Table | str = rule_tables.FUSED,
    f: float | None = None,
    strict: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> CompiledExplainer:
    """Compile the explanation of a model: the maps of `explain` to rounding, for less than its price.

    Forward and backward are traced into one graph, which torch.compile compiles; see `CompiledExplainer` for when this
    is done anew, and for the graph itself. It takes from half a minute to some minutes.

    Args:
        model, target, rules, f, strict: as in `tsgb.explain`.
        example: images of the shape, type and device to compile for.
        backend: of torch.compile. "inductor" needs a C++ compiler, on a GPU Triton; "eager" runs the graph as it is.

    Returns:
        A function: ``explainer(images, target=None)`` gives what ``tsgb.explain(model, images, target)`` does.

    Raises:
        RuntimeError: the model cannot be traced, as it decides by its values or draws random numbers. Otherwise as
            `tsgb.explain`.

    Example:
        >>> import tsgb
        >>> model = tsgb.load("bundled").model
        >>> explainer = tsgb.compile(model, torch.rand(2, 3, 128, 128), target="top2", backend="eager")
        >>> explainer(torch.rand(2, 3, 128, 128), "top2").maps.shape
        torch.Size([2, 2, 128, 128])
    """
    explainer = CompiledExplainer(Request(model, checks.table_of(rules), f, strict), backend)
    explainer(example, target)
    return explainer


def _traced(request: Request, inputs: tuple[Tensor, ...], target: Target) -> _Program:
    """Trace both passes, with other images and another class: what is taken out of their tensors cannot stay unseen."""
    known: list[tuple[Pass, RunInfo]] = []

    def work(*tensors: Tensor) -> tuple[Tensor, ...]:
        asked = tensors[-1] if len(tensors) > len(inputs) else target
        done, info = _passed(request, tensors[: len(inputs)], asked)
        known.append((done, info))
        return (*done.relevance, done.targets, done.arrived, *([] if done.logits is None else [done.logits]))

    images = [0.3 - 0.5 * x.roll(1, -1) for x in inputs]
    classes = [torch.zeros_like(target, device=inputs[0].device)] if isinstance(target, Tensor) else []
    try:
        graph = make_fx(work)(*images, *classes)
    except RuntimeError as error:
        if "tracing tensor" not in str(error) and "dynamo-optimized" not in str(error):
            raise
        raise RuntimeError(
            "the model cannot be traced into a graph, as what it does depends on the values it meets, or as it is "
            "compiled itself: use tsgb.explain, or compile the explainer of the model without torch.compile"
        ) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"the model draws random numbers ({node.target}): use tsgb.explain")
    done, info = known[0]
    classes_of = 0 if done.logits is None else done.logits.shape[-1]
    return _Program(graph, graph, len(inputs), done.logits is not None, classes_of, info, target)


def _passed(request: Request, inputs: tuple[Tensor, ...], target: Target) -> tuple[Pass, RunInfo]:
    with torch.inference_mode(False):
        return passes.backward(request, target, passes.forward(request, inputs, target))


def _cast(device: str) -> torch.dtype | None:
    """What autocast casts to, if it does."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _rounding(x: Tensor) -> float:
    """How far the values of a model may be rounded that is called with ``x``, relative."""
    finest = torch.finfo(x.dtype).eps if x.device.type == "cpu" or x.dtype != torch.float32 else _TF32
    cast = _cast(x.device.type)
    return finest if cast is None else max(finest, torch.finfo(cast).eps)


def _are_close(one: Pass, other: Pass, rounding: float) -> bool:
    """Compare two passes: logits closely, maps as far as another order of the same sums lets one.

    A near tie under max pooling, which the last digit decides, moves a part of a map.
    """
    exactly = (0.0, 0.0)
    pairs = [(one.targets, other.targets, exactly), (one.arrived, other.arrived, exactly)]
    pairs += [(ours, theirs, _MAPS) for ours, theirs in zip(one.relevance, other.relevance, strict=True)]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits, _LOGITS))
    for ours, theirs, (least, roundings) in pairs:
        a, b = ours.double(), theirs.to(ours.device).double()
        if not (a - b).norm() <= max(least, roundings * rounding) * b.norm() and not b.isnan().any():
            return False
    return True
