"""SIGTERM and Ctrl-C ask a run to save and leave; a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """The request to stop, as the handlers noted it: the signal's name."""

    _name = ""

    @classmethod
    def requested(cls) -> str:
        return cls._name

    @classmethod
    def note(cls, number: int, frame: FrameType | None) -> None:
        if cls._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        cls._name = signal.Signals(number).name


@contextmanager
def graceful() -> Iterator[None]:
    """Note the signals while the block runs (in the main thread only: Python delivers them there)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    Stop._name = ""
    before = {number: signal.signal(number, Stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        Stop._name = ""
