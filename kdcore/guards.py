"""Guards: is every loss term alive, is the teacher what it should be, is anything NaN?

A term is looked at in the first step in which it has a weight: its value, the norm of its gradient at the
student's outputs, and its share of the sum of those norms. The first steps leave a fingerprint besides: two
runs whose fingerprints are equal began with the same weights and saw the same data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import RunError
from kdcore.types import Batch, Outputs

DEAD_SHARE = 0.01
WITNESSED_STEPS = 3
SAMPLED = 65_536  # elements of a weight that enter its digest, evenly spaced: large models take no time


@dataclass
class Reading:
    """One term at the step in which it was first there."""

    term: str
    step: int
    weight: float
    value: float
    gradient_norm: float
    share: float


@dataclass
class Guards:
    """What was seen, and the warnings that follow, in words."""

    readings: list[Reading] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    enabled: bool = True
    title: str = "training"  # the fit
    fingerprint: dict[str, Any] = field(default_factory=dict)
    _watched: Mapping[str, nn.Module] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def look(
        self,
        terms: Mapping[str, tuple[float, Tensor]],
        student: Iterable[Outputs],
        step: int,
        culprit: Callable[[], tuple[str, str] | None] = lambda: None,
    ) -> None:
        """Read the terms that are there for the first time, on their graph; ``student``: what it says.

        ``culprit``: place and name of what was not finite before any term was.
        """
        fresh = terms.keys() - {reading.term for reading in self.readings}
        if not fresh or not self.enabled:
            return
        roots = [root for outputs in student for root in _roots(outputs)]
        norms = {name: _norm(weight * value, roots) for name, (weight, value) in terms.items()}
        whole = sum(norm or 0.0 for norm in norms.values()) or 1.0
        for name, (weight, value) in terms.items():
            if name in fresh:
                norm = norms[name] or 0.0
                self.readings.append(Reading(name, step, weight, float(value.detach()), norm, norm / whole))
                self._judge(self.readings[-1], value.requires_grad and norms[name] is None, culprit)

    def _judge(self, r: Reading, aside: bool, culprit: Callable[[], tuple[str, str] | None]) -> None:
        """``aside``: the term trains a component's own parameters (a router's gate), and not the student."""
        if not math.isfinite(r.value) or not math.isfinite(r.gradient_norm):
            said = f"loss term {r.term!r} is {r.value} with gradient norm {r.gradient_norm} at step {r.step}"
            hint = 'inputs and outputs are finite: log of 0, lr, or precision (try "fp32")'
            if (found := culprit()) is not None:
                hint = f"{found[1]!r} of {found[0]} is not finite before any term is: look there"
            raise RunError(f"{said} of {self.title}.\n  hint    {hint}")
        if r.share < DEAD_SHARE and not aside:
            share = f"{100 * r.share:.2g} % of the gradient at the student's outputs"
            said = f"{share} (weight {r.weight:g}, value {r.value:.4g})"
            self.warnings.append(f"loss term {r.term!r} is dead: {said}. Raise its weight, or take it out.")

    def witness(self, batch: Batch, student: nn.Module, teachers: Mapping[str, nn.Module], step: int) -> None:
        """Note what the run began with: augmented batch and weights at step 0, ids of the first steps."""
        if step >= WITNESSED_STEPS or not self.enabled:
            return
        parts = batch.parts or {"main": batch}
        if step == 0:
            seen = {name: {k: v for k, v in part.items() if k != "id"} for name, part in parts.items()}
            weights = {name: digest(model.state_dict(), SAMPLED) for name, model in teachers.items()}
            self.fingerprint = {"batch": digest(seen), "student": digest(student.state_dict(), SAMPLED)}
            self.fingerprint |= {"teachers": weights, "ids": []}
        if "ids" in self.fingerprint:
            self.fingerprint["ids"].append(digest({name: part.get("id") for name, part in parts.items()}))

    def remember(self, teachers: Mapping[str, nn.Module]) -> None:
        """Note the frozen teachers' version counters: any in-place change of a weight or buffer moves them."""
        self._watched = teachers
        self._versions = {name: _version(teacher) for name, teacher in teachers.items()}

    def unchanged(self, teachers: Mapping[str, nn.Module]) -> None:
        """Raise where a frozen teacher was changed since ``remember``, or left eval mode."""
        for name, version in self._versions.items():
            if any(module.training for module in teachers[name].modules()):
                raise RunError(f"teacher {name!r} is in training mode: dropout and batch statistics are live")
            if _version(teachers[name]) != version:
                raise RunError(f"teacher {name!r} was changed during the run: something wrote to its weights")

    def as_dict(self) -> dict[str, Any]:
        terms = [asdict(r) for r in self.readings]
        return {"terms": terms, "warnings": list(self.warnings), "fingerprint": dict(self.fingerprint)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.readings = [Reading(**r) for r in state["terms"]]
        self.warnings = list(state["warnings"])
        self.fingerprint = dict(state.get("fingerprint", {}))
        self.remember(self._watched)  # a state was loaded, also into what components hold of a teacher


def digest(value: Any, limit: int | None = None) -> str:
    """16 hexadecimal digits of tensors (dtype, shape, bits), of mappings and lists of them, else of the repr.

    ``limit``: a tensor with more elements is sampled, evenly.
    """
    if isinstance(value, Mapping):
        value = [(str(key), digest(value[key], limit)) for key in sorted(value)]
    elif isinstance(value, list | tuple):
        value = [digest(each, limit) for each in value]
    if not isinstance(value, Tensor):
        return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
    flat = value.detach().reshape(-1)
    flat = flat[:: max(len(flat) // limit, 1)] if limit else flat
    state = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
    state.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def check_finite(logs: Mapping[str, Tensor], step: int, title: str) -> None:
    """Raise RunError naming the fit and the terms that are not finite."""
    values = {name: float(value) for name, value in logs.items()}
    if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
        hint = "lower train.optimizer.lr, set train.clip, or look at the terms' inputs"
        raise RunError(f"not finite at step {step} of {title}: {', '.join(bad)}.\n  hint    {hint}")


def _roots(outputs: Outputs) -> list[Tensor]:
    """The student's outputs that carry gradient: logits and taps, or the hidden states before an output layer."""
    values = [value for _, value in outputs.named()]
    values += [] if outputs.unembed is None else [outputs.unembed.hidden]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _norm(value: Tensor, roots: list[Tensor]) -> float | None:
    """The norm of the gradient at the roots; None where it reaches none of them."""
    if not value.requires_grad or not roots:
        return None
    grads = torch.autograd.grad(value, roots, retain_graph=True, allow_unused=True)
    squares = [float(grad.detach().double().square().sum()) for grad in grads if grad is not None]
    return math.sqrt(sum(squares)) if squares else None


def _version(module: nn.Module) -> int:
    return sum(t._version for t in [*module.parameters(), *module.buffers()])
