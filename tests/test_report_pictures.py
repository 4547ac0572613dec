"""Pictures that components draw, in the run's report."""

from __future__ import annotations

from pathlib import Path

from kdcore.report import Page, _pictures


def test_the_pictures_of_all_stages_are_shown_in_order(tmp_path: Path) -> None:
    page = Page("run")
    _pictures(page, tmp_path)
    assert "Pictures" not in page.markdown
    for name in ("stages/one/pictures/b.png", "stages/one/pictures/a.png", "stages/two/part/pictures/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "stages/one/other.png").write_bytes(b"not drawn for the report")
    _pictures(page, tmp_path)
    shown = [line for line in page.markdown.splitlines() if line.startswith("![")]
    assert [line.partition("](")[2] for line in shown] == [
        "stages/one/pictures/a.png)",
        "stages/one/pictures/b.png)",
        "stages/two/part/pictures/c.png)",
    ]
    page.save(tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8").count("data:image/png;base64,") == 3
