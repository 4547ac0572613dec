"""Divergences at the edges: excluded entries, extreme logits, masks, vocabularies, refused input."""

import inspect
import math

import numpy as np
import pytest
import torch

import kdcore.functional as KF
from kdcore.functional import DIVERGENCES

NINF = float("-inf")
SHAPE, CLASSES = (2, 3), 9


def logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, *SHAPE, CLASSES, generator=g, dtype=torch.float64)
    options = {name: {} for name in DIVERGENCES}
    options["decoupled_kl"] = {"target": torch.randint(0, CLASSES, SHAPE, generator=g)}
    return student.to(dtype), teacher.to(dtype), options


def test_the_teacher_gets_no_gradient():
    student, teacher, options = batch()
    for name, fn in {**DIVERGENCES, "interpolated_kl": KF.interpolated_kl}.items():
        z, frozen = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        own = {"t": 0.5} if name == "interpolated_kl" else options[name]
        fn(z, frozen, **own).sum().backward()
        assert frozen.grad is None
        assert z.grad.abs().max() > 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entries_excluded_on_both_sides_are_a_smaller_vocabulary(name):
    student, teacher, options = batch()
    own = {key: target.clamp_max(CLASSES - 2) for key, target in options[name].items()}
    small = DIVERGENCES[name](student[..., :-1], teacher[..., :-1], **own)
    student[..., -1] = teacher[..., -1] = NINF
    student.requires_grad_()
    excluded = DIVERGENCES[name](student, teacher, **own)
    torch.testing.assert_close(excluded, small)
    excluded.sum().backward()
    assert student.grad.isfinite().all()
    assert (student.grad[..., -1] == 0).all()


def test_an_entry_excluded_by_one_side_takes_its_limit_or_is_left_out():
    full, half = logits(0.5, 0.25, 0.25), logits(0.5, 0.5, 0.0)
    ln2 = math.log(2)
    assert KF.forward_kl(full, half).item() == pytest.approx(0.5 * ln2)  # 0 log 0 = 0
    assert KF.forward_kl(half, full).item() == pytest.approx(0.25 * -ln2)  # 0.25 log(0.25 / 0) left out
    assert KF.reverse_kl(half, full).item() == pytest.approx(0.5 * ln2)
    assert KF.total_variation(half, full).item() == pytest.approx(0.25)
    m = (0.5, 0.375, 0.125)
    expected = 0.25 * math.log(0.25 / m[1]) + 0.25 * math.log(0.25 / m[2]) + 0.5 * math.log(0.5 / m[1])
    for pair in ((half, full), (full, half)):
        assert KF.js(*pair).item() == pytest.approx(expected / 2)
        z = pair[0].clone().requires_grad_()
        sum(fn(z, pair[1]) for fn in (KF.js, KF.forward_kl, KF.reverse_kl, KF.hellinger)).backward()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_and_half_precision(name):
    _, _, options = batch()
    i = torch.arange(math.prod(SHAPE) * CLASSES).reshape(*SHAPE, CLASSES)
    student, teacher = ((1e4 * torch.sin(c * i + 1)).bfloat16().requires_grad_() for c in (1.3, 2.1))
    got = DIVERGENCES[name](student, teacher, **options[name])
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    got.sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad.dtype == torch.bfloat16


def test_temperature_per_row():
    student, teacher, options = batch()
    tau = torch.linspace(0.5, 4, 6, dtype=torch.float64).reshape(SHAPE)
    for name, fn in DIVERGENCES.items():
        got = fn(student, teacher, temperature=tau, **options[name])
        for i in np.ndindex(*SHAPE):
            own = {k: v[i] if isinstance(v, torch.Tensor) else v for k, v in options[name].items()}
            alone = fn(student[i], teacher[i], temperature=tau[i].item(), **own)
            assert got[i].item() == pytest.approx(alone.item())


def test_an_ignored_target_gives_zero_and_no_gradient():
    student, teacher, _ = batch()
    student.requires_grad_()
    got = KF.decoupled_kl(student, teacher, target=torch.tensor([[-100, 1, 2], [3, 4, -100]]))
    got.sum().backward()
    assert got[0, 0] == got[1, 2] == 0
    assert student.grad[0, 0].abs().max() == 0
    assert (got[0, 1:] > 0).all()


@pytest.mark.parametrize(
    "fn, options, message",
    [
        (KF.forward_kl, {"temperature": 0.0}, "temperature must be > 0"),
        (KF.generalized_js, {"beta": 1.0}, "beta must be inside"),
        (KF.skew_forward_kl, {"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        (KF.skew_reverse_kl, {"alpha": -0.1}, r"alpha must be in \[0, 1\]"),
        (KF.alpha_divergence, {"alpha": 1}, "alpha must not be 0 or 1"),
        (KF.adaptive_kl, {"mu": 2}, r"mu must be in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(fn, options, message):
    with pytest.raises(ValueError, match=message):
        fn(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_shapes_and_names_are_checked():
    with pytest.raises(ValueError, match=r"3 entries \(student\), 4 \(teacher\); declare vocab"):
        KF.js(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape"):
        KF.js(torch.zeros(2, 1, 3), torch.zeros(1, 5, 3))
    with pytest.raises(TypeError, match="temprature"):
        KF.js(torch.zeros(2, 3), torch.zeros(2, 3), temprature=2.0)
    assert list(inspect.signature(KF.skew_reverse_kl).parameters) == [
        "student_logits", "teacher_logits", "temperature", "t_squared", "alpha",
    ]  # fmt: skip
    assert KF.kl_divergence is DIVERGENCES["forward_kl"]
    assert KF.skew_reverse_kl.__name__ == "skew_reverse_kl"
    assert "DistiLLM" in KF.skew_reverse_kl.__doc__


def test_compiled_and_autocast_give_the_same():
    student, teacher, options = batch(torch.float32)

    def all_of_them(z):
        return torch.stack([fn(z, teacher, temperature=2.0, **options[n]) for n, fn in DIVERGENCES.items()])

    compiled = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)
    results = []
    for fn, precise in ((all_of_them, True), (compiled, True), (all_of_them, False)):
        z = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            values = fn(z)
        values.sum().backward()
        results.append((values.detach(), z.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_masked_mean():
    values = torch.tensor([[1.0, float("nan")], [5.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 0]])
    mean = KF.masked_mean(values, mask)
    mean.backward()
    assert mean.item() == 3
    assert values.grad.tolist() == [[0.5, 0], [0.5, 0]]
    assert KF.masked_mean(values, mask, count=8).item() == 0.75
    assert KF.masked_mean(values, mask.bool(), count=torch.tensor(4)).item() == 1.5
    nothing = KF.masked_mean(values, torch.zeros(2, 2))
    nothing.backward()
    assert nothing.item() == 0


def test_align_vocabularies():
    short, long = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 5.0, 4.0]])
    cut = KF.align_vocabularies(short, long, how="cut")
    assert [x.tolist() for x in cut] == [[[1, 3]], [[2, 5]]]
    ranked = KF.align_vocabularies(short, long, how="sort")
    assert [x.tolist() for x in ranked] == [[[3, 1, NINF]], [[5, 4, 2]]]
    p, q = np.exp([5, 4, 2]) / np.exp([5, 4, 2]).sum(), np.append(np.exp([3, 1]) / np.exp([3, 1]).sum(), 0)
    assert KF.total_variation(*ranked).item() == pytest.approx(np.abs(p - q).sum() / 2)
    with pytest.raises(ValueError, match="declare vocabulary="):
        KF.align_vocabularies(short, long, how="same")
    with pytest.raises(ValueError, match="'same', 'cut' or 'sort', given 'pad'"):
        KF.align_vocabularies(short, long, how="pad")
