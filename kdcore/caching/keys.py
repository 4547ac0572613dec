"""What a row is looked up by: 64 bits of the sample's id and of everything that the teacher read of it.

A row is so found for exactly the input that the teacher answered: another augmentation, view, tokenizer, seed or
content of the sample has another key, whatever the header says. The bits come from integer arithmetic on the
tensors' own bytes, on their device: a checksum against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import InputError
from kdcore.types import Batch


class Watched(Batch):
    """A batch that notes in ``read`` which of its values are read; whoever copies or lists it has read all."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch, batch.parts)
        self.read: set[str] = set()


def _noting(name: str, read_all: bool) -> Callable[..., Any]:
    method = getattr(Batch, name)

    def noting(self: Watched, *args: Any) -> Any:
        self.read.update(key for key in dict.keys(self) if read_all or key == args[0])
        return method(self, *args)

    return noting


for _name in ("__getitem__", "get", "pop", "setdefault"):
    setattr(Watched, _name, _noting(_name, read_all=False))
for _name in ("__iter__", "__or__", "__ror__", "keys", "values", "items", "copy"):
    setattr(Watched, _name, _noting(_name, read_all=True))


def row_keys(batch: Batch, names: Iterable[str]) -> Tensor:
    """int64 [B], on the CPU, from ``id`` and the values of these names."""
    found = torch.zeros((), dtype=torch.int64)
    for name in ["id", *sorted(names)]:
        if name not in batch:
            problem = f"the batch has no {name!r}, which a cache finds its rows by"
            raise InputError("data.source", problem, allowed=sorted(batch))
        rows, kind = _row_sums(batch[name])
        found = _mixed((found.to(rows.device) ^ _number(name, *kind)) + rows)
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
    """The finaliser of splitmix64 (its constants as signed integers): each bit of the answer depends on all bits."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, with zeros from the left."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _number(*values: Any) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
