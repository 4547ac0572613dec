"""Every method's demonstration, one after the other: the commands of the READMEs' evidence.

python tools/run_demos.py [SLUG ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

KD = [sys.executable, "-m", "kdcore"]
CLASSICS = ("fitnet", "at", "rkd", "dkd", "dist", "crd")
DEMOS: dict[str, list[list[str]]] = {
    "pld": [
        [*KD, "compare", "pld:digits", "--seeds", "5", "--jobs", "2", "--arm", "pld1:loss.0.temperature=1"]
    ],
    "classics": [[*KD, "compare", f"classics:{name}", "--seeds", "5", "--jobs", "2"] for name in CLASSICS],
    "dho": [[sys.executable, "-m", "kd_plugin_dho.demo", "--seeds", "5"]],
    "mst-distill": [[sys.executable, "-m", "kd_plugin_mst_distill.demo", "--seeds", "5"]],
    "taid": [
        [
            *[*KD, "compare", "taid:text", "--seeds", "5", "--jobs", "2"],
            *["--arm", "divergences.forward_kl", "--arm", "divergences.reverse_kl"],
            *["--arm", "divergences.skew_forward_kl", "--arm", "linear:loss.0.adaptive=false"],
        ]
    ],
    "hf": [[*KD, "compare", "hf:text", "--seeds", "3", "--jobs", "2"]],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slugs", nargs="*", choices=[[], *DEMOS], default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/demos"))
    options = parser.parse_args()
    for slug in options.slugs or DEMOS:
        for index, command in enumerate(DEMOS[slug]):
            print(f"== {slug}: {' '.join(command[1:])}", flush=True)
            subprocess.run([*command, "--out", str(options.out / f"{slug}-{index}")], check=True)


if __name__ == "__main__":
    main()
