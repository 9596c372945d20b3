"""Our schemes against models of transformers from 2026: their positions, tables and rotation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MusicFlamingoConfig, NeoMMEConfig
from transformers.models.musicflamingo import modeling_musicflamingo as musicflamingo
from transformers.models.neomme import modeling_neomme as neomme
from transformers.models.neomme.processing_neomme import NeoMMEProcessor

from rope_mm import Audio, Image, Rotary, Text

few = settings(max_examples=10, deadline=None)
SIZES = st.integers(1, 6)
WITHIN = 1e-5  # angles of up to 40 radians, rounded to float32


@pytest.mark.parametrize(
    ("scheme", "layer"), [("neomme", "sliding_attention"), ("neomme-global", "full_attention")]
)
@few
@given(y=SIZES, x=SIZES)
def test_neomme_whose_rows_end_in_a_marker(agree, scheme, layer, y, x):
    """The marker of a row is a column more."""
    rope = Rotary(64, scheme)
    positions, _ = rope.place([Text(2), Image(y, x + 1)])
    theirs = NeoMMEProcessor._image_positions(y, x)
    agree(scheme, "transformers NeoMMEProcessor", positions, theirs, 0, "positions")
    original = neomme.NeoMMERotaryEmbedding(NeoMMEConfig())
    tables = original(torch.empty(0), theirs.T[:, None], layer)
    ours = torch.stack(rope.cos_sin(positions))
    name = "transformers NeoMMERotaryEmbedding"
    agree(scheme, name, ours, torch.stack(tables)[:, 0], WITHIN, "cos, sin")
    q, k = torch.randn(2, 1, 2, len(positions), 64)
    rotated = neomme.apply_rotary_pos_emb(q, k, *tables)
    for mine, other in zip(rope(q.transpose(1, 2), k.transpose(1, 2), positions), rotated, strict=True):
        agree(scheme, name, mine.transpose(1, 2), other, WITHIN, "q, k")


@few
@given(windows=st.integers(1, 3), first=st.integers(0, 96))
def test_music_flamingo_in_windows_of_30_seconds(agree, windows, first):
    """It rotates the encoder's output, 1280 channels as one head.

    Angles reach 3553 radians, so that its float32 is off by some 1e-3; here it runs in float64.
    """
    rope, name = Rotary(1280, "music-flamingo"), "transformers MusicFlamingoRotaryEmbedding"
    positions, _ = rope.place([Audio(750 * windows)])
    original = musicflamingo.MusicFlamingoRotaryEmbedding(MusicFlamingoConfig()).double()
    ours = rope.omega[0, :128]
    agree("music-flamingo", name, ours, original.inv_freq, 1e-7, "frequencies")
    original.inv_freq = ours
    original.position_angles = original._compute_position_angles(ours)
    seconds = 0.04 * torch.arange(750 * windows, dtype=torch.float64).view(windows, 750)
    some = slice(first, None, 97)
    cos, sin = (table.flatten(0, 1)[some] for table in original(seconds, seq_len=750))
    tables = torch.stack(rope.cos_sin(positions[some], torch.float64))
    agree("music-flamingo", name, tables, torch.stack((cos, sin)), 1e-9, "cos, sin")
    x = torch.randn(1, len(cos), 1280)
    theirs = musicflamingo.apply_rotary_time_emb(x, cos, sin)
    mine = rope.rotate_one(x[:, :, None], positions[some])[:, :, 0]
    agree("music-flamingo", name, mine, theirs, WITHIN, "encoder's output")
