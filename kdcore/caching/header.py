"""The header of a cache: what its rows are the answer to. Two headers are compared key by key, in words."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdcore import plugins
from kdcore.caching.keys import file_digest
from kdcore.checkpoint import write_json
from kdcore.data import Source
from kdcore.errors import InputError
from kdcore.tables import DataTable, Recipe, TeacherTable

FILE, VERSION = "cache.json", 1
SAME = ("teacher", "vocabulary", "data", "view", "augmentation", "codec", "outputs", "inputs", "precision")


def data_of(table: DataTable, source: Source) -> dict[str, Any]:
    """What decides the samples: the source and its arguments, files that these name, the streams' sizes."""
    return {
        "source": table.source if table.use == "module" else "ids",
        "args": table.args,
        "tune": table.tune,
        "split_seed": table.split_seed if table.tune else None,
        "files": files_of(table.args),
        "samples": {name: len(stream) for name, stream in source.streams.items()},
    }


def vocabulary_of(source: Source) -> dict[str, Any]:
    """Digests of what ids and classes mean, where the data say it."""
    data = source.data
    return {
        "classes": data.classes,
        "labels": None if data.labels is None else _digest(list(data.labels)),
        "tokenizer": None if data.tokenizer is None else _digest(data.tokenizer),
    }


def teacher_of(name: str, table: TeacherTable, recipe: Recipe, weights: str) -> dict[str, Any]:
    """How the teacher is built, and a digest of the weights that it then has."""
    entry, _ = plugins.registry().find("teacher", table.use)
    return {
        "name": name,
        "use": table.use,
        "params": table.params,
        "files": files_of(table.params),
        "train": table.train,
        "data": table.data,
        "seed": recipe.seed if table.train is not None else None,
        "weights": weights,
        "build": f"{entry.distribution} {entry.version}",
    }


def augmentation_of(recipe: Recipe, replayed: list[str], steps: int) -> dict[str, Any] | None:
    """What decides the inputs of streams whose samples change from step to step; None where none does."""
    if not replayed:
        return None
    return {
        "tables": [each.model_dump(exclude_none=True) for each in recipe.augmentation],
        "streams": replayed,
        "seed": recipe.seed,
        "batch_size": recipe.data.batch_size,
        "steps": steps,
    }


def files_of(params: Mapping[str, Any] | list[Any], place: str = "") -> dict[str, str]:
    """Digests of the files and folders that parameters name, by the parameter's place (a list's by number)."""
    found: dict[str, str] = {}
    for key, value in params.items() if isinstance(params, Mapping) else enumerate(params):
        if isinstance(value, Mapping | list):
            found |= files_of(value, f"{place}{key}.")
        elif isinstance(value, str) and ("/" in value or "." in value) and os.path.exists(value):
            found[f"{place}{key}"] = file_digest(Path(value))
    return found


def identity(header: Mapping[str, Any]) -> str:
    """What the shards of this cache carry, so that they are taken for no other's."""
    return _digest([header["format"], *(header[key] for key in SAME)])


def made_with() -> dict[str, str]:
    """For the record; not compared."""
    return {"torch": torch.__version__, "kdcore": importlib.metadata.version("kdcore")}


def read(folder: Path) -> dict[str, Any] | None:
    """The header of a cache in ``folder``; None where there is none, InputError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["format"] != f"kdcore.cache {VERSION}":
            problem = f"made by another version: {found['format']}"
            raise InputError(str(path), problem, hint="kd cache makes it again in another folder")
        if found["digest"] != _digest({k: v for k, v in found.items() if k != "digest"}):
            raise ValueError("its digest is another one")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"a damaged header: {error}", hint="kd cache makes it anew") from None
    return found


def write(folder: Path, header: Mapping[str, Any]) -> None:
    tree = {"format": f"kdcore.cache {VERSION}", **header}
    plain = json.loads(json.dumps(tree))
    write_json(folder / FILE, {**plain, "digest": _digest(plain)})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
