"""Stages around the standard one: repeat it, or collect what a model says."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from kdcore.building import make_student, make_teacher
from kdcore.checkpoint import save_tensors
from kdcore.errors import InputError
from kdcore.kinds import Stage
from kdcore.stages import StageRun
from kdcore.task import answers


class Rounds(Stage):
    """Repeat a stage ``count`` times; round r's artefacts are ``name@r``, the last round's are ``name`` too."""

    def __init__(
        self,
        *,
        count: Annotated[int, Field(gt=0)],
        body: str = "distill",
        tables: dict[str, Any] = {},  # noqa: B006 - read only
    ) -> None:
        self.count, self.body, self.tables = count, body, tables

    def run(self, run: StageRun) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(self.count):
            stage = run.builder().make("stage", self.body, {}, f"{run.name}.body")
            for key, value in run.child(stage, f"round-{index}", self.tables, offset=index).items():
                found |= {key: value, f"{key}@{index}": value}
            run.artefacts |= {f"{run.name}.{key}": value for key, value in found.items()}
        return found


class Collect(Stage):
    """Run a teacher or the initial student over a split and keep what it says, row by row, as safetensors.

    ``names`` are outputs to keep (``logits`` or named tensors); the artefact ``outputs`` is the file, with
    the sample ids under ``id``.
    """

    def __init__(self, *, model: str = "main", split: str = "train", names: list[str] = ["logits"]) -> None:  # noqa: B006
        self.model, self.split, self.names = model, split, names

    def run(self, run: StageRun) -> dict[str, Any]:
        if self.split == "test":
            raise InputError("stage.split", "the test split is read once, at the end of a run", given="test")
        path = run.folder / "outputs.safetensors"
        if not path.exists():
            model, view = self._model(run)
            rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("id", *self.names)}
            for batch, outputs in answers(model, run.source.loader(self.split), run.device, view):
                rows["id"].append(batch["id"].cpu())
                for name in self.names:
                    rows[name].append(outputs[name].cpu())
            save_tensors(path, {name: torch.cat(values) for name, values in rows.items()})
        return {"outputs": str(path)}

    def _model(self, run: StageRun) -> tuple[nn.Module, dict[str, str]]:
        """The model, on the device, with its view."""
        recipe, teachers = run.recipe, run.recipe.teacher
        if self.model == "student":
            return make_student(recipe, run.builder()).to(run.device), recipe.student.view
        if self.model not in teachers:
            allowed = ["student", *teachers]
            raise InputError("stage.model", "no such model", given=self.model, allowed=allowed)
        return make_teacher(recipe, self.model, run.builder()).to(run.device), teachers[self.model].view
