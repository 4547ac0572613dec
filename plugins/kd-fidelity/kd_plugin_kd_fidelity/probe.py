"""The probe: what one run's student, its teachers and the student alone say of the same held-out items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_kd_fidelity.measures import agreement, calibration_error, fidelity
from kdcore import InputError, Probe
from kdcore.types import Batch, Outputs

Split = Literal["train", "tune", "val", "test"]
Said = dict[str, Tensor]  # logits [N,C] and target [N], of the supervised items or tokens


class KDFidelity(Probe):
    """Accuracy, calibration error, and agreement and fidelity with each teacher, of the student and of the student alone.

    Measured on ``split`` once the training is over; ``choice`` is the accuracy on ``choose_on``, which
    temperatures may be chosen by. The student alone is there where the recipe has ``report.baseline``; then
    ``improvement`` and the gains of agreement and fidelity are told, which need not go together. Works on
    logits [B,C] and on tokens [B,L,V]; ``bins`` is the calibration error's.
    """

    def __init__(
        self, *, split: Split = "test", choose_on: Split = "val", bins: Annotated[int, Field(gt=0)] = 15
    ) -> None:
        if split == choose_on:
            raise InputError("probe.choose_on", "what is chosen on a split is not judged on it", given=split)
        self.split, self.choose_on, self.bins = split, choose_on, bins

    @torch.no_grad()
    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        """``teachers`` by name, ``student``, and where it was trained ``baseline`` with the differences to it."""
        views = {"student": run.recipe.student.view, **{n: t.view for n, t in run.recipe.teacher.items()}}
        theirs = {
            n: self._said(m, run, data, self.split, views[n])
            for n, m in models.items()
            if n in run.recipe.teacher
        }
        found: dict[str, Any] = {
            "teachers": {
                n: {**self._alone(said), "parameters": _count(models[n])} for n, said in theirs.items()
            },
            "student": self._of(models["student"], run, data, theirs),
        }
        if (alone := _baseline(run)) is not None:
            found["baseline"] = self._of(alone, run, data, theirs)
            shared = found["student"].keys() - {"parameters", "choice"}
            gains = {k: found["student"][k] - found["baseline"][k] for k in sorted(shared)}
            found["gain"] = {"improvement": gains.pop("accuracy"), **gains}
        return found

    def _of(self, model: nn.Module, run: Any, data: Any, theirs: Mapping[str, Said]) -> dict[str, float]:
        """A student's numbers, beside each teacher's answers."""
        view = run.recipe.student.view
        mine, chosen = (self._said(model, run, data, split, view) for split in (self.split, self.choose_on))
        found = {**self._alone(mine), "choice": _accuracy(chosen), "parameters": _count(model)}
        for name, said in theirs.items():
            pair = mine["logits"], said["logits"]
            found[f"agreement_{name}"] = float(agreement(*pair).mean())
            found[f"fidelity_{name}"] = float(fidelity(*pair).mean())
        return found

    def _alone(self, said: Said) -> dict[str, float]:
        error = calibration_error(said["logits"], said["target"], bins=self.bins)
        return {"accuracy": _accuracy(said), "calibration_error": float(error)}

    @staticmethod
    def _said(model: nn.Module, run: Any, data: Any, split: str, view: Mapping[str, str]) -> Said:
        """What a model's inference rule says of a split's supervised items, on the CPU."""
        rows: dict[str, list[Tensor]] = {"logits": [], "target": []}
        for batch in data.loader(split):
            seen = batch.to(run.device)
            seen.update({key: seen[name] for key, name in view.items()})
            outputs = model(seen)
            target = _target(outputs, seen)
            kept = target != -100
            rows["logits"].append(_logits(model, outputs)[kept].float().cpu())
            rows["target"].append(target[kept].cpu())
        return {name: torch.cat(values) for name, values in rows.items()}


def _logits(model: nn.Module, outputs: Outputs) -> Tensor:
    if outputs.logits is None and outputs.unembed is not None:
        return outputs.unembed.logits()
    said: Tensor = model.infer(outputs)["logits"] if hasattr(model, "infer") else outputs["logits"]  # type: ignore[operator]
    return said


def _target(outputs: Outputs, batch: Batch) -> Tensor:
    target = outputs.target if outputs.target is not None else batch.get("target")
    if target is None:
        raise InputError("probe", "the data have no target, so nothing can be right or wrong")
    return target


def _accuracy(said: Said) -> float:
    return float((said["logits"].argmax(-1) == said["target"]).float().mean())


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _baseline(run: Any) -> nn.Module | None:
    """The student alone, where the run trained it."""
    from kdcore.building import make_student
    from kdcore.checkpoint import load_tensors

    weights = run.folder / "baseline" / "weights.safetensors"
    if not weights.exists():
        return None
    student = make_student(run.recipe, run.builder())
    student.load_state_dict(load_tensors(weights, "baseline"))
    return student.to(run.device).eval()
