"""Divergences between a teacher's p and a student's q, row by row.

Every function takes logits ``[..., V]`` of both, of one shape, and returns ``[...]``: summed over the V classes, not
reduced further. Common keyword arguments: `temperature`, a positive number or one per row ``[...]``, divides both
logits; `t_squared` multiplies the result by its square, so that gradients keep their size (Hinton et al. 2015). Rows
are computed in float32 (float64 stays), and no gradient reaches the teacher.

An entry at -inf has probability zero. Terms take their limit there (0 log 0 = 0); a term that would be infinite, as
in forward KL where only the student excludes an outcome, is left out of the sum, as the public implementations do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rows import Temperature, log_rows


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
    subtract_entropy: bool = True,
) -> Tensor:
    """KL(p || q): covers every mode of the teacher. Without `subtract_entropy`, the cross-entropy -sum p log q."""
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    if subtract_entropy:
        return _scaled(_kl(log_p, log_q), temperature, t_squared)
    return _scaled(-(log_p.exp() * log_q.masked_fill(log_q.isneginf(), 0.0)).sum(-1), temperature, t_squared)


kl_divergence = forward_kl


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, t_squared: bool = True
) -> Tensor:
    """KL(q || p): seeks the teacher's main modes."""
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    return _scaled(_kl(log_q, log_p), temperature, t_squared)


def jeffreys(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, t_squared: bool = True
) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    return _scaled(_kl(log_p, log_q) + _kl(log_q, log_p), temperature, t_squared)


def generalized_js(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1 (GKD, arXiv 2306.13649).

    It tends to 0 at both ends of beta. Implementations that answer with a KL at beta 0 or 1 jump there; here both
    ends are refused, and `forward_kl` and `reverse_kl` are what they mean.
    """
    check_open_unit("beta", beta)
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    log_m = _log_mix(log_p, log_q, beta)
    return _scaled(beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m), temperature, t_squared)


def js(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, t_squared: bool = True
) -> Tensor:
    """Jensen-Shannon divergence, in [0, ln 2] at temperature 1."""
    return generalized_js(student_logits, teacher_logits, beta=0.5, temperature=temperature, t_squared=t_squared)


def skew_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), 0 <= alpha <= 1 (DistiLLM, arXiv 2402.03898); alpha 0 is forward KL."""
    check_unit("alpha", alpha)
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    return _scaled(_kl(log_p, _log_mix(log_p, log_q, alpha)), temperature, t_squared)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), 0 <= alpha <= 1 (DistiLLM); alpha 0 is reverse KL."""
    check_unit("alpha", alpha)
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    return _scaled(_kl(log_q, _log_mix(log_q, log_p, alpha)), temperature, t_squared)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, t_squared: bool = True
) -> Tensor:
    """sum |p - q| / 2, in [0, 1] at temperature 1; the gradient at p = q is taken as 0."""
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    return _scaled((log_p.exp() - log_q.exp()).abs().sum(-1) / 2, temperature, t_squared)


def hellinger(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, t_squared: bool = True
) -> Tensor:
    """Squared Hellinger distance, sum (sqrt p - sqrt q)^2 / 2, in [0, 1] at temperature 1."""
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    root_gap = (log_p / 2).exp() - (log_q / 2).exp()
    return _scaled((root_gap * root_gap).sum(-1) / 2, temperature, t_squared)


def alpha_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)), alpha not 0 or 1.

    Towards alpha 1 it becomes forward KL, towards 0 reverse KL; 0.5 is 4 times `hellinger`, 2 is half of Pearson's chi2.
    """
    check_alpha(alpha)
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    excluded = log_p.isneginf() | log_q.isneginf()
    exponent = alpha * log_p.masked_fill(excluded, 0.0) + (1 - alpha) * log_q.masked_fill(excluded, 0.0)
    # Every term of this sum is >= 0 for alpha in (0, 1); 1 - sum p^alpha q^(1-alpha) would cancel near p = q.
    terms = alpha * log_p.exp() + (1 - alpha) * log_q.exp() - exponent.exp().masked_fill(excluded, 0.0)
    return _scaled(terms.sum(-1) / (alpha * (1 - alpha)), temperature, t_squared)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mu: float = 0.5,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p) (AKL, arXiv 2404.02657), w = the head's share of sum |p - q|, a constant.

    The head is the teacher's top token and the further ones, by size, while their joint mass stays within `mu`, as in
    the authors' code.
    """
    check_unit("mu", mu)
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    w = _head_share(log_p.exp(), log_q.detach().exp(), mu)
    return _scaled(w * _kl(log_p, log_q) + (1 - w) * _kl(log_q, log_p), temperature, t_squared)


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """alpha TCKD + beta NCKD (Decoupled KD, arXiv 2203.08679, Eq. 7), `target` int64 ``[...]``.

    TCKD is the KL of {target, rest}, NCKD that of the non-target classes renormalised. A row whose target is
    negative (ignored) gives 0.
    """
    log_q, log_p = log_rows(student_logits, teacher_logits, temperature)
    index = target.clamp_min(0).unsqueeze(-1)
    tckd = _kl(_target_and_rest(log_p, index), _target_and_rest(log_q, index))
    nckd = _kl(_without(log_p, index), _without(log_q, index))
    value = (alpha * tckd + beta * nckd).masked_fill(target < 0, 0.0)
    return _scaled(value, temperature, t_squared)


def interpolate_logits(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor) -> Tensor:
    """TAID's moving target (arXiv 2501.16937, Eq. 3): (1 - t) z_S + t z_T in logit space, without gradient.

    `t` is a number or one per row ``[...]``.
    """
    weight = t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t
    return (1 - weight) * student_logits.detach() + weight * teacher_logits.detach()


def interpolated_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    t: float | Tensor,
    temperature: Temperature = 1.0,
    t_squared: bool = True,
    subtract_entropy: bool = True,
) -> Tensor:
    """Forward KL towards `interpolate_logits`; without `subtract_entropy` it is TAID's objective J."""
    target = interpolate_logits(student_logits, teacher_logits, t)
    return forward_kl(
        student_logits, target, temperature=temperature, t_squared=t_squared, subtract_entropy=subtract_entropy
    )


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "js": js,
    "generalized_js": generalized_js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "decoupled_kl": decoupled_kl,
    "hellinger": hellinger,
    "alpha": alpha_divergence,
}
"""Zero where the student equals the teacher, positive elsewhere. `decoupled_kl` alone needs labels (`target`)."""


def check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], given {value}")


def check_open_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be inside (0, 1), given {value}: at the ends use forward_kl or reverse_kl")


def check_alpha(alpha: float) -> None:
    if alpha in (0, 1):
        raise ValueError(f"alpha must not be 0 or 1, given {alpha}: use reverse_kl or forward_kl")


def _scaled(value: Tensor, temperature: Temperature, t_squared: bool) -> Tensor:
    return value * temperature**2 if t_squared else value


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b), leaving out the outcomes that either side excludes."""
    # Masked before the difference: a masked difference of infinities would still have a NaN gradient.
    excluded = log_a.isneginf() | log_b.isneginf()
    return (log_a.exp() * (log_a.masked_fill(excluded, 0.0) - log_b.masked_fill(excluded, 0.0))).sum(-1)


def _log_mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b); where both are zero the smallest normal number stands for the sum."""
    if weight in (0, 1):
        return log_a if weight else log_b
    mix = weight * log_a.exp() + (1 - weight) * log_b.exp()
    return mix.clamp_min(torch.finfo(mix.dtype).tiny).log()


def _head_share(p: Tensor, q: Tensor, mu: float) -> Tensor:
    p_sorted, order = p.sort(-1, descending=True, stable=True)
    gap = (p_sorted - q.gather(-1, order)).abs()
    head = p_sorted.cumsum(-1) <= mu
    head[..., 0] = True
    g_head = (gap * head).sum(-1)
    return g_head / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)


def _without(log_p: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of the other classes, renormalised; the target's entry becomes -inf."""
    return log_p.scatter(-1, index, float("-inf")).log_softmax(-1)


def _target_and_rest(log_p: Tensor, index: Tensor) -> Tensor:
    rest = log_p.scatter(-1, index, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, index), rest], dim=-1)
