"""Is a cache the answer to what a run asks? Every difference is refused, in words, before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdcore import parallel
from kdcore.caching import header as headers
from kdcore.caching.keys import row_keys
from kdcore.caching.reader import Cache
from kdcore.context import RunContext
from kdcore.data import Key, Keyed, Source
from kdcore.errors import InputError, nearest
from kdcore.folder import difference
from kdcore.function_loss import FunctionLoss
from kdcore.kinds import Augmentation
from kdcore.parts import Parts
from kdcore.tables import Recipe
from kdcore.types import Batch

ALL_BELOW, SAMPLES = 4096, 256  # data sets up to the first are compared whole, of larger ones so many samples


def same_teacher(
    cache: Cache, recipe: Recipe, name: str, expected: Mapping[str, Any], weights: str | None
) -> None:
    """The keys that the recipe still has of the live teacher, and the weights that it pins."""
    made, table = cache.header["teacher"], recipe.teacher[name]
    if weights is not None and weights != made["weights"]:
        _refuse(
            cache,
            f"teacher.{name}.weights",
            "another teacher",
            f"weights: {made['weights']!r} -> {weights!r}",
        )
    for key in expected:
        if key not in made["params"]:
            hint = nearest(key, [*made["params"], "path", "weights"])
            problem = "neither a key of use = 'cached' nor one of the teacher that the cache was made with"
            raise InputError(f"teacher.{name}.{key}", problem, given=expected[key], hint=hint)
    now = {"params": _plain(expected), "files": headers.files_of(expected)}
    if table.train is not None:
        now |= {"train": _plain(table.train), "data": _plain(table.data), "seed": recipe.seed}
    then = {key: made[key] for key in now}
    then["params"] = {key: made["params"][key] for key in expected}
    then["files"] = {key: made["files"].get(key) for key in now["files"]}
    for key in now["files"]:  # the same file under another path is the same file
        if now["files"][key] == then["files"][key]:
            _put(then["params"], key, _get(now["params"], key))
    _compare(cache, f"teacher.{name}", "another teacher", then, now)


def same_run(cache: Cache, run: RunContext, parts: Parts, name: str) -> None:
    """View, precision, data, vocabulary and augmentation."""
    recipe, header = run.recipe, cache.header
    _compare(cache, f"teacher.{name}.view", "another view", header["view"], dict(parts.views.get(name, {})))
    if recipe is not None and recipe.train.precision != header["precision"]:
        change = f"{header['precision']!r} -> {recipe.train.precision!r}"
        _refuse(cache, "train.precision", "another precision", f"precision: {change}")
    _compare(cache, "data", "another vocabulary", header["vocabulary"], headers.vocabulary_of(run.source))
    _compare(cache, "data", "other data", header["data"], headers.data_of(run.source.table, run.source))
    made = header["augmentation"]
    changing = [n for n, each in parts.augmentations.items() if changes_inputs(each)]
    if made is None and changing:
        problem = f"changes inputs, and the cache {cache.folder} was made without it"
        raise InputError(f"augmentation {changing[0]}", problem, hint="kd cache again with this recipe")
    if made is not None and recipe is not None:
        now = headers.augmentation_of(recipe, made["streams"], made["steps"])
        _compare(cache, "augmentation", "another augmentation", made, now or {})
        if made["tables"] and parallel.world() > 1:
            raise InputError("augmentation", "each process draws its own, and the cache was made by one")


def same_samples(cache: Cache, source: Source, view: Mapping[str, str]) -> None:
    """The samples at each position of each stream: their ids, and what the teacher reads of them."""
    for name, rows in cache.order.items():
        data = source.streams[name]
        step = 1 if len(data) <= ALL_BELOW else len(data) // SAMPLES
        places = list(range(0, len(data), step))
        for start in range(0, len(places), SAMPLES):
            here = places[start : start + SAMPLES]
            batch = Keyed({name: data}, source.seed).__getitems__([Key(name, 0, place) for place in here])
            _same_rows(cache, name, here, rows[here], viewed(batch, view))


def _same_rows(cache: Cache, stream: str, places: list[int], rows: Tensor, batch: Batch) -> None:
    ids = cache.ids[rows]
    if not torch.equal(ids, batch["id"]):
        first = int((ids != batch["id"]).int().argmax())
        change = f"position {places[first]} of {stream!r} holds sample {int(batch['id'][first])}, not {int(ids[first])}"
        _refuse(cache, "data.source", "another order, or other samples", change)
    same = cache.keys[rows] == row_keys(batch, cache.header["inputs"])
    if not bool(same.all()):
        sample, names = int(ids[int(same.int().argmin())]), ", ".join(cache.header["inputs"])
        change = (
            f"sample {sample} has another {names}, in {int((~same).sum())} of {len(same)} samples compared"
        )
        _refuse(cache, "data.source", "other content", change)


def same_losses(cache: Cache, parts: Parts, name: str) -> None:
    """Every loss that hears this teacher reads what the cache keeps, and can read a top k of that temperature."""
    codec, kept = cache.layout.codec, set(cache.layout.shapes)
    kept |= {"logits", "unembed"} if "hidden" in kept else set()
    for slot in (each for each in parts.losses if name in each.teachers):
        renamed = slot.reads.get("teacher", {})
        wants = {
            renamed.get(n, n)
            for n in (w.partition(".")[2] for w in slot.loss.wants() if w.startswith("teacher."))
        }
        if "logits" in wants and codec is not None:
            _takes_topk(cache, slot.name, slot.loss, codec.temperature)
            wants -= {"logits"}
        if missing := sorted(wants - kept):
            problem = f"reads {missing[0]!r} of the teacher, which the cache does not keep"
            raise InputError(
                f"loss {slot.name}", problem, allowed=sorted(kept), hint="kd cache with this recipe"
            )
    if codec is not None and name in parts.routed:
        raise InputError("router", "reads logits, the cache keeps their top k", hint="kd cache --codec full")


def _takes_topk(cache: Cache, name: str, loss: Any, temperature: float) -> None:
    if not loss.topk:
        problem = "needs all logits of its teacher, and the cache keeps their top k"
        raise InputError(f"loss {name}", problem, given=str(cache.folder), hint="kd cache --codec full")
    own = temperature_of(loss)
    if own != temperature:
        _refuse(cache, f"loss {name}", "another temperature", f"temperature: {temperature:g} -> {own:g}")


def temperature_of(loss: Any) -> float:
    """The temperature at which a loss takes its teacher's probabilities."""
    own = loss.temperature if isinstance(loss, FunctionLoss) else getattr(loss, "temperature", None)
    return 1.0 if own is None else float(own)


def changes_inputs(augmentation: Augmentation) -> bool:
    """Whether it makes other inputs. One that only draws which samples come next leaves them as they are."""
    return augmentation.changes_inputs and type(augmentation).forward is not Augmentation.forward


def viewed(batch: Batch, view: Mapping[str, str]) -> Batch:
    mine = batch.copy()
    mine.update({key: batch[source] for key, source in view.items()})
    return mine


def _compare(cache: Cache, place: str, what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if change := difference(then, _plain(now)):
        _refuse(cache, place, what, change)


def _refuse(cache: Cache, place: str, what: str, change: str) -> None:
    problem = f"the cache {cache.folder} was made with {what} ({change})"
    raise InputError(place, problem, hint="kd cache again with this recipe, or undo the change")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _get(tree: Any, path: str) -> Any:
    for step in path.split("."):
        tree = tree[int(step) if isinstance(tree, list) else step]
    return tree


def _put(tree: Any, path: str, value: Any) -> None:
    before, _, last = path.rpartition(".")
    tree = _get(tree, before) if before else tree
    tree[int(last) if isinstance(tree, list) else last] = value
