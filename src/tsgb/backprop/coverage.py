"""Which operators of a forward met which rules, and which met none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial
from typing import Any

from .. import rules
from .ruling import Ruling

__all__ = ["Coverage", "CoverageError"]


class CoverageError(RuntimeError):
    """The rules do not cover the model, so that its map would not be TSGB's."""


class Coverage:
    """What was met in one forward.

    Attributes:
        met: the rulings of operators that met a rule, in order.
        unruled: how often an operator was met by no rule: by its name and `rules.ORDINARY` where the table says that it
            keeps its own gradient, None where the table does not know it.
        unseen: how often nodes of a kind came about behind the mechanism's back.
        noted: names of operators that the table does not know and that are noted on their nodes.

    Example:
        >>> coverage = Coverage()
        >>> coverage.unruled["flatten", rules.ORDINARY] += 1
        >>> coverage.rows()
        [('flatten', 'ordinary', 1)]
    """

    def __init__(self) -> None:
        self.met: list[Ruling] = []
        self.unruled: Counter[tuple[str, str | None]] = Counter()
        self.unseen: Counter[str] = Counter()
        self.noted: set[str] = set()

    def keep(self, reached: Collection[str]) -> None:
        """Leave out operators that the table does not know and that the target does not come from."""
        for name in self.noted - set(reached):
            del self.unruled[name, None]

    def count_above(self, name: str) -> None:
        """Count an operator above the head, which needs no rule, as one that keeps its own gradient."""
        if self.unruled[name, None]:
            self.unruled[name, None] -= 1
            self.unruled[name, rules.ORDINARY] += 1

    def check_positions(self) -> None:
        """Refuse a model that the rules cannot reach below its head.

        Raises:
            CoverageError: no operator with weights acts on the positions of a map.
        """
        weighted = [ruling for ruling in self.met if ruling.head_rule is not None]
        if all(ruling.is_linear or ruling.on_vector for ruling in weighted):
            seen = ", ".join(sorted({name for name, _, _ in self.rows()}))
            raise CoverageError(
                "the model has no convolution that the rules know: TSGB explains convolutional networks, and a plain "
                f"gradient is not passed off as its map (operators seen: {seen})"
            )

    def rows(self) -> list[tuple[str, str | None, int]]:
        """List which operator met which rule how often; None for a weighted or curved operator that met none."""
        rows = +self.unruled + Counter({(name, None): count for name, count in self.unseen.items()})
        for ruling in self.met:
            rule = _name(ruling.rule if ruling.f is None else ruling.head_rule)
            rows[ruling.name, rules.ORDINARY if ruling.is_ordinary else rule] += 1
        return sorted(
            ((name, rule, count) for (name, rule), count in rows.items()), key=lambda row: (row[0], row[1] or "")
        )


def _name(rule: Any) -> str:
    return _name(rule.func) if isinstance(rule, partial) else getattr(rule, "__name__", type(rule).__name__)
