"""The mechanism: one forward and one backward of any model under a table of rules.

`mode` sees the model's calls, finds by `meeting` the rule of each, and puts `nodes` into autograd's graph. They carry a
`ruling` and run its rule in plain form (`tsgb.rules`), gradient in and gradient out, or hand `relevance` on: `starts`
says which can, `handing`, `pooling`, `joining` and `windows` how. `folding` runs convolution and batch norm as one.
`heads` finds in autograd's `graph` where the target comes from, `reading` notes on the way what makes a map of all
depths, `coverage` counts what met a rule, `scope` says what is refused. `operators` reads how torch spells its
operators, `saved` keeps what backward needs from in-place calls.
"""

from .coverage import CoverageError
from .folding import FoldedError
from .graph import is_all_of
from .heads import Heads
from .mode import Backprop, recording
from .reading import ApartError, Reading
from .relevance import Gradient, LostError, Owed, Product, Relevance, Summed, dense, summed

__all__ = [
    "ApartError",
    "Backprop",
    "CoverageError",
    "FoldedError",
    "Gradient",
    "Heads",
    "LostError",
    "Owed",
    "Product",
    "Reading",
    "Relevance",
    "Summed",
    "dense",
    "is_all_of",
    "recording",
    "summed",
]
