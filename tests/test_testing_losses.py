"""Conformance of losses: a good loss passes everything, and each planted fault is caught by the check of its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcore.testing import Finding, check_plugin

INIT = '''"""A planted loss."""
from kdcore import Component, hookimpl
__version__ = "0.1"

@hookimpl
def kd_losses():
    yield Component("planted", "kd_plugin_planted.loss:loss", "a planted loss")
'''
PROJECT = """[project]
name = "kd-plugin-planted"
dependencies = ["kdcore>=0.1"]
entry-points.kdcore.planted = "kd_plugin_planted"
"""
HEAD = """import random, time
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from kdcore import Batch, Loss, Outputs, conventions
"""
KL = '''
@conventions(zero_at_teacher=True)
def loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0) -> Tensor:
    """T^2 KL(teacher || student) of each row: [..., C] to [...]."""
    log_q = F.log_softmax(student_logits / temperature, -1)
    log_p = F.log_softmax(teacher_logits.detach() / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl * temperature**2
'''
LABELLED = '''
@conventions(hard_term=True)
def loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, tau: float = 2.0, alpha: float = 0.5) -> Tensor:
    """(1 - alpha) CE + alpha tau^2 KL of each sample: [B,C], [B] to [B]."""
    log_p = F.log_softmax(teacher_logits.detach() / tau, -1)
    soft = F.kl_div(F.log_softmax(student_logits / tau, -1), log_p, reduction="none", log_target=True).sum(-1)
    return (1 - alpha) * F.cross_entropy(student_logits, target, reduction="none") + alpha * tau**2 * soft
'''
TOKENS = '''
@conventions(zero_at_teacher=True)
def loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over a sample's unmasked positions of T^2 KL: [B,L,V] to [B]."""
    log_q = F.log_softmax(student_logits / temperature, -1)
    log_p = F.log_softmax(teacher_logits.detach() / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    return (kl * mask).sum(1) / mask.sum(1).clamp(min=1)
'''
RELATIONS = '''
class loss(Loss):
    """Squared difference of the two matrices of cosines among the batch's embeddings [B,D], row by row."""

    reads = ("student.embedding", "teacher.embedding")
    couples_batch = True
    zero_at_teacher = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t = F.normalize(student["embedding"], dim=-1), F.normalize(teacher["embedding"].detach(), dim=-1)
        return (s @ s.T - t @ t.T).square().mean(1)
'''
CENTRED = '''
class loss(Loss):
    """Cross-entropy with the teacher's logits less their running mean over classes, kept in a buffer."""

    def __init__(self, *, classes: int = 5, rate: float = 0.1) -> None:
        super().__init__()
        self.rate, self.calls = rate, 0
        self.register_buffer("centre", torch.zeros(classes))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        target = (teacher.logits.detach() - self.centre).softmax(-1)
        return -(target * student.logits.log_softmax(-1)).sum(-1)

    def after_step(self, teachers: dict[str, Outputs]) -> None:
        self.centre.lerp_(teachers["main"].logits.mean(0), self.rate)
'''
GOOD = {
    "kl": KL,
    "labels": LABELLED,
    "tokens": TOKENS,
    "relations": RELATIONS,
    "centred": CENTRED,
    "plain batchmean": KL.replace("kl * temperature**2", "kl.mean() * temperature**2"),
    "no float32": KL.replace("(-1) * t", "(-1) * t"),
    "mean, declared": KL.replace("=True)", "=True, mean_over_classes=True)").replace(".sum(-1)", ".mean(-1)"),
    "no T, declared": KL.replace("=True)", "=True, t_squared=False)").replace(" * temperature**2", ""),
    "reverse, undeclared": KL.replace("@conventions(zero_at_teacher=True)", "").replace(
        "(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))"
    ),
    "projected": RELATIONS.replace(
        '        s, t = F.normalize(student["embedding"]',
        '        s, t = F.normalize(self.project(student["embedding"])',
    )
    .replace(
        "    def forward",
        "    def setup(self) -> None:\n"
        "        width = 8\n"
        "        self.project = torch.nn.Sequential(\n"
        "            torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout()\n"
        "        )\n\n"
        "    def forward",
        1,
    )
    .replace("    zero_at_teacher = True\n", ""),
}
FAULTS = [
    # planted in the plain divergence
    ("teacher_gradient", KL, [(".detach()", "")]),
    ("student_gradient", KL, [("student_logits /", "student_logits.detach() /")]),
    ("t_squared", KL, [(" * temperature**2", "")]),
    ("t_squared", KL, [("**2", "**4")]),
    ("t_squared", KL, [("temperature**2", "temperature")]),
    ("t_squared", KL, [("=True)", "=True, t_squared=False)")]),
    ("t_squared", KL, [("/ temperature", "/ 3.0"), (" * temperature**2", "")]),
    ("class_count", KL, [(".sum(-1)", ".mean(-1)")]),
    ("class_count", KL, [("kl * temp", "F.kl_div(log_q, log_p, reduction='mean', log_target=True) * temp")]),
    ("class_count", KL, [("=True)", "=True, mean_over_classes=True)")]),
    ("zero_at_teacher", KL, [("(log_p - log_q)", "(-log_q)")]),
    ("zero_at_teacher", KL, [("(log_p - log_q)", "(log_q - log_p)")]),
    ("zero_at_teacher", KL, [("(log_p - log_q)", "(log_q - log_p)"), ("zero_at_teacher=True", "")]),
    ("zero_at_teacher", KL, [("teacher_logits.detach() / temp", "teacher_logits.detach() / 2 / temp")]),
    ("direction", KL, [("(log_p - log_q)", "log_q"), ("zero_at_teacher=True", "")]),
    ("sample_independence", KL, [("/ temperature, -1", "/ temperature, 0")]),
    ("sample_independence", KL, [("kl * temp", "(kl * kl.detach() / kl.detach().mean()) * temp")]),
    ("sample_independence", KL, [("kl * temp", "(kl / kl.detach().std() * 9).mean() * temp")]),
    (
        "batch_order",
        KL,
        [("kl * temp", "kl * torch.linspace(0.5, 1.5, len(kl)).view(-1, *[1] * (kl.dim() - 1)) * temp")],
    ),
    ("batch_order", KL, [("kl * temp", "kl[0] * temp"), ("sum(-1)", "sum(-1).flatten()")]),
    ("batch_mean", KL, [("kl * temp", "kl / len(kl) * temp")]),
    ("batch_mean", KL, [("kl * temp", "kl.sum() * temp")]),
    ("term_shape", KL, [(".sum(-1)", "")]),
    ("term_shape", KL, [(".sum(-1)", ".mean(0)")]),
    ("determinism", KL, [("return kl", "kl = kl + 0.01 * torch.randn_like(kl)\n    return kl")]),
    ("determinism", KL, [("return kl", "torch.manual_seed(0)\n    kl = kl * torch.rand(())\n    return kl")]),
    ("determinism", KL, [("return kl", "return random.random() * kl")]),
    ("determinism", KL, [("return kl", "return np.random.default_rng().uniform() * kl")]),
    ("determinism", KL, [("return kl", "return (time.perf_counter() % 1) * kl")]),
    (
        "hidden_state",
        KL,
        [
            ("    log_q", "    loss.calls = getattr(loss, 'calls', 0) + 1\n    log_q"),
            ("return kl", "return kl / loss.calls"),
        ],
    ),
    (
        "hidden_state",
        "CALLS = [0]\n" + KL,
        [("    log_q", "    CALLS[0] += 1\n    log_q"), ("return kl", "return kl / CALLS[0]")],
    ),
    (
        "hidden_state",
        "DRAWS = torch.Generator().manual_seed(0)\n" + KL,
        [("return kl", "return kl * torch.rand((), generator=DRAWS)")],
    ),
    ("inputs_untouched", KL, [("student_logits / temperature", "student_logits.div_(temperature)")]),
    (
        "inputs_untouched",
        KL,
        [("*, temp", "batch: Batch, *, temp"), ("    log_q", "    batch['input'].zero_()\n    log_q")],
    ),
    (
        "inputs_untouched",
        KL,
        [("*, temp", "batch: Batch, *, temp"), ("    log_q", "    batch['target'] = batch['id']\n    log_q")],
    ),
    (
        "extremes",
        KL,
        [
            (
                "F.log_softmax(student_logits / temperature, -1)",
                "F.softmax(student_logits / temperature, -1).log()",
            )
        ],
    ),
    ("extremes", KL, [("return kl", "kl = kl.sqrt().square()\n    return kl")]),
    ("amp", KL, [("    log_q", "    torch.lerp(student_logits, teacher_logits.float(), 0.5)\n    log_q")]),
    (
        "amp",
        KL,
        [("return kl", "kl = torch.zeros(kl.shape).index_add(0, torch.arange(len(kl)), kl)\n    return kl")],
    ),
    # in a loss with labels inside
    ("hard_term", LABELLED, [("hard_term=True", "")]),
    (
        "hard_term",
        LABELLED,
        [('(1 - alpha) * F.cross_entropy(student_logits, target, reduction="none") + ', "")],
    ),
    ("t_squared", LABELLED, [("tau**2 * ", "")]),
    ("class_count", LABELLED, [(".sum(-1)", ".mean(-1)")]),
    # in a loss of tokens
    ("mask", TOKENS, [("(kl * mask).sum(1) / mask.sum(1).clamp(min=1)", "kl.mean(1)")]),
    ("mask", TOKENS, [("(kl * mask).sum(1) / mask.sum(1).clamp(min=1)", "kl.mean()")]),
    ("mask", TOKENS, [("(kl * mask)", "kl")]),
    ("mask", TOKENS, [("mask.sum(1).clamp(min=1)", "mask.shape[1]")]),
    ("mask", TOKENS, [("(kl * mask)", "(kl * ~mask)")]),
    # in a loss with state
    (
        "hidden_state",
        CENTRED,
        [("        target", "        self.centre.lerp_(teacher.logits.mean(0), self.rate)\n        target")],
    ),
    (
        "hidden_state",
        CENTRED,
        [
            ("        target", "        self.calls += 1\n        target"),
            ("return -", "return -self.calls * "),
        ],
    ),
    (
        "state_round_trip",
        CENTRED,
        [('self.register_buffer("centre", torch.zeros(classes))', "self.centre = torch.zeros(classes)")],
    ),
    ("state_round_trip", CENTRED, [("torch.zeros(classes))", "torch.zeros(classes), persistent=False)")]),
    ("events", CENTRED, [("after_step", "after_stepp")]),
    ("events", CENTRED, [("teachers: dict", "models: dict"), ('teachers["main"]', 'models["main"]')]),
    (
        "hidden_state",
        CENTRED,
        [
            ("        target", "        self.calls += self.calls < 9\n        target"),
            ("return -", "return -(1 + self.calls // 6) * "),
        ],
    ),
    (
        "hidden_state",
        CENTRED,
        [("        target", "        self.run.teachers['main'].train(True).module.train()\n        target")],
    ),
    (
        "hidden_state",
        CENTRED,
        [("        target", "        next(self.run.student.parameters()).data.mul_(1.01)\n        target")],
    ),
    (
        "ownership",
        CENTRED,
        [
            (
                "    def forward",
                "    def setup(self) -> None:\n        self.model = self.run.student\n\n    def forward",
            )
        ],
    ),
    (
        "student_gradient",
        CENTRED,
        [("        self.rate, ", "        self.unused = torch.nn.Linear(2, 2)\n        self.rate, ")],
    ),
    ("term_shape", CENTRED, [("return -(target", "return {}\n        return -(target")]),
    ("sample_independence", RELATIONS, [("    couples_batch = True\n", "")]),
    ("teacher_gradient", RELATIONS, [(".detach()", "")]),
    (
        "batch_order",
        RELATIONS,
        [("s @ s.T - t @ t.T", "s @ s.T.roll(1, 0).tril() - t @ t.T.roll(1, 0).tril()")],
    ),
]


def planted(folder: Path, code: str, init: str = INIT) -> list[Finding]:
    package = folder / "planted" / "kd_plugin_planted"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").write_text(init)
    (package / "loss.py").write_text(HEAD + code)
    return check_plugin(package.parent)


def failures(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.failed]


@pytest.mark.parametrize("name", GOOD)
def test_good_losses_pass(name: str, tmp_path: Path) -> None:
    findings = planted(tmp_path, GOOD[name])
    assert failures(findings) == []
    assert sum(f.verdict == "passed" for f in findings) >= 18


@pytest.mark.parametrize(("name", "code", "edits"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_fault_is_caught_by_its_check(
    name: str, code: str, edits: list[tuple[str, str]], tmp_path: Path
) -> None:
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    findings = planted(tmp_path, code)
    assert {f.check for f in findings if f.failed} == {name}, failures(findings)
    assert all(f.what_to_do and "\n" not in str(f) for f in findings if f.failed)
