"""``kd plugin new``: a plugin of the standard form that passes its own tests at once.

Its files are those in ``templates``, with the names put in by ``string.Template``.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from kdcore import catalog, plugins
from kdcore.errors import InputError
from kdcore.hookspecs import HOOKS

TEMPLATES = Path(__file__).parent / "templates"
TARGETS = {  # kind -> what its component is called in the code; rv-router is RvRouter, not RvRouterRouter
    "loss": "${stem}_loss",
    "teacher": "${camel}Teacher",
    "student": "${camel}Student",
    "router": "${camel}Router",
    "augmentation": "${camel}",
}
FILES = {  # file of the plugin -> its template
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "$module/__init__.py": "__init__.py",
    "$module/$kind.py": "$kind/component.py",
    "$module/digits.toml": "$kind/digits.toml",
    "test_$name.py": "$kind/test.py",
}


def write(slug: str, kind: str, into: Path) -> Path:
    """Write the plugin's folder below ``into``; InputError for a bad slug, kind, or a folder that exists."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        allowed = "lower case letters, digits, single hyphens"
        raise InputError("slug", "not a slug", given=slug, allowed=allowed)
    if kind not in TARGETS:
        raise InputError("--kind", "no such kind", given=kind, allowed=sorted(TARGETS))
    registry = plugins.registry()
    if slug in {*(e.name for e in registry.entries), *(c.name for _, _, c in registry.components())}:
        problem = "a plugin or a component of this name is installed"
        raise InputError("slug", problem, given=slug, hint="choose another")
    folder, names = into / slug, _names(slug, kind)
    if folder.exists():
        raise InputError(str(folder), "exists already", hint="another --into, or another slug")
    for path, template in FILES.items():
        target, source = (Template(each).substitute(names) for each in (path, f"{template}.tmpl"))
        text = Template((TEMPLATES / source).read_text("utf-8")).substitute(names)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(text, "utf-8")
    return folder


def _names(slug: str, kind: str) -> dict[str, str]:
    """What the templates' placeholders stand for."""
    name, stem = (each.replace("-", "_") for each in (slug, slug.removesuffix(f"-{kind}")))
    camel = "".join(map(str.capitalize, stem.split("_")))
    return {
        "slug": slug,
        "name": name,
        "module": f"kd_plugin_{name}",
        "kind": kind,
        "hook": next(hook for hook, each in HOOKS.items() if each == kind),
        "target": Template(TARGETS[kind]).substitute(stem=stem, camel=camel),
        "title": (catalog.method(slug) or {}).get("title", camel).partition(":")[0],
    }
