"""The signature is the schema: parameters, tensors, nested kinds, callables, and annotations that do not resolve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from kdcore import kinds
from kdcore.errors import InputError
from kdcore.signature import import_string, schema_of

if TYPE_CHECKING:
    from decimal import Decimal as Nowhere


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    kind: Literal["forward", "reverse"] = "forward",
) -> Tensor:
    """A loss."""
    return student_logits


def refused(function: Callable[..., Any], **given: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        schema_of(function, "thing").validate(given, "loss.0")
    return caught.value


def test_of_a_loss_function_the_positional_arguments_are_tensors() -> None:
    schema = schema_of(loss, "mine", is_loss=True)
    assert schema.tensors == ("student_logits", "teacher_logits", "mask")
    assert list(schema.params) == ["temperature", "kind"]
    assert (schema.open, schema.doc) == (False, "A loss.")


def test_a_parameter_of_a_loss_function_that_is_not_keyword_only_is_refused() -> None:
    def trap(student_logits: Tensor, temperature: float = 4.0) -> Tensor:
        return student_logits * temperature

    with pytest.raises(InputError, match=r"'temperature' has a default.*follow a \*"):
        schema_of(trap, "trap", is_loss=True)
    assert schema_of(trap, "trap").params["temperature"].default == 4.0  # no loss: all are parameters


def test_of_a_class_the_arguments_of_its_init_are_parameters() -> None:
    class Thing(nn.Module):
        def __init__(self, width: int, *, depth: int = 2) -> None:
            super().__init__()

    schema = schema_of(Thing, "thing", is_loss=True)
    assert (list(schema.params), schema.tensors) == (["width", "depth"], ())
    assert schema.validate({"width": 3}, "x") == {"width": 3}  # defaults stay the callable's
    error = refused(Thing, depth=3)
    assert (error.place, error.problem) == ("loss.0.width", "thing needs 'width'")


@pytest.mark.parametrize("patched", [False, True])
def test_a_class_without_an_init_takes_nothing(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if patched:  # as libraries that defer initialisation do
        original = nn.Module.__init__
        monkeypatch.setattr(nn.Module, "__init__", lambda self, *args, **kwargs: original(self))

    class Plain:
        pass

    class Module(nn.Module):
        pass

    for cls in (Plain, Module, kinds.Augmentation):
        assert schema_of(cls, "thing").validate({}, "x") == {}
        assert "unknown parameter" in refused(cls, width=3).problem


def test_unknown_parameters_name_the_nearest_and_what_is_allowed() -> None:
    error = refused(lambda *, temperature=1.0, width=2: 0, temprature=2)
    assert (error.place, error.allowed) == ("loss.0.temprature", "temperature, width")
    assert error.hint == "did you mean 'temperature'?"


def test_a_callable_that_takes_any_keyword_is_open_and_still_checks_what_it_names() -> None:
    def anything(*, width: int = 1, **rest: Any) -> None: ...

    assert schema_of(anything, "x").validate({"copy": 1, "model_dump": "y"}, "p") == {
        "copy": 1,
        "model_dump": "y",
    }
    assert refused(anything, width="wide").place == "loss.0.width"


class Own(kinds.Loss):
    """A kind that a plugin derived."""


@dataclass
class Size:
    height: int
    width: int = 1


class Options(BaseModel):
    rate: float = 0.5


def typed(
    *,
    a: float = 0.0,
    b: tuple[int, ...] = (),
    c: Path | None = None,
    d: dict[str, list[float]] | None = None,
    e: Size | None = None,
    f: Options | None = None,
    g: set[str] | None = None,
    h: tuple[int, int] | None = None,
) -> None: ...


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"a": 1}, 1.0),
        ({"b": [1, 2]}, (1, 2)),
        ({"b": []}, ()),
        ({"c": "weights.pt"}, Path("weights.pt")),
        ({"d": {"x": [1, 2.5]}}, {"x": [1.0, 2.5]}),
        ({"e": {"height": 3}}, Size(3)),
        ({"f": {"rate": 1}}, Options(rate=1.0)),
        ({"g": ["x", "x"]}, {"x"}),
    ],
)
def test_what_toml_cannot_write_is_taken_as_json_has_it(given: dict[str, Any], made: Any) -> None:
    (value,) = schema_of(typed, "typed").validate(given, "x").values()
    assert value == made
    assert type(value) is type(made)


@pytest.mark.parametrize(
    ("given", "place", "allowed"),
    [
        ({"a": "1"}, "loss.0.a", "a valid number"),
        ({"a": True}, "loss.0.a", "a valid number"),
        ({"a": float("nan")}, "loss.0.a", "a finite number"),
        ({"b": [1, "x"]}, "loss.0.b.1", "a valid integer"),
        ({"b": [1.5]}, "loss.0.b.0", "a valid integer"),
        ({"b": 3}, "loss.0.b", "a valid array"),
        ({"d": {"x": ["y"]}}, "loss.0.d.x.0", "a valid number"),
        ({"e": {"hight": 3}}, "loss.0.e.height", None),
        ({"f": {"rate": "x"}}, "loss.0.f.rate", "a valid number"),
        ({"h": [1]}, "loss.0.h.1", None),
    ],
)
def test_what_does_not_fit_has_its_deepest_place(given: Any, place: str, allowed: str | None) -> None:
    error = refused(typed, **given)
    assert error.place == place
    if allowed:
        assert error.allowed == allowed
    assert len(str(error).splitlines()) < 8


def test_ranges_say_their_bound() -> None:
    def ranged(
        *, a: Annotated[int, Field(ge=1, le=4)] = 1, b: Annotated[float, Field(lt=1)] = 0.0
    ) -> None: ...

    assert (refused(ranged, a=0).problem, refused(ranged, a=0).allowed) == (
        "out of range",
        "greater than or equal to 1",
    )
    assert refused(ranged, a=5).allowed == "less than or equal to 4"
    assert refused(ranged, b=1).allowed == "less than 1"


@pytest.mark.parametrize(
    "name", ["copy", "model_dump", "json", "_private", "schema", "self_", "validate", "fields"]
)
def test_parameters_may_have_names_that_pydantic_uses(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def f(*, {name}: int = 3): return {name}", scope)
    schema = schema_of(scope["f"], "f")
    assert schema.validate({name: 5}, "x") == {name: 5}
    assert refused(scope["f"], **{name: "x"}).place == f"loss.0.{name}"
    assert list(schema.model.model_json_schema()["properties"]) == [name]


def test_an_annotation_that_does_not_resolve_leaves_the_others_checked() -> None:
    def partly(x: Nowhere, *, temperature: float = 1.0, y: Nowhere | None = None) -> None: ...

    assert schema_of(partly, "partly").validate({"x": object, "y": [1]}, "p") == {"x": object, "y": [1]}
    assert refused(partly, x=1, temperature="hot").place == "loss.0.temperature"


def test_annotations_that_are_nonsense_or_third_party_types() -> None:
    def odd(*, a: "not a type" = 1, b: torch.dtype = torch.float32, c: 3 = 4) -> None: ...  # type: ignore  # noqa: F722

    schema = schema_of(odd, "odd")
    assert schema.validate({"a": "x"}, "p") == {"a": "x"}
    assert refused(odd, b="float32").place == "loss.0.b"


def test_nested_kinds_and_callables_are_known_through_unions_arrays_and_subclasses() -> None:
    def outer(
        *,
        inner: kinds.Loss,
        maybe: kinds.Student | None = None,
        many: list[kinds.Loss] = [],  # noqa: B006
        some: Sequence[kinds.Router] = (),
        own: Own | None = None,
        f: Callable[[kinds.Loss], int] | None = None,
        g: Annotated[Callable[..., Any], "x"] = print,
        n: int = 1,
    ) -> None: ...

    schema = schema_of(outer, "outer")
    found = {name: schema.made(name) for name in schema.params}
    assert found == {
        "inner": "loss",
        "maybe": "student",
        "many": "loss",
        "some": "router",
        "own": "loss",
        "f": "callable",
        "g": "callable",
        "n": None,
    }
    table = {"use": "kd"}
    given = {"inner": table, "many": [table, "@main"], "own": table, "g": "os.path:join"}
    assert schema.validate(given, "p") == given


def test_a_callable_whose_signature_cannot_be_read() -> None:
    with pytest.raises(InputError, match="signature cannot be read"):
        schema_of(5, "five")  # type: ignore[arg-type]


def test_wrapped_functions_show_what_they_wrap() -> None:
    import functools

    @functools.wraps(loss)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return loss(*args, **kwargs)

    assert list(schema_of(wrapper, "w", is_loss=True).params) == ["temperature", "kind"]
    assert refused(functools.partial(typed, a=2.0), a="x").place == "loss.0.a"


def test_import_strings() -> None:
    assert import_string("os.path:join", "p") is __import__("os").path.join
    assert import_string("pathlib:Path.cwd", "p")() == Path.cwd()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("os.path", "not an import string"),
        (":join", "not an import string"),
        ("", "not an import string"),
        (5, "not an import string"),
        (None, "not an import string"),
        ("kdcore.zoo:mpl", "did you mean 'mlp'?"),
        ("kdcore.zo:mlp", "did you mean 'kdcore.zoo'?"),
        ("torchmetrix:Accuracy", "did you mean 'torchmetrics'?"),
        ("kdcore.zoo.deep:mlp", "cannot import"),
        ("no such:thing", "cannot import"),
        (".zoo:mlp", "cannot import"),
        ("a\0b:c", "cannot import"),
    ],
)
def test_import_strings_that_lead_nowhere(text: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        import_string(text, "student.model")
    assert caught.value.place == "student.model"
    assert words in str(caught.value)


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(3)", "import no_such_module_anywhere", "x ="])
def test_a_module_that_fails_at_import_is_an_input_error(code: str, write_module: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="cannot import"):
        import_string(f"{write_module(code)}:f", "p")


def test_a_module_whose_attributes_raise(write_module: Callable[..., str]) -> None:
    module = write_module("def __getattr__(name):\n    raise RuntimeError('lazily broken')")
    with pytest.raises(InputError, match="lazily broken"):
        import_string(f"{module}:f", "p")
