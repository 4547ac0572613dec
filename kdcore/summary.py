"""What a run was made of, for its report: a row a part, with the parameters that it had, defaults included."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch import optim

from kdcore.recipe import components, is_artefact, schema, teacher_train
from kdcore.report import cell
from kdcore.signature import Schema, import_string, schema_of
from kdcore.tables import Recipe, Table, TrainTable
from kdcore.task import DEFAULT_METRICS

APART = ("exporter", "probe")  # have sections of their own
HOW = {"clip", "accumulate", "precision", "keep"}
Settings = dict[str, Any]


def rows(recipe: Recipe, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Data, models, method and budget; ``results``, as in results.json, hold what only the run knew."""
    counts = results.get("parameters", {})
    return [
        {
            "part": part,
            "is": use,
            "settings": told(settings),
            "parameters": counts.get(part.split(".")[-1], ""),
        }
        for part, use, settings in _parts(recipe, results.get("data", {}))
    ]


def told(settings: Settings) -> str:
    return "; ".join(f"{key.replace('_', ' ')} {cell(value)}" for key, value in settings.items())


def _parts(recipe: Recipe, facts: Mapping[str, Any]) -> Iterator[tuple[str, str, Settings]]:
    """(part, what it is, its settings), in a recipe's order."""
    data, task = recipe.data, recipe.task
    yield "data", _named(data.source or data.use), _called(data.source, data.args)
    if facts:
        yield "samples", facts["description"], facts["samples"]
    for place, kind, table in components(recipe):
        if kind not in APART:
            own = _set(table, set(type(table).model_fields) - {"use", "data", "optimizer"})
            how = own.pop("train", {})  # of a teacher: has a row of its own
            chosen = {"train": how} if isinstance(how, list) else {}
            yield place, table.use, {**own, **chosen, **effective(kind, table.use, table.params)}
    judged = DEFAULT_METRICS[task.use] if task.metrics is None else task.metrics
    learned = {"metrics": judged, "weight": task.weight, **_set(task, {"label_smoothing", "stream"})}
    yield "task", task.use, learned
    for name, teacher in recipe.teacher.items():
        if teacher.train is not None:
            yield f"training of teacher {name}", *_training(teacher_train(recipe, name), recipe)
    yield "training of the student", *_training(recipe.train, recipe)


def effective(kind: str, use: str, params: Mapping[str, Any]) -> Settings:
    """A component's parameters as they were, those of the components nested in it and of its ``model`` too."""
    _, found = schema(kind, use)
    settings = _with_defaults(found, params)
    for key, value in params.items():
        nested = found.made(key) if key in found.params else None
        if nested and isinstance(value, Mapping) and "use" in value:
            inner = effective(nested, value["use"], {k: v for k, v in value.items() if k != "use"})
            settings[key] = f"{value['use']} ({told(inner)})"
    model = params.get("model")
    built = {"model", "args"} <= found.params.keys() and found.made("model") == "callable"
    if built and model and not is_artefact(model) and not is_artefact(settings.get("args")):
        settings["model"] = f"{_named(model)}({told(_called(model, settings.pop('args', {})))})"
    return {key: _named(value) for key, value in settings.items()}


def _called(function: Any, args: Mapping[str, Any]) -> Settings:
    """What a callable, or what an import string names, is called with."""
    target = import_string(function, "setup") if isinstance(function, str) and function else function
    return _with_defaults(schema_of(target, str(function)), args) if target else {}


def _with_defaults(found: Schema, given: Mapping[str, Any]) -> Settings:
    """The defaults, without what is off or empty, under what was given."""
    left = {name: p.default for name, p in found.params.items() if p.default is not inspect.Parameter.empty}
    off = [
        name for name, v in left.items() if v is None or v is False or (isinstance(v, Sized) and not len(v))
    ]
    return {**{name: value for name, value in left.items() if name not in off}, **given}


def _training(train: TrainTable, recipe: Recipe) -> tuple[str, Settings]:
    """The budget, the optimiser with torch's own defaults, the schedule."""
    use, given, schedule = train.optimizer.use, train.optimizer.params, train.schedule
    length = {"steps": train.steps} if train.steps else {"epochs": train.epochs or 1}
    settings = {**length, "batch_size": recipe.data.batch_size}
    settings |= _with_defaults(schema_of(getattr(optim, use), use), given)
    return use, {**settings, "schedule": schedule.use, **_set(schedule, {"warmup"}), **_set(train, HOW)}


def _set(table: Table, names: set[str]) -> Settings:
    """What a table says other than by default."""
    return table.model_dump(include=names, exclude_defaults=True, exclude_none=True)


def _named(value: Any) -> Any:
    """A function without its address."""
    return f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else value
