"""SgVA-CLIP: the authors' step (FannierPeng/SgVA-CLIP, caa63d5, in float64 on a CPU), and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_sgva_clip.adapter import Adapter, prototypes, recover
from kd_plugin_sgva_clip.clip import TwoTowers
from kd_plugin_sgva_clip.fusion import GRID, fuse, released_search, search
from kd_plugin_sgva_clip.loss import guidance_loss, vision_loss
from kd_plugin_sgva_clip.oracle import ORACLES
from kd_plugin_sgva_clip.student import SgVA
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore.testing import Oracle, check_oracle

LABEL = torch.tensor([0, 0, 1, 1, 2, 2])


def wave(*shape: int, phase: float, scale: float = 1.0) -> Tensor:
    """The fixed tensors that the authors' code was run on."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(1.7 * i + 0.11 * i * i + phase).reshape(shape)


class Recorded(nn.Module):
    """An encoder whose inputs are its embeddings already, with a projection as a ViT or a ResNet has it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        p = wave(6, 4, phase=0.4)
        linear = nn.Linear(6, 4, dtype=torch.float64)
        linear.weight.data.copy_(p.T)
        linear.bias.data.copy_(wave(4, phase=0.7, scale=0.3))
        self.proj = nn.Parameter(p) if kind == "vit" else linear

    def forward(self, f: Tensor) -> Tensor:
        return f


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(F.normalize(wave(3, 4, phase=2.1), dim=-1))

    def forward(self) -> Tensor:
        return self.t


def recorded_clip(*, kind: str = "vit") -> TwoTowers:
    towers = TwoTowers(Recorded(kind), Text(), projection="proj", scale=12.0)
    towers.logit_scale.data = torch.tensor(math.log(12), dtype=torch.float64)
    return towers


def built(clip: Any = recorded_clip, kind: str = "vit", **params: Any) -> SgVA:
    table = {"use": "module", "model": clip, "args": {"kind": kind} if clip is recorded_clip else {}}
    student = kdcore.build("student", "sgva-clip", clip=table, **params)
    assert isinstance(student, SgVA)
    return student


def authors(kind: str = "vit", **params: Any) -> SgVA:
    """The student with the weights that the authors' adapter was given."""
    student = built(kind=kind, **{"variant": "released", **params}).double()
    student.adapter.linear1.weight.data.copy_(wave(12, 6, phase=0.1, scale=0.6))
    student.adapter.linear2.weight.data.copy_(wave(6, 12, phase=0.9, scale=0.6))
    return student


def episode() -> Batch:
    return Batch({"id": torch.arange(6), "input": wave(6, 4, phase=1.3), "target": LABEL})


# ---- the authors' step ------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


def test_features_and_scores_are_the_authors() -> None:
    said = authors().train()(episode())
    x = recover(episode()["input"], torch.linalg.pinv(wave(6, 4, phase=0.4)), torch.zeros(4))
    expected = [0.2610971877, -0.2414329359, 0.8463866140, -0.3472763402, 0.0036316026, -0.1374266636]
    assert x[0].tolist() == pytest.approx(expected, abs=1e-9)
    g = [0.8283865128326586, 0, 0.40485391091521894, 0, 0.3871293016210471, 0]
    assert said["adapted"][0].tolist() == pytest.approx(g, abs=1e-12)
    vision = [[6.0, 8.847112246424551, 5.807579243432976], [6.0, 1.0091601169968327, 0.5694758665035186]]
    assert said["logits"][:2].flatten().tolist() == pytest.approx(vision[0] + vision[1], abs=1e-9)
    image_text = [9.844682250640274, 0.26907353481559015, 3.0779842976039142]
    assert said["image_text"][0].tolist() == pytest.approx(image_text, abs=1e-9)
    adapted = [8.355618009202786, 4.073600397656836, 7.739081719601753]
    assert said["adapted_text"][0].tolist() == pytest.approx(adapted, abs=1e-9)


def test_a_projection_with_a_bias_is_the_authors_resnet_branch() -> None:
    said = authors("resnet").train()(episode())
    adapted = [13.36956475723975, 2.942397127533668, 6.954429130960573]
    assert said["adapted_text"][0].tolist() == pytest.approx(adapted, abs=1e-9)
    assert said["logits"][0].tolist() == pytest.approx([6.0, 10.224890693152535, 6.881772141149779], abs=1e-9)


def terms(student: SgVA) -> dict[str, Tensor]:
    said = student(episode())
    found = student.task_loss(said, episode())
    assert found is not None
    guidance = guidance_loss(said["adapted_text"], said["image_text"])
    return {name: value.mean() for name, value in {**found, "guidance": guidance}.items()}


def test_the_step_has_the_authors_values_and_gradients() -> None:
    student = authors().train()
    found = terms(student)
    assert found["vision"].item() == pytest.approx(0.561286396728608, abs=1e-6)  # losses are float32
    assert found["guidance"].item() == pytest.approx(0.9981051418218084, abs=1e-6)
    assert found["text"].item() == pytest.approx(4.080892358544719, abs=1e-6)
    torch.stack([*found.values()]).sum().backward()
    w1, w2, a = student.adapter.linear1.weight, student.adapter.linear2.weight, student.adapter.alpha
    assert w1.grad is not None and w2.grad is not None and a.grad is not None  # noqa: PT018
    first = [-0.0032541688, 0.0117564360, -0.0292559398, -0.0127321111, 0.0322124740, 0.0038133218]
    assert w1.grad[0].tolist() == pytest.approx(first, abs=1e-6)
    assert w1.grad.abs().sum().item() == pytest.approx(3.3793580819710742, rel=1e-5)
    assert w2.grad.abs().sum().item() == pytest.approx(4.4726690875666435, rel=1e-5)
    assert a.grad.item() == pytest.approx(-0.8691445730003594, rel=1e-5)


def test_the_prompt_learns_from_its_own_term_alone_as_the_authors() -> None:
    student = authors().train()
    torch.stack([*terms(student).values()]).sum().backward()
    theirs = torch.tensor(
        [
            [1.4203222660558308, -2.014298760867704, -1.3679203789347822, 1.4166733364263768],
            [-1.6666540391087046, 0.4272271900951409, 0.8414300767401595, -3.942735315904666],
            [0.24633177305287376, 1.5870715707725633, 0.5264903021946225, 2.526061979478289],
        ],
        dtype=torch.float64,
    )
    t = F.normalize(wave(3, 4, phase=2.1), dim=-1)  # theirs is at the unit vector, ours before normalising
    tangent = theirs - (theirs * t).sum(-1, keepdim=True) * t
    grad = student.towers.text.get_parameter("t").grad
    assert grad is not None
    assert torch.allclose(grad, tangent, atol=1e-5)
    assert all(p.grad is None for p in student.towers.encoder.parameters())
    assert student.towers.logit_scale.grad is None


# ---- closed forms and properties --------------------------------------------------------------------


def test_the_guidance_is_least_where_the_logits_differ_by_a_constant_a_row() -> None:
    guide = wave(4, 5, phase=0.3, scale=8)
    p = (guide / 5).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    assert torch.allclose(guidance_loss(guide + 3, guide).double(), entropy, atol=1e-6)
    other = wave(4, 5, phase=2.0, scale=8)
    above = F.kl_div((other / 5).log_softmax(-1), p, reduction="none").sum(-1)
    assert torch.allclose(guidance_loss(other, guide).double() - entropy, above, atol=1e-6)


def test_at_alpha_0_only_alpha_learns() -> None:
    adapter, x = Adapter(6).double(), wave(5, 6, phase=0.2)
    adapter.alpha.data.zero_()
    g = adapter(x)
    assert torch.allclose(g, F.relu(x) / F.relu(x).norm(dim=-1, keepdim=True))
    assert torch.allclose(adapter(x.abs()), x.abs() / x.norm(dim=-1, keepdim=True))
    (g * wave(5, 6, phase=1.0)).sum().backward()
    for layer in (adapter.linear1, adapter.linear2):
        assert layer.weight.grad is not None
        assert not layer.weight.grad.any()
    assert adapter.alpha.grad is not None
    assert adapter.alpha.grad.abs() > 1e-3
    assert torch.isfinite(adapter(-x.abs())).all()  # all zeros behind the ReLU


def test_the_embedding_comes_back_from_the_recovered_feature() -> None:
    p, b, f = wave(6, 4, phase=0.4), wave(4, phase=0.7), wave(5, 4, phase=1.0)
    assert torch.allclose(recover(f, torch.linalg.pinv(p), b) @ p + b, f, atol=1e-12)


def test_prototypes_are_means_in_any_order() -> None:
    g, order = wave(6, 3, phase=0.1), torch.tensor([5, 3, 0, 4, 1, 2])
    found = prototypes(g, LABEL, 4)
    assert torch.allclose(found[1], (g[2] + g[3]) / 2)
    assert not found[3].any()
    assert torch.allclose(prototypes(g[order], LABEL[order], 4), found)
    assert torch.equal(prototypes(g[:1], LABEL[:1], 1)[0], g[0])


def test_absent_classes_are_no_part_of_the_episodes_contrast() -> None:
    vision = wave(2, 4, phase=0.5, scale=5)
    y, present = torch.tensor([0, 2]), torch.tensor([True, False, True, False])
    expected = F.cross_entropy(vision[:, [0, 2]], torch.tensor([0, 1]), reduction="none")
    assert torch.allclose(vision_loss(vision, y, present).double(), expected, atol=1e-6)
    student = authors().train()
    few = Batch({name: value[:4] for name, value in episode().items()})
    found = student.task_loss(student(few), few)
    assert found is not None
    three = F.cross_entropy(student(few)["logits"], few["target"], reduction="none")
    assert (found["vision"] < three).all()


# ---- the fusion weight ------------------------------------------------------------------------------


def test_fusion_runs_from_the_text_to_the_prototype_classifier() -> None:
    vision, image_text = wave(5, 3, phase=0.1), wave(5, 3, phase=1.1)
    assert torch.equal(fuse(vision, image_text, 0.0), image_text)
    assert torch.equal(fuse(vision, image_text, 1.0), vision)
    said = Outputs(logits=vision, tensors={"image_text": image_text})
    assert torch.allclose(built(fusion=0.25).infer(said)["logits"], 0.25 * vision + 0.75 * image_text)


def test_the_search_takes_the_middle_of_the_best() -> None:
    # right where w > 0.31 (first row) and where w < 0.72 (second): 0.35, ..., 0.7 of the grid
    vision = torch.tensor([[0.69, 0.0], [0.28, 0.0]], dtype=torch.float64)
    image_text = torch.tensor([[0.0, 0.31], [0.0, 0.72]], dtype=torch.float64)
    weight, accuracy = search(vision, image_text, torch.tensor([0, 1]))
    assert (weight, accuracy) == (0.55, 1.0)
    assert (len(GRID), GRID[0], GRID[-1]) == (21, 0.0, 1.0)
    assert search(vision, image_text, torch.tensor([1, 1]))[0] == 0.15  # right at 0, ..., 0.3


def test_the_released_search_is_the_first_best_of_ten_draws() -> None:
    vision, image_text = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    draws = torch.rand(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    found = released_search(vision, image_text, torch.tensor([0]), torch.Generator().manual_seed(3))
    assert found == (next(w for w in draws if w > 0.5), 1.0)
    never = vision * torch.tensor([[0.0, 0.0]]), image_text
    assert released_search(*never, torch.tensor([0]), torch.Generator()) == (0.5, 0.0)


# ---- what is refused --------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Linear(4, 3)


def lost() -> TwoTowers:
    return TwoTowers(nn.Sequential(nn.Linear(4, 3)), Text(), projection="1")


@pytest.mark.parametrize(("clip", "words"), [(plain, "no pair of towers"), (lost, "no projection")])
def test_what_is_no_clip_is_said(clip: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        built(clip)


def test_the_paper_variant_needs_a_second_view() -> None:
    student = authors(variant="paper").train()
    with pytest.raises(InputError, match="another augmentation"):
        student(episode())
    view = wave(6, 4, phase=1.4)
    found = student(Batch({**episode(), "support": view}))["logits"]
    inverse = torch.linalg.pinv(wave(6, 4, phase=0.4))
    p = prototypes(student.adapter(view @ inverse), LABEL, 3)
    assert torch.allclose(found, 12 * student.adapter(episode()["input"] @ inverse) @ p.T)
