"""A toy world for components: data of four shapes, three teachers, and what losses read, by its name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcore import building as build
from kdcore import recipe
from kdcore.datasets import TensorSet
from kdcore.stages import StageRun
from kdcore.types import Batch, Data, Outputs, TopK, Unembed

# All different, so that a shape says which axis it is.
B, C, L, V, D, SIDE, K = 6, 5, 4, 7, 8, 3, 3
Form = Literal["image", "colour", "flat", "tokens"]
_FEATURES = {"vector": (B, D), "map": (B, D, SIDE, SIDE), "sequence": (B, L, D), "attention": (B, 2, L, L)}
_HINTS = {
    "attention": r"attn|attention",
    "sequence": r"hidden|token|sequence|patch|state",
    "map": r"feat|map|conv|layer|stage|block|spatial",
}


class Shift(nn.Module):
    """A language model of toy size: token ids [B,L] -> logits [B,L,V]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(classes, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]


def language_model(*, width: int = 8, classes: int = V) -> Shift:
    return Shift(width, classes)


def data(*, form: Form = "image") -> Data:
    """24 random samples of one form, in all three splits: ``input`` and ``target``."""
    generator = torch.Generator().manual_seed(0)
    count = 24
    if form == "tokens":
        ids = torch.randint(V, (count, L + 1), generator=generator)
        values = {"input": ids[:, :-1], "target": ids[:, 1:], "mask": torch.arange(L).repeat(count, 1) < L - 1}
    else:
        shape = {"image": (1, 8, 8), "colour": (3, 32, 32), "flat": (64,)}[form]
        images = torch.rand(count, *shape, generator=generator)
        values = {"input": images, "target": torch.randint(C, (count,), generator=generator)}
    sets = [TensorSet(torch.arange(count), **values) for _ in range(3)]
    return Data(*sets, classes=V if form == "tokens" else C)


def model_table(form: Form, width: int) -> dict[str, Any]:
    """A recipe's ``use = "module"`` table of a model that takes this form."""
    if form == "tokens":
        return {"use": "module", "model": "kdcore.testing.toys:language_model", "args": {"width": width}}
    inputs = {"image": 64, "colour": 3072, "flat": 64}[form]
    args = {"inputs": inputs, "hidden": [width], "classes": C}
    return {"use": "module", "model": "kdcore.zoo:mlp", "args": args}


def tree(form: Form) -> dict[str, Any]:
    """The toy recipe: a student and ``K`` teachers, no loss."""
    return {
        "data": {"source": "kdcore.testing.toys:data", "args": {"form": form}, "batch_size": B},
        "student": model_table(form, 6),
        "teacher": {name: model_table(form, 8 + i) for i, name in enumerate(("main", "second", "third"))},
        "task": {"use": "language" if form == "tokens" else "classification", "metrics": []},
        "train": {"device": "cpu", "steps": 2},
    }


class Home:
    """A prepared run for a component to live in: of the toy recipe, or of a plugin's own."""

    def __init__(self, table: Mapping[str, Any], folder: Path) -> None:
        view = recipe.parse(table)
        stage = next((i for i, s in enumerate(view.stage) if s.use == "distill"), None)
        if stage is not None:
            view = recipe.parse_stage(view, view.stage[stage], f"stage.{stage}")
        self.stage = StageRun(view, "conformance", folder)
        self.builder = self.stage.builder()
        self.recipe, self.parts = view, build.assemble(view, self.stage.source, self.builder)
        for slot in self.parts.losses:
            slot.weight = 1.0  # a ramp may begin at 0
        self.distiller, self.run = self.stage.context(self.parts)
        self.run.total_steps, self.run.steps_per_epoch = 10, 5

    def make(self, kind: str, name: str, params: Mapping[str, Any]) -> Any:
        """A component built, given its run and set up as the core does it; always with the same weights."""
        component = self.builder.make(kind, name, params, name)
        component.run = self.run
        self.run.reseed("setup")
        if callable(getattr(component, "setup", None)):
            component.setup()
        return component

    def batch(self) -> Batch:
        return self.run.source.sample(B).to("cpu")


def seen(home: Home, component: nn.Module) -> tuple[Any, ...]:
    """The arguments that the core calls a component with in one step; empty if it never does."""
    found: list[tuple[Any, ...]] = []
    handle = component.register_forward_pre_hook(lambda _, args: found.append(args))
    try:
        with torch.no_grad():
            home.distiller.eval()
            batch = home.batch()
            for augmentation in home.parts.augmentations.values():
                batch = augmentation(batch)
            home.distiller.terms(batch)
    finally:
        handle.remove()
    return found[0] if found else ()


def loss_args(wants: tuple[str, ...], joint: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layout, arguments) that a loss reading these names may be made for, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    names = {w.partition(".")[2] for w in wants} - {"logits", "mask", "target", "unembed", "topk"}
    likely = next((f for f, p in _HINTS.items() if any(re.search(p, n) for n in names)), "vector")
    features = [likely, *(f for f in _FEATURES if f != likely)] if names else ["none"]
    for layout, feature in itertools.product(("classes", "tokens", "dense"), features):
        sides = {}
        for side, count in (("student", 1), ("teacher", 2)):
            made = [_outputs(layout, feature, names, generator) for _ in range(count)]
            sides[side] = made[0] if side == "student" or not joint else dict(zip(("main", "second"), made, strict=True))
        aligned = {n: getattr(sides["student"], n) for n in ("target", "mask")}
        values = {k: v for k, v in aligned.items() if v is not None}
        for each in [sides["student"], *(sides["teacher"].values() if joint else [sides["teacher"]])]:
            each.mask, each.target = (values.get(n) if layout == "tokens" else None for n in ("mask", "target"))
        given = torch.randn(B, 3, 8, 8, generator=generator)
        yield layout, {**sides, "batch": Batch({"id": torch.arange(B) + 10, "input": given, **values})}


def _outputs(layout: str, feature: str, names: set[str], generator: torch.Generator) -> Outputs:
    shape = {"classes": (B, C), "tokens": (B, L, V), "dense": (B, C, SIDE, SIDE)}[layout]
    positions = {"classes": (B,), "tokens": (B, L), "dense": (B, SIDE, SIDE)}[layout]
    target = torch.randint(shape[1 if layout == "dense" else -1], positions, generator=generator)
    mask = None
    if layout == "tokens":
        mask = torch.arange(L) < torch.tensor([4, 2, 3, 1, 4, 2]).unsqueeze(1)
        target = target.masked_fill(~mask, -100)
    logits = 2 * torch.randn(shape, generator=generator)
    classes_last = logits.movedim(1, -1) if layout == "dense" else logits
    top = classes_last.log_softmax(-1).topk(2)
    hidden = torch.randn(*positions, D, generator=generator)
    tensors = {n: torch.randn(_FEATURES[feature], generator=generator) for n in sorted(names)}
    weight = torch.randn(classes_last.shape[-1], D, generator=generator)
    rest = torch.log1p(-top.values.exp().sum(-1))
    return Outputs(logits, mask, target, Unembed(hidden, weight), TopK(top.indices, top.values, rest), tensors)


def router_args() -> dict[str, Any]:
    """A batch, a student's and three teachers' outputs."""
    _, args = next(loss_args((), False))
    generator = torch.Generator().manual_seed(1)
    names = ("main", "second", "third")
    teachers = {name: Outputs(3 * torch.randn(B, C, generator=generator)) for name in names}
    return {"batch": args["batch"], "student": Outputs(args["student"].logits), "teachers": teachers}
