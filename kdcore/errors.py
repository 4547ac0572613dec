"""The errors that a user meets: where, what was given, what is allowed, what to do. One screen each."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Any

_ABSENT = object()


class KDError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(KDError):
    """The input was wrong: a recipe, an argument, a file, a plugin that the input names.

    ``place`` is a dotted path into the recipe (``loss.0.temperature``), a file, or an argument. Whatever
    is passed, ``str`` stays under 20 lines of printable text.
    """

    exit_code = 2

    def __init__(
        self,
        place: str,
        problem: str,
        *,
        given: Any = _ABSENT,
        allowed: str | Iterable[Any] | None = None,
        hint: str | None = None,
    ) -> None:
        self.place, self.problem, self.hint, self.source = place, problem, hint, ""
        self.given = None if given is _ABSENT else _short(given)
        self.allowed = allowed if allowed is None or isinstance(allowed, str) else _listed(allowed)
        super().__init__(problem)

    def __str__(self) -> str:
        place, problem = _fit(self.place, 1, 200), _fit(self.problem, 8, 1500)
        rows = [f"{place}: {problem}" if place else problem]
        for label, text in (
            ("in", self.source),
            ("given", self.given),
            ("allowed", self.allowed),
            ("hint", self.hint),
        ):
            if text:
                rows.append(f"  {label:<8}{_fit(text, 2, 1000)}")
        return "\n".join(rows)


class RunError(KDError):
    """A run that began and could not finish; the message says what was kept and how to go on."""


class Interrupted(KDError):  # noqa: N818 - a run that saved its state and left did not fail
    """The run was asked to stop (SIGTERM, Ctrl-C), saved its state and left."""

    exit_code = 3


def nearest(word: object, choices: Iterable[str]) -> str | None:
    """``"did you mean 'x'?"`` for the choice that is spelt most like ``word``, or None."""
    text, names = str(word).lower(), {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(text, names, n=1, cutoff=0.6) if len(text) <= 100 else []
    return f"did you mean {names[found[0]]!r}?" if found else None


def cause(error: BaseException, limit: int = 300) -> str:
    """``TypeError: what it says`` on one line, also for an exception whose own message fails."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {_fit(' '.join(text.split()), 1, limit)}".removesuffix(": ")


def _listed(values: Iterable[Any], most: int = 50) -> str:
    shown = [str(value) for value in itertools.islice(values, most + 1)]
    return ", ".join([*shown[:most], "..."] if len(shown) > most else shown)


def _short(value: Any, limit: int = 200) -> str:
    try:
        text = repr(value)
    except Exception:  # a value that cannot show itself, or nested too deeply
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fit(text: object, lines: int, width: int) -> str:
    """At most so many lines and characters, and nothing that a terminal would obey."""
    rows = str(text).strip().splitlines() if lines > 1 else [str(text)]
    shown = "\n".join(rows)
    cut = "\n".join(rows[:lines])[:width]
    clean = "".join(c if c.isprintable() or (c == "\n" and lines > 1) else ascii(c)[1:-1] for c in cut)
    return clean if cut == shown else f"{clean} ..."
