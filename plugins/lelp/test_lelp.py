"""LELP's mathematics against closed forms, brute force, numpy and scikit-learn; and the card's properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_plugin_lelp.loss import lelp_loss, lelp_targets
from kd_plugin_lelp.oracle import ORACLES
from kd_plugin_lelp.subspaces import (
    fit_subspaces,
    moments,
    null_space,
    random_subspaces,
    rotation,
    split_within,
)
from torch import Tensor

from kdcore import InputError
from kdcore.testing import check_oracle

B, C, S, D = 300, 3, 4, 9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """[B,D] float32 with another covariance for each class, and classes [B]."""
    g = generator(1)
    label = torch.arange(B) % C
    mixing = torch.randn(C, D, D, generator=g) * torch.linspace(2, 0.2, D)
    h = torch.einsum("bd,bde->be", torch.randn(B, D, generator=g), mixing[label].transpose(1, 2))
    return h + torch.randn(C, D, generator=g)[label] + offset, label


def weight() -> Tensor:
    return torch.randn(C, D, generator=generator(2))


def fitted(h: Tensor, label: Tensor, W: Tensor | None = None, turned: bool = True) -> Any:
    return fit_subspaces(moments([(h, label)], C), W, S, generator(3) if turned else None)


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Any) -> None:
    check_oracle(oracle)


# ---- the loss ---------------------------------------------------------------------------------------


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    u, z = (2 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((5, C, S), (5, C)))
    return u, z, torch.randn(5, C, S, generator=g, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_value_and_gradient_by_brute_force(tau: float) -> None:
    u, z, q = case()
    expected, slope = np.zeros(5), np.zeros((5, C, S))
    for b in range(5):
        top = [math.exp(float(x) / tau) for x in z[b]]
        bottom = sum(math.exp(float(x) / tau) for x in u[b].flatten())
        for c in range(C):
            for s in range(S):
                p = top[c] / sum(top) * float(q[b, c, s])
                own = math.exp(float(u[b, c, s]) / tau) / bottom
                expected[b] -= tau**2 * p * math.log(own)
                slope[b, c, s] = tau * (own - p)
    u.requires_grad_()
    loss = lelp_loss(u, z, q, temperature=tau)
    loss.sum().backward()
    assert loss.detach().numpy() == pytest.approx(expected, rel=1e-10)
    assert u.grad is not None
    assert u.grad.numpy() == pytest.approx(slope, abs=1e-10)


def test_one_subclass_is_plain_distillation() -> None:
    """torch's own cross-entropy with the teacher's probabilities as labels."""
    u, z, _ = case()
    loss = lelp_loss(u[:, :, :1], z, torch.ones(5, C, 1))
    assert torch.allclose(loss, F.cross_entropy(u[:, :, 0], z.softmax(1), reduction="none"))


def test_the_loss_splits_by_the_chain_rule() -> None:
    u, z, q = case()
    p, P = z.softmax(1), u.logsumexp(2).log_softmax(1)
    within = -(q * u.log_softmax(2)).sum(2)
    assert torch.allclose(lelp_loss(u, z, q), -(p * P).sum(1) + (p * within).sum(1), rtol=1e-10)


def test_the_smallest_value_is_the_entropy_of_the_targets() -> None:
    """The card's example: 0.50040 + 0.8 ln 2 + 0.2 * 0.32508 = 1.11994, where the student equals the targets."""
    z, q = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
    p = lelp_targets(z, q)
    assert lelp_loss(p.log(), z, q).item() == pytest.approx(1.11994, abs=1e-5)
    assert p.sum(2).flatten().tolist() == pytest.approx([0.8, 0.2])


def test_targets_sum_to_the_teacher_at_any_temperature() -> None:
    _, z, q = case()
    for tau in (1.0, 3.0):
        assert torch.allclose(lelp_targets(z, q, temperature=tau).sum(2), (z / tau).softmax(1))


def test_temperature_scales_as_declared() -> None:
    """u, z and tau multiplied by k multiply the loss by k squared: what `t_squared` means."""
    u, z, q = case()
    small, large = (lelp_loss(k * u, k * z, q, temperature=k) for k in (1.0, 3.0))
    assert torch.allclose(large, 9 * small)


def test_no_gradient_reaches_the_teacher_or_the_split() -> None:
    u, z, q = (x.requires_grad_() for x in case())
    lelp_loss(u, z, q).sum().backward()
    assert u.grad is not None
    assert z.grad is None
    assert q.grad is None


# ---- the subspaces ----------------------------------------------------------------------------------


def test_moments_in_pieces_are_numpys() -> None:
    """A mean a thousand times the spread would ruin sums about 0 in float32."""
    h, label = embeddings(offset=1000.0)
    found = moments([(h[i : i + 7], label[i : i + 7]) for i in range(0, B, 7)], C)
    for c in range(C):
        mine = h[label == c].double().numpy()
        assert found.size[c] == len(mine)
        assert found.mean[c].numpy() == pytest.approx(mine.mean(0), rel=1e-10)
        assert found.covariance[c].numpy() == pytest.approx(np.cov(mine.T, bias=True), rel=1e-6, abs=1e-8)


def test_directions_are_scikit_learns_principal_components() -> None:
    from sklearn.decomposition import PCA

    (h, label), W = embeddings(), weight()
    basis = np.linalg.svd(W.double().numpy())[2]
    outside = basis[C:].T @ basis[C:]  # the projection on the null space, from the SVD
    found = fitted(h, label, W, turned=False)
    for c in range(C):
        pca = PCA(S).fit(h[label == c].double().numpy() @ outside)
        turned = np.abs(pca.components_ @ found.directions[c].double().numpy())
        assert turned == pytest.approx(np.eye(S), abs=1e-5)  # equal up to sign
        ratio = (len(h[label == c]) - 1) / len(h[label == c])  # scikit-learn divides by n - 1
        expected = np.sqrt(pca.explained_variance_ * ratio)
        assert found.scale[c].numpy() == pytest.approx(expected, rel=1e-5)


def test_the_null_space_is_what_the_head_does_not_read() -> None:
    (h, _), W = embeddings(), weight().double()
    P = null_space(W)
    assert (W @ (P @ h.double().T)).abs().max() < 1e-10
    assert torch.linalg.matrix_rank(P) == D - C
    twice = torch.cat([W, W[:1]])  # a row more that says nothing new: its rank, not its height, is removed
    assert torch.allclose(null_space(twice), P, atol=1e-8)


def test_moving_an_embedding_where_the_head_reads_changes_no_target() -> None:
    (h, label), W = embeddings(), weight()
    found = fitted(h, label, W)
    moved = h + torch.randn(B, C, generator=generator(5)) @ W
    assert torch.allclose(split_within(moved, found), split_within(h, found), atol=1e-4)
    assert not torch.allclose(
        split_within(moved, fitted(h, label)), split_within(h, fitted(h, label)), atol=0.1
    )


def test_rotated_directions_are_orthonormal_and_keep_the_variance() -> None:
    (h, label), W = embeddings(), weight()
    plain, turned = fitted(h, label, W, turned=False), fitted(h, label, W)
    for found in (plain, turned):
        products = torch.einsum("cds,cdt->cst", found.directions, found.directions)
        assert torch.allclose(products, torch.eye(S).expand(C, S, S), atol=1e-6)
        assert (torch.einsum("kd,cds->cks", W, found.directions)).abs().max() < 1e-5
    assert torch.allclose(turned.scale.square().sum(1), plain.scale.square().sum(1))
    assert not torch.allclose(turned.scale, plain.scale, rtol=0.05)


def test_a_random_rotation_evens_the_variance_out() -> None:
    """E[R^T diag(v) R] = mean(v) I for a Haar rotation; 2,000 draws."""
    v, g = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64), generator()
    turns = torch.stack([rotation(4, g) for _ in range(2000)])
    assert torch.allclose(turns[0] @ turns[0].T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    variances = torch.einsum("nij,i,nij->nj", turns, v, turns)
    error = 4 * variances.std(0) / 2000**0.5
    assert ((variances.mean(0) - v.mean()).abs() < error).all()
    assert variances[0].std() > 0.1  # one rotation alone does not


def test_random_directions_are_the_control() -> None:
    """Orthonormal, unread by the head, scaled as numpy has it; not the principal ones, but inside what is left."""
    (h, label), W = embeddings(), weight()
    found = random_subspaces(moments([(h, label)], C), W, S, generator(3))
    products = torch.einsum("cds,cdt->cst", found.directions, found.directions)
    assert torch.allclose(products, torch.eye(S).expand(C, S, S), atol=1e-6)
    assert torch.einsum("kd,cds->cks", W, found.directions).abs().max() < 1e-5
    for c in range(C):
        a = h[label == c].double().numpy() @ found.directions[c].double().numpy()
        assert found.scale[c].numpy() == pytest.approx(a.std(0), rel=1e-4)
    assert (found.scale.square().sum(1) < 0.9 * fitted(h, label, W).scale.square().sum(1)).all()
    whole = random_subspaces(moments([(h, label)], C), None, S, generator(3))
    assert torch.einsum("kd,cds->cks", W, whole.directions).abs().max() > 0.1


@pytest.mark.parametrize("change", [lambda h: h + 7.0, lambda h: 3.0 * h], ids=["shift", "scale"])
def test_refitted_targets_ignore_shift_and_scale(change: Any) -> None:
    (h, label), W = embeddings(), weight()
    one = split_within(h, fitted(h, label, W))
    assert torch.allclose(split_within(change(h), fitted(change(h), label, W)), one, atol=1e-3)


def test_the_split_by_hand() -> None:
    """One class, one direction pair: a = (2, -1), scale (2, 1): softmax((1, -1) / beta)."""
    from kd_plugin_lelp.subspaces import Subspaces

    found = Subspaces(torch.tensor([[1.0, 1.0]]), torch.eye(2)[None], torch.tensor([[2.0, 1.0]]))
    h = torch.tensor([[3.0, 0.0]])
    for beta, high in ((1.0, 1 / (1 + math.exp(-2))), (0.5, 1 / (1 + math.exp(-4)))):
        assert split_within(h, found, beta=beta).flatten().tolist() == pytest.approx(
            [high, 1 - high], abs=1e-6
        )
    raw = split_within(h, found, standardise=False).flatten()[0].item()
    assert raw == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-6)


def test_too_many_subclasses_are_refused() -> None:
    (h, label), W = embeddings(), weight()
    with pytest.raises(InputError, match="vary along 6 directions outside what the teacher's head reads"):
        fit_subspaces(moments([(h, label)], C), W, D - C + 1)
    assert fit_subspaces(moments([(h, label)], C), None, D - C + 1).scale.shape == (C, D - C + 1)


def test_a_collapsed_teacher_is_refused() -> None:
    """Embeddings that move only along W leave nothing within a class."""
    W, label = weight(), torch.arange(B) % C
    h = torch.randn(B, C, generator=generator()) @ W
    with pytest.raises(InputError, match="vary along 0 directions"):
        fitted(h, label, W)
    with pytest.raises(InputError, match=r"the 0 embeddings of class 2"):
        fit_subspaces(moments([(embeddings()[0], label % 2)], C), W, S)
    with pytest.raises(InputError, match="no training sample"):
        moments([], C)
