"""The divergences on logits: the card's values, numpy brute force, the authors' code, finite differences."""

import math

import numpy as np
import pytest
import torch

import kdcore.functional as KF
from kdcore.functional import DIVERGENCES

P, Q = (0.9, 0.1), (0.5, 0.5)
P3, Q3 = (0.7, 0.2, 0.1), (0.4, 0.2, 0.4)


def logits(*probabilities, dtype=torch.float64):
    return torch.tensor(probabilities, dtype=dtype).log()


def value(fn, q, p, **options):
    return fn(logits(*q), logits(*p), **options).item()


# The survey card's table of divergences for p = (0.9, 0.1), q = (0.5, 0.5), computed apart from this package.
CARD = [
    (KF.forward_kl, {}, 0.36806),
    (KF.forward_kl, {"subtract_entropy": False}, 0.69315),
    (KF.reverse_kl, {}, 0.51083),
    (KF.jeffreys, {}, 0.87889),
    (KF.js, {}, 0.10175),
    (KF.generalized_js, {"beta": 0.1}, 0.03360),
    (KF.generalized_js, {"beta": 0.9}, 0.04307),
    (KF.skew_forward_kl, {"alpha": 0.1}, 0.30714),
    (KF.skew_reverse_kl, {"alpha": 0.1}, 0.36532),
    (KF.total_variation, {}, 0.4),
    (KF.hellinger, {}, 0.10557),
    (KF.alpha_divergence, {"alpha": 0.5}, 0.42229),
    (KF.alpha_divergence, {"alpha": 2.0}, 0.64 / 2),  # half of Pearson's chi2
    (KF.forward_kl, {"temperature": 2.0}, 0.52325),
    (KF.forward_kl, {"temperature": 2.0, "t_squared": False}, 0.13081),
]


@pytest.mark.parametrize("fn, options, expected", CARD)
def test_card_values(fn, options, expected):
    assert value(fn, Q, P, **options) == pytest.approx(expected, abs=6e-6)


def test_card_values_of_three_classes():
    assert value(KF.adaptive_kl, Q3, P3) == pytest.approx(0.29189, abs=6e-6)
    for alpha, beta, expected in ((1, 0, 0.18379), (0, 1, 0.23105), (1, 0.3, 0.25310)):
        got = value(KF.decoupled_kl, Q3, P3, target=torch.tensor(0), alpha=alpha, beta=beta)
        assert got == pytest.approx(expected, abs=6e-6)


def kl(a, b):
    return float(np.sum(a * np.log(a / b)))


def numpy_adaptive(p, q, mu=0.5):
    order = np.argsort(-p)
    head, mass = {int(order[0])}, p[order[0]]
    for i in order[1:]:
        mass += p[i]
        if mass <= mu:
            head.add(int(i))
    gap = np.abs(p - q)
    w = sum(gap[i] for i in head) / gap.sum()
    return w * kl(p, q) + (1 - w) * kl(q, p)


def numpy_decoupled(p, q, y, alpha=1.0, beta=8.0):
    pair = [np.array([x[y], 1 - x[y]]) for x in (p, q)]
    rest = [np.delete(x, y) / (1 - x[y]) for x in (p, q)]
    return alpha * kl(*pair) + beta * kl(*rest)


BRUTE = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
    "js": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "generalized_js": lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    "skew_forward_kl": lambda p, q: kl(p, 0.2 * p + 0.8 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.8 * p + 0.2 * q),
    "total_variation": lambda p, q: np.abs(p - q).sum() / 2,
    "hellinger": lambda p, q: ((p**0.5 - q**0.5) ** 2).sum() / 2,
    "alpha_divergence": lambda p, q: (1 - (p**0.7 * q**0.3).sum()) / (0.7 * 0.3),
    "adaptive_kl": numpy_adaptive,
    "decoupled_kl": numpy_decoupled,
}
OPTIONS = {
    "generalized_js": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha_divergence": {"alpha": 0.7},
}
SHAPE, CLASSES = (2, 3), 9


def batch(dtype=torch.float64):
    """Student and teacher logits and the options of each divergence, target included."""
    g = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, *SHAPE, CLASSES, generator=g, dtype=torch.float64)
    options = {name: OPTIONS.get(name, {}) for name in DIVERGENCES}
    options["decoupled_kl"] = {"target": torch.randint(0, CLASSES, SHAPE, generator=g)}
    return student.to(dtype), teacher.to(dtype), options


def brute_force(name, student, teacher, temperature, options):
    out = np.empty(SHAPE)
    for i in np.ndindex(*SHAPE):
        p, q = (np.exp(z[i].double().numpy() / temperature) for z in (teacher, student))
        extra = [int(options["target"][i])] if "target" in options else []
        out[i] = BRUTE[name](p / p.sum(), q / q.sum(), *extra)
    return torch.from_numpy(out * temperature**2)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_every_divergence_equals_numpy_brute_force(name, dtype, tolerance):
    student, teacher, options = batch(dtype)
    for temperature in (1.0, 2.5):
        got = DIVERGENCES[name](student, teacher, temperature=temperature, **options[name])
        expected = brute_force(name, student, teacher, temperature, options[name])
        assert got.shape == SHAPE
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)
        assert got.double().sum().item() == pytest.approx(expected.sum().item(), rel=min(tolerance, 1e-6))


# SakanaAI/TAID, a0628922c16169d1fca10ddf61849e0693289cf8, src/distil_losses, and for akl the authors' AKL.py,
# wutaiqiang/LLM_KD_AKL, ff278be603df44b10afc07da3c7962ec8218aca7, run once on `released_case`: the mean over
# the tokens of the mask, and its gradient at token (1, 1). TAID's dkd divides by all tokens: times 6 / 4.
RELEASED = {
    "fkl": (2.68985128, [-0.00263969, -0.0904697, -0.03928998, 0.12623569, 0.0061637]),
    "rkl": (1.89286852, [-0.03405185, -0.01346733, -0.04204736, 0.09278265, -0.00321617]),
    "js01": (0.11843480, [-0.00101477, -0.00394275, -0.00373788, 0.00840805, 0.00028735]),
    "js05": (0.29621640, [-0.00517546, -0.00474305, -0.00986183, 0.01966917, 0.00011116]),
    "skew_fkl": (2.16590500, [-0.0125795, -0.02011855, -0.03355617, 0.06479442, 0.00145982]),
    "skew_rkl": (1.01588225, [-0.02187839, -0.01186245, -0.03207515, 0.06679729, -0.00098134]),
    "tvd": (0.61935818, [-0.02875173, -0.00237685, -0.01730697, 0.04474737, 0.00368818]),
    "dkd": (1.55376613, [0.01383766, -0.11424041, -0.01987307, 0.10079065, 0.01948517]),
    "taid": (1.60719562, [-0.01167967, -0.01248398, -0.02056487, 0.04479029, -6.175e-05]),
    "akl": (1.82221162, [-0.02331975, -0.03977555, -0.04110529, 0.10421205, -1.149e-05]),
}
DKD_TARGET = torch.tensor([[4, 0, 2], [3, 1, 2]])
RELEASED_CALLS = {
    "fkl": (KF.forward_kl, {"subtract_entropy": False}),
    "rkl": (KF.reverse_kl, {}),
    "js01": (KF.generalized_js, {"beta": 0.1}),
    "js05": (KF.js, {}),
    "skew_fkl": (KF.skew_forward_kl, {"alpha": 0.1}),
    "skew_rkl": (KF.skew_reverse_kl, {"alpha": 0.1}),
    "tvd": (KF.total_variation, {}),
    "dkd": (KF.decoupled_kl, {"beta": 0.5, "temperature": 2.0, "target": DKD_TARGET}),
    "taid": (KF.interpolated_kl, {"t": 0.4, "subtract_entropy": False}),
    "akl": (KF.adaptive_kl, {}),
}


def released_case():
    i = torch.arange(30, dtype=torch.float64).reshape(2, 3, 5)
    student = (2 * torch.sin(1.7 * i + 0.3)).float().requires_grad_()
    teacher = (3 * torch.cos(0.9 * i * i + 1.1 * i)).float()
    return student, teacher, torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("name", RELEASED)
def test_released_code_gives_the_same_value_and_gradient(name):
    student, teacher, mask = released_case()
    fn, options = RELEASED_CALLS[name]
    loss = KF.masked_mean(fn(student, teacher, **options), mask)
    loss.backward()
    expected, gradient = RELEASED[name]
    if name == "skew_fkl":  # the released value leaves out the teacher's entropy
        p = teacher.double().softmax(-1)[mask.bool()]
        expected += (p * p.log()).sum(-1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    torch.testing.assert_close(student.grad[1, 1], torch.tensor(gradient), rtol=2e-5, atol=5e-8)
    assert student.grad[mask == 0].abs().max() == 0


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "adaptive_kl"])
def test_first_and_second_derivatives_by_finite_differences(name):
    student, teacher, options = batch()
    own = {k: v[0, :2] if k == "target" else v for k, v in options[name].items()}

    def of_student(z):
        return DIVERGENCES[name](z, teacher[0, :2], temperature=1.3, **own)

    few_rows = student[0, :2].requires_grad_()
    assert torch.autograd.gradcheck(of_student, few_rows)
    # The second derivative of total variation is that of a fixed sign pattern, which the check's steps cross.
    assert name == "total_variation" or torch.autograd.gradgradcheck(of_student, few_rows)


def test_hessian_vector_product_by_finite_differences():
    student, teacher, options = batch()
    direction = torch.randn_like(student)

    def gradient(name, z, **kwargs):
        z = z.detach().requires_grad_()
        total = DIVERGENCES[name](z, teacher, **options[name]).sum()
        return z, torch.autograd.grad(total, z, **kwargs)[0]

    for name in ("total_variation", "js", "decoupled_kl"):
        z, first = gradient(name, student, create_graph=True)
        (product,) = torch.autograd.grad((first * direction).sum(), z)
        step = 1e-5
        plus, minus = (gradient(name, student + s * step * direction)[1] for s in (1, -1))
        torch.testing.assert_close(product, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-8)


def test_adaptive_weight_is_a_constant_of_the_gradient():
    student, teacher, _ = batch()
    student.requires_grad_()
    (got,) = torch.autograd.grad(KF.adaptive_kl(student, teacher).sum(), student)
    forward, reverse = KF.forward_kl(student, teacher), KF.reverse_kl(student, teacher)
    w = (KF.adaptive_kl(student, teacher) - reverse) / (forward - reverse)
    (expected,) = torch.autograd.grad((w.detach() * forward + (1 - w.detach()) * reverse).sum(), student)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_at_the_teacher_positive_elsewhere_and_ignores_shift_and_order(name):
    student, teacher, options = batch()
    fn, own = DIVERGENCES[name], options[name]
    at_teacher = teacher.clone().requires_grad_()
    zero = fn(at_teacher, teacher, **own)
    zero.sum().backward()
    torch.testing.assert_close(zero, torch.zeros(SHAPE).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(at_teacher.grad, torch.zeros_like(teacher), atol=1e-12, rtol=0)
    away = fn(student, teacher, **own)
    assert (away > 0).all()
    torch.testing.assert_close(fn(student + 5, teacher - 3, **own), away)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))
    moved = {"target": order.argsort()[own["target"]]} if "target" in own else own
    torch.testing.assert_close(fn(student[..., order], teacher[..., order], **moved), away)


def test_known_relations_between_divergences():
    student, teacher, _ = batch()
    near, limit = {"rtol": 1e-9, "atol": 1e-12}, {"rtol": 1e-4, "atol": 0}
    forward, reverse = KF.forward_kl(student, teacher), KF.reverse_kl(student, teacher)
    for fn in (KF.js, KF.total_variation, KF.jeffreys, KF.hellinger):
        torch.testing.assert_close(fn(student, teacher), fn(teacher, student), **near)
    assert (KF.total_variation(student, teacher) <= (forward / 2).sqrt()).all()
    assert (KF.js(student, teacher) <= math.log(2)).all()
    torch.testing.assert_close(KF.skew_forward_kl(student, teacher, alpha=0.0), forward, **near)
    torch.testing.assert_close(KF.skew_reverse_kl(student, teacher, alpha=0.0), reverse, **near)
    assert KF.skew_forward_kl(student, teacher, alpha=1.0).abs().max() == 0
    torch.testing.assert_close(KF.alpha_divergence(student, teacher, alpha=1 - 1e-6), forward, **limit)
    torch.testing.assert_close(KF.alpha_divergence(student, teacher, alpha=1e-6), reverse, **limit)
    torch.testing.assert_close(KF.generalized_js(student, teacher, beta=1e-6) / 1e-6, forward, **limit)


def test_decoupled_parts_sum_to_forward_kl():
    student, teacher, options = batch()
    target = options["decoupled_kl"]["target"]
    rest = 1 - teacher.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    tckd = KF.decoupled_kl(student, teacher, target=target, beta=0)
    nckd = KF.decoupled_kl(student, teacher, target=target, alpha=0, beta=1)
    torch.testing.assert_close(tckd + rest * nckd, KF.forward_kl(student, teacher), rtol=1e-9, atol=1e-12)


def test_taid_interpolates_logits_and_holds_the_target_fixed():
    # The TAID card's two cases [computed]: J, KL and the gradient of the first entry.
    cases = [(0.0, 2.0, 0.5, 0.6931, 0.1109, -0.2311), (1.0, -2.0, 0.25, 0.7511, 0.0657, 0.1689)]
    for student, teacher, t, j, kl_value, slope in cases:
        z, zt = (torch.tensor([x, 0.0], dtype=torch.float64) for x in (student, teacher))
        loss = KF.interpolated_kl(z.requires_grad_(), zt, t=t, subtract_entropy=False)
        loss.backward()
        assert loss.item() == pytest.approx(j, abs=6e-5)
        assert KF.interpolated_kl(z, zt, t=t).item() == pytest.approx(kl_value, abs=6e-5)
        assert z.grad.tolist() == pytest.approx([slope, -slope], abs=6e-5)


def test_taid_ends_and_rows():
    student, teacher, _ = batch()
    student.requires_grad_()
    (still,) = torch.autograd.grad(KF.interpolated_kl(student, teacher, t=0.0).sum(), student)
    assert still.abs().max() < 1e-15
    per_row = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    got, forward = (
        fn(student, teacher, temperature=2.0, **own)
        for fn, own in ((KF.interpolated_kl, {"t": per_row}), (KF.forward_kl, {}))
    )
    torch.testing.assert_close(got[per_row == 1], forward[per_row == 1])
    assert got[0, 0].abs() < 1e-12
