"""`chunked` against float64 autograd over all logits, with divergences written out in probability space."""

import pytest
import torch
import torch.nn.functional as F

import kdcore.functional as KF
from kdcore.functional import DIVERGENCES, Unembed, chunked
from kdcore.functional.fused import KERNELS

N, H, H_TEACHER, V = 37, 12, 7, 50


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def adaptive(p, q, mu=0.5):
    order = p.sort(-1, descending=True).indices
    inside = p.gather(-1, order).cumsum(-1) <= mu
    inside[..., 0] = True
    head = torch.zeros_like(inside).scatter(-1, order, inside)
    gap = (p - q.detach()).abs()
    w = (gap * head).sum(-1) / gap.sum(-1)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def decoupled(p, q, target, beta=8.0):
    is_target = F.one_hot(target, p.shape[-1]).bool()
    pair, rest = [], []
    for x in (p, q):
        mass = x[is_target].unsqueeze(-1)
        pair.append(torch.cat([mass, 1 - mass], -1))
        rest.append(x[~is_target].reshape(len(x), -1) / (1 - mass))
    return kl(*pair) + beta * kl(*rest)


ORACLES = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
    "js": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "generalized_js": lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "hellinger": lambda p, q: ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2,
    "alpha_divergence": lambda p, q: (1 - (p**0.7 * q**0.3).sum(-1)) / (0.7 * 0.3),
    "adaptive_kl": adaptive,
    "decoupled_kl": decoupled,
}
OPTIONS = {"generalized_js": {"beta": 0.3}, "alpha_divergence": {"alpha": 0.7}}


def sides(dtype=torch.float32, n=N, v=V, v_teacher=None, **head):
    """Leaf tensors of both sides; logits of both have a standard deviation near 1.5."""
    g = torch.Generator().manual_seed(n + v)

    def side(h, size):
        shapes = (n, h), (size, h), (size,)
        hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
        return [x.to(dtype).requires_grad_() for x in (hidden, weight * 1.5 / h**0.5, bias / 5)]

    student, teacher = side(H, v), side(H_TEACHER, v_teacher or v)
    target = torch.randint(0, min(v, v_teacher or v), (n,), generator=g)
    return Unembed(*student, **head), Unembed(*teacher, **head), target


def raw_logits(side):
    z = (side.hidden.double() @ side.weight.double().T + side.bias.double()) * side.scale
    return z if side.softcap is None else side.softcap * (z / side.softcap).tanh()


def oracle(name, student, teacher, target, temperature=1.0):
    p, q = (F.softmax(raw_logits(side) / temperature, -1) for side in (teacher, student))
    extra = [target] if name == "decoupled_kl" else []
    return ORACLES[name](p.detach(), q, *extra) * temperature**2


def gradients(values, student, weights=1.0):
    leaves = [x for x in student[:3] if x is not None]
    return torch.autograd.grad((values * weights).sum(), leaves, retain_graph=True)


def call(name, student, teacher, target, **kwargs):
    per_token = {"target": target} if name == "decoupled_kl" else {}
    return chunked(
        DIVERGENCES[name], student, teacher, per_token=per_token, **OPTIONS.get(name, {}), **kwargs
    )


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0, "scale": 0.8}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_value_and_gradient_equal_dense_float64(name, head, dtype, tolerance):
    student, teacher, target = sides(dtype, **head)
    got = call(name, student, teacher, target, chunk_size=8, temperature=1.7)
    expected = oracle(name, student, teacher, target, 1.7)
    assert relative(got, expected) < tolerance
    for mine, theirs in zip(gradients(got, student), gradients(expected, student), strict=True):
        assert relative(mine, theirs.double()) < tolerance
    assert teacher.weight.grad is None


def test_every_divergence_has_a_kernel():
    assert set(DIVERGENCES.values()) <= set(KERNELS)


@pytest.mark.parametrize("v", [3, 50257])
@pytest.mark.parametrize("name", ["forward_kl", "js", "adaptive_kl", "decoupled_kl"])
def test_smallest_and_large_vocabularies(name, v):
    student, teacher, target = sides(torch.float64, n=3, v=v)
    got, expected = call(name, student, teacher, target), oracle(name, student, teacher, target)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, student), gradients(expected, student))


@pytest.mark.parametrize("subtract_entropy", [True, False])
def test_interpolated_target(subtract_entropy):
    student, teacher, _ = sides(torch.float64)
    t = torch.linspace(0, 1, N, dtype=torch.float64)
    own = {"subtract_entropy": subtract_entropy, "temperature": 2.0}
    got = chunked(KF.interpolated_kl, student, teacher, per_token={"t": t}, chunk_size=10, **own)
    z, zt = raw_logits(student), raw_logits(teacher).detach()
    target = ((1 - t)[:, None] * z.detach() + t[:, None] * zt).div(2).softmax(-1)
    expected = -4 * (target * (z / 2).log_softmax(-1)).sum(-1)
    if subtract_entropy:
        expected = expected + 4 * (target * target.log()).sum(-1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, student), gradients(expected, student))
    fixed = chunked(KF.interpolated_kl, student, teacher, t=0.3, **own)
    each = chunked(KF.interpolated_kl, student, teacher, per_token={"t": torch.full((N,), 0.3)}, **own)
    torch.testing.assert_close(fixed, each, rtol=1e-6, atol=1e-7)


def own_function(student_logits, teacher_logits, *, power, shift):
    """No divergence: top teacher entries, a learned exponent, a learned shift of each token."""
    top, index = teacher_logits.softmax(-1).topk(5, -1)
    mine = (student_logits + shift.unsqueeze(-1) * student_logits.sin()).softmax(-1).gather(-1, index)
    return ((top - mine).abs() ** power).sum(-1)


def test_any_function_and_gradient_to_its_tensors():
    student, teacher, _ = sides(torch.float64)
    power = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    shift = torch.linspace(-1, 1, N, dtype=torch.float64).requires_grad_()
    got = chunked(own_function, student, teacher, per_token={"shift": shift}, power=power, chunk_size=8)
    expected = own_function(raw_logits(student), raw_logits(teacher).detach(), power=power, shift=shift)
    torch.testing.assert_close(got, expected)
    leaves = [*student[:3], power, shift]
    for upstream in (torch.ones(N), torch.linspace(1, 2, N)):
        pair = [torch.autograd.grad(x, leaves, upstream.double(), retain_graph=True) for x in (got, expected)]
        torch.testing.assert_close(*pair)


def test_a_learned_temperature_gets_its_gradient():
    student, teacher, _ = sides(torch.float64)
    tau = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    got = chunked(KF.forward_kl, student, teacher, temperature=tau).mean()
    z, zt = raw_logits(student) / tau, raw_logits(teacher).detach() / tau
    expected = (tau**2 * kl(zt.softmax(-1), z.softmax(-1))).mean()
    torch.testing.assert_close(*(torch.autograd.grad(x, tau) for x in (got, expected)))


@pytest.mark.parametrize("fn", [KF.js, lambda s, t: KF.js(s, t)], ids=["kernel", "autograd"])
def test_first_and_second_derivatives_by_finite_differences(fn):
    student, teacher, _ = sides(torch.float64, n=3, v=4, softcap=3.0)

    def of_student(hidden, weight, bias):
        return chunked(fn, student._replace(hidden=hidden, weight=weight, bias=bias), teacher, chunk_size=2)

    assert torch.autograd.gradcheck(of_student, student[:3])
    assert torch.autograd.gradgradcheck(of_student, student[:3])


@pytest.mark.parametrize("fn", [KF.reverse_kl, lambda s, t: KF.reverse_kl(s, t)], ids=["kernel", "autograd"])
def test_any_upstream_gradient_and_any_number_of_backward_passes(fn):
    student, teacher, target = sides(torch.float64)
    got = chunked(fn, student, teacher, chunk_size=16)
    expected = oracle("reverse_kl", student, teacher, target)
    uneven = torch.linspace(-1, 2, N, dtype=torch.float64)
    for upstream in (1.0, 1.0, -3.0, uneven, uneven, 2.0):
        torch.testing.assert_close(gradients(got, student, upstream), gradients(expected, student, upstream))


def test_gradients_accumulate_in_parameters():
    student, teacher, target = sides(torch.float64)
    twice = chunked(KF.js, student, teacher).mean() + chunked(KF.js, student, teacher).sum()
    twice.backward(retain_graph=True)
    twice.backward()
    expected = gradients(oracle("js", student, teacher, target) * (2 / N + 2), student)
    torch.testing.assert_close(tuple(x.grad for x in student[:3]), expected)


def test_masks_and_weights():
    student, teacher, target = sides(torch.float64)
    mask = torch.arange(N) % 3 > 0
    weights = torch.linspace(0, 2, N, dtype=torch.float64).requires_grad_()
    got = call("decoupled_kl", student, teacher, target, mask=mask, weights=weights, chunk_size=5)
    expected = torch.where(mask, oracle("decoupled_kl", student, teacher, target) * weights, 0.0)
    torch.testing.assert_close(got, expected)
    for scale in (1.0, 1 / 7):
        torch.testing.assert_close(gradients(got, student, scale), gradients(expected, student, scale))
    pair = [torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (got, expected)]
    pair[1][0][0] = 0  # a weight of 0 switches its token off
    torch.testing.assert_close(*pair)


def test_leading_shape_is_kept():
    student, teacher, target = sides(torch.float64, n=12)
    flat = call("decoupled_kl", student, teacher, target)
    folded = [side._replace(hidden=side.hidden.reshape(3, 4, -1)) for side in (student, teacher)]
    mask = torch.ones(3, 4, dtype=torch.bool)
    got = chunked(KF.decoupled_kl, *folded, mask, per_token={"target": target.reshape(3, 4)})
    torch.testing.assert_close(got, flat.reshape(3, 4))


def test_masked_tokens_may_hold_nan_and_others_pass_it_on():
    student, teacher, target = sides(torch.float64)
    dirty = torch.zeros(N, dtype=torch.bool)
    dirty[[2, 30]] = True
    spoilt = student._replace(hidden=student.hidden.masked_fill(dirty.unsqueeze(-1), float("nan")))
    target = target.masked_fill(dirty, -100)
    got = call("decoupled_kl", spoilt, teacher, target, mask=~dirty)
    assert (got[dirty] == 0).all()
    for gradient in gradients(got, student):
        assert gradient.isfinite().all()
    assert not chunked(KF.js, spoilt, teacher)[dirty].isfinite().any()


@pytest.mark.parametrize("fn", [KF.js, lambda s, t: KF.js(s, t)], ids=["kernel", "autograd"])
def test_nothing_supervised_is_zero_with_zero_gradients(fn):
    student, teacher, _ = sides()
    spoilt = student._replace(hidden=student.hidden * float("nan"))
    got = chunked(fn, spoilt, teacher, torch.zeros(N))
    assert got.tolist() == [0.0] * N
    for gradient in gradients(got, student):
        assert gradient.nan_to_num().abs().max() == 0
    empty = [side._replace(hidden=side.hidden[:0]) for side in (student, teacher)]
    assert chunked(fn, *empty).shape == (0,)


def test_entries_excluded_by_the_bias():
    student, teacher, target = sides(torch.float64)
    small = [Unembed(side.hidden, side.weight[:-4], side.bias[:-4]) for side in (student, teacher)]
    excluded = [
        side._replace(bias=side.bias.masked_fill(torch.arange(V) >= V - 4, float("-inf")))
        for side in (student, teacher)
    ]
    for name in DIVERGENCES:
        few = target.clamp_max(V - 5)
        got, expected = call(name, *excluded, few), call(name, *small, few)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, student), gradients(expected, student))
