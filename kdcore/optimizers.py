"""Optimisers: torch's, by name, for the run and for the components that step themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdcore.errors import InputError, cause
from kdcore.parts import Parts
from kdcore.recipe import components
from kdcore.signature import schema_of
from kdcore.tables import Recipe, Use


def optimizer_of(
    table: Use | Mapping[str, Any], params: list[nn.Parameter], place: str
) -> torch.optim.Optimizer:
    """A torch optimiser by name, its options checked against its signature."""
    options = {"use": table.use, **table.params} if isinstance(table, Use) else dict(table)
    use, known = options.pop("use"), _known()
    if use not in known:
        problem = "no such optimiser in torch.optim, or none that steps without a closure"
        raise InputError(f"{place}.use", problem, given=use, allowed=known)
    schema = schema_of(known[use], use)
    schema = replace(schema, params={k: v for k, v in schema.params.items() if k != "params"})
    checked = schema.validate(options, place)
    try:
        return known[use](params, **checked)
    except Exception as error:
        raise InputError(place, f"{use} refused its options: {cause(error)}", given=options) from error


def _known() -> dict[str, type[torch.optim.Optimizer]]:
    """torch's optimisers by name, without those whose step needs a closure (LBFGS)."""
    base = torch.optim.Optimizer
    classes = {n: v for n, v in vars(torch.optim).items() if inspect.isclass(v) and issubclass(v, base)}
    return {name: each for name, each in classes.items() if name not in ("Optimizer", "LBFGS")}


def own_optimizers(parts: Parts, tables: Mapping[str, Use]) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the components that step themselves, by component name."""
    found, places = {}, _places(parts)
    for name, component in parts.components():
        place = f"{places.get(name, name)}.optimizer"
        if component.own_optimizer is None:
            if name in tables:
                problem = "this component is trained by the run's optimiser"
                raise InputError(place, problem, hint="take it out")
            continue
        params = [p for p in component.parameters() if p.requires_grad]
        if params:
            found[name] = optimizer_of(tables.get(name, component.own_optimizer), params, place)
    return found


def optimizer_tables(recipe: Recipe, parts: Parts) -> dict[str, Use]:
    """The recipe's ``optimizer`` tables by component name."""
    tables = {place: getattr(table, "optimizer", None) for place, _, table in components(recipe)}
    return {name: table for name, place in _places(parts).items() if (table := tables.get(place))}


def _places(parts: Parts) -> dict[str, str]:
    """Component name -> place in the recipe: losses and augmentations stand there by number."""
    augmentations = {
        f"augmentation.{name}": f"augmentation.{i}" for i, name in enumerate(parts.augmentations)
    }
    losses = {f"loss.{slot.name}": f"loss.{i}" for i, slot in enumerate(parts.losses)}
    return {"router": "router", **augmentations, **losses}
