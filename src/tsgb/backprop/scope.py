"""What is out of scope, and refused where it is met: attention, recurrent layers, quantised weights."""

from __future__ import annotations

from collections.abc import Container

import torch

from . import operators
from .coverage import CoverageError
from .operators import Call

__all__ = ["refuse"]

# What mixes positions by what they hold, and by how many signals: of two a product is attention.
_MIXING = {
    **dict.fromkeys(("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"), 2),
    "multi_head_attention_forward": 2,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), 1),
}


def refuse(call: Call, known: Container[str]) -> None:
    """Refuse a call that met no rule and is out of scope.

    Args:
        call: it depends on the image. ``known``: operators for which the table has an entry, which lets them pass.

    Raises:
        CoverageError: says what the model does, and what can be done.
    """
    if any(isinstance(value, torch.ScriptObject) for value in (*call.args, *call.kwargs.values())):
        raise CoverageError(
            f"the model is quantised (`{call.name}`), and no gradient flows through packed weights: explain the float "
            "model that it was made of"
        )
    least = _MIXING.get(call.name)
    if least is None or call.name in known:
        return
    if sum(t.requires_grad for t in operators.tensors((call.args, call.kwargs))) < least:
        return
    does, what = f"runs a recurrent layer (`{call.name}`)", "recurrent networks and vision transformers are"
    if least > 1:
        does = f"multiplies two tensors that both come from the image (`{call.name}`), as attention does"
        what = "vision transformers are"
    raise CoverageError(
        f"the model {does}: TSGB explains convolutional networks, and {what} out of its scope. To go on all the same, "
        "give it a rule: rules={**tsgb.rules.DEFAULT, the function: tsgb.rules.ORDINARY}"
    )
