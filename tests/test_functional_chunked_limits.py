"""What `chunked` promises beyond its numbers: memory, precision, vocabularies, compile, refusals."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kdcore.functional as KF
from kdcore.functional import Unembed, chunked

N, V = 24, 40
# dynamo looks at .grad of non-leaf tensors and means to hide the warning, which "error" makes an exception
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def sides(v=V, v_teacher=V, dtype=torch.float32, h=6):
    g = torch.Generator().manual_seed(v)

    def side(size):
        hidden, weight = (torch.randn(s, h, generator=g, dtype=torch.float64) for s in (N, size))
        return Unembed(*(x.to(dtype).requires_grad_() for x in (hidden, weight / 2)))

    return side(v), side(v_teacher)


def dense(fn, student, teacher, **options):
    return fn(student.logits(), teacher.logits().detach(), **options)


def gradients(values, student):
    return torch.autograd.grad(values.sum(), student[:2])


class LargestTensor(TorchDispatchMode):
    """The element count of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("fn", [KF.js, KF.adaptive_kl, lambda s, t: KF.js(s, t)])
def test_all_logits_never_exist(fn):
    student, teacher = sides(v=400, v_teacher=400)
    with LargestTensor() as seen:
        chunked(fn, student, teacher, chunk_size=4).mean().backward()
    assert 4 * 400 <= seen.numel < N * 400
    assert seen.numel == student.weight.numel()  # the weight's gradient, and nothing larger


def test_the_default_chunk_bounds_the_logits_held():
    student, teacher = (side._replace(hidden=side.hidden.repeat(1000, 1)) for side in sides(2000, 2000))
    with LargestTensor() as seen, torch.no_grad():
        chunked(KF.js, student, teacher)
    assert 2**23 < seen.numel <= 2**24 < N * 1000 * 2000


@pytest.mark.parametrize("fn", [KF.js, lambda s, t: KF.js(s, t)], ids=["kernel", "autograd"])
def test_autocast(fn):
    student, teacher = sides(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = chunked(fn, student, teacher, chunk_size=7), dense(fn, student, teacher)
    exact = gradients(dense(fn, student, teacher), student)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # the same bf16 logits
    for mine, theirs, true in zip(gradients(got, student), gradients(expected, student), exact, strict=True):
        assert mine.dtype == torch.float32
        error, their_error = ((x - true).norm() / true.norm() for x in (mine, theirs))
        assert error < 1.2 * their_error < 0.02  # bf16's own error, within 20 % of dense autocast


def test_bfloat16_weights():
    student, teacher = sides(dtype=torch.bfloat16)
    got, expected = (
        chunked(KF.reverse_kl, student, teacher, chunk_size=5),
        dense(KF.reverse_kl, student, teacher),
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(got, student), gradients(expected, student), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


def test_backward_outside_autocast_recomputes_in_its_precision():
    student, teacher = sides()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chunked(KF.js, student, teacher)
    first, again = (torch.autograd.grad(got.sum(), student[:2], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@dynamo
def test_inside_a_compiled_function():
    student, teacher = sides()

    def loss(student):
        doubled = student._replace(hidden=student.hidden * 2)
        return chunked(KF.skew_reverse_kl, doubled, teacher, chunk_size=9).mean() * 3

    eager, compiled = loss(student), torch.compile(loss, backend="aot_eager")(student)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, student), gradients(eager, student))


@dynamo
def test_a_compiled_function_in_chunks():
    student, teacher = sides(dtype=torch.float64)
    fn = torch.compile(lambda s, t: (s.softmax(-1) - t.softmax(-1)).square().sum(-1), backend="aot_eager")
    got, expected = chunked(fn, student, teacher, chunk_size=8), dense(fn, student, teacher)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, student), gradients(expected, student))


@pytest.mark.parametrize("v, v_teacher", [(40, 44), (44, 40)])
def test_vocabularies_of_different_size(v, v_teacher):
    student, teacher = sides(v, v_teacher, torch.float64)
    with pytest.raises(ValueError, match=rf"{v} entries \(student\), {v_teacher} \(teacher\); declare"):
        chunked(KF.js, student, teacher)
    z, zt = student.logits(), teacher.logits().detach()
    q, p = (F.pad(x.softmax(-1).sort(-1, descending=True).values, (0, 44 - x.shape[1])) for x in (z, zt))
    cut, ranked = KF.js(z[:, :40], zt[:, :40]), (p - q).abs().sum(-1) / 2
    for fn, how, expected in ((KF.js, "cut", cut), (KF.total_variation, "sort", ranked)):
        wanted = torch.autograd.grad(expected.sum(), student[:2], retain_graph=True)
        for wrapped in (fn, lambda s, t, fn=fn: fn(s, t)):
            got = chunked(wrapped, student, teacher, vocabulary=how, chunk_size=7)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(gradients(got, student), wanted)


def test_several_teachers_and_none():
    student, teacher = sides(dtype=torch.float64)
    other, _ = sides(v_teacher=V, dtype=torch.float64, h=3)

    def advantage(z, z_dpo, z_ref):
        return -(z.softmax(-1) * (z_dpo.log_softmax(-1) - z_ref.log_softmax(-1))).sum(-1)

    got = chunked(advantage, student, [teacher, other], chunk_size=5)
    expected = advantage(student.logits(), teacher.logits().detach(), other.logits().detach())
    torch.testing.assert_close(gradients(got, student), gradients(expected, student))
    target = torch.arange(N) % V
    hard = functools.partial(F.cross_entropy, reduction="none")
    got = chunked(lambda z, target: hard(z, target), student, (), per_token={"target": target})
    torch.testing.assert_close(got, hard(student.logits(), target))


def test_gradient_only_where_asked():
    student, teacher = sides()
    frozen = student._replace(weight=student.weight.detach())
    (of_hidden,) = torch.autograd.grad(chunked(KF.js, frozen, teacher).sum(), student.hidden)
    torch.testing.assert_close(of_hidden, gradients(chunked(KF.js, student, teacher), student)[0])
    chunked(KF.js, student, teacher).sum().backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
    for fn in (KF.js, lambda s, t: KF.js(s, t)):
        with torch.no_grad():
            silent = chunked(fn, student, teacher)
        assert not silent.requires_grad
        torch.testing.assert_close(silent, dense(KF.js, student, teacher).detach())


def test_plain_tuples_and_partial_functions():
    student, teacher = sides()
    fn = functools.partial(KF.generalized_js, beta=0.2, temperature=3.0)
    got = chunked(fn, (*student[:2], None), (teacher.hidden, teacher.weight), temperature=2.0)
    expected = dense(KF.generalized_js, student, teacher, beta=0.2, temperature=2.0)
    torch.testing.assert_close(got, expected)


def test_a_changed_weight_is_noticed_before_backward():
    student, teacher = sides()
    loss = chunked(KF.js, student, teacher).sum()
    with torch.no_grad():
        student.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"mask": torch.ones(3)}, ValueError, r"one mask and weight per token, \(24,\), given \(3,\)"),
        ({"weights": torch.ones(24, 1)}, ValueError, "one mask and weight per token"),
        ({"per_token": {"temperature": torch.ones(3)}}, ValueError, "one row per token"),
        ({"vocabulary": "pad"}, ValueError, "'same', 'cut' or 'sort', given 'pad'"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0"),
        ({"beta": 1.0}, ValueError, "beta must be inside"),
        ({"bta": 0.5}, TypeError, "unexpected keyword argument 'bta'"),
        ({"fn": lambda s, t: (s - t).abs()}, ValueError, r"fn must return \[R\], .* given \(24, 40\)"),
    ],
)
def test_wrong_input_is_refused(change, error, message):
    student, teacher = sides()
    with pytest.raises(error, match=message):
        chunked(**{"fn": KF.generalized_js, "student": student, "teacher": teacher} | change)


def test_hidden_states_must_be_aligned():
    student, teacher = sides()
    with pytest.raises(ValueError, match="one row per token"):
        chunked(KF.js, student, teacher._replace(hidden=teacher.hidden[1:]))
    with pytest.raises(TypeError, match="target"):
        chunked(KF.decoupled_kl, student, teacher)


class Products(TorchDispatchMode):
    """How many matrix products ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fn", [KF.js, lambda s, t: KF.js(s, t)], ids=["kernel", "autograd"])
def test_backward_repeats_no_product_for_a_common_factor(fn):
    student, teacher = sides()
    weights = torch.linspace(0.1, 0.7, N)
    for upstream, products in ((torch.ones(()), 0), (torch.tensor(3e4 / 7), 0), (torch.linspace(1, 2, N), 4)):
        values = chunked(fn, student, teacher, weights=weights, chunk_size=N)
        with Products() as seen:
            values.backward(upstream.expand(N))
        assert seen.count == products


def test_half_precision_gradients_are_summed_in_float32():
    student, teacher = sides(dtype=torch.bfloat16)
    student = student._replace(hidden=student.hidden.detach().repeat(64, 1))
    teacher = teacher._replace(hidden=teacher.hidden.repeat(64, 1))
    (many,) = torch.autograd.grad(chunked(KF.js, student, teacher, chunk_size=8).sum(), student.weight)
    (one,) = torch.autograd.grad(chunked(KF.js, student, teacher).sum(), student.weight)
    assert (many.float() - one.float()).norm() < 0.003 * one.float().norm()  # 0.02 when summed in bfloat16


def test_a_shift_of_all_logits_costs_no_accuracy():
    # Small dyadic numbers, so that the logits are exact in float32 and only the normalisers are large.
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-4, 5, (n, 4), generator=g) for n in (N, V))
    student = Unembed(hidden.float(), weight.float() / 16)
    teacher = Unembed(hidden.flip(0).float(), weight.flip(1).float() / 16, torch.full((V,), 4096.0))
    z, zt = (side.hidden.double() @ side.weight.double().T for side in (student, teacher))
    for fn in (
        KF.forward_kl,
        KF.reverse_kl,
        KF.js,
        KF.skew_forward_kl,
        KF.skew_reverse_kl,
        KF.alpha_divergence,
    ):
        for sides_ in ((student, teacher, z, zt), (teacher, student, zt, z)):
            torch.testing.assert_close(chunked(fn, *sides_[:2]).double(), fn(*sides_[2:]), rtol=3e-6, atol=0)


def test_entries_that_underflow_on_both_sides():
    student, teacher = sides()
    bias = torch.where(torch.arange(V) < 3, -500.0, 0.0)
    student, teacher = student._replace(bias=bias), teacher._replace(bias=bias)
    for fn in (KF.js, KF.skew_forward_kl, KF.skew_reverse_kl, KF.alpha_divergence, KF.jeffreys):
        got, expected = chunked(fn, student, teacher), dense(fn, student, teacher)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradients(got, student), gradients(expected, student), rtol=1e-4, atol=1e-5
        )


def test_an_ignored_target_gives_no_gradient():
    student, teacher = sides()
    target = torch.arange(N).where(torch.arange(N) % 2 > 0, -100)
    got = chunked(KF.decoupled_kl, student, teacher, per_token={"target": target})
    assert (got[::2] == 0).all()
    of_hidden = gradients(got, student)[0]
    assert of_hidden[::2].abs().max() == 0
    assert (of_hidden[1::2].abs().amax(-1) > 0).all()


def test_float64_stays_under_autocast():
    student, teacher = sides(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = chunked(KF.js, student, teacher), dense(KF.js, student, teacher)
    torch.testing.assert_close(got, expected)


def test_second_derivatives_do_not_reach_the_teacher():
    student, teacher = sides(dtype=torch.float64)
    values = chunked(lambda s, t: (s - t).square().mean(-1), student, teacher)
    (first,) = torch.autograd.grad(values.sum(), student.hidden, create_graph=True)
    assert torch.autograd.grad(first.sum(), teacher[:2], allow_unused=True) == (None, None)
