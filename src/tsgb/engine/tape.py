"""A forward recorded as a tape of ATen operators in SSA form; which rule an operator has, the table says.

A `TorchDispatchMode` below autograd sees every operator that the model runs, whatever module, function, script or
trace it came from. Those that depend on the image become `Node`s, whose tensors are `Value`s. A value holds its tensor
only while a rule keeps it; any other is computed again from those that are kept, as a tape of pure operators can be
run from anywhere. Nothing is marked on the tensors themselves: the tape knows them by their identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import Memory, geometry
from .operators import (
    AS_STRIDED,
    SCATTER,
    SPELLINGS,
    operator_of,
)
from .private import share_storage, storage_key
from .provenance import Constants
from .supported import CoverageError, check_deterministic, check_plain, check_supported

if TYPE_CHECKING:
    from .kinds import RelevanceRule
    from .walk import FieldRecorder

__all__ = ["CHANNEL_SUM", "GRADIENT", "PER_CHANNEL", "LayoutError", "Node", "Tape", "Value"]

#: What an operator needs of what arrives at its output: the gradient, the relevance of each channel, or its sum.
GRADIENT, PER_CHANNEL, CHANNEL_SUM = "gradient", "per channel", "channel sum"


class Value:
    """One tensor that depends on the image.

    Attributes:
        node: the operator that made it; None for an image. ``index``: which of its outputs.
        needs: what ``node`` needs of what arrives here.
        channel_dim: the dimension of the channels.
        is_positive: whether no element is below 0, where that is known.
        may_be_zero: whether an element may be 0 by itself; or a factor, whose zeros are those.
        tensor: kept, or None. ``keepers``: how many rules keep it. ``readers``: how many operators read it.
    """

    __slots__ = (
        "channel_dim", "device", "dtype", "index", "is_positive", "keepers", "may_be_zero", "memory", "needs", "node",
        "readers", "shape", "tensor",
    )  # fmt: skip

    def __init__(self, node: Node | None, index: int, o: Tensor, memory: Memory | None) -> None:
        self.node, self.index, self.shape, self.dtype, self.device = node, index, o.shape, o.dtype, o.device
        self.needs, self.channel_dim, self.is_positive = GRADIENT, 1, False
        self.may_be_zero: bool | Tensor = True
        self.tensor: Tensor | None = None
        self.keepers = self.readers = 0
        self.memory = memory if memory is not None else Memory(self, o)

    @property
    def channels_last(self) -> bool:
        """Whether the channels stand last, behind positions."""
        return self.channel_dim == len(self.shape) - 1 > 1

    @property
    def positions(self) -> int:
        """The number of positions of a map; 1 for a vector."""
        shape = list(self.shape[1:])
        if len(shape) > 1:
            del shape[self.channel_dim - 1]
            return int(torch.Size(shape).numel())
        return 1


class Node:
    """One operator that ran; its arguments have values in the places of tensors that depend on the image."""

    __slots__ = ("above_weights", "args", "inputs", "is_weighted", "kwargs", "op", "outputs", "rule", "saved")

    def __init__(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], inputs: list[Value], rule: Any) -> None:
        self.op, self.args, self.kwargs, self.inputs = op, args, kwargs, inputs
        self.rule: RelevanceRule = rule
        self.outputs: list[Value | None] = []
        self.saved: Any = None
        self.is_weighted = self.above_weights = False

    @property
    def packet(self) -> Any:
        """What the table is keyed by."""
        return self.op.overloadpacket

    @property
    def name(self) -> str:
        """The operator's name, as in ``torch.ops.aten``."""
        return str(self.op.name()).split("::")[1].split(".")[0]

    @property
    def output(self) -> Value:
        """The first output."""
        output = self.outputs[0]
        assert output is not None
        return output

    def run(self, tensor_of: Callable[[Value], Tensor], constant: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Run the operator again on tensors in place of its values."""
        return self.op(*replaced(self.args, tensor_of, constant), **replaced(self.kwargs, tensor_of, constant))


class _Mark:
    __slots__ = ("memory", "tensor", "value", "version")

    def __init__(self, t: Tensor, value: Value, memory: Memory) -> None:
        self.tensor, self.value, self.memory, self.version = weakref.ref(t), value, memory, memory.version


class LayoutError(Exception):
    """The model writes on a view, or reads strides, of tensors that lie in memory as the caller did not lay them."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a forward; enter it within `private.below_autograd`.

    Args:
        rules: operators to rules. ``weighted``: those with weights, of which the last is the head.
        default: the rule of all other operators.
        before: the memory of tensors that were there before the forward, see `provenance`.

    Attributes:
        nodes: in the order in which they ran.
        refusal: why the forward was refused, if it was.
        recorder: what a fused map is made of, while one is asked for.
        images: the values of the images.
        in_target: whether what runs is a callable target, not the model.
        is_relaid: whether an image lies in memory as the caller did not lay it.
    """

    def __init__(
        self, rules: Mapping[Any, RelevanceRule], weighted: Container[Any], default: RelevanceRule, before: set[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rules, self.weighted, self.default = rules, weighted, default
        self.nodes: list[Node] = []
        self.images: list[Value] = []
        self.in_target = self.is_relaid = False
        self.refusal: Exception | None = None
        self.recorder: FieldRecorder | None = None
        self.constants = Constants(before)
        self._weights = 0  # operators with weights so far
        self._marks: dict[int, _Mark] = {}
        self._written: dict[int, tuple[Memory, Tensor]] = {}  # constants that were written to, by their storage
        self._random_states: list[tuple[Callable[[Any], None], Any]] = []

    # ---- values and their tensors

    def enter(self, image: Tensor, needs: str) -> Tensor:
        """Take a tensor for an image, as the model is given it."""
        value = Value(None, 0, image, None)
        value.needs, value.may_be_zero = needs, False  # relevance reaches black pixels as well
        self._name(image, value, value.memory)
        self.keep(value, image)
        self.images.append(value)
        return image

    def keep(self, value: Value, tensor: Tensor) -> None:
        """Hold a value's tensor for the backward."""
        if value.tensor is None:
            value.tensor = tensor.detach()
            value.memory.kept.append(value)
        value.keepers += 1

    def drop(self, value: Value) -> None:
        """Undo one `keep`."""
        value.keepers -= 1
        if value.keepers <= 0:
            value.tensor = None

    def get(self, value: Value) -> Tensor:
        """Give a value's tensor, kept or computed again from those that are."""
        if value.tensor is None:
            assert value.node is not None
            output = listed(value.node.run(self.get))[value.index]
            value.tensor = output
        return value.tensor

    def close(self) -> None:
        """Let go of all tensors at once, as nodes and values hold each other."""
        for node in self.nodes:
            for value in node.outputs:
                if value is not None:
                    value.node = value.tensor = value.memory = None  # type: ignore[assignment]
            node.outputs, node.inputs, node.args, node.kwargs, node.saved = [], [], (), {}, None
        for image in self.images:
            image.tensor = image.memory = None  # type: ignore[assignment]
        self.nodes.clear()
        self._marks.clear()
        self.constants = Constants(set())
        self._written.clear()

    def value_of(self, t: Tensor) -> Value | None:
        """Give what a tensor is on the tape; None for one that does not depend on the image."""
        mark = self._marks.get(id(t))
        if mark is None or mark.tensor() is not t:
            key = storage_key(t) if self._written else None
            if key not in self._written:
                return None
            return self._read_again(t, self._written[key][0], 1)
        if mark.version != mark.memory.version:
            return self._read_again(t, mark.memory, mark.value.channel_dim)
        return mark.value

    def _name(self, t: Tensor, value: Value, memory: Memory) -> None:
        self._marks[id(t)] = _Mark(t, value, memory)

    def _read_again(self, t: Tensor, memory: Memory, channel_dim: int) -> Value:
        """Cut a stale view out of the whole of its memory."""
        assert isinstance(memory.whole, Value)
        node = Node(AS_STRIDED, [memory.whole, *geometry(t)], {}, [memory.whole], self.rules[AS_STRIDED.overloadpacket])
        node.saved = memory.geometry[1]
        value = self._append(node, [t], t, [memory])
        value.channel_dim = channel_dim
        return value

    # ---- recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._dispatched(func, types, args, kwargs or {})
        except (CoverageError, LayoutError) as error:
            self.refusal = error  # TorchScript's interpreter tells another
            raise

    def _dispatched(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record one operator that depends on the image, or run it as it is."""
        if types:
            check_plain(types)
        operator = operator_of(func)
        if operator.role == "cast" and self._stays_exact(args):
            return args[0]
        inputs: list[Value] = []
        tensors: list[Tensor] = []
        constants: list[Tensor] = []
        recorded = self._values_of(args, inputs, tensors, constants)
        recorded_kwargs = kwargs
        if kwargs:
            named = self._values_of(kwargs.values(), inputs, tensors, constants)
            recorded_kwargs = dict(zip(kwargs, named, strict=True))
        if operator.is_random and (operator.role != "dropout" or True in args[2:]):
            self._met_random(func, args, kwargs, bool(inputs) and operator.role != "constructor")
        if inputs and operator.role == "dropout":
            return args[0]
        if not inputs or operator.role == "constructor":
            if operator.writes and operator.role != "cut":
                self.constants.check_write(func, kwargs["out"] if operator.is_out else args[0], self._shares_memory)
            return self.constants.run(func, operator, args, kwargs, constants)
        if operator.role == "leaving":
            self.constants.has_left = True
        if operator.role == "cut":
            inputs[0].memory.tensors += 1
            return self.constants.cut(func(*args, **kwargs))
        if operator.is_out and operator.functional is not None:
            with self:
                out = kwargs["out"]
                output = operator.functional(*args, **{key: value for key, value in kwargs.items() if key != "out"})
                return out.resize_(output.shape).copy_(output) if out.shape != output.shape else out.copy_(output)
        rule = self.rules.get(operator.packet)
        spelled = operator.packet in SPELLINGS and SPELLINGS[operator.packet](*recorded, **recorded_kwargs)
        if spelled:
            if callable(spelled):
                with self:
                    return spelled(*args, **kwargs)
            if rule is None:
                func, recorded = spelled
                operator = operator_of(func)
                actual = dict(zip(inputs, tensors, strict=True))
                args, kwargs, recorded_kwargs = replaced(recorded, actual.__getitem__, None), {}, {}
                rule = self.rules.get(operator.packet)
        if rule is None:
            check_supported(func, args, kwargs, len(inputs))
            if operator.decomposes:
                with self:
                    return func.decompose(*args, **kwargs)
            rule = self.default
        self.constants.check(func, constants, args[0] if operator.writes else None)
        node = Node(operator.functional, recorded, recorded_kwargs, inputs, rule)
        if self.is_relaid and func is AS_STRIDED:
            raise LayoutError
        if operator.writes:
            return self._write(func, operator, node, args, kwargs, tensors)
        output = rule.run(node, args, kwargs)
        if any(output is x for x in tensors):
            return output
        self._append(node, tensors, output, [value.memory for value in inputs])
        return output

    def _append(self, node: Node, tensors: Sequence[Tensor], output: Any, memories: Sequence[Memory]) -> Value:
        """Write a node down; an output that lies in the memory of an input shares it."""
        first = next((value for value in node.inputs if len(value.shape) > 2), None)
        for index, o in enumerate(listed(output)):
            value = None
            if isinstance(o, Tensor):
                pairs = zip(memories, tensors, strict=True)
                memory = next((m for m, x in pairs if o is x or share_storage(o, x)), None)
                value = Value(node, index, o, memory)
                if memory is not None:
                    memory.tensors += 1
                if first is not None:
                    last, before = len(o.shape) - 1, first.channel_dim
                    value.channel_dim = last if before == len(first.shape) - 1 else min(before, max(last, 1))
                self._name(o, value, value.memory)
            node.outputs.append(value)
        self.nodes.append(node)
        node.rule = node.rule.record(self, node, tensors, output) or node.rule
        if node.packet in self.weighted and node.args[0] is node.inputs[0]:
            node.is_weighted = True
            self._weights += 1
            self.keep(node.inputs[0], tensors[0])  # as it may be the head, until weights are seen above it
            self._settle(node)
        return node.outputs[0]  # type: ignore[return-value]

    def _write(self, func: Any, operator: Any, node: Node, args: Any, kwargs: Any, tensors: list[Tensor]) -> Tensor:
        """Record an operator that writes on its first argument: what that held stays a value of its own."""
        if node.op is None:
            raise CoverageError(
                f"the model calls {func.name()}, which writes on several tensors at once, or on another than its "
                "first: write its operations one by one"
            )
        t: Tensor = args[0]
        memory = self._memory_of(t)
        if self.is_relaid and memory.tensors > 1 and isinstance(memory.whole, Value):
            raise LayoutError  # which tensors share memory depends on how they lie in it
        before = t.detach()
        tensors = [before if x is t else x for x in tensors]
        if node.rule.may_overwrite(node, memory):
            func(*args, **kwargs)
            memory.version += 1
            value = self._append(node, tensors, t, [memory] * len(tensors))
            memory.tensors -= 1
        else:
            output = node.rule.run(node, args, kwargs)
            is_view = isinstance(output, Tensor) and share_storage(output, t)  # squeeze_ and its like
            value = self._append(node, tensors, output, [v.memory for v in node.inputs])
            if memory.tensors <= 1 and isinstance(memory.whole, Value) and _fits(output, t):
                t.set_(output)  # no other tensor lies here: what was is left to those that keep it
                self._name(t, value, value.memory)
                return t
            memory.rescue()
            if is_view or not _fits(output, t):
                func(*args, **kwargs)
            else:
                t.copy_(output)
            memory.version += not is_view
            value.memory = memory
        self._name(t, value, memory)
        if geometry(t) == memory.geometry:
            memory.whole = value
            return t
        inputs = [v for v in (memory.whole, value) if isinstance(v, Value)]
        scatter = Node(SCATTER, [memory.whole, value, *geometry(t)], {}, inputs, self.rules[SCATTER.overloadpacket])
        scatter.saved = memory.geometry[1]
        whole = t.as_strided(*memory.geometry)
        memory.whole = self._append(scatter, [whole] * len(inputs), whole, [memory] * len(inputs))
        memory.tensors -= 1
        self._name(t, value, memory)
        return t

    def _memory_of(self, t: Tensor) -> Memory:
        """Give the memory of a tensor that is written; a constant's is known by its storage from then on."""
        mark = self._marks.get(id(t))
        if mark is not None and mark.tensor() is t:
            return mark.memory
        key = storage_key(t)
        assert key is not None
        if key not in self._written:
            flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
            self._written[key] = Memory(flat.clone(), flat), flat
        memory = self._written[key][0]
        memory.tensors += 1
        return memory

    def _settle(self, node: Node) -> None:
        """Let go of what only a head would need: an operator below weights is none."""
        ahead = [value.node for value in node.inputs]
        while ahead:
            below = ahead.pop()
            if below is None or below.above_weights:
                continue
            below.above_weights = True
            if below.is_weighted:
                self.drop(below.inputs[0])
            else:
                ahead.extend(value.node for value in below.inputs)

    def _values_of(self, args: Any, inputs: list[Value], tensors: list[Tensor], constants: list[Tensor]) -> list[Any]:
        recorded = []
        for a in args:
            if isinstance(a, Tensor):
                value = self.value_of(a)
                if value is None:
                    constants.append(a)
                else:
                    value.readers += 1
                    inputs.append(value)
                    tensors.append(a)
                    a = value
            elif isinstance(a, (list, tuple)) and any(isinstance(x, Tensor) for x in a):
                a = self._values_of(a, inputs, tensors, constants)
            recorded.append(a)
        return recorded

    def _stays_exact(self, args: Any) -> bool:
        """Tell whether autocast is to leave a tensor as it is, as for the first operators with weights.

        In half precision the values of the image, and which of a pool's values is the largest, are told too coarsely.
        """
        if not isinstance(args[0], Tensor):
            return False
        device = args[0].device.type
        if self._weights >= _EXACT or args[0].dtype != torch.float32 or not torch.is_autocast_enabled(device):
            return False
        return torch.get_autocast_dtype(device) in args[1:]

    # ---- what does not depend on the image

    def _shares_memory(self, t: Tensor) -> bool:
        """Tell whether a constant lies in the memory of a value."""
        key = storage_key(t)
        live = (mark.tensor() for mark in self._marks.values())
        return key is not None and any(storage_key(known) == key for known in live if known is not None)

    def _met_random(self, func: Any, args: Any, kwargs: Any, depends: bool) -> None:
        if "batch_norm" in func._schema.name and True not in (a is True for a in args):
            return
        if depends:
            names = [argument.name for argument in func._schema.arguments]
            check_deterministic(func, {**dict(zip(names, args, strict=False)), **kwargs})
        if not self._random_states:
            self._random_states.append((torch.set_rng_state, torch.get_rng_state()))
            if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self._random_states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))

    def restore_random_state(self) -> None:
        """Undo what the forward drew of the random numbers."""
        for restore, state in self._random_states:
            restore(state)


_EXACT = 8  # operators with weights that run in float32 under autocast


def listed(output: Any) -> list[Any]:
    """Give an operator's outputs as a list."""
    return list(output) if isinstance(output, (list, tuple)) else [output]


def replaced(args: Any, tensor_of: Callable[[Value], Tensor], constant: Callable[[Tensor], Tensor] | None) -> Any:
    """Put tensors in the places of values, and change constants."""
    if isinstance(args, Value):
        return tensor_of(args)
    if isinstance(args, Tensor):
        return args if constant is None else constant(args)
    if isinstance(args, (list, tuple)):
        return [replaced(a, tensor_of, constant) for a in args]
    if isinstance(args, dict):
        return {key: replaced(a, tensor_of, constant) for key, a in args.items()}
    return args


def _fits(output: Any, t: Tensor) -> bool:
    return isinstance(output, Tensor) and output.shape == t.shape and output.dtype == t.dtype
