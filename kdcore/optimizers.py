"""Optimisers: torch's, by name, for the run and for the components that step themselves."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdcore.errors import InputError, blame
from kdcore.parts import Parts
from kdcore.recipe import components
from kdcore.signature import schema_of
from kdcore.tables import Recipe, Use


def optimizer_of(table: Use, params: list[Any], place: str) -> torch.optim.Optimizer:
    """A torch optimiser by name, its options checked against its signature; ``params`` as torch takes them."""
    use, known = table.use, _known()
    if use not in known:
        problem = "no such optimiser in torch.optim, or none that steps without a closure"
        raise InputError(f"{place}.use", problem, given=use, allowed=known)
    schema = schema_of(known[use], use)
    schema = replace(schema, params={k: v for k, v in schema.params.items() if k != "params"})
    checked = schema.validate(table.params, place)
    with blame(place, f"{use} refused its options", given=table.params):
        return known[use](params, **checked)


def _known() -> dict[str, type[torch.optim.Optimizer]]:
    """torch's optimisers by name, without those whose step needs a closure (LBFGS)."""
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    own = [(name, each) for name, each in classes if issubclass(each, torch.optim.Optimizer)]
    return {name: each for name, each in own if name not in ("Optimizer", "LBFGS")}


def trainable(parts: Parts) -> list[nn.Parameter]:
    """What the run's optimiser trains: student and components, without those that step themselves."""
    components = parts.components()
    own = {id(p) for _, c in components if c.own_optimizer is not None for p in c.parameters()}
    owners = [c for name, c in components if not name.startswith("teacher.")]
    found = {id(p): p for c in owners for p in c.parameters() if p.requires_grad and id(p) not in own}
    if not found:
        raise InputError("student.train", "nothing is left to train")
    return list(found.values())


def own_optimizers(parts: Parts, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the components that step themselves, by component name: the recipe's, or their own default."""
    rows = [row for row in components(recipe) if "optimizer" in type(row[2]).model_fields]
    tables = {place: getattr(table, "optimizer", None) for place, _, table in rows}
    found = {}
    for name, component in parts.components():
        table, place = tables.get(component.place), f"{component.place}.optimizer"
        if component.own_optimizer is None and table is not None:
            raise InputError(place, "this component is trained by the run's optimiser", hint="take it out")
        params = [p for p in component.parameters() if p.requires_grad]
        if component.own_optimizer is not None and params:
            found[name] = optimizer_of(table or Use(**component.own_optimizer), params, place)
    return found
