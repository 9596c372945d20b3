"""Our schemes against rotary-embedding-torch (lucidrains)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb

from rope_mm import Image, Rotary, Text
from rope_mm.schemes.extensions import NTK, Linear

SIZES, FACTORS = st.integers(1, 6), st.floats(1, 8)
few = settings(max_examples=10, deadline=None)
SINGLE = 1e-5  # its angles, of up to 40 radians, are float32, and q and k of up to 5


@pytest.fixture(scope="session")
def same_words(agree):
    """q and k of words from `offset` on, rotated by ours and by the original, heads before tokens there."""

    def same_words(scheme, rope, original, name, words, offset):
        positions = rope.place([Text(offset + words)])[0][offset:]
        q, k = torch.randn(2, 1, words, 2, rope.head_dim)
        theirs = [
            original.rotate_queries_or_keys(x.transpose(1, 2), offset=offset).transpose(1, 2) for x in (q, k)
        ]
        ours = torch.stack(rope(q, k, positions))
        agree(scheme, f"rotary-embedding-torch {name}", ours, torch.stack(theirs), SINGLE, "q, k")

    return same_words


@few
@given(words=st.integers(1, 20), offset=st.integers(0, 20), fraction=st.sampled_from([0.25, 0.5, 1.0]))
def test_tokens_rotated_in_part(same_words, words, offset, fraction):
    rope, original = Rotary(32, "gpt-j", fraction=fraction), RotaryEmbedding(int(32 * fraction))
    same_words("gpt-j", rope, original, "lang", words, offset)


@few
@given(words=st.integers(1, 20), offset=st.integers(0, 20), factor=FACTORS)
def test_ntk_aware(same_words, words, offset, factor):
    rope = Rotary(32, "gpt-j", fraction=1.0, extensions=(NTK(factor=factor),))
    original = RotaryEmbedding(32, theta_rescale_factor=factor)
    same_words("gpt-j", rope, original, "theta_rescale_factor", words, offset)


@few
@given(words=st.integers(1, 20), offset=st.integers(0, 20), factor=FACTORS)
def test_position_interpolation(same_words, words, offset, factor):
    rope = Rotary(32, "gpt-j", fraction=1.0, extensions=(Linear(factor=factor),))
    original = RotaryEmbedding(32, interpolate_factor=factor)
    same_words("gpt-j", rope, original, "interpolate_factor", words, offset)


@few
@given(words=st.integers(1, 20))
def test_xpos_is_a_scheme_times_a_decay_which_is_no_rotation(agree, words):
    """Scores, as the original counts its decay from the middle of the sequence (docs/schemes.md)."""
    rope = Rotary(32, "gpt-j", fraction=1.0)
    positions, _ = rope.place([Text(words)])
    q, k = torch.randn(2, 1, words, 2, 32)
    zeta = (torch.arange(16) / 16 + 0.4) / 1.4
    decay = (zeta ** (positions / 512)).repeat_interleave(2, -1)[:, None]
    q2, k2 = rope(q, k, positions)
    ours = torch.einsum("bqhd,bkhd->bhqk", q2 * decay, k2 / decay)
    original = RotaryEmbedding(32, use_xpos=True)
    heads = original.rotate_queries_and_keys(q.transpose(1, 2), k.transpose(1, 2))
    theirs = torch.einsum("bhqd,bhkd->bhqk", *heads)
    agree("gpt-j", "rotary-embedding-torch use_xpos (with its decay)", ours, theirs, 5e-5, "scores")


@few
@given(y=SIZES, x=SIZES)
def test_pixels(agree, y, x):
    rope, original = Rotary(32, "pixel-linear"), RotaryEmbedding(16, freqs_for="pixel", max_freq=10)
    positions, _ = rope.place([Image(y, x)])
    freqs = original.get_axial_freqs(y, x).flatten(0, 1)
    name, ours = "rotary-embedding-torch pixel", torch.stack(rope.cos_sin(positions))
    agree("pixel-linear", name, ours, torch.stack((freqs.cos(), freqs.sin())), SINGLE, "cos, sin")
    q, k = torch.randn(2, 1, y * x, 2, 32)
    theirs = [apply_rotary_emb(freqs, x.transpose(1, 2)).transpose(1, 2) for x in (q, k)]
    agree("pixel-linear", name, torch.stack(rope(q, k, positions)), torch.stack(theirs), SINGLE, "q, k")
