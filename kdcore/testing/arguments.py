"""What a component is called with: its own sample, or what its plugin's recipes or toy recipes give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kdcore import recipe
from kdcore.building import Builder
from kdcore.errors import cause
from kdcore.tables import Recipe
from kdcore.testing import toys
from kdcore.testing.findings import Failed
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import NATIVE, mapped

NAMES = {"loss": ("student", "teacher", "batch"), "router": ("batch", "student", "teachers")}
_FORMS: tuple[toys.Form, ...] = ("image", "tokens", "flat", "colour", "dense")
_WIDTHS = r"dim|width|feature|channel|embed|hidden"
Attempt = tuple[str, Callable[[], list[Call]]]


def find(s: Subject) -> None:
    """Give a subject the run, parameters and calls with which it answers; Failed says what was tried."""
    tried = []
    for title, attempt in _attempts(s):
        try:
            s.calls = attempt()
            return
        except Exception as error:  # a component may raise anything on what it was not made for
            tried.append(f"{title}: {cause(error, 200)}")
    raise Failed("; ".join(dict.fromkeys(tried)))


def _attempts(s: Subject) -> Iterator[Attempt]:
    """The ways to call it, the likeliest first."""
    own = getattr(s.target, "conformance_sample", {})
    sample = dict(own() if callable(own) else own)
    params = sample.pop("params", {})
    if sample:
        yield "conformance_sample", partial(_own, s, sample, params)
    wants = " ".join(s.schema.tensors or getattr(s.target, "reads", ()))
    named = {name for _, name in re.findall(r"\b(student|teacher)[._](\w+)", wants)}
    of_logits = s.kind in NAMES and named <= {*NATIVE}
    forms = _FORMS if s.kind != "loss" or of_logits else _forms(wants)
    toy = [(f"toy {form}", partial(_toy, s, form, params, of_logits)) for form in forms]
    views = ((path, view) for path in s.plugin.recipes for view in toys.views(recipe.read(path).tree))
    real = ((path.name, partial(_within, s, view)) for path, view in views)
    yield from chain(toy, real) if of_logits else chain(real, toy)


def _forms(wants: str) -> tuple[toys.Form, ...]:
    """Vectors, maps or sequences: what layers of these names are likeliest to give comes first."""
    if re.search(r"hidden|token|sequence|patch|state", wants):
        return "tokens", "image", "flat"
    maps = re.search(r"feat|map|conv|layer|stage|block|attn|attention", wants)
    return ("image", "flat", "tokens") if maps else ("flat", "image", "tokens")


# ---- the attempts: each settles the subject, and raises where it does not answer ----------------------


def _own(s: Subject, sample: Mapping[str, Any], params: Mapping[str, Any]) -> list[Call]:
    s.settle(toys.Home(recipe.parse(toys.tree("image")), s.folder), params)
    return [_answered(s, {name: sample.get(name) for name in NAMES.get(s.kind, ("batch",))})]


def _within(s: Subject, view: Recipe) -> list[Call]:
    """With what the core gives it in a step of a recipe that names it."""
    home, params, args = _seen(s, view)
    s.settle(home, params)
    return [_answered(s, args)]


def _toy(s: Subject, form: toys.Form, given: Mapping[str, Any], of_logits: bool) -> list[Call]:
    """In a toy recipe, with random numbers for what its models say; of a loss that works on tokens, on them too."""
    params = _params(s, form, given)
    if s.kind == "loss":
        home, params, args = _seen(s, _with_loss(s, form, params))
        s.settle(home, params)
    else:
        s.settle(toys.Home(recipe.parse(toys.tree(form)), s.folder), params)
        args = s.home.plain(s.kind)
    calls = [_answered(s, _random(args))]
    if s.kind == "loss" and of_logits and form != "tokens":
        with suppress(Exception):  # not made for tokens
            *_, args = _seen(s, _with_loss(s, "tokens", _params(s, "tokens", given)))
            terms = s.answer(call := Call(_random(args))).values()
            calls += [call] if s.declares_tokens or any(t.shape == (toys.B, toys.L) for t in terms) else []
    return calls


# ---- their parts --------------------------------------------------------------------------------------


def _seen(s: Subject, view: Recipe) -> tuple[toys.Home, dict[str, Any], dict[str, Any]]:
    """A run of a recipe, the component's parameters in it, and its arguments in a step; LookupError without."""
    names, found = (s.component.name, s.name), recipe.components(view)
    place, params = next(((p, t.params) for p, k, t in found if k == s.kind and t.use in names), ("", {}))
    if not place:
        raise LookupError(f"no stage of it names {s.component.name}")
    home = toys.Home(view, s.folder)
    args = home.seen(home.at(place))
    return home, params, dict(zip(NAMES.get(s.kind, ("batch",)), args, strict=True))


def _with_loss(s: Subject, form: toys.Form, params: Mapping[str, Any]) -> Recipe:
    loss = Builder(0).make("loss", s.name, params, s.name)
    return recipe.parse(toys.with_loss(form, {"use": s.name, **params}, loss))


def _answered(s: Subject, args: dict[str, Any]) -> Call:
    call = Call(args)
    s.answer(call)
    return call


def _random(args: dict[str, Any]) -> dict[str, Any]:
    """Random numbers for what models say: untrained ones say nearly the same of every sample."""
    generator = torch.Generator().manual_seed(0)

    def change(path: str, tensor: Tensor) -> Tensor:
        kept = path.startswith("batch") or not tensor.is_floating_point()
        return tensor if kept else 2 * torch.randn(tensor.shape, generator=generator)

    return mapped(args, change)


def _params(s: Subject, form: toys.Form, given: Mapping[str, Any]) -> dict[str, Any]:
    """The toy's parameters where none are given: of what is required, and of every count of classes or teachers."""
    found, table = dict(given), toys.model_table(form)
    for name, parameter in s.schema.params.items():
        required, made = parameter.default is parameter.empty, s.schema.made(name)
        size = _counted(s, name, form) or (toys.D if required and re.search(_WIDTHS, name) else None)
        if name in found or not (required or (size and type(parameter.default) is int)):
            continue
        if made in ("student", "teacher"):
            found[name] = table
        elif name == "model" and made == "callable":
            found |= {"model": table["model"], "args": table["args"]}
        elif size is None:
            raise LookupError(f"no value for the parameter {name!r}")
        else:
            found[name] = size
    return found


def _counted(s: Subject, name: str, form: toys.Form) -> int | None:
    """How many classes, or of a router teachers, the toy has, where a parameter's name asks for that."""
    if re.search(r"(^|_)class(es)?$|vocab", name):
        return toys.V if form == "tokens" else toys.C
    return len(toys.TEACHERS) if s.kind == "router" and re.search(r"teachers|experts|^count$", name) else None
