"""From a teacher's outputs to columns of rows, and back.

Of tokens only the supervised positions (the teacher's mask) are kept; a cached teacher gives zeros at the others,
which no term may read. Logits are kept as they are, as ``hidden`` states (where the teacher gives ``unembed``; its
output layer lies once beside the rows), or as ``topk``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore.caching.codec import CHUNK, TopKCodec
from kdcore.caching.shards import Columns
from kdcore.errors import InputError
from kdcore.types import Outputs, TopK, Unembed

NAMED = "tensor:"  # the beginning of a named tensor's column, which is kept whole


@dataclass(frozen=True)
class Layout:
    """``shapes`` of a sample's values by column, the ``codec`` of its logits (None: full), a ``dtype`` to round to."""

    shapes: dict[str, list[int]]
    codec: TopKCodec | None = None
    dtype: str | None = None

    @classmethod
    def of(
        cls, outputs: Outputs, needs: Iterable[str], topk: Mapping[str, Any] | None, dtype: str | None
    ) -> Layout:
        """What must be kept so that ``needs`` can be read; ``topk``: the codec's options, None to keep all logits."""
        if "topk" in needs:
            hint = "a teacher of logits, and --codec topk"
            raise InputError("teacher", "its own top k is not kept", hint=hint)
        logits = "hidden" if outputs.logits is None else "logits"
        own = {"logits": "topk" if topk else logits, "unembed": "hidden"}
        own |= {name: name for name in ("mask", "target") if getattr(outputs, name) is not None}
        absent = {"mask", "target"} - set(own)
        names = sorted({own.get(need, NAMED + need) for need in {"mask", *needs} - absent})
        codec = TopKCodec(_classes(outputs), **topk) if topk and "topk" in names else None
        return cls({name: list(_value(outputs, name).shape[1:]) for name in names}, codec, dtype)

    @property
    def kept(self) -> set[str]:
        """What can be read of the teacher."""
        more = {"hidden": {"logits", "unembed"}, "topk": {"logits"}}
        return {each for name in self.shapes for each in more.get(name, {name.removeprefix(NAMED)})}

    def columns(self, ids: Tensor, keys: Tensor, outputs: Outputs) -> Columns:
        """The samples' rows. InputError where their shapes are not those of the first batch."""
        found: Columns = {"id": ids.cpu().split(1), "key": keys.split(1)}
        for name, shape in self.shapes.items():
            value = _value(outputs, name)
            if (given := list(value.shape[1:])) != shape:
                problem = f"samples of several shapes: {name} is {shape} in one batch, {given} in another"
                hint = "pad to one length: a sample is the same in every batch"
                raise InputError("data.source", problem, hint=hint)
            inner = shape[:-1] if name == "topk" else []
            live = torch.ones(len(ids), *inner, dtype=torch.bool, device=value.device)
            if outputs.mask is not None and self._of_tokens(name):
                live = outputs.mask.bool()
            kept, counts = value[live], live.view(len(ids), -1).sum(1).tolist()
            if name == "topk":
                found |= self._coded(kept, counts, outputs)
            else:
                rounded = self.dtype is not None and kept.is_floating_point()
                kept = kept.to(getattr(torch, str(self.dtype))) if rounded else kept
                found[name] = kept.cpu().split(counts)
        return found

    def outputs(self, columns: Mapping[str, Tensor], count: int, head: Unembed | None) -> Outputs:
        """What ``columns`` was given for so many samples; ``head`` is the output layer for hidden states."""
        found = Outputs(mask=columns.get("mask"))
        for name, shape in self.shapes.items():
            live = found.mask if self._of_tokens(name) else None
            if name == "topk":
                assert self.codec is not None
                top = self.codec.decode(columns["topk"], columns.get("topk.sizes"))
                parts = (_spread(part, live) for part in top)
                found.topk = TopK(*(part.view(count, *shape[:-1], *part.shape[1:]) for part in parts))
                continue
            value = _spread(columns[name], live).view(count, *shape)
            if name == "hidden":
                assert head is not None
                if self.dtype is not None:  # it is multiplied by weights that were not rounded
                    value = value.to(head.weight.dtype)
                found.unembed = head._replace(hidden=value)
            elif name.startswith(NAMED):
                found.tensors[name.removeprefix(NAMED)] = value
            else:
                setattr(found, name, value)
        return found

    def _of_tokens(self, name: str) -> bool:
        """Whether a value has one entry for each position of the mask."""
        mask = self.shapes.get("mask")
        if mask is None or name == "mask" or name.startswith(NAMED):
            return False
        return self.shapes[name][: len(mask)] == mask

    def _coded(self, tokens: Tensor, counts: list[int], outputs: Outputs) -> Columns:
        """The top k of [N, V] logits, or of the [N, H] hidden states that they come from, as rows of bytes."""
        assert self.codec is not None
        parts: Sequence[Tensor] = tokens.split(max(CHUNK // self.codec.classes, 1))
        head = None if outputs.logits is not None else outputs.unembed
        logits = (part if head is None else head._replace(hidden=part).logits() for part in parts)
        data, sizes = map(torch.cat, zip(*map(self.codec.encode, logits), strict=True))
        widths = [int(each.sum()) for each in self.codec.widths(sizes).split(counts)]
        found: Columns = {"topk": data.split(widths)}
        return found if self.codec.mass is None else {**found, "topk.sizes": sizes.split(counts)}


def _value(outputs: Outputs, name: str) -> Tensor:
    """The tensor that a column is made of; of ``topk`` the logits, or the hidden states that they come from."""
    if name == "hidden" or (name == "topk" and outputs.logits is None):
        name = "unembed"
    found: Any = outputs["logits" if name == "topk" else name.removeprefix(NAMED)]
    return found.hidden if name == "unembed" else found  # type: ignore[no-any-return]


def _classes(outputs: Outputs) -> int:
    logits = outputs.logits
    if logits is None:
        return len(outputs["unembed"].weight)
    if logits.dim() == 4:
        problem = "the logits are [B, C, H, W]: top k is for [B, C] and [B, L, V]"
        raise InputError("codec", problem, hint="--codec full")
    return logits.shape[-1]


def _spread(values: Tensor, live: Tensor | None) -> Tensor:
    """Values of the live positions at their places, zeros elsewhere."""
    if live is None:
        return values
    whole = values.new_zeros(live.numel(), *values.shape[1:])
    return whole.index_copy_(0, live.flatten().nonzero().flatten(), values)
