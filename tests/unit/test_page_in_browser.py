"""The page as its reader has it: drawn, switched, smoothed, searched and read with keys."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser
from zerobert.page import Chart, Marker, Series, Table, render_page

STEPS = [0, 10, 20, 30, 40]


def charts() -> list[Chart | Table]:
    """Two runs of different lengths, of which one has no time and no accuracy."""
    loss = [
        Series(
            name="a, training",
            group="a",
            color=0,
            xs={"step": STEPS, "hours": [0, 0.5, 1, 1.5, 2]},
            ys=[4, 0, 4, 0, 4],
        ),
        Series(
            name="a, held-out",
            group="a",
            color=0,
            is_exact=True,
            is_dashed=True,
            xs={"step": [40]},
            ys=[2.5],
        ),
        Series(
            name="b, training",
            group="b",
            color=1,
            is_exact=True,
            xs={"step": [0, 100]},
            ys=[8, 6],
        ),
        Series(name="b", group="b", color=1, xs={"step": [0, 50]}, ys=[8, 9], is_aside=True),
    ]
    accuracy = [Series(name="a, held-out", group="a", color=0, xs={"step": [40]}, ys=[0.25])]
    settings = Table(
        title="Config",
        header=["setting", "a", "b"],
        rows=[["lr", "0.1", "0.2"], ["seed", "42", "42"], ["model.size", "base", "large"]],
        is_long=True,
    )
    return [
        Chart(title="Loss", y_label="nats", series=loss),
        Chart(title="Accuracy", y_label="share", series=accuracy),
        settings,
    ]


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    """The page of two runs, opened; nothing may go wrong in it."""
    path = tmp_path / "page.html"
    markers = [Marker(label="rollback", xs={"step": 20, "hours": 1}, group="a", color=0)]
    path.write_text(render_page("a, b", charts(), markers=markers))
    browser.open(path.as_uri())
    return browser


def texts(page: Browser, selector: str) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)"
    )
    return found


def count(page: Browser, selector: str) -> int:
    found: int = page.run(f"document.querySelectorAll({selector!r}).length")
    return found


def points(page: Browser, selector: str) -> list[tuple[float, float]]:
    text: str = page.run(f"document.querySelector({selector!r}).getAttribute('points')")
    return [(float(x), float(y)) for x, y in (point.split(",") for point in text.split())]


def choose(page: Browser, field: str, value: str) -> None:
    event = "input" if field == "smoothing" else "change"
    page.run(
        f"(() => {{ const field = document.getElementById('{field}'); field.value = '{value}';"
        f" field.dispatchEvent(new Event('{event}')); }})()"
    )


def legend(page: Browser, title: str = "Loss") -> list[str]:
    return texts(page, f'section[data-key="{title}"] .legend li')


def clean(page: Browser) -> bool:
    """Nothing in the console, and nothing asked for but the file itself and its empty icon."""
    outside = [url for url in page.requests if not url.startswith(("file:", "data:"))]
    return not page.errors and not outside and len(page.requests) >= 1


def test_every_curve_is_drawn_and_nothing_else_is_asked_for(page: Browser) -> None:
    assert count(page, "svg") == 2
    assert count(page, 'section[data-key="Loss"] polyline') == 4
    assert count(page, 'section[data-key="Accuracy"] polyline') == 1
    assert count(page, ".dashed.curve") == 1
    assert count(page, "polyline.aside") == 1
    assert texts(page, ".marker title") == ["rollback", "rollback"]
    assert legend(page) == ["a, training 4", "a, held-out 2.5", "b, training 6"]
    assert clean(page)


def test_a_curve_lies_where_its_numbers_are(page: Browser) -> None:
    # From 0 to 9 with 5 % of air above; the x axis is that of the longest run.
    found = points(page, ".curve.c0")
    assert found[0] == (64.0, pytest.approx(256 - 246 * 4 / 9.45, abs=0.1))
    assert found[1] == (pytest.approx(64 + 482 * 0.1, abs=0.1), 256.0)
    assert points(page, ".curve.c1:not(.aside)")[1][0] == 546.0
    assert texts(page, 'section[data-key="Loss"] text.y') == ["0", "2", "4", "6", "8"]


def test_the_other_axis_has_its_own_labels_and_leaves_out_what_it_does_not_know(
    page: Browser,
) -> None:
    assert texts(page, 'section[data-key="Loss"] text.x') == ["0", "20", "40", "60", "80", "100"]
    choose(page, "axis", "hours")
    assert texts(page, "text.axis-name") == ["hours"]
    assert texts(page, 'section[data-key="Loss"] text.x') == ["0", "0.5", "1", "1.5", "2"]
    assert legend(page) == ["a, training 4"]
    assert texts(page, 'section[data-key="Accuracy"] p') == ["No values to show."]
    assert clean(page)


def test_a_logarithmic_axis_leaves_out_zeros(page: Browser) -> None:
    choose(page, "scale", "log")
    assert texts(page, 'section[data-key="Loss"] text.y') == ["1", "10", "2", "5"]
    assert len(points(page, ".curve.c0")) == 3
    choose(page, "scale", "auto")
    assert len(points(page, ".curve.c0")) == 5
    assert clean(page)


def test_smoothing_is_an_unbiased_mean_of_what_came_before(page: Browser) -> None:
    choose(page, "smoothing", "0.5")
    # (4 + 2 * 0 + 4 * 4 + 8 * 0 + 16 * 4) / (1 + 2 + 4 + 8 + 16), and the value itself
    assert legend(page)[0] == "a, training 2.71 (4)"
    assert legend(page)[2] == "b, training 6"  # exact
    assert count(page, ".curve.raw") == 1
    assert clean(page)


def test_values_that_differ_by_rounding_alone_are_drawn_as_equal(
    browser: Browser, tmp_path: Path
) -> None:
    series = Series(name="a", xs={"step": list(range(30))}, ys=[0.363636] * 30)
    path = tmp_path / "page.html"
    path.write_text(render_page("run", [Chart(title="Loss", y_label="nats", series=[series])]))
    browser.open(path.as_uri())
    before = texts(browser, "text.y")
    for smoothing in ("0.3", "0.8", "0.97"):
        choose(browser, "smoothing", smoothing)
        assert texts(browser, "text.y") == before
    assert clean(browser)


def test_a_run_can_be_hidden(page: Browser) -> None:
    assert texts(page, "#groups label") == ["a", "b"]
    page.run("document.querySelectorAll('#groups input')[1].click()")
    assert legend(page) == ["a, training 4", "a, held-out 2.5"]
    assert texts(page, 'section[data-key="Loss"] text.x') == ["0", "10", "20", "30", "40"]
    page.run("document.querySelectorAll('#groups input')[1].click()")
    assert len(legend(page)) == 3


def test_the_arrow_keys_read_all_charts_and_say_so(page: Browser) -> None:
    page.run("document.querySelector('svg').focus()")
    page.key("Home")
    page.key("ArrowRight")
    assert legend(page) == ["a, training 0", "a, held-out 2.5", "b, training 8"]
    assert texts(page, ".at") == ["step 10", "step 10"]
    said = "step 10: a, training 0, a, held-out 2.5, b, training 8"
    assert texts(page, "#said") == [said]
    page.key("Escape")
    assert legend(page)[0] == "a, training 4"


def test_plus_zooms_around_what_is_read_and_minus_back(page: Browser) -> None:
    page.run("document.querySelector('svg').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight", "+", "+"):
        page.key(key)
    # From 20 a quarter of the way to both ends, in all charts at once.
    assert texts(page, 'section[data-key="Accuracy"] text.x')[0] == "15"
    assert texts(page, 'section[data-key="Loss"] text.x')[-1] == "40"
    assert page.run("document.activeElement.tagName") == "svg"
    for _ in range(40):
        page.key("+")
    labels = texts(page, 'section[data-key="Loss"] text.x')
    assert 1 <= len(labels) <= 10
    assert legend(page)[0] == "a, training 4"
    for _ in range(44):
        page.key("-")
    assert texts(page, 'section[data-key="Loss"] text.x')[-1] == "100"
    assert page.run("document.getElementById('reset').disabled") is True


def test_the_mouse_reads_what_it_points_at_and_chooses_a_stretch(page: Browser) -> None:
    box: dict[str, Any] = page.run("document.querySelector('svg').getBoundingClientRect().toJSON()")

    def at(step: float) -> tuple[float, float]:
        pixel = (64 + 482 * step / 100) / 560 * box["width"]
        return box["x"] + pixel, box["y"] + box["height"] / 2

    page.mouse("mouseMoved", *at(31))
    assert texts(page, ".at") == ["step 30", "step 30"]
    assert legend(page)[0] == "a, training 0"
    page.mouse("mouseMoved", *at(20))
    page.mouse("mousePressed", *at(20))
    page.mouse("mouseMoved", *at(40))
    page.mouse("mouseReleased", *at(40))
    labels = texts(page, 'section[data-key="Loss"] text.x')
    assert 20 <= float(labels[0]) <= 22
    assert 38 <= float(labels[-1]) <= 40
    page.run("document.getElementById('reset').click()")
    assert texts(page, 'section[data-key="Loss"] text.x')[-1] == "100"
    assert clean(page)


def rows_shown(page: Browser) -> list[str]:
    return texts(page, "section.long tbody tr:not([hidden]) td:first-child")


def test_a_config_is_searched_and_compared(page: Browser) -> None:
    assert rows_shown(page) == ["lr", "seed", "model.size"]
    page.run("document.querySelector('section.long .find input[type=checkbox]').click()")
    assert rows_shown(page) == ["lr", "model.size"]
    page.run("document.querySelector('summary').click()")
    page.run("document.querySelector('input[type=search]').focus()")
    for key in "LARGE":
        page.key(key)
    assert rows_shown(page) == ["model.size"]
    assert texts(page, ".find output") == ["1 shown"]


def test_everything_that_can_be_set_has_a_name(page: Browser) -> None:
    nameless = page.run(
        "[...document.querySelectorAll('input, select')].filter((field) =>"
        " !field.labels.length || !field.labels[0].textContent.trim()).length"
    )
    assert nameless == 0
    assert page.run("document.querySelector('svg').getAttribute('aria-label')").startswith("Loss")


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_stand_out_from_their_ground(
    browser: Browser, tmp_path: Path, dark: bool
) -> None:
    """Source: WCAG 2.2, at least 4.5 for text (1.4.3) and 3 for drawings (1.4.11)."""
    path = tmp_path / "page.html"
    path.write_text(render_page("a, b", charts()))
    browser.open(path.as_uri(), dark=dark)
    colors: dict[str, str] = browser.run(
        "Object.fromEntries(['ink', 'soft', 'paper', 'back', 'mark', 'c0', 'c1', 'c2', 'c3', 'c4',"
        " 'c5', 'c6', 'c7'].map((name) => [name, getComputedStyle(document.documentElement)"
        ".getPropertyValue('--' + name).trim()]))"
    )
    for ground in ("paper", "back"):
        assert contrast(colors["soft"], colors[ground]) >= 4.5
    assert contrast(colors["ink"], colors["mark"]) >= 4.5
    for number in range(8):
        assert contrast(colors[f"c{number}"], colors["paper"]) >= 3
    assert (luminance(colors["paper"]) < 0.1) == dark


def luminance(color: str) -> float:
    """Relative luminance. Source: WCAG 2.2, definitions."""
    digits = color.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_a_narrow_window_has_no_scroll_bar_of_its_own(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_page("a, b", charts()))
    browser.open(path.as_uri(), width=360)
    assert browser.run("document.documentElement.scrollWidth") <= 360


def test_names_that_are_markup_stay_text(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><img src=http://127.0.0.1:9/x onerror=\"document.title='lost'\">{0}'\"\\"
    page = render_page(
        evil,
        [
            Chart(
                title=evil,
                y_label=evil,
                series=[
                    Series(name=evil, group=evil, xs={"step": [1, 2], evil: [1, 2]}, ys=[1, 2])
                ],
            ),
            Table(title=evil + "t", header=[evil] * 3, rows=[[evil, evil, "x"]], is_long=True),
        ],
        markers=[Marker(label=evil, xs={"step": 1}, group=evil)],
    )
    path = tmp_path / "page.html"
    path.write_text(page)
    browser.open(path.as_uri())
    choose(browser, "smoothing", "0.5")
    browser.run("document.querySelector('#groups input').click()")
    browser.run("document.querySelector('#groups input').click()")
    assert browser.run("document.title") == evil
    assert count(browser, "img") == 0
    assert texts(browser, "#groups label") == [evil]
    assert texts(browser, ".legend li") == [f"{evil} 1.667 (2)"]
    assert count(browser, "polyline") == 2
    assert clean(browser)


def test_a_script_that_is_not_the_page_s_own_does_not_run(browser: Browser, tmp_path: Path) -> None:
    """The policy holds even where a text were taken for markup."""
    path = tmp_path / "page.html"
    path.write_text(
        render_page("run", charts()).replace(
            "<main>", "<main><script>document.title='lost'</script>"
        )
    )
    browser.open(path.as_uri())
    assert browser.run("document.title") == "run"
    assert count(browser, "svg") == 2
    assert "Content Security Policy" in " ".join(browser.errors)


def test_a_long_run_is_drawn_as_a_line_in_its_band(browser: Browser, tmp_path: Path) -> None:
    ys = [1.0] * 100_000
    ys[54_321] = 9.0
    series = Series(name="a", xs={"step": list(range(100_000))}, ys=ys)
    path = tmp_path / "page.html"
    path.write_text(render_page("run", [Chart(title="Loss", y_label="nats", series=[series])]))
    browser.open(path.as_uri())
    assert count(browser, "polygon.band") == 1
    top = min(y for _, y in points(browser, "polygon.band"))
    assert [x for x, y in points(browser, "polygon.band") if y == top] == [
        pytest.approx(64 + 482 * 0.543, abs=1)
    ]
    browser.run("document.querySelector('svg').focus()")
    browser.run("setCursor(54374)")
    assert legend(browser) == ["a 1.064 (1 to 9)"]
    assert clean(browser)
