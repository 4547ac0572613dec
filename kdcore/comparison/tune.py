"""The same search for every arm: Optuna's TPE over one declared space, judged on val. Never on test."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from kdcore import building
from kdcore.comparison.runs import Job, run_arm
from kdcore.errors import InputError, RunError
from kdcore.source import override
from kdcore.tables import LossTable
from kdcore.task import higher_is_better

Space = dict[str, list[Any]]  # key -> [low, high] or choices
AROUND = 10.0


@dataclass(frozen=True)
class Study:
    """One arm's search: ``trials`` runs in ``job.folder``, of which the first is the arm as it stands."""

    job: Job
    space: Space
    trials: int
    metric: str


def spaces(trees: Mapping[str, Mapping[str, Any]], declared: Iterable[str]) -> dict[str, Space]:
    """Each arm's space. ``declared``: ``KEY=[LOW, HIGH]`` (log-uniform where LOW > 0, whole numbers where
    both are) or ``KEY=[A, B, C]`` (a choice); of these an arm searches what it has.

    Nothing declared: the learning rate and the weight of loss.0, a decade to either side of the arm's own.
    """
    try:
        import optuna  # noqa: F401 - an optional extra: is it there?
    except ImportError:
        raise InputError("--tune", "Optuna is not installed", hint="pip install 'kdcore[tune]'") from None
    wanted = dict(map(_room, declared))
    return {
        arm: {k: room for k, room in wanted.items() if _has(tree.get("loss", []), k)}
        if wanted
        else _around(tree)
        for arm, tree in trees.items()
    }


def search(study: Study) -> dict[str, Any]:
    """Run the trials that are not done yet; returns the best one's values, and all trials.

    A search that is taken up again asks for the same trials, because the sampler is seeded. A trial whose
    training fails (NaN, say) counts, and wins nothing.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    upward = higher_is_better(study.metric)
    sampler = optuna.samplers.TPESampler(seed=study.job.tree["seed"])
    engine = optuna.create_study(direction="maximize" if upward else "minimize", sampler=sampler)
    trials: list[dict[str, Any]] = []

    def attempt(values: Mapping[str, Any]) -> float:
        tree, folder = changed(study.job.tree, values), study.job.folder / f"trial-{len(trials)}"
        trials.append({"values": dict(values), "val": None})
        found = run_arm(replace(study.job, tree=tree, folder=folder))["test"]  # val, behind ``without_test``
        trials[-1]["val"] = value = float(found[study.metric])
        return value

    with suppress(RunError):
        attempt({})
    engine.optimize(
        lambda trial: attempt({key: _suggest(trial, key, room) for key, room in study.space.items()}),
        n_trials=study.trials - 1,
        catch=(RunError,),
    )
    done = [t for t in trials if t["val"] is not None]
    if not done:
        raise RunError("every trial failed")
    best = max(done, key=lambda t: t["val"] if upward else -t["val"])
    return {**best, "trials": trials}


def changed(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the searched values in place."""
    out = copy.deepcopy(dict(tree))
    for key, value in values.items():
        override(out, f"{key}={value}")
    return out


def hide_test(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its data behind ``without_test``, and what teachers and stages lay over it too."""
    if "source" not in tree["data"]:  # ids alone: there is nothing to hide
        return dict(tree)
    out = {**tree, "data": _behind(tree["data"])}
    if "teacher" in tree:
        out["teacher"] = {name: _data_behind(table) for name, table in tree["teacher"].items()}
    if "stage" in tree:
        out["stage"] = [_data_behind(table) for table in tree["stage"]]
    return out


def _data_behind(table: Mapping[str, Any]) -> dict[str, Any]:
    return {**table, "data": _behind(table["data"])} if table.get("data") else dict(table)


def _behind(data: Mapping[str, Any]) -> dict[str, Any]:
    """A data table, or a part of one: its source and arguments become arguments of ``without_test``."""
    out = {key: value for key, value in data.items() if key not in ("source", "args")}
    if "source" in data:
        out["source"] = "kdcore.comparison.runs:without_test"
    inner = {key: data[key] for key in ("source", "args") if key in data}
    return {**out, "args": inner} if inner else out


def _room(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        room = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        room = None
    if not isinstance(room, list) or len(room) < 2 or (_is_range(room) and room[0] >= room[1]):
        raise InputError("--space", "no range", given=text, allowed="KEY=[LOW, HIGH] or KEY=[A, B, C]")
    return key, room


def _is_range(room: list[Any]) -> bool:
    return len(room) == 2 and all(type(each) in (int, float) for each in room)


def _around(tree: Mapping[str, Any]) -> Space:
    rate = float(tree.get("train", {}).get("optimizer", {}).get("lr", 1e-3))
    weight = tree["loss"][0].get("weight", 1.0) if tree.get("loss") else 0.0
    found = {"train.optimizer.lr": [rate / AROUND, rate * AROUND]}
    if isinstance(weight, int | float) and weight > 0:
        found["loss.0.weight"] = [weight / AROUND, weight * AROUND]
    return found


def _has(losses: list[Any], key: str) -> bool:
    head, number, name, *_ = [*key.split("."), "", ""]
    if head != "loss":
        return True
    if not number.isdigit() or int(number) >= len(losses):
        return False
    _, schema = building.schema("loss", losses[int(number)]["use"])
    return name in LossTable.model_fields or name in schema.params


def _suggest(trial: Any, key: str, room: list[Any]) -> Any:
    if not _is_range(room):
        return trial.suggest_categorical(key, room)
    whole = all(isinstance(each, int) for each in room)
    return (trial.suggest_int if whole else trial.suggest_float)(key, *room, log=room[0] > 0)
