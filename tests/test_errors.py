"""Errors are one screen: place, problem, file, value, what is allowed, a hint; nothing a terminal obeys."""

from __future__ import annotations

import re

import pytest

from kdcore.errors import InputError, Interrupted, KDError, RunError, cause, nearest


def test_an_input_error_shows_place_value_allowed_and_hint() -> None:
    error = InputError(
        "loss.0.use", "unknown loss 'kdd'", given="kdd", allowed=["kd", "task"], hint="did you mean 'kd'?"
    )
    error.source = "r.toml, line 3"
    assert str(error).splitlines() == [
        "loss.0.use: unknown loss 'kdd'",
        "  in      r.toml, line 3",
        "  given   'kdd'",
        "  allowed kd, task",
        "  hint    did you mean 'kd'?",
    ]


def test_the_nearest_of_the_allowed_names_is_the_hint_of_a_wrong_one() -> None:
    assert InputError("use", "unknown", given="kdd", allowed=["task", "kd"]).hint == "did you mean 'kd'?"
    assert InputError("use", "unknown", given="kdd", allowed=["task", "kd"], hint="no").hint == "no"
    assert InputError("use", "unknown", given="kdd", allowed="kd").hint is None  # a sentence, not names
    assert InputError("use", "unknown", given=3, allowed=["3a"]).hint is None


def test_what_a_part_raises_gets_the_place_of_the_part() -> None:
    assert InputError("width", "wrong").under("student").under("stage.0").place == "stage.0.student.width"
    assert InputError("", "wrong").under("student").place == "student"
    assert InputError("width", "wrong").under("").place == "width"


def test_rows_without_content_are_left_out_but_an_empty_string_or_none_that_was_given_is_shown() -> None:
    assert str(InputError("", "the recipe is empty")) == "the recipe is empty"
    assert "given   ''" in str(InputError("name", "too short", given=""))
    assert "given   None" in str(InputError("name", "missing", given=None))
    assert "allowed" not in str(InputError("name", "missing", allowed=[]))


@pytest.mark.parametrize("kind, code", [(InputError, 2), (RunError, 1), (KDError, 1), (Interrupted, 3)])
def test_exit_codes(kind: type[KDError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, KDError)


def test_everything_huge_stays_on_one_screen() -> None:
    error = InputError(
        "k" * 10_000,
        "line\n" * 500 + "x" * 10_000,
        given=["v" * 10_000],
        allowed=(f"name-{i}" for i in range(10_000)),
        hint="h\n" * 1000,
    )
    error.source = "p" * 100_000
    text = str(error)
    assert len(text.splitlines()) < 20
    assert len(text) < 6_000
    assert "name-0, name-1" in text
    assert "name-9999" not in text
    assert "..." in text


def test_no_control_character_reaches_the_terminal() -> None:
    text = str(InputError("a\x1b[2J\nb", "bad \x07 \ud800", given="\x1b", allowed="x\ry", hint="\u202e"))
    assert re.findall(r"[^\x20-\x7e\n]", text) == []
    assert text.splitlines()[0].startswith(r"a\x1b[2J b: bad")
    text.encode("utf-8")  # lone surrogates would raise here


def test_a_value_that_cannot_show_itself_is_named_by_its_type() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert "<Silent>" in str(InputError("x", "bad", given=Silent()))
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert "<list>" in str(InputError("x", "bad", given=deep))


def test_of_many_allowed_names_those_nearest_to_what_was_given_are_shown() -> None:
    names = [f"loss-{i}" for i in range(40)] + ["taid"]
    assert InputError("use", "unknown", given="tiad", allowed=names).allowed.startswith("taid, ")
    assert InputError("use", "unknown", given="zzz", allowed=names).allowed.endswith(
        "loss-11, ... (41 in all)"
    )
    assert InputError("use", "unknown", given="zzz", allowed=names[:12]).allowed.endswith("loss-11")


def test_nearest_finds_a_misspelling_and_nothing_where_nothing_is_near() -> None:
    assert nearest("temprature", ["weight", "temperature"]) == "did you mean 'temperature'?"
    assert nearest("zzz", ["weight", "temperature"]) is None
    assert nearest("a" * 1_000_000, ["a" * 999_999]) is None
    assert nearest("mine", ["mmengine"], cutoff=0.8) is None
    assert nearest("sgd", ["Adagrad", "SGD"]) == "did you mean 'SGD'?"
    assert nearest(50, ["500", "weight"]) == "did you mean '500'?"


def test_a_word_that_is_a_part_of_dotted_names_means_any_of_them() -> None:
    assert nearest("DKD", ["pkd", "classics.dkd"]) == "did you mean 'classics.dkd'?"
    assert (
        nearest("act", ["layer1.act", "layer0.act", "act0"]) == "did you mean 'layer0.act' or 'layer1.act'?"
    )


def test_cause_is_one_line_even_for_an_exception_whose_message_fails() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert cause(ValueError("first\n  second")) == "ValueError: first second"
    assert cause(SystemExit()) == "SystemExit"
    assert cause(BrokenError()) == "BrokenError"
    assert len(cause(ValueError("x" * 5000))) < 330
