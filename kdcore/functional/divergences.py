"""Divergences between a teacher's p and a student's q, row by row.

Every function takes logits ``[..., V]`` of both, of one shape, and returns ``[...]``, the sum over the V
classes. All take ``temperature``, a positive number or one per row ``[...]``, which divides both logits, and
``t_squared``: multiply the value by its square, so that gradients keep their size (Hinton et al. 2015). Rows
are computed in float32 (float64 stays); no gradient reaches the teacher.

An entry at -inf has probability zero. Terms take their limit there (0 log 0 = 0); one that would be infinite
(in forward KL, where only the student excludes an outcome) is left out, as public implementations do.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows import PerRow, check, column, log_rows

Divergence = Callable[..., Tensor]


def _divergence(formula: Divergence) -> Divergence:
    """From a formula of log q and log p to a function of logits, under the formula's name."""

    def of_logits(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: PerRow = 1.0,
        t_squared: bool = True,
        **options: Any,
    ) -> Tensor:
        value = formula(*log_rows(student_logits, teacher_logits, temperature), **options)
        return value * temperature**2 if t_squared else value

    shared, own = (inspect.signature(f) for f in (of_logits, formula))
    parameters = [*list(shared.parameters.values())[:-1], *list(own.parameters.values())[2:]]
    of_logits.__signature__ = shared.replace(parameters=parameters)  # type: ignore[attr-defined]
    of_logits.__name__ = of_logits.__qualname__ = formula.__name__
    of_logits.__doc__ = formula.__doc__
    return of_logits


@_divergence
def forward_kl(log_q: Tensor, log_p: Tensor, *, subtract_entropy: bool = True) -> Tensor:
    """KL(p || q): covers every mode of the teacher. Without the entropy: cross-entropy, -sum p log q."""
    if subtract_entropy:
        return _kl(log_p, log_q)
    return -(log_p.exp() * log_q.masked_fill(log_q.isneginf(), 0.0)).sum(-1)


@_divergence
def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p): seeks the teacher's main modes."""
    return _kl(log_q, log_p)


@_divergence
def jeffreys(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return _kl(log_p, log_q) + _kl(log_q, log_p)


@_divergence
def js(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in [0, ln 2] at temperature 1."""
    return _js(log_q, log_p, 0.5)


@_divergence
def generalized_js(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    It tends to 0 at both ends of beta. Public versions jump to a KL there; here the ends are refused.
    """
    check(0 < beta < 1, f"beta must be inside (0, 1), given {beta}; see forward_kl and reverse_kl")
    return _js(log_q, log_p, beta)


@_divergence
def skew_forward_kl(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), alpha in [0, 1] (DistiLLM, arXiv 2402.03898)."""
    check(0 <= alpha <= 1, f"alpha must be in [0, 1], given {alpha}")
    return _kl(log_p, _log_mix(log_p, log_q, alpha))


@_divergence
def skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), alpha in [0, 1] (DistiLLM)."""
    check(0 <= alpha <= 1, f"alpha must be in [0, 1], given {alpha}")
    return _kl(log_q, _log_mix(log_q, log_p, alpha))


@_divergence
def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum |p - q| / 2, in [0, 1] at temperature 1; the gradient where p = q is taken as 0."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


@_divergence
def hellinger(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Squared Hellinger distance, sum (sqrt p - sqrt q)^2 / 2, in [0, 1] at temperature 1."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1) / 2


@_divergence
def alpha_divergence(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.5) -> Tensor:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)), alpha not 0 or 1.

    It tends to forward KL at 1 and to reverse KL at 0; 0.5 is 4 `hellinger`, 2 is half of Pearson's chi2.
    """
    check(alpha not in (0, 1), f"alpha must not be 0 or 1, given {alpha}; use reverse_kl or forward_kl")
    excluded, log_p0, log_q0 = _exclude(log_p, log_q)
    product = (alpha * log_p0 + (1 - alpha) * log_q0).exp().masked_fill(excluded, 0.0)
    # Every term is >= 0 for alpha in (0, 1); 1 - sum(product) would cancel near p = q.
    terms = alpha * log_p.exp() + (1 - alpha) * log_q.exp() - product
    return terms.sum(-1) / (alpha * (1 - alpha))


@_divergence
def adaptive_kl(log_q: Tensor, log_p: Tensor, *, mu: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p) with constant w, the head's share of sum |p - q| (arXiv 2404.02657).

    The head: the teacher's top token, and those after it while their joint mass is within `mu`; which of equal
    tokens comes first is left open.
    """
    check(0 <= mu <= 1, f"mu must be in [0, 1], given {mu}")
    p_sorted, order = torch.sort(log_p.exp(), dim=-1, descending=True)
    gap = (p_sorted - log_q.detach().exp().gather(-1, order)).abs()
    head = p_sorted.cumsum(-1) <= mu
    head[..., 0] = True
    w = (gap * head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return w * _kl(log_p, log_q) + (1 - w) * _kl(log_q, log_p)


@_divergence
def decoupled_kl(
    log_q: Tensor, log_p: Tensor, *, target: Tensor, alpha: float = 1, beta: float = 8
) -> Tensor:
    """alpha TCKD + beta NCKD (Decoupled KD, arXiv 2203.08679): KL over {target, rest} and within the rest.

    `target` int64 ``[...]``; where it is negative (ignored) the value is 0.
    """
    index = target.clamp_min(0).unsqueeze(-1)
    rest = [x.scatter(-1, index, float("-inf")) for x in (log_p, log_q)]
    mass = [x.logsumexp(-1, keepdim=True) for x in rest]
    pair = [torch.cat([x.gather(-1, index), y], -1) for x, y in zip((log_p, log_q), mass, strict=True)]
    value = alpha * _kl(*pair) + beta * _kl(*(x - y for x, y in zip(rest, mass, strict=True)))
    return value.masked_fill(target < 0, 0.0)


@_divergence
def interpolated_kl(log_q: Tensor, log_p: Tensor, *, t: PerRow, subtract_entropy: bool = True) -> Tensor:
    """KL(p_t || q), p_t = softmax((1 - t) z_S + t z_T) without gradient (TAID, arXiv 2501.16937, Eq. 3).

    `t` in [0, 1], a number or one per row ``[...]``. Without the entropy it is J, which drives its schedule.
    """
    t, (excluded, log_p0, log_q0) = column(t), _exclude(log_p, log_q.detach())
    target = ((1 - t) * log_q0 + t * log_p0).masked_fill(excluded, float("-inf"))
    return forward_kl(log_q, target, t_squared=False, subtract_entropy=subtract_entropy)


kl_divergence = forward_kl
_ALL = [forward_kl, reverse_kl, jeffreys, js, generalized_js, skew_forward_kl, skew_reverse_kl]
_ALL += [total_variation, adaptive_kl, decoupled_kl, hellinger, alpha_divergence]
DIVERGENCES: dict[str, Divergence] = {f.__name__: f for f in _ALL}
"""Zero where the student equals the teacher, positive elsewhere; `decoupled_kl` alone needs labels."""


def _exclude(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where either is -inf, and both with 0 there: infinities masked later would leave a NaN gradient."""
    out = log_a.isneginf() | log_b.isneginf()
    return out, log_a.masked_fill(out, 0.0), log_b.masked_fill(out, 0.0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    _, a, b = _exclude(log_a, log_b)
    return (log_a.exp() * (a - b)).sum(-1)


def _js(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    log_m = _log_mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _log_mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b); where both are zero the smallest normal number stands for the sum."""
    if weight in (0, 1):
        return log_a if weight else log_b
    mix = weight * log_a.exp() + (1 - weight) * log_b.exp()
    return mix.clamp_min(torch.finfo(mix.dtype).tiny).log()
