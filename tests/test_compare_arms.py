"""What an arm's name makes of a recipe, and when two arms are matched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdcore.comparison.arms import arms_of
from kdcore.comparison.matching import changes_data, measured_differences, recipe_differences
from kdcore.errors import InputError
from kdcore.guards import digest
from kdcore.plugins import Entry
from kdcore.recipe import Source

PLUGIN = """
    from kdcore import Component, hookimpl

    @hookimpl
    def kd_losses():
        yield Component("half", "{module}:half")

    def half(student_logits, teacher_logits, *, share: float = 0.5):
        return share * (student_logits - teacher_logits).square().sum(-1)
"""


def arms(tree: dict[str, Any], *specs: str) -> dict[str, dict[str, Any]]:
    return arms_of(Source(tree), specs)[0]


def test_the_baselines_are_added(tiny: dict[str, Any]) -> None:
    tiny["task"] = {"weight": 0.1, "metrics": ["accuracy"]}
    tiny["report"], tiny["export"] = {"baseline": True}, {"use": "onnx"}
    found, own = arms_of(Source(tiny), [])
    assert list(found) == ["none", "kd", "tiny"]
    assert own == "tiny"
    assert "loss" not in found["none"]
    assert found["none"]["task"] == {"metrics": ["accuracy"]}
    assert found["kd"]["loss"] == [{"use": "kd"}]
    assert found["kd"]["task"]["weight"] == 0.1
    assert found["tiny"]["loss"] == tiny["loss"]
    assert all("export" not in tree and not tree["report"]["baseline"] for tree in found.values())
    assert all(tree["train"]["threads"] == 1 for tree in found.values())


def test_baselines_that_cannot_be_are_left_out(tiny: dict[str, Any]) -> None:
    teacherless = {k: v for k, v in tiny.items() if k not in ("teacher", "loss")}
    assert list(arms(teacherless)) == ["none", "tiny"]
    assert list(arms({**tiny, "task": {"use": "none"}})) == ["kd", "tiny"]


def test_a_router_and_a_stages_losses_are_part_of_the_method(tiny: dict[str, Any]) -> None:
    tiny["router"] = {"use": "any"}
    tiny["stage"] = [{"use": "distill", "loss": [{"use": "task"}], "train": {"epochs": 1}}]
    found = arms(tiny)
    for name in ("none", "kd"):
        assert "router" not in found[name]
        assert found[name]["stage"] == [{"use": "distill", "train": {"epochs": 1}}]


def test_a_name_is_a_component_in_place_of_the_first_loss(
    tiny: dict[str, Any], install: Callable[..., Entry], write_module: Callable[..., str]
) -> None:
    _install_half(install, write_module)
    tiny["loss"] = [{"use": "kd", "temperature": 2.0, "weight": 0.7, "teacher": "main"}, {"use": "task"}]
    found = arms(tiny, "half", "soft:loss.0.use=half,loss.0.weight=0.2", "half2:loss.0.temperature=3")
    assert found["half"]["loss"] == [{"use": "half", "teacher": "main"}, {"use": "task"}]
    assert found["soft"]["loss"][0] == {"use": "half", "teacher": "main", "weight": 0.2}
    assert found["half2"]["loss"][0] == {**tiny["loss"][0], "temperature": 3}
    assert arms(tiny, "half:loss.0.share=0.1")["half"]["loss"][0] == {
        "use": "half",
        "teacher": "main",
        "share": 0.1,
    }


def test_the_recipe_itself_under_its_names(tiny: dict[str, Any]) -> None:
    assert list(arms(tiny, "recipe", "tiny", "none", "kd")) == ["none", "kd", "tiny"]
    tiny["loss"] = [{"use": "task"}]
    found, own = arms_of(Source(tiny), ["task"])
    assert own == "task"
    assert list(found) == ["none", "kd", "task"]
    tiny["name"] = "kd"
    assert arms_of(Source(tiny), [])[1] == "recipe"


def test_baselines_may_be_changed_by_name(tiny: dict[str, Any]) -> None:
    found = arms(tiny, "kd:loss.0.temperature=2")
    assert found["kd"]["loss"] == [{"use": "kd", "temperature": 2}]
    assert found["tiny"]["loss"] == tiny["loss"]


def test_values_may_hold_commas(tiny: dict[str, Any]) -> None:
    found = arms(tiny, 'wide:student.args.hidden=[8,16],data.args={ labels = 50, flat = true },name="a,b"')
    assert found["wide"]["student"]["args"]["hidden"] == [8, 16]
    assert found["wide"]["data"]["args"] == {"labels": 50, "flat": True}
    assert found["wide"]["name"] == "a,b"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nonsuch"], "unknown loss 'nonsuch'"),
        (["taid"], "loss 'taid' is not installed"),
        (["a:seed=1", "a:seed=2"], "two arms have this name"),
        (["tiny:loss.0.weight=1"], "two arms have this name"),
        (["hot:loss.0.temperature"], "an override without a value"),
        (["../up:seed=1"], "no arm can have this name"),
        ([""], "no arm can have this name"),
    ],
)
def test_arms_that_are_refused(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, specs: list[str], message: str
) -> None:
    from kdcore import plugins

    monkeypatch.setattr(
        plugins,
        "registry",
        lambda: plugins.discover([e for e in plugins._entry_points() if e.name == "kdcore"]),
    )
    with pytest.raises(InputError) as caught:
        arms(tiny, *specs)
    assert message in str(caught.value)


def test_only_the_method_may_differ(tiny: dict[str, Any]) -> None:
    def against(change: dict[str, Any], leave: tuple[str, ...] = ()) -> list[str]:
        return recipe_differences({**copy.deepcopy(tiny), **change}, tiny, leave)

    assert against({"loss": [{"use": "task"}, {"use": "kd"}], "seed": 5, "task": {"weight": 0.5}}) == []
    assert against({"train": {**tiny["train"], "accumulate": 1}}) == []  # a default spelt out
    assert against({"data": {**tiny["data"], "batch_size": 16}}) == ["data.batch_size: 32 -> 16"]
    assert against({"augmentation": [{"use": "x"}]})[0] == "augmentation.0.use: None -> 'x'"
    faster = {"train": {"epochs": 2, "optimizer": {"use": "AdamW", "lr": 0.1}}}
    assert against(faster) == ["train.optimizer.lr: 0.002 -> 0.1"]
    assert against(faster, leave=("train.optimizer.lr",)) == []
    assert against({"task": {"label_smoothing": 0.1}}) == ["task.label_smoothing: 0.0 -> 0.1"]


def test_a_stages_own_losses_are_the_method_too(tiny: dict[str, Any]) -> None:
    staged = {**tiny, "stage": [{"use": "distill", "loss": [{"use": "task"}], "train": {"epochs": 5}}]}
    plain = {**tiny, "stage": [{"use": "distill", "train": {"epochs": 6}}]}
    assert recipe_differences(plain, staged) == ["stage.0.train.epochs: 5 -> 6"]


def test_a_stages_own_weight_of_the_task_is_the_method_too(tiny: dict[str, Any]) -> None:
    tiny["stage"] = [{"use": "distill", "task": {"weight": 0.1, "metrics": ["accuracy"]}}]
    found, own = arms_of(Source(tiny), [])
    assert found["none"]["stage"][0]["task"] == {"metrics": ["accuracy"]}
    assert found["kd"]["stage"] == found[own]["stage"] == tiny["stage"]
    other = copy.deepcopy(tiny)
    tiny["stage"][0]["task"], other["stage"][0] = {"weight": 0.1}, {"use": "distill"}
    assert recipe_differences(tiny, other) == []
    tiny["stage"][0]["task"]["use"] = "language"
    assert recipe_differences(tiny, other) == ["stage.0.task.use: None -> 'language'"]


def test_what_was_measured_is_told_in_words() -> None:
    mine = {"student": "a", "ids": ["1", "2"], "batch": "b", "teachers": {"main": "t"}, "steps": 8}
    assert measured_differences([(mine, mine), (mine, mine)]) == []
    assert measured_differences([(mine, mine), ({**mine, "batch": "c"}, mine)]) == [
        "the first augmented batch"
    ]
    assert measured_differences([({**mine, "steps": 9, "student": "z"}, mine)]) == [
        "the student's initial weights",
        "the number of steps",
    ]


def test_a_digest_sees_bits_shapes_and_types() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    near = base.clone()
    near[2, 3] = torch.nextafter(near[2, 3], torch.tensor(torch.inf))
    others = [near, base.reshape(4, 3), base.double(), {"a": base}, [base], base.to(torch.bfloat16)]
    digests = [digest(each) for each in [base, *others]]
    assert len(set(digests)) == len(digests)
    assert digest({"b": base, "a": near}) == digest({"a": near.clone(), "b": base.t().contiguous().t()})
    assert (
        digest(torch.zeros(10), limit=3)
        == digest(torch.zeros(10), limit=3)
        != digest(torch.ones(10), limit=3)
    )


def _install_half(install: Callable[..., Entry], write_module: Callable[..., str]) -> None:
    name = write_module(PLUGIN.split("@hookimpl")[0] + "    " + PLUGIN[PLUGIN.index("def half") :])
    install("half", PLUGIN[: PLUGIN.index("    def half")].format(module=name))


def test_an_augmentation_that_is_the_method_is_left_out_of_the_baselines(tiny: dict[str, Any]) -> None:
    crop, mix = {"use": "crop"}, {"use": "mix", "method": True}
    tiny["augmentation"] = [crop, mix]
    trees, own = arms_of(Source(tiny), ["milder:augmentation.1.share=0.1", "smuggled:augmentation.0.size=3"])
    assert trees["none"]["augmentation"] == trees["kd"]["augmentation"] == [crop]
    assert trees[own]["augmentation"] == [crop, mix]
    for name in ("none", "kd", "milder"):
        assert recipe_differences(trees[name], trees[own]) == []
    assert recipe_differences(trees["smuggled"], trees[own]) == ["augmentation.0.size: None -> 3"]
    assert changes_data(trees[own])
    assert not changes_data(trees["kd"])


def test_data_is_not_held_equal_where_it_is_the_method() -> None:
    one, other = {"student": "a", "ids": "x", "batch": "y"}, {"student": "a", "ids": "z", "batch": "w"}
    assert len(measured_differences([(one, other)])) == 2
    assert measured_differences([(one, other)], data=False) == []
    assert measured_differences([(one, {"student": "b"})], data=False) == ["the student's initial weights"]
