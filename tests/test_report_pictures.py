"""Pictures that components draw, in the run's report."""

from __future__ import annotations

from pathlib import Path

from kdcore.report import Page, pictures


def test_the_pictures_of_all_stages_are_shown_in_order(tmp_path: Path) -> None:
    page = Page("run", tmp_path)
    pictures(page)
    assert "Pictures" not in page.markdown
    for name in (
        "stages/one/pictures/b.png",
        "stages/one/pictures/a 1.png",
        "stages/two/part/pictures/c.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "stages/one/other.png").write_bytes(b"not drawn for the report")
    pictures(page)
    shown = [line for line in page.markdown.splitlines() if line.startswith("![")]
    assert [line.partition("](")[2] for line in shown] == [
        "stages/one/pictures/a%201.png)",
        "stages/one/pictures/b.png)",
        "stages/two/part/pictures/c.png)",
    ]
    page.save()
    assert (tmp_path / "report.html").read_text("utf-8").count('src="data:image/png;base64,') == 3


def test_a_page_is_the_same_as_markdown_and_as_html(tmp_path: Path) -> None:
    page = Page("a <b>", tmp_path)
    page.items([("term", "x < y")])
    page.table(("name", "value"), [("a|b", 1.23456), ("c", True)])
    page.table(("count",), [(3,), (-0.5,)])
    page.warning("look out")
    page.save()
    assert (tmp_path / "report.md").read_text("utf-8") == page.markdown
    assert "| a\\|b | 1.235 |" in page.markdown
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "<h1>a &lt;b&gt;</h1>" in html
    assert "<li><strong>term</strong>: x &lt; y</li>" in html
    assert "<td>a|b</td>\n<td>1.235</td>" in html
    assert '<td style="text-align:right">-0.5</td>' in html
    assert "<blockquote>\n<p><strong>Warning:</strong> look out</p>" in html
