"""A cache that is read: rows by key, in any order, from any number of processes."""

from __future__ import annotations

import bisect
import itertools
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.caching import header as headers
from kdcore.caching.codec import TopKCodec
from kdcore.caching.keys import row_keys
from kdcore.caching.layout import Layout
from kdcore.caching.shards import Shard
from kdcore.errors import InputError
from kdcore.types import Batch, Outputs, Unembed

HEAD, SHARD = "head.safetensors", "shard-{:05d}.safetensors"


class Cache:
    """The cache in a folder. Opened by its header; every row is checked when it is first read.

    Picklable: a copy in another process maps the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, header = folder, headers.read(folder)
        if header is None:
            raise InputError(str(folder), "no cache here", hint=f"kd cache RECIPE --out {folder}")
        if not header["shards"]:
            hint = "kd cache, run again, goes on with it"
            raise InputError(str(folder), "the cache is not complete", hint=hint)
        self.header: dict[str, Any] = header
        self.identity = headers.identity(header)
        kept = header["layout"]
        codec = kept["codec"] and TopKCodec(**kept["codec"])
        self.layout = Layout(kept["shapes"], codec, kept["dtype"])
        self._head: Unembed | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder,)

    def __len__(self) -> int:
        return self._edges[-1]

    @cached_property
    def shards(self) -> list[Shard]:
        places = range(len(self.header["shards"]))
        return [Shard(self.folder / SHARD.format(n), f"{self.identity} {n}") for n in places]

    @cached_property
    def ids(self) -> Tensor:
        """The sample of each row."""
        return torch.cat([shard.columns["id"] for shard in self.shards])

    @cached_property
    def keys(self) -> Tensor:
        return torch.cat([shard.columns["key"] for shard in self.shards])

    @property
    def streams(self) -> dict[str, int]:
        """The first row of each stream whose samples never change; the others follow in the order of the data."""
        firsts = list(zip(self.header["shards"], self._edges, strict=False))
        return {stream: first for stream, first in reversed(firsts) if stream is not None}

    def find(self, batch: Batch) -> Tensor:
        """The rows of a batch's samples, int64 [B]. InputError where the teacher was not asked just this."""
        wanted, (keys, rows) = row_keys(batch, self.header["inputs"]), self._sorted
        place = torch.searchsorted(keys, wanted).clamp_max(len(self) - 1)
        known = keys[place] == wanted
        if not bool(known.all()):
            raise self._unknown(int(batch["id"][int(known.int().argmin())]))
        return rows[place]

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Each column of these rows, one after the other."""
        found = []
        for row in rows.tolist():
            shard = bisect.bisect_right(self._edges, row) - 1
            found.append(self.shards[shard].row(row - self._edges[shard]))
        return {name: torch.cat([row[name] for row in found]) for name in found[0]}

    def decoded(self, rows: Tensor, device: torch.device | str = "cpu") -> Outputs:
        """What the teacher said of the samples of these rows."""
        columns = {name: value.to(device) for name, value in self.read(rows).items()}
        return self.layout.outputs(columns, len(rows), self._output_layer(torch.device(device)))

    def outputs(self, batch: Batch) -> Outputs:
        """What the teacher said of a batch, on the batch's device."""
        return self.decoded(self.find(batch), batch["id"].device)

    def check_all(self) -> None:
        """Read every row of every shard. RunError where one is damaged."""
        for shard in self.shards:
            shard.check_all()

    @cached_property
    def _edges(self) -> list[int]:
        """The number of each shard's first row, and of all rows."""
        return [0, *itertools.accumulate(map(len, self.shards))]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        return torch.sort(self.keys)

    def _output_layer(self, device: torch.device) -> Unembed | None:
        """The output layer beside hidden states; it stays on the device that it was last asked for."""
        if "hidden" in self.layout.shapes and (self._head is None or self._head.weight.device != device):
            found = Shard(self.folder / HEAD, self.identity).row(0)
            found = {name: value.to(device) for name, value in found.items()}
            softcap, scale = self.header["head"]
            self._head = Unembed(torch.empty(0), found["weight"], found.get("bias"), softcap, scale)
        return self._head

    def _unknown(self, sample: int) -> InputError:
        if not bool((self.ids == sample).any()):
            return InputError(str(self.folder), f"sample {sample} is not in the cache")
        names = ", ".join(self.header["inputs"])
        what = f"sample {sample} has another {names} than the teacher was asked about"
        hint = "another augmentation, view, seed, tokenizer or content: kd cache again with this recipe"
        return InputError(str(self.folder), what, hint=hint)
