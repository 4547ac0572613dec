"""A toy world for components: data of four forms, models for them, and outputs of three layouts made of random numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kdcore import recipe
from kdcore.building import NATIVE, assemble
from kdcore.datasets import TensorSet
from kdcore.parts import Slot
from kdcore.stages import StageRun
from kdcore.tables import Recipe
from kdcore.types import Batch, Data, Outputs, TopK, Unembed

# All different, so that a shape says which axis it is.
B, C, L, V, D, SIDE = 6, 5, 4, 7, 8, 3
TEACHERS = ("main", "second", "third")
Form = Literal["flat", "image", "tokens", "colour"]
_TAPS = {"flat": "hidden0", "image": "body.1", "tokens": "embed"}
_MODELS: dict[Form, tuple[str, dict[str, Any]]] = {
    "flat": ("kdcore.zoo:mlp", {"inputs": 64, "hidden": [D], "classes": C}),
    "image": ("kdcore.zoo:conv_net", {"width": 2, "classes": C}),
    "colour": ("kdcore.zoo:conv_net", {"width": 2, "classes": C, "in_channels": 3}),
    "tokens": ("kdcore.testing.toys:language_model", {"width": D, "classes": V}),
}


class PositionWise(nn.Sequential):
    """A language model of toy size that sees one token at a time: ids [B,L] -> logits [B,L,V]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.add_module("embed", nn.Embedding(classes, width))
        self.add_module("tanh", nn.Tanh())
        self.add_module("head", nn.Linear(width, classes))


def language_model(*, width: int = D, classes: int = V) -> PositionWise:
    return PositionWise(width, classes)


def data(*, form: Form) -> Data:
    """24 random samples of one form, in every split: ``input`` and ``target``, of tokens ``mask`` too."""
    generator, count = torch.Generator().manual_seed(0), 24
    if form == "tokens":
        ids = torch.randint(V, (count, L + 1), generator=generator)
        values = {
            "input": ids[:, :-1],
            "target": ids[:, 1:],
            "mask": torch.arange(L).repeat(count, 1) < L - 1,
        }
    else:
        shape = {"image": (1, 8, 8), "colour": (3, 32, 32), "flat": (64,)}[form]
        images = torch.rand(count, *shape, generator=generator)
        values = {"input": images, "target": torch.randint(C, (count,), generator=generator)}
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


def loss_trees(
    wants: tuple[str, ...], joint: bool, table: Mapping[str, Any]
) -> Iterator[tuple[Form, dict[str, Any]]]:
    """Toy recipes with a loss that reads layers: vectors, maps or sequences, the likeliest by their names first."""
    names = " ".join(wants)
    maps = re.search(r"feat|map|conv|layer|stage|block|attn|attention", names)
    forms: list[Form] = ["image", "flat", "tokens"] if maps else ["flat", "image", "tokens"]
    if re.search(r"hidden|token|sequence|patch|state", names):
        forms.insert(0, forms.pop())
    for form in forms:
        reads: dict[str, dict[str, str]] = {"student": {}, "teacher": {}}
        for side, _, name in (w.partition(".") for w in wants):
            if name not in NATIVE:
                reads[side][name] = _TAPS[form]
        only = {} if joint else {"teacher": "main"}
        yield form, {**tree(form), "loss": [{**table, "reads": reads, **only}]}


class Home:
    """A prepared run for a component to live in: of a toy recipe, or of a plugin's own."""

    def __init__(self, view: Recipe, folder: Path) -> None:
        self.recipe, self.slot = view, None  # type: tuple[Recipe, Slot | None]
        self.stage = StageRun(view, "conformance", folder)
        self.builder = self.stage.builder()
        self.parts = assemble(view, self.stage.source, self.builder)
        for slot in self.parts.losses:
            slot.weight = 1.0  # a ramp may begin at 0
        self.distiller, self.run = self.stage.context(self.parts)
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
        found: list[Any] = []
        for model in (self.run.student, *self.run.teachers.values()):
            found += [module.training for module in model.modules()]
            found += [(t._version, t.float().sum().item()) for t in (*model.parameters(), *model.buffers())]
        return found

    def batch(self) -> Batch:
        return self.run.source.sample(B).to("cpu")

    def seen(self, component: nn.Module) -> tuple[Any, ...]:
        """The arguments that the core calls a component with in one step; empty if it never does."""
        found: list[tuple[Any, ...]] = []
        handle = component.register_forward_pre_hook(lambda _, args: found.append(args))
        try:
            with torch.no_grad():
                self.distiller.eval()
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
    for index, stage in enumerate(whole.stage):
        if stage.use == "distill":
            view = recipe.parse_stage(whole, stage, f"stage.{index}").model_dump(exclude_unset=True)
            yield recipe.parse({**_without_artefacts(view), "stage": []})
    yield recipe.parse({**_without_artefacts(table), "stage": []})


def _without_artefacts(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_artefacts(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    kept = {k: v for k, v in value.items() if not (isinstance(v, str) and re.match(r"@[\w-]+\.", v))}
    return {k: _without_artefacts(v) for k, v in kept.items()}


def loss_args(joint: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layout, arguments) for a loss that reads logits: of classes, of tokens with a mask, of dense maps."""
    for layout in ("classes", "tokens", "dense"):
        generator = torch.Generator().manual_seed(0)
        student, first, second = (_outputs(layout, generator) for _ in range(3))
        for each in (first, second):
            each.target, each.mask = student.target, student.mask
        values = {"id": torch.arange(B) + 10, "input": torch.randn(B, 3, 8, 8, generator=generator)}
        values |= {n: t for n in ("target", "mask") if (t := getattr(student, n)) is not None}
        if layout != "tokens":
            student.target = first.target = second.target = None
        teacher = {"main": first, "second": second} if joint else first
        yield layout, {"student": student, "teacher": teacher, "batch": Batch(values)}


def _outputs(layout: str, generator: torch.Generator) -> Outputs:
    shape = {"classes": (B, C), "tokens": (B, L, V), "dense": (B, SIDE, SIDE, C)}[layout]
    logits = 2 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    mask = torch.arange(L) < torch.tensor([4, 2, 3, 1, 4, 2]).unsqueeze(1) if layout == "tokens" else None
    if mask is not None:
        target = target.masked_fill(~mask, -100)
    top = logits.log_softmax(-1).topk(2)
    rest = torch.log1p(-top.values.exp().sum(-1))
    hidden, weight = (torch.randn(*s, D, generator=generator) for s in (shape[:-1], shape[-1:]))
    seen = logits.movedim(-1, 1) if layout == "dense" else logits
    return Outputs(seen, mask, target, Unembed(hidden, weight), TopK(top.indices, top.values, rest))


def router_args() -> dict[str, Any]:
    """A batch, a student's and three teachers' logits."""
    _, args = next(loss_args(False))
    generator = torch.Generator().manual_seed(1)
    teachers = {name: Outputs(3 * torch.randn(B, C, generator=generator)) for name in TEACHERS}
    return {"batch": args["batch"], "student": Outputs(args["student"].logits), "teachers": teachers}


def guessed(name: str) -> int | None:
    """A toy value for a required number, by its name."""
    if re.search(r"class|vocab", name):
        return C
    return D if re.search(r"dim|width|feature|channel|embed|hidden", name) else None
