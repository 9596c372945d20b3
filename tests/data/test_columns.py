"""Rows that are chosen among many."""

from hypothesis import given
from hypothesis import strategies as st

from rope_mm.data.columns import choose_rows


@given(st.integers(1, 200), st.integers(0, 400))
def test_chosen_rows_are_in_order_and_all_come_once_before_any_comes_again(rows, count):
    chosen = choose_rows(rows, count)
    assert chosen == choose_rows(rows, count) and len(chosen) == count
    if count <= rows:
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(rows))
    else:
        assert chosen == [i % rows for i in range(count)]


def test_half_of_rows_in_turns_are_of_all_classes_as_are_those_of_sorted_rows():
    for of_row in (lambda row: row % 10, lambda row: row // 36):
        counts = [sum(of_row(row) == label for row in choose_rows(360, 180)) for label in range(10)]
        assert min(counts) > 8 and max(counts) < 28
