"""Recipes as text: found, read, overridden; tables, names and stages checked; places found again as lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcore import recipe as recipes
from kdcore.errors import InputError
from kdcore.recipe import merge, parse, parse_stage
from kdcore.source import leaves, override
from kdcore.tables import Ramp

TEXT = """\
# a comment
[data]
source = "kdcore.datasets:digits"
args = { flat = true }

[teacher."main"]
use = "self"

[[loss]]
use = "kd"
[loss.reads.student]
logits = "head"

[[loss]]  # the second
use = "task"
weight = [
    [1, 2],
]

[student]
use = "module"
model = "kdcore.zoo:mlp"
args.hidden = [8]
"""


def origin(place: str, text: str = TEXT, overrides: tuple[str, ...] = ()) -> str:
    """Where an error of this place is said to come from."""
    with pytest.raises(InputError) as caught, recipes.located(recipes.Source({}, "r.toml", text, overrides)):
        raise InputError(place, "wrong")
    return caught.value.source


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("data", 2),
        ("data.source", 3),
        ("data.args.flat", 4),
        ("teacher.main.use", 7),
        ("loss.0.use", 10),
        ("loss.0.reads.student.logits", 12),
        ("loss.1.use", 15),
        ("loss.1.weight.0.1", 16),
        ("loss.1.temperature", 14),
        ("student.args.hidden.0", 23),
        ("student.nothing", 20),
    ],
)
def test_a_place_is_found_as_the_line_of_its_deepest_part(place: str, line: int) -> None:
    assert origin(place) == f"r.toml, line {line}"


def test_a_place_that_is_nowhere_has_the_file_alone_and_an_override_is_named() -> None:
    overrides = ("train.epochs=1", "loss.0.use=x")
    assert origin("seed", overrides=overrides) == "r.toml"
    assert origin("", overrides=overrides) == "r.toml"
    assert origin("loss.0.use", overrides=overrides) == "the override loss.0.use=x"
    assert origin("loss.0.use.a", overrides=overrides) == "the override loss.0.use=x"
    assert origin("loss.0", overrides=overrides) == "r.toml, line 9"


MULTILINE = """\
description = '''
[loss]
a = 1
'''
grid = [
    [1, 2],  # x = [

    [3, 4],
]
[[loss]]
use = "kd"
[train.optimizer]
use = "AdamW"
[[loss]]
reads = { student = { a = "x" } }
"""


@pytest.mark.parametrize(
    ("place", "line"),
    [("description", 1), ("grid.1.0", 5), ("loss", 10), ("loss.0.use", 11), ("loss.1.reads.student.b", 15)],
)
def test_statements_of_several_lines_are_found_where_they_begin(place: str, line: int) -> None:
    assert origin(place, MULTILINE) == f"r.toml, line {line}"


def test_in_a_very_long_file_no_line_is_looked_up() -> None:
    assert origin("data.source", TEXT + "#\n" * 100) == "r.toml, line 3"
    assert origin("data.source", TEXT + "#\n" * 10_000) == "r.toml"


def test_leaves_are_values_and_what_is_empty() -> None:
    tree = {"a": {"b": [1, {"c": 2}], "d": {}}, "e": [], "f": ""}
    assert list(leaves(tree)) == [("a.b.0", 1), ("a.b.1.c", 2), ("a.d", {}), ("e", []), ("f", "")]


def test_a_file_gives_its_name_where_it_has_none(tmp_path: Path) -> None:
    path = tmp_path / "my first (recipe).toml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # a byte order mark, as some editors write
    source = recipes.read(path)
    assert source.tree["name"] == "my-first-recipe-"
    assert source.folder == tmp_path.resolve()
    assert recipes.read({"name": "given"}).tree["name"] == "given"


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("train.epochs=5", {"train": {"epochs": 5}}),
        ("a=true", {"a": True}),
        ("a=[1, 2.5]", {"a": [1, 2.5]}),
        ("a=word with spaces", {"a": "word with spaces"}),
        ('a="5"', {"a": "5"}),
        ("a=", {"a": ""}),
        ("a=x=y", {"a": "x=y"}),
        ("a={b=1}", {"a": {"b": 1}}),
        ("a=1\nb=2", {"a": "1\nb=2"}),  # one key, never two
        ("a=" + "[" * 5000, {"a": "[" * 5000}),
        ("a=" + "9" * 5000, {"a": "9" * 5000}),
    ],
)
def test_overrides_take_toml_or_else_text(text: str, tree: dict[str, Any]) -> None:
    made: dict[str, Any] = {}
    override(made, text)
    assert made == tree


def test_overrides_reach_into_arrays_and_replace_in_place() -> None:
    tree: dict[str, Any] = {"loss": [{"use": "kd"}, {"use": "task"}]}
    override(tree, "loss.1.weight=0.5")
    override(tree, "loss.0={use='task'}")
    assert tree == {"loss": [{"use": "task"}, {"use": "task", "weight": 0.5}]}


@pytest.mark.parametrize(
    "text", ["a", "", "=1", ".a=1", "a.=1", "a..b=1", "loss.2.x=1", "loss.-1.x=1", "loss.²=1", "n.x=1"]
)
def test_overrides_that_are_malformed_or_point_nowhere(text: str) -> None:
    with pytest.raises(InputError):
        override({"loss": [{}, {}], "n": 3}, text)


def test_override_errors_say_what_is_there() -> None:
    with pytest.raises(InputError, match="no 7 here") as caught:
        override({"loss": [{}, {}]}, "loss.7.use=kd")
    assert caught.value.allowed == "0, 1"
    with pytest.raises(InputError) as caught:
        override({"loss": []}, "loss.0.use=kd")
    assert caught.value.allowed == "nothing"
    with pytest.raises(InputError) as caught:
        recipes.read({"loss": [{}]}, ["seed=1", "loss.1.use=kd"])
    assert caught.value.source == "the override loss.1.use=kd"
    assert caught.value.hint == "an array is made longer by giving it whole: KEY=[...]"


def test_text_that_is_no_toml_says_what_toml_looks_like(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("name = yes", "utf-8")
    with pytest.raises(InputError, match=r"cannot be read as TOML.*line 1, column 8") as caught:
        recipes.read(tmp_path / "r.toml")
    assert caught.value.hint == 'KEY = VALUE, text in "quotes", true or false, [table]'
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read: UnicodeDecodeError") as caught:
        recipes.read(tmp_path / "r.toml")
    assert caught.value.hint is None


def test_a_mapping_that_was_given_is_never_changed(tiny: dict[str, Any]) -> None:
    before = repr(tiny)
    source = recipes.read(tiny, ["loss.0.weight=7", "train.epochs=9"])
    assert source.tree["loss"][0]["weight"] == 7
    assert repr(tiny) == before


def test_merge_replaces_arrays_and_other_components_and_merges_tables() -> None:
    base = {"train": {"epochs": 1, "lr": 2}, "loss": [1, 2], "router": {"use": "a", "x": 1}, "kept": 3}
    over = {"train": {"lr": 3}, "loss": [9], "router": {"use": "b"}}
    assert merge(base, over) == {
        "train": {"epochs": 1, "lr": 3},
        "loss": [9],
        "router": {"use": "b"},
        "kept": 3,
    }
    assert merge({"router": {"use": "a", "x": 1}}, {"router": {"y": 2}}) == {
        "router": {"use": "a", "x": 1, "y": 2}
    }
    assert base["train"] == {"epochs": 1, "lr": 2}


def test_a_stage_lays_its_tables_over_the_recipes(tiny: dict[str, Any]) -> None:
    tiny["stage"] = [
        {"use": "distill"},
        {"use": "distill", "train": {"epochs": 7}, "loss": [{"use": "task"}]},
    ]
    recipe = parse(tiny)
    assert parse_stage(recipe, recipe.stage[0], "stage.0") is recipe
    view = parse_stage(recipe, recipe.stage[1], "stage.1")
    assert (view.train.epochs, view.train.optimizer.params) == (7, {"lr": 2e-3})
    assert [each.use for each in view.loss] == ["task"]
    places = [place for place, _, _ in recipes.components(recipe)]
    assert places == ["student", "teacher.main", "loss.0", "stage.0", "stage.1", "stage.1.loss.0"]


STAGE_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"train": {"epochs": 0}}, "stage.0.train.epochs"),
    ({"loss": 5}, "stage.0.loss"),
    ({"loss": [{"use": "kdd"}]}, "stage.0.loss.0.use"),
    ({"loss": [{"use": "kd", "teacher": "mian"}]}, "stage.0.loss.0.teacher"),
    ({"train": {"steps": 5}}, "stage.0.train"),
]


@pytest.mark.parametrize(("own", "place"), STAGE_FAULTS)
def test_faults_of_a_stage_have_the_stages_place(
    own: dict[str, Any], place: str, tiny: dict[str, Any]
) -> None:
    tiny["stage"] = [{"use": "distill", **own}]
    with pytest.raises(InputError) as caught:
        recipes.check(recipes.read(tiny))
    assert caught.value.place == place


def test_two_stages_of_one_name(tiny: dict[str, Any]) -> None:
    tiny["stage"] = [{"use": "distill", "name": "a"}, {"use": "collect", "name": "a"}]
    with pytest.raises(InputError, match="two stages") as caught:
        recipes.check(recipes.read(tiny))
    assert caught.value.place == "stage.1.name"


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 200, "a\nb", "ü"])
def test_names_that_become_folders_stay_inside(name: str, tiny: dict[str, Any]) -> None:
    for change in (
        {"name": name},
        {"stage": [{"use": "distill", "name": name}]},
        {"teacher": {name: {"use": "self"}}},
        {"loss": [{"use": "kd", "name": name}]},
    ):
        with pytest.raises(InputError):
            parse({**tiny, **change})


def test_a_name_of_another_form_is_told_the_form_in_words(tiny: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not of this form") as caught:
        parse({**tiny, "name": "a b"})
    assert caught.value.allowed == "a letter or digit, then letters, digits, _, - and ."


def test_a_teacher_may_not_take_the_students_name(tiny: dict[str, Any]) -> None:
    tiny["teacher"]["student"] = {"use": "self"}
    with pytest.raises(InputError) as caught:
        recipes.check(recipes.read(tiny))
    assert caught.value.place == "teacher.student"


def test_a_teachers_own_training_is_checked_and_its_budget_replaces_the_recipes(tiny: dict[str, Any]) -> None:
    recipe = parse(tiny)
    trained = recipes.teacher_train(recipe, "main")
    assert (trained.epochs, trained.steps, trained.optimizer.params) == (1, None, {"lr": 2e-3})
    recipe = parse({**tiny, "teacher": {"main": {"use": "self", "train": {"steps": 3}}}})
    assert (recipes.teacher_train(recipe, "main").epochs, recipes.teacher_train(recipe, "main").steps) == (
        None,
        3,
    )
    for own, place in (
        ({"epoks": 1}, "teacher.main.train.epoks"),
        ({"epochs": -1}, "teacher.main.train.epochs"),
    ):
        tiny["teacher"]["main"]["train"] = own
        with pytest.raises(InputError) as caught:
            recipes.check(recipes.read(tiny))
        assert caught.value.place == place


def test_a_teachers_training_is_of_one_length(tiny: dict[str, Any]) -> None:
    tiny["teacher"]["main"]["train"] = {"epochs": 1, "steps": 2}
    with pytest.raises(InputError, match="both given") as caught:
        parse(tiny)
    assert caught.value.place == "teacher.main.train"


def test_a_ramp_goes_from_begin_to_until() -> None:
    ramp = Ramp(start=0.0, end=2.0, begin=0.25, until=0.75)
    assert [ramp.at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.0, 1.0, 2.0, 2.0]


def test_a_ramp_that_ends_before_it_begins(tiny: dict[str, Any]) -> None:
    tiny["loss"][0]["weight"] = {"start": 0.0, "end": 1.0, "begin": 0.8, "until": 0.2}
    with pytest.raises(InputError, match="before until") as caught:
        parse(tiny)
    assert caught.value.place == "loss.0.weight"


def test_a_misspelt_key_of_a_ramp_is_found_inside_the_union(tiny: dict[str, Any]) -> None:
    tiny["loss"][0]["weight"] = {"start": 0.0, "ed": 1.0}
    with pytest.raises(InputError) as caught:
        parse(tiny)
    assert caught.value.place == "loss.0.weight.ed"
    assert caught.value.hint == "did you mean 'end'?"
    tiny["loss"][0]["weight"] = "high"
    with pytest.raises(InputError) as caught:
        parse(tiny)
    assert (caught.value.place, caught.value.allowed) == ("loss.0.weight", "a valid number or a table")


def test_a_number_out_of_range_is_not_called_a_wrong_type(tiny: dict[str, Any]) -> None:
    tiny["data"]["batch_size"] = 0
    with pytest.raises(InputError, match="out of range") as caught:
        parse(tiny)
    assert (caught.value.place, caught.value.allowed) == ("data.batch_size", "greater than 0")


def test_choices_name_the_nearest(tiny: dict[str, Any]) -> None:
    tiny["train"]["precision"] = "bfl6"
    with pytest.raises(InputError) as caught:
        parse(tiny)
    assert caught.value.place == "train.precision"
    assert caught.value.hint == "did you mean 'bf16'?"
    assert "fp32, bf16, fp16" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1"])
def test_numbers_are_finite_numbers(value: object, tiny: dict[str, Any]) -> None:
    tiny["train"]["clip"] = value
    with pytest.raises(InputError) as caught:
        parse(tiny)
    assert caught.value.place == "train.clip"


def test_the_recipes_of_a_plugin_are_its_packages_toml_files(install: Callable[..., Any]) -> None:
    assert [p.name for p in recipes.recipes_of("pld")] == ["digits.toml"]
    assert recipes.recipes_of("kdcore") == []  # the catalogue beside it is no recipe
    install("single", "x = 1")  # a module without a folder of its own
    assert recipes.recipes_of("single") == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("a" * 5000, "no such recipe"),
        ("~nobody_of_this_name/r.toml", "no such recipe"),
        ("swing", "planned"),
        ("swing:digits", "planned"),
        ("pdl", "did you mean 'pld'?"),
        ("kdcore", "brings no recipe"),
        ("nul\0byte", "no such recipe"),
    ],
)
def test_recipes_that_are_not_there(
    where: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        recipes.read(where)
    assert words in str(caught.value)


def test_a_plugins_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pld").mkdir()
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Path(recipes.read("pld").path).name == "digits.toml"
    with pytest.raises(InputError, match="a folder, not a recipe"):
        recipes.read("plain")


def test_of_several_recipes_the_first_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path(recipes.read("classics").path).name == "at.toml"
    assert "classics has several recipes (at, crd, dist, dkd" in capsys.readouterr().err
    recipes.read("classics:dkd")
    recipes.read("pld")
    assert capsys.readouterr().err == ""


def test_a_recipe_of_a_plugin_in_quarantine(install: Callable[..., Any]) -> None:
    install("broken", "raise RuntimeError('on purpose')")
    with pytest.raises(InputError, match="quarantine"):
        recipes.read("broken:digits")


def test_a_mapping_that_cannot_be_copied() -> None:
    import threading

    with pytest.raises(InputError, match="cannot be copied"):
        recipes.read({"data": threading.Lock()})
