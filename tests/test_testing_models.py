"""Conformance of students and teachers: good ones pass, planted faults are caught by the check of their name."""

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
STALE = """    def setup(self) -> None:
        import copy
        self.shipped = [copy.deepcopy(Shipped(self))]

"""
PICKLED = """    def get_extra_state(self):
        return nn.Linear(2, 2)

    def set_extra_state(self, state):
        pass

"""
CODE = {"student": STUDENT, "teacher": TEACHER}
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
    (
        "deploy",
        "student",
        [
            ("    def forward(self, batch", STALE + "    def forward(self, batch"),
            ("return Shipped(self)", "return self.shipped[0]"),
        ],
    ),
    (
        "deploy",
        "student",
        [("hidden = self.trunk(input)", "hidden = self.trunk(input) * (1 + (len(input) == 1))")],
    ),
    (
        "outputs",
        "student",
        [("return Outputs(self.one(hidden), tensors=", "return dict(logits=self.one(hidden), **")],
    ),
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


def test_an_inference_rule_without_names_is_told_in_words(tmp_path: Path) -> None:
    """Not by an AttributeError of the check's own."""
    bare = "def infer(self, outputs):\n        return outputs.logits\n\n    def named(self, outputs"
    edits = [("def infer(self, outputs", bare)]
    findings = planted(tmp_path, "student", edits, without=["exports"])
    (finding,) = [each for each in findings if each.failed]
    assert finding.check == "deploy"
    assert finding.why == "infer() gives Tensor, not a dict of tensors by name"
