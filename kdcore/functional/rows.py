"""What every function of two rows of logits shares: checks, temperature, log-probabilities, vocabularies, means."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature: TypeAlias = float | Tensor
Vocabulary: TypeAlias = Literal["same", "cut", "sort"]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is widened, float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """log q and log p of ``[..., V]`` logits at `temperature`; the teacher's side carries no gradient.

    An entry of -inf is an outcome of probability zero. Shapes must be equal: nothing is broadcast.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    if student_logits.shape != teacher_logits.shape:
        given = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, given {given}")
    return log_softmax(student_logits, temperature), log_softmax(teacher_logits.detach(), temperature)


def log_softmax(logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """log softmax(logits / T) over the last axis, in float32 or wider; T a number or one per row ``[...]``."""
    check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.unsqueeze(-1)
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)


def check_temperature(temperature: Temperature) -> None:
    """Refuse a number that is not positive; a tensor is not read (that would wait for the device)."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, given {temperature}")


def check_vocabularies(student: int, teacher: int) -> None:
    """Refuse vocabularies of different size: padding or cutting them silently trains something else."""
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} entries, the teacher's {teacher}; declare how to compare them: "
            "vocabulary='cut' (the first entries that both have, renormalised) or 'sort' (probabilities by rank)"
        )


def align_vocabularies(student_logits: Tensor, teacher_logits: Tensor, how: Vocabulary) -> tuple[Tensor, Tensor]:
    """Bring two rows of logits to one length, as declared.

    ``same`` refuses different lengths. ``cut`` keeps the leading entries that both have: right when one tokenizer
    is padded differently. ``sort`` orders each side by size and fills the shorter with -inf: it compares the two
    profiles of probability and no longer knows which token is which (for vocabularies with nothing in common).
    """
    sizes = student_logits.shape[-1], teacher_logits.shape[-1]
    if how == "same":
        check_vocabularies(*sizes)
        return student_logits, teacher_logits
    if how == "cut":
        return student_logits[..., : min(sizes)], teacher_logits[..., : min(sizes)]
    if how == "sort":
        student_sorted, teacher_sorted = (x.sort(-1, descending=True).values for x in (student_logits, teacher_logits))
        return _pad(student_sorted, max(sizes)), _pad(teacher_sorted, max(sizes))
    raise ValueError(f"vocabulary must be 'same', 'cut' or 'sort', given {how!r}")


def _pad(logits: Tensor, size: int) -> Tensor:
    return F.pad(logits, (0, size - logits.shape[-1]), value=float("-inf"))


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of `values` where `mask` is true; what is masked may be NaN or infinite."""
    return values.sum() if mask is None else values.masked_fill(~mask.bool(), 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor | None = None, *, count: Tensor | float | None = None) -> Tensor:
    """Mean of `values` over the true entries of `mask`; 0, with a graph, when there is none.

    `count` replaces the number of true entries: the global number of supervised tokens, when `values` is one
    micro-batch or one rank's share.
    """
    if count is None:
        count = values.numel() if mask is None else mask.bool().sum()
    total = masked_sum(values, mask)
    return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
