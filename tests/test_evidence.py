"""tools/evidence.py: what is said of a demonstration follows from its values, and what is generated is fresh."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdcore.comparison.record import record
from kdcore.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = {e["slug"]: e for e in tomllib.loads((ROOT / "registry.toml").read_text("utf-8"))["method"]}
SHOWN = {"none": [0.50, 0.51, 0.52, 0.53], "kd": [0.61, 0.59, 0.62, 0.60], "ours": [0.70, 0.71, 0.73, 0.72]}


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "tools" / "evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add(module: ModuleType, folder: Path, values: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    record(folder, more.pop("metric", "accuracy"), range(len(values["ours"])), values, ["none", "kd"])
    said = {"command": "kd compare x", "own": "ours", "claim": "shown", "finding": "It is.", "title": ""}
    return dict(module.entry_of(folder, **{**said, **more}))


def test_generated_evidence_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "evidence.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slug", sorted(ENTRIES))
def test_status_follows_from_the_evidence(slug: str) -> None:
    entry, kept = ENTRIES[slug], (ROOT / "plugins" / slug / "evidence.json").exists()
    assert ("result" in entry) == kept
    assert (entry["status"] == "demonstrated") == entry.get("result", "").startswith(("shown", "partly"))


def test_the_table_has_means_differences_and_corrected_p(evidence: ModuleType, tmp_path: Path) -> None:
    # By hand: ours - kd = 0.09, 0.12, 0.11, 0.12: mean 0.11, sd 0.014142, t = 15.556; ours - none is 0.2, 0.2, 0.21, 0.19.
    text = evidence.page(add(evidence, tmp_path, SHOWN))
    row = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert row.startswith(
        "| ours | 71.50 ± 1.29 | +20.00 [18.70, 21.30], p < 0.001 | +11.00 [8.75, 13.25], p "
    )
    assert "`kd compare x`" in text
    assert text.endswith("Claim shown. It is.")


def test_a_claim_that_the_values_do_not_bear_out_is_refused(evidence: ModuleType, tmp_path: Path) -> None:
    level = {**SHOWN, "ours": [0.53, 0.50, 0.51, 0.52]}
    with pytest.raises(SystemExit, match="no comparison shows ours to be better"):
        add(evidence, tmp_path, level)
    assert add(evidence, tmp_path, level, claim="not shown")["claim"] == "not shown"


def test_lower_is_better_where_the_metric_says_so(evidence: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no comparison shows ours"):
        add(evidence, tmp_path, SHOWN, metric="perplexity")
    worse_first = {"none": SHOWN["ours"], "kd": SHOWN["kd"], "ours": SHOWN["none"]}
    assert add(evidence, tmp_path, worse_first, metric="perplexity")


def test_a_missing_arm_or_seed_is_refused(evidence: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--own theirs: the arms are none, kd, ours"):
        add(evidence, tmp_path, SHOWN, own="theirs")
    add(evidence, tmp_path, SHOWN)
    path = tmp_path / "compare.json"
    tree = json.loads(path.read_text("utf-8"))
    tree["values"]["kd"].pop()
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(SystemExit, match="kd has not one value for each of the 4 seeds"):
        evidence.entry_of(tmp_path, "c", "ours", "shown", "f", "")


def test_what_kd_compare_leaves_is_read(evidence: ModuleType, tmp_path: Path) -> None:
    rows = [{"arm": arm, "values": values, "matched": arm != "ours"} for arm, values in SHOWN.items()]
    runs = {"none": {"0": {"versions": {"kdcore": "0.1", "torch": "2"}}}}
    tree = {"metric": "accuracy", "seeds": [0, 1, 2, 3], "table": rows, "runs": runs}
    (tmp_path / "compare.json").write_text(json.dumps(tree), "utf-8")
    entry = evidence.entry_of(tmp_path, "c", "ours", "shown", "f", "")
    assert entry["values"] == SHOWN
    assert entry["references"] == ["none", "kd"]
    assert entry["versions"]["torch"] == "2"
    assert "Not matched to the others, by design: ours." in evidence.page(entry)


def test_the_result_takes_its_place_in_the_catalogue(evidence: ModuleType) -> None:
    before = '[[method]]\nslug = "a"\nstatus = "x"\nclaim = "c"\n\n[[method]]\nslug = "b"\nstatus = "y"\n'
    once = evidence._with_result(before, "a", 'shown: "so"')
    assert once == before.replace('"x"\n', '"x"\nresult = "shown: \\"so\\""\n')
    assert evidence._with_result(once, "a", "partly: p") == before.replace(
        '"x"\n', '"x"\nresult = "partly: p"\n'
    )
    kinds = [{"claim": "shown", "finding": "A."}, {"claim": "not shown", "finding": "B."}]
    assert evidence.summary(kinds) == "partly: A. B."


def test_a_record_without_a_value_or_a_reference_is_not_written(tmp_path: Path) -> None:
    for row in ([0.7], [0.7, float("nan")], [0.7, float("inf")]):
        with pytest.raises(InputError, match="ours: one finite value for each of the seeds"):
            record(tmp_path / "a", "accuracy", [0, 1], {"none": [0.5, 0.6], "ours": row}, ["none"])
    with pytest.raises(InputError, match="no such arm"):
        record(tmp_path / "a", "accuracy", [0, 1], {"none": [0.5, 0.6]}, ["kd"])
    assert not (tmp_path / "a").exists()


def test_seeds_that_are_no_row_are_named_one_by_one(tmp_path: Path) -> None:
    values = {"none": [0.5, 0.6, 0.7], "ours": [0.7, 0.8, 0.8]}
    assert "seeds 0, 5, 7 |" in record(tmp_path / "a", "accuracy", [0, 5, 7], values, ["none"])
    assert "seeds 4 to 6 |" in record(tmp_path / "b", "accuracy", [4, 5, 6], values, ["none"])
