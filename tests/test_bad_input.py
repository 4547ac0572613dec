"""Bad input: one screen with place, value, what is allowed and the nearest spelling; exit code 2; nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

import kdcore
from kdcore import Component, cli, plugins
from kdcore.building import Builder
from kdcore.errors import InputError
from kdcore.models import build_module

Change = Callable[[dict[str, Any]], Any]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What ``kd`` says on standard error when it refuses."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    said = capsys.readouterr().err
    assert left.value.code == code, said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 30
    return said


# change -> what the message must name: place, value, and the remedy where there is one
WRONG: dict[str, tuple[Change, list[str]]] = {
    "unknown key": (
        lambda r: r["train"].update(epoch=3),
        ["train.epoch", "unknown key", "did you mean 'epochs'?"],
    ),
    "unknown table": (lambda r: r.update(trian={}), ["trian", "did you mean 'train'?"]),
    "wrong type": (lambda r: r["train"].update(epochs="three"), ["train.epochs", "'three'", "integer"]),
    "a bool is no number": (lambda r: r["train"].update(clip=True), ["train.clip"]),
    "out of range": (lambda r: r["train"].update(epochs=0), ["train.epochs", "0", "greater than 0"]),
    "loss range": (
        lambda r: r["loss"][0].update(temperature=-1.0),
        ["loss.0.temperature", "-1.0", "greater than 0"],
    ),
    "loss key": (
        lambda r: r["loss"][0].update(temprature=2.0),
        ["loss.0.temprature", "did you mean 'temperature'?"],
    ),
    "unknown component": (
        lambda r: r["loss"][0].update(use="pdl"),
        ["loss.0.use", "'pdl'", "did you mean 'pld'?"],
    ),
    "planned": (lambda r: r["loss"][0].update(use="swing"), ["loss.0.use", "not installed", "planned"]),
    "module path": (
        lambda r: r["loss"].append({"use": "classics.at", "reads": {"student": {"attention": "hiden0"}}}),
        ["loss.1.reads.student"],
    ),
    "callable": (
        lambda r: r["student"].update(model="kdcore.zoo:conv_nett"),
        ["student.model", "did you mean 'conv_net'?"],
    ),
    "module": (lambda r: r["student"].update(model="no_such_module:f"), ["student.model", "cannot import"]),
    "model argument": (
        lambda r: r["student"]["args"].update(hiden=[3]),
        ["student.args.hiden", "did you mean 'hidden'?"],
    ),
    "classes": (
        lambda r: r["teacher"]["main"]["args"].update(classes=12),
        ["teacher.main", "12 classes, the student 10"],
    ),
    "too few classes": (
        lambda r: r["student"]["args"].update(classes=7),
        ["student", "7 classes, the data 10"],
    ),
    "too many classes": (
        lambda r: (r["student"]["args"].update(classes=12), r["teacher"]["main"]["args"].update(classes=12)),
        ["student", "metrics cannot judge", "(4, 12)", "10 classes"],
    ),
    "teacher name": (
        lambda r: r["loss"][0].update(teacher="mian"),
        ["loss.0.teacher", "did you mean 'main'?"],
    ),
    "router's reads": (
        lambda r: r.update(router={"use": "mst-distill", "reads": {"student": {"x": "head"}}}),
        ["router.reads", "unknown parameter"],
    ),
    "optimiser": (
        lambda r: r["train"]["optimizer"].update(use="Adamw"),
        ["train.optimizer.use", "did you mean 'AdamW'?"],
    ),
    "optimiser option": (
        lambda r: r["train"]["optimizer"].update(lrr=1.0),
        ["train.optimizer.lrr", "did you mean 'lr'?"],
    ),
    "metric": (
        lambda r: r.update(task={"metrics": ["acuracy"]}),
        ["task.metrics", "did you mean 'accuracy'?"],
    ),
    "epochs and steps": (lambda r: r["train"].update(steps=5), ["train", "both given"]),
    "no teacher": (lambda r: r.pop("teacher"), ["loss.0", "reads a teacher, and the recipe has none"]),
    "no student": (lambda r: r.pop("student"), ["needs 'student'"]),
    "labels": (lambda r: r["data"]["args"].update(labels=99999), ["labels", "99999"]),
    "shape": (lambda r: r["student"]["args"].update(inputs=63), ["student", "first batch", "(4, 64)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes(
    case: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = WRONG[case]
    change(tiny)
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny), "utf-8")
    said = refused(capsys, "run", str(path), "--out", str(tmp_path / "out"))
    for word in words:
        assert word in said, said
    assert "recipe.toml" in said
    assert not (tmp_path / "out").exists()


TEXT = """[data]
source = "kdcore.datasets:digits"

[student]
use = "module"
model = "kdcore.zoo:mlp"

[teacher.main]
use = "self"

[[loss]]
use = "kd"

[[loss]]
use = "kd"
temperature = -1.0
"""


def test_a_place_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT, "utf-8")
    said = refused(capsys, "run", str(path))
    assert "loss.1.temperature" in said
    assert f"{path}, line 16" in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.toml", b"[data\nx = 1", "cannot be read as TOML: TOMLDecodeError"),
        ("empty.toml", b"", "the recipe needs 'data'"),
        ("huge.toml", b"# " + b"x" * 10_000_000, "too large"),
        ("latin.toml", b"name = '\xe9'", "utf-8"),
    ],
)
def test_files_that_are_no_recipes(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    said = refused(capsys, "run", str(tmp_path / name), "--out", str(tmp_path / "out"))
    assert words in said
    assert name in said
    assert not (tmp_path / "out").exists()


def test_folders_absent_files_and_endless_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "folder" in refused(capsys, "run", str(tmp_path))
    assert "no such recipe" in refused(capsys, "run", str(tmp_path / "none.toml"))
    assert "too large" in refused(capsys, "run", "/dev/zero")
    assert "brings no recipe" in refused(capsys, "run", "kd")
    assert "no recipe 'digitz'" in refused(capsys, "run", "pld:digitz")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", "not an override"),
        ("=5", "not an override"),
        ("loss.7.temperature=2", "loss.7"),
        ("train.epochs.deep=2", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
    ],
)
def test_wrong_overrides(
    override: str, words: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny), "utf-8")
    assert words in refused(capsys, "run", str(path), override)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(Evil.path),))

    path = ""


@pytest.mark.parametrize("kind", ["damaged", "truncated", "other", "evil", "list", "absent"])
def test_wrong_checkpoints(
    kind: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_module("kdcore.zoo:mlp", {"hidden": [16]})
    path = tmp_path / ("weights.safetensors" if kind in ("damaged", "truncated") else "weights.pt")
    Evil.path = str(tmp_path / "it-ran")
    if kind == "damaged":
        path.write_bytes(b"\x07" * 100)
    elif kind == "truncated":
        save_file(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "other":
        torch.save(build_module("kdcore.zoo:mlp", {"hidden": [17]}).state_dict(), path)
    elif kind == "evil":
        torch.save({"head.weight": Evil()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    tiny["teacher"]["main"] = {
        "use": "module",
        "model": "kdcore.zoo:mlp",
        "args": {"hidden": [16]},
        "checkpoint": str(path),
    }
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    said = refused(capsys, "run", str(recipe), "--out", str(tmp_path / "out"))
    assert "teacher.main.checkpoint" in said
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "out").exists()


FUSSY = """
    from kdcore import InputError, Student

    class Fussy(Student):
        def __init__(self, *, place: str):
            raise InputError(place, "too narrow")

        def forward(self, batch):
            return None
"""


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("", "loss.0.inner"),
        ("student", "loss.0.inner"),
        ("student.width", "loss.0.inner.width"),
        ("students.width", "students.width"),
        ("data.source", "data.source"),
    ],
)
def test_a_constructor_says_its_kind_and_the_error_has_its_place(
    said: str, place: str, write_module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    component = Component("fussy", f"{write_module(FUSSY)}:Fussy")
    monkeypatch.setitem(
        plugins.registry().offers["student"], "fussy", [(plugins.registry().entries[0], component)]
    )
    with pytest.raises(InputError, match="too narrow") as caught:
        Builder(0).make("student", "fussy", {"place": said}, "loss.0.inner")
    assert caught.value.place == place


RULE = """
    from torch import nn
    from kdcore import Outputs, Student

    class Rule(Student):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, batch):
            return Outputs(logits=self.head(batch["input"]))

        def infer(self, outputs):
            return outputs
"""


def test_an_inference_rule_gives_tensors_by_name(
    tiny: dict[str, Any], write_module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = plugins.registry()
    component = Component("rule", f"{write_module(RULE)}:Rule")
    monkeypatch.setitem(registry.offers["student"], "rule", [(registry.entries[0], component)])
    tiny["student"] = {"use": "rule"}
    with pytest.raises(InputError, match="tensors by name") as caught:
        kdcore.check(tiny)
    assert "'Outputs'" in str(caught.value)


def test_an_inference_rule_may_give_lists_beside_what_is_judged(
    tiny: dict[str, Any], write_module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, rule = plugins.registry(), '{"logits": outputs.logits, "boxes": [*outputs.logits]}'
    component = Component("rule", f"{write_module(RULE.replace('return outputs', f'return {rule}'))}:Rule")
    monkeypatch.setitem(registry.offers["student"], "rule", [(registry.entries[0], component)])
    tiny["student"] = {"use": "rule"}
    assert kdcore.check(tiny).student.use == "rule"


def test_a_good_checkpoint_is_used(tiny: dict[str, Any], tmp_path: Path) -> None:
    model = build_module("kdcore.zoo:mlp", {"hidden": [16]})
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    tiny["teacher"]["main"] = {
        "use": "module",
        "model": "kdcore.zoo:mlp",
        "args": {"hidden": [16]},
        "checkpoint": str(tmp_path / "weights.safetensors"),
    }
    kdcore.check(tiny)


def test_no_right_and_no_space_to_write(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    (tmp_path / "file").write_text("in the way", "utf-8")
    assert "cannot be written" in refused(capsys, "run", str(recipe), "--out", str(tmp_path / "file" / "run"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("x", "utf-8")
    assert "not empty" in refused(capsys, "run", str(recipe), "--out", str(tmp_path / "full"))


def test_an_empty_data_set(tiny: dict[str, Any], write_module: Callable[..., str]) -> None:
    module = write_module("""
        from kdcore import Data
        def nothing():
            return Data([], [1], [1])
    """)
    tiny["data"] = {"source": f"{module}:nothing"}
    with pytest.raises(InputError, match="is empty"):
        kdcore.check(tiny)


def test_plugins_only_refuses_code(
    tiny: dict[str, Any], tmp_path: Path, write_module: Callable[..., str]
) -> None:
    module = write_module("def f():\n    raise SystemExit")
    tiny["student"]["model"] = f"{module}:f"
    with pytest.raises(InputError, match="names code"):
        kdcore.run(tiny, out=tmp_path / "run", plugins_only=True)


def test_plugins_only_refuses_python_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A config that is a program (OpenMMLab's are), wherever a recipe names it."""
    tiny["student"]["args"]["config"] = str(tmp_path / "config.py")
    with pytest.raises(InputError, match=r"student\.args\.config[\s\S]*names code"):
        kdcore.run(tiny, out=tmp_path / "run", plugins_only=True)


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'compare'?" in refused(capsys, "comprae")
    assert "no such kind" in refused(capsys, "list", "--kind", "looses")
