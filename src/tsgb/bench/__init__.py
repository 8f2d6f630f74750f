"""The bench evaluates saliency methods on the same annotated images, with the field's own protocols."""

from . import protocol
from .defaults import job
from .results import summary
from .results_view import printable
from .run import run
from .table import markdown
from .work import Job

__all__ = ["Job", "job", "markdown", "printable", "protocol", "run", "summary"]
