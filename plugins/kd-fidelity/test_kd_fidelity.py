"""The measures and losses against outside values, and the probe on finished runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_kd_fidelity.__main__ import main
from kd_plugin_kd_fidelity.loss import sequence_divergence
from kd_plugin_kd_fidelity.measures import (
    agreement,
    answer,
    answer_agreement,
    bleu,
    calibration_error,
    fidelity,
)
from kd_plugin_kd_fidelity.oracle import ORACLES
from kd_plugin_kd_fidelity.pairs import pairs_of
from kd_plugin_kd_fidelity.probe import KDFidelity
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError, Outputs, shipping
from kdcore.checkpoint import load_tensors
from kdcore.testing import Oracle, check_oracle

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 100, "flat": True}, "batch_size": 50},
    "teacher": {"main": {"use": "module", "model": "kdcore.zoo:mlp", "train": {"epochs": 30}}},
    "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}},
    "task": {"metrics": ["accuracy", "calibration_error"]},
    "loss": [{"use": "kd-fidelity"}],
    "train": {"epochs": 10, "optimizer": {"use": "AdamW", "lr": 1e-2}},
    "report": {"baseline": True},
    "probe": [{"use": "kd-fidelity"}],
}


def rows(seed: int, count: int = 200, classes: int = 5) -> Tensor:
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


# ---- the losses under study -----------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


@pytest.mark.parametrize(
    ("kind", "temperature", "expected"),
    [
        ("forward", 1.0, 0.36806),
        ("forward", 2.0, 0.52325),
        ("reverse", 1.0, 0.51083),
        ("reverse", 2.0, 0.57536),
        ("js", 1.0, 0.10175),
    ],
)
def test_two_classes_of_the_official_functions(kind: Any, temperature: float, expected: float) -> None:
    """p_T = (0.9, 0.1), p_S = (0.5, 0.5)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(9), 0.0]])
    value = sequence_divergence(student, teacher, kind=kind, temperature=temperature)
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_a_short_sequence_weighs_as_a_long_one() -> None:
    """The mean of each sequence first: a token mean would let the 20 tokens outweigh the 2."""
    student, teacher = torch.zeros(2, 20, 3), torch.zeros(2, 20, 3)
    teacher[0, :, 0], teacher[1, :, 0] = 1.0, 3.0
    mask = torch.tensor([[True] * 20, [True] * 2 + [False] * 18])
    long, short = sequence_divergence(student, teacher, mask)
    alone = [sequence_divergence(student[i, :1], teacher[i, :1]).item() for i in (0, 1)]
    assert [long.item(), short.item()] == pytest.approx(alone)
    assert sequence_divergence(student, teacher, torch.zeros(2, 20)).tolist() == [0.0, 0.0]


def test_noise_is_the_seeds_alone(tmp_path: Path) -> None:
    def weights(name: str, noise: float) -> dict[str, Tensor]:
        tree = {**RECIPE, "loss": [{"use": "kd-fidelity", "noise": noise}], "train": {"steps": 3}}
        tree["report"], tree["probe"], tree["teacher"] = {}, [], {"main": {**RECIPE["teacher"]["main"]}}
        tree["teacher"]["main"].pop("train")
        return load_tensors(kdcore.run(tree, out=tmp_path / name).student, "test")

    one, same, none = weights("a", 2.0), weights("b", 2.0), weights("c", 0.0)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], none[k]) for k in one)


# ---- the measures ---------------------------------------------------------------------------------------


def test_agreement_is_symmetric_and_bounded_by_the_accuracies() -> None:
    s, t, y = rows(0), rows(0) + 0.7 * rows(1), rows(0).argmax(-1)
    y[::3] = 0
    a = agreement(s, t).mean()
    assert a == agreement(t, s).mean()
    assert a >= agreement(s, nn.functional.one_hot(y, 5)).mean() + (t.argmax(-1) == y).float().mean() - 1
    assert agreement(s, s).mean() == 1
    assert 0.3 < a < 0.95


def test_fidelity_sees_what_agreement_does_not() -> None:
    """The same first choice throughout, and another distribution."""
    s = rows(2)
    assert agreement(s, 0.3 * s).mean() == 1
    assert torch.allclose(fidelity(s, s + 3), torch.ones(200), atol=1e-6)
    assert fidelity(s, 0.3 * s).mean() < 0.95
    assert torch.allclose(fidelity(s, 0.3 * s), fidelity(0.3 * s, s), atol=1e-6)


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_of_torchmetrics(bins: int) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    z, y = rows(3), rows(4).argmax(-1)
    y[::2] = z[::2].argmax(-1)
    expected = multiclass_calibration_error(z, y, num_classes=5, n_bins=bins)
    assert calibration_error(z, y, bins=bins).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        (
            "first add 3 and 4 to get 7 . the answer is 7 .",
            "add 3 and 4 , which gives 7 . so the answer is 7 .",
            45.07763457,
        ),
        ("the cat sat", "the cat sat on the mat", 36.78794411),
        ("on the mat", "a dog ran", 0.0),
        ("x y z w v", "x y z w v", 100.0),
        ("the the the the", "the cat is on the mat", 11.52159099),
        ("a b c d e f g", "a b q d e r g h", 17.02611698),
        ("to", "to be", 36.78794411),
        ("", "to be", 0.0),
    ],
)
def test_bleu_of_sacrebleu(candidate: str, reference: str, expected: float) -> None:
    """sacreBLEU 2.6.0: BLEU(effective_order=True, tokenize="none").sentence_score; the empty text by definition."""
    assert bleu(candidate, reference) == pytest.approx(expected, abs=1e-7)


def test_answers_are_compared_after_normalising() -> None:
    told = ["so it is 1,200.", "x = 12 = $1200.0", "The answer is (B)", "-0.50", ""]
    assert [answer(text) for text in told] == ["1200", "1200", "b", "-0.5", ""]
    assert answer_agreement(told, ["1200", "1201", "b", "-.5 or -0.5", ""]) == pytest.approx(3 / 5)


# ---- the probe ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> kdcore.Result:
    return kdcore.run(RECIPE, out=tmp_path_factory.mktemp("run") / "run")


def test_the_probe_tells_what_the_run_told(run: kdcore.Result) -> None:
    """Accuracy and calibration error are torchmetrics' of the run, agreement is the core's; gains are differences."""
    found, test = run.results["probes"]["kd-fidelity"], run.results["test"]
    for ours, name in ((found["student"], "student"), (found["baseline"], "baseline")):
        for metric in ("accuracy", "calibration_error"):
            assert ours[metric] == pytest.approx(test[name][metric], abs=1e-5)
    assert found["teachers"]["main"]["accuracy"] == pytest.approx(test["main"]["accuracy"])
    assert found["student"]["agreement_main"] == pytest.approx(test["student"]["agreement_main"])
    improvement = test["student"]["accuracy"] - test["baseline"]["accuracy"]
    assert found["gain"]["improvement"] == pytest.approx(improvement, abs=1e-6)
    assert found["student"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10


def test_the_teacher_as_its_own_student(run: kdcore.Result) -> None:
    _, stage = shipping.load_run(run.folder)
    teacher = shipping.load_teachers(stage)["main"]
    found = KDFidelity(split="val", choose_on="tune" if stage.source.data.tune else "train").measure(
        stage, {"student": teacher, "main": teacher}, stage.source
    )
    assert found["student"]["agreement_main"] == 1
    assert found["student"]["fidelity_main"] == pytest.approx(1, abs=1e-6)
    assert found["student"]["accuracy"] == found["teachers"]["main"]["accuracy"]


class Tokens(nn.Module):
    """A language model's outputs: the first of 4 tokens is a prompt."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right = right

    def forward(self, batch: Batch) -> Outputs:
        target = batch["tokens"].clone()
        logits = self.right * nn.functional.one_hot(target, 6).float()
        target[:, 0] = -100
        logits[:, 0] = logits[:, 0].roll(1, -1)  # wrong, and not to be counted
        return Outputs(logits=logits, target=target, mask=target != -100)


class TokenData:
    def loader(self, split: str) -> Iterator[Batch]:
        yield Batch({"id": torch.arange(5), "tokens": torch.arange(20).reshape(5, 4) % 6})


def test_tokens_count_where_they_are_supervised(run: kdcore.Result, tmp_path: Path) -> None:
    from dataclasses import replace

    _, stage = shipping.load_run(run.folder)
    stage = replace(stage, folder=tmp_path)  # no student alone there
    found = KDFidelity().measure(stage, {"student": Tokens(1.0), "main": Tokens(9.0)}, TokenData())
    assert found["student"]["accuracy"] == found["student"]["agreement_main"] == 1
    p, q = torch.full((6,), 1 / (math.e**9 + 5)).double(), torch.full((6,), 1 / (math.e + 5)).double()
    p[0], q[0] = 1 - p[1:].sum(), 1 - q[1:].sum()
    m = (p + q) / 2
    js = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    assert found["student"]["fidelity_main"] == pytest.approx(1 - js.item() / math.log(2), abs=1e-5)
    assert "baseline" not in found


def test_choosing_and_judging_on_one_split_is_refused() -> None:
    with pytest.raises(InputError, match="is not judged on it"):
        KDFidelity(split="val")


def test_pairs_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {"main": {**RECIPE["teacher"]["main"], "train": {"steps": 20}}}
    tree = {**RECIPE, "teacher": teacher, "train": {"steps": 4, "optimizer": {"use": "AdamW", "lr": 1e-2}}}
    kdcore.compare(tree, ["forward-T2.0:loss.0.temperature=2.0"], seeds=2, out=tmp_path / "both")
    pairs = list(pairs_of(tmp_path / "both"))
    assert [(r.method, r.temperature, r.seed) for r in pairs] == [
        *((m, t, s) for m, t in (("kd", 1.0), ("tiny", 1.0), ("forward", 2.0)) for s in (0, 1))
    ]
    import json

    told = {
        row["arm"]: row["values"] for row in json.loads((tmp_path / "both/compare.json").read_text())["table"]
    }
    assert [r.accuracy for r in pairs] == pytest.approx([*told["kd"], *told["tiny"], *told["forward-T2.0"]])
    assert [r.sft_accuracy for r in pairs] == pytest.approx(told["none"] * 3)
    main([str(tmp_path / "both")])
    assert "H1 I > 0 | all" in capsys.readouterr().out
    with pytest.raises(InputError, match="no comparison"):
        list(pairs_of(tmp_path))
