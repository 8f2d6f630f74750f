"""Which rule an operator has: a table of values, with torch functions among its keys, made ready for the tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..rules.tables import FUSION, HEAD, ORDINARY, F, Rule
from . import kinds
from .kinds import RelevanceRule
from .operators import AS_STRIDED, SCATTER, packet_of

__all__ = ["head_rules", "rules_of"]

_KINDS: dict[str, Callable[[Rule], RelevanceRule]] = {
    "activation": lambda rule: kinds.Activation(rule.name),
    "average": lambda rule: kinds.Average(),
    "concatenate": lambda rule: kinds.Concatenate(),
    "constant": lambda rule: kinds.Constant(),
    "copy": lambda rule: kinds.Copy(),
    "elementwise": lambda rule: kinds.Elementwise(),
    "formula": lambda rule: kinds.Formula(rule.formula, rule.name),  # type: ignore[arg-type]
    "gradient": lambda rule: kinds.Gradient(rule.name),
    "guided": lambda rule: kinds.Guided(rule.name),
    "max_pool": lambda rule: kinds.MaxPool(),
    "mean": lambda rule: kinds.Mean(),
    "permute": lambda rule: kinds.Permute(),
    "product": lambda rule: kinds.Product(has_gates=rule.name == "gate"),
    "reshape": lambda rule: kinds.Reshape(),
    "share": lambda rule: kinds.Share(rule.name, rule.name == "conv_merged_groups", checks_zeros=True),
    "share, fused": lambda rule: kinds.Share(rule.name, rule.name == "conv_merged_groups", checks_zeros=False),
    "shift": lambda rule: kinds.Shift(rule.name),
    "sum": lambda rule: kinds.Sum(has_shifts=rule.name == "shift"),
}
_OPTIONS = (HEAD, F, FUSION)


@lru_cache(maxsize=256)
def _made(rule: Rule, is_fused: bool) -> RelevanceRule:
    kind = "share, fused" if rule.kind == "share" and is_fused else rule.kind
    return _KINDS[kind](rule)


def rules_of(table: dict[Any, Any]) -> dict[Any, RelevanceRule]:
    """Make a table of values a table of rules, by operator.

    Raises:
        TypeError: a key that no single operator stands for.
    """
    is_fused = table.get(FUSION) is not None
    found: dict[Any, RelevanceRule] = {}
    for key, value in table.items():
        if key in _OPTIONS:
            continue
        packet = packet_of(key)
        if packet is None:
            raise TypeError(
                f"the rule for {getattr(key, '__name__', key)} has no place, as no single operator stands for it: give "
                "rules for the operators that it calls, such as torch.ops.aten.mul"
            )
        found[packet] = _made(value, is_fused) if isinstance(value, Rule) else kinds.Formula(value, None, key)
    for packet in (AS_STRIDED.overloadpacket, SCATTER.overloadpacket):  # how the tape reads and writes views
        found[packet] = kinds.Restride()
    return found


def head_rules(table: dict[Any, Any]) -> dict[Any, Any]:
    """Give the rules of operators with weights where they are the head, by operator; None for their own derivative."""
    return {packet_of(key): None if rule == ORDINARY else rule for key, rule in table[HEAD].items()}
