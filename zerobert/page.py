"""Tables and curves as one self-contained HTML page: nothing is fetched, nothing outside is asked.

Whoever measured something hands it over as a chart or a table; nothing here knows what a loss is.
Tables are plain HTML; `page.js` beside this file draws the curves from the numbers in the page.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_POINTS = 800  # more than a chart has pixels
_NUM_COLORS = 8
_MAX_LINE = 60  # a longer cell is broken into lines
_FIGURE = re.compile(r"([-+]?[\d.,]+(e-?\d+)?( ?(%|[A-Za-z]{1,3}))?|-|)")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
        xs: what may stand on the x axis, by its name; each as long as `ys`.
        ys: values that are not finite are left out.
        group: what can be hidden as a whole, a run; empty for none.
        color: one of eight; by default the place in the chart.
        is_exact: has no noise that smoothing were to take away.
        is_aside: what was given up; drawn faintly, not in the legend, not smoothed.
    """

    name: str
    xs: Mapping[str, Sequence[float]]
    ys: Sequence[float]
    group: str = ""
    color: int | None = None
    is_dashed: bool = False
    is_exact: bool = False
    is_aside: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over a common x axis; `is_log` is for values of several magnitudes."""

    title: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A moment that every chart shows."""

    label: str
    xs: Mapping[str, float]
    group: str = ""
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; columns that hold only figures are set flush right.

    Attributes:
        is_long: opens on a click and can be searched; of several columns behind the first one, the
            rows in which they differ are marked, and can be shown alone.
        links: for each row, the address that its first cell leads to, empty for none; () for no
            links at all.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_long: bool = False
    links: Sequence[str] = ()


# How all of our pages begin.
PAGE_HEAD = "<!DOCTYPE html>"


def render_page(
    title: str,
    sections: Sequence[Chart | Table],
    *,
    markers: Sequence[Marker] = (),
    refresh_s: float | None = None,
) -> str:
    """The whole HTML document, sections in the order given; charts stand side by side.

    Args:
        refresh_s: how often the page asks its own address for news of itself; None for never.
    """
    charts = [section for section in sections if isinstance(section, Chart)]
    data = {
        "axes": _axes(charts),
        "refresh_s": refresh_s,
        "charts": [_chart_data(chart) for chart in charts],
        "markers": [
            {"label": each.label, "xs": _numbers(each.xs), "group": each.group, "color": each.color}
            for each in markers
        ],
    }
    script = _asset("page.js")
    name = html.escape(title)
    body = "\n".join(
        _render_chart(section) if isinstance(section, Chart) else _render_table(section)
        for section in sections
    )
    page = (
        f'{PAGE_HEAD}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script, refresh_s)}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{name}</title>\n<style>{_asset('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{name}</h1></header>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
    # A folder's name need not be text.
    return page.encode("utf-8", "replace").decode()


def format_table(table: Table) -> str:
    """The table for a terminal."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]

    figures = _figure_columns(table)

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_figure else cell.ljust(width)
            for cell, width, is_figure in zip(row, widths, figures, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, "", line(table.header), rule, *map(line, table.rows)])


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _policy(script: str, refresh_s: float | None) -> str:
    """Our script alone may run, and nothing may be fetched: whatever a run's name holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = "'none'" if refresh_s is None else "'self'"
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; connect-src {source}"
    )


def _json(data: object) -> str:
    """JSON that can't end the element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _figure_columns(table: Table) -> list[bool]:
    """For each column, whether every cell is a figure: `92.9`, `1,280`, `+0.3`, `5.0 min`, `-`."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    return [all(_FIGURE.fullmatch(cell) for cell in column) for column in columns]


def _render_table(table: Table) -> str:
    figures = [False] * len(table.header) if table.is_long else _figure_columns(table)

    def cells(row: Sequence[str], tag: str, link: str = "") -> str:
        texts = [html.escape(cell) for cell in row]
        if link:
            texts[0] = f'<a href="{html.escape(link)}">{texts[0]}</a>'
        return "".join(
            f"<{tag}{_cell_class(cell, is_figure)}>{text}</{tag}>"
            for cell, text, is_figure in zip(row, texts, figures, strict=True)
        )

    def line(row: Sequence[str], link: str) -> str:
        is_unlike = table.is_long and len(set(row[1:])) > 1
        start = '<tr class="unlike">' if is_unlike else "<tr>"
        return f"{start}{cells(row, 'td', link)}</tr>"

    links = table.links or [""] * len(table.rows)
    rows = "\n".join(line(row, link) for row, link in zip(table.rows, links, strict=True))
    title = html.escape(table.title)
    whole = (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{cells(table.header, 'th')}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
    if table.is_long:
        whole = f"<details><summary><h2>{title}</h2></summary>{whole}</details>"
    else:
        whole = f"<h2>{title}</h2>{whole}"
    kind = "wide long" if table.is_long else "wide"
    return f'<section class="{kind}" data-key="{title}">{whole}</section>'


def _cell_class(cell: str, is_figure: bool) -> str:
    if is_figure:
        return ' class="figure"'
    return ' class="words"' if len(cell) > _MAX_LINE else ""


def _render_chart(chart: Chart) -> str:
    title = html.escape(chart.title)
    return (
        f'<section class="chart" data-key="{title}"><h2>{title}</h2>'
        "<noscript><p>The curves are drawn by JavaScript.</p></noscript></section>"
    )


def _axes(charts: Sequence[Chart]) -> list[str]:
    """The names of the x axes, each once, as they come."""
    return list(
        dict.fromkeys(name for chart in charts for series in chart.series for name in series.xs)
    )


def _chart_data(chart: Chart) -> dict[str, Any]:
    return {
        "title": chart.title,
        "y_label": chart.y_label,
        "is_log": chart.is_log,
        "series": [_series_data(series, i) for i, series in enumerate(chart.series)],
    }


def _series_data(series: Series, place: int) -> dict[str, Any]:
    for name, xs in series.xs.items():
        if len(xs) != len(series.ys):
            raise ValueError(f"{series.name}: {len(xs)} of {name}, {len(series.ys)} values")
    kept = [i for i, y in enumerate(series.ys) if math.isfinite(y)]
    color = place if series.color is None else series.color
    data: dict[str, Any] = {
        "name": series.name,
        "group": series.group,
        "color": color % _NUM_COLORS,
        "dashed": series.is_dashed,
        "exact": series.is_exact,
        "aside": series.is_aside,
    }
    stretches = _stretches(kept)
    data["xs"] = {
        name: [_number(xs[stretch[-1]]) for stretch in stretches] for name, xs in series.xs.items()
    }
    values = [[series.ys[i] for i in stretch] for stretch in stretches]
    data["ys"] = [_number(math.fsum(each) / len(each)) for each in values]
    if len(stretches) < len(kept):
        data["low"] = [_number(min(each)) for each in values]
        data["high"] = [_number(max(each)) for each in values]
    return data


def _stretches(items: Sequence[int]) -> list[Sequence[int]]:
    """Each item alone, or as many as a chart can show of a long row."""
    count = min(len(items), _MAX_POINTS)
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    """As few digits as a chart needs; whole numbers whole, what is not finite as null."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
