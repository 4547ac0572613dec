"""Conformance of routers and augmentations: good ones pass, planted faults are caught by the check of their name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kdcore.testing import Finding, check_plugin

INIT = '''"""A planted component."""
from kdcore import Component, hookimpl

@hookimpl
def kd_{kind}s():
    yield Component("planted", "kd_plugin_planted.part:Planted", "a planted {kind}")
'''
PROJECT = (
    '[project]\nname = "kd-plugin-planted"\n[project.entry-points.kdcore]\nplanted = "kd_plugin_planted"\n'
)
HEAD = """import torch
from torch import Tensor, nn
from kdcore import Augmentation, Batch, Outputs, Router, Student, Teacher
"""
ROUTER = '''
class Planted(Router):
    """Weights by each teacher's confidence; teachers run where the student is unsure."""

    def __init__(self, *, sharpness: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(sharpness))
        self.calls = 0

    def plan(self, batch: Batch, student: Outputs) -> Tensor:
        return torch.ones(len(batch), len(self.run.teachers), dtype=torch.bool)

    def forward(self, batch: Batch, student: Outputs, teachers: dict[str, Outputs]) -> Tensor:
        sure = torch.stack([o.logits.log_softmax(-1).amax(-1) for o in teachers.values()], -1)
        return (self.scale * sure).softmax(-1)
'''
AUGMENTATION = '''
class Planted(Augmentation):
    """Each sample mixed with another one, by a share drawn in this step."""

    def __init__(self, *, strength: float = 0.2) -> None:
        super().__init__()
        self.strength = strength

    def draw(self, size: int, epoch: int) -> Tensor:
        return torch.randperm(size, generator=self.run.rng(f"block {epoch}"))

    def forward(self, batch: Batch) -> Batch:
        share = torch.rand(len(batch), generator=self.run.generator) * self.strength
        share = share.view(-1, *[1] * (batch["input"].dim() - 1))
        new = batch.copy()
        new["input"] = (1 - share) * batch["input"] + share * batch["input"].roll(1, 0)
        return new
'''
GATE = '''
class Planted(Router):
    """A softmax of the student's logits, for fixed counts of classes and teachers."""

    def __init__(self, *, classes: int = 10, count: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(classes, count)

    def forward(self, batch: Batch, student: Outputs, teachers: dict[str, Outputs]) -> Tensor:
        return self.gate(student["logits"].detach()).softmax(-1)
'''
CODE = {"gate": GATE, "router": ROUTER, "augmentation": AUGMENTATION}
GOOD = {
    **{kind: (kind, []) for kind in CODE},
    "required counts": (
        "gate",
        [
            ("classes: int = 10, count: int = 2", "classes: int, teachers: int"),
            ("(classes, count)", "(classes, teachers)"),
        ],
    ),
    "weights of any sum": (
        "router",
        [(".softmax(-1)\n", ".sigmoid()\n"), ("    def plan", "    sums_to_one = False\n\n    def plan")],
    ),
    "labels too": (
        "router",
        [
            ("    def plan", "    labels_column = True\n\n    def plan"),
            ("return (self", "sure = torch.cat([sure, sure.mean(1, keepdim=True)], 1)\n        return (self"),
        ],
    ),
    "keys replaced": ("augmentation", [("new = batch.copy()", "new = batch")]),
    "mixed labels": (
        "augmentation",
        [
            ("    def draw", "    changes_labels = True\n\n    def draw"),
            (
                "return new",
                "new['target'] = nn.functional.one_hot(batch['target'], 5).float()\n        return new",
            ),
        ],
    ),
    "leaves inputs": (
        "augmentation",
        [("    def draw", "    changes_inputs = False\n\n    def draw"), ('new["input"]', 'new["mixed"]')],
    ),
}
FAULTS = [
    ("weights_sum", "router", [(".softmax(-1)\n", ".sigmoid()\n")]),
    ("weights_sum", "router", [("sure).softmax(-1)", "sure).softmax(0)")]),
    ("weights_sum", "router", [("sure).softmax(-1)", "sure).softmax(-1) * sure.shape[-1]")]),
    ("weights_shape", "router", [("softmax(-1)\n", "softmax(-1).T\n")]),
    ("weights_shape", "router", [("    def plan", "    labels_column = True\n\n    def plan")]),
    ("weights_shape", "router", [("log_softmax(-1).amax(-1)", "softmax(-1).amin(-1).log()")]),
    ("plan", "router", [(", dtype=torch.bool)", ")")]),
    (
        "plan",
        "router",
        [
            (
                "torch.ones(len(batch), len(self.run.teachers), dtype",
                "torch.ones(len(self.run.teachers), len(batch), dtype",
            )
        ],
    ),
    ("router_gradient", "router", [("return (self.scale * sure)", "return (self.scale.detach() * sure)")]),
    (
        "router_gradient",
        "router",
        [
            (
                "(self.scale * sure).softmax(-1)",
                "nn.functional.one_hot((self.scale * sure).argmax(-1), sure.shape[-1]).float()",
            )
        ],
    ),
    (
        "determinism",
        "router",
        [("return (self.scale", "sure = sure + torch.randn_like(sure)\n        return (self.scale")],
    ),
    (
        "hidden_state",
        "router",
        [
            (
                "return (self.scale",
                "self.calls += 1\n        sure = sure / self.calls\n        return (self.scale",
            )
        ],
    ),
    ("batch_order", "router", [("return (self.scale", "sure = sure.cumsum(0)\n        return (self.scale")]),
    (
        "labels_kept",
        "augmentation",
        [("return new", "new['target'] = batch['target'].roll(1, 0)\n        return new")],
    ),
    (
        "labels_kept",
        "augmentation",
        [
            (
                "return new",
                "new['target'] = torch.where(share.flatten() < 0.02, 0, batch['target'])\n        return new",
            )
        ],
    ),
    (
        "labels_kept",
        "augmentation",
        [("return new", "new['id'] = batch['id'].roll(1, 0)\n        return new")],
    ),
    (
        "inputs_untouched",
        "augmentation",
        [('new["input"] = (1 - share) * batch["input"]', 'new["input"] = batch["input"].mul_(1 - share)')],
    ),
    ("determinism", "augmentation", [(", generator=self.run.generator", "")]),
    (
        "determinism",
        "augmentation",
        [
            (
                ", generator=self.run.generator",
                ", generator=torch.Generator().manual_seed(__import__('time').perf_counter_ns())",
            )
        ],
    ),
    ("batch_kept", "augmentation", [("return new", "new['input'] = new['input'][1:]\n        return new")]),
    ("batch_kept", "augmentation", [("return new", "del new['target']\n        return new")]),
    ("batch_kept", "augmentation", [("return new", "return {**new}")]),
    (
        "batch_kept",
        "augmentation",
        [("return new", "new['input'] = new['input'].double()\n        return new")],
    ),
    ("inputs_as_declared", "augmentation", [("    def draw", "    changes_inputs = False\n\n    def draw")]),
    ("draw", "augmentation", [("randperm(size, gen", "randperm(size + 9, gen")]),
    ("draw", "augmentation", [('randperm(size, generator=self.run.rng(f"block {epoch}"))', "rand(size)")]),
    ("draw", "augmentation", [(', generator=self.run.rng(f"block {epoch}")', "")]),
]


def planted(
    folder: Path, kind: str, edits: list[tuple[str, str]], without: Sequence[str] = ()
) -> list[Finding]:
    code = CODE[kind]
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    package = folder / "planted" / "kd_plugin_planted"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").write_text(INIT.format(kind=kind.replace("gate", "router")))
    (package / "part.py").write_text(HEAD + code)
    return check_plugin(package.parent, without=without)


def failures(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.failed]


@pytest.mark.parametrize("name", GOOD)
def test_good_components_pass(name: str, tmp_path: Path) -> None:
    findings = planted(tmp_path, *GOOD[name])
    assert failures(findings) == []
    assert sum(f.verdict == "passed" for f in findings) >= 12


@pytest.mark.parametrize(("name", "kind", "edits"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_fault_is_caught_by_its_check(
    name: str, kind: str, edits: list[tuple[str, str]], tmp_path: Path
) -> None:
    findings = planted(tmp_path, kind, edits, without=["exports"])
    assert {f.check for f in findings if f.failed} == {name}, failures(findings)
