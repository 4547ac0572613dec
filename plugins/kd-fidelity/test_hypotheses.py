"""The analysis: the notebooks' numbers on the published table, and what each repair repairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kd_plugin_kd_fidelity.__main__ import PUBLISHED, read
from kd_plugin_kd_fidelity.hypotheses import (
    Finding,
    analyse,
    best_temperatures,
    helps,
    methods_differ,
    sft_of_another_seed,
    shared_likeness,
)
from kd_plugin_kd_fidelity.pairs import Pair, read_csv

# LCS2-IIITD/KD_generalization@a5fed92, analysis/statistical_tests_math.ipynb: statistic and p by task
NOTEBOOK = {
    ("Average", "H1 I > 0", "all"): (8.465315763687904, 5.650477517312819e-10),
    ("Average", "H1 I > 0", "GKD"): (5.104575822555891, 0.00023046936923200754),
    ("Average", "H1 methods differ", "all"): (2.267109288423927, 0.12108053158590967),
    ("gsm8k", "H1 methods differ", "all"): (5.620112181725931, 0.008452857166344403),
    ("Average", "H2 teacher's accuracy", "all"): (-0.010451015507627961, 0.9539692127196084),
    ("Average", "H3 student's size", "all"): (-0.6561923549473493, 3.379283515328986e-05),
    ("MultiArith", "H3 student's size", "all"): (-0.8281413757174615, 2.7234237033303516e-09),
    ("Average", "H3 student's size", "RevKD"): (-0.8601512308077806, 0.0006816635696342234),
    ("gsm8k", "H3.2 student's accuracy alone", "all"): (-0.3781955878384714, 0.029997440989862637),
    ("gsm8k", "H4 agreement", "all"): (-0.33062363804235845, 0.06020440579470475),
    ("MultiArith", "H4 agreement", "all"): (-0.6320408986083471, 7.965654148252868e-05),
    ("gsm8k", "H4 agreement", "GKD"): (-0.6090909090909091, 0.046695709354098856),
    ("gsm8k", "H5 fidelity", "all"): (-0.024155151637797877, 0.8938535884796073),
    ("MultiArith", "H5 fidelity", "RevKD"): (-0.33636363636363636, 0.31182431390038623),
}


@pytest.fixture(scope="module")
def published() -> dict[str, list[Finding]]:
    pairs = read(["published"])
    return {
        task: analyse(
            [r for r in pairs if r.task == task], variant="released", likeness_of="SeqKD", resamples=200
        )
        for task in ("Average", "gsm8k", "MultiArith")
    }


@pytest.mark.parametrize("key", NOTEBOOK, ids=" ".join)
def test_the_notebooks_numbers(published: dict[str, list[Finding]], key: tuple[str, str, str]) -> None:
    task, hypothesis, methods = key
    (found,) = [f for f in published[task] if (f.hypothesis, f.methods) == (hypothesis, methods)]
    value, p = NOTEBOOK[key]
    assert found.value == pytest.approx(value, abs=1e-9)
    assert found.p == pytest.approx(p, rel=1e-6)
    assert found.n == (33 if methods == "all" else 11)


def pair(student: int = 0, accuracy: float = 0.8, **other: object) -> Pair:
    base = Pair("t", f"s{student}", "a", 10.0 * (student + 1), 0.9, 0.8, accuracy)
    return replace(base, **other)  # type: ignore[arg-type]


def test_choosing_the_temperature_on_the_test_items_finds_gains_where_none_are() -> None:
    """Null data: KD = SFT + noise. ``released`` rejects far above 5 %, ``paper`` at about 5 %."""
    rng, rejected, rounds = np.random.default_rng(0), {"released": 0, "paper": 0}, 250
    for _ in range(rounds):
        runs = [
            pair(s, 0.8 + e, temperature=t, choice=0.8 + c)
            for s in range(12)
            for t, e, c in zip((1.0, 2.0, 5.0), *rng.normal(0, 0.02, (2, 3)), strict=True)
        ]
        for variant in rejected:
            chosen = best_temperatures(runs, variant=variant)  # type: ignore[arg-type]
            assert len(chosen) == 12
            rejected[variant] += helps(chosen).p < 0.05
    assert rejected["released"] / rounds > 0.5
    assert rejected["paper"] / rounds < 0.08  # 0.05 and two standard errors
    assert rejected["paper"] / rounds > 0.02


def test_temperatures_without_held_out_accuracy_are_refused() -> None:
    with pytest.raises(ValueError, match="no held-out accuracy"):
        analyse(read_csv(PUBLISHED)[:7])


def test_the_same_rows_again_are_no_new_evidence() -> None:
    """Each student 20 times over: p as if independent falls without bound, the clustered numbers stay."""
    rng = np.random.default_rng(1)
    runs = [pair(s, 0.82 + rng.normal(0, 0.03), teacher_accuracy=rng.normal()) for s in range(8)]
    again = [replace(r, method="a", seed=k) for r in runs for k in range(20)]
    once, often = helps(runs), helps(again)
    assert often.p < once.p / 10
    assert often.p_clustered == pytest.approx(once.p_clustered)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    few, many = (
        next(f for f in analyse(some, resamples=500) if f.hypothesis.startswith("H2"))
        for some in (runs, again)
    )
    assert many.p < few.p
    assert (many.low, many.high) == pytest.approx((few.low, few.high), abs=0.1)


def test_improvement_falls_with_its_own_sft_by_noise_alone() -> None:
    """Equal students, nothing but noise in SFT: rho is -1/sqrt 2 with one's own, near 0 with another seed's."""
    rng = np.random.default_rng(2)
    runs = [
        pair(s, 0.8 + rng.normal(0, 0.02), sft_accuracy=0.8 + rng.normal(0, 0.02), seed=k)
        for s in range(40)
        for k in range(5)
    ]
    (own,), (other,) = (
        [f for f in analyse(runs, variant=v, resamples=50) if "H3.2" in f.hypothesis]
        for v in ("released", "paper")
    )
    assert own.value == pytest.approx(-1 / np.sqrt(2), abs=0.1)
    assert abs(other.value) < 0.2
    assert np.isnan(sft_of_another_seed([pair()])).all()


def test_the_join_without_a_method_gives_all_methods_one_agreement() -> None:
    runs = [
        pair(method="a", agreement=0.5),
        pair(method="b", agreement=0.9),
        pair(1, method="b", agreement=0.1),
    ]
    assert [r.agreement for r in shared_likeness(runs, "a")] == [0.5, 0.5]


def test_rank_correlations() -> None:
    """Any rising transform leaves rho alone; reversed ranks give -1."""
    values = [0.1, 0.4, 0.15, 0.6, 0.3]
    runs = [
        pair(s, 0.8 + v, agreement=v, fidelity=-(v**3), teacher_accuracy=np.exp(v))
        for s, v in enumerate(values)
    ]
    rho = {f.hypothesis: f.value for f in analyse(runs, resamples=50) if f.statistic == "rho"}
    assert rho["H4 agreement"] == rho["H2 teacher's accuracy"] == pytest.approx(1)
    assert rho["H5 fidelity"] == pytest.approx(-1)


def test_methods_differ_within_pairs_where_pairs_differ_more() -> None:
    """Identical groups give F = 0. A constant step between methods is lost to ANOVA among unlike pairs, not to ranks."""
    gains = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    same = [pair(s, 0.8 + g, method=m) for s, g in enumerate(gains) for m in "abc"]
    assert methods_differ(same).value == pytest.approx(0, abs=1e-12)
    steps = [replace(r, accuracy=r.accuracy + {"a": 0.0, "b": 0.005, "c": 0.01}[r.method]) for r in same]
    found = methods_differ(steps)
    assert found.p > 0.9
    assert found.p_clustered == pytest.approx(np.exp(-6))  # Friedman's chi2 is 12 at 2 degrees of freedom


def test_pairs_of_several_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="several tasks"):
        analyse([pair(task="x"), pair(task="y")])
