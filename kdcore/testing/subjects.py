"""A component under test: built with real parameters, in a run, with arguments that the core would give it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore import building as build
from kdcore import catalog, recipe
from kdcore.counts import Counts
from kdcore.kinds import Loss
from kdcore.plugins import Entry
from kdcore.signature import Schema
from kdcore.testing import toys
from kdcore.testing.findings import Failed, preserved, random_state
from kdcore.testing.tensors import copied, leaves, mapped
from kdcore.types import Component

ARGUMENTS = {"loss": ("student", "teacher", "batch"), "router": ("batch", "student", "teachers")}
ALIGNED = {"logits", "mask", "target", "unembed", "topk"}
_TOKENS = r"\btokens?\b|\[B, ?L\b|\bvocabular|\bsequences?\b|\.mask\b|[\"']mask[\"']"


@dataclass
class Call:
    """Arguments of one call by name. ``layout``: classes [B,C], tokens [B,L,V], dense [B,C,H,W] or other."""

    layout: str
    args: dict[str, Any]

    @property
    def size(self) -> int:
        """B; 0 for a batch of several streams, whose rows cannot be taken as one."""
        batch = self.args["batch"]
        return 0 if batch.parts else len(batch)

    @property
    def class_axis(self) -> int:
        return 1 if self.layout == "dense" else -1


class Subject:
    """One component of a plugin. ``calls`` are filled by ``prepare``; ``tried`` says why others did not fit."""

    def __init__(self, entry: Entry, kind: str, component: Component, recipes: list[Path], folder: Path) -> None:
        self.entry, self.kind, self.component, self.recipes, self.folder = entry, kind, component, recipes, folder
        self.name = f"{entry.distribution}:{component.name}"
        self.params: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.calls: list[Call] = []
        self.tried: list[str] = []
        self.disturbs = False
        self.home: toys.Home
        self._pristine: Any = None

    @cached_property
    def _found(self) -> tuple[Any, Schema]:
        return build.schema(self.kind, self.name)

    @property
    def target(self) -> Any:
        return self._found[0]

    @property
    def schema(self) -> Schema:
        return self._found[1]

    @cached_property
    def declares_tokens(self) -> bool:
        """Whether the method says that it works on token positions: in its code, catalogue entry or recipes."""
        entry = catalog.method(self.entry.name) or {}
        texts = [path.read_text("utf-8") for path in self.recipes]
        said = inspect.getsource(self.target) + self.component.summary
        return (
            "mask" in self.schema.tensors
            or "text" in entry.get("modalities", ())
            or bool(re.search(_TOKENS, said, re.IGNORECASE))
            or any(re.search(r'use = "language"', text) for text in texts)
        )

    # ---- finding arguments ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find parameters and arguments with which the component answers; Failed says what was tried."""
        for title, attempt in self._attempts():
            try:
                self.calls = attempt()
            except Exception as error:  # a component may raise anything on what it was not made for
                self.tried.append(f"{title}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if self.calls:
                self._pristine = self.home.make(self.kind, self.name, self.params)
                return
        raise Failed("; ".join(self.tried) or "nothing to call it with")

    def _attempts(self) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
        own = getattr(self.target, "conformance_sample", None)
        sample = dict(own() if callable(own) else own or {})
        self.params = self.given = dict(sample.pop("params", {}))
        if sample:
            yield "conformance_sample", lambda: self._own(sample)
        forms: tuple[Any, ...] = ("image",) if self.kind in ARGUMENTS else ("image", "flat", "tokens", "colour")
        toy = [(f"toy {form}", lambda form=form: self._toy(form)) for form in forms]
        real = [(path.name, lambda path=path: self._recipe(path)) for path in self.recipes]
        yield from toy + real if self._reads_logits_alone() else real + toy

    def _reads_logits_alone(self) -> bool:
        tensors = self.schema.tensors or getattr(self.target, "reads", ())
        names = {re.sub(r"^(student|teacher)[._]", "", name) for name in tensors}
        return self.kind in ARGUMENTS and names <= ALIGNED | {"batch"} and not self._missing(self.given)

    def _missing(self, given: Mapping[str, Any]) -> list[str]:
        empty = inspect.Parameter.empty
        return [n for n, p in self.schema.params.items() if p.default is empty and n not in given]

    def _own(self, sample: Mapping[str, Any]) -> list[Call]:
        self.home = toys.Home(toys.tree("image"), self.folder)
        names = ARGUMENTS.get(self.kind, ("batch",))
        return [self._tried(_layout(sample), {name: sample.get(name) for name in names})]

    def _recipe(self, path: Path) -> list[Call]:
        source = recipe.read(path)
        self.home = toys.Home(source.tree, self.folder)
        parts, tables = self.home.parts, recipe.components(self.home.recipe)
        places: dict[str, Any] = dict(parts.components())
        places |= {f"loss.{i}": slot.loss for i, slot in enumerate(parts.losses)}
        places |= {f"augmentation.{i}": each for i, each in enumerate(parts.augmentations.values())}
        for place, kind, table in tables:
            if kind == self.kind and table.use in (self.component.name, self.name):
                self.params = table.params
                args = toys.seen(self.home, places[place])
                named = dict(zip(ARGUMENTS.get(self.kind, ("batch",)), copied(args), strict=False))
                return [Call(_layout(named), named)] if named else []
        raise LookupError(f"does not name {self.component.name}")

    def _toy(self, form: toys.Form) -> list[Call]:
        self.home = toys.Home(toys.tree(form), self.folder)
        self.params = {**_guessed(self.schema, self._missing(self.given), form), **self.given}
        if missing := self._missing(self.params):
            raise LookupError(f"no value for {', '.join(missing)}")
        if self.kind == "router":
            return [self._tried("classes", toys.router_args())]
        if self.kind != "loss":
            return [self._tried("batch", {"batch": self.home.batch()})]
        loss = self.home.make(self.kind, self.name, self.params)
        kept: dict[str, Call] = {}
        for layout, args in toys.loss_args(loss.wants(), loss.joint):
            if layout in kept or (layout == "dense" and kept):
                continue
            try:
                call = self._tried(layout, args)
            except Exception as error:  # not made for this layout
                self.tried.append(f"{layout}: {type(error).__name__}: {error}"[:200])
                continue
            shapes = {tuple(t.shape) for t in self.answer(call).values()}
            if layout != "tokens" or not kept or self.declares_tokens or (toys.B, toys.L) in shapes:
                kept[layout] = call
        return list(kept.values())

    def _tried(self, layout: str, args: dict[str, Any]) -> Call:
        self._pristine = self.home.make(self.kind, self.name, self.params)
        call = Call(layout, args)
        self.answer(call)
        return call

    # ---- asking -----------------------------------------------------------------------------------

    def fresh(self, **over: Any) -> Any:
        """A new instance in its first state; ``over`` changes parameters."""
        if not over:
            with suppress(TypeError, RuntimeError):  # what cannot be copied is built again
                return copy.deepcopy(self._pristine)
        return self.home.make(self.kind, self.name, {**self.params, **over})

    def answer(
        self,
        call: Call | Mapping[str, Any],
        component: Any = None,
        *,
        seed: int = 0,
        train: bool = False,
        amp: bool = False,
        raw: bool = False,
    ) -> dict[str, Tensor]:
        """What a component (a fresh one, in eval mode) says: every tensor of its answer by path.

        It gets clones, or with ``raw`` the arguments themselves. ``disturbs`` then says whether it moved a global
        random generator.
        """
        args = call.args if isinstance(call, Call) else call
        args = args if raw else mapped(args, lambda _, tensor: tensor.clone())
        component = self.fresh() if component is None else component
        component.train(train)
        quiet = torch.no_grad() if self.kind == "teacher" else nullcontext()
        with preserved(seed), quiet, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            before = random_state()
            said = leaves(component(*args.values()))
            self.disturbs = random_state() != before
            return said

    def total(self, args: Mapping[str, Any], component: Any = None, **how: Any) -> Tensor:
        """A loss as the core reduces it: the sum of its terms, each a mean over samples or supervised positions."""
        outputs, batch = args["student"], args["batch"]
        terms = self.answer(args, component, **how).values()
        outputs = None if isinstance(outputs, Mapping) else outputs
        return sum((Counts().share(t, "main", outputs, batch) for t in terms), torch.zeros(()))

    @property
    def declared(self) -> Loss:
        """An instance, for its declarations."""
        return self._pristine  # type: ignore[no-any-return]


def _layout(args: Mapping[str, Any]) -> str:
    logits = getattr(args.get("student"), "logits", None)
    return {2: "classes", 3: "tokens", 4: "dense"}.get(logits.dim(), "other") if logits is not None else "other"


def _guessed(schema: Schema, missing: list[str], form: toys.Form) -> dict[str, Any]:
    """Toy values of required parameters, by what they are or are called."""
    found: dict[str, Any] = {}
    for name in missing:
        if schema.nested(name) in ("student", "teacher"):
            found[name] = toys.model_table(form, 6)
        elif name == "model" and schema.is_callable(name):
            found |= {k: v for k, v in toys.model_table(form, 6).items() if k != "use"}
        elif re.search(r"class", name):
            found[name] = toys.C
        elif re.search(r"dim|width|feature|channel|embed|hidden", name):
            found[name] = toys.D
    return found
