"""What the plugin declares, its oracles and its recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kd_plugin_classics
import pytest
from kd_plugin_classics.oracle import ORACLES

import kdcore
from kdcore.testing import Oracle, check_oracle

TERMS = {
    "at": {"at-stem", "at-body", "task"},
    "crd": {"classics-crd", "task"},
    "dist": {"classics-dist", "task"},
    "dkd": {"classics-dkd", "task"},
    "fitnet": {"classics-fitnet", "task"},
    "rkd": {"classics-rkd", "task"},
}
CONVENTIONS = {  # name -> zero_at_teacher, couples_batch; none has a hard term inside
    "at": (True, False),
    "crd": (False, True),
    "dist": (False, True),
    "dkd": (True, False),
    "fitnet": (False, False),
    "rkd": (True, True),
}


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


def test_listing_imports_no_torch() -> None:
    code = "import sys, kd_plugin_classics as c; list(c.kd_losses()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_come_from_the_package() -> None:
    from kd_plugin_classics import dkd_loss

    assert dkd_loss.__module__ == "kd_plugin_classics.dkd"
    assert not hasattr(kd_plugin_classics, "no_such_loss")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions(name: str) -> None:
    loss = kdcore.build("loss", f"classics.{name}")
    assert (loss.zero_at_teacher, loss.couples_batch) == CONVENTIONS[name]
    assert (loss.hard_term, loss.t_squared) == (False, True)


@pytest.mark.parametrize("name", TERMS)
def test_recipe(name: str, tmp_path: Path) -> None:
    """Every term acts, and the student that is kept is the same module as the one trained alone."""
    short = ["train.epochs=2", "teacher.main.train.epochs=1"]
    results = kdcore.run(f"classics:{name}", out=tmp_path / "run", overrides=short).results
    assert {term["term"] for term in results["student"]["guards"]["terms"]} == TERMS[name]
    assert results["parameters"]["student"] == results["parameters"]["baseline"]
