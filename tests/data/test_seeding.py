"""Orders of rows: functions of seed and step, in groups of one value where that is asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.data.seeding import GroupedOrder


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(2, 5),
    groups=st.integers(1, 8),
    step=st.integers(0, 1000),
)
def test_a_batch_is_made_of_groups_of_one_value_whatever_their_number(counts, size, groups, step):
    values = [value for value, count in enumerate(counts) for _ in range(count)]
    order = GroupedOrder(values, size)
    rows = order.batch(7, step, groups * size)
    assert torch.equal(rows, GroupedOrder(values, size).batch(7, step, groups * size))
    columns = rows.view(size, groups).T.tolist()
    chosen = [{values[row] for row in group} for group in columns]
    assert all(len(found) == 1 for found in chosen)
    for group, (value,) in zip(columns, chosen, strict=True):
        times = [group.count(row) for row in set(group)]
        assert len(times) == min(size, counts[value]) and max(times) - min(times) <= 1
    if groups <= len(counts):
        assert len({value for (value,) in chosen}) == groups


@pytest.mark.parametrize("turns", [1, 2, 3, 6])
def test_each_process_gets_whole_groups_where_their_number_divides_that_of_groups(turns):
    values = [number % 7 for number in range(70)]
    rows = GroupedOrder(values, 4).batch(0, 3, 24)
    for rank in range(turns):
        found = [values[row] for row in rows[rank::turns].tolist()]
        assert sorted(found.count(value) for value in set(found)) == [4] * (6 // turns)


def test_rows_come_as_often_as_others_whatever_the_number_of_rows_of_their_value():
    values = ["few"] * 10 + ["many"] * 30
    order = GroupedOrder(values, 4)
    rows = torch.cat([order.batch(0, step, 4) for step in range(3000)])
    share = rows.bincount(minlength=40) / len(rows)
    torch.testing.assert_close(share, torch.full((40,), 1 / 40), atol=0.005, rtol=0)


def test_an_index_without_a_value_is_in_no_group():
    order = GroupedOrder([None, "a", None, "a", "b"], 2)
    rows = torch.cat([order.batch(0, step, 4) for step in range(50)])
    assert rows.unique().tolist() == [1, 3, 4]


def test_a_batch_that_is_not_made_of_whole_groups_and_an_order_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="10 rows of a step are no whole number of groups of 4 rows"):
        GroupedOrder([1, 1, 2], 4).batch(0, 0, 10)
    with pytest.raises(ValueError, match="a group needs 1 row or more, not 0"):
        GroupedOrder([1, 1, 2], 0)
    for values in ([], [None, None]):
        with pytest.raises(ValueError, match=rf"none of {len(values)} rows has a value to group it by"):
            GroupedOrder(values, 4)
