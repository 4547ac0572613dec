"""Conformance of students, teachers, routers and augmentations: good ones pass, planted faults are caught by name."""

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
STUDENT = '''
class Planted(Student):
    """A trunk with two heads; inference averages their softmax, and ``extra`` is a head that only training uses."""

    def __init__(self, *, inputs: int = 64, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.one, self.two, self.extra = (nn.Linear(width, classes) for _ in range(3))

    def forward(self, batch: Batch) -> Outputs:
        hidden = self.trunk(batch["input"])
        return Outputs(self.one(hidden), tensors={"two": self.two(hidden), "extra": self.extra(hidden)})

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"probabilities": (outputs.logits.softmax(-1) + outputs["two"].softmax(-1)) / 2}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {"input": batch["input"]}

    def deploy(self) -> nn.Module:
        return Shipped(self)


class Shipped(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.trunk, self.one, self.two = student.trunk, student.one, student.two

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(input)
        return {"probabilities": (self.one(hidden).softmax(-1) + self.two(hidden).softmax(-1)) / 2}
'''
TEACHER = '''
class Planted(Teacher):
    """A linear classifier of images behind dropout."""

    def __init__(self, *, inputs: int = 64, classes: int = 5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, classes))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch: Batch) -> Outputs:
        logits = self.net(batch["input"])
        return Outputs(logits)
'''
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
PICKLED = """    def get_extra_state(self):
        return nn.Linear(2, 2)

    def set_extra_state(self, state):
        pass

"""
CODE = {"student": STUDENT, "teacher": TEACHER, "router": ROUTER, "augmentation": AUGMENTATION}
GOOD = {
    **{kind: (kind, []) for kind in CODE},
    "stock deploy": (
        "student",
        [
            ("return Shipped(self)", "return super().deploy()"),
            (', "extra": self.extra(hidden)', ""),
            (
                "self.one, self.two, self.extra = (nn.Linear(width, classes) for _ in range(3))",
                "self.one, self.two = (nn.Linear(width, classes) for _ in range(2))",
            ),
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
    ("deploy", "student", [("+ self.two(hidden).softmax(-1)) / 2", ") / 1")]),
    (
        "deploy",
        "student",
        [
            (
                "(self.one(hidden).softmax(-1) + self.two(hidden).softmax(-1)) / 2",
                "(self.one(hidden) + self.two(hidden)).softmax(-1)",
            )
        ],
    ),
    ("deploy", "student", [('return {"probabilities": (self.one', 'return {"logits": (self.one')]),
    ("deploy", "student", [("return Shipped(self)", "return self.trunk")]),
    (
        "deploy",
        "student",
        [
            (
                "return Shipped(self)",
                "shipped = Shipped(self)\n        self.two = self.one\n        return shipped",
            )
        ],
    ),
    ("has_inputs", "student", [("def inputs", "def graph_inputs")]),
    ("has_inputs", "student", [('return {"input": batch["input"]}', 'return {"input": batch["images"]}')]),
    (
        "training_only",
        "student",
        [
            (
                "= student.trunk, student.one, student.two",
                "= student.trunk, student.one, student.two\n        self.extra = student.extra",
            )
        ],
    ),
    ("training_only", "student", [("return Shipped(self)", "return super().deploy()")]),
    (
        "trains",
        "student",
        [
            (
                '        hidden = self.trunk(batch["input"])\n',
                '        with torch.no_grad():\n            hidden = self.trunk(batch["input"])\n',
            ),
            ("Outputs(self.one(hidden), tensors={", "Outputs(self.one(hidden).detach(), tensors={"),
            ('self.two(hidden), "extra": self.extra(hidden)}', "self.two(hidden).detach()}"),
        ],
    ),
    (
        "determinism",
        "student",
        [
            (
                'hidden = self.trunk(batch["input"])',
                'hidden = nn.functional.dropout(self.trunk(batch["input"]))',
            )
        ],
    ),
    (
        "sample_independence",
        "student",
        [
            (
                'hidden = self.trunk(batch["input"])',
                'hidden = self.trunk(batch["input"])\n        hidden = hidden - hidden.mean(0)',
            ),
            (
                "hidden = self.trunk(input)",
                "hidden = self.trunk(input)\n        hidden = hidden - hidden.mean(0)",
            ),
        ],
    ),
    (
        "hidden_state",
        "student",
        [
            (
                'hidden = self.trunk(batch["input"])',
                'hidden = self.trunk(batch["input"])\n        with torch.no_grad():\n            self.one.bias.add_(0.01)',
            )
        ],
    ),
    (
        "inputs_untouched",
        "student",
        [
            ('hidden = self.trunk(batch["input"])', 'hidden = self.trunk(batch["input"].mul_(2).sub_(1))'),
            ("self.trunk(input)", "self.trunk(input * 2 - 1)"),
        ],
    ),
    (
        "state_round_trip",
        "student",
        [("    def forward(self, batch", PICKLED + "    def forward(self, batch")],
    ),
    ("frozen_eval", "teacher", [("logits = self.net", "self.net[3].train()\n        logits = self.net")]),
    ("frozen_eval", "teacher", [("logits = self.net", "self.count += 1\n        logits = self.net")]),
    (
        "frozen_eval",
        "teacher",
        [
            (
                'logits = self.net(batch["input"])',
                'with torch.inference_mode():\n            logits = self.net(batch["input"])',
            )
        ],
    ),
    (
        "frozen_eval",
        "teacher",
        [
            (
                'logits = self.net(batch["input"])',
                'with torch.enable_grad():\n            logits = self.net.requires_grad_()(batch["input"])',
            )
        ],
    ),
    ("determinism", "teacher", [("return Outputs(logits)", "return Outputs(nn.functional.dropout(logits))")]),
    (
        "sample_independence",
        "teacher",
        [("return Outputs(logits)", "return Outputs(logits - logits.mean(0))")],
    ),
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
    (package / "__init__.py").write_text(INIT.format(kind=kind))
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
