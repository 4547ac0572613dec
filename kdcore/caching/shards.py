"""Shards: rows of tensors in safetensors files, read through a memory map.

safetensors, because it is here already (students are saved in it), runs no code when read, and is read by many
languages. A row has a piece [length, ...] of each column; a shard holds the columns, each one's pieces end to end,
``lengths:COLUMN`` where they differ, and ``crc``, a checksum of each row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from kdcore.checkpoint import save_tensors
from kdcore.errors import RunError, cause

Columns = dict[str, Sequence[Tensor]]  # each row's piece of each column
INDEX, IDENTITY, LENGTHS = ("id", "key"), "kdcore.cache", "lengths:"


def write(path: Path, columns: Columns, identity: str) -> None:
    """The shard under its name, whole or not at all; equal rows give equal bytes."""
    columns = {name: columns[name] for name in sorted(columns)}
    tensors = {name: torch.cat([*pieces]) for name, pieces in columns.items()}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    tensors["crc"] = torch.tensor([_crc(row) for row in rows])
    for name, pieces in columns.items():
        lengths = {len(piece) for piece in pieces}
        if len(lengths) > 1 or 0 in lengths:
            tensors[LENGTHS + name] = torch.tensor([len(piece) for piece in pieces])
    save_tensors(path, tensors, {IDENTITY: identity})


class Shard:
    """A mapped shard. A row is checked against its checksum when it is first read; RunError where it is damaged."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = file.keys()
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in names}
            self._crc = tensors.pop("crc").tolist()
            self._edges = {n: _edges(t, tensors.get(LENGTHS + n), len(self)) for n, t in tensors.items()}
            self.columns = {n: tensors[n] for n in sorted(tensors) if not n.startswith(LENGTHS)}
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, ZeroDivisionError) as error:
            raise damaged(path, f"it cannot be read ({cause(error)})") from None
        if (metadata or {}).get(IDENTITY) != identity:
            raise damaged(path, "it belongs to another cache")
        self._values = [name for name in self.columns if name not in INDEX]
        self._checked = bytearray(len(self))

    def __len__(self) -> int:
        return len(self._crc)

    def row(self, place: int) -> dict[str, Tensor]:
        """The row's piece of each column, but for what rows are found by."""
        if not self._checked[place]:
            if _crc(self._pieces(place, self.columns)) != self._crc[place]:
                raise damaged(self.path, f"row {place} has other bytes than were written")
            self._checked[place] = True
        return self._pieces(place, self._values)

    def _pieces(self, place: int, names: Iterable[str]) -> dict[str, Tensor]:
        edges, columns = self._edges, self.columns
        return {name: columns[name][edges[name][place] : edges[name][place + 1]] for name in names}

    def check_all(self) -> None:
        for place in range(len(self)):
            self.row(place)


def damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path}: a damaged shard: {why}.\n  hint    kd cache, run again, makes this shard anew")


def _edges(column: Tensor, lengths: Tensor | None, rows: int) -> Sequence[int]:
    """Where each row's piece begins, and where the last one ends."""
    if lengths is None:
        return range(0, len(column) + 1, len(column) // rows)
    return [0, *lengths.cumsum(0).tolist()]


def _crc(row: Mapping[str, Tensor]) -> int:
    found = zlib.crc32(" ".join(row).encode())
    for piece in row.values():
        found = zlib.crc32(piece.contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found
