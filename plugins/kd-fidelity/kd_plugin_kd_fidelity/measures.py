"""What is measured of one pair of models: agreement, fidelity, calibration; on logits or on texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32, js

Bins = Annotated[int, Field(gt=0)]
ORDER = 4  # BLEU-4
_NUMBER = re.compile(r"-?\$?\d[\d,]*\.?\d*")


# ---- distributions: logits [N,C], one row an item or a supervised token -----------------------------------


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """A of each row, [...]: 1.0 where both models' first choice is the same, else 0.0. Symmetric; no gradient."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


@conventions(t_squared=False)
def fidelity(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """F of each row, [...] in [0, 1]: 1 - JS(p_T, p_S) / ln 2. 1 for the same distribution, 0 for disjoint ones.

    The paper compares generated rationales (``bleu``); a model that gives a distribution and no text is
    compared by that.
    """
    return 1 - js(student_logits, teacher_logits) / math.log(2)


def calibration_error(logits: Tensor, target: Tensor, *, bins: Bins = 15) -> Tensor:
    """Expected calibration error, a scalar in [0, 1] (Guo et al. 2017): sum_b n_b/N |accuracy_b - confidence_b|.

    ``logits`` [N,C], ``target`` int64 [N]; confidence is the largest probability, in ``bins`` equal intervals.
    """
    confidence, choice = at_least_float32(logits).softmax(-1).max(-1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # intervals closed on the right
    gap = torch.zeros(bins, dtype=confidence.dtype, device=logits.device)
    gap.index_add_(0, place, (choice == target).to(confidence.dtype) - confidence)
    return gap.abs().sum() / len(target)


# ---- texts: what a generative model answered --------------------------------------------------------------


def answer(text: str) -> str:
    """The final answer of a rationale, normalised: its last number (``1,200.0`` -> ``1200``), else its last word."""
    if numbers := _NUMBER.findall(text):
        return f"{float(numbers[-1].replace(',', '').replace('$', '')):.10g}"
    words = re.findall(r"\w+", text.lower())
    return words[-1] if words else ""


def answer_agreement(student: Sequence[str], teacher: Sequence[str]) -> float:
    """A over items: the share whose final answers are equal once normalised. Two that gave none do not agree."""
    pairs = [(answer(s), answer(t)) for s, t in zip(student, teacher, strict=True)]
    return sum(s == t != "" for s, t in pairs) / max(len(pairs), 1)


def tokens(text: str) -> list[str]:
    """Words and punctuation marks, in lower case: the same for every model, whatever its own tokeniser."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu(candidate: str, reference: str) -> float:
    """F of one pair of rationales, in [0, 100]: BLEU-4 of a sentence, exponentially smoothed (as sacreBLEU's default).

    An empty text has 0. Orders that the candidate is too short for are left out.
    """
    c, r = tokens(candidate), tokens(reference)
    logs, halved = [], 1
    for n in range(1, min(ORDER, len(c)) + 1):
        grams, allowed = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (c, r))
        hits = (grams & allowed).total()
        if n == 1 and not hits:
            return 0.0
        if not hits:
            halved *= 2
        logs.append(math.log((hits or 1 / halved) / grams.total()))
    if not logs:
        return 0.0
    brevity = min(0.0, 1 - len(r) / len(c))
    return 100 * math.exp(brevity + sum(logs) / len(logs))
