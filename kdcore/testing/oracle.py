"""Oracles: fixed tensors with a value and gradient from outside the code under test, through every path of a loss.

A plugin lists its own as ``ORACLES`` in the module ``oracle`` of its package, which nothing imports at listing.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore.kinds import FunctionLoss, Loss
from kdcore.signature import import_string, schema_of
from kdcore.types import Batch, Outputs

_SOURCE = re.compile(r"(\S+/\S+@[0-9a-f]{7,40}|closed form|brute force|library)\b.*", re.DOTALL)


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
    package = module.partition(".")[0]
    where = next((f"{m}.oracle" for m in (module, package) if _is_package(m)), None)
    if where is None or importlib.util.find_spec(where) is None:
        return []
    return list(getattr(importlib.import_module(where), "ORACLES", []))


def check_oracle(oracle: Oracle) -> list[str]:
    """Compare value and gradient on every path that the loss has; returns the paths.

    Raises AssertionError that names the path, what was expected and what came.
    """
    if not _SOURCE.fullmatch(oracle.source):
        raise AssertionError(f"{oracle}: source {oracle.source!r} is no repository@commit, closed form, brute force or library")
    trial = _Trial(oracle)
    for path, compare in trial.paths().items():
        try:
            compare()
        except AssertionError as error:
            raise AssertionError(f"{oracle}, {path}: {error} (source: {oracle.source})") from None
    return list(trial.paths())


class _Trial:
    """One oracle's loss with its tensors, and the ways to ask it."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.params = oracle, dict(oracle.params)
        self.loss, self.function = self._loss()
        self.tensors = {name: _tensor(value) for name, value in oracle.tensors.items()}
        self.size = len(next(iter(self.tensors.values())))

    def _loss(self) -> tuple[Loss, Callable[..., Any] | None]:
        of = self.oracle.of
        if isinstance(of, str) and of.startswith("loss:"):
            from kdcore.api import build

            loss: Loss = build("loss", of.removeprefix("loss:"), **self.params)
            return loss, getattr(loss, "function", None)
        function = import_string(of, self.oracle.name) if isinstance(of, str) else of
        return FunctionLoss(function, schema_of(function, self.oracle.name, is_loss=True).tensors, self.params), function

    def paths(self) -> dict[str, Callable[[], None]]:
        exact, single, low = self.oracle.tolerance
        found: dict[str, Callable[[], None]] = {}
        if self.function is not None:
            found["direct, float64"] = lambda: self._compare(self._direct, torch.float64, exact)
            found["direct, float32"] = lambda: self._compare(self._direct, torch.float32, single)
        found["component, float64"] = lambda: self._compare(self._component, torch.float64, exact)
        found["component, float32"] = lambda: self._compare(self._component, torch.float32, single)
        found["bf16 autocast"] = lambda: self._compare(self._component, torch.float32, low, amp=True)
        if not self.loss.couples_batch and self.size > 1:
            found["sample by sample"] = lambda: self._compare(self._by_sample, torch.float64, exact)
        if "mask" in self.tensors:
            found["masked positions replaced"] = lambda: self._compare(self._masked, torch.float64, exact)
        if self._chunkable():
            found["chunked"] = lambda: self._compare(self._chunked, torch.float64, exact)
        return found

    # ---- the paths --------------------------------------------------------------------------------

    def _direct(self, tensors: Mapping[str, Tensor]) -> Any:
        assert self.function is not None and isinstance(self.loss, FunctionLoss)
        return self.function(*(tensors.get(name) for name in self.loss.tensors), **self.params)

    def _component(self, tensors: Mapping[str, Tensor]) -> Any:
        """As the core calls it: outputs of two models, and a batch."""
        self.loss.to(next(t for t in tensors.values() if t.is_floating_point()).dtype)
        sides = {}
        for side in ("student", "teacher"):
            named = {n.removeprefix(f"{side}_"): t for n, t in tensors.items() if n.startswith(f"{side}_")}
            logits = named.pop("logits", None)
            sides[side] = Outputs(logits, *(tensors.get(n) for n in ("mask", "target")), tensors=named)
        batch = {n: t for n, t in tensors.items() if not n.startswith(("student_", "teacher_"))}
        count = len(next(iter(tensors.values())))
        return self.loss(sides["student"], sides["teacher"], Batch({"id": torch.arange(count), **batch}))

    def _by_sample(self, tensors: Mapping[str, Tensor]) -> Any:
        rows = [self._component({n: t[i : i + 1] for n, t in tensors.items()}) for i in range(self.size)]
        if isinstance(rows[0], dict):
            return {name: _joined([row[name] for row in rows]) for name in rows[0]}
        return _joined(rows)

    def _masked(self, tensors: Mapping[str, Tensor]) -> Any:
        hidden = ~tensors["mask"].bool()
        noise = {n: torch.linspace(-9, 9, t.numel(), dtype=t.dtype).view_as(t) for n, t in tensors.items() if t.is_floating_point()}
        changed = {
            n: torch.where(hidden.view(*hidden.shape, *[1] * (t.dim() - 2)), noise[n], t)
            if n in noise and t.shape[:2] == hidden.shape
            else t
            for n, t in tensors.items()
        }
        return self._component(changed)

    def _chunkable(self) -> bool:
        """A function of rows of logits (and their labels), one value a row."""
        if self.function is None or not isinstance(self.loss, FunctionLoss):
            return False
        names = set(self.loss.tensors)
        if not {"student_logits", "teacher_logits"} <= names or names - {"student_logits", "teacher_logits", "target"}:
            return False
        answer = self._direct(self.tensors)
        rows = {n: t.flatten(0, t.dim() - 2 if n.endswith("logits") else t.dim() - 1) for n, t in self.tensors.items()}
        if not isinstance(answer, Tensor) or answer.shape != self.tensors["student_logits"].shape[:-1]:
            return False
        return bool(torch.allclose(self._direct(rows), answer.flatten()))

    def _chunked(self, tensors: Mapping[str, Tensor]) -> Any:
        """Without logits in memory: hidden states that are the logits, and an identity as output layer."""
        from kdcore.functional import chunked
        from kdcore.types import Unembed

        student, teacher = (tensors[f"{side}_logits"] for side in ("student", "teacher"))
        eye = torch.eye(student.shape[-1], dtype=student.dtype)
        labels = {"target": tensors["target"]} if "target" in self.loss.tensors else {}
        sides = Unembed(student, eye), Unembed(teacher, eye)
        return chunked(self.function, *sides, tensors.get("mask"), per_token=labels, chunk_size=2, **self.params)

    # ---- comparing --------------------------------------------------------------------------------

    def _compare(
        self, path: Callable[[Mapping[str, Tensor]], Any], dtype: torch.dtype, tolerance: float, amp: bool = False
    ) -> None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()}
        roots = {n: tensors[n].clone().requires_grad_() for n in self.oracle.gradient}
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            answer = path({**tensors, **roots})
        expected = self.oracle.value
        for name, want in expected.items() if isinstance(expected, Mapping) else {"value": expected}.items():
            got = answer[name] if isinstance(answer, Mapping) else answer
            wanted = torch.as_tensor(want, dtype=torch.float64)
            _near(name, got if got.shape == wanted.shape else self._mean(got), wanted, tolerance)
        if roots:
            total = sum(map(self._mean, answer.values())) if isinstance(answer, Mapping) else self._mean(answer)
            found = torch.autograd.grad(total, list(roots.values()), allow_unused=True)
            for (name, root), got in zip(roots.items(), found, strict=True):
                wanted = torch.as_tensor(self.oracle.gradient[name], dtype=torch.float64)
                _near(f"gradient of {name}", torch.zeros_like(root) if got is None else got, wanted, tolerance)

    def _mean(self, answer: Tensor) -> Tensor:
        mask = self.tensors.get("mask")
        if mask is None or answer.dim() < 2:
            return answer.mean()
        return answer.masked_fill(~mask.bool(), 0.0).sum() / mask.sum()


def _near(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise AssertionError(f"{name} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    got = got.detach().double()
    gap, scale = (got - wanted).abs(), max(float(wanted.abs().max()), 1e-12)
    if not math.isfinite(float(gap.max())) or float(gap.max()) > tolerance * scale:
        at = int(gap.nan_to_num(math.inf).argmax())
        pair = f"{got.flatten()[at].item():.8g}, expected {wanted.flatten()[at].item():.8g}"
        raise AssertionError(f"{name} is {pair}: {float(gap.max()) / scale:.2g} of the scale, allowed {tolerance:g}")


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).mean() if rows[0].dim() == 0 else torch.cat(list(rows))


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Seeded):
        return torch.from_numpy(np.random.RandomState(value.seed).standard_normal(value.shape) * value.scale)
    found = torch.as_tensor(value)
    return found.double() if found.is_floating_point() else found


def _is_package(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.submodule_search_locations is not None
