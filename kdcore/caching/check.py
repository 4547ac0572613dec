"""Is a cache the answer to what a run asks? Every difference is refused, in words, before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kdcore import parallel
from kdcore.caching import header as headers
from kdcore.caching.keys import row_keys
from kdcore.caching.reader import Cache
from kdcore.data import Key, Source, batch_of
from kdcore.errors import InputError, nearest
from kdcore.folder import difference
from kdcore.kinds import Augmentation
from kdcore.parts import Parts, Slot
from kdcore.source import leaves
from kdcore.streams import viewed
from kdcore.tables import Recipe

ALL_BELOW, SAMPLES = 4096, 256  # data sets up to the first are compared whole, of larger ones so many samples
OF_RUN = {  # key of the header -> place in the recipe, and what is another one
    "view": ("teacher.{}.view", "another view"),
    "precision": ("train.precision", "another precision"),
    "vocabulary": ("data", "another vocabulary"),
    "data": ("data", "other data"),
    "augmentation": ("augmentation", "another augmentation"),
}


def same_teacher(
    cache: Cache, recipe: Recipe, name: str, expected: Mapping[str, Any], weights: str | None
) -> None:
    """The keys that the recipe still has of the live teacher, and the weights that it pins."""
    made, table = cache.header["teacher"], recipe.teacher[name]
    for key in expected:
        if key not in made["params"]:
            hint = nearest(key, [*made["params"], "path", "weights"])
            problem = "neither a key of use = 'cached' nor one of the teacher that the cache was made with"
            raise InputError(f"teacher.{name}.{key}", problem, given=expected[key], hint=hint)
    files = headers.files_of(expected)  # the same file under another path is the same file
    params = {key: made["params"][key] for key in expected}
    now: dict[str, Any] = {"params": dict(leaves(headers.plain(expected))) | files}
    then = {"params": dict(leaves(params)) | {place: made["files"].get(place) for place in files}}
    if table.train is not None:
        now |= {"train": table.train, "data": table.data, "seed": recipe.seed}
    if weights is not None:
        now["weights"] = weights
    _compare(cache, f"teacher.{name}", "another teacher", {key: made[key] for key in now} | then, now)


def same_run(cache: Cache, recipe: Recipe, source: Source, parts: Parts, name: str) -> None:
    """View, precision, vocabulary, data and augmentation."""
    made = cache.header["augmentation"]
    now = headers.of_run(recipe, source, name, replayed(parts, source), made and made["steps"])
    for key, (place, what) in OF_RUN.items():
        _compare(cache, place.format(name), what, {key: cache.header[key]}, {key: now[key]})
    if made is not None and made["tables"] and parallel.world() > 1:
        raise InputError("augmentation", "each process draws its own, and the cache was made by one")


def same_samples(cache: Cache, source: Source, view: Mapping[str, str]) -> None:
    """The samples at each position of each stream: their ids, and what the teacher reads of them."""
    for name, first in cache.streams.items():
        data, inputs = source.streams[name], cache.header["inputs"]
        places = torch.arange(0, len(data), 1 if len(data) <= ALL_BELOW else len(data) // SAMPLES)
        for here in places.split(SAMPLES):
            keys = [Key(name, 0, place) for place in here.tolist()]
            batch = viewed(batch_of(data, keys, source.seed), view)
            other = cache.keys[first + here] != row_keys(batch, inputs)
            if bool(other.any()):
                place = int(here[other][0])
                then, now = int(cache.ids[first + place]), int(batch["id"][other][0])
                what, change = "other content", f"sample {now} has another {', '.join(inputs)}"
                if then != now:
                    what = "another order, or other samples"
                    change = f"position {place} of {name!r} holds sample {now}, not {then}"
                change += f"; {int(other.sum())} of {len(other)} samples compared differ"
                _refuse(cache, "data.source", what, change)


def same_losses(cache: Cache, parts: Parts, name: str) -> None:
    """Every loss that hears this teacher reads what the cache keeps, and can read a top k of that temperature."""
    kept, codec = cache.layout.kept, cache.layout.codec
    for slot, names in readings(parts, name):
        if missing := sorted(names - kept):
            problem = f"reads {missing[0]!r} of the teacher, which the cache does not keep"
            hint = "kd cache with this recipe"
            raise InputError(f"loss {slot.name}", problem, allowed=sorted(kept), hint=hint)
    if codec is not None and (own := temperature(parts, name)) not in (None, codec.temperature):
        _refuse(cache, "loss", "another temperature", f"temperature: {codec.temperature:g} -> {own:g}")


def readings(parts: Parts, name: str) -> Iterator[tuple[Slot, set[str]]]:
    """Each loss that hears a teacher, and what it reads of it."""
    for slot in (each for each in parts.losses if name in each.teachers):
        renamed = slot.reads.get("teacher", {})
        sides = (want.partition(".") for want in slot.loss.wants())
        yield slot, {renamed.get(each, each) for side, _, each in sides if side == "teacher"}


def temperature(parts: Parts, name: str) -> float | None:
    """The one at which all that read a teacher's logits take its top k; InputError where one of them cannot."""
    hint, found = "kd cache --codec full", set()
    if name in parts.routed:
        raise InputError("router", "needs all logits of its teachers", hint=hint)
    for slot in (slot for slot, names in readings(parts, name) if "logits" in names):
        if not slot.loss.topk:
            raise InputError(f"loss {slot.name}", "needs all logits of its teacher, not a top k", hint=hint)
        found.add(float(getattr(slot.loss, "temperature", None) or 1.0))
    if len(found) > 1:
        problem = "losses of several temperatures: a top k is taken at one"
        raise InputError("loss", problem, given=sorted(found), hint=hint)
    return found.pop() if found else None


def replayed(parts: Parts, source: Source) -> list[str]:
    """The streams whose samples change from step to step."""
    changing = any(map(changes_inputs, parts.augmentations.values()))
    return [name for name, data in source.streams.items() if changing or hasattr(data, "augment")]


def changes_inputs(augmentation: Augmentation) -> bool:
    """Whether it makes other inputs. One that only draws which samples come next leaves them as they are."""
    return augmentation.changes_inputs and type(augmentation).forward is not Augmentation.forward


def _compare(cache: Cache, place: str, what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if change := difference(then, headers.plain(now)):
        _refuse(cache, place, what, change)


def _refuse(cache: Cache, place: str, what: str, change: str) -> None:
    problem = f"the cache {cache.folder} was made with {what} ({change})"
    raise InputError(place, problem, hint="kd cache again with this recipe, or undo the change")
