"""The errors that a user meets: where, what was given, what is allowed, what to do. One screen each."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


class KDError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(KDError):
    """The input was wrong: a recipe, an argument, a file, a plugin that the input names.

    ``place`` is a dotted path into the recipe (``loss.0.temperature``), a file, or an argument. Where what
    was given is a string and ``allowed`` are names, the hint is the nearest of them. Whatever is passed,
    ``str`` stays under 20 lines of printable text.
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
        names = [] if allowed is None or isinstance(allowed, str) else list(itertools.islice(allowed, 10_000))
        if hint is None and isinstance(given, str):
            hint = nearest(given, names)
        self.place, self.problem, self.hint, self.source = place, problem, hint, ""
        self.given = None if given is _ABSENT else _shown(given)
        self.allowed = allowed if isinstance(allowed, str) else _listed(names, given)
        super().__init__(problem)

    def under(self, place: str) -> InputError:
        """This error, raised by a part that stands at ``place``."""
        self.place = ".".join(filter(None, (place, self.place)))
        return self

    def __str__(self) -> str:
        place, problem = fit(self.place, 200), fit(self.problem, 1500)
        rows = {"in": self.source, "given": self.given, "allowed": self.allowed, "hint": self.hint}
        shown = [f"  {label:<8}{fit(text, 1000)}" for label, text in rows.items() if text]
        return "\n".join([f"{place}: {problem}" if place else problem, *shown])


@contextmanager
def blame(place: str, problem: str, **said: Any) -> Iterator[None]:
    """What somebody else's code raises in this block as an InputError at ``place``, with ``problem`` before its words.

    What says more already passes as it is. ``said``: what InputError takes besides.
    """
    try:
        yield
    except (InputError, RunError, Interrupted):
        raise
    except (Exception, SystemExit) as error:  # a model, a loss, a data set may raise anything
        words = str(error) if isinstance(error, KDError) else cause(error)
        raise InputError(place, f"{problem}: {words}", **said) from error


class RunError(KDError):
    """A run that began and could not finish; the message says what was kept and how to go on."""


class Interrupted(KDError):  # noqa: N818 - a run that saved its state and left did not fail
    """The run was asked to stop (SIGTERM, Ctrl-C), saved its state and left."""

    exit_code = 3


def nearest(word: object, choices: Iterable[object], cutoff: float = 0.6) -> str | None:
    """``"did you mean 'x'?"``: the choices that ``word`` is a dotted part of, or the one spelt most like it, or None."""
    text, names = str(word).lower(), {str(choice).lower(): str(choice) for choice in choices}
    found = sorted(name for name in names if "." in name and text in name.split("."))[:6]
    if not found and len(text) <= 100:
        found = difflib.get_close_matches(text, names, n=1, cutoff=cutoff)
    return f"did you mean {' or '.join(repr(names[name]) for name in found)}?" if found else None


def cause(error: BaseException, limit: int = 300) -> str:
    """``TypeError: what it says`` on one line, also for an exception whose own message fails."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {fit(text, limit)}".removesuffix(": ")


def _listed(names: list[Any], given: object, most: int = 12) -> str:
    """All of a few names; of many those that are spelt most like what was given."""
    shown = [str(name) for name in names]
    if len(shown) <= most:
        return ", ".join(shown)
    near = difflib.get_close_matches(str(given)[:100], shown, most, 0.3) if isinstance(given, str) else []
    return f"{', '.join(near or shown[:most])}, ... ({len(shown)} in all)"


def _shown(value: Any) -> str:
    try:
        return fit(repr(value), 200)
    except Exception:  # a value that cannot show itself, or nested too deeply
        return f"<{type(value).__name__}>"


def fit(text: object, width: int) -> str:
    """On one line, at most so wide, and nothing in it that a terminal would obey."""
    line = " ".join(str(text).split())
    clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:width])
    return clean if len(line) <= width else f"{clean} ..."
