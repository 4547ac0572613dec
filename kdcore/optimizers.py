"""Optimisers: torch's, by name, for the run and for the components that step themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdcore.errors import InputError, cause, nearest
from kdcore.parts import Parts
from kdcore.signature import schema_of
from kdcore.tables import Recipe, Use


def optimizer_of(
    table: Use | Mapping[str, Any], params: list[nn.Parameter], place: str
) -> torch.optim.Optimizer:
    """A torch optimiser by name, its options checked against its signature."""
    options = table.params if isinstance(table, Use) else dict(table)
    use = table.use if isinstance(table, Use) else options.pop("use")
    known = _known()
    if use not in known:
        problem = "no such optimiser in torch.optim, or none that steps without a closure"
        raise InputError(f"{place}.use", problem, given=use, hint=nearest(use, known))
    schema = schema_of(known[use], use)
    schema = replace(schema, params={k: v for k, v in schema.params.items() if k != "params"})
    checked = schema.validate(options, place)
    try:
        return known[use](params, **checked)
    except Exception as error:
        raise InputError(place, f"{use} refused its options: {cause(error)}", given=options) from error


def _known() -> dict[str, type[torch.optim.Optimizer]]:
    base = torch.optim.Optimizer
    classes = {n: v for n, v in vars(torch.optim).items() if inspect.isclass(v) and issubclass(v, base)}
    empty = inspect.Parameter.empty
    return {
        name: each
        for name, each in classes.items()
        if each is not base and inspect.signature(each.step).parameters["closure"].default is not empty
    }


def own_optimizers(parts: Parts, tables: Mapping[str, Use]) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the components that step themselves, by component name."""
    found = {}
    for name, component in parts.components():
        place = f"{_place(parts, name)}.optimizer"
        if component.own_optimizer is None:
            if name in tables:
                problem = "this component is trained by the run's optimiser"
                raise InputError(place, problem, hint="take it out")
            continue
        params = [p for p in component.parameters() if p.requires_grad]
        if params:
            found[name] = optimizer_of(tables.get(name, component.own_optimizer), params, place)
    return found


def _place(parts: Parts, name: str) -> str:
    """A component's place in the recipe: losses and augmentations stand there by number."""
    kind, _, own = name.partition(".")
    names = {"loss": [slot.name for slot in parts.losses], "augmentation": list(parts.augmentations)}
    return f"{kind}.{names[kind].index(own)}" if own in names.get(kind, []) else name


def optimizer_tables(recipe: Recipe, parts: Parts) -> dict[str, Use]:
    """The recipe's ``optimizer`` tables by component name."""
    tables: dict[str, Use] = {}
    if recipe.router and recipe.router.optimizer:
        tables["router"] = recipe.router.optimizer
    for name, each in zip(parts.augmentations, recipe.augmentation, strict=True):
        if each.optimizer:
            tables[f"augmentation.{name}"] = each.optimizer
    for slot, loss in zip(parts.losses, recipe.loss, strict=True):
        if loss.optimizer:
            tables[f"loss.{slot.name}"] = loss.optimizer
    return tables
