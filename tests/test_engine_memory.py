"""Views x in-place calls x copies x ``out=``: a program that writes in memory has the map of the same without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import reference
import tsgb
from tsgb import rules

WRITES = {
    "add_": lambda x: x.add_(0.3),
    "iadd": lambda x: x.__iadd__(-0.2),
    "mul_": lambda x: x.mul_(-1.5),
    "div_": lambda x: x.div_(2),
    "relu_": lambda x: x.relu_(),
    "F.relu": lambda x: functional.relu(x, inplace=True),
    "F.silu": lambda x: functional.silu(x, inplace=True),
    "clamp_": lambda x: x.clamp_(-0.3, 0.4),
    "clamp_min_": lambda x: x.clamp_min_(0.1),
    "neg_": lambda x: x.neg_(),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(0.7),
}
SAME = {
    "add_": lambda x: x + 0.3,
    "iadd": lambda x: x + -0.2,
    "mul_": lambda x: x * -1.5,
    "div_": lambda x: x / 2,
    "relu_": functional.relu,
    "F.relu": functional.relu,
    "F.silu": functional.silu,
    "clamp_": lambda x: x.clamp(-0.3, 0.4),
    "clamp_min_": lambda x: x.clamp_min(0.1),
    "neg_": lambda x: -x,
    "zero_": torch.zeros_like,
    "fill_": lambda x: torch.full_like(x, 0.7),
}
FROM = {
    "add_": (lambda x, y: x.add_(y), torch.add),
    "sub_": (lambda x, y: x.sub_(y), torch.sub),
    "copy_": (lambda x, y: x.copy_(y), lambda x, y: y),
    "setitem": (lambda x, y: x.__setitem__(..., y), lambda x, y: y),
    "gate": (lambda x, y: x.mul_(torch.sigmoid(y)), lambda x, y: x * torch.sigmoid(y)),
    "cat": (lambda x, y: x.copy_(torch.cat([y, x], 1)[:, : x.shape[1]]), lambda x, y: y),
}
OUT = {
    "add": (lambda x, y, o: torch.add(x, y, out=o), torch.add),
    "sub": (lambda x, y, o: torch.sub(x, y, out=o), torch.sub),
    "mul": (lambda x, y, o: torch.mul(x, 0.5, out=o), lambda x, y: x * 0.5),
    "clamp": (lambda x, y, o: torch.clamp(x, min=0, out=o), lambda x, y: x.clamp(min=0)),
}
TAKES = ("chunk", "clone", "contiguous", "flatten", "narrow", "reshape", "select", "slice", "transpose", "unsqueeze")


def taken(x, how, *arguments):
    """A view of a tensor, or a copy."""
    if how == "slice":
        dim, step = arguments
        return x[(*[slice(None)] * dim, slice(None, None, step))]
    if how == "chunk":
        return x.chunk(2, *arguments)[-1]
    return getattr(x, how)(*arguments)


class Cells:
    """Which cells of which buffer a tensor has, of one image; so that memory can be told of by index alone."""

    def __init__(self, buffer, shape, stride):
        self.buffer = buffer
        self.places = torch.arange(torch.Size(shape).numel()).as_strided(shape, stride)

    def taken(self, how, *arguments):
        """The same view, and whether it is a copy."""
        found = taken(self.places, how, *arguments)
        is_copy = found.untyped_storage().data_ptr() != self.places.untyped_storage().data_ptr()
        return found, is_copy

    @property
    def index(self):
        """(L,), of the first image: the others are behind it."""
        return self.places[0].flatten()


class Program:
    """Steps drawn at random on tensors (2, ...), of which the first is the root. Each step's tensors are by number."""

    def __init__(self, draw, shape, length):
        stride = torch.empty(shape).stride()
        self.shape, self.steps, self.cells = shape, [], [Cells(0, shape, stride)]
        self.buffers = 1
        for _ in range(draw(st.integers(1, length))):
            kind = draw(st.sampled_from(["take", "take", "write", "write", "from", "out", "put", "new"]))
            getattr(self, f"draw_{kind}")(draw)

    def pick(self, draw):
        return draw(st.integers(0, len(self.cells) - 1))

    def add(self, places, buffer=None):
        if buffer is None:
            buffer, self.buffers = self.buffers, self.buffers + 1
            self.cells.append(Cells(buffer, places.shape, places.stride()))
        else:
            cells = Cells.__new__(Cells)
            cells.buffer, cells.places = buffer, places
            self.cells.append(cells)

    def draw_take(self, draw):
        i = self.pick(draw)
        shape = self.cells[i].places.shape
        how = draw(st.sampled_from(TAKES))
        dims = st.integers(1, max(1, len(shape) - 1))
        if how in ("narrow", "select", "slice", "transpose") and len(shape) < 3:
            return
        if how == "narrow":
            dim = draw(dims)
            start = draw(st.integers(0, shape[dim] - 1))
            arguments = (dim, start, draw(st.integers(1, shape[dim] - start)))
        elif how == "select":
            dim = draw(dims)
            arguments = (dim, draw(st.integers(0, shape[dim] - 1)))
        elif how == "slice":
            arguments = (draw(dims), draw(st.integers(1, 3)))
        elif how == "chunk":
            arguments = (1,)
        elif how == "transpose":
            arguments = (draw(dims), draw(dims))
        elif how == "reshape":
            arguments = (shape[0], *draw(st.sampled_from([(-1,), (1, -1), (-1, shape[-1])])))
        elif how == "unsqueeze":
            arguments = (draw(dims),) if len(shape) < 5 else ()
            if not arguments:
                return
        else:
            arguments = (1,) if how == "flatten" else ()
        places, is_copy = self.cells[i].taken(how, *arguments)
        self.steps.append(("take", i, how, arguments, is_copy))
        self.add(places, None if is_copy else self.cells[i].buffer)

    def draw_write(self, draw):
        self.steps.append(("write", self.pick(draw), draw(st.sampled_from(sorted(WRITES)))))

    def draw_new(self, draw):
        i = self.pick(draw)
        self.steps.append(("new", i, draw(st.sampled_from(["mul_", "relu_", "add_"]))))
        self.add(torch.empty_like(self.cells[i].places))

    def partner(self, draw, i):
        """Another tensor of the same shape, and whether it has to be copied first, as torch forbids what overlaps."""
        shape = self.cells[i].places.shape
        j = draw(st.sampled_from([k for k, other in enumerate(self.cells) if other.places.shape == shape]))
        mine, theirs = self.cells[i], self.cells[j]
        return j, mine.buffer == theirs.buffer and bool(torch.isin(mine.index, theirs.index).any())

    def draw_from(self, draw):
        i = self.pick(draw)
        self.steps.append(("from", i, *self.partner(draw, i), draw(st.sampled_from(sorted(FROM)))))

    def draw_out(self, draw):
        i = self.pick(draw)
        self.steps.append(
            ("out", i, *self.partner(draw, i), *self.partner(draw, i), draw(st.sampled_from(sorted(OUT))))
        )

    def draw_put(self, draw):
        i = self.pick(draw)
        channels = self.cells[i].places.shape[1]
        rows = draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=3, unique=True))
        self.steps.append(("put", i, rows, draw(st.sampled_from(["constant", "own", "index_put_"]))))

    def in_memory(self, root):
        """Run it as it is written; give the last tensor."""
        found = [root]
        for kind, i, *rest in self.steps:
            if kind == "take":
                found.append(taken(found[i], rest[0], *rest[1]))
            elif kind == "write":
                WRITES[rest[0]](found[i])
            elif kind == "new":
                found.append(SAME[rest[0]](found[i]))
            elif kind == "from":
                j, overlaps, how = rest
                FROM[how][0](found[i], found[j].clone() if overlaps else found[j])
            elif kind == "out":
                j, overlaps, k, overlaps_too, how = rest
                parts = [found[n].clone() if o else found[n] for n, o in ((j, overlaps), (k, overlaps_too))]
                if torch.is_grad_enabled():  # which torch does not allow where gradients are kept
                    found[i].copy_(OUT[how][1](*parts))
                else:
                    OUT[how][0](*parts, found[i])
            else:
                rows, how = rest
                if how == "constant":
                    found[i][:, rows] = 0.25
                elif how == "own":
                    found[i][:, rows] = found[i][:, rows[::-1]]
                else:
                    places = torch.arange(2)[:, None], torch.tensor(rows)[None]
                    found[i].index_put_(places, found[i][places] * 0.5)
        return found[-1]

    def by_index(self, root):
        """Run it without writing on anything; give the root as it is in the end, and the last tensor."""
        buffers = [root.flatten(1), *[None] * (self.buffers - 1)]

        def read(k):
            cells = self.cells[k]
            values = buffers[cells.buffer].index_select(1, cells.index)
            return values.reshape(cells.places.shape)

        def write(k, values):
            cells = self.cells[k]
            buffer = buffers[cells.buffer]
            size = cells.index.numel() if buffer is None else buffer.shape[1]
            places = torch.arange(size)
            places[cells.index] = torch.arange(cells.index.numel()) + (0 if buffer is None else size)
            values = values.flatten(1) if buffer is None else torch.cat([buffer, values.flatten(1)], 1)
            buffers[cells.buffer] = values.index_select(1, places)

        count = 1
        for kind, i, *rest in self.steps:
            if kind == "take":
                if rest[2]:
                    write(count, taken(read(i), rest[0], *rest[1]))
                count += 1
            elif kind == "write":
                write(i, SAME[rest[0]](read(i)))
            elif kind == "new":
                write(count, SAME[rest[0]](read(i)))
                count += 1
            elif kind == "from":
                j, _, how = rest
                x, y = read(i), read(j)
                write(i, torch.cat([y, x], 1)[:, : x.shape[1]] if how == "cat" else FROM[how][1](x, y))
            elif kind == "out":
                j, _, k, _, how = rest
                write(i, OUT[how][1](read(j), read(k)))
            else:
                rows, how = rest
                parts = list(read(i).unbind(1))
                swapped = dict(zip(rows, rows[::-1], strict=True))
                for n in rows:
                    part = read(i)[:, n]
                    parts[n] = torch.full_like(part, 0.25) if how == "constant" else part * 0.5
                    if how == "own":
                        parts[n] = read(i)[:, swapped[n]]
                write(i, torch.stack(parts, 1))
        return read(0).reshape(self.shape), read(len(self.cells) - 1)


class Around(nn.Module):
    """A convolution before a program, a convolution and a linear layer behind it."""

    def __init__(self, program, writes):
        super().__init__()
        self.program, self.writes = program, writes
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, program.shape[1], 3), nn.Conv2d(program.shape[1], 4, 2)
        last = program.cells[-1].places[0].numel()
        self.head = nn.Linear(4 * (program.shape[2] - 1) * (program.shape[3] - 1) + last, 3)
        self.double().eval()

    def forward(self, x):
        x = functional.leaky_relu(self.first(x), 0.2)
        if self.writes:
            root = x.clone(memory_format=torch.contiguous_format)
            last = self.program.in_memory(root)
        else:
            root, last = self.program.by_index(x)
        return self.head(torch.cat([functional.relu(self.second(root)).flatten(1), last.flatten(1)], 1))


def check(draw, table, length):
    program = Program(draw, (2, 3, 3, 4), length)
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    written, computed = Around(program, True), Around(program, False)
    with torch.no_grad():
        assert torch.allclose(written(x), computed(x), rtol=1e-12, atol=1e-12), program.steps
    found, expected = (tsgb.explain(net, x, 1, rules=getattr(rules, table)).maps for net in (written, computed))
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12), program.steps
    literal, _ = reference.explain(computed, x, 1, table)
    assert torch.allclose(expected[:, 0], literal, rtol=1e-8, atol=1e-12), program.steps


@pytest.mark.parametrize("table", ["PIXELS", "PAPER"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_a_program_writes_in_memory_is_what_it_computes(table, data):
    check(data.draw, table, 6)


@pytest.mark.slow
@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_long_programs(data):
    check(data.draw, data.draw(st.sampled_from(["PIXELS", "PAPER"])), 16)
