"""The three stages: co-training, one mask a teacher, distillation routed among the masked teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_mst_distill.loss import Temperature, divergence
from kd_plugin_mst_distill.masks import Heads, MaskNet, fitting, masking
from kdcore import Batch, InputError, Outputs, Stage, Student, Teacher, frozen, parallel
from kdcore.building import make_student
from kdcore.checkpoint import load_weights, save_tensors
from kdcore.data import key_seed
from kdcore.parts import Parts
from kdcore.recipe import parse
from kdcore.stages import Distill, StageRun
from kdcore.tables import Recipe, TaskTable
from kdcore.taps import Taps
from kdcore.task import Task

Factor = Annotated[int, Field(gt=0)]
Views = Mapping[str, Mapping[str, str]]


def seen(batch: Batch, view: Mapping[str, str]) -> Batch:
    """The batch as a model with this view sees it."""
    mine = batch.copy()
    mine.update({key: batch[source] for key, source in view.items()})
    return mine


class CoTraining(Student):
    """All models at once: each learns from the labels and from every other, and nothing is detached."""

    def __init__(self, members: Mapping[str, Student], views: Views, task: Task, temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.views, self.task, self.temperature = views, task, temperature

    def forward(self, batch: Batch) -> Outputs:
        said = {name: model(seen(batch, self.views[name])).logits for name, model in self.members.items()}
        return Outputs(logits=said["student"], tensors=said)

    def task_loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """CE of each, and D(n <- m) of each ordered pair: [B] by name."""
        said = outputs.tensors
        hard = {name: self.task.terms(Outputs(logits=z), batch) for name, z in said.items()}
        pairs = [(n, m) for n in said for m in said if n != m]
        soft = {f"{n}-from-{m}": divergence(said[n], said[m], self.temperature) for n, m in pairs}
        return {name: term for name, term in hard.items() if term is not None} | soft


class CoTrain(Stage):
    """Stage 1: the recipe's teachers and its student, trained together by the stage's ``train``.

    Artefacts: ``student`` and each teacher by name, files of their models' weights.
    """

    def __init__(self, *, temperature: Temperature = 4.0) -> None:
        self.temperature = temperature

    def run(self, run: StageRun) -> dict[str, Any]:
        builder, recipe = run.builder(), run.recipe
        members = {"student": make_student(recipe, builder)}
        for name, table in recipe.teacher.items():
            trainee = builder.make("teacher", table.use, table.params, f"teacher.{name}").trainee()
            if trainee is None or name == "student":
                raise InputError(f"teacher.{name}", "cannot be trained here", given=table.use)
            members[name] = trainee
        task = Task(recipe.task, run.source.data.classes)
        group = CoTraining(members, _views(recipe), task, self.temperature)
        result = run.fit(Parts(group, task), "cotrain")
        files = {name: run.folder / f"{name}.safetensors" for name in members}
        for name, path in files.items():
            _keep(path, members[name].model)
        return {"results": {"cotrain": result}, **{name: str(path) for name, path in files.items()}}


class Specialising(Student):
    """One mask a (teacher, layer); each masked teacher is pulled towards the student. Only the masks learn."""

    def __init__(
        self,
        student: Student,
        teachers: Mapping[str, Teacher],
        masks: Mapping[tuple[str, str], MaskNet],
        views: Views,
    ) -> None:
        super().__init__()
        self.student, self.teachers = (
            frozen(student),
            nn.ModuleDict({n: frozen(t) for n, t in teachers.items()}),
        )
        self.places = {place: f"{place[0]}.{place[1]}".replace(".", "-") for place in masks}
        self.masks = nn.ModuleDict({self.places[place]: net for place, net in masks.items()})
        layers = {name: [layer for owner, layer in masks if owner == name] for name in teachers}
        self.taps = {
            n: Taps(t.model, {layer: layer for layer in layers[n]}, "layers") for n, t in teachers.items()
        }
        self.views, self.temperature = views, 4.0

    def forward(self, batch: Batch) -> Outputs:
        with torch.no_grad():
            logits = self.student(seen(batch, self.views["student"])).logits
        said = {}
        for (name, layer), key in self.places.items():
            with self.taps[name].reading(masking((layer,), [self.masks[key]])):  # type: ignore[list-item]
                said[key] = self.teachers[name](seen(batch, self.views[name])).logits
        return Outputs(logits=logits, tensors=said)

    def task_loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert outputs.logits is not None
        target = outputs.logits.detach()
        return {key: divergence(z, target, self.temperature) for key, z in outputs.tensors.items()}


class Specialise(Stage):
    """Stage 2: a MaskNet on each of ``layers`` (teacher -> its layers), trained by the stage's ``train``.

    Student and teachers are those of stage ``start``, and stay as they are. The masks with the lowest sum of
    divergences on val are kept. One Adam for all masks takes the steps of one Adam each: their parameters and
    terms are disjoint. Artefacts: ``masks`` (teacher -> layer -> file) and ``heads``.
    """

    def __init__(
        self,
        *,
        layers: dict[str, list[str]],
        start: str = "cotrain",
        temperature: Temperature = 4.0,
        heads: Heads = 3,
        factor: Factor = 2,
    ) -> None:
        self.layers, self.start, self.temperature = layers, start, temperature
        self.heads, self.factor = heads, factor

    def run(self, run: StageRun) -> dict[str, Any]:
        group = self.group(run)
        train = run.recipe.train.model_copy(update={"keep": "best"})
        result = run.fit(
            Parts(group, Task(TaskTable(use="none", metrics=["loss"]), None)), "specialise", train
        )
        masks: dict[str, dict[str, str]] = {name: {} for name in self.layers}
        for (name, layer), key in group.places.items():
            path = run.folder / f"{key}.safetensors"
            _keep(path, group.masks[key])
            masks[name][layer] = str(path)
        return {"results": {"specialise": result}, "masks": masks, "heads": self.heads}

    def group(self, run: StageRun) -> Specialising:
        """The masked teachers, as they are before the first step."""
        recipe, builder = run.recipe, run.builder()
        if unknown := set(self.layers) - set(recipe.teacher):
            raise InputError(
                "stage.layers", "no such teacher", given=sorted(unknown), allowed=list(recipe.teacher)
            )
        student = make_student(recipe, builder)
        load_weights(student.model, _artefact(run.artefacts, self.start, "student"), "stage.start")
        teachers = {}
        for name in self.layers:
            table = recipe.teacher[name]
            teachers[name] = builder.make("teacher", table.use, table.params, f"teacher.{name}")
            load_weights(teachers[name].model, _artefact(run.artefacts, self.start, name), "stage.start")
        views = _views(recipe)
        masks = {
            (name, layer): self._mask(run, name, layer, teachers[name], views[name])
            for name, chosen in self.layers.items()
            for layer in chosen
        }
        group = Specialising(student, teachers, masks, views)
        group.temperature = self.temperature
        return group

    @torch.no_grad()
    def _mask(
        self, run: StageRun, name: str, layer: str, teacher: Teacher, view: Mapping[str, str]
    ) -> MaskNet:
        place, sample = f"stage.layers.{name}", run.source.sample()
        with Taps(teacher.model, {layer: layer}, place).reading() as found:
            teacher.eval()(seen(sample.part(sample.streams[0]), view))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(run.seed, "mask", name, layer))
            return fitting(found[layer], self.heads, self.factor, place)


class Route(Distill):
    """Stage 3: the recipe's distillation, with its teachers turned into masked ones, among which its router chooses.

    ``variant`` goes to the router too. ``"paper"``: one mask a teacher. ``"released"``: masks of earlier teachers
    of the same net stay on. ``masked = false`` leaves the masks off (the ablation). Student and teachers begin
    with the weights of stage ``start``, so their components must take a ``checkpoint``.
    """

    def __init__(
        self,
        *,
        start: str = "cotrain",
        masks: str = "specialise",
        variant: Literal["paper", "released"] = "paper",
        masked: bool = True,
    ) -> None:
        self.start, self.masks, self.variant, self.masked = start, masks, variant, masked

    def view(self, recipe: Recipe, artefacts: Mapping[str, Any]) -> Recipe:
        tree = recipe.model_dump(exclude_unset=True)
        tree["student"]["checkpoint"] = _artefact(artefacts, self.start, "student")
        heads, teachers = _artefact(artefacts, self.masks, "heads"), {}
        for name, layers in _artefact(artefacts, self.masks, "masks").items():
            table = tree["teacher"][name]
            base = {k: v for k, v in table.items() if k not in ("train", "data", "view")}
            base["checkpoint"] = _artefact(artefacts, self.start, name)
            on: dict[str, str] = {}
            for index, (layer, path) in enumerate(layers.items()):
                on = {**(on if self.variant == "released" else {}), layer: path}
                masks = on if self.masked else {}
                specialised = {"use": "mst-distill", "base": base, "masks": masks, "heads": heads}
                teachers[f"{name}-{index}"] = {**specialised, "view": table.get("view", {})}
        if "router" in tree:
            tree["router"] = {**tree["router"], "teachers": list(teachers), "variant": self.variant}
        return parse({**tree, "teacher": teachers, "stage": []})


def _views(recipe: Recipe) -> dict[str, Mapping[str, str]]:
    return {"student": recipe.student.view, **{name: table.view for name, table in recipe.teacher.items()}}


def _artefact(artefacts: Mapping[str, Any], stage: str, name: str) -> Any:
    if f"{stage}.{name}" not in artefacts:
        raise InputError(
            "stage", "no such artefact", given=f"{stage}.{name}", allowed=sorted(artefacts) or "none yet"
        )
    return artefacts[f"{stage}.{name}"]


def _keep(path: Path, model: nn.Module) -> None:
    if not path.exists() and not parallel.rank():
        save_tensors(path, model.state_dict())
    parallel.barrier()
