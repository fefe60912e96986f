"""Tables and curves as one self-contained HTML page: inline SVG and CSS, no script, no network.

Whoever measured something hands it over as a chart or a table; nothing here knows what a loss is.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 10, 44
_MAX_POINTS = 1000  # a curve of half its pixels looks the same as one of a million points
_NUM_COLORS = 8
_FIGURE = re.compile(r"([-+]?[\d.,]+(e-?\d+)?( ?(%|[A-Za-z]{1,3}))?|-|)")
_LOG_RATIO = 100  # above this span of positive values a linear axis shows one end only


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; values that are not finite are gaps."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over a common x axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; columns that hold only figures are set flush right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Preformatted text under a title that opens it."""

    title: str
    body: str


class _Scale(NamedTuple):
    """A value axis: where values lie between 0 and 1, and which of them get a tick."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def render_page(title: str, sections: Sequence[Chart | Table | Text]) -> str:
    """The whole HTML document, sections in the order given; charts stand side by side."""
    body = []
    for section in sections:
        if isinstance(section, Chart):
            body.append(_render_chart(section))
        elif isinstance(section, Table):
            body.append(_render_table(section))
        else:
            body.append(_render_text(section))
    name = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


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


def _figure_columns(table: Table) -> list[bool]:
    """For each column, whether every cell is a figure: `92.9`, `1,280`, `+0.3`, `5.0 min`, `-`."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    return [all(_FIGURE.fullmatch(cell) for cell in column) for column in columns]


def _render_table(table: Table) -> str:
    figures = _figure_columns(table)

    def line(row: Sequence[str], tag: str) -> str:
        cells = [
            f'<{tag} class="figure">{html.escape(cell)}</{tag}>'
            if is_figure
            else f"<{tag}>{html.escape(cell)}</{tag}>"
            for cell, is_figure in zip(row, figures, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    return (
        f'<section class="wide"><h2>{html.escape(table.title)}</h2><div class="scroll"><table>\n'
        f"<thead>{line(table.header, 'th')}</thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _render_text(text: Text) -> str:
    return (
        f'<section class="wide"><details><summary><h2>{html.escape(text.title)}</h2></summary>'
        f"<pre>{html.escape(text.body)}</pre></details></section>"
    )


def _render_chart(chart: Chart) -> str:
    points = [_thin(_finite_points(series)) for series in chart.series]
    xs = [x for curve in points for x, _ in curve]
    ys = [y for curve in points for _, y in curve]
    if not xs:
        plot = "<p>No values yet.</p>"
    else:
        x_scale, y_scale = _linear_scale(xs), _value_scale(ys)
        curves = [_render_curve(curve, i, x_scale, y_scale) for i, curve in enumerate(points)]
        plot = (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{html.escape(chart.title)}">\n'
            f"{_render_axes(chart, x_scale, y_scale)}\n" + "\n".join(curves) + "\n</svg>"
        )
    legend = "".join(
        f'<li><span class="swatch c{i % _NUM_COLORS}"></span>{html.escape(series.name)}'
        + (f" <b>{_format_number(curve[-1][1])}</b>" if curve else "")
        + "</li>"
        for i, (series, curve) in enumerate(zip(chart.series, points, strict=True))
    )
    return (
        f"<section><h2>{html.escape(chart.title)}</h2>\n{plot}\n"
        f'<ul class="legend">{legend}</ul></section>'
    )


def _finite_points(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.xs, series.ys, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points, the lowest and highest of each stretch: spikes stay."""
    if len(points) <= _MAX_POINTS:
        return points
    num_stretches = _MAX_POINTS // 2 - 1
    kept = []
    for i in range(num_stretches):
        start = i * len(points) // num_stretches
        stretch = points[start : (i + 1) * len(points) // num_stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [points[0], *kept, points[-1]]


def _linear_scale(values: Sequence[float]) -> _Scale:
    """From the lowest to the highest value, ticks at round numbers."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / 6)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return _Scale(low, high, False, tuple(i * step for i in range(first, last + 1)))


def _value_scale(values: Sequence[float]) -> _Scale:
    """A linear axis with some air, or a logarithmic one where the values span several decades."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_RATIO:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        stride = max(1, len(decades) // 6)
        return _Scale(
            10.0 ** decades[0], 10.0 ** decades[-1], True, tuple(10.0**d for d in decades[::stride])
        )
    air = (high - low) * 0.05
    floor = 0.0 if 0 <= low <= (high - low) * 0.25 else low - air
    return _linear_scale([floor, high + air])


def _round_step(rough: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) at or above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor >= rough / power - 1e-9)


def _x_pixel(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT - _RIGHT)


def _y_pixel(fraction: float) -> float:
    return _HEIGHT - _BOTTOM - fraction * (_HEIGHT - _TOP - _BOTTOM)


def _render_axes(chart: Chart, x_scale: _Scale, y_scale: _Scale) -> str:
    bottom, middle = _y_pixel(0), (_y_pixel(0) + _y_pixel(1)) / 2
    parts = []
    for tick in y_scale.ticks:
        y = _y_pixel(y_scale(tick))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_format_number(tick)}</text>'
        )
    for tick in x_scale.ticks:
        x = _x_pixel(x_scale(tick))
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{_format_number(tick)}</text>"
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="label" x="{_x_pixel(0.5):.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(chart.x_label)}</text>"
        f'<text class="label" transform="translate(13 {middle:.0f}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(chart.y_label)}</text>'
    )
    return "\n".join(parts)


def _render_curve(
    points: list[tuple[float, float]], index: int, x_scale: _Scale, y_scale: _Scale
) -> str:
    pixels = [(_x_pixel(x_scale(x)), _y_pixel(y_scale(y))) for x, y in points]
    color = f"c{index % _NUM_COLORS}"
    # Few points are measurements, and a single one is no line at all: show them as dots too.
    dots = (
        "".join(f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in pixels)
        if len(pixels) <= 25
        else ""
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    return f'<polyline class="{color}" points="{path}"/>{dots}'


def _format_number(value: float) -> str:
    """A figure for an axis or a legend: at most four digits that matter, k and M for thousands."""
    size = abs(value)
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= 10 * factor or (size >= factor and value % (factor / 10) == 0):
            return f"{value / factor:.4g}{unit}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --paper: #fff;
  --back: #f7f8fa; --c0: #2f6feb; --c1: #d9730d; --c2: #0f9d76; --c3: #c2334d; --c4: #7a4fd0;
  --c5: #8a6d3b; --c6: #0b8fac; --c7: #b5409c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #2b323d;
  --paper: #171c24; --back: #0f1319; --c0: #6aa1ff; --c1: #f5a35c; --c2: #4fcf9f; --c3: #ff7a90;
  --c4: #b394ff; --c5: #cfae72; --c6: #52c7e0; --c7: #ea86d3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
h1 { grid-column: 1 / -1; margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -0.01em; }
h2 { display: inline; margin: 0; font-size: 15px; font-weight: 600; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; margin-top: 10px; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 0;
  padding: 0; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 10px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 28px 6px 0; text-align: left; border-bottom: 1px solid var(--line); }
.figure { text-align: right; white-space: nowrap; }
th { font-size: 13px; font-weight: 500; color: var(--soft); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
summary { cursor: pointer; }
pre { margin: 10px 0 0; overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
p { color: var(--soft); margin: 10px 0 0; }
""" + "".join(
    f"polyline.c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }} "
    f".swatch.c{i} {{ background: var(--c{i}); }}\n"
    for i in range(_NUM_COLORS)
)
