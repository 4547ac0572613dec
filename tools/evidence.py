"""Evidence of the demonstrations: from measured values to README tables and the catalogue's ``result``.

python tools/evidence.py add SLUG FOLDER --command "kd compare SLUG ..." --own ARM
    --claim shown|partly|"not shown" --finding "one sentence" [--title "what this one is"]
python tools/evidence.py [--check]

``add`` takes FOLDER/compare.json, as ``kd compare`` leaves it, or as kdcore.comparison.record writes it:
``{"metric": str, "seeds": [int], "values": {arm: [a number a seed]}, "references": [arm], "versions": {name: str}}``,
and keeps values, seeds and versions in plugins/SLUG/evidence.json; the same --title (or none) replaces. Without
``add`` everything generated is written anew: the block between ``<!-- evidence -->`` and ``<!-- /evidence -->`` of
each README, and ``result`` in registry.toml. Statistics are always worked out from the values, by kdcore.comparison.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcore.comparison.record import HOW, table
from kdcore.comparison.stats import compare_all
from kdcore.task import higher_is_better

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ("shown", "partly", "not shown")
STOCK = ("none", "kd")
Entry = dict[str, Any]


def entry_of(folder: Path, command: str, own: str, claim: str, finding: str, title: str) -> Entry:
    """What is kept of a comparison; raises SystemExit where it does not bear out what is said of it."""
    found = json.loads((folder / "compare.json").read_text("utf-8"))
    values = found.get("values") or {row["arm"]: row["values"] for row in found["table"]}
    references = found.get("references") or [arm for arm in STOCK if arm in values]
    if own not in values:
        sys.exit(f"--own {own}: the arms are {', '.join(values)}")
    if bad := [arm for arm, row in values.items() if len(row) != len(found["seeds"])]:
        sys.exit(f"{folder}: {bad[0]} has not one value for each of the {len(found['seeds'])} seeds")
    unmatched = [row["arm"] for row in found.get("table", ()) if not row["matched"]]
    said = {"title": title, "command": command, "own": own, "claim": claim, "finding": finding}
    entry = {
        **said,
        "metric": found["metric"],
        "seeds": found["seeds"],
        "references": references,
        "values": values,
        "unmatched": unmatched,
        "versions": found.get("versions") or _versions(found),
    }
    if claim == "shown" and not _beats_something(entry):
        sys.exit(f"--claim shown: no comparison shows {own} to be better than another arm")
    return entry


def _versions(found: Entry) -> Entry:
    runs: Entry = next(iter(found.get("runs", {}).values()), {})
    first: Entry = next(iter(runs.values()), {})
    return dict(first.get("versions", {}))


def _beats_something(entry: Entry) -> bool:
    higher, own = higher_is_better(entry["metric"]), entry["own"]
    for (ours, theirs), d in compare_all(entry["values"], entry["references"]).items():
        if d.shown and (ours if (d.mean > 0) == higher else theirs) == own:
            return True
    return False


def page(entry: Entry) -> str:
    """Markdown of one demonstration: its command, its table, what it showed."""
    parts = [f"**{entry['title']}**"] if entry["title"] else []
    parts += [f"`{entry['command']}`"]
    parts += [table(entry["metric"], entry["seeds"], entry["values"], entry["references"])]
    if entry["unmatched"]:
        parts += [f"Not matched to the others, by design: {', '.join(entry['unmatched'])}."]
    return "\n\n".join([*parts, f"Claim {entry['claim']}. {entry['finding']}"])


def block(entries: list[Entry]) -> str:
    made = ", ".join(f"{k} {v}" for k, v in entries[0]["versions"].items() if k in ("kdcore", "torch"))
    return "\n\n".join([*map(page, entries), HOW + (f" Made with {made}." if made else "")]) + "\n"


def summary(entries: list[Entry]) -> str:
    """The catalogue's `result`: the weakest claim word that holds for all, and the findings."""
    words = {entry["claim"] for entry in entries}
    return (
        f"{words.pop() if len(words) == 1 else 'partly'}: {' '.join(entry['finding'] for entry in entries)}"
    )


def _sources() -> Iterator[tuple[str, list[Entry]]]:
    for path in sorted(ROOT.glob("plugins/*/evidence.json")):
        yield path.parent.name, json.loads(path.read_text("utf-8"))


def pages() -> dict[Path, str]:
    """Every file that holds something generated, as it should be."""
    registry = (ROOT / "registry.toml").read_text("utf-8")
    found: dict[Path, str] = {}
    for slug, entries in _sources():
        readme = ROOT / "plugins" / slug / "README.md"
        parts = re.split(r"(?s)(<!-- evidence -->\n).*?(<!-- /evidence -->)", readme.read_text("utf-8"))
        if len(parts) != 4:
            sys.exit(f"{readme.relative_to(ROOT)}: one <!-- evidence --> ... <!-- /evidence --> is needed")
        found[readme] = parts[0] + parts[1] + block(entries) + parts[2] + parts[3]
        registry = _with_result(registry, slug, summary(entries))
    return {**found, ROOT / "registry.toml": registry}


def _with_result(registry: str, slug: str, result: str) -> str:
    tables = re.split(r"(?m)^(?=\[\[method\]\])", registry)
    for index, text in enumerate(tables):
        if f'\nslug = "{slug}"\n' in text:
            bare = re.sub(r"(?m)^result = .*\n", "", text)
            head, status, rest = re.split(r"(?m)^(status = .*\n)", bare)
            tables[index] = f"{head}{status}result = {json.dumps(result, ensure_ascii=False)}\n{rest}"
    return "".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail where something generated is stale")
    adding = parser.add_subparsers(dest="what").add_parser("add")
    adding.add_argument("slug", choices=sorted(p.name for p in (ROOT / "plugins").iterdir()), metavar="SLUG")
    adding.add_argument("folder", type=Path)
    for name in ("command", "own", "finding"):
        adding.add_argument(f"--{name}", required=True)
    adding.add_argument("--claim", choices=CLAIMS, required=True)
    adding.add_argument("--title", default="")
    options = parser.parse_args()
    if options.what:
        add(options)
    for path, text in pages().items():
        if not options.check:
            path.write_text(text, "utf-8")
        elif path.read_text("utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale: python tools/evidence.py")


def add(options: argparse.Namespace) -> None:
    path = ROOT / "plugins" / options.slug / "evidence.json"
    entries = json.loads(path.read_text("utf-8")) if path.exists() else []
    said = (options.command, options.own, options.claim, options.finding, options.title)
    entry = entry_of(options.folder, *said)
    titles = [old["title"] for old in entries]
    if entry["title"] in titles:
        entries[titles.index(entry["title"])] = entry
    else:
        entries.append(entry)
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
