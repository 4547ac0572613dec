"""A cache that is read: rows by key, in any order, from any number of processes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.caching import header as headers
from kdcore.caching.codec import TopKCodec
from kdcore.caching.keys import row_keys, tensors_digest
from kdcore.caching.layout import Columns, Layout
from kdcore.caching.shards import Shard, damaged
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.types import Batch, Outputs, Unembed

HEAD = "head.safetensors"


class Cache:
    """The cache in a folder. Opened by its header and the sizes of its shards; every row is checked when it is read.

    Picklable: a copy in another process maps the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = headers.read(folder)
        if found is None:
            raise InputError(str(folder), "no cache here", hint=f"kd cache RECIPE --out {folder}")
        if not found.get("complete"):
            raise InputError(
                str(folder), "the cache is not complete", hint="kd cache, run again, goes on with it"
            )
        self.header: dict[str, Any] = found
        self.identity = headers.identity(found)
        codec, outputs = found["codec"], found["outputs"]
        made = None
        if codec["use"] == "topk":
            made = TopKCodec(codec["classes"], codec["k"], codec["mass"], codec["temperature"])
        self.layout = Layout({name: list(shape) for name, shape in outputs.items()}, made, codec["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._first[-1]

    @cached_property
    def shards(self) -> list[Shard]:
        found = []
        for name, entry in self.header["shards"].items():
            shard = Shard(self.folder / name, self.identity)
            if len(shard) != entry["rows"]:
                raise damaged(shard.path, f"it has {len(shard)} rows instead of {entry['rows']}")
            found.append(shard)
        return found

    @cached_property
    def ids(self) -> Tensor:
        """The sample of each row."""
        return torch.cat([shard.id for shard in self.shards])

    @cached_property
    def keys(self) -> Tensor:
        return torch.cat([shard.key for shard in self.shards])

    @cached_property
    def order(self) -> dict[str, Tensor]:
        """The rows of each stream by the position of their samples, for streams whose samples never change."""
        found: dict[str, list[Tensor]] = {}
        for entry, first, last in zip(
            self.header["shards"].values(), self._first, self._first[1:], strict=False
        ):
            if entry["stream"] is not None:
                found.setdefault(entry["stream"], []).append(torch.arange(first, last))
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    @cached_property
    def head(self) -> Unembed | None:
        """The output layer beside hidden states."""
        if "hidden" not in self.layout.shapes:
            return None
        found = load_tensors(self.folder / HEAD, str(self.folder))
        if tensors_digest(found) != self.header.get("head_digest"):
            raise damaged(self.folder / HEAD, "it has other values than were written")
        softcap, scale = self.header["head"]
        return Unembed(torch.empty(0), found["weight"], found.get("bias"), softcap, scale)

    def find(self, batch: Batch) -> Tensor:
        """The rows of a batch's samples, int64 [B]. InputError where the teacher was not asked just this."""
        wanted = row_keys(batch, self.header["inputs"])
        place = torch.searchsorted(self._sorted[0], wanted).clamp_max(len(self) - 1)
        known = self._sorted[0][place] == wanted
        if not bool(known.all()):
            raise self._unknown(int(batch["id"][int(known.int().argmin())]))
        return self._sorted[1][place]

    def read(self, rows: Tensor) -> Columns:
        """Each column of these rows, one after the other."""
        where = [bisect.bisect_right(self._first, row) - 1 for row in rows.tolist()]
        owner = torch.tensor(where, dtype=torch.int64)
        pieces: dict[str, list[Any]] = {name: [None] * len(rows) for name in self.shards[0].columns}
        for index in dict.fromkeys(where):
            here = (owner == index).nonzero().flatten()
            for name, found in self.shards[index].rows(rows[here] - self._first[index]).items():
                for place, piece in zip(here.tolist(), found, strict=True):
                    pieces[name][place] = piece
        return {name: torch.cat(found) for name, found in pieces.items()}

    def outputs(self, batch: Batch) -> Outputs:
        """What the teacher said of a batch, on the batch's device."""
        device = batch["id"].device
        columns = {name: value.to(device) for name, value in self.read(self.find(batch)).items()}
        head = self.head
        if head is not None and head.weight.device != device:
            head = head._replace(
                weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device)
            )
            self.__dict__["head"] = head
        return self.layout.outputs(columns, len(batch["id"]), head)

    def check_all(self) -> None:
        """Read every row of every shard. RunError where one is damaged."""
        for shard in self.shards:
            shard.check_all()

    @cached_property
    def _first(self) -> list[int]:
        """The number of each shard's first row, and of all rows."""
        sizes = [len(shard) for shard in self.shards]
        return [0, *torch.tensor(sizes).cumsum(0).tolist()]

    @cached_property
    def _sorted(self) -> Sequence[Tensor]:
        return torch.sort(self.keys)

    def _unknown(self, sample: int) -> InputError:
        names = ", ".join(self.header["inputs"])
        if not bool((self.ids == sample).any()):
            return InputError(str(self.folder), f"sample {sample} is not in the cache")
        what = f"sample {sample} has another {names} than the teacher was asked about"
        hint = "another augmentation, view, seed, tokenizer or content: kd cache again with this recipe"
        return InputError(str(self.folder), what, hint=hint)
