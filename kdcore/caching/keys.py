"""What a row is looked up by: 64 bits of the sample's id and of everything that the teacher read of it.

A row is so found for exactly the input that the teacher answered: another augmentation, view, tokenizer, seed or
content of the sample has another key, whatever the header says. The bits come from integer arithmetic on the
tensors' own bytes, on their device: a checksum against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import InputError
from kdcore.types import Batch

MIB = 2**20
SAMPLED = 64  # MiB of a large file that enter its digest, evenly spaced


class Watched(Batch):
    """A batch that notes which of its values are read; whoever copies or lists it has read all."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch, batch.parts)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().setdefault(key, default)

    def _all(self) -> None:
        self.read.update(super().keys())

    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def keys(self) -> Any:
        self._all()
        return super().keys()

    def values(self) -> Any:
        self._all()
        return super().values()

    def items(self) -> Any:
        self._all()
        return super().items()

    def copy(self) -> Batch:
        return Batch(self.items(), self.parts)


def row_keys(batch: Batch, names: Iterable[str]) -> Tensor:
    """int64 [B], on the CPU, from ``id`` and the values of these names."""
    if "id" not in batch:
        raise InputError("data.source", "its batches have no 'id', which a cache finds its rows by")
    found = _mixed(batch["id"].to(torch.int64))
    for name in sorted(names):
        if name not in batch:
            raise InputError("data.source", f"the batch has no {name!r}", allowed=sorted(batch))
        rows, kind = _row_sums(batch[name])
        found = _mixed((found ^ _number(name, *kind)) + rows.to(found.device))
    return found.cpu()


def _row_sums(value: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """int64 [B] of each row's bits, and what else says which value it is: dtype and shape."""
    if not isinstance(value, Tensor):
        return torch.tensor([_number(each) for each in value], dtype=torch.int64), ()
    flat = value.detach().contiguous().reshape(len(value), -1)
    raw = (flat if flat.shape[1] else flat.new_zeros(len(flat), 1)).view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 8)).view(torch.int64)
    mixed = (words ^ _shifted(words, 32)) * _weights(words.shape[1], str(words.device))
    return (mixed ^ _shifted(mixed, 29)).sum(1), (str(value.dtype), tuple(value.shape[1:]))


@lru_cache(maxsize=8)
def _weights(count: int, device: str) -> Tensor:
    return _mixed(torch.arange(1, count + 1, dtype=torch.int64, device=device)) | 1


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: each bit of the answer depends on all bits."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, with zeros from the left."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _number(*values: Any) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big"))


def file_digest(path: Path) -> str:
    """Of a file's size and content, or of all files of a folder; of a large one 64 MiB are read, evenly spaced."""
    state = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for each in sorted(p for p in path.rglob("*") if p.is_file()):
            state.update(f"{each.relative_to(path)} {file_digest(each)}".encode())
        return state.hexdigest()
    size = path.stat().st_size
    state.update(str(size).encode())
    with path.open("rb") as file:
        for part in range(SAMPLED) if size > SAMPLED * MIB else [-1]:
            file.seek(max(part, 0) * (size - MIB) // (SAMPLED - 1))
            state.update(file.read(MIB if part >= 0 else -1))
    return state.hexdigest()


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Of all bits of a state dict: tensors, and what else modules put there (extra state, packed weights)."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        if isinstance(value, Mapping | list | tuple):
            inner = value if isinstance(value, Mapping) else dict(enumerate(value))
            value = tensors_digest({str(key): each for key, each in inner.items()})
        if not isinstance(value, Tensor):
            state.update(f"{name} {value!r}".encode())
            continue
        value = value.dequantize() if value.is_quantized else value
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return state.hexdigest()
