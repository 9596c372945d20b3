import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import Image, Text, Video, pack, place, positions_of
from rope_mm.positions.packing import first_fit

SIZES = st.integers(1, 6)
SEGMENTS = st.one_of(
    st.builds(Text, SIZES), st.builds(Image, SIZES, SIZES), st.builds(Video, SIZES, SIZES, SIZES)
)
SEQUENCES = st.lists(SEGMENTS, min_size=1, max_size=6)


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_first_fit_packs_each_document_once_where_there_is_room_first(lengths, room):
    rows = first_fit(lengths, room)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    used = [0] * len(rows)
    place = {number: row for row, numbers in enumerate(rows) for number in numbers}
    for number, length in enumerate(lengths):
        assert all(used[row] + length > room for row in range(place[number]))
        used[place[number]] += length
    assert all(total <= room for total in used)
    assert rows == [sorted(row) for row in rows]


def test_a_row_longer_than_the_room_is_refused():
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit a row of 8"):
        first_fit([3, 9], 8)


@given(rows=st.lists(SEQUENCES, min_size=1, max_size=4), size=st.integers(1, 9))
def test_packed_sequences_restart_and_shards_of_a_row_are_its_parts(rows, size):
    positions, number = pack(rows, "m-rope")
    for i, segments in enumerate(rows):
        assert torch.equal(positions[number == i], place(segments, "m-rope")[0])
    assert torch.equal(torch.cat(positions.split(size)), positions)
    assert number.tolist() == sorted(number.tolist())


@given(rows=st.lists(SIZES, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_positions_of_documents_are_those_of_each_alone_from_its_offset(rows, seed):
    ends = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    alone = [place([Text(n)], "flat")[0][:, 0].long() for n in rows]
    assert torch.equal(positions_of(ends), torch.cat(alone))
    offsets = torch.randint(100, (len(rows),), generator=torch.Generator().manual_seed(seed))
    moved = [block + offset for block, offset in zip(alone, offsets, strict=True)]
    assert torch.equal(positions_of(ends, offsets), torch.cat(moved))
    halves = positions_of(ends, offsets + 0.5)
    assert torch.equal(halves, torch.cat(moved) + 0.5)


@pytest.mark.parametrize(
    ("ends", "offsets", "message"),
    [
        ([0, 3, 5], torch.tensor([0]), r"2 documents need an offset each, \(2,\) .*, not .* \(1,\)"),
        (torch.tensor([1, 3]), None, r"must begin with 0 and rise, not \[1, 3\]"),
        (torch.tensor([0, 3, 3]), None, r"must begin with 0 and rise, not \[0, 3, 3\]"),
        (torch.tensor([3.0, 4.0]), None, "must be a tensor of whole numbers 0, ..., s"),
        (torch.tensor([0]), None, "one more than there are documents"),
        (torch.tensor([[0, 3]]), None, "must be a tensor of whole numbers"),
        ([0, 3], None, "must be a tensor of whole numbers"),
    ],
)
def test_lengths_of_documents_that_do_not_fit_are_refused(ends, offsets, message):
    ends = torch.tensor(ends) if offsets is not None else ends
    with pytest.raises(ValueError, match=message):
        positions_of(ends, offsets)
