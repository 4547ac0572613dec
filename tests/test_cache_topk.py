"""The codec of a top k, and divergences from it, against brute force in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore import Outputs, TopK, Unembed, functional
from kdcore.caching import TopKCodec, log_error
from kdcore.caching.layout import Layout
from kdcore.caching.shards import Columns
from kdcore.errors import InputError, RunError
from kdcore.functional import from_topk, topk_rows
from kdcore.losses import kd_loss


def top_of(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    logp = (logits / temperature).log_softmax(-1)
    top = logp.topk(k, -1)
    rest = logp.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    return TopK(top.indices, top.values, rest)


def nearest_tail(q: np.ndarray, ids: list[int], logp: np.ndarray, rest: float) -> np.ndarray:
    """p of all classes: min(c q, cap) outside the top k, with c by bisection."""
    p = np.zeros(len(q))
    p[ids] = np.exp(logp)
    others = [i for i in range(len(q)) if i not in ids]
    low, high = 0.0, 1e12
    for _ in range(400):
        c = (low + high) / 2
        low, high = (low, c) if np.minimum(c * q[others], p[ids].min()).sum() > math.exp(rest) else (c, high)
    p[others] = np.minimum(c * q[others], p[ids].min())
    return p


def joined(rows: Columns) -> dict[str, Tensor]:
    """Columns as a cache gives them back."""
    return {name: torch.cat([*pieces]) for name, pieces in rows.items()}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple(2 * torch.randn(2, 8, 40, dtype=torch.float64, generator=draw))  # type: ignore[return-value]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("singled_out", [32, 6])
def test_forward_kl_of_a_top_k_and_its_gradient(
    logits: tuple[Tensor, Tensor], temperature: float, singled_out: int
) -> None:
    student, teacher = logits
    student.requires_grad_()
    top = top_of(teacher, 5, temperature)
    rows = topk_rows(student, top, temperature=temperature, singled_out=singled_out)
    value = functional.forward_kl(*rows)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    q = (student.detach() / temperature).softmax(-1).numpy()
    for row in range(len(q)):
        p = nearest_tail(q[row], top.ids[row].tolist(), top.logp[row].numpy(), top.rest[row].item())
        assert value[row].item() == pytest.approx((p * np.log(p / q[row])).sum(), rel=1e-9)
        assert np.abs(gradient[row].numpy() - (q[row] - p) / temperature).max() < 1e-9


def test_the_tail_is_the_nearest_to_the_student_that_the_top_k_allows(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    whole = functional.forward_kl(student, teacher)
    values = [functional.forward_kl(*topk_rows(student, top_of(teacher, k))) for k in (2, 5, 20, 39)]
    for fewer, more in zip(values, [*values[1:], whole], strict=True):
        assert bool((fewer <= more + 1e-12).all())
    assert torch.allclose(values[-1], whole, rtol=1e-12)  # a rest of one class leaves nothing open


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(logits: tuple[Tensor, Tensor]) -> None:
    same = logits[0].requires_grad_()
    value = functional.forward_kl(*topk_rows(same, top_of(same.detach(), 6)))
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_absent_entries_join_the_rest(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    few = top_of(teacher, 3)
    padded = TopK(
        torch.cat([few.ids, few.ids[:, :1].expand(-1, 4)], -1),
        torch.cat([few.logp, torch.full((8, 4), -math.inf)], -1),
        few.rest,
    )
    for fn in (functional.forward_kl, functional.reverse_kl, functional.js, kd_loss):
        assert torch.allclose(fn(*topk_rows(student, padded)), fn(*topk_rows(student, few)), rtol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "total_variation", "hellinger"])
def test_hidden_states_give_what_logits_give(name: str, logits: tuple[Tensor, Tensor]) -> None:
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    top = TopK(*(part.unflatten(0, (2, 4)) for part in top_of(logits[1], 5, 2.0)))
    options = {"temperature": 2.0}
    fn = getattr(functional, name)

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return fn(student, teacher, **options)  # type: ignore[no-any-return]

    found = []
    for student in (Outputs(unembed=Unembed(hidden, weight)), Outputs(logits=hidden @ weight.T)):
        value = from_topk(divergence, student, top, **options)
        found.append((value, *torch.autograd.grad(value.sum(), hidden)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-7)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "total_variation", "jeffreys"])
def test_the_rest_of_both_tails_counts_as_one_class(name: str, logits: tuple[Tensor, Tensor]) -> None:
    """Brute force: the divergence over all classes with the tail that ``nearest_tail`` gives."""
    student, teacher = logits
    top = top_of(teacher, 5)
    q = student.softmax(-1).numpy()
    p = [
        nearest_tail(q[r], top.ids[r].tolist(), top.logp[r].numpy(), float(top.rest[r]))
        for r in range(len(q))
    ]
    fn = getattr(functional, name)
    assert torch.allclose(
        fn(*topk_rows(student, top, singled_out=8)), fn(student, torch.tensor(np.array(p)).log())
    )


def test_derivatives_of_derivatives(logits: tuple[Tensor, Tensor]) -> None:
    """The gradient is differentiable, also where entries are absent: against finite differences."""
    few = top_of(logits[1][:2], 3)
    ids, absent = torch.cat([few.ids, few.ids[:, :2]], -1), torch.full((2, 2), -math.inf, dtype=torch.float64)
    top = TopK(ids, torch.cat([few.logp, absent], -1), few.rest)
    _, log_p = topk_rows(logits[0][:2], top, singled_out=4)

    def value(student: Tensor) -> Tensor:  # the teacher's part is constant in the first derivative
        log_q, _ = topk_rows(student, top, singled_out=4)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    student = logits[0][:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (student,), atol=1e-6)
    assert torch.autograd.gradgradcheck(value, (student,), atol=1e-6)


def test_a_student_far_from_the_teacher_is_pulled_as_by_all_logits() -> None:
    """Forward KL's gradient is q - p at any distance; the loss of a token 200 nats away is not cut off."""
    student = torch.zeros(1, 30)
    student[0, 3], student[0, 7] = 100.0, -100.0
    student.requires_grad_()
    teacher = torch.zeros(1, 30)
    teacher[0, 7] = 12.0
    value = functional.forward_kl(*topk_rows(student, top_of(teacher, 4)))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.item() == pytest.approx(200.0, rel=1e-2)
    assert gradient[0, 7].item() == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize("below", [60.0, 120.0, 500.0])
@pytest.mark.parametrize("singled_out", [32, 4])
def test_a_student_whose_tail_underflows(below: float, singled_out: int) -> None:
    """Ten classes far below the student's head, and half of the teacher's probability on them; in closed form.

    exp(-104) is 0 in float32. Equal classes share the tail equally: p_j = 1/20, and q_j = exp(-below) / 2.
    """
    student = torch.cat([torch.zeros(2), torch.full((10,), -below)]).unsqueeze(0).requires_grad_()
    half = math.log(0.25)
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[half, half]]), torch.tensor([math.log(0.5)]))
    value = functional.forward_kl(*topk_rows(student, top, singled_out=singled_out))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    expected = 0.5 * math.log(0.25 / 0.5) + 0.5 * (math.log(0.05) + math.log(2) + below)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0.25] * 2 + [-0.05] * 10, abs=1e-6)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0, 5.0, -math.inf, 1.0]] * 2, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4, 0.0, 0.0]])
    for fn in (functional.forward_kl, functional.reverse_kl, functional.js):
        value = fn(*topk_rows(student, top_of(teacher, 2)))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    "classes, k, mass",
    [
        (128_256, 56, None),
        (512, 32, None),
        (65, 16, None),
        (12, 11, None),
        (1000, 32, 0.9),
        (300, 7, 0.5),
        (9, 1, 0.9),
    ],
)
def test_the_codec_keeps_ids_and_log_probabilities(classes: int, k: int, mass: float | None) -> None:
    codec, draw = TopKCodec(classes, k, mass, temperature=2.0), torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(40, classes, generator=draw)
    data, sizes = codec.encode(logits)
    found, logp = codec.decode(data, sizes), (logits.double() / 2.0).log_softmax(-1)
    assert len(data) == sum(codec.width(codec.counts[size]) for size in sizes.tolist())
    for row in range(len(logits)):
        count = codec.counts[int(sizes[row])]
        true, ids = logp[row].topk(count)
        assert set(found.ids[row].tolist()) == set(ids.tolist())
        kept = dict(zip(found.ids[row, :count].tolist(), found.logp[row, :count].tolist(), strict=True))
        least = max(true[-1].item(), -16.0)
        for rank, (value, index) in enumerate(zip(true.tolist(), ids.tolist(), strict=True)):
            if value > -16:
                assert abs(kept[index] - value) <= log_error(least, head=rank == 0) + 1e-5
        rest = math.log(max(-math.expm1(true.logsumexp(-1).item()), 1e-9))
        assert found.rest[row].item() == pytest.approx(max(rest, -16), abs=0.02)
        assert bool(found.logp[row, count:].isneginf().all())
        if mass is not None and count < k:
            assert true.exp().sum() >= mass
            assert count == 1 or true[: -(-count // 2) - 1].exp().sum() < mass


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_not_coded(wrong: float) -> None:
    """The codes of NaN would be read as probabilities, and no guard of the run would see it."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = wrong
    with pytest.raises(RunError, match="no distribution"):
        TopKCodec(40, 8).encode(logits)


def test_hidden_states_that_were_rounded_meet_an_output_layer_that_was_not() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=draw), torch.randn(20, 4, generator=draw)
    layout = Layout.of(Outputs(unembed=Unembed(hidden, weight)), ["logits"], None, "bfloat16")
    ids = torch.arange(3)
    rows = layout.columns(ids, ids, Outputs(unembed=Unembed(hidden, weight)))
    found = layout.outputs(joined(rows), 3, Unembed(hidden[:0], weight))
    assert torch.equal(found["unembed"].logits(), hidden.bfloat16().float() @ weight.T)


def test_logits_and_the_output_layer_are_both_kept() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(20, 4)
    outputs = Outputs(logits=torch.randn(3, 20), unembed=Unembed(hidden, weight))
    layout, ids = Layout.of(outputs, ["logits", "unembed"], None, None), torch.arange(3)
    found = layout.outputs(joined(layout.columns(ids, ids, outputs)), 3, Unembed(hidden[:0], weight))
    assert found.unembed is not None
    assert torch.equal(found.unembed.hidden, hidden)
    assert torch.equal(found["logits"], outputs["logits"])


def test_a_tapped_module_may_be_called_as_an_output_is() -> None:
    hidden, weight, tapped = torch.randn(3, 4), torch.randn(20, 4), torch.randn(3, 2)
    outputs = Outputs(unembed=Unembed(hidden, weight), tensors={"hidden": tapped, "id": tapped + 1})
    layout, ids = Layout.of(outputs, ["logits", "hidden", "id"], None, None), torch.arange(3)
    found = layout.outputs(joined(layout.columns(ids, ids, outputs)), 3, Unembed(hidden[:0], weight))
    assert torch.equal(found["hidden"], tapped)
    assert torch.equal(found["id"], tapped + 1)
    assert found.unembed is not None
    assert torch.equal(found.unembed.hidden, hidden)


def test_a_token_of_128256_classes_takes_149_bytes() -> None:
    """Elias-Fano: 56 x 11 low bits, 56 + 62 in unary; 56 x 6 + 12 x 8 bits of values; 8 of the least, 16 of the rest."""
    bits = 56 * 11 + 56 + (128_255 >> 11) + 56 * 6 + 12 * 8 + 8 + 16
    assert TopKCodec(128_256, 56).width(56) == -(-bits // 8) == 149
    assert TopKCodec(128_256, 32).width(32) <= 100


@pytest.mark.parametrize("perplexity, most", [(2, 0.005), (10, 0.02)])
def test_the_gradient_error_at_149_bytes(perplexity: int, most: float) -> None:
    """Zipf logits at V = 128,256, the student a noisy teacher: relative L2 of the gradient, the median token."""
    classes, draw = 128_256, torch.Generator().manual_seed(0)
    exponent = {2: 2.97, 10: 1.72}[perplexity]
    base = -exponent * torch.arange(1, classes + 1).log()
    assert (base.log_softmax(0).exp() * -base.log_softmax(0)).sum().exp().item() == pytest.approx(
        perplexity, rel=0.02
    )
    teacher = torch.stack([base[torch.randperm(classes, generator=draw)] for _ in range(12)])
    student = (teacher + torch.randn(teacher.shape, generator=draw)).requires_grad_()
    codec = TopKCodec(classes, 56)
    value = functional.forward_kl(*topk_rows(student, codec.decode(*codec.encode(teacher))))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    exact = student.detach().softmax(-1) - teacher.softmax(-1)
    assert ((gradient - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < most


@pytest.mark.parametrize("k", [0, 10, 11])
def test_a_top_k_must_leave_a_rest(k: int) -> None:
    with pytest.raises(InputError, match="does not leave a rest"):
        TopKCodec(10, k)
