"""TSGB written again, slow and literal, to compare the package with. Nothing here uses the package.

Three parts: the formulas as loops over positions; the formulas as gradients (``rule(grad, x, ...) -> grad_x``); and
`explain`, which runs any network in torch with these gradients in place of its own, one class at a time.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

EPS = 1e-10  # the authors' guard of n and of the input of batch norm


# ---- loops


def conv_output(x, weight, bias, stride, padding, dilation, groups):
    """Convolution of (N, C, H, W) by its definition, one output position at a time, and what each position sees."""
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    reach = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    size = [(padded.shape[2 + d] - reach[d]) // stride[d] + 1 for d in (0, 1)]
    inputs, outputs = x.shape[1] // groups, weight.shape[0] // groups
    o = x.new_zeros(len(x), len(weight), *size)
    windows = {}
    for i in range(size[0]):
        for j in range(size[1]):
            taps = []
            for a in range(kernel[0]):
                for b in range(kernel[1]):
                    row, column = i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]
                    for g in range(groups):
                        part = padded[:, g * inputs : (g + 1) * inputs, row, column]
                        o[:, g * outputs : (g + 1) * outputs, i, j] += (
                            part @ weight[g * outputs : (g + 1) * outputs, :, a, b].T
                        )
                    row, column = row - padding[0], column - padding[1]
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        taps.append((row, column))
            windows[i, j] = taps
    return (o if bias is None else o + bias[:, None, None]), windows


def conv_transposed_output(x, weight, bias, stride, padding, dilation, groups, size):
    """Transposed convolution by its definition, and where each output position comes from."""
    inputs, outputs = x.shape[1] // groups, weight.shape[1]
    o, windows = x.new_zeros(len(x), outputs * groups, *size), {}
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for a in range(weight.shape[2]):
                for b in range(weight.shape[3]):
                    row, column = i * stride + a * dilation - padding, j * stride + b * dilation - padding
                    if not (0 <= row < size[0] and 0 <= column < size[1]):
                        continue
                    windows.setdefault((row, column), []).append((i, j))
                    for g in range(groups):
                        source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
                        o[:, sink, row, column] += x[:, source, i, j] @ weight[source, :, a, b]
    return (o if bias is None else o + bias[:, None, None]), windows


def share_by_loops(relevance, x, windows, fields):
    """Share each output position's relevance among the positions of its window, in proportion to |x|."""
    inputs, outputs = x.shape[1] // fields, relevance.shape[1] // fields
    below = torch.zeros_like(x)
    for n in range(len(x)):
        for g in range(fields):
            source, sink = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            for (i, j), taps in windows.items():
                c = relevance[n, sink, i, j].sum()
                total = sum((x[n, source, row, column].abs().sum() for row, column in taps), x.new_zeros(()))
                for row, column in taps:
                    below[n, source, row, column] += c / (total + EPS) * x[n, source, row, column].sign()
    return below


def head_by_loops(grad, x, weight, f, split):
    """TSGB-FC on (N, P, C): one beta for each image and class, summed over the positions P."""
    below = torch.zeros_like(x)
    for n in range(len(x)):
        for k in range(len(weight)):
            arriving = grad[n, :, k]
            sign = -1 if len(arriving) > 1 and arriving.sum() < 0 else 1
            z_for, z_against = 0.0, 0.0
            for p in range(x.shape[1]):
                for c in range(x.shape[2]):
                    w, value = weight[k, c], x[n, p, c]
                    speaks_for = w * value > 0 if split == "contributions" else w > 0
                    share = w * value * (sign * arriving[p] if x.shape[1] > 1 else 1)
                    z_for, z_against = (z_for + share, z_against) if speaks_for else (z_for, z_against + share)
            beta = 0.0 if z_against == 0 else f * z_for / abs(z_against)
            for p in range(x.shape[1]):
                for c in range(x.shape[2]):
                    w, value = weight[k, c], x[n, p, c]
                    speaks_for = w > 0 if split == "weights" or value == 0 else w * value > 0
                    below[n, p, c] += w * arriving[p] * (1 if speaks_for else beta)
    return below


def avg_pool_by_loops(grad, x, kernel, stride, padding):
    """The authors' average pooling: the relevance of each window spread evenly over it, over x."""
    spread = torch.zeros_like(x)
    for i in range(grad.shape[2]):
        for j in range(grad.shape[3]):
            rows = [i * stride + a - padding for a in range(kernel)]
            columns = [j * stride + b - padding for b in range(kernel)]
            window = [(r, c) for r in rows for c in columns if 0 <= r < x.shape[2] and 0 <= c < x.shape[3]]
            o = sum(x[:, :, r, c] for r, c in window) / kernel**2
            for r, c in window:
                spread[:, :, r, c] += grad[:, :, i, j] * o / kernel**2
    return spread / (x + EPS)


def excitation_by_loops(relevance, x, weight, stride=1, padding=0, groups=1):
    """A convolution's probability of outputs (N, O, H, W), given to its inputs x: share max(w x, 0) / Z."""
    below = torch.zeros_like(x)
    outputs = weight.shape[0] // groups
    for n in range(len(x)):
        for o in range(weight.shape[0]):
            first = o // outputs * (x.shape[1] // groups)
            for i in range(relevance.shape[2]):
                for j in range(relevance.shape[3]):
                    shares = {}
                    for c in range(weight.shape[1]):
                        for a in range(weight.shape[2]):
                            for b in range(weight.shape[3]):
                                row, column = i * stride + a - padding, j * stride + b - padding
                                if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                                    value = float(weight[o, c, a, b] * x[n, first + c, row, column])
                                    shares[first + c, row, column] = max(value, 0.0)
                    total = sum(shares.values())
                    for place, share in shares.items():
                        if total > 0:
                            below[(n, *place)] += share / total * relevance[n, o, i, j]
    return below


def excitation_of_vector(relevance, x, weight):
    """The same for a linear layer: relevance (O,), x (C,), weight (O, C)."""
    below = torch.zeros_like(x)
    for o in range(len(weight)):
        shares = [max(float(weight[o, c] * x[c]), 0.0) for c in range(len(x))]
        for c in range(len(x)):
            if sum(shares) > 0:
                below[c] += shares[c] / sum(shares) * relevance[o]
    return below


# ---- gradients. grad has the shape of the output, the result that of x; the rest are the operator's own arguments.

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def ordinary(grad, x, function):
    """The operator's own gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, grad)[0]


def share(relevance, x, fields, function):
    """``sign(x) * op^T(c / (n + 1e-10))``: `share_by_loops`, where ``function`` is the operator with weights of 1."""
    c, size = (t.reshape(len(t), fields, -1, *t.shape[2:]).sum(2) for t in (relevance, x.abs()))
    spread = ordinary(c / (function(size) + EPS), size, function)
    return x.sign() * spread.repeat_interleave(x.shape[1] // fields, 1)


def conv(grad, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, merged=False):
    """TSGB-Conv. ``merged``: over all channels at once, as the authors run it, else each group by itself."""
    function, geometry = CONVOLUTIONS[weight.dim() - 3], (stride, padding, dilation)
    if x.dim() < weight.dim():
        return conv(grad[None], x[None], weight, bias, *geometry, groups, merged=merged)[0]
    if x.shape[2:].numel() == 1:  # a linear layer on a vector
        return ordinary(grad, x, lambda s: function(s, weight, bias, *geometry, groups))
    fields = 1 if merged else groups
    ones = weight.new_ones(fields, 1, *weight.shape[2:])
    relevance = grad * function(x, weight, bias, *geometry, groups)
    return share(relevance, x, fields, lambda s: function(s, ones, None, *geometry, fields))


def conv_transposed(grad, x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The same where each position of the output sees those that the kernel reached it from."""
    function, geometry = TRANSPOSED[weight.dim() - 3], (stride, padding, output_padding, groups, dilation)
    if x.dim() < weight.dim():
        return conv_transposed(grad[None], x[None], weight, bias, *geometry)[0]
    ones = weight.new_ones(groups, 1, *weight.shape[2:])
    relevance = grad * function(x, weight, bias, *geometry)
    return share(relevance, x, groups, lambda s: function(s, ones, None, *geometry))


def linear(grad, x, weight, bias=None):
    """A hidden linear layer: its own gradient on a vector; on positions (N, ..., C) it is a 1 x 1 convolution."""
    if x.shape[1:-1].numel() == 1:
        return grad @ weight
    c = (grad * functional.linear(x, weight, bias)).sum(-1, keepdim=True)
    return x.sign() * (c / (x.abs().sum(-1, keepdim=True) + EPS))


def batch_norm(grad, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """As the authors run it, ``grad * o / (x + 1e-10)``."""
    return grad * functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps) / (x + EPS)


def avg_pool(grad, x, function):
    """As the authors run it; of the whole map its own gradient."""
    o = function(x)
    return ordinary(grad, x, function) if o.shape[2:].numel() == 1 else ordinary(grad * o, x, function) / (x + EPS)


def activation(grad, x, function):
    """Relevance passes: ``grad * act(x) / x``, act'(0) at 0; its own gradient where act(0) is not 0."""
    if function(torch.zeros_like(x)).any():
        return ordinary(grad, x, function)
    at_zero = ordinary(torch.ones_like(x), torch.zeros_like(x), function)
    return grad * torch.where(x == 0, at_zero, function(x) / torch.where(x == 0, 1, x))


def shift(grad, x, function):
    """Relevance passes: ``grad * o / x``, 0 at 0."""
    return torch.where(x == 0, 0, (grad * function(x)).sum_to_size(x.shape) / torch.where(x == 0, 1, x))


def glu(grad, x, dim=-1):
    """Relevance goes to the signal, the first half."""
    opened = x.chunk(2, dim)[1].sigmoid()
    return torch.cat([grad * opened, torch.zeros_like(opened)], dim)


def head(grad, x, function, weight, f, split, positions):
    """TSGB-FC for any ``function(x, weight)`` linear in both, with sums over the dimensions ``positions``."""
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    if split == "weights":  # parts of x, the weights that speak for a class there, and those that speak against it
        parts = [(torch.ones_like(x), positive, negative)]
    else:
        parts = [((x >= 0).to(x.dtype), positive, negative), ((x < 0).to(x.dtype), negative, positive)]
    z_for, z_against = (sum(function(x * part[0], part[side]) for part in parts) for side in (1, 2))
    if positions:
        weighting = grad * torch.where(grad.sum(positions, keepdim=True) < 0, -1, 1)
        z_for, z_against = ((weighting * z).sum(positions, keepdim=True) for z in (z_for, z_against))
    beta = torch.where(z_against == 0, 0, f * z_for / torch.where(z_against == 0, 1, z_against).abs())
    return sum(
        mask * (ordinary(grad, x, partial(function, weight=a)) + ordinary(beta * grad, x, partial(function, weight=b)))
        for mask, a, b in parts
    )


def linear_head(grad, x, weight, bias=None, *, f, split="contributions"):
    return head(grad, x, lambda s, weight: functional.linear(s, weight), weight, f, split, tuple(range(1, x.dim() - 1)))


def conv_head(grad, x, weight, bias=None, *geometry, f, split="contributions"):
    function = CONVOLUTIONS[weight.dim() - 3]
    positions = tuple(range(2, x.dim()))
    return head(grad, x, lambda s, weight: function(s, weight, None, *geometry), weight, f, split, positions)


def conv_transposed_head(grad, x, weight, bias=None, *geometry, f, split="contributions"):
    function = TRANSPOSED[weight.dim() - 3]
    positions = tuple(range(2, x.dim()))
    return head(grad, x, lambda s, weight: function(s, weight, None, *geometry), weight, f, split, positions)


def guided(grad, x, function):
    return ordinary(grad.clamp(min=0), x, function)


def deconvnet(grad, x, function):
    return grad.clamp(min=0)


def _excite(function, x, weight):
    """``Z = sum max(w x, 0)``, and its transpose."""
    above, below = (partial(function, weight=w) for w in (weight.clamp(min=0), weight.clamp(max=0)))
    z = above(x.clamp(min=0)) + below(x.clamp(max=0))
    return z, lambda grad: torch.where(x < 0, ordinary(grad, x, below), ordinary(grad, x, above))


def _ratio(a, z):
    is_shared = z.abs() > torch.finfo(z.dtype).tiny
    return torch.where(is_shared, a / torch.where(is_shared, z, 1), 0)


def excitation(grad, x, function, weight, o):
    """``x * grad_x = sum over outputs of max(w x, 0) * P / Z`` with ``P = grad * o``."""
    z, pull = _excite(function, x, weight)
    return pull(_ratio(grad * o, z))


def excitation_head(grad, x, function, weight):
    """The same where the gradient is the probability; where the head has positions a class has one Z."""
    z, pull = _excite(function, x, weight)
    positions = tuple(range(1, x.dim() - 1)) if weight.dim() == 2 else tuple(range(2, x.dim()))
    total, z = grad, grad * z
    if positions:
        total, z = (values.sum(positions, keepdim=True) for values in (total, z))
    return pull(grad * _ratio(total, z))


def contrastive_head(grad, x, function, weight):
    return excitation_head(grad, x, function, weight) - excitation_head(grad, x, function, -weight)


# ---- whole networks

GATES = {"sigmoid", "hardsigmoid", "softmax"}
RECTIFIERS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "threshold", "clamp", "clamp_min", "clamp_max", "clip",
}  # fmt: skip
ACTIVATIONS = RECTIFIERS | {
    "softsign", "hardshrink", "softshrink", "tanhshrink", "tanh", "abs", "atan", "erf", "square", "pow",
}  # fmt: skip
NORMS = {"layer_norm", "group_norm", "instance_norm", "local_response_norm", "normalize", "rms_norm"}
MULTIPLES = {"clone", "contiguous", "to", "type", "float", "double", "view", "view_as", "reshape", "mul", "div", "neg"}
VIEWS = {
    "view", "view_as", "reshape", "permute", "transpose", "t", "T", "mT", "flatten", "unflatten", "squeeze",
    "unsqueeze", "select", "narrow", "getitem", "chunk", "split", "tensor_split", "unbind", "expand", "expand_as",
    "movedim", "moveaxis", "swapaxes", "swapdims", "contiguous", "diagonal", "detach", "alias", "as_strided", "to",
    "float", "double", "type", "type_as", "ravel", "reshape_as", "split_with_sizes",
}  # fmt: skip
SYNONYMS = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "negative": "neg",
    "radd": "add", "rmul": "mul", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div",
    "ipow": "pow",
}  # fmt: skip


@dataclass(eq=False)
class Made:
    """How a tensor that depends on the image was made."""

    name: str
    sources: tuple["Made", ...] = ()  # those that gradients go back to
    call: int = -1
    weights: str = ""  # of an operator with weights: "vector" or "positions"
    is_linear: bool = False


def walk(start, stop=lambda made: False):
    ahead, known = list(start), set()
    while ahead:
        made = ahead.pop()
        if made not in known:
            known.add(made)
            yield made
            if not stop(made):
                ahead.extend(made.sources)


class Operator(torch.autograd.Function):
    """An operator with another backward."""

    @staticmethod
    def forward(ctx, x, function, rule):
        ctx.x, ctx.rule = x.detach().clone(), rule
        return function(ctx.x).clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.rule(grad, ctx.x), None, None


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def mapped(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return type(value)(mapped(function, item) for item in value) if type(value) in (list, tuple) else value


def found(name):
    """The function of a name that returns a new tensor."""
    return next(getattr(place, name) for place in (functional, torch, torch.Tensor) if hasattr(place, name))


@dataclass
class Literal(TorchFunctionMode):
    """One forward of a network under a table. ``roles``: the calls at the head and above it, once they are known."""

    table: str
    f: float = 1.0
    roles: dict[int, str] = field(default_factory=dict)
    in_target: bool = False

    def __post_init__(self):
        super().__init__()
        self.calls, self.made, self.shifts_image = 0, {}, False

    def enter(self, leaf):
        return self.keep(leaf.clone(), Made("image"))

    def keep(self, tensor, made):
        self.made[id(tensor)] = tensor, made  # which holds the tensor, so that no other has its id
        return tensor

    def of(self, tensor):
        return self.made.get(id(tensor), (None, None))[1]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(self.of(t) for t in tensors((args, kwargs))) or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        word = function.__self__.__name__ if function.__name__ == "__get__" else function.__name__
        name = word.strip("_")
        if (name in VIEWS and not word.endswith("_")) or word in ("__getitem__", "__get__"):
            output = function(*args, **kwargs)
            return self.record(writable(args[0], output) if isinstance(output, tuple) else output, name, args, kwargs)
        if word in ("__setitem__", "copy_"):
            function(*args, **kwargs)
            self.record(args[0], name, args, kwargs)
            return args[0]
        written, kwargs = kwargs.get("out"), {key: value for key, value in kwargs.items() if key != "out"}
        is_written = (word.endswith("_") and not word.startswith("_")) or word.startswith("__i")
        if is_written or kwargs.pop("inplace", False):
            written = args[0] if args else kwargs["input"]
        name = SYNONYMS.get(name, name)
        function = found(name) if is_written or name in SYNONYMS.values() else function
        self.calls += 1
        name, function, args, kwargs = canonical(name, function, args, kwargs, self.of)
        role, rule = self.roles.get(self.calls), None
        held = mapped(lambda t: t.detach().clone(), (args[1:], kwargs))  # as they are now
        if isinstance(args[0], torch.Tensor) and self.of(args[0]):
            run = lambda s: function(s, *held[0], **held[1])  # noqa: E731
            rule = None if role == "above" else self.rule(name, args, run, held, role)
        if rule is not None and isinstance(rule, int):  # a product or difference: the place of the signal
            signal, other = args[rule], args[1 - rule].detach().clone()
            run = lambda s: function(s, other) if rule == 0 else function(other, s)  # noqa: E731
            form = (lambda grad, s: shift(grad, s, run)) if name == "sub" else lambda grad, s: ordinary(grad, s, run)
            o = Operator.apply(signal, run, form)
            made = Made("centre" if name == "sub" else "gate", (self.of(signal),), self.calls)
        elif rule is not None:
            o = Operator.apply(args[0], run, rule)
            weights = ""
            if name == "linear" or name.startswith("conv"):
                x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
                sizes = x.shape[1:-1] if name == "linear" else x.shape[2 - weight.dim() :]
                weights = "vector" if sizes.numel() == 1 else "positions"
                if self.enlarges(name, x, weight, held):
                    weights = ""
            made = Made(name, (self.of(args[0]),), self.calls, weights, name == "linear")
        else:
            own, others = mapped(self.own, args), mapped(self.own, kwargs)
            o = function(*own, **others)
            if written is None:
                return self.record(mapped(torch.Tensor.clone, o), name, args, kwargs)
            made = Made(name, tuple(self.of(t) for t in tensors((args, kwargs)) if self.of(t)), self.calls)
        return self.keep(o if written is None else written.copy_(o), made)

    def own(self, tensor):
        """A copy, which nothing writes on; of weights without their graph."""
        return tensor.clone() if self.of(tensor) else tensor.detach()

    def record(self, output, name, args, kwargs):
        sources = tuple(self.of(t) for t in tensors((args, kwargs)) if self.of(t))
        for tensor in tensors(list(output) if isinstance(output, tuple) else output):
            if tensor.requires_grad:
                self.keep(tensor, Made(name, sources, self.calls))
        return output

    def rule(self, name, args, run, held, role):
        """The backward of a call, or the place of its signal; None where it keeps its own."""
        x, paper, pixels = args[0], self.table == "PAPER", self.table in ("PIXELS", "EXCITATION", "CONTRASTIVE")
        if name == "linear" or name.startswith("conv"):
            return self.weighted(name, held, role)
        if name in NORMS:
            return lambda grad, s: shift(grad, s, run)
        if name == "batch_norm":
            if paper:
                return lambda grad, s: batch_norm(grad, s, *held[0], **held[1])
            return (lambda grad, s: shift(grad, s, run)) if pixels else None
        if self.table in ("GUIDED", "DECONVNET") and name in RECTIFIERS:
            return partial(guided if self.table == "GUIDED" else deconvnet, function=run)
        if name.startswith("avg_pool") and paper:
            return lambda grad, s: avg_pool(grad, s, run)
        if not pixels:
            return None
        if name in ACTIVATIONS:
            return lambda grad, s: activation(grad, s, run)
        if name == "glu":
            return lambda grad, s: glu(grad, s, *held[0], **held[1])
        both = [a for a in args[:2] if isinstance(a, torch.Tensor) and self.of(a)]
        if len(both) == 2 and not self.in_target:
            if name in ("mul", "div"):
                return 0 if name == "div" else self.signal(*both)
            if name == "sub" and both[1].dim() == x.dim() and both[1].numel() < x.numel():
                return 0 if comes_from(self.of(both[1]), self.of(x)) else None
        if len(both) == 1 and name in ("add", "sub", "rsub"):
            made = self.of(x)
            if made.is_linear and made.weights == "vector":
                return None  # its bias, added by hand
            self.shifts_image |= any(not m.sources for m in walk([made], lambda m: bool(m.weights)))
            return lambda grad, s: shift(grad, s, run)
        return None

    def weighted(self, name, held, role):
        """The backward of an operator with weights."""
        transposed, is_linear = name.startswith("conv_transpose"), name == "linear"
        signature = "weight bias stride padding " + (
            "output_padding groups dilation" if transposed else "dilation groups"
        )
        given = {**dict(zip(signature.split(), held[0], strict=False)), **held[1]}
        weight, bias = given.pop("weight"), given.pop("bias", None)
        dims = weight.dim() - 3
        plainly = functional.linear if is_linear else (TRANSPOSED if transposed else CONVOLUTIONS)[dims]
        function = lambda s, weight: plainly(s, weight, None, **given) if given else plainly(s, weight)  # noqa: E731
        if self.table in ("GUIDED", "DECONVNET") and not transposed:
            return lambda grad, s: ordinary(grad, s, partial(function, weight=weight))
        if self.table in ("EXCITATION", "CONTRASTIVE") and not transposed:
            if role == "head":
                form = excitation_head if self.table == "EXCITATION" else contrastive_head
                return lambda grad, s: form(grad, s, function, weight)
            return lambda grad, s: excitation(grad, s, function, weight, plainly(s, weight, bias, **given))
        if role == "head":
            split = "weights" if self.table == "PAPER" else "contributions"
            places = (lambda s: range(1, s.dim() - 1)) if is_linear else lambda s: range(2, s.dim())
            return lambda grad, s: head(grad, s, function, weight, self.f, split, tuple(places(s)))
        if is_linear:
            return lambda grad, s: linear(grad, s, weight, bias)
        if transposed:
            return lambda grad, s: conv_transposed(grad, s, weight, bias, **given)
        return lambda grad, s: conv(grad, s, weight, bias, **given, merged=self.table == "PAPER")

    def enlarges(self, name, x, weight, held):
        """Whether a transposed convolution has as many channels before as after, and nothing bent since the last."""
        groups = held[0][5] if len(held[0]) > 5 else held[1].get("groups", 1)
        if not name.startswith("conv_transpose") or weight.shape[0] != weight.shape[1] * groups:
            return False
        return not any(m.name in ACTIVATIONS for m in walk([self.of(x)], lambda m: bool(m.weights)))

    def signal(self, a, b):
        """Which of two factors is the signal; None for a product of equals."""
        made = self.of(a), self.of(b)
        is_gate = [m.name in GATES for m in made]
        if is_gate[0] != is_gate[1]:
            return int(is_gate[0])
        sizes = [math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) for t in (a, b)]
        if sizes[0] != sizes[1]:
            return int(sizes[0] < sizes[1])
        if comes_from(made[1], made[0]):
            return 0
        if comes_from(made[0], made[1]):
            return 1
        is_bent = [m.name in ACTIVATIONS for m in made]
        return None if is_bent[0] == is_bent[1] else int(is_bent[0])


def writable(x, outputs):
    """Parts of a tensor as views of it by themselves, on which a network may write."""
    if not outputs or outputs[0]._base is None:
        return outputs
    return tuple(x.as_strided(o.shape, o.stride(), o.storage_offset()) for o in outputs)


def origin(made):
    """Where values were made that copies, views and constant factors hand on."""
    while made.name in MULTIPLES and len(made.sources) == 1:
        (made,) = made.sources
    return made


def comes_from(b, a):
    return any(made is origin(a) for made in walk([b]))


def canonical(name, function, args, kwargs, of):
    """One spelling: ``x + c`` for ``c + x``, ``linear`` for products with weights, ``input`` as the first argument."""
    kwargs = dict(kwargs)
    for key in ("input", "other", "mat2"):
        args = (*args, kwargs.pop(key)) if key in kwargs else args
    is_image = [isinstance(a, torch.Tensor) and of(a) is not None for a in args]
    if name in ("add", "mul", "sub", "rsub") and is_image == [False, True] and kwargs in ({}, {"alpha": 1}):
        name = {"sub": "rsub", "rsub": "sub"}.get(name, name)
        return name, found(name), args[::-1], {}
    if name in ("matmul", "mm", "rmatmul") and is_image == [True, False] and args[1].dim() == 2:
        return "linear", functional.linear, (args[0], args[1].mT), {}
    if name in ("matmul", "mm") and is_image == [False, True] and args[0].dim() == 2 and args[1].dim() == 3:
        return "conv1d", functional.conv1d, (args[1], args[0][:, :, None]), {}
    if name == "addmm" and is_image == [False, True, False] and args[0].dim() == 1 and not kwargs:
        return "linear", functional.linear, (args[1], args[2].mT, args[0]), {}
    return name, function, args, kwargs


def explain(network, images, target, table="PIXELS", f=None):
    """The map (N, *positions) of a network for one class (or a function of the output), under a table by its name.

    Returns the map and f, which None chooses as the table does.
    """

    def run(mode):
        leaf = images.detach().clone().requires_grad_()
        with torch.enable_grad(), mode:
            image = mode.enter(leaf)
            output = network(image)
            mode.in_target = True
            score = target(output) if callable(target) else output[:, target]
        return leaf, score

    mode = Literal(table)
    _, score = run(mode)
    above = list(walk([mode.of(score)], lambda made: bool(made.weights)))
    heads = [made for made in above if made.weights]
    first = [m for made in heads for source in made.sources for m in walk([source], lambda m: bool(m.weights))]
    if f is None:
        f = 0.75 if table == "PIXELS" and not any(m.weights == "vector" for m in first) else 1.0
    roles = {made.call: "head" if made.weights else "above" for made in above if made.call >= 0}
    roles |= {made.call: "head" for made in heads}
    if mode.shifts_image:  # a black pixel may be evidence too
        images = torch.where(images == 0, 1e-30, images)
    leaf, score = run(Literal(table, f, roles))
    (grad,) = torch.autograd.grad(score.sum(), leaf)
    return (leaf * grad).sum(1).detach(), f
