"""From a teacher's outputs to columns of rows, and back.

Of tokens only the supervised positions (the teacher's mask) are kept; at the others a cached teacher gives zeros,
or for a top k equal probabilities, which no term may read. Logits are kept as they are, as ``hidden`` states (where
the teacher gives ``unembed``; its output layer lies once beside the rows), or as ``topk``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore.caching.codec import CHUNK, TopKCodec, packed, unpacked
from kdcore.caching.shards import Rows
from kdcore.errors import InputError
from kdcore.types import Outputs, TopK, Unembed

OWN = ("logits", "hidden", "topk", "mask", "target")  # anything else is a named tensor, kept whole
Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """``shapes`` of a sample's values by name, the ``codec`` of its logits (None: full), a ``dtype`` to round to."""

    shapes: dict[str, list[int]]
    codec: TopKCodec | None = None
    dtype: str | None = None

    @classmethod
    def of(
        cls,
        outputs: Outputs,
        needs: Iterable[str],
        codec: Callable[[int], TopKCodec] | None,
        dtype: str | None,
    ) -> Layout:
        """What must be kept so that ``needs`` can be read; ``codec`` is made for a number of classes."""
        made, found = None, {}
        for name in sorted({"mask", *needs}):
            of_hidden = name == "unembed" or (name == "logits" and outputs.logits is None)
            key = "hidden" if of_hidden else name
            if name == "logits" and codec is not None:
                made, key = codec(_classes(outputs)), "topk"
            if name in ("mask", "target") and getattr(outputs, name) is None:
                continue
            if name == "topk":
                raise InputError(
                    "teacher", "its own top k is not kept", hint="a teacher of logits, and --codec topk"
                )
            found[key] = list(_tensor(outputs, key).shape[1:])
        return cls(found, made, dtype)

    def rows(self, ids: Tensor, keys: Tensor, outputs: Outputs) -> Rows:
        """The samples' values. InputError where their shapes are not those of the first batch."""
        mask = None if outputs.mask is None else outputs.mask.bool()
        columns: Columns = {}
        lengths: Columns = {}
        for name, shape in self.shapes.items():
            value = _tensor(outputs, name)
            if list(value.shape[1:]) != shape:
                problem = f"samples of several shapes: {name} is {shape} in one batch, {list(value.shape[1:])} in another"
                raise InputError(
                    "data.source", problem, hint="pad to one length: a sample is the same in every batch"
                )
            live = mask if mask is not None and self._of_tokens(name) else None
            counts = torch.ones(len(ids), dtype=torch.int64) if live is None else live.flatten(1).sum(1).cpu()
            if name == "topk":
                self._code(outputs, live, len(ids), columns, lengths)
                continue
            value = (
                packed(value.flatten(1).to(torch.uint8))
                if name == "mask"
                else value
                if live is None
                else value[live]
            )
            columns[_column(name)], lengths[_column(name)] = self._rounded(value).cpu(), counts
        return Rows(ids.cpu(), keys, columns, lengths)

    def outputs(self, columns: Mapping[str, Tensor], count: int, head: Unembed | None) -> Outputs:
        """What ``rows`` was given for so many samples; ``head`` is the output layer for hidden states."""
        found = Outputs()
        if "mask" in self.shapes:
            shape = self.shapes["mask"]
            found.mask = unpacked(columns["mask"])[:, : math.prod(shape)].view(count, *shape).bool()
        for name, shape in self.shapes.items():
            if name == "topk":
                found.topk = self._decoded(columns, found.mask, count)
            elif name != "mask":
                live = found.mask if self._of_tokens(name) else None
                value = _spread(columns[_column(name)], live, 0).view(count, *shape)
                if name == "hidden":
                    assert head is not None
                    rounded = self.dtype is not None  # and is multiplied by weights that were not
                    found.unembed = head._replace(hidden=value.to(head.weight.dtype) if rounded else value)
                elif name in OWN:
                    setattr(found, name, value)
                else:
                    found.tensors[name] = value
        return found

    def _of_tokens(self, name: str) -> bool:
        """Whether a value has one entry for each position of the mask."""
        mask = self.shapes.get("mask")
        return mask is not None and name in OWN and name != "mask" and self.shapes[name][: len(mask)] == mask

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(getattr(torch, self.dtype)) if self.dtype and value.is_floating_point() else value

    def _code(
        self, outputs: Outputs, live: Tensor | None, count: int, columns: Columns, lengths: Columns
    ) -> None:
        assert self.codec is not None
        value = _tensor(outputs, "topk")
        rows = value[live] if live is not None else value.flatten(0, -2)
        data, sizes = [], []
        for part in rows.split(max(CHUNK // self.codec.classes, 1)):
            logits = part if outputs.logits is not None else _head(outputs)._replace(hidden=part).logits()
            coded = self.codec.encode(logits)
            data.append(coded[0])
            sizes.append(coded[1])
        kinds = torch.cat(sizes)
        tokens = torch.full((count,), len(rows) // count) if live is None else live.flatten(1).sum(1).cpu()
        owner = torch.arange(count).repeat_interleave(tokens)
        widths = torch.tensor([self.codec.width(each) for each in self.codec.counts])[kinds.long()]
        columns["topk"] = torch.cat(data)
        lengths["topk"] = torch.zeros(count, dtype=torch.int64).index_add(0, owner, widths)
        if self.codec.mass is not None:
            columns["topk.sizes"], lengths["topk.sizes"] = kinds, tokens

    def _decoded(self, columns: Mapping[str, Tensor], mask: Tensor | None, count: int) -> TopK:
        assert self.codec is not None
        data, k = columns["topk"], self.codec.k
        sizes = columns.get("topk.sizes")
        if sizes is None:
            sizes = data.new_zeros(len(data) // self.codec.width(k))
        top = self.codec.decode(data, sizes)
        live, even = mask if self._of_tokens("topk") else None, -math.log(k + 1)
        shape = self.shapes["topk"][:-1]
        ids = _spread(top.ids, live, torch.arange(k, device=data.device)).view(count, *shape, k)
        return TopK(
            ids, *(_spread(x, live, even).view(count, *shape, *x.shape[1:]) for x in (top.logp, top.rest))
        )


def _tensor(outputs: Outputs, name: str) -> Tensor:
    """The value that a column is made of; of ``topk`` the logits, or the hidden states that they come from."""
    if name == "hidden" or (name == "topk" and outputs.logits is None):
        return _head(outputs).hidden
    value: Any = outputs["logits" if name == "topk" else name]
    return value  # type: ignore[no-any-return]


def _head(outputs: Outputs) -> Unembed:
    head: Unembed = outputs["unembed"]
    return head


def _classes(outputs: Outputs) -> int:
    if outputs.logits is not None and outputs.logits.dim() == 4:
        raise InputError(
            "codec", "the logits are [B, C, H, W]: top k is for [B, C] and [B, L, V]", hint="--codec full"
        )
    return outputs.logits.shape[-1] if outputs.logits is not None else len(_head(outputs).weight)


def _column(name: str) -> str:
    return name if name in OWN else f"tensor:{name}"


def _spread(values: Tensor, live: Tensor | None, fill: Any) -> Tensor:
    """Values of the live positions at their places, ``fill`` elsewhere."""
    if live is None:
        return values
    whole = values.new_empty(live.numel(), *values.shape[1:])
    whole[:] = fill
    return whole.index_copy_(0, live.flatten().nonzero().flatten(), values)
