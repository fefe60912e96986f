"""What a browser gets; the drawings are read as XML, which holds them to being well-formed."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from zerobert.page import Chart, Series, Table, Text, format_table, render_page


def chart(*series: Series) -> Chart:
    return Chart(title="Loss", x_label="step", y_label="nats", series=series)


def svg_of(*series: Series) -> ElementTree.Element:
    page = render_page("run", [chart(*series)])
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def polylines(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())]
        for line in svg.iter("polyline")
    ]


def labels(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter("text")]


def test_a_page_needs_nothing_from_outside_and_runs_no_script() -> None:
    page = render_page("run", [chart(Series(name="a", xs=[0, 1], ys=[1, 2]))])
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"<script|https?:|src=|@import|url\(", page)


def test_sections_stand_in_the_order_given() -> None:
    page = render_page(
        "run",
        [
            Text(title="Config", body="{}"),
            chart(Series(name="a", xs=[0], ys=[1])),
            Table(title="Scores", header=["task"], rows=[["x"]]),
        ],
    )
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Config", "Loss", "Scores"]


def test_whatever_is_handed_over_is_text_and_never_markup() -> None:
    evil = "<script>alert('&')</script>"
    page = render_page(
        evil,
        [
            Text(title=evil, body=evil),
            Table(title=evil, header=[evil], rows=[[evil]]),
            Chart(
                title=evil, x_label=evil, y_label=evil, series=[Series(name=evil, xs=[0], ys=[1])]
            ),
        ],
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 12


def test_a_curve_goes_from_corner_to_corner_of_a_linear_axis() -> None:
    [[start, end]] = polylines(svg_of(Series(name="a", xs=[0, 10], ys=[0, 1])))
    assert start == (64.0, 256.0)
    # 5 % of air above the highest value
    assert end[0] == 546.0
    assert end[1] == pytest.approx(10 + 246 * (1 - 1 / 1.05), abs=0.1)


def test_ticks_are_round_numbers() -> None:
    found = labels(svg_of(Series(name="a", xs=[0, 3000], ys=[0.0, 0.9])))
    assert found[:5] == ["0", "0.2", "0.4", "0.6", "0.8"]
    assert found[5:12] == ["0", "500", "1k", "1.5k", "2k", "2.5k", "3k"]
    assert found[12:] == ["step", "nats"]


def test_values_over_several_decades_get_a_logarithmic_axis() -> None:
    svg = svg_of(Series(name="a", xs=[0, 1, 2], ys=[1e-3, 1e-1, 1e1]))
    assert labels(svg)[:5] == ["0.001", "0.01", "0.1", "1", "10"]
    [curve] = polylines(svg)
    heights = [y for _, y in curve]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])


def test_a_zero_keeps_the_axis_linear() -> None:
    assert labels(svg_of(Series(name="a", xs=[0, 1], ys=[0, 1000])))[:3] == ["0", "200", "400"]


def test_gaps_are_left_out_and_an_empty_chart_says_so() -> None:
    nan, inf = float("nan"), float("inf")
    [curve] = polylines(svg_of(Series(name="a", xs=[0, 1, 2, 3], ys=[1, nan, inf, 2])))
    assert len(curve) == 2
    assert "No values yet." in render_page("run", [chart(Series(name="a", xs=[0], ys=[nan]))])


def test_one_point_and_equal_values_are_drawn() -> None:
    [[(x, y)]] = polylines(svg_of(Series(name="a", xs=[5], ys=[0])))
    assert (x, y) == (305.0, 133.0)
    assert len(polylines(svg_of(Series(name="a", xs=[0, 1], ys=[3, 3])))[0]) == 2


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    ys = [1.0] * 100_000
    ys[54_321] = 9.0
    [curve] = polylines(svg_of(Series(name="a", xs=list(range(100_000)), ys=ys)))
    assert len(curve) <= 1000
    lowest = min(y for _, y in curve)
    assert [x for x, y in curve if y == lowest] == [pytest.approx(64 + 482 * 0.54321, abs=0.1)]


def test_xs_and_ys_of_different_length_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="shorter"):
        svg_of(Series(name="a", xs=[0, 1], ys=[1]))


def test_the_legend_has_the_last_value() -> None:
    page = render_page("run", [chart(Series(name="held-out", xs=[0, 1], ys=[9, 3.14159]))])
    assert "held-out <b>3.142</b>" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-5"), (3.23e-5, "3.23e-5"), (1500, "1.5k"), (1234, "1234"), (2_500_000, "2.5M")],
)
def test_figures_are_short(value: float, text: str) -> None:
    page = render_page("run", [chart(Series(name="a", xs=[0], ys=[value]))])
    assert f"a <b>{text}</b>" in page


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
