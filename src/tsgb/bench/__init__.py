"""The bench: saliency methods side by side, on the same annotated pictures, by the field's own protocols."""

from . import protocol
from .account import printable
from .defaults import job
from .results import summary
from .run import run
from .table import markdown
from .work import Job

__all__ = ["Job", "job", "markdown", "printable", "protocol", "run", "summary"]
