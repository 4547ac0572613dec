"""A progress bar with the time left (rich), or silence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any


def _nothing(**changes: Any) -> None:
    """What is shown where there is no bar."""


class Progress:
    """``task`` opens a bar of so many units; ``advance`` moves it; ``note`` shows metrics beside it."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._update: Callable[..., None] = _nothing

    @contextmanager
    def task(self, title: str, total: int, unit: str = "steps") -> Iterator[None]:
        if self.quiet:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console, text, note = (
            Console(stderr=True),
            "[progress.description]{task.description}",
            "{task.fields[note]}",
        )
        columns = text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note
        # a log file gets one line a training instead of a bar that redraws itself
        with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
            self._update = partial(bar.update, bar.add_task(title, total=total, note=""))
            yield
        if not console.is_terminal:
            self.say(f"{title}: {total} {unit} done")
        self._update = _nothing

    def advance(self, step: int) -> None:
        self._update(completed=step)

    def note(self, metrics: Mapping[str, float]) -> None:
        self._update(note=" ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
