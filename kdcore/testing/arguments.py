"""Parameters and arguments for a component: its own sample, its plugin's recipes, or the toy world."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore import recipe
from kdcore.building import Builder
from kdcore.kinds import Loss
from kdcore.tables import Recipe
from kdcore.testing import toys
from kdcore.testing.findings import Failed
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import copied, mapped

NAMES = {"loss": ("student", "teacher", "batch"), "router": ("batch", "student", "teachers")}
ALIGNED = {"logits", "mask", "target", "unembed", "topk"}
Attempt = tuple[str, Callable[[], list[Call]]]


def find(subject: Subject) -> None:
    """Give a subject the run, parameters and calls with which it answers; Failed says what was tried."""
    search = Search(subject)
    for title, attempt in search.attempts():
        try:
            subject.calls = attempt()
        except Exception as error:  # a component may raise anything on what it was not made for
            search.note(title, error)
        if subject.calls:
            return
    raise Failed("; ".join(search.tried) or "nothing to call it with")


class Search:
    """The ways to call one component, the likeliest first; ``tried`` says why others did not fit."""

    def __init__(self, subject: Subject) -> None:
        self.s, self.tried = subject, []  # type: tuple[Subject, list[str]]
        own = getattr(subject.target, "conformance_sample", None)
        self.sample: dict[str, Any] = dict(own() if callable(own) else own or {})
        self.given: dict[str, Any] = dict(self.sample.pop("params", {}))

    def note(self, title: str, error: Exception) -> None:
        self.tried.append(f"{title}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200])

    def attempts(self) -> Iterator[Attempt]:
        if self.sample:
            yield "conformance_sample", self._own
        real: list[Attempt] = [(path.name, partial(self._real, path)) for path in self.s.recipes]
        if self._reads_logits_alone():
            yield "toy tensors", self._tensors
            yield from real
        elif self.s.kind == "loss":
            yield from real
            yield "toy models", self._layers
        else:
            forms: tuple[toys.Form, ...] = ("image", "flat", "tokens", "colour")
            toy: list[Attempt] = [(f"toy {form}", partial(self._model, form)) for form in forms]
            yield from real + toy

    # ---- the attempts -----------------------------------------------------------------------------

    def _own(self) -> list[Call]:
        self.s.settle(self._toy("image"), self.given)
        return [self._call(_layout(self.sample), {name: self.sample.get(name) for name in self._names})]

    def _real(self, path: Path) -> list[Call]:
        """From the first stage of a recipe that names the component and can be built alone."""
        for view in toys.views(recipe.read(path).tree):
            try:
                if found := self._within(view):
                    return found
            except Exception as error:  # another stage may do
                self.note(path.name, error)
        raise LookupError(f"no stage of it calls {self.s.component.name}")

    def _within(self, view: Recipe) -> list[Call]:
        """With what the core gives the component in a step of this recipe."""
        names, kind = (self.s.component.name, self.s.name), self.s.kind
        tables = [(p, t) for p, k, t in recipe.components(view) if k == kind and t.use in names]
        if not tables:
            return []
        home, (place, use) = toys.Home(view, self.s.folder), tables[0]
        component = home.at(place)
        args = home.seen(component)
        self.s.settle(home, use.params)
        named = dict(zip(self._names, copied(args), strict=False))
        return [self._call(_layout(named), named)] if named else []

    def _tensors(self) -> list[Call]:
        """A loss or router that reads logits, on random ones of every layout that it takes."""
        self.s.settle(self._toy("image"), self._params("image") or {})
        if self.s.kind == "router":
            return [self._call("classes", toys.router_args())]
        kept: dict[str, Call] = {}
        for layout, args in toys.loss_args(self.s.declared.joint):
            try:
                call = self._call(layout, args)
            except Exception as error:  # not made for this layout
                self.note(layout, error)
                continue
            shapes = {tuple(t.shape) for t in self.s.answer(call).values()}
            per_token = layout == "tokens" and (self.s.declares_tokens or (toys.B, toys.L) in shapes)
            if per_token or not kept:
                kept[layout] = call
        return list(kept.values())

    def _layers(self) -> list[Call]:
        """A loss that reads layers, in toy recipes that tap vectors, maps or sequences."""
        params = self._params("image")
        if params is None:
            return []
        loss: Loss = Builder(0).make("loss", self.s.name, params, self.s.name)
        for form, tree in toys.loss_trees(loss.wants(), loss.joint, {"use": self.s.name, **params}):
            try:
                (call,) = self._within(recipe.parse(tree))
                args = mapped(call.args, partial(_random, torch.Generator().manual_seed(0)))
                return [self._call(call.layout, args)]
            except Exception as error:  # not made for such layers
                self.note(f"toy {form}", error)
        return []

    def _model(self, form: toys.Form) -> list[Call]:
        params = self._params(form)
        if params is None:
            return []
        self.s.settle(self._toy(form), params)
        return [self._call("batch", {"batch": self.s.home.batch()})]

    # ---- their parts ------------------------------------------------------------------------------

    @property
    def _names(self) -> tuple[str, ...]:
        return NAMES.get(self.s.kind, ("batch",))

    def _reads_logits_alone(self) -> bool:
        tensors = self.s.schema.tensors or getattr(self.s.target, "reads", ())
        names = {name[8:] for name in tensors if re.match(r"(student|teacher)[._]", name)}
        return self.s.kind in NAMES and names <= ALIGNED and self._params("image") is not None

    def _params(self, form: toys.Form) -> dict[str, Any] | None:
        """The sample's parameters, and guesses of those that are required; None where one has no guess."""
        found, schema = dict(self.given), self.s.schema
        for name, parameter in schema.params.items():
            if parameter.default is not parameter.empty or name in found:
                continue
            if schema.made(name) in ("student", "teacher"):
                found[name] = toys.model_table(form)
            elif name == "model" and schema.made(name) == "callable":
                found |= {k: v for k, v in toys.model_table(form).items() if k != "use"}
            elif (value := toys.guessed(name)) is not None:
                found[name] = value
            else:
                self.tried.append(f"no value for the parameter {name!r}")
                return None
        return found

    def _toy(self, form: toys.Form) -> toys.Home:
        return toys.Home(recipe.parse(toys.tree(form)), self.s.folder)

    def _call(self, layout: str, args: dict[str, Any]) -> Call:
        """These arguments, if the component answers to them."""
        call = Call(layout, args)
        self.s.answer(call)
        return call


def _layout(args: Mapping[str, Any]) -> str:
    logits = getattr(args.get("student"), "logits", None)
    return "other" if logits is None else {2: "classes", 3: "tokens", 4: "dense"}.get(logits.dim(), "other")


def _random(generator: torch.Generator, path: str, tensor: Tensor) -> Tensor:
    """Random numbers for what models say: untrained ones say nearly the same of every sample."""
    if path.startswith("batch") or not tensor.is_floating_point():
        return tensor
    return 2 * torch.randn(tensor.shape, generator=generator)
