"""Value and gradient of the divergences over a tile of logits that stays in cache, without autograd.

A kernel takes student and teacher logits of a few rows, ``[R, V]``, finite, float32 or wider, divided by the
temperature, and checked options. It returns the values and leaves d value / d student logits in place of the
student's logits; the teacher's are scratch. With u = d value / d q that gradient is q u - q sum(q u).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import divergences as D
from .rows import PerRow, column

Kernel = Callable[..., Tensor]
_dot: Callable[[Tensor, Tensor], Tensor] = torch.linalg.vecdot


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the maximum of each row to 0, for precision; probabilities, and the log-normaliser ``[R, 1]``.

    The latter in float64, as its error is common to a whole row.
    """
    p = z.sub_(z.amax(-1, keepdim=True)).softmax(-1)
    # The largest probability is 1 / sum exp(z): one cheap reduction instead of a second exponential.
    return p, -p.amax(-1, keepdim=True).double().log()


def _log_ratio(a: Tensor, log_z: Tensor, b: Tensor | float, out: Tensor) -> tuple[Tensor, Tensor]:
    """a - log_z - b: to the working precision, in `out`, and what that left of it, ``[R]``."""
    rounded = log_z.to(a.dtype)
    torch.sub(a, rounded, out=out).sub_(b)
    return out, (rounded.double() - log_z).squeeze(-1)


def _project(qu: Tensor, q: Tensor, out: Tensor) -> None:
    torch.addcmul(qu, q, qu.sum(-1, keepdim=True), value=-1, out=out)


def _log_mix(a: Tensor, b: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    m = torch.lerp(b, a, weight).clamp_min_(torch.finfo(a.dtype).tiny)
    return m, m.log()


def _forward_kl(zs: Tensor, zt: Tensor, *, subtract_entropy: bool) -> Tensor:
    (p, log_zt), (q, log_zs) = _softmax(zt), _softmax(zs)
    if subtract_entropy:
        ratio, rest = _log_ratio(zt, log_zt - log_zs, zs, out=zt)
        value = _dot(p, ratio) + rest
    else:
        log_q, rest = _log_ratio(zs, log_zs, 0.0, out=zt)
        value = -_dot(p, log_q) - rest
    torch.sub(q, p, out=zs)
    return value


def _interpolated_kl(zs: Tensor, zt: Tensor, *, t: PerRow, subtract_entropy: bool) -> Tensor:
    torch.lerp(zs, zt, column(torch.as_tensor(t, dtype=zs.dtype, device=zs.device)), out=zt)
    return _forward_kl(zs, zt, subtract_entropy=subtract_entropy)


def _kl_pair(zs: Tensor, zt: Tensor, forward: PerRow, reverse: PerRow) -> Tensor:
    """forward KL(p || q) + reverse KL(q || p), with constant factors, numbers or ``[R, 1]``."""
    (p, log_zt), (q, log_zs) = _softmax(zt), _softmax(zs)
    ratio, rest = _log_ratio(zt, log_zt - log_zs, zs, out=zt)
    mean_p, mean_q, rest = (x.unsqueeze(-1) for x in (_dot(p, ratio), _dot(q, ratio), rest))
    torch.sub(q, p, out=zs).mul_(forward)
    zs.sub_(ratio.sub_(mean_q).mul_(q).mul_(reverse))
    return (forward * (mean_p + rest) - reverse * (mean_q + rest)).squeeze(-1)


def _adaptive_kl(zs: Tensor, zt: Tensor, *, mu: float) -> Tensor:
    p, gap = zt.softmax(-1), zs.softmax(-1)
    gap.sub_(p).abs_()
    size = 8  # sorts no more of the rows than their heads ask for
    while True:
        size = min(8 * size, p.shape[-1])
        top, order = p.topk(size, -1)
        head = top.cumsum(-1) <= mu
        if size == p.shape[-1] or not bool(head[:, -1].any()):
            break
    head[:, 0] = True
    g_head, g = (gap.gather(-1, order) * head).sum(-1, keepdim=True), gap.sum(-1, keepdim=True)
    w = g_head / g.clamp_min(torch.finfo(g.dtype).tiny)
    return _kl_pair(zs, zt, w, 1 - w)


def _generalized_js(zs: Tensor, zt: Tensor, *, beta: float) -> Tensor:
    (p, log_zt), (q, log_zs) = _softmax(zt), _softmax(zs)
    _, log_m = _log_mix(p, q, beta)
    ratio_p, rest_p = _log_ratio(zt, log_zt, log_m, out=zt)
    ratio_q, rest_q = _log_ratio(zs, log_zs, log_m, out=zs)
    kl_p, kl_q = _dot(p, ratio_p), _dot(q, ratio_q)
    ratio_q.sub_(kl_q.unsqueeze(-1)).mul_(q).mul_(1 - beta)
    return beta * (kl_p + rest_p) + (1 - beta) * (kl_q + rest_q)


def _skew_forward_kl(zs: Tensor, zt: Tensor, *, alpha: float) -> Tensor:
    (p, log_zt), q = _softmax(zt), zs.softmax(-1)
    m, log_m = _log_mix(p, q, alpha)
    ratio, rest = _log_ratio(zt, log_zt, log_m, out=zt)
    value = _dot(p, ratio) + rest
    _project(p.mul_(q).div_(m).mul_(alpha - 1), q, out=zs)
    return value


def _skew_reverse_kl(zs: Tensor, zt: Tensor, *, alpha: float) -> Tensor:
    p, (q, log_zs) = zt.softmax(-1), _softmax(zs)
    m, log_m = _log_mix(q, p, alpha)
    ratio, rest = _log_ratio(zs, log_zs, log_m, out=zs)
    value = _dot(q, ratio) + rest
    _project(ratio.addcdiv_(q, m, value=-alpha).mul_(q), q, out=zs)
    return value


def _total_variation(zs: Tensor, zt: Tensor) -> Tensor:
    p, q = zt.softmax(-1), zs.softmax(-1)
    gap = torch.sub(q, p, out=p)
    value = torch.abs(gap, out=zs).sum(-1) / 2
    _project(gap.sign_().mul_(q).div_(2), q, out=zs)
    return value


def _alpha_divergence(zs: Tensor, zt: Tensor, *, alpha: float, times: float = 1.0) -> Tensor:
    (p, log_zt), (q, log_zs) = _softmax(zt), _softmax(zs)
    torch.lerp(zs, zt, alpha, out=zs)
    product, rest = _log_ratio(zs, torch.lerp(log_zs, log_zt, alpha), 0.0, out=zs)
    terms = torch.lerp(q, p, alpha, out=p).sub_(product.exp_())
    value = (terms.sum(-1) - rest * product.sum(-1)) * (times / (alpha * (1 - alpha)))
    _project(product.mul_(-times / alpha), q, out=zs)
    return value


def _decoupled_kl(zs: Tensor, zt: Tensor, *, target: Tensor, alpha: float, beta: float) -> Tensor:
    """TCKD in the log-odds of {target, rest}, NCKD as forward KL over the rest."""
    index, ignored = target.clamp_min(0).unsqueeze(-1), (target < 0).unsqueeze(-1)
    odds_s, odds_t = (z.gather(-1, index).double() for z in (zs, zt))
    for z, odds in ((zs, odds_s), (zt, odds_t)):  # far below all others: no probability, a finite difference
        odds.sub_(z.scatter_(-1, index, torch.finfo(z.dtype).min / 4).amax(-1, keepdim=True))
    (p, log_zt), (q, log_zs) = _softmax(zt), _softmax(zs)
    odds_s, odds_t = odds_s - log_zs, odds_t - log_zt
    pull = (odds_s.sigmoid() - odds_t.sigmoid()).to(zs.dtype) * alpha
    tckd = odds_t.sigmoid() * (logsigmoid(odds_t) - logsigmoid(odds_s))
    tckd += (-odds_t).sigmoid() * (logsigmoid(-odds_t) - logsigmoid(-odds_s))
    ratio, rest = _log_ratio(zt, log_zt - log_zs, zs, out=zt)
    nckd = (_dot(p, ratio) + rest).unsqueeze(-1)
    torch.sub(q, p, out=zs).mul_(beta).addcmul_(q, pull, value=-1)
    zs.scatter_(-1, index, pull).masked_fill_(ignored, 0.0)
    return (alpha * tckd + beta * nckd).masked_fill(ignored, 0.0).squeeze(-1)


KERNELS: dict[Callable[..., Tensor], Kernel] = {
    D.forward_kl: _forward_kl,
    D.interpolated_kl: _interpolated_kl,
    D.reverse_kl: partial(_kl_pair, forward=0.0, reverse=1.0),
    D.jeffreys: partial(_kl_pair, forward=1.0, reverse=1.0),
    D.adaptive_kl: _adaptive_kl,
    D.js: partial(_generalized_js, beta=0.5),
    D.generalized_js: _generalized_js,
    D.skew_forward_kl: _skew_forward_kl,
    D.skew_reverse_kl: _skew_reverse_kl,
    D.total_variation: _total_variation,
    D.hellinger: partial(_alpha_divergence, alpha=0.5, times=0.25),
    D.alpha_divergence: _alpha_divergence,
    D.decoupled_kl: _decoupled_kl,
}
"""Each takes all its function's own options (not temperature and t_squared)."""
