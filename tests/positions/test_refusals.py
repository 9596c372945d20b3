"""What `place` refuses, in one sentence, and what it costs to refuse or to place much."""

import math
import tracemalloc

import pytest
import torch

from rope_mm import (
    LAYOUTS,
    Cursor,
    Image,
    Layout,
    Rotary,
    Text,
    Video,
    pack,
    place,
    place_rows,
    positions_of,
)
from rope_mm.positions.grids import LARGE, Raster, fill, fill_alone, fill_together
from rope_mm.positions.place import MOST_TOKENS, augment_positions


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "a sequence is a list of segments, such as .*, not None"),
        (5, "a sequence is a list of segments, such as .*, not 5"),
        (torch.tensor(2.0), r"a sequence is a list of segments, such as .*, not tensor\(2.\)"),
        (Text(3), r"write \[Text\(length=3\)\]"),
        (["text:3"], "holds segments such as"),
    ],
)
def test_what_is_no_sequence_is_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        place(segments)


@pytest.mark.parametrize(
    ("cursor", "hint"), [(5, "5$"), ("text:2", "'text:2'$"), ({"next": 3.0}, r"write Cursor\(\*\*it\)")]
)
def test_what_is_no_cursor_is_refused_wherever_one_is_given(cursor, hint):
    calls = (
        lambda: place("text:2", "flat", cursor),
        lambda: Rotary(8, "flat").place("text:2", cursor),
        lambda: place_rows(["text:2"], "flat", [cursor]),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=f"goes on from the Cursor that `place` returned, not from .*{hint}"
        ):
            call()
    with pytest.raises(ValueError, match="cursors must be a list, one for each row, not 5"):
        place_rows(["text:2"], "flat", 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"next": 1e20},
            r"Cursor: next must be a finite number >= -9.0072e\+15 and <= 9.0072e\+15, not 1e\+20",
        ),
        ({"layout": 3}, "Cursor: layout must be a string, not 3"),
        ({"video": 5}, "Cursor: video must be an OpenVideo or a dict of its start, t, y, x"),
        ({"video": {"frames": 3}}, "Cursor: video must be an OpenVideo or a dict of its start, t, y, x"),
        ({"video": Video(1, 2, 3)}, "Cursor: video must be an OpenVideo or a dict"),
    ],
)
def test_a_cursor_is_checked_when_it_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        Cursor(**fields)


@pytest.mark.parametrize("rows", [5, None, Text(2)])
def test_what_is_no_batch_is_refused(rows):
    for function in (place_rows, pack):
        with pytest.raises(ValueError, match="a batch is a list of sequences"):
            function(rows)


@pytest.mark.parametrize(
    "segments", ["text:2147483647", "image:40000x50000", "text:16777217", "text:9000000 " * 2]
)
def test_absurd_sizes_are_refused_before_memory_is_taken(segments):
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"place at most {MOST_TOKENS} at a time and go on from the cursor"):
        place(segments)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("pace", [None, 0.7])
@pytest.mark.parametrize("offsets", [False, True])
def test_a_raster_has_the_same_positions_alone_and_beside_others(merge, pace, offsets):
    moved = torch.rand(4 * 6, 3, dtype=torch.float64) if offsets else None
    steps = ((1.0, 0.1, 0.2), (0.3, 1.0, 0.4), (0.5, 0.6, 1.0))
    raster = Raster((5, 4, 6), (0.5, 2.0, 7.0), steps, merge, pace, 3, moved)
    assert torch.equal(fill_alone(raster), fill_together([raster]))


def test_large_and_small_segments_keep_their_order():
    segments = [Text(3), Text(LARGE + 1), Image(70, 70), Text(2), Image(2, 2)]
    for layout in ("rope-tv", "m-rope-hf"):
        whole, cursor = place(segments, layout), None
        pieces = []
        for segment in segments:
            piece, cursor = place([segment], layout, cursor)
            pieces.append(piece)
        assert torch.equal(whole[0], torch.cat(pieces)) and whole[1] == cursor
    two = Raster((1, 70, 70), (0.0,), ((1.0,),) * 3), Raster((2, 1, 1), (5.0,), ((1.0,),) * 3)
    assert torch.equal(fill(two), fill_together(two))


def test_a_text_that_ends_where_no_token_can_be_counted_is_refused():
    with pytest.raises(ValueError, match="next must be a finite number"):
        place("text:3", "flat", Cursor(next=2.0**53 - 1))


def counted(cursor, segment):
    return torch.zeros(segment.tokens, 1), cursor.next + 1


def test_a_rule_whose_next_is_beyond_what_can_be_counted_is_refused(monkeypatch):
    monkeypatch.setitem(
        LAYOUTS, "far", Layout(("t",), lambda c, s: (torch.zeros(s.tokens, 1), 1e300), "here")
    )
    with pytest.raises(ValueError, match="next must be a finite number"):
        place("image:1x1", "far")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": ("t", "t")}, "a tuple of different names"),
        ({"axes": "tyx"}, "axes must be a list of names, not 'tyx'"),
        ({"axes": ()}, "a tuple of different names"),
        ({"positions_per_second": math.nan}, "positions_per_second must be a finite number > 0"),
        ({"image_rule": 3}, r"image_rule must be a function of \(cursor, segment\), not 3"),
        ({"text_rule": None}, r"text_rule must be a function of \(cursor, n, a\), not None"),
        ({"audio_rule": "rule"}, r"audio_rule must be a function of \(cursor, n, a\), not 'rule'"),
        ({"image_rule": lambda cursor: None}, "image_rule must be a function of"),
        ({"text_rule": counted}, "text_rule must be a function of"),
    ],
)
def test_a_layout_is_checked_when_it_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"axes": ("t",), "image_rule": counted, "source": "this test", **fields})


@pytest.mark.parametrize(
    "positions",
    [
        torch.ones(3, 2).bfloat16(),
        torch.ones(3, 2).half(),
        torch.ones(3, 2, dtype=torch.bool),
        torch.tensor([[0.0, math.nan]]),
        torch.tensor(3),
        "text:3",
    ],
)
def test_positions_that_cannot_be_moved_exactly_are_not_augmented(positions):
    with pytest.raises(ValueError, match="augment_positions: positions must be"):
        augment_positions(positions, shift=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.ones(2, 3, dtype=torch.cfloat)}, "positions is torch.complex64"),
        ({"generator": 0}, "generator is 0; give a torch.Generator"),
        ({"positions": torch.ones(2, 3).to_sparse()}, "positions is a nested or sparse tensor"),
        ({"positions": torch.ones(2, 3).to(torch.float8_e4m3fn)}, "positions is torch.float8_e4m3fn"),
    ],
)
def test_augmentation_refuses_seeds_and_kinds_of_tensors_without_sums(change, message):
    with pytest.raises(ValueError, match=message):
        augment_positions(**{"positions": torch.ones(2, 3), "shift": 1.0, **change})
    assert augment_positions(torch.ones(2, 3, device="meta")).shape == (2, 3)


@pytest.mark.parametrize(
    "offsets",
    [[0, 7], 0, torch.tensor([1.0, 2.0]).half(), torch.tensor([0.0, math.nan]), torch.tensor([True, False])],
)
def test_offsets_of_documents_are_finite_numbers(offsets):
    with pytest.raises(
        ValueError, match=r"2 documents need an offset each, \(2,\) finite numbers in a tensor"
    ):
        positions_of(torch.tensor([0, 3, 5]), offsets)
    with pytest.raises(ValueError, match=r"not torch.int64 \(3, 1\)$"):
        positions_of(torch.tensor([[0], [3], [5]]))
