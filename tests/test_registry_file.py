"""registry.toml as a file: keys, types and allowed values of every entry, one entry for each method card."""

import re
import tomllib
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT.parent / "shared" / "methods"  # beside the checkout, or absent; nothing installed reads it
NOT_METHODS = {"README", "llm-kd-surveys"}

KINDS = ["teacher", "student", "router", "loss", "augmentation", "stage", "probe"]
MODALITIES = [
    "image",
    "text",
    "audio",
    "video",
    "tabular",
    "point-cloud",
    "graph",
    "interaction",
    "multimodal",
    "any",
]
CHOICES = {
    "kind_of": {"method", "toolbox"},
    "fidelity": {"parity", "paper", "reconstruction"},
    "confidence": {"high", "medium", "low"},
    "status": {"planned", "experimental", "implemented", "demonstrated"},
}
LICENCES = {"none", "MIT", "Apache-2.0", "CC-BY-NC-SA-4.0"}
TEXTS = ["slug", "title", "summary", "claim", *CHOICES]
REQUIRED = {*TEXTS, "kinds", "modalities", "deviations"}
OPTIONAL = {"paper", "code", "result"}


def is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and value == value.strip() and "\n" not in value


def list_faults(name: str, values: object, order: list[str]) -> list[str]:
    """Faults of a list that must be a non-empty sublist of `order`, in that order and without repetition."""
    if isinstance(values, list) and values and values == [value for value in order if value in values]:
        return []
    return [f"{name}: {values!r}"]


def paper_faults(paper: dict[str, Any]) -> list[str]:
    faults = [f"paper.{key}: unknown" for key in paper.keys() - {"authors", "venue", "year", "arxiv", "url"}]
    faults += [f"paper.{key}" for key in paper.keys() & {"authors", "venue"} if not is_text(paper[key])]
    if "venue" not in paper or type(paper.get("year")) is not int or not 2000 <= paper["year"] <= 2100:
        faults.append("paper: needs a venue and an integer year")
    arxiv = paper.get("arxiv", "")
    if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        faults.append(f"paper.arxiv: {arxiv!r}")
    if paper.get("url") != f"https://arxiv.org/abs/{arxiv}":
        faults.append("paper.url: not the page of its arXiv id")
    return faults


def code_faults(code: dict[str, Any]) -> list[str]:
    if code.keys() != {"repository", "commit", "licence"}:
        return [f"code: keys {sorted(code)}"]
    faults = []
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", code["repository"]):
        faults.append(f"code.repository: {code['repository']!r}")
    if not re.fullmatch(r"([0-9a-f]{40})?", code["commit"]):
        faults.append(f"code.commit: {code['commit']!r}")
    return faults if code["licence"] in LICENCES else [*faults, f"code.licence: {code['licence']!r}"]


def entry_faults(entry: dict[str, Any]) -> list[str]:
    """All faults of one entry, each naming its key first; empty for a sound one."""
    if not REQUIRED <= entry.keys() <= REQUIRED | OPTIONAL:
        return [f"keys: {sorted(entry.keys() ^ REQUIRED)}"]
    faults = [f"{key}: {entry[key]!r}" for key in TEXTS if not is_text(entry[key])]
    faults += [f"{key}: {entry[key]!r}" for key, allowed in CHOICES.items() if entry[key] not in allowed]
    if not re.fullmatch(r"[a-z][a-z0-9-]*", entry["slug"]):
        faults.append(f"slug: {entry['slug']!r}")
    if len(entry["summary"]) >= 100:
        faults.append(f"summary: {len(entry['summary'])} characters")
    faults += list_faults("kinds", entry["kinds"], KINDS)
    faults += list_faults("modalities", entry["modalities"], MODALITIES)
    faults += [f"deviations: {text!r}" for text in entry["deviations"] if not is_text(text)]
    if ("paper" in entry) != (entry["kind_of"] == "method"):
        faults.append("paper: a method has one, a toolbox none")
    if entry["fidelity"] == "parity" and "code" not in entry:
        faults.append("code: parity needs code to compare with")
    faults += paper_faults(entry["paper"]) if "paper" in entry else []
    return faults + (code_faults(entry["code"]) if "code" in entry else [])


REGISTRY = tomllib.loads((ROOT / "registry.toml").read_text(encoding="utf-8"))
ENTRIES: list[dict[str, Any]] = REGISTRY["method"]
SOUND = next(entry for entry in ENTRIES if entry["slug"] == "taid")


def test_only_method_tables() -> None:
    assert REGISTRY.keys() == {"method"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.get("slug")))
def test_entry_is_sound(entry: dict[str, Any]) -> None:
    assert entry_faults(entry) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("slug", "Taid"),
        ("slug", "2taid"),
        ("title", ""),
        ("summary", "x" * 100),
        ("kind_of", "paper"),
        ("kinds", []),
        ("kinds", ["loss", "teacher"]),
        ("kinds", ["loss", "loss"]),
        ("modalities", ["smell"]),
        ("fidelity", "exact"),
        ("confidence", 1),
        ("status", "done"),
        ("claim", "two\nlines"),
        ("deviations", [""]),
        ("extra", "key"),
        ("paper.arxiv", "2501.169"),
        ("paper.url", "https://arxiv.org/abs/2501.00000"),
        ("paper.year", "2025"),
        ("paper.doi", "10.1/2"),
        ("code.commit", "a062892"),
        ("code.licence", "free"),
        ("code.repository", "https://github.com/SakanaAI"),
    ],
)
def test_fault_is_found(path: str, value: object) -> None:
    entry = deepcopy(SOUND)
    *tables, key = path.split(".")
    (entry[tables[0]] if tables else entry)[key] = value
    assert len(entry_faults(entry)) >= 1


@pytest.mark.parametrize("key", ["claim", "paper", "code"])
def test_missing_part_is_found(key: str) -> None:
    assert entry_faults({name: value for name, value in SOUND.items() if name != key}) != []


def test_slugs_are_unique_and_sorted() -> None:
    slugs = [entry["slug"] for entry in ENTRIES]
    assert slugs == sorted(set(slugs))


def test_all_methods_are_listed() -> None:
    assert Counter(entry["kind_of"] for entry in ENTRIES)["method"] == 46


def test_every_card_has_its_entry() -> None:
    """Where the cards are at hand: the same slugs, and each entry's arXiv id and repository stand there."""
    cards = {path.stem: path.read_text(encoding="utf-8") for path in CARDS.glob("*.md")}
    methods = {entry["slug"]: entry for entry in ENTRIES if entry["kind_of"] == "method"}
    assert not cards or cards.keys() - NOT_METHODS == methods.keys()
    for slug, entry in methods.items():
        repository = entry.get("code", {}).get("repository", "").removeprefix("https://github.com/")
        facts = [entry["paper"]["arxiv"], repository]
        assert all(fact in cards.get(slug, fact) for fact in facts), slug
