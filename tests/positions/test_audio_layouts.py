"""Layouts in which audio has a time of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import Audio, Text, Video, VideoAudio, place

AUDIO = ["ltx2", "music-flamingo"]


@pytest.mark.parametrize("layout", AUDIO)
@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=3))
def test_audio_in_pieces_stands_where_it_stands_in_one(layout, lengths):
    whole, _ = place([Audio(sum(lengths))], layout)
    cursor, pieces = None, []
    for length in lengths:
        piece, cursor = place([Audio(length)], layout, cursor)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("layout", AUDIO)
def test_text_beside_such_audio_is_not_rotated_and_does_not_move_it(layout):
    alone, _ = place([Audio(5)], layout)
    beside, _ = place([Text(3), Audio(5), Text(2)], layout)
    assert torch.equal(beside[3:8], alone)
    assert not beside[[0, 1, 2, 8, 9]].any()


def test_frames_and_audio_of_tarope_at_one_second_stand_at_one_place():
    """Four frames at 0.2 s, five audio tokens of 40 ms each."""
    positions, _ = place([Text(2), Video(4, 1, 1, 0.2), VideoAudio(16)], "tarope")
    frames, audio = positions[2:6], positions[6:]
    assert torch.allclose(frames, audio[::5])
    assert torch.equal(audio[1:] - audio[:-1], torch.ones(15, 1))
