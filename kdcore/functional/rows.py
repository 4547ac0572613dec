"""What functions of rows of logits share: precision, temperature, vocabularies, masked means."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature: TypeAlias = float | Tensor
Vocabulary: TypeAlias = Literal["same", "cut", "sort"]


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax(logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """log softmax(logits / T) over the last axis, in float32 or wider; T a number or one per row ``[...]``."""
    check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.unsqueeze(-1)
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)


def log_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """log q and log p of ``[..., V]`` logits of one shape; the teacher's side carries no gradient."""
    align_vocabularies(student_logits, teacher_logits, how="same")
    if student_logits.shape != teacher_logits.shape:  # broadcasting would hide misaligned tokens
        given = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, given {given}")
    return log_softmax(student_logits, temperature), log_softmax(teacher_logits.detach(), temperature)


def check_temperature(temperature: Temperature) -> None:
    # A tensor is not read: that would wait for the device.
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, given {temperature}")


def align_vocabularies(*logits: Tensor, how: Vocabulary) -> tuple[Tensor, ...]:
    """Bring rows of logits, the student's first, to one length, as declared.

    ``same`` refuses different lengths: padding or cutting unasked trains something else. ``cut`` keeps the leading
    entries that all have: right when one tokenizer is padded differently. ``sort`` orders each side by size and
    fills the shorter with -inf: it compares profiles of probability and forgets which token is which.
    """
    sizes = [x.shape[-1] for x in logits]
    if how == "cut":
        return tuple(x[..., : min(sizes)] for x in logits)
    if how == "sort":
        ranked = (x.sort(-1, descending=True).values for x in logits)
        return tuple(F.pad(x, (0, max(sizes) - x.shape[-1]), value=float("-inf")) for x in ranked)
    if how != "same":
        raise ValueError(f"vocabulary must be 'same', 'cut' or 'sort', given {how!r}")
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1:]}; say how to compare them: "
            "vocabulary='cut' (the leading entries that all have, renormalised) or 'sort' (by rank)"
        )
    return logits


def masked_mean(values: Tensor, mask: Tensor | None = None, *, count: Tensor | float | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0, with a graph, when it nowhere is. What is masked may be NaN.

    `count` replaces the number of true entries: the global number of supervised tokens, when `values` is one
    micro-batch or one rank's share; 1 gives the sum.
    """
    kept = values if mask is None else values.masked_fill(~mask.bool(), 0.0)
    if count is None:
        count = values.numel() if mask is None else mask.bool().sum()
    return kept.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
