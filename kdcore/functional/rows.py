"""Rows of logits: where they come from, which of them count, and what functions of them share."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.types import Unembed as Unembed

PerRow = float | Tensor  # a number, or one per row: [...] beside logits [..., V]
Vocabulary = Literal["same", "cut", "sort"]


def cap_and_scale(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    """From the output of the linear layer to logits; out of place and differentiable."""
    z = raw.to(wider(raw.dtype)) if scale == 1.0 else raw.to(wider(raw.dtype)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """What softmax and losses are computed in: float32, or float64 where it is given."""
    return x.to(wider(x.dtype))


def column(x: PerRow) -> PerRow:
    return x.unsqueeze(-1) if isinstance(x, Tensor) and x.ndim else x


class Selection:
    """The tokens with mask true and weight not 0. The others are never read: NaN there harms nothing."""

    def __init__(self, shape: torch.Size, mask: Tensor | None, weights: Tensor | None) -> None:
        self.shape, self.index = shape, None
        given = [x for x in (mask, weights) if x is not None]
        for x in given:
            check(x.shape == shape, f"one mask and weight per token, {tuple(shape)}, given {tuple(x.shape)}")
        if given:
            live = torch.stack([x.detach().reshape(-1) != 0 for x in given]).all(0)
            self.index = live.nonzero().squeeze(-1)
        self.weight = None if weights is None else self.take(weights)

    def take(self, x: Tensor) -> Tensor:
        """The chosen rows of x ``[*shape, ...]`` as ``[M, ...]``."""
        leading, rest = x.shape[: len(self.shape)], x.shape[len(self.shape) :]
        check(leading == self.shape, f"one row per token, {tuple(self.shape)}, given {tuple(x.shape)}")
        flat = x.reshape(self.shape.numel(), *rest)
        return flat if self.index is None else flat.index_select(0, self.index)

    def put(self, values: Tensor) -> Tensor:
        """Values ``[M]`` times their weights in their places, others 0: ``[*shape]``."""
        values = values if self.weight is None else values * self.weight
        if self.index is not None:
            values = values.new_zeros(self.shape.numel()).index_copy(0, self.index, values)
        return values.reshape(self.shape)


def log_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: PerRow) -> list[Tensor]:
    """log q and log p of ``[..., V]`` logits of one shape; the teacher's side carries no gradient."""
    align_vocabularies(student_logits, teacher_logits, how="same")
    # Broadcasting would hide misaligned tokens; reading a temperature from the device would wait for it.
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    check(shapes[0] == shapes[1], f"student and teacher logits must have one shape, given {shapes}")
    check(isinstance(temperature, Tensor) or temperature > 0, f"temperature must be > 0, not {temperature}")
    sides = (student_logits, teacher_logits.detach())
    return [F.log_softmax(z.to(wider(z.dtype)) / column(temperature), dim=-1) for z in sides]


def align_vocabularies(*logits: Tensor, how: Vocabulary) -> tuple[Tensor, ...]:
    """Bring rows of logits, the student's first, to one length, as declared.

    ``same`` refuses different lengths: padding or cutting unasked trains something else. ``cut`` keeps the
    leading entries that all have: right when one tokenizer is padded differently. ``sort`` orders each side
    by size and fills the shorter with -inf: it compares profiles and forgets which token is which.
    """
    sizes = [x.shape[-1] for x in logits]
    if how == "cut":
        return tuple(x[..., : min(sizes)] for x in logits)
    if how == "sort":
        ranked = (x.sort(-1, descending=True).values for x in logits)
        return tuple(F.pad(x, (0, max(sizes) - x.shape[-1]), value=float("-inf")) for x in ranked)
    check(how == "same", f"vocabulary must be 'same', 'cut' or 'sort', given {how!r}")
    entries = f"{sizes[0]} entries (student), {', '.join(map(str, sizes[1:]))} (teacher)"
    remedy = "vocabulary='cut' (the leading entries that all have, renormalised) or 'sort' (by rank)"
    check(len(set(sizes)) < 2, f"vocabularies differ: {entries}; declare {remedy}")
    return logits


def masked_mean(values: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0, with a graph, where it nowhere is. What is masked may be NaN.

    `count` stands for the number of true entries: the global one, when `values` is one micro-batch's share.
    """
    total = values.masked_fill(~mask.bool(), 0.0).sum()
    return total / (mask.bool().sum().clamp_min(1) if count is None else count)
