"""Conformance of a plugin as a whole: names, imports, declarations, recipes; exceptions; pytest; the command line."""

# ruff: noqa: E501 - a planted edit reads best as one line
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kdcore import catalog
from kdcore.cli import main
from kdcore.errors import InputError
from kdcore.testing import Finding, check_oracle, check_plugin, parametrize
from kdcore.testing.findings import CHECKS

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "testing.md").read_text("utf-8")
INIT = '''"""A plugin."""
from kdcore import Component, hookimpl

@hookimpl
def kd_losses():
    yield Component("planted", "kd_plugin_planted.loss:loss", "squared distance of logits")
'''
LOSS = '''"""The loss."""
from torch import Tensor, nn
from kdcore import Batch, Loss, Outputs, conventions

@conventions(zero_at_teacher=True)
def loss(student_logits: Tensor, teacher_logits: Tensor, *, scale: float = 1.0) -> Tensor:
    """The squared distance of two rows of logits: [..., C] to [...]."""
    return scale * (student_logits - teacher_logits.detach()).square().sum(-1)
'''
LAYERS = '''"""The loss."""
from torch import Tensor, nn
from kdcore import Batch, Loss, Outputs

class loss(Loss):
    """Squared distance of the teacher's hint and the student's, behind a regressor of fitting widths."""

    reads = ("student.guided", "teacher.hint")

    def setup(self) -> None:
        student, teacher = self.run.preview(self)
        self.regressor = nn.Linear(student["guided"].shape[1], teacher["hint"].shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (self.regressor(student["guided"]) - teacher["hint"].detach()).square().mean(1)
'''
RECIPE = """
[data]
source = "kdcore.datasets:digits"
args = { labels = 60, flat = true }
[teacher.main]
use = "module"
model = "kdcore.zoo:mlp"
args = { hidden = [12] }
train = { epochs = 3 }
[student]
use = "module"
model = "kdcore.zoo:mlp"
args = { hidden = [5] }
[[loss]]
use = "planted"
[train]
epochs = 9
"""
PROJECT = (
    '[project]\nname = "kd-plugin-planted"\n[project.entry-points.kdcore]\nplanted = "kd_plugin_planted"\n'
)
FILES = {"pyproject.toml": PROJECT, "kd_plugin_planted/__init__.py": INIT, "kd_plugin_planted/loss.py": LOSS}
PACKAGE = "kd_plugin_planted/"
Edit = tuple[str, str, str]
FAULTS: list[tuple[str, list[Edit]]] = [
    ("naming", [("pyproject.toml", '"kd-plugin-planted"', '"kd-planted"')]),
    ("naming", [("pyproject.toml", '"kd-plugin-planted"', '"kd-plugin-planted-two"')]),
    ("light_import", [(PACKAGE + "__init__.py", "from kdcore", "import torch\nfrom kdcore")]),
    (
        "light_import",
        [(PACKAGE + "__init__.py", "from kdcore", "import kd_plugin_planted.loss as _\nfrom kdcore")],
    ),
    ("light_import", [(PACKAGE + "__init__.py", "    yield", "    import sklearn\n    yield")]),
    ("loads", [(PACKAGE + "__init__.py", "from kdcore", "import not_there\nfrom kdcore")]),
    ("loads", [(PACKAGE + "__init__.py", "from kdcore", "int('x')\nfrom kdcore")]),
    ("loads", [(PACKAGE + "__init__.py", "kd_losses", "kd_lossess")]),
    ("loads", [(PACKAGE + "__init__.py", "@hookimpl\n", "")]),
    ("loads", [(PACKAGE + "__init__.py", 'Component("planted"', 'Component("other"')]),
    ("loads", [(PACKAGE + "__init__.py", "    yield", "    return\n    yield")]),
    ("imports", [(PACKAGE + "__init__.py", "loss:loss", "loss:lost")]),
    ("imports", [(PACKAGE + "loss.py", "from torch", "import not_there\nfrom torch")]),
    ("kind", [(PACKAGE + "__init__.py", "kd_losses", "kd_routers")]),
    (
        "kind",
        [
            (
                PACKAGE + "loss.py",
                "@conventions",
                'class Other(nn.Module):\n    """Another."""\n\n@conventions',
            ),
            (PACKAGE + "__init__.py", "loss:loss", "loss:Other"),
        ],
    ),
    ("kind", [(PACKAGE + "__init__.py", "kd_losses", "kd_stages")]),
    ("schema", [(PACKAGE + "loss.py", "scale: float", "scale")]),
    (
        "schema",
        [
            (
                PACKAGE + "loss.py",
                "student_logits: Tensor, teacher_logits: Tensor, *",
                "*, student_logits: Tensor, teacher_logits: Tensor",
            )
        ],
    ),
    ("defaults", [(PACKAGE + "loss.py", "scale: float = 1.0", "scale: str = 1.0")]),
    (
        "help_text",
        [
            (
                PACKAGE + "loss.py",
                '    """The squared distance of two rows of logits: [..., C] to [...]."""\n',
                "",
            )
        ],
    ),
    ("help_text", [(PACKAGE + "__init__.py", ', "squared distance of logits"', "")]),
    ("runs", [(PACKAGE + "loss.py", "return scale", "return self.scale")]),
]


def write(folder: Path, files: dict[str, str], edits: Sequence[Edit] = ()) -> Path:
    for name, text in files.items():
        for _, old, new in [e for e in edits if e[0] == name]:
            assert old in text
            text = text.replace(old, new)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def failed(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.check: str(finding) for finding in findings if finding.failed}


@pytest.mark.parametrize(("name", "edits"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_fault_is_caught_by_its_check(name: str, edits: list[Edit], tmp_path: Path) -> None:
    findings = check_plugin(write(tmp_path, FILES, edits))
    assert failed(findings).keys() == {name}, failed(findings)


def test_folder_is_part_of_the_name_among_plugins(tmp_path: Path) -> None:
    good = check_plugin(write(tmp_path / "plugins" / "planted", FILES))
    assert failed(good) == {}
    findings = check_plugin(write(tmp_path / "plugins" / "plant", FILES))
    assert "folder 'plant', not 'planted'" in failed(findings)["naming"]


def test_two_plugins_of_one_name_in_turn(tmp_path: Path) -> None:
    """The second folder's code is checked, not what the first one left imported."""
    assert failed(check_plugin(write(tmp_path / "one", FILES))) == {}
    edits = [(PACKAGE + "loss.py", ".detach()", "")]
    assert failed(check_plugin(write(tmp_path / "two", FILES, edits))).keys() == {"teacher_gradient"}


def test_layers_come_from_the_recipe_which_runs_too(tmp_path: Path) -> None:
    files = {**FILES, PACKAGE + "loss.py": LAYERS, PACKAGE + "digits.toml": RECIPE}
    reads = '\nreads = { student = { guided = "hidden0" }, teacher = { hint = "hidden0" } }\n[train]'
    findings = check_plugin(write(tmp_path / "a", files, [(PACKAGE + "digits.toml", "\n[train]", reads)]))
    verdicts = {f.check: f for f in findings}
    assert failed(findings) == {}
    assert verdicts["recipe_runs"].verdict == "passed"
    assert "other shapes" in verdicts["zero_at_teacher"].why  # the recipe's widths, not the toy models'
    findings = check_plugin(write(tmp_path / "b", files))
    assert "feature" not in failed(findings)["recipe_runs"]
    assert failed(findings).keys() == {"recipe_runs"}


def test_sample_of_a_components_own(tmp_path: Path) -> None:
    strange = LOSS.replace("student_logits - teacher_logits.detach()", "student_logits - table[index]")
    strange = strange.replace("teacher_logits: Tensor,", "table: Tensor, index: Tensor,")
    assert failed(check_plugin(write(tmp_path / "a", {**FILES, PACKAGE + "loss.py": strange}))).keys() == {
        "runs"
    }
    sample = (
        (
            "\nimport torch\nloss.conformance_sample = lambda: {'params': {'scale': 2.0}, 'student': Outputs(torch.randn(6, 5)),"
            "\n    'batch': Batch(id=torch.arange(6), table=torch.randn(9, 5), index=torch.arange(6) % 4)}\n"
        )
        .replace("Batch(id", "Batch(dict(id")
        .replace("% 4)}", "% 4))}")
    )
    findings = check_plugin(write(tmp_path / "b", {**FILES, PACKAGE + "loss.py": strange + sample}))
    assert failed(findings) == {}


def test_expected_failures_are_strict_and_need_reasons(tmp_path: Path) -> None:
    faulty = write(tmp_path, FILES, [(PACKAGE + "loss.py", ".detach()", "")])
    findings = check_plugin(faulty, expected_failures={"teacher_gradient": "both learn"})
    (excused,) = [f for f in findings if f.check == "teacher_gradient"]
    assert failed(findings) == {}
    assert excused.verdict == "skipped"
    assert "both learn" in excused.why
    findings = check_plugin(faulty, expected_failures={"teacher_gradient": "both learn", "mask": "no reason"})
    assert "did not" in failed(findings)["mask"]
    with pytest.raises(InputError, match="known check") as error:
        check_plugin(faulty, expected_failures={"teacher_gradiant": "both learn"})
    assert "teacher_gradient" in str(error.value)
    with pytest.raises(InputError, match="reason"):
        check_plugin(faulty, expected_failures={"teacher_gradient": " "})


def test_a_slug_of_two_distributions_needs_one_of_them(install: Callable[..., Any]) -> None:
    install("planted", INIT, distribution="kd-plugin-planted")
    install("planted", INIT, distribution="other")
    with pytest.raises(InputError, match="2 distributions bring it") as caught:
        check_plugin("planted")
    assert "kd-plugin-planted, other" in str(caught.value)
    assert "distribution 'other', not" in failed(check_plugin("other"))["naming"]


@pytest.mark.parametrize(("edit", "caught"), [((".detach()", ""), {}), (("", ""), {"teacher_gradient"})])
def test_a_component_carries_its_exceptions(edit: tuple[str, str], caught: Any, tmp_path: Path) -> None:
    code = LOSS.replace(*edit) + '\nloss.expected_failures = {"teacher_gradient": "both learn"}\n'
    findings = check_plugin(write(tmp_path, {**FILES, PACKAGE + "loss.py": code}))
    assert failed(findings).keys() == set(caught)


def test_checks_can_be_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, FILES, [(PACKAGE + "loss.py", ".detach()", "")])
    findings = check_plugin(folder, without=["teacher_gradient"])
    assert failed(findings) == {}
    assert "teacher_gradient" not in {f.check for f in findings}


def cases(mark: Any) -> dict[str, Callable[[], Finding]]:
    return {case.id: case.values[0] for case in mark.args[1]}


def test_parametrize_makes_a_case_a_check(tmp_path: Path) -> None:
    folder = write(tmp_path, FILES, [(PACKAGE + "loss.py", ".detach()", "")])
    found = cases(parametrize(folder))
    assert {"planted-naming", "loss planted-schema", "loss planted-mask"} <= found.keys()
    assert found["loss planted-mask"]().verdict == "passed"
    with pytest.raises(AssertionError, match="teacher_gradient"):
        found["loss planted-teacher_gradient"]()
    assert cases(parametrize(folder, expected_failures={"teacher_gradient": "x"}))[
        "loss planted-teacher_gradient"
    ]()


def test_method_without_oracle_must_be_experimental(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, FILES)
    for status, verdict in {
        "experimental": "skipped",
        "implemented": "failed",
        "demonstrated": "failed",
    }.items():
        entry = {"slug": "planted", "status": status, "modalities": ["image"]}
        monkeypatch.setattr(catalog, "methods", lambda entry=entry: {"planted": entry})
        (finding,) = [f for f in check_plugin(folder) if f.check == "oracle"]
        assert finding.verdict == verdict


@pytest.mark.parametrize(("value", "verdict"), [("4.5", "passed"), ("4.6", "failed")])
def test_oracles_of_a_plugin_are_run(value: str, verdict: str, tmp_path: Path) -> None:
    """(2 - 1)^2 + (1 - 3)^2 = 5 and (2 - 0)^2 + 0 = 4: 4.5 on average."""
    oracle = f"""from kdcore.testing import Oracle
tensors = {{"student_logits": [[2.0, 1.0], [2.0, 0.0]], "teacher_logits": [[1.0, 3.0], [0.0, 0.0]]}}
ORACLES = [Oracle("two rows", "kd_plugin_planted.loss:loss", tensors, {value}, "closed form: by hand")]
"""
    findings = check_plugin(write(tmp_path, {**FILES, PACKAGE + "oracle.py": oracle}))
    (finding,) = [f for f in findings if f.check == "oracle"]
    assert finding.verdict == verdict
    assert not finding.failed or "expected 4.6" in finding.why


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, FILES)
    for edit, code in (("scale *", 0), ("-scale *", 1)):
        (folder / PACKAGE / "loss.py").write_text(LOSS.replace("scale *", edit))
        with pytest.raises(SystemExit) as leave:
            main(["plugin", "check", str(folder)])
        assert leave.value.code == code
        said = capsys.readouterr().out
        assert ("failed  loss planted" in said) == bool(code)
        assert ("its sign is turned" in said) == bool(code)


@pytest.mark.parametrize("where", ["classical", "tests"])
def test_unknown_plugin(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["plugin", "check", where])
    assert leave.value.code == 2
    assert "no such plugin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [("[project", "not valid TOML"), ("[project]\nname = 'x'", "entry point")]
)
def test_folder_that_is_no_plugin(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        check_plugin(tmp_path)


def test_every_check_is_in_the_guide_and_no_other() -> None:
    rows = [line for line in GUIDE.splitlines() if line.startswith("| ")][1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])} == CHECKS.keys()
    assert all(check.why and check.what_to_do for check in CHECKS.values())


def test_oracle_of_the_guide_holds() -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "ORACLES = [" in b]
    scope: dict[str, Any] = {}
    exec(block.replace("kd_plugin_my_method.loss:my_loss", "kdcore.losses:kd_loss"), scope)
    assert "chunked" in check_oracle(scope["ORACLES"][0])


def test_global_generators_and_path_are_left_alone(tmp_path: Path) -> None:
    import random
    import sys

    import torch

    folder = write(tmp_path, FILES)
    random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), torch.Generator().manual_seed(5)
    before = list(sys.path)
    check_plugin(folder)
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected[1]))
    assert sys.path == before
