"""What a browser gets: the document and the numbers in it."""

import base64
import hashlib
import json
import re
from typing import Any

import pytest

from zerobert.page import Chart, Marker, Series, Table, format_table, render_page


def chart(*series: Series) -> Chart:
    return Chart(title="Loss", y_label="nats", series=series)


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    data: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return data


def drawn(series: Series) -> dict[str, Any]:
    [[found]] = [each["series"] for each in data_of(render_page("run", [chart(series)]))["charts"]]
    assert isinstance(found, dict)
    return found


def test_a_page_needs_nothing_from_outside_and_lets_its_own_script_alone_run() -> None:
    page = render_page("run", [chart(Series(name="a", xs={"step": [0, 1]}, ys=[1, 2]))])
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"src=|@import|url\((?!#)|<link (?!rel=\"icon\" href=\"data:,\")", page)
    assert re.findall(r"https?://[^\"]+", page) == ["http://www.w3.org/2000/svg"]
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "connect-src": "'none'",
    }


def test_only_a_page_that_is_served_may_ask_for_news() -> None:
    page = render_page("run", [], refresh_s=5.0)
    assert "connect-src 'self'" in page
    assert data_of(page)["refresh_s"] == 5.0
    assert data_of(render_page("run", []))["refresh_s"] is None


def test_sections_stand_in_the_order_given() -> None:
    page = render_page(
        "run",
        [
            Table(title="Config", header=["setting", "a"], rows=[["x", "1"]], is_long=True),
            chart(Series(name="a", xs={"step": [0]}, ys=[1])),
            Table(title="Scores", header=["task"], rows=[["x"]]),
        ],
    )
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Config", "Loss", "Scores"]


def test_a_row_leads_somewhere_where_it_has_an_address() -> None:
    table = Table(
        title="Tasks", header=["task", "x"], rows=[["A&B", "1"], ["C", "2"]], links=["a&b.html", ""]
    )
    page = render_page("run", [table])
    assert '<td><a href="a&amp;b.html">A&amp;B</a></td>' in page
    assert page.count("<a ") == 1
    assert "html" not in format_table(table)


def test_whatever_is_handed_over_is_text_and_never_markup() -> None:
    evil = "</script><script>alert('&')</script>"
    page = render_page(
        evil,
        [
            Table(title=evil, header=[evil], rows=[[evil]]),
            Table(title=evil, header=[evil], rows=[[evil]], is_long=True),
            Chart(
                title=evil,
                y_label=evil,
                series=[Series(name=evil, group=evil, xs={evil: [0]}, ys=[1])],
            ),
        ],
        markers=[Marker(label=evil, xs={evil: 0}, group=evil)],
    )
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") == 2 + 2 * 4 + 2
    found = data_of(page)
    assert found["axes"] == [evil]
    assert found["charts"][0]["series"][0]["name"] == evil


def test_a_curve_is_its_numbers_with_the_digits_that_can_be_seen() -> None:
    series = drawn(
        Series(
            name="a",
            xs={"step": [1_234_567, 2_345_678], "hours": [1 / 3, float("nan")]},
            ys=[2 / 3, 5.0],
            color=9,
            is_dashed=True,
        )
    )
    assert series == {
        "name": "a",
        "group": "",
        "color": 1,
        "dashed": True,
        "exact": False,
        "aside": False,
        "xs": {"step": [1_234_567, 2_345_678], "hours": [0.333333, None]},
        "ys": [0.666667, 5],
    }


def test_gaps_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    series = drawn(Series(name="a", xs={"step": [0, 1, 2, 3]}, ys=[1, nan, inf, 2]))
    assert (series["xs"], series["ys"]) == ({"step": [0, 3]}, [1, 2])
    series = drawn(Series(name="a", xs={"step": [0]}, ys=[nan]))
    assert (series["xs"], series["ys"]) == ({"step": []}, [])


def test_a_long_curve_is_means_of_stretches_with_their_extremes() -> None:
    ys = [1.0] * 100_000
    ys[54_321], ys[99_999] = 9.0, -3.0
    series = drawn(Series(name="a", xs={"step": list(range(100_000))}, ys=ys))
    assert {len(series[key]) for key in ("ys", "low", "high")} == {800}
    assert series["xs"]["step"][0] == 124  # a stretch of 125 lies where it ends
    assert series["xs"]["step"][-1] == 99_999
    assert series["high"].index(9) == 54_321 // 125
    assert series["ys"][54_321 // 125] == 1.064
    assert (series["low"][-1], series["high"][-1]) == (-3, 1)
    assert sum(series["high"]) == 799 + 9


def test_a_curve_that_fits_is_whole() -> None:
    series = drawn(Series(name="a", xs={"step": list(range(800))}, ys=list(range(800))))
    assert series["ys"] == list(range(800))
    assert "low" not in series


def test_xs_and_ys_of_different_length_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="a: 2 of step, 1 values"):
        drawn(Series(name="a", xs={"step": [0, 1]}, ys=[1]))


def test_axes_are_those_of_all_curves() -> None:
    series = [
        Series(name="a", xs={"step": [0], "hours": [1]}, ys=[1]),
        Series(name="b", xs={"step": [0], "tokens": [1]}, ys=[1]),
    ]
    assert data_of(render_page("run", [chart(*series)]))["axes"] == ["step", "hours", "tokens"]


def test_a_table_for_the_terminal_is_aligned() -> None:
    rows = [["SST-2", "92.9", "right"], ["x", "-", "missing"]]
    table = Table(title="Scores", header=["task", "value", "note"], rows=rows)
    assert format_table(table).splitlines() == [
        "Scores",
        "",
        "task   value  note",
        "-----  -----  -------",
        "SST-2   92.9  right",
        "x          -  missing",
    ]
    assert '<td>x</td><td class="figure">-</td><td>missing</td>' in render_page("run", [table])


def test_a_table_without_rows_has_its_header() -> None:
    table = Table(title="Scores", header=["task", "value"], rows=[])
    assert format_table(table).splitlines()[2] == "task  value"
    assert "<th" in render_page("run", [table])


def test_a_long_table_marks_the_rows_in_which_columns_differ() -> None:
    rows = [["lr", "0.1", "0.2"], ["seed", "42", "42"]]
    table = Table(title="Config", header=["setting", "a", "b"], rows=rows, is_long=True)
    page = render_page("run", [table])
    assert '<tr class="unlike"><td>lr</td><td>0.1</td><td>0.2</td></tr>' in page
    assert "<tr><td>seed</td><td>42</td><td>42</td></tr>" in page
