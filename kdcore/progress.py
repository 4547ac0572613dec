"""A progress bar with the time left (rich), or silence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Progress:
    """``task`` opens a bar of so many units; ``advance`` moves it; ``note`` shows metrics beside it."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0

    @contextmanager
    def task(self, title: str, total: int, unit: str = "steps") -> Iterator[None]:
        if self.quiet:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            "[progress.description]{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        # a log file gets one line a training instead of a bar that redraws itself
        with Bar(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
        ) as bar:
            self._bar, self._task = bar, bar.add_task(title, total=total, note="")
            yield
        if not console.is_terminal:
            self.say(f"{title}: {total} {unit} done")
        self._bar = None

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, note=" ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
