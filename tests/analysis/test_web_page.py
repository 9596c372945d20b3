"""Pages of HTML in one file."""

from rope_mm.analysis import web_page


def test_tables_and_paragraphs_of_markdown_become_html_and_nothing_of_them_is_read_as_html():
    text = "Right answers in %.\n\n| name | **a** |\n| --- | ---: |\n| `<x>` | **1** |\n| y | 2 |\n"
    assert web_page.from_markdown(text) == (
        "<p>Right answers in %.</p>\n"
        "<table>\n<tr><th>name</th><th>a</th></tr>\n"
        "<tr><td>&lt;x&gt;</td><td>1</td></tr>\n<tr><td>y</td><td>2</td></tr>\n</table>"
    )


def test_sections_without_content_are_not_shown():
    page = web_page.page("a & b", {"One": web_page.paragraph("here"), "Two": ""})
    assert "<h2>One</h2>" in page and "Two" not in page
    assert page.count("a &amp; b") == 2


def test_panels_of_the_same_curves_share_one_legend():
    points = [(1, 1.0), (2, 2.0)]
    panels = {"loss": {"first run": points, "second run": points}, "lr": {"first run": points}}
    once = web_page.curves(panels)
    assert once.startswith("<svg") and once.count("<!-- first run -->") == 2
    both = {"loss": panels["loss"], "lr": panels["loss"]}
    assert web_page.curves(both).count("<!-- first run -->") == 1
    assert web_page.curves({}) == ""
