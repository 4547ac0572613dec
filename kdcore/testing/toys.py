"""A toy world for components: small data of several forms, recipes of models for them, and a run to live in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kdcore import recipe
from kdcore.building import assemble
from kdcore.datasets import TensorSet
from kdcore.parts import Slot
from kdcore.recipe import is_artefact
from kdcore.stages import StageRun
from kdcore.tables import Recipe
from kdcore.testing.tensors import NATIVE
from kdcore.types import Batch, Data

# All different, so that a shape says which axis it is.
B, C, L, V, D, SIDE = 6, 5, 4, 7, 8, 3
TEACHERS = ("main", "second", "third")
Form = Literal["flat", "image", "tokens", "colour", "dense"]
_MODELS: dict[Form, tuple[str, dict[str, Any]]] = {
    "flat": ("kdcore.zoo:mlp", {"inputs": 64, "hidden": [D], "classes": C}),
    "image": ("kdcore.zoo:conv_net", {"width": 2, "classes": C}),
    "colour": ("kdcore.zoo:conv_net", {"width": 2, "classes": C, "in_channels": 3}),
    "tokens": ("kdcore.testing.toys:language_model", {}),
    "dense": ("torch.nn:Conv2d", {"in_channels": 1, "out_channels": C, "kernel_size": 1}),
}
_INPUTS = {"flat": (64,), "image": (1, 8, 8), "colour": (3, 32, 32), "dense": (1, SIDE, SIDE)}
_TAPS = {"flat": "hidden0", "image": "body.1", "tokens": "0"}


def language_model() -> nn.Sequential:
    """It sees one token at a time: ids [B,L] -> logits [B,L,V]."""
    return nn.Sequential(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, V))


def data(*, form: Form) -> Data:
    """24 random samples of one form, in every split: ``input`` and ``target``, of tokens ``mask`` too."""
    generator, count = torch.Generator().manual_seed(0), 24
    if form == "tokens":
        ids = torch.randint(V, (count, L + 1), generator=generator)
        mask = torch.arange(L) < torch.tensor([4, 2, 3, 1, 4, 2]).repeat(4).unsqueeze(1)
        values = {"input": ids[:, :-1], "target": ids[:, 1:].masked_fill(~mask, -100), "mask": mask}
    else:
        images = torch.rand(count, *_INPUTS[form], generator=generator)
        shape = (count, SIDE, SIDE) if form == "dense" else (count,)
        values = {"input": images, "target": torch.randint(C, shape, generator=generator)}
    train, val, test, tune = (TensorSet(torch.arange(count), **values) for _ in range(4))
    return Data(train, val, test, tune, classes=V if form == "tokens" else C)


def model_table(form: Form) -> dict[str, Any]:
    """A recipe's table of a model that takes this form."""
    model, args = _MODELS[form]
    return {"use": "module", "model": model, "args": args}


def tree(form: Form) -> dict[str, Any]:
    """The toy recipe: a student and three teachers of one architecture, no loss."""
    return {
        "data": {"source": "kdcore.testing.toys:data", "args": {"form": form}, "batch_size": B},
        "student": model_table(form),
        "teacher": {name: model_table(form) for name in TEACHERS},
        "task": {"use": "language" if form == "tokens" else "classification", "metrics": []},
        "train": {"device": "cpu", "steps": 2},
    }


def with_loss(form: Form, table: Mapping[str, Any], wants: tuple[str, ...], joint: bool) -> dict[str, Any]:
    """The toy recipe with a loss that reads a layer under each name."""
    reads: dict[str, dict[str, str]] = {"student": {}, "teacher": {}}
    for side, _, name in (each.partition(".") for each in wants):
        if name not in NATIVE:
            reads[side][name] = _TAPS[form]
    return {**tree(form), "loss": [{**table, "reads": reads, **({} if joint else {"teacher": "main"})}]}


class Home:
    """A prepared run for a component to live in: of a toy recipe, or of a plugin's own."""

    def __init__(self, view: Recipe, folder: Path) -> None:
        self.recipe, self.slot = view, None  # type: tuple[Recipe, Slot | None]
        stage = StageRun(view, "conformance", folder)
        self.builder = stage.builder()
        self.parts = assemble(view, stage.source, self.builder)
        for slot in self.parts.losses:
            slot.weight = 1.0  # a ramp may begin at 0
        self.distiller, self.run = stage.context(self.parts)
        self.distiller.eval()
        self.run.total_steps, self.run.steps_per_epoch = 10, 5

    def at(self, place: str) -> nn.Module:
        """The component at a place of the recipe, such as ``loss.0``."""
        kind, _, index = place.rpartition(".")
        if kind == "loss":
            self.slot = self.parts.losses[int(index)]
            return self.slot.loss
        if kind == "augmentation":
            return [*self.parts.augmentations.values()][int(index)]
        return dict(self.parts.components())[place]

    def make(self, kind: str, name: str, params: Mapping[str, Any]) -> Any:
        """A component built, given its run and set up as the core does it; always with the same weights."""
        component = self.builder.make(kind, name, params, name)
        component.run = self.run
        if kind == "loss":  # its setup may ask what the recipe says of it
            if self.slot is None:
                self.slot = Slot("conformance", component, teachers=("main",))
                self.parts.losses.append(self.slot)
            self.slot.loss = component
        self.run.reseed("setup")
        if callable(getattr(component, "setup", None)):
            component.setup()
        return component

    def signature(self) -> list[Any]:
        """What changes when somebody writes to the run's models, or switches them between train and eval."""
        models = (self.run.student, *self.run.teachers.values())
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        modes = [module.training for model in models for module in model.modules()]
        return [*modes, *((t._version, t.float().sum().item()) for t in tensors)]

    def batch(self) -> Batch:
        return self.run.source.sample(B).to("cpu")

    def plain(self, kind: str, joint: bool) -> dict[str, Any]:
        """The arguments that a component of this kind is called with in a run without taps and streams."""
        batch = self.batch()
        if kind not in ("loss", "router"):
            return {"batch": batch}
        aligned = {key: batch[key] for key in ("mask", "target") if "mask" in batch}
        with torch.no_grad():
            student = replace(self.run.ask("student", batch), **aligned)
            teachers = {name: replace(self.run.ask(name, batch), **aligned) for name in self.run.teachers}
        if kind == "router":
            return {"batch": batch, "student": student, "teachers": teachers}
        return {"student": student, "teacher": teachers if joint else teachers["main"], "batch": batch}

    def seen(self, component: nn.Module) -> tuple[Any, ...]:
        """The arguments that the core calls a component with in one step; empty if it never does."""
        found: list[tuple[Any, ...]] = []
        handle = component.register_forward_pre_hook(lambda _, args: found.append(args))
        try:
            with torch.no_grad():
                batch = self.batch()
                for augmentation in self.parts.augmentations.values():
                    batch = augmentation(batch)
                self.distiller.terms(batch)
        finally:
            handle.remove()
        return found[0] if found else ()


def views(table: Mapping[str, Any]) -> Iterator[Recipe]:
    """A recipe as each of its stages sees it, without what earlier stages would leave."""
    whole = recipe.parse(table)
    stages = [recipe.parse_stage(whole, each, "stage") for each in whole.stage if each.use == "distill"]
    for view in [*stages, whole]:
        yield recipe.parse({**_without_artefacts(view.model_dump(exclude_unset=True)), "stage": []})


def _without_artefacts(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_artefacts(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {k: _without_artefacts(v) for k, v in value.items() if not is_artefact(v)}
