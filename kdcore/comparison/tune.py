"""The same search for every arm: Optuna's TPE over one declared space, judged on val. Never on test."""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kdcore.comparison.runs import Job, run_arm
from kdcore.errors import InputError, KDError, RunError
from kdcore.recipe import schema
from kdcore.source import put
from kdcore.tables import LossTable
from kdcore.task import higher_is_better

Tree = Mapping[str, Any]
Space = dict[str, list[Any]]  # key -> [low, high] or choices
AROUND = 10.0


def spaces(trees: Mapping[str, Tree], declared: Iterable[str]) -> dict[str, Space]:
    """Each arm's space. ``declared``: ``KEY=[LOW, HIGH]`` (log-uniform where LOW > 0, whole numbers where
    both are) or ``KEY=[A, B, C]`` (a choice); of these an arm searches what it has.

    Nothing declared: the learning rate and the weight of loss.0, a decade to either side of the arm's own.
    """
    try:
        import optuna  # noqa: F401 - an optional extra: is it there?
    except ImportError:
        raise InputError("--tune", "Optuna is not installed", hint="pip install 'kdcore[tune]'") from None
    wanted = dict(map(_room, declared))
    if not wanted:
        return {arm: _around(tree) for arm, tree in trees.items()}
    return {
        arm: {key: room for key, room in wanted.items() if _has(tree.get("loss", []), key)}
        for arm, tree in trees.items()
    }


def search(job: Job, spaces: Mapping[str, Space], trials: int, metric: str) -> dict[str, Any]:
    """The best of ``trials`` runs in ``job.folder`` (its ``values`` and ``val``), and all ``trials``.

    The first is the arm as it stands. A search that is taken up again asks for the same trials, because the
    sampler is seeded, and runs those that are not done yet. A trial that fails (NaN, say, or two values that do not
    go together) counts, and wins nothing. Raises where none is judged, or none but the first can be run at all.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    upward = higher_is_better(metric)
    sampler = optuna.samplers.TPESampler(seed=job.tree["seed"])
    engine = optuna.create_study(direction="maximize" if upward else "minimize", sampler=sampler)
    space = {key: _distribution(room) for key, room in spaces[job.arm].items()}
    done: list[dict[str, Any]] = []
    failures: list[KDError] = []
    for number in range(trials):
        trial = engine.ask(space) if number else None
        values = dict(trial.params) if trial else {}
        tree, folder = changed(job.tree, values), job.folder / f"trial-{number}"
        value = _value(replace(job, tree=tree, folder=folder), metric, failures)
        done.append({"values": values, "val": value})
        if trial:
            engine.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
    judged = [each for each in done if each["val"] is not None]
    if not judged or sum(isinstance(each, InputError) for each in failures) == trials - 1 > 0:
        raise RunError(f"every trial failed: {failures[-1]}")
    return {**(max if upward else min)(judged, key=lambda each: each["val"]), "trials": done}


def _value(job: Job, metric: str, failures: list[KDError]) -> float | None:
    """What a trial is judged by: its test split is val, behind ``without_test``. None where it failed."""
    try:
        value = float(run_arm(job)["test"][metric])
        if math.isfinite(value):
            return value
        raise RunError(f"{metric} is {value}")
    except (RunError, InputError) as error:
        failures.append(error)
        return None


def changed(tree: Tree, values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the searched values in place."""
    out = copy.deepcopy(dict(tree))
    for key, value in values.items():
        put(out, key, value)
    return out


def hide_test(tree: Tree) -> dict[str, Any]:
    """The tree with its data behind ``without_test``, and what teachers and stages lay over it too."""
    out = copy.deepcopy(dict(tree))
    for table in (out, *out.get("teacher", {}).values(), *out.get("stage", ())):
        data = table.get("data", {})
        inner = {key: data.pop(key) for key in ("source", "args") if key in data}
        if inner:  # ids alone have nothing to hide
            data["args"] = inner
        if "source" in inner:
            data["source"] = "kdcore.comparison.runs:without_test"
    return out


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


def _around(tree: Tree) -> Space:
    rate = float(tree.get("train", {}).get("optimizer", {}).get("lr", 1e-3))
    weight = tree["loss"][0].get("weight", 1.0) if tree.get("loss") else 0.0
    middles = {
        "train.optimizer.lr": rate,
        "loss.0.weight": weight if isinstance(weight, int | float) else 0.0,
    }
    return {key: [each / AROUND, each * AROUND] for key, each in middles.items() if each > 0}


def _has(losses: list[Any], key: str) -> bool:
    head, number, name, *_ = [*key.split("."), "", ""]
    if head != "loss":
        return True
    if not number.isdigit() or int(number) >= len(losses):
        return False
    _, found = schema("loss", losses[int(number)]["use"])
    return name in LossTable.model_fields or name in found.params


def _distribution(room: list[Any]) -> Any:
    from optuna import distributions

    if not _is_range(room):
        return distributions.CategoricalDistribution(room)
    whole = all(isinstance(each, int) for each in room)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(*room, log=room[0] > 0)
