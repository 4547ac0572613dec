"""What a check is, what it finds, and how exceptions are excused."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from kdcore.errors import InputError, nearest

BASICS = ("runs", "term_shape", "weights_shape", "outputs", "frozen_eval", "determinism", "hidden_state")
"""Checks whose failure makes the rest of a component's checks meaningless."""


class Failed(AssertionError):  # noqa: N818 - a verdict
    """Raised by a check: the contract is broken, and how."""


class Skipped(Exception):  # noqa: N818 - a verdict
    """Raised by a check that does not apply, or that cannot be decided: why."""


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
        text = f"{self.verdict:<8}{self.component:<24} {self.check}"
        text += f": {self.why}" if self.why else ""
        text += f". Do: {self.what_to_do}" if self.failed and self.what_to_do else ""
        return " ".join(text.split("\n")) if "\n" in text else text


@dataclass(frozen=True)
class Check:
    """One rule of the contract. ``after``: checks that must not have failed for this one to mean anything."""

    name: str
    kinds: tuple[str, ...]
    rule: Callable[[Any], None]
    after: tuple[str, ...]

    @property
    def why(self) -> str:
        return self._doc[0]

    @property
    def what_to_do(self) -> str:
        return self._doc[1]

    @property
    def _doc(self) -> tuple[str, str]:
        why, _, todo = " ".join((inspect.getdoc(self.rule) or "").split()).partition(" Do: ")
        return why, todo.rstrip(".")

    def __call__(self, subject: Any, name: str) -> Finding:
        """The finding; an error that the rule did not foresee is a failure too."""
        try:
            with preserved(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a component warns of is not the contract's
                self.rule(subject)
        except Skipped as reason:
            return Finding(self.name, name, "skipped", str(reason))
        except Failed as fault:
            return Finding(self.name, name, "failed", str(fault), self.what_to_do)
        except Exception as error:  # a component may raise anything
            why = f"{type(error).__name__}: {error}"
            return Finding(self.name, name, "failed", why[:600], self.what_to_do)
        return Finding(self.name, name, "passed")


CHECKS: dict[str, Check] = {}


def check(
    *kinds: str, after: Sequence[str] = BASICS
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a rule for kinds (or ``plugin``). Its docstring says why it exists, then ``Do:`` what to do."""

    def register(rule: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[rule.__name__] = Check(rule.__name__, kinds, rule, tuple(after))
        return rule

    return register


def checks_of(kind: str) -> list[Check]:
    """A kind's checks, those that others rest on first."""
    found = [each for each in CHECKS.values() if kind in each.kinds]
    return sorted(found, key=lambda each: BASICS.index(each.name) if each.name in BASICS else len(BASICS))


def examine(kind: str, subject: Any, name: str, without: Collection[str] = ()) -> list[Finding]:
    """Every check of a kind but some, in order; what rests on a failed one is skipped and says so."""
    found: dict[str, Finding] = {}
    for each in [c for c in checks_of(kind) if c.name not in without]:
        broken = next((n for n in each.after if n != each.name and n in found and found[n].failed), None)
        if broken is None:
            found[each.name] = each(subject, name)
        else:
            found[each.name] = Finding(each.name, name, "skipped", f"{broken} failed: mend that first")
    return list(found.values())


def excused(findings: Sequence[Finding], expected: Mapping[str, str], place: str) -> list[Finding]:
    """Failures that were expected, for a reason, are skipped; an exception that is not needed is a failure."""
    out = list(findings)
    for name, reason in expected.items():
        if name not in CHECKS or not reason.strip():
            hint = nearest(name, CHECKS)
            raise InputError(
                f"{place}: expected_failures", "a known check and a reason are needed", given=name, hint=hint
            )
        places = [i for i, each in enumerate(out) if each.check == name]
        failed = [i for i in places if out[i].failed]
        for i in failed:
            out[i] = replace(out[i], verdict="skipped", why=f"expected: {reason} ({out[i].why})")
        if places and not failed:
            why = f"expected to fail ({reason}), and did not"
            out[places[0]] = replace(
                out[places[0]], verdict="failed", why=why, what_to_do="take the exception out"
            )
    return out


@contextmanager
def preserved(seed: int = 0) -> Iterator[None]:
    """Global random states of torch, numpy and Python: seeded inside, put back after."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        reseed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed visits every kind of device
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> tuple[Any, ...]:
    """The global generators' states, to compare."""
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2], random.getstate()
