"""DDK's equations against the card's worked numbers and brute force; the sampler's properties; exact resume."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from kd_plugin_ddk.loss import ddk_loss
from kd_plugin_ddk.mixture import direct, discrepancy, smoothed
from kd_plugin_ddk.oracle import ORACLES
from kd_plugin_ddk.sampler import DomainSampler
from kd_plugin_ddk.text import DOMAINS, conv_lm, dealt, domains, text_of
from pydantic import Field
from scipy import stats
from torch import Tensor, nn

import kdcore
from kdcore import Data, InputError
from kdcore.checkpoint import load_state, load_tensors
from kdcore.datasets import TensorSet
from kdcore.recipe import parse
from kdcore.stages import StageRun
from kdcore.testing import check_oracle

V, L = 7, 6
SIZES = (60, 20, 10)
STUDENT = "stages/distill/student/weights.safetensors"


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Any) -> None:
    check_oracle(oracle)


def test_the_teacher_gets_no_gradient() -> None:
    z_s, z_t = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    ddk_loss(z_s, z_t).sum().backward()
    assert z_s.grad is not None
    assert z_t.grad is None


# ---- equations 1 and 2 ------------------------------------------------------------------------------


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_updates_by_hand() -> None:
    """The card: ratios (1.2, 2.0) give r_0, then (1.2, 1.5) with alpha 1/2 give r_1."""
    r = direct(tensor(1.2, 2.0))
    assert r.tolist() == pytest.approx([0.31003, 0.68997], abs=1e-5)
    assert smoothed(r, tensor(1.2, 1.5), 1.0).tolist() == pytest.approx([0.24974, 0.75026], abs=1e-5)
    assert smoothed(r, tensor(1.2, 1.5), 0.5).tolist() == pytest.approx([0.37487, 0.62513], abs=1e-5)


def test_an_update_by_brute_force() -> None:
    r, ratio = [0.1, 0.2, 0.3, 0.4], [1.7, 0.8, 3.1, 1.0]
    psi = [a * math.exp(b) for a, b in zip(r, ratio, strict=True)]
    expected = [0.3 * p / sum(psi) + 0.7 / 4 for p in psi]
    assert smoothed(tensor(*r), tensor(*ratio), 0.3).tolist() == pytest.approx(expected, rel=1e-12)


def test_constant_ratios_lead_to_the_fixed_point_not_to_the_softmax() -> None:
    """The card: two domains, a gap of 0.5, alpha 1/2: (0.3895, 0.6105)."""
    r = direct(tensor(1.0, 1.5))
    for _ in range(200):
        r = smoothed(r, tensor(1.0, 1.5))
    assert r.tolist() == pytest.approx([0.3895, 0.6105], abs=1e-4)
    assert direct(tensor(1.0, 1.5))[1].item() == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_equal_ratios_and_a_uniform_mixture_stay() -> None:
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert torch.allclose(smoothed(uniform, torch.full((5,), 3.3)), uniform, rtol=1e-12)


def test_alpha_at_its_ends() -> None:
    ratio, uniform = tensor(1.0, 4.0, 2.0), torch.full((3,), 1 / 3, dtype=torch.float64)
    assert smoothed(tensor(0.5, 0.3, 0.2), ratio, 0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert smoothed(uniform, ratio, 1.0).tolist() == pytest.approx(direct(ratio).tolist())


def test_bounds_hold_for_early_students_too() -> None:
    """Ratios in the thousands: finite, and within [(1 - alpha)/N, alpha + (1 - alpha)/N] = [0.05, 0.55] for ten."""
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        ratio = 3000 * torch.rand(10, generator=g, dtype=torch.float64)
        r = smoothed(direct(ratio), ratio)
        assert 0.05 - 1e-12 <= r.min() <= r.max() <= 0.55 + 1e-12
        assert r.sum().item() == pytest.approx(1.0)
    underflown = smoothed(
        direct(tensor(0.0, 2000.0)), tensor(9.0, 1.0)
    )  # r_0 = 0 in float64: still a distribution
    assert underflown.tolist() == pytest.approx([0.25, 0.75])


def test_only_differences_of_ratios_and_ratios_of_perplexities_count() -> None:
    r, student, teacher = tensor(0.2, 0.5, 0.3), tensor(9.0, 5.0, 7.0), tensor(4.0, 3.0, 6.0)
    base = smoothed(r, discrepancy(student, teacher))
    assert torch.allclose(smoothed(r, discrepancy(student, teacher) + 2.0), base)
    scale = tensor(3.0, 1.0, 0.5)
    assert torch.allclose(smoothed(r, discrepancy(scale * student, scale * teacher)), base)


def test_a_larger_lag_of_one_domain_takes_from_all_others() -> None:
    r, ratio = tensor(0.2, 0.5, 0.3), tensor(1.5, 1.1, 0.9)
    change = smoothed(r, ratio + tensor(0.0, 0.4, 0.0)) - smoothed(r, ratio)
    assert change[1] > 0
    assert (change[[0, 2]] < 0).all()


# ---- the sampler in a run ---------------------------------------------------------------------------


def three(*, missing: Annotated[int, Field(ge=-1)] = -1) -> Data:
    """Three domains of SIZES training samples: in domain i the next token is the last one plus i + 1."""

    def made(counts: tuple[int, ...], seed: int) -> TensorSet:
        domain = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(domain), generator=g)
        domain = domain[order]
        start = torch.randint(V, (len(domain), 1), generator=g)
        ids = (start + (domain[:, None] + 1) * torch.arange(L + 1)) % V
        return TensorSet(torch.arange(len(ids)), input=ids[:, :-1], target=ids[:, 1:], domain=domain)

    held = tuple(0 if i == missing else 8 for i in range(3))
    return Data(made(SIZES, 0), made(held, 1), made((8, 8, 8), 2), classes=V)


def tree(**sampler: Any) -> dict[str, Any]:
    model = {"use": "module", "model": "kd_plugin_ddk.text:conv_lm"}
    args = {"vocab": V, "width": 8, "reach": 2}
    return {
        "data": {"source": "three_domains:three", "batch_size": 8, "eval_batch_size": 5},
        "teacher": {"main": {**model, "args": {**args, "width": 12}, "train": {"steps": 30}}},
        "student": {**model, "args": args},
        "task": {"use": "language"},
        "augmentation": [{"use": "ddk", "every": 4, "samples": 6, **sampler}],
        "loss": [{"use": "ddk", "weight": 0.2}],
        "train": {"steps": 16, "optimizer": {"use": "AdamW", "lr": 1e-2}},
    }


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of this file under a name that a recipe can import."""
    from types import ModuleType

    module = ModuleType("three_domains")
    module.three = three  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "three_domains", module)


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., DomainSampler]:
    """A sampler in a run that was set up, before its first step; the models are untrained."""

    def make(**sampler: Any) -> DomainSampler:
        from kdcore.building import assemble

        stage = StageRun(parse(tree(**sampler)), "test", tmp_path)
        parts = assemble(stage.recipe, stage.source, stage.builder())
        stage.context(parts)
        (found,) = parts.augmentations.values()
        assert isinstance(found, DomainSampler)
        return found

    return make


def domain_of(found: DomainSampler, indices: Tensor) -> list[int]:
    values: Tensor = found.run.source.data.train.values["domain"][indices]
    return values.tolist()


def test_perplexities_are_those_of_the_first_held_out_samples(prepared: Callable[..., DomainSampler]) -> None:
    """By brute force: of each domain the first six samples of val, mean over all their tokens, exp."""
    found = prepared()
    val, student = found.run.source.data.val.values, found.run.student
    expected = []
    for i in range(3):
        rows = (val["domain"] == i).nonzero().flatten()[:6]
        with torch.no_grad():
            logits = student.model.eval()(val["input"][rows]).double().log_softmax(-1)
        chosen = [logits[b, t, val["target"][r, t]].item() for b, r in enumerate(rows) for t in range(L)]
        expected.append(math.exp(-sum(chosen) / len(chosen)))
    student.train()
    assert found.perplexity("student").tolist() == pytest.approx(expected, rel=1e-5)
    assert student.training
    assert found.perplexity("main").tolist() != pytest.approx(expected, rel=1e-3)


def test_dropout_is_off_while_measuring(prepared: Callable[..., DomainSampler]) -> None:
    found = prepared()
    model: Any = found.run.student.model
    model.head = nn.Sequential(nn.Dropout(0.9), model.head)
    found.run.student.train()
    assert torch.equal(found.perplexity("student"), found.perplexity("student"))


def test_frequencies_follow_the_mixture(prepared: Callable[..., DomainSampler]) -> None:
    """Chi-square over 4,000 samples against r; the first interval against the corpus."""
    found = prepared(every=500)
    first = Counter(domain_of(found, found.draw(90, 0)))
    assert stats.chisquare([first[i] for i in range(3)], [4000 * n / 90 for n in SIZES]).pvalue > 1e-3
    second = Counter(domain_of(found, found.draw(90, 1)))
    expected = [4000 * r for r in found.r]
    assert sum(found.r) == pytest.approx(1.0)
    assert stats.chisquare([second[i] for i in range(3)], expected).pvalue > 1e-3
    assert stats.chisquare([second[i] for i in range(3)], [4000 * n / 90 for n in SIZES]).pvalue < 1e-3


def test_a_domain_that_is_used_up_begins_anew(prepared: Callable[..., DomainSampler]) -> None:
    found = prepared(mixture="equal", every=20)
    drawn = torch.cat(
        [found.draw(90, 0), found.draw(90, 1)]
    )  # 320 of three domains, the smallest has 10 samples
    for i, size in enumerate(SIZES):
        mine = drawn[torch.tensor(domain_of(found, drawn)) == i].tolist()
        assert len(set(mine[:size])) == size  # every sample once,
        assert mine == (mine[:size] * 100)[: len(mine)]  # then the same order again
    assert sum(found.cursor) == 320


def test_the_recursion_over_a_run(tmp_path: Path) -> None:
    """The logged shares are equations 1 and 2 of the logged ratios; the first interval is the corpus."""
    kdcore.run(tree(), out=tmp_path / "run", overrides=["train.steps=40", "augmentation.0.every=10"])
    lines = (tmp_path / "run/stages/distill/student/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "ddk_r0" in row]
    assert len(rows) == 4
    assert [rows[0][f"ddk_r{i}"] for i in range(3)] == pytest.approx([n / 90 for n in SIZES])
    r: Tensor | None = None
    for row in rows:
        ratio = tensor(*(row[f"ddk_ratio{i}"] for i in range(3)))
        psi = ratio.exp() if r is None else r * ratio.exp()
        r = psi / psi.sum() if r is None else 0.5 * psi / psi.sum() + 0.5 / 3
        if row is not rows[0]:
            assert [row[f"ddk_r{i}"] for i in range(3)] == pytest.approx(r.tolist(), rel=1e-9)


@pytest.mark.parametrize("step", [6, 8], ids=["inside an interval", "at a border"])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are written at steps 2, 4, ...: step 8 is a border, where the student is measured again."""
    over = ["train.checkpoint_every=2"]
    kdcore.run(tree(), out=tmp_path / "whole", overrides=over)

    def crashing(self: DomainSampler, batch: Any) -> Any:
        if self.run.step == step:
            raise ConnectionError("power cut")
        return batch

    monkeypatch.setattr(DomainSampler, "forward", crashing)
    with pytest.raises(ConnectionError):
        kdcore.run(tree(), out=tmp_path / "run", overrides=over)
    monkeypatch.setattr(DomainSampler, "forward", lambda self, batch: batch)
    kdcore.run(tree(), out=tmp_path / "run", overrides=over, resume=True)
    ours, theirs = (load_tensors(tmp_path / name / STUDENT, "test") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    one, other = (
        sorted((tmp_path / name / "stages/distill/student/state").glob("*.state"))[-1]
        for name in ("run", "whole")
    )
    key = "augmentations.ddk._extra_state"
    assert load_state(one)["model"][key] == load_state(other)["model"][key]


@pytest.mark.slow
def test_two_processes_draw_and_measure_as_one(tmp_path: Path) -> None:
    short = ["data.args.train=200", "train.steps=8", "augmentation.0.every=3", "train.eval_every=9"]
    short += ["teacher.main.data.args.train=200", "teacher.main.train.epochs=1"]
    kdcore.run("ddk:text", out=tmp_path / "one", overrides=short)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", "-m", "kdcore", "run", "ddk:text", *short]
    two = [sys.executable, *command, "--quiet", "--out", str(tmp_path / "two")]
    done = subprocess.run(two, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    ours, theirs = (load_tensors(tmp_path / name / STUDENT, "test") for name in ("two", "one"))
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in theirs.items())


@pytest.mark.parametrize("mixture", ["equal", "natural"])
def test_baselines_measure_nothing_and_need_no_teacher(mixture: str, tmp_path: Path) -> None:
    alone = tree(mixture=mixture)
    del alone["teacher"], alone["loss"]
    kdcore.run(alone, out=tmp_path / "run")
    log = (tmp_path / "run/stages/distill/student/metrics.jsonl").read_text()
    assert "ddk_r0" in log
    assert "ddk_ratio0" not in log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"augmentation": [{"use": "ddk", "of": "other"}]}, "name one teacher"),
        ({"augmentation": [{"use": "ddk", "key": "topic"}]}, "has no 'topic'"),
        (
            {"data": {"source": "three_domains:three", "args": {"missing": 1}}},
            "must have samples of the domains",
        ),
        ({"augmentation": [{"use": "ddk", "split": "tune"}]}, "no tune split"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        kdcore.run({**tree(), **change}, out=tmp_path / "run")


# ---- the demonstration's data -----------------------------------------------------------------------


def test_domains_ship_with_python_and_splits_share_no_text() -> None:
    assert all(len(text_of(name)) > 50_000 for name in DOMAINS)
    assert "LATIN SMALL LETTER A" in text_of("names")
    assert "def " in text_of("code")
    assert not re.search(r'(?m)^\s*"""', text_of("code"))  # where a docstring would stand
    parts = dealt("".join(str(i % 10) for i in range(1000)), size=10)
    assert [len(parts[p]) for p in ("train", "val", "test")] == [70, 10, 20]
    code = text_of("code")
    pieces = [piece for part in dealt(code).values() for piece in part]
    assert Counter(pieces) == Counter(code[i : i + 2000] for i in range(0, len(code), 2000))


def test_blocks_have_their_next_tokens_and_domains() -> None:
    data = domains(train=100, val=4, test=6, block=16)
    values = data.train.values
    assert Counter(values["domain"].tolist()) == {0: 70, 1: 20, 2: 5, 3: 5}
    assert torch.equal(values["input"][:, 1:], values["target"][:, :-1])
    assert Counter(data.test.values["domain"].tolist()) == dict.fromkeys(range(4), 6)
    balanced = domains(train=40, val=4, test=6, block=16, balanced=True)
    assert Counter(balanced.train.values["domain"].tolist()) == dict.fromkeys(range(4), 10)
    assert torch.equal(balanced.test.values["input"], data.test.values["input"])
    with pytest.raises(InputError, match="fewer blocks"):
        domains(train=10**7)


def test_the_model_is_causal() -> None:
    torch.manual_seed(0)
    model, ids = conv_lm(vocab=V, layers=2, reach=3), torch.randint(V, (1, 9))
    other = ids.clone()
    other[0, 6] = (ids[0, 6] + 1) % V
    change = (model(ids) - model(other)).abs().amax(-1)[0]
    assert (change[:6] == 0).all()
    assert (change[6:] > 0).all()
