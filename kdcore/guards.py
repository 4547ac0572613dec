"""Guards: is every loss term alive, is the teacher what it should be, is anything NaN?

A term is looked at in the first step in which it has a weight: its value, the norm of its gradient at the
student's outputs, and its share of the sum of those norms. The first steps leave a fingerprint besides: two
runs whose fingerprints are equal began with the same weights and saw the same data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import parallel
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
    fingerprint: dict[str, Any] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def look(self, terms: Mapping[str, tuple[float, Tensor]], student: Iterable[Outputs], step: int) -> None:
        seen = {reading.term for reading in self.readings}
        fresh = [name for name in terms if name not in seen]
        if not fresh or not self.enabled:
            return
        roots = [v for o in student for v in _roots(o)]
        norms = {name: _norm(weight * value, roots) for name, (weight, value) in terms.items()}
        whole = sum(norms.values()) or 1.0
        for name in fresh:
            weight, value = terms[name]
            reading = Reading(name, step, weight, float(value.detach()), norms[name], norms[name] / whole)
            self.readings.append(reading)
            self._judge(reading, aside=value.requires_grad and not _reaches(value, roots))

    def _judge(self, r: Reading, aside: bool) -> None:
        """``aside``: the term trains a component's own parameters (a router's gate), and not the student."""
        if not math.isfinite(r.value) or not math.isfinite(r.gradient_norm):
            raise RunError(
                f"loss term {r.term!r} is {r.value} with gradient norm {r.gradient_norm} at step {r.step}.\n"
                '  hint    look at its inputs (inf logits, log of 0), lower lr, or use precision = "fp32"'
            )
        if r.share < DEAD_SHARE and not aside:
            self.warnings.append(
                f"loss term {r.term!r} is dead: {100 * r.share:.2g} % of the gradient at the student's outputs "
                f"(weight {r.weight:g}, value {r.value:.4g}). Raise its weight, or take it out."
            )

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
        self._versions = {name: _version(teacher) for name, teacher in teachers.items()}

    def unchanged(self, teachers: Mapping[str, nn.Module]) -> None:
        """Raise where a frozen teacher was changed since ``remember``, or left eval mode."""
        for name, version in self._versions.items():
            if any(module.training for module in teachers[name].modules()):
                raise RunError(
                    f"teacher {name!r} is in training mode: its dropout and batch statistics are live"
                )
            if _version(teachers[name]) != version:
                raise RunError(f"teacher {name!r} was changed during the run: something wrote to its weights")

    def as_dict(self) -> dict[str, Any]:
        terms = [asdict(r) for r in self.readings]
        return {"terms": terms, "warnings": list(self.warnings), "fingerprint": dict(self.fingerprint)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.readings = [Reading(**r) for r in state["terms"]]
        self.warnings = list(state["warnings"])
        self.fingerprint = dict(state.get("fingerprint", {}))


def digest(value: Any, limit: int | None = None) -> str:
    """16 hexadecimal digits of tensors (dtype, shape, bits), of mappings and lists of them, else of the repr.

    ``limit``: a tensor with more elements is sampled, evenly.
    """
    state = hashlib.blake2b(digest_size=8)
    if isinstance(value, Tensor):
        flat = parallel.whole(value.detach()).reshape(-1)
        flat = flat[:: max(len(flat) // limit, 1)] if limit else flat
        state.update(f"{value.dtype} {tuple(value.shape)}".encode())
        state.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        state.update(repr([(str(k), digest(value[k], limit)) for k in sorted(value)]).encode())
    elif isinstance(value, list | tuple):
        state.update(repr([digest(each, limit) for each in value]).encode())
    else:
        state.update(repr(value).encode())
    return state.hexdigest()


def check_finite(logs: Mapping[str, Tensor], step: int) -> None:
    """Raise RunError naming the terms that are not finite."""
    bad = [name for name, value in logs.items() if not math.isfinite(float(value))]
    if bad:
        raise RunError(
            f"not finite at step {step}: {', '.join(f'{name} = {float(logs[name])}' for name in bad)}.\n"
            "  hint    lower train.optimizer.lr, set train.clip, or look at the terms' inputs"
        )


def _roots(outputs: Outputs) -> Iterable[Tensor]:
    """The student's outputs that carry gradient: logits and taps, or the hidden states before an output layer."""
    values = [v for _, v in outputs.named()]
    if outputs.unembed is not None:
        values.append(outputs.unembed.hidden)
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def _norm(value: Tensor, roots: list[Tensor]) -> float:
    if not value.requires_grad or not roots:
        return 0.0
    grads = torch.autograd.grad(value, roots, retain_graph=True, allow_unused=True)
    squares = [float(g.detach().double().square().sum()) for g in grads if g is not None]
    return math.sqrt(sum(squares))


def _reaches(value: Tensor, roots: list[Tensor]) -> bool:
    grads = torch.autograd.grad(value, roots, retain_graph=True, allow_unused=True) if roots else ()
    return any(grad is not None for grad in grads)


def _version(module: nn.Module) -> int:
    return sum(t._version for t in [*module.parameters(), *module.buffers()])
