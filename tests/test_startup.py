"""The command line starts without transformers; in anybody else's process torchmetrics is whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from kdcore import startup
startup.enabled = {enabled}
{first}
from kdcore.task import _metric_class
found = _metric_class("accuracy"), _metric_class("perplexity"), _metric_class("calibration_error")
assert all(isinstance(each, type) for each in found), found
with startup.lean():
    import kdcore.engine
from torchmetrics.utilities.imports import _TRANSFORMERS_GREATER_EQUAL_4_4
assert bool(_TRANSFORMERS_GREATER_EQUAL_4_4)  # asked later, it says the truth
print("transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("enabled", "first", "printed"),
    [(True, "", "False"), (False, "", "True"), (True, "import transformers", "True")],
)
def test_metrics_without_transformers(enabled: bool, first: str, printed: str) -> None:
    code = CODE.format(enabled=enabled, first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed
