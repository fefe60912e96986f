import time

import pytest

from data_prep.tidy import tidy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A ( ) b (; , c ;) , d , , e .", "A b (c), d, e."),
        ("one (, ) x\n,\n, two", "one x\n,\n, two"),
        ("''It'' is '''so''' __NOTOC__ .", "It is so."),
        ("a\u00a0\t b ( c , ; ) d (e;", "a b (c) d (e;"),
        ("ペン（ ； 、）（）", "ペン（； 、）"),
        ("3 :4 , 5 !x", "3 :4, 5 !x"),
        ("nothing [here], (really): 'so'", "nothing [here], (really): 'so'"),
        ("", ""),
    ],
)
def test_what_removed_markup_leaves_goes(text: str, wanted: str) -> None:
    assert tidy(text) == wanted


@pytest.mark.parametrize("unit", [" ", ", ", "; ", "( ", "'' ", "__A", " ,( ", "\u00a0", ",;:"])
def test_runs_take_linear_time(unit: str) -> None:
    started = time.process_time()
    tidy("x" + unit * (1_000_000 // len(unit)) + "x")
    assert time.process_time() - started < 5
