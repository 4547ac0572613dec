"""A component under test: built with real parameters, in a run, with arguments that the core would give it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.building import schema as schema_of
from kdcore.counts import Counts
from kdcore.kinds import Loss
from kdcore.plugins import Entry
from kdcore.signature import Schema
from kdcore.testing import toys
from kdcore.testing.findings import preserved, random_state
from kdcore.testing.tensors import leaves, mapped
from kdcore.types import Component

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
    def mask(self) -> Tensor | None:
        """Bool [B,L], where the sample has one."""
        found: Tensor | None = getattr(self.args["student"], "mask", None)
        return self.args["batch"].get("mask") if found is None else found

    @property
    def class_axis(self) -> int:
        return 1 if self.layout == "dense" else -1


class Subject:
    """One component of a plugin. ``kdcore.testing.arguments`` fills ``home``, ``params`` and ``calls``."""

    def __init__(
        self, entry: Entry, kind: str, component: Component, recipes: list[Path], folder: Path
    ) -> None:
        self.entry, self.kind, self.component = entry, kind, component
        self.recipes, self.folder = recipes, folder
        self.name = f"{entry.distribution}:{component.name}"
        self.params: dict[str, Any] = {}
        self.calls: list[Call] = []
        self.disturbs = False
        self.home: toys.Home
        self.world: list[Any] = []
        self._pristine: Any = None

    @cached_property
    def _found(self) -> tuple[Any, Schema]:
        return schema_of(self.kind, self.name)

    @property
    def target(self) -> Any:
        return self._found[0]

    @property
    def schema(self) -> Schema:
        return self._found[1]

    @cached_property
    def declares_tokens(self) -> bool:
        """Whether the method says that it works on token positions: in its arguments, code or recipes."""
        said = inspect.getsource(self.target) + self.component.summary
        return (
            "mask" in self.schema.tensors
            or bool(re.search(_TOKENS, said, re.IGNORECASE))
            or any('use = "language"' in path.read_text("utf-8") for path in self.recipes)
        )

    def settle(self, home: toys.Home, params: Mapping[str, Any]) -> None:
        """Live in this run with these parameters."""
        self.home, self.params = home, dict(params)
        self._pristine = home.make(self.kind, self.name, params)
        self.world = home.signature()

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
