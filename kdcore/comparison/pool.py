"""Jobs over processes: fresh interpreters (spawn) that are asked to save and leave when the parent is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from kdcore.errors import Interrupted, KDError, RunError
from kdcore.signals import Stop, graceful

J = TypeVar("J")
GRACE_SECONDS = 60.0
_leaving = False  # in a worker: it was told to stop, and begins no other job


def spread(work: Callable[[J], Any], jobs: Sequence[J], workers: int, done: Callable[[J, Any], None]) -> None:
    """Run ``work(job)`` for all jobs, ``workers`` at a time (1: in this process).

    ``done`` hears what each gave: for a job that failed, which does not stop the others, a RunError. SIGTERM or
    Ctrl-C stops them: the runs save their state, and Interrupted is raised.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            done(job, _attempt(work, job))
        return
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    with graceful(), ProcessPoolExecutor(min(workers, len(jobs)), spawn, _begin) as team:
        waiting = {team.submit(_attempt, work, job): job for job in jobs}
        while waiting:
            if stop := Stop.requested():
                team.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise Interrupted(f"stopped by {stop}; what was running has saved its state")
            for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                done(waiting.pop(future), _heard(future))


def _heard(future: Future[Any]) -> Any:
    try:
        return future.result()
    except Interrupted:
        raise
    except Exception as error:
        return RunError(f"its process died ({error}); was memory short?")


def _begin() -> None:
    """A worker's first act. Between jobs Ctrl-C is its parent's affair; should that die, so does it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    last = time.monotonic() + GRACE_SECONDS
    while not _leaving and time.monotonic() < last:  # its run saves its state
        time.sleep(0.1)
    os._exit(1)


def _attempt(work: Callable[[Any], Any], job: Any) -> Any:
    """What the job gives, or its error in words: many cannot be pickled."""
    global _leaving
    try:
        if _leaving:
            raise Interrupted("stopped")
        return work(job)
    except Interrupted:
        _leaving = multiprocessing.parent_process() is not None
        raise
    except KDError as error:
        return RunError(str(error))
    except Exception as error:  # a plugin may raise anything; one arm's fault must not cost the others
        at = traceback.extract_tb(error.__traceback__)[-1]
        return RunError(f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno}, in {at.name})")
