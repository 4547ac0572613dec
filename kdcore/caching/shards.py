"""Shards: rows of tensors in safetensors files, read through a memory map.

safetensors, because it is here already (students are saved in it), runs no code when read, is read by many
languages, and its header is a list of offsets, so a row is a slice of the mapped file. A shard holds ``id`` and
``key`` of each row, a checksum ``crc`` of the row's bytes, and columns: ``NAME`` [sum of lengths, ...] with
``NAME.lengths`` where rows differ.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.checkpoint import save_tensors
from kdcore.errors import RunError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = ("id", "key", "crc")


@dataclass
class Rows:
    """Samples' answers: columns by name, [sum of lengths, ...], and the length of each sample's piece."""

    id: Tensor
    key: Tensor
    columns: dict[str, Tensor]
    lengths: dict[str, Tensor]

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        def both(name: str) -> dict[str, Tensor]:
            return {k: torch.cat([getattr(p, name)[k] for p in parts]) for k in getattr(parts[0], name)}

        ids, keys = torch.cat([p.id for p in parts]), torch.cat([p.key for p in parts])
        return cls(ids, keys, both("columns"), both("lengths"))

    @property
    def bytes(self) -> int:
        return sum(c.numel() * c.element_size() for c in self.columns.values()) + 24 * len(self.id)


def write(path: Path, rows: Rows, identity: str) -> None:
    """The shard under its name, whole or not at all; equal rows give equal bytes."""
    starts = {name: [0, *n.cumsum(0).tolist()] for name, n in rows.lengths.items()}
    pieces = [
        [rows.columns[n][s[i] : s[i + 1]] for n, s in sorted(starts.items())] for i in range(len(rows.id))
    ]
    crc = [_crc(int(rows.id[i]), int(rows.key[i]), piece) for i, piece in enumerate(pieces)]
    tensors = {"id": rows.id, "key": rows.key, "crc": torch.tensor(crc, dtype=torch.int64), **rows.columns}
    for name, lengths in rows.lengths.items():
        if len(lengths.unique()) > 1:
            tensors[f"{name}.lengths"] = lengths.to(torch.int32)
    save_tensors(path, tensors, {"kdcore.cache": identity})


class Shard:
    """A mapped shard. Rows are checked against their checksums when they are first read."""

    def __init__(self, path: Path, identity: str | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(self._map[:8], "little")
            header: dict[str, Any] = json.loads(self._map[8 : 8 + length])
            metadata = header.pop("__metadata__", {})
            end = 8 + length + max(each["data_offsets"][1] for each in header.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, f"its header cannot be read ({type(error).__name__})") from None
        if size != end:
            raise damaged(path, f"it has {size} bytes instead of {end}")
        if identity is not None and metadata.get("kdcore.cache") != identity:
            raise damaged(path, "it belongs to another cache")
        try:
            tensors = {name: self._tensor(each, 8 + length) for name, each in header.items()}
            self.id, self.key, self.crc = (tensors.pop(name) for name in INDEX)
            lengths = {
                n.removesuffix(".lengths"): tensors.pop(n) for n in [*tensors] if n.endswith(".lengths")
            }
            self.columns = dict(sorted(tensors.items()))
            count = len(self.id)
            self.starts = {
                name: self._starts(lengths.get(name), len(column), count)
                for name, column in self.columns.items()
            }
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise damaged(path, f"its tensors do not fit its header ({type(error).__name__})") from None
        self._checked = torch.zeros(count, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.id)

    def rows(self, places: Tensor) -> dict[str, list[Tensor]]:
        """Each column's piece of each row."""
        for place in places[~self._checked[places]].tolist():
            self.check(place)
        found = {}
        for name, column in self.columns.items():
            starts = self.starts[name]
            found[name] = [column[starts[p] : starts[p + 1]] for p in places.tolist()]
        return found

    def uniform(self, name: str) -> Tensor | None:
        """A column as [rows, length, ...] where all rows have one length."""
        starts, column = self.starts[name], self.columns[name]
        if not isinstance(starts, range):
            return None
        return column.view(len(self), starts.step, *column.shape[1:])

    def check(self, place: int) -> None:
        pieces = [
            column[self.starts[n][place] : self.starts[n][place + 1]] for n, column in self.columns.items()
        ]
        if _crc(int(self.id[place]), int(self.key[place]), pieces) != int(self.crc[place]):
            raise damaged(
                self.path, f"row {place} (sample {int(self.id[place])}) has other bytes than were written"
            )
        self._checked[place] = True

    def check_all(self) -> None:
        for place in range(len(self)):
            self.check(place)

    def _tensor(self, entry: Mapping[str, Any], base: int) -> Tensor:
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if first == last:
            return torch.empty(shape, dtype=dtype)
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=base + first).view(shape)

    @staticmethod
    def _starts(lengths: Tensor | None, total: int, count: int) -> Sequence[int]:
        if lengths is not None:
            return [0, *lengths.long().cumsum(0).tolist()]
        step = total // count if count else 0
        return range(0, total + step, step) if step else [0] * (count + 1)


def damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path}: a damaged shard: {why}.\n  hint    kd cache, run again, makes this shard anew")


def _crc(sample: int, key: int, pieces: Sequence[Tensor]) -> int:
    found = zlib.crc32(f"{sample} {key}".encode())
    for piece in pieces:
        if piece.numel():
            found = zlib.crc32(piece.reshape(-1).view(torch.uint8).numpy().data, found)
    return found
