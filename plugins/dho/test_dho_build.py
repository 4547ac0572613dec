"""DHO: what the student is built from, what is refused, and the demonstration's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_dho.data import PAIRS, few_labels
from kd_plugin_dho.loss import DHOLoss, dho_loss
from kd_plugin_dho.student import DualHead
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore.building import Builder
from kdcore.checkpoint import load_tensors, save_tensors


def wave(rows: int, columns: int, phase: float) -> Tensor:
    return 2 * torch.sin(
        1.7 * torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) + phase
    )


# ---- building it ------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Gives an embedding by name, and has no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 6)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"feature": self.layer(inputs)}


def dual(**params: Any) -> DualHead:
    model = {"model": params.pop("model", "kdcore.zoo:mlp")}
    return DualHead(backbone=Builder(0).make("student", "module", model, "student.backbone"), **params)


def test_a_backbone_may_give_embeddings_itself() -> None:
    student = dual(model=Embedder, head="", embedding="feature", width=6, classes=3)
    out = student(Batch({"input": torch.ones(2, 64)}))
    assert out["logits"].shape == out["z_kd"].shape == (2, 3)
    assert torch.equal(out["embedding"], student.backbone.model.get_submodule("layer")(torch.ones(2, 64)))


def test_the_backbones_own_classifier_is_gone() -> None:
    student = dual()
    assert isinstance(student.backbone.model.head, nn.Identity)
    assert student.ce_head.weight.shape == (10, 32)
    assert not any(name.startswith("backbone.module.head") for name in student.state_dict())


def test_the_cosine_head_is_the_authors_clip_students() -> None:
    student = dual(scale=100.0)
    out = student(Batch({"input": torch.rand(4, 64)}))
    head = student.kd_head
    expected = head(F.normalize(out["embedding"], dim=1)) * 100  # train_imgnet_semi.py, StudentModel.forward
    assert torch.allclose(out["z_kd"], expected, atol=1e-5)


def test_both_heads_may_start_at_text_embeddings(tmp_path: Path) -> None:
    weight = wave(10, 32, 0.0)
    save_tensors(tmp_path / "text.safetensors", {"weight": weight})
    student = dual(heads=str(tmp_path / "text.safetensors"))
    for head in (student.ce_head, student.kd_head):
        assert torch.equal(head.weight, weight)
        assert not head.bias.any()
    with pytest.raises(InputError, match=r"weight \(10, 32\)"):
        dual(head="hidden0.0", heads=str(tmp_path / "text.safetensors"))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"head": "haed"}, "no module at this path"),
        ({"model": Embedder, "head": "", "classes": 3}, "how wide"),
        ({"tied": True, "scale": 2.0}, "share one space"),
    ],
)
def test_what_cannot_be_built_is_said(params: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dual(**params)


def test_tuning_without_a_tune_split_is_refused_before_training(tmp_path: Path) -> None:
    plain = {"source": "kdcore.datasets:digits", "args": {"flat": True, "labels": 100}, "batch_size": 16}
    student = {"use": "dho", "backbone": {"use": "module", "model": "kdcore.zoo:mlp"}}
    teacher = {"main": {"use": "module", "model": "kdcore.zoo:mlp"}}
    tree = {
        "data": plain,
        "teacher": teacher,
        "student": student,
        "loss": [{"use": "dho"}],
        "train": {"steps": 1},
    }
    with pytest.raises(InputError, match="tunes alpha and beta on the split tune"):
        kdcore.run(tree, out=tmp_path / "run")
    fixed = {**tree, "student": {**student, "tune": False, "alpha": 0.25}}
    result = kdcore.run(fixed, out=tmp_path / "fixed")  # one stream, no tuning: the rule stays as given
    assert float(load_tensors(result.student, "test")["alpha"]) == 0.25


def test_a_released_loss_alone_is_the_plain_function() -> None:
    student, teacher = Outputs(tensors={"z_kd": wave(3, 4, 1.0)}), Outputs(logits=wave(3, 4, 3.0))
    loss = Builder(0).make("loss", "dho", {"variant": "released", "temperature": 3.0}, "loss")
    assert isinstance(loss, DHOLoss)
    expected = dho_loss(wave(3, 4, 1.0), wave(3, 4, 3.0), temperature=3.0)
    assert torch.equal(loss(student, teacher, Batch()), expected)


# ---- the demonstration's data -----------------------------------------------------------------------


def test_the_data_keeps_labels_from_the_unlabelled_and_splits_apart() -> None:
    data = few_labels(shots=3, split_seed=1)
    labelled, unlabelled = data.train["labelled"].values, data.train["unlabelled"].values
    assert torch.bincount(labelled["target"], minlength=10).tolist() == [3] * 10
    assert "target" not in unlabelled
    ids = torch.cat(
        [labelled["id"], unlabelled["id"], *(s.values["id"] for s in (data.tune, data.val, data.test))]
    )
    assert sorted(ids.tolist()) == list(range(1797))


def test_the_confused_teacher_sees_swapped_pairs_only() -> None:
    from sklearn.datasets import load_digits

    truth = torch.tensor(load_digits().target)
    train = few_labels(confused=True).train["labelled"].values
    told, true = train["target"], truth[train["id"]]
    partner = dict(PAIRS) | {b: a for a, b in PAIRS}
    wrong = told != true
    assert all(partner[int(t)] == int(w) for t, w in zip(true[wrong], told[wrong], strict=True))
    assert wrong[torch.isin(true, torch.tensor(list(partner)))].float().mean().item() == pytest.approx(
        0.45, abs=0.08
    )
    with pytest.raises(InputError, match="too few images"):
        few_labels(shots=80)
