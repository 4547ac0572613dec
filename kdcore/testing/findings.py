"""What a check is, what it finds, and how exceptions are excused."""

from __future__ import annotations

import inspect
import pickle
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from kdcore.errors import InputError, cause, nearest

DECLARED = ("imports", "kind", "schema", "events")
BASICS = (
    *DECLARED,
    "runs",
    "term_shape",
    "weights_shape",
    "outputs",
    "frozen_eval",
    "determinism",
    "hidden_state",
)
"""Checks whose failure makes the rest of a component's checks meaningless, in their order."""


class Failed(AssertionError):  # noqa: N818 - a verdict
    """Raised by a check: the contract is broken, and how."""


class Skipped(Exception):  # noqa: N818 - a verdict
    """Raised by a check that does not apply, or that cannot be decided: why."""


def fail_if(wrong: object, how: str) -> None:
    if wrong:
        raise Failed(how)


def skip_if(idle: object, why: str) -> None:
    if idle:
        raise Skipped(why)


@dataclass(frozen=True)
class Finding:
    """The verdict of one check on one component; a line when printed."""

    check: str
    component: str
    verdict: Literal["passed", "failed", "skipped"]
    why: str = ""
    what_to_do: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict == "failed"

    def __str__(self) -> str:
        text = ": ".join(filter(None, (f"{self.verdict:<8}{self.component:<24} {self.check}", self.why)))
        todo = f". Do: {self.what_to_do}" if self.failed and self.what_to_do else ""
        return f"{text}{todo}".replace("\n", " ")


@dataclass(frozen=True)
class Check:
    """One rule of the contract. ``after``: checks that must not have failed for this one to mean anything.

    A rule of two arguments is asked about each of the subject's calls.
    """

    name: str
    kinds: tuple[str, ...]
    rule: Callable[..., None]
    after: tuple[str, ...]
    why: str
    what_to_do: str

    def __call__(self, subject: Any, title: str) -> Finding:
        """The finding; an error that the rule did not foresee is a failure too."""
        each_call = len(inspect.signature(self.rule).parameters) == 2
        try:
            with preserved(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a component warns of is not the contract's
                for arguments in [(subject, call) for call in subject.calls] if each_call else [(subject,)]:
                    self.rule(*arguments)
        except Skipped as reason:
            return Finding(self.name, title, "skipped", str(reason))
        except Exception as error:  # a component may raise anything
            why = str(error) if isinstance(error, Failed) else cause(error, 600)
            return Finding(self.name, title, "failed", why.removeprefix("InputError: "), self.what_to_do)
        return Finding(self.name, title, "passed")


CHECKS: dict[str, Check] = {}


def check(*kinds: str, after: Sequence[str] = BASICS) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a rule for kinds (or ``plugin``). Its docstring says why it exists, then ``Do:`` what to do."""

    def register(rule: Callable[..., None]) -> Callable[..., None]:
        why, _, todo = " ".join((rule.__doc__ or "").split()).partition(" Do: ")
        name = rule.__name__
        CHECKS[name] = Check(name, kinds, rule, tuple(after), why, todo.rstrip("."))
        return rule

    return register


def checks_of(kind: str) -> list[Check]:
    """A kind's checks, those that others rest on first."""
    found = [each for each in CHECKS.values() if kind in each.kinds]
    return sorted(found, key=lambda each: BASICS.index(each.name) if each.name in BASICS else len(BASICS))


def examine(kind: str, subject: Any, title: str, without: Collection[str] = ()) -> list[Finding]:
    """Every check of a kind but some, in order; what rests on a failed one is skipped and says so."""
    found, broken = [], {}  # type: list[Finding], dict[str, str]
    for each in [c for c in checks_of(kind) if c.name not in without]:
        culprit = next((broken[name] for name in each.after if name in broken), None)
        blocked = Finding(each.name, title, "skipped", f"{culprit} failed: mend that first")
        found.append(blocked if culprit else each(subject, title))
        if culprit or found[-1].failed:
            broken[each.name] = culprit or each.name
    return found


def excused(findings: Sequence[Finding], expected: Mapping[str, str], place: str) -> list[Finding]:
    """Failures that were expected, for a reason, are skipped; an exception that is not needed is a failure."""
    out = list(findings)
    for name, reason in expected.items():
        if name not in CHECKS or not reason.strip():
            problem, hint = "a known check and a reason are needed", nearest(name, CHECKS)
            raise InputError(f"{place}: expected_failures", problem, given=name, hint=hint)
        places = [i for i, each in enumerate(out) if each.check == name]
        failed = [i for i in places if out[i].failed]
        for i in failed:
            out[i] = replace(out[i], verdict="skipped", why=f"expected: {reason} ({out[i].why})")
        if places and not failed:
            why, todo = f"expected to fail ({reason}), and did not", "take the exception out"
            out[places[0]] = replace(out[places[0]], verdict="failed", why=why, what_to_do=todo)
    return out


@contextmanager
def preserved() -> Iterator[None]:
    """Global random generators are seeded inside and put back after; tensors this small want one thread."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        reseed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads(threads)


def reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed visits every kind of device
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> bytes:
    """The global generators' states, to compare."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))
