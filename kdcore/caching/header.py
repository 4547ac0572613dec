"""The header of a cache: what its rows are the answer to. Two headers are compared key by key, in words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import plugins
from kdcore.checkpoint import write_json
from kdcore.data import Source
from kdcore.errors import InputError
from kdcore.source import leaves
from kdcore.tables import Recipe

FILE, FORMAT = "cache.json", "kdcore.cache 2"
SAME = ("teacher", "vocabulary", "data", "view", "augmentation", "layout", "inputs", "precision")
MIB = 2**20
SAMPLED = 64  # MiB of a large file that enter its digest, evenly spaced


def of_run(
    recipe: Recipe, source: Source, teacher: str, replayed: Collection[str], steps: int | None
) -> dict[str, Any]:
    """What a run asks its teacher about and how. ``replayed`` are the streams whose samples change in its ``steps``."""
    table, data = source.table, source.data
    meaning = {"labels": data.labels, "tokenizer": data.tokenizer}
    digests = {name: None if each is None else _digest(each) for name, each in meaning.items()}
    samples = {
        **table.model_dump(include={"use", "source", "args"}),
        "tune": [table.tune, table.split_seed] if table.tune else None,
        "files": files_of(table.args),
        "samples": {name: len(stream) for name, stream in source.streams.items()},
    }
    changing = {
        "tables": [each.model_dump(exclude_none=True) for each in recipe.augmentation],
        "streams": replayed,
        "seed": recipe.seed,
        "batch_size": table.batch_size,
        "steps": steps,
    }
    said = {
        "view": recipe.teacher[teacher].view,
        "precision": recipe.train.precision,
        "vocabulary": {"classes": data.classes, **digests},
        "data": samples,
        "augmentation": changing if replayed else None,
    }
    return dict(plain(said))


def teacher_of(name: str, recipe: Recipe, teacher: nn.Module) -> dict[str, Any]:
    """How the teacher is built, and a digest of the weights that it has."""
    table = recipe.teacher[name]
    entry, _ = plugins.registry().find("teacher", table.use)
    return {
        **table.model_dump(include={"use", "train", "data"}),
        "name": name,
        "params": table.params,
        "files": files_of(table.params),
        "seed": recipe.seed if table.train is not None else None,
        "weights": tensors_digest(teacher.state_dict()),
        "build": f"{entry.distribution} {entry.version}",
    }


def files_of(params: Mapping[str, Any]) -> dict[str, str]:
    """What the files and folders that parameters name hold, by the parameter's place."""
    named = ((place, value) for place, value in leaves(params) if isinstance(value, str))
    return {place: f"content {file_digest(Path(value))}" for place, value in named if os.path.exists(value)}


def identity(header: Mapping[str, Any]) -> str:
    """What the shards of this cache carry, so that they are taken for no other's."""
    return _digest([FORMAT, *(header[key] for key in (*SAME, "cut"))])


def read(folder: Path) -> dict[str, Any] | None:
    """The header of a cache in ``folder``; None where there is none, InputError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            hint = "kd cache makes it again in another folder"
            raise InputError(str(path), f"made by another version: {found['format']}", hint=hint)
        if found.pop("digest") != _digest(found):
            raise ValueError("its digest is another one")
    except (ValueError, KeyError, TypeError) as error:
        hint = "remove it, and kd cache, run again, makes it anew from the shards"
        raise InputError(str(path), f"a damaged header: {error}", hint=hint) from None
    return found


def write(folder: Path, header: Mapping[str, Any]) -> None:
    tree = plain({"format": FORMAT, **header})
    write_json(folder / FILE, {**tree, "digest": _digest(tree)})


def plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's size and content, or of all files of a folder; of a large one 64 MiB are read, evenly spaced."""
    state = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for each in sorted(p for p in path.rglob("*") if p.is_file()):
            state.update(f"{each.relative_to(path)} {file_digest(each)}".encode())
        return state.hexdigest()
    size = path.stat().st_size
    state.update(str(size).encode())
    step = MIB if size <= SAMPLED * MIB else -(-(size - MIB) // (SAMPLED - 1))
    with path.open("rb") as file:
        for place in range(0, size, step):
            file.seek(place)
            state.update(file.read(MIB))
    return state.hexdigest()


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Of all bits of a state dict: tensors, and what else modules put there (extra state, packed weights)."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            value = tensors_digest({str(key): each for key, each in value.items()})
        if isinstance(value, Tensor):
            value = value.dequantize() if value.is_quantized else value
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            state.update(f"{name} {value!r}".encode())
    return state.hexdigest()
