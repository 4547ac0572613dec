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

from kdcore.counts import Counts
from kdcore.kinds import Loss
from kdcore.recipe import schema
from kdcore.signature import Schema, import_string
from kdcore.testing.findings import reseed
from kdcore.testing.opening import Plugin
from kdcore.testing.tensors import Change, gradients, leaves, mapped
from kdcore.testing.toys import Home
from kdcore.types import Component, Outputs

_TOKENS = r"\btokens?\b|\[B, ?L\b|\bvocabular|\bsequences?\b|\.mask\b|[\"']mask[\"']"


@dataclass(frozen=True)
class Call:
    """The arguments of one call by name."""

    args: dict[str, Any]

    @property
    def size(self) -> int:
        """B; 0 for a batch of several streams, whose rows cannot be taken as one."""
        batch = self.args["batch"]
        return 0 if batch.parts else len(batch)

    @property
    def logits(self) -> Tensor | None:
        """The student's: [B,C], [B,L,V] or [B,C,H,W]."""
        return getattr(self.args.get("student"), "logits", None)

    def aligned(self, name: str) -> Tensor | None:
        """``mask`` [B,L] or ``target``: the student's, or else the batch's."""
        found: Tensor | None = getattr(self.args["student"], name, None)
        return self.args["batch"].get(name) if found is None else found

    @property
    def class_axis(self) -> int:
        return 1 if self.logits is not None and self.logits.dim() == 4 else -1

    def has_rows(self, tensor: Tensor, path: str = "") -> bool:
        return bool(tensor.dim()) and len(tensor) == self.size and not path.endswith(("/weight", "/bias"))

    def but(self, change: Change) -> Call:
        return Call(mapped(self.args, change))

    def rows(self, index: Tensor) -> Call:
        """The samples at ``index``, in its order."""
        found = self.but(lambda path, t: t[index] if self.has_rows(t, path) else t)
        lists = {k: v for k, v in found.args["batch"].items() if isinstance(v, list)}
        found.args["batch"].update({k: [v[i] for i in index.tolist()] for k, v in lists.items()})
        return found


class Subject:
    """One component of a plugin. ``kdcore.testing.arguments`` fills ``home``, ``params`` and ``calls``."""

    home: Home
    params: dict[str, Any]
    calls: list[Call]
    declared: Loss
    """An instance, for its declarations."""
    world: list[Any]

    def __init__(self, plugin: Plugin, kind: str, component: Component, folder: Path) -> None:
        self.plugin, self.kind, self.component, self.folder = plugin, kind, component, folder
        self.name = f"{plugin.entry.distribution}:{component.name}"

    @cached_property
    def target(self) -> Any:
        return import_string(self.component.target, "use")

    @cached_property
    def schema(self) -> Schema:
        return schema(self.kind, self.name)[1]

    @cached_property
    def declares_tokens(self) -> bool:
        """Whether the method says that it works on token positions: in its arguments, code or recipes."""
        said = inspect.getsource(self.target) + self.component.summary
        texts = (path.read_text("utf-8") for path in self.plugin.recipes)
        named = "mask" in self.schema.tensors or re.search(_TOKENS, said, re.IGNORECASE)
        return bool(named) or any('use = "language"' in text for text in texts)

    def settle(self, home: Home, params: Mapping[str, Any]) -> None:
        """Live in this run with these parameters."""
        self.home, self.params, self.calls = home, dict(params), []
        self.declared = home.make(self.kind, self.name, params)
        home.rest()
        self.world = home.signature()

    def fresh(self, **over: Any) -> Any:
        """A new instance in its first state; ``over`` changes parameters."""
        if not over:
            with suppress(TypeError, RuntimeError):  # what cannot be copied is built again
                return copy.deepcopy(self.declared)
        return self.home.make(self.kind, self.name, {**self.params, **over})

    def answer(
        self, call: Call, component: Any = None, *, seed: int = 0, train: bool = False, amp: bool = False
    ) -> dict[str, Tensor]:
        """What a component (a fresh one, in eval mode) says of clones: every tensor of its answer by path."""
        args = mapped(call.args, lambda _, tensor: tensor.clone())
        component = self.fresh() if component is None else component
        component.train(train)
        reseed(seed)
        quiet = torch.no_grad() if self.kind == "teacher" else nullcontext()
        with quiet, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return leaves(component(*args.values()))

    def total(self, call: Call, component: Any = None, *, amp: bool = False) -> Tensor:
        """A loss as the core reduces it: the sum of its terms, each a mean over samples or supervised positions."""
        outputs, batch = call.args["student"], call.args["batch"]
        outputs = outputs if isinstance(outputs, Outputs) else None
        terms = self.answer(call, component, amp=amp).values()
        return sum((Counts().share(t, "main", outputs, batch) for t in terms), torch.zeros(()))

    def gradients(self, call: Call, component: Any = None, side: str = "student") -> dict[str, Tensor]:
        """The gradient of ``total`` at one side's floating tensors, by path; zeros where none arrives."""
        roots: dict[str, Tensor] = {}

        def live(path: str, tensor: Tensor) -> Tensor:
            if not path.startswith(side) or not tensor.is_floating_point():
                return tensor
            return roots.setdefault(path, tensor.detach().requires_grad_())

        found = gradients(self.total(call.but(live), component), roots)
        return {path: torch.zeros_like(roots[path]) if g is None else g for path, g in found.items()}
