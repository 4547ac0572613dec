"""The errors that a user meets: where, what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_ABSENT = object()


class KDError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(KDError):
    """The input was wrong: a recipe, an argument, a file, a plugin that the input names.

    ``place`` is a dotted path into the recipe (``loss.0.temperature``), a file, or an argument.
    """

    exit_code = 2

    def __init__(
        self,
        place: str,
        problem: str,
        *,
        given: Any = _ABSENT,
        allowed: str | Iterable[str] | None = None,
        hint: str | None = None,
    ) -> None:
        self.place, self.problem, self.hint, self.source = place, problem, hint, ""
        self.given = None if given is _ABSENT else _short(given)
        self.allowed = allowed if allowed is None or isinstance(allowed, str) else ", ".join(map(str, allowed))
        super().__init__(problem)

    def __str__(self) -> str:
        rows = [f"{self.place}: {self.problem}" if self.place else self.problem]
        for label, text in (("in", self.source), ("given", self.given), ("allowed", self.allowed), ("hint", self.hint)):
            if text:
                rows.append(f"  {label:<8}{text}")
        return "\n".join(rows)


class RunError(KDError):
    """A run that began and could not finish; the message says what was kept and how to go on."""


class Interrupted(KDError):
    """The run was asked to stop (SIGTERM, Ctrl-C), saved its state and left."""

    exit_code = 3


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """``"did you mean 'x'?"`` for the choice that is spelt most like ``word``, or None."""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else None


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
