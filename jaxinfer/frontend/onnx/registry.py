"""Which function implements which operator, from which opset version on.

`@op("Softmax", since=13)` registers the behaviour that ONNX gave Softmax at version 13. A model of opset 17 takes the
highest one registered at or below 17: versions that only allowed more types need no entry of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

IGNORED = {"consumed_inputs"}  # an in-place hint of opsets 1 to 5
ANY = -1  # in `shaping`: every input


@dataclass(frozen=True)
class Rule:
    """`run(node, *inputs, **attributes)` returns the output, or a tuple of outputs.

    `shaping` lists the positions of inputs whose values must be known while tracing. `shapes_only` says that nothing
    but the shapes of its inputs is read. `fixed` is False where the same inputs need not give the same output.
    """

    run: Callable[..., Any]
    since: int
    shaping: tuple[int, ...] = ()
    shapes_only: bool = False
    fixed: bool = True
    attributes: frozenset[str] = field(default=frozenset())

    def shapes_by(self, position: int) -> bool:
        return position in self.shaping or ANY in self.shaping


_RULES: dict[tuple[str, str], list[Rule]] = {}


def op(*names: str, since: int = 1, domain: str = "", **traits: Any) -> Callable[[F], F]:
    """Register a function for these operators. Its keyword-only parameters are the attributes that it understands."""

    def register(run: F) -> F:
        parameters = inspect.signature(run).parameters.values()
        attributes = frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        for name in names:
            rules = _RULES.setdefault((domain, name), [])
            if any(rule.since == since for rule in rules):
                raise ValueError(f"{name} has two implementations since opset {since}")
            rules.append(Rule(run, since, attributes=attributes | IGNORED, **traits))
            rules.sort(key=lambda rule: rule.since)
        return run

    return register


def lookup(name: str, domain: str, version: int) -> Rule | None:
    """The rule that holds at `version`, or None if there is none at or below it."""
    return next((rule for rule in reversed(_RULES.get((domain, name), [])) if rule.since <= version), None)


def versions(name: str, domain: str = "") -> list[int]:
    """The opset versions at which `name` has an implementation of its own."""
    return [rule.since for rule in _RULES.get((domain, name), [])]
