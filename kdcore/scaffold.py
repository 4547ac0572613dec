"""``kd plugin new``: a plugin of the standard form that passes its own tests at once."""

from __future__ import annotations

import re
from pathlib import Path

from kdcore import catalog, plugins
from kdcore.errors import InputError, nearest

PYPROJECT = """[build-system]
requires = ["flit_core>=3.12,<5"]
build-backend = "flit_core.buildapi"

[project]
name = "kd-plugin-{slug}"
dynamic = ["version", "description"]
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["kdcore>=0.1"]
entry-points.kdcore.{slug} = "{module}"
"""
INIT = '''"""{title}: one line that says what it does."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl

__version__ = "0.1.0"


@hookimpl
def kd_{hook}() -> Iterator[Component]:
    yield Component(
        "{slug}",
        "{module}.{kind}:{target}",
        summary="what it does, in a line",
    )
'''
README = """# kd-plugin-{slug}
Paper, authors, venue, link.

**Claim.** What it is said to do.

## The method
Formula.

## Use
`kd run {slug}:digits` runs the recipe that ships.

## Evidence
Matched baselines, seeds, numbers, and where the claim did not show.
"""
RECIPE = """name = "{slug}"

[data]
source = "kdcore.datasets:digits"
args = {{ labels = 200, flat = true }}
batch_size = 32

[teacher.main]
{teacher}
[student]
{student}
{extra}
[train]
epochs = 20
optimizer = {{ use = "AdamW", lr = 3e-3 }}
"""
MODULE = 'use = "module"\nmodel = "kdcore.zoo:mlp"\nargs.hidden = [{width}]\n'
KD = '[[loss]]\nuse = "kd"\n'
# kind -> target, code, test
CODE = {
    "loss": (
        "{name}_loss",
        '''from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import conventions


@conventions(zero_at_teacher=True)
def {name}_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Annotated[float, Field(gt=0)] = 2.0
) -> Tensor:
    """T^2 KL(p || q) of each row: logits [..., C] of both, returns [...]. Replace it by the paper's formula."""
    log_q = F.log_softmax(student_logits.float() / temperature, -1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2
''',
        """    # p = (.9, .1), q = (.5, .5): KL = 0.9 ln 1.8 + 0.1 ln 0.2 = 0.36806
    loss = build("loss", "{slug}", temperature=1.0)
    teacher, student = Outputs(logits=torch.tensor([[math.log(9.0), 0.0]])), Outputs(logits=torch.zeros(1, 2))
    assert loss(student, teacher, Batch()).item() == pytest.approx(0.36806, abs=1e-5)
""",
    ),
    "teacher": (
        "{cls}Teacher",
        '''from __future__ import annotations

from torch import nn

from kdcore import Batch, Outputs, Teacher


class {cls}Teacher(Teacher):
    """A linear teacher of ``inputs`` numbers and ``classes`` classes. Replace it by the method's own."""

    def __init__(self, *, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.head(batch["input"].flatten(1)))
''',
        """    teacher = build("teacher", "{slug}")
    assert teacher(Batch({{"input": torch.zeros(3, 64)}})).logits.shape == (3, 10)
""",
    ),
    "student": (
        "{cls}Student",
        '''from __future__ import annotations

from torch import Tensor, nn

from kdcore import Batch, Outputs, Student


class {cls}Student(Student):
    """A linear student of ``inputs`` numbers and ``classes`` classes. Replace it by the method's own."""

    def __init__(self, *, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.head(batch["input"].flatten(1)))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the exported graph takes."""
        return {{"input": batch["input"]}}
''',
        """    student = build("student", "{slug}")
    x = torch.randn(3, 64)
    batch = Batch({{"input": x}})
    assert torch.equal(student.deploy()(x)["logits"], student.infer(student(batch))["logits"])
""",
    ),
    "router": (
        "{cls}Router",
        '''from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcore import Batch, Outputs, Router


class {cls}Router(Router):
    """Weights [B,K] by the teachers' confidence, summing to 1. Replace it by the method's own."""

    def forward(self, batch: Batch, student: Outputs, teachers: Mapping[str, Outputs]) -> Tensor:
        sure = [teacher["logits"].softmax(-1).amax(-1) for teacher in teachers.values()]
        weights = torch.stack(sure, -1)
        return weights / weights.sum(-1, keepdim=True)
''',
        """    router = build("router", "{slug}")
    teachers = {{"a": Outputs(logits=torch.zeros(2, 4)), "b": Outputs(logits=torch.tensor([[9.0, 0, 0, 0]] * 2))}}
    weights = router(Batch(), Outputs(logits=torch.zeros(2, 4)), teachers)
    assert weights.shape == (2, 2)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert (weights[:, 1] > weights[:, 0]).all()
""",
    ),
    "augmentation": (
        "{cls}",
        '''from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from kdcore import Augmentation, Batch


class {cls}(Augmentation):
    """Gaussian noise of standard deviation ``scale`` on ``input``. Replace it by the method's own."""

    def __init__(self, *, scale: Annotated[float, Field(ge=0)] = 0.1) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, batch: Batch) -> Batch:
        changed = batch.copy()
        noise = torch.randn(batch["input"].shape, generator=self.run.generator)
        changed["input"] = batch["input"] + self.scale * noise.to(batch["input"])
        return changed
''',
        """    recipe = Path(__file__).parent / "{module}" / "digits.toml"
    plain = kdcore.run(recipe, overrides=["train.epochs=1", "augmentation.0.scale=0.0"], out=tmp_path / "plain")
    noisy = kdcore.run(recipe, overrides=["train.epochs=1", "augmentation.0.scale=5.0"], out=tmp_path / "noisy")
    assert plain.results["student"]["metrics"] != noisy.results["student"]["metrics"]
""",
    ),
}
TEST = '''"""Tests of kd-plugin-{slug}: replace the expected values by the authors' code's, or a closed form."""

from __future__ import annotations

{imports}


def test_{name}({fixture}) -> None:
{body}

def test_the_recipe_that_ships_is_valid() -> None:
    kdcore.check(Path(__file__).parent / "{module}" / "digits.toml")
'''


def write(slug: str, kind: str, into: Path) -> Path:
    """Write the plugin's folder below ``into``; InputError for a bad slug, kind, or a folder that exists."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise InputError(
            "slug", "not a slug", given=slug, allowed="lower case letters, digits, single hyphens"
        )
    if kind not in CODE:
        raise InputError("--kind", "no such kind", given=kind, allowed=sorted(CODE), hint=nearest(kind, CODE))
    if any(entry.name == slug for entry in plugins.registry().entries):
        raise InputError("slug", "a plugin of this name is installed", given=slug, hint="choose another")
    folder = into / slug
    if folder.exists():
        raise InputError(str(folder), "exists already", hint="another --into, or another slug")
    for path, text in _files(slug, kind).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
    return folder


def _files(slug: str, kind: str) -> dict[str, str]:
    name = slug.replace("-", "_")
    names = {"slug": slug, "name": name, "module": f"kd_plugin_{name}", "kind": kind, "hook": _plural(kind)}
    names["cls"] = "".join(part.capitalize() for part in slug.split("-"))
    names["title"] = (catalog.method(slug) or {}).get("title", names["cls"]).partition(":")[0]
    target, code, body = CODE[kind]
    names["target"] = target.format(**names)
    body = body.format(**names)
    docstring = f'"""{names["title"]}: the method, reading like its paper."""\n\n'
    return {
        "pyproject.toml": PYPROJECT.format(**names),
        "README.md": README.format(**names),
        f"{names['module']}/__init__.py": INIT.format(**names),
        f"{names['module']}/{kind}.py": docstring + code.format(**names),
        f"{names['module']}/digits.toml": _recipe(slug, kind),
        f"test_{name}.py": _test(body, names),
    }


def _plural(kind: str) -> str:
    return "losses" if kind == "loss" else f"{kind}s"


def _recipe(slug: str, kind: str) -> str:
    own = f'use = "{slug}"\n'
    teacher, student = MODULE.format(width=64) + "train.epochs = 10\n", MODULE.format(width=8)
    extra = {
        "loss": f"[[loss]]\n{own}",
        "router": f"[teacher.other]\n{teacher}\n[router]\n{own}\n{KD}",
        "augmentation": f"[[augmentation]]\n{own}\n{KD}",
    }.get(kind, KD)
    return RECIPE.format(
        slug=slug,
        teacher=own if kind == "teacher" else teacher,
        student=own if kind == "student" else student,
        extra=extra,
    )


def _test(body: str, names: dict[str, str]) -> str:
    """The test's file with just the imports that its body needs."""
    groups = [
        [*(["import math"] if "math." in body else []), "from pathlib import Path"],
        [f"import {each}" for each in ("pytest", "torch") if f"{each}." in body],
    ]
    light = [each for each in ("Batch", "Outputs") if each in body]
    ours = ["import kdcore", *([f"from kdcore import {', '.join(light)}"] if light else [])]
    if "build(" in body:
        ours.append("from kdcore.api import build")
    text = "\n\n".join("\n".join(group) for group in [*groups, ours] if group)
    fixture = "tmp_path: Path" if "tmp_path" in body else ""
    return TEST.format(**names, imports=text, fixture=fixture, body=body.rstrip() + "\n")
