"""Oracles: fixed tensors with a value and gradient from outside the code under test, through every path of a loss.

A plugin lists its own as ``ORACLES`` in the module ``oracle`` of its package, which nothing imports at listing.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore.building import Builder
from kdcore.function_loss import FunctionLoss
from kdcore.kinds import Loss
from kdcore.signature import import_string, schema_of
from kdcore.testing.tensors import gradients, mapped, noise_where
from kdcore.types import Batch, Outputs, Unembed

_SOURCE = re.compile(r"(\S+/\S+@[0-9a-f]{7,40}|closed form|brute force|library)\b.*", re.DOTALL)
Tensors = Mapping[str, Tensor]
Path = Callable[[Tensors], Any]
SIDES = ("student_", "teacher_")


@dataclass(frozen=True)
class Seeded:
    """A tensor of normal numbers from numpy's frozen generator RandomState(seed), times ``scale``."""

    seed: int
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Oracle:
    """What a loss must give, and where that is known from.

    ``of``: a function ``package.module:name`` (or itself), or a component ``"loss:NAME"``. ``tensors``: by the
    function's argument names (``student_logits``, ``teacher_logits``, ``target``, ...); for a component,
    ``student_X`` and ``teacher_X`` are outputs, the rest the batch. Values are nested lists or Seeded.
    ``value``: of the answer as it is, or if a number where the answer is none, of its mean over samples (over
    unmasked positions). ``gradient``: of that mean, by tensor.
    ``source``: ``repository@commit``, ``closed form: ...``, ``brute force: ...`` or ``library: ...``.
    ``tolerance``: relative to the largest expected entry, in float64, float32 and under bf16 autocast.
    """

    name: str
    of: str | Callable[..., Any]
    tensors: Mapping[str, Any]
    value: Any
    source: str
    gradient: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    tolerance: tuple[float, float, float] = (1e-6, 1e-4, 5e-2)

    def __str__(self) -> str:
        return self.name


def oracles_of(module: str) -> list[Oracle]:
    """The oracles of a plugin, by its entry-point module; none where it lists none."""
    root = importlib.import_module(module.partition(".")[0])
    where = f"{root.__name__}.oracle"
    there = hasattr(root, "__path__") and importlib.util.find_spec(where)  # a plugin of one file has none
    return list(importlib.import_module(where).ORACLES) if there else []


def check_oracle(oracle: Oracle) -> list[str]:
    """Compare value and gradient on every path that the loss has; returns the paths.

    Raises AssertionError that names the path, what was expected and what came.
    """
    if not _SOURCE.fullmatch(oracle.source):
        allowed = "repository@commit, closed form, brute force, library"
        raise AssertionError(f"{oracle}: source {oracle.source!r} is none of: {allowed}")
    trial = _Trial(oracle)
    paths = trial.paths()
    for path, (ask, dtype, tolerance) in paths.items():
        try:
            trial.compare(ask, dtype, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{oracle}, {path}: {error} (source: {oracle.source})") from None
    return list(paths)


class _Trial:
    """One oracle's loss with its tensors, and the ways to ask it."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.params, of = oracle, dict(oracle.params), oracle.of
        self.tensors = {name: _tensor(value) for name, value in oracle.tensors.items()}
        self.size = len(next(iter(self.tensors.values())))
        if isinstance(of, str) and of.startswith("loss:"):
            self.loss: Loss = Builder(0).make("loss", of.removeprefix("loss:"), self.params, oracle.name)
        else:
            function = import_string(of, oracle.name) if isinstance(of, str) else of
            names = schema_of(function, oracle.name, is_loss=True).tensors
            self.loss = FunctionLoss(function, names, self.params)

    def paths(self) -> dict[str, tuple[Path, torch.dtype, float]]:
        exact, single, low = self.oracle.tolerance
        plain, several = isinstance(self.loss, FunctionLoss), self.size > 1 and not self.loss.couples_batch
        double, float_ = torch.float64, torch.float32
        rows: list[tuple[str, bool, Path, torch.dtype, float]] = [
            ("component, float64", True, self._component, double, exact),
            ("component, float32", True, self._component, float_, single),
            ("bf16 autocast", True, self._autocast, float_, low),
            ("direct, float64", plain, self._direct, double, exact),
            ("direct, float32", plain, self._direct, float_, single),
            ("sample by sample", several, self._by_sample, double, exact),
            ("masked positions replaced", "mask" in self.tensors, self._masked, double, exact),
            ("chunked", self._row_by_row(), self._chunked, double, exact),
        ]
        return {name: (ask, dtype, tolerance) for name, applies, ask, dtype, tolerance in rows if applies}

    def _direct(self, tensors: Tensors) -> Any:
        assert isinstance(self.loss, FunctionLoss)
        return self.loss.function(*(tensors.get(name) for name in self.loss.tensors), **self.params)

    def _component(self, tensors: Tensors) -> Any:
        """As the core calls it: with outputs of two models, and a batch."""
        self.loss.to(next(t for t in tensors.values() if t.is_floating_point()).dtype)
        return self.loss(*map(partial(self._outputs, tensors), SIDES), self._batch(tensors))

    def _outputs(self, tensors: Tensors, side: str) -> Outputs:
        named: dict[str, Any] = {n.removeprefix(side): t for n, t in tensors.items() if n.startswith(side)}
        return Outputs(named.pop("logits", None), tensors.get("mask"), tensors.get("target"), tensors=named)

    def _batch(self, tensors: Tensors) -> Batch:
        values = {n: t for n, t in tensors.items() if not n.startswith(SIDES)}
        return Batch({"id": torch.arange(len(next(iter(tensors.values())))), **values})

    def _autocast(self, tensors: Tensors) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self._component(tensors)

    def _by_sample(self, tensors: Tensors) -> Any:
        rows = [_named(self._component({n: t[[i]] for n, t in tensors.items()})) for i in range(self.size)]
        terms = {name: [row[name] for row in rows] for name in rows[0]}
        return {name: torch.cat(each) if each[0].dim() else torch.stack(each) for name, each in terms.items()}

    def _masked(self, tensors: Tensors) -> Any:
        return self._component(mapped(tensors, noise_where(~tensors["mask"].bool())))

    def _row_by_row(self) -> bool:
        """Whether the loss is a function of rows of logits, and perhaps their labels, with one value a row."""
        names = self.loss.tensors if isinstance(self.loss, FunctionLoss) else ()
        if names[:2] != ("student_logits", "teacher_logits") or set(names[2:]) - {"target"}:
            return False
        answer = self._direct(self.tensors)
        rows = {n: t.flatten(0, t.dim() - 1 - n.endswith("logits")) for n, t in self.tensors.items()}
        one_each = isinstance(answer, Tensor) and answer.shape == self.tensors["student_logits"].shape[:-1]
        return one_each and bool(torch.allclose(self._direct(rows), answer.flatten()))

    def _chunked(self, tensors: Tensors) -> Any:
        """As the core calls it without logits: their hidden states are the logits, the output layer is 1."""
        sides, eye = [], torch.eye(tensors["student_logits"].shape[-1]).to(tensors["student_logits"])
        for said in map(partial(self._outputs, tensors), SIDES):
            sides.append(replace(said, logits=None, unembed=Unembed(said["logits"], eye)))
        return self.loss(*sides, self._batch(tensors))

    def compare(self, ask: Path, dtype: torch.dtype, tolerance: float) -> None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()}
        roots = {n: tensors[n].clone().requires_grad_() for n in self.oracle.gradient}
        said: dict[str, Tensor] = _named(ask({**tensors, **roots}))
        if any(each.dtype != torch.float64 for each in said.values()):  # softmax in float32 is the convention
            tolerance = max(tolerance, self.oracle.tolerance[1])
        for name, value in _named(self.oracle.value).items():
            wanted, got = torch.as_tensor(value, dtype=torch.float64), said[name]
            _near(name, got if got.shape == wanted.shape else self._mean(got), wanted, tolerance)
        total = torch.stack([self._mean(each) for each in said.values()]).sum()
        for name, grad in gradients(total, roots).items():
            wanted = torch.as_tensor(self.oracle.gradient[name], dtype=torch.float64)
            got = torch.zeros_like(roots[name]) if grad is None else grad
            _near(f"gradient of {name}", got, wanted, tolerance)

    def _mean(self, answer: Tensor) -> Tensor:
        """Over samples, or over unmasked positions."""
        mask = self.tensors.get("mask")
        return (answer if mask is None or answer.dim() < 2 else answer[mask.bool()]).mean()


def _near(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise AssertionError(f"{name} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    got = got.detach().double()
    gaps = (got - wanted).abs().nan_to_num(torch.inf) / max(float(wanted.abs().max()), 1e-12)
    if float(gaps.max()) > tolerance:
        at = int(gaps.argmax())
        pair = f"{got.flatten()[at].item():.8g}, expected {wanted.flatten()[at].item():.8g}"
        raise AssertionError(f"{name} is {pair}: {float(gaps.max()):.2g} of the scale, allowed {tolerance:g}")


def _named(answer: Any) -> dict[str, Any]:
    return dict(answer) if isinstance(answer, Mapping) else {"value": answer}


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Seeded):
        return torch.from_numpy(np.random.RandomState(value.seed).standard_normal(value.shape) * value.scale)
    found = torch.as_tensor(value)
    return found.double() if found.is_floating_point() else found
