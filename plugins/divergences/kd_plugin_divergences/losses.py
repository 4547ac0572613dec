"""Each divergence of ``kdcore.functional`` as a loss with checked parameters.

p is the teacher, q the student. Logits [..., V] of both; returns [...], the sum over the last axis times
temperature squared. Softmax in float32; no gradient to the teacher. Models that give hidden states and an
output layer instead of logits are served in chunks by the core, with the same function.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdcore import conventions, functional

Temperature = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(gt=0, lt=1)]


@conventions(zero_at_teacher=True, topk=True)
def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """sum p log(p / q): large where the student misses mass of the teacher."""
    return functional.forward_kl(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """sum q log(q / p): large where the student puts mass that the teacher does not (MiniLLM's divergence)."""
    return functional.reverse_kl(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def jeffreys(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return functional.jeffreys(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def js(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most ln 2 before the temperature's factor."""
    return functional.js(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def generalized_js(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: Weight = 0.5, temperature: Temperature = 1.0
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1)."""
    return functional.generalized_js(student_logits, teacher_logits, beta=beta, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: Weight = 0.1, temperature: Temperature = 1.0
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898, eq. 4)."""
    return functional.skew_forward_kl(student_logits, teacher_logits, alpha=alpha, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: Weight = 0.1, temperature: Temperature = 1.0
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM)."""
    return functional.skew_reverse_kl(student_logits, teacher_logits, alpha=alpha, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """sum |p - q| / 2: bounded, and not smooth where p = q (f-DISTILL, arXiv 2307.15190)."""
    return functional.total_variation(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True)
def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mu: Weight = 0.5, temperature: Temperature = 1.0
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p); w is the share of the gap in the teacher's head of mass mu (AKL, 2404.02657)."""
    return functional.adaptive_kl(student_logits, teacher_logits, mu=mu, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def hellinger(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """sum (sqrt p - sqrt q)^2 / 2."""
    return functional.hellinger(student_logits, teacher_logits, temperature=temperature)


@conventions(zero_at_teacher=True, topk=True)
def alpha_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: Weight = 0.5, temperature: Temperature = 1.0
) -> Tensor:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)): reverse KL at 0, forward KL at 1."""
    return functional.alpha_divergence(student_logits, teacher_logits, alpha=alpha, temperature=temperature)
