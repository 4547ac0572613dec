"""A toy world for components: small data of several forms, recipes of models for them, and a run to live in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcore import recipe
from kdcore.building import assemble
from kdcore.datasets import TensorSet
from kdcore.kinds import Loss
from kdcore.parts import Slot
from kdcore.recipe import is_artefact
from kdcore.stages import StageRun
from kdcore.tables import Recipe
from kdcore.testing.tensors import NATIVE, copied
from kdcore.types import Batch, Data

# All different, so that a shape says which axis it is.
B, C, L, V, D, SIDE = 6, 5, 4, 7, 8, 3
TEACHERS = ("main", "second", "third")
Form = Literal["flat", "image", "tokens", "colour", "dense"]
_FORMS: dict[Form, tuple[str, dict[str, Any], tuple[int, ...], str]] = {  # model, args, input, where to tap
    "flat": ("kdcore.zoo:mlp", {"inputs": 64, "hidden": [D], "classes": C}, (64,), "hidden0"),
    "image": ("kdcore.zoo:conv_net", {"width": 2, "classes": C}, (1, 8, 8), "body.1"),
    "colour": ("kdcore.zoo:conv_net", {"width": 2, "classes": C, "in_channels": 3}, (3, 32, 32), "body.1"),
    "tokens": ("kdcore.testing.toys:TokenModel", {}, (L,), "0"),
    "dense": (
        "torch.nn:Conv2d",
        {"in_channels": 1, "out_channels": C, "kernel_size": 1},
        (1, SIDE, SIDE),
        "",
    ),
}


class TokenModel(nn.Sequential):
    """It sees one token at a time: ids [B,L] -> logits [B,L,V], with the mask of what is no padding (0)."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, V))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(ids), "mask": ids > 0}


def data(*, form: Form) -> Data:
    """24 random samples of one form, in every split: ``input`` and ``target``, of tokens ``mask`` too."""
    generator, count = torch.Generator().manual_seed(0), 24
    if form == "tokens":
        ids, lengths = torch.randint(1, V, (count, L), generator=generator), torch.tensor([4, 2, 3, 1, 4, 2])
        mask = torch.arange(L) < lengths.repeat(count // B).unsqueeze(1)
        values = {"input": ids * mask, "target": ids.roll(-1, 1).masked_fill(~mask, -100), "mask": mask}
    else:
        images = torch.rand(count, *_FORMS[form][2], generator=generator)
        shape = (count, SIDE, SIDE) if form == "dense" else (count,)
        values = {"input": images, "target": torch.randint(C, shape, generator=generator)}
    train, val, test, tune = (TensorSet(torch.arange(count), **values) for _ in range(4))
    return Data(train, val, test, tune, classes=V if form == "tokens" else C)


def model_table(form: Form) -> dict[str, Any]:
    """A recipe's table of a model that takes this form."""
    model, args, *_ = _FORMS[form]
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


def with_loss(form: Form, table: Mapping[str, Any], loss: Loss) -> dict[str, Any]:
    """The toy recipe with a loss that reads a layer under each name, beside the stock one instead of a task."""
    reads: dict[str, dict[str, str]] = {"student": {}, "teacher": {}}
    for side, _, name in (each.partition(".") for each in loss.wants()):
        if name not in NATIVE:
            reads[side][name] = _FORMS[form][3]
    found, teachers = tree(form), {} if loss.joint else {"teacher": "main"}
    losses = [{**table, "reads": reads, **teachers}, {"use": "kd", "teacher": "main"}]
    return {**found, "task": {**found["task"], "weight": 0}, "loss": losses}


class Home:
    """A prepared run for a component to live in: of a toy recipe, or of a plugin's own."""

    def __init__(self, view: Recipe, folder: Path) -> None:
        self.slot: Slot | None = None
        stage = StageRun(view, "conformance", folder)
        self.builder = stage.builder()
        self.parts = assemble(view, stage.source, self.builder)
        for slot in self.parts.losses:
            slot.weight = 1.0  # a ramp may begin at 0
        self.distiller, self.run = stage.context(self.parts)
        self.rest()
        self.run.total_steps, self.run.steps_per_epoch = 10, 5

    def rest(self) -> None:
        """Everything in eval mode, whatever a component did to that."""
        for model in (self.distiller, *self.run.teachers.values()):
            for module in model.modules():
                module.training = False

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
        if self.slot is not None:  # its setup may ask what the recipe says of it
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

    @torch.no_grad()
    def plain(self, kind: str) -> dict[str, Any]:
        """The arguments of a router, a model or an augmentation that a recipe need not name."""
        batch = self.batch()
        if kind != "router":
            return {"batch": batch}
        teachers = {name: self.run.ask(name, batch) for name in self.run.teachers}
        return {"batch": batch, "student": self.run.ask("student", batch), "teachers": teachers}

    @torch.no_grad()
    def seen(self, component: nn.Module) -> tuple[Any, ...]:
        """The arguments that the core calls a component with in one step; LookupError if it never does."""
        found: list[tuple[Any, ...]] = []
        handle = component.register_forward_pre_hook(lambda _, args: found.append(copied(args)))
        batch = self.batch()
        for augmentation in self.parts.augmentations.values():
            batch = augmentation(batch)
        self.distiller.terms(batch)
        handle.remove()
        if not found:
            raise LookupError(f"no step of it calls {type(component).__name__}")
        return found[0]


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
