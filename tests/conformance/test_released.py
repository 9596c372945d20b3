"""Layouts of code that was released but is no package: what it printed for one sequence, run once.

    JJJYmmm/Multimodal-RoPEs cd413b9, multimodal_ropes/pos_design and freq_allocation
    Wiselnn570/VideoRoPE 7712ca3, videorope-transformer/modeling_videorope.py
    johncaged/VRoPE 6a7adbc, vrope.py
    lose4578/CircleRoPE 063fb2c, code/circle_rope.py and config.json
    alibaba-damo-academy/Lumos f7c9cd2, modeling_chameleon_mm_rope.py, 3 x 2 patches and row markers
    bytedance/Lance 4baeee0, data/common.py, after M-RoPE: encoder's tokens, clean latents, noise
    huajianduzhuo-code/Spiral_RoPE bde84ff, RoPE_DeiT/rope.py, a grid of 5 x 5, 16 channels, rotate=2

with a temporal stride of 1 (2 for VideoRoPE, HoPE's draws from [1.0]), V2PE's stride of 16, CircleRoPE's
radius of 10, alpha of 0.5 and move_to_origin. Over 300 random sequences they gave what ours gave, fractions
within 7e-6 in their float32.
"""

import pytest
import torch

from rope_mm import Image, Rotary, place
from rope_mm.schemes.frequencies import ownership_map

SEGMENTS = "text:2 video:4x2x3 text:2 image:3x2 text:1"
# the last word, the video's first patch, the ends of its first row, its second row, its second frame, its
# last patch, the word after it; the image's first and last patch, the last word
TOKENS = [1, 2, 4, 5, 8, 25, 26, 28, 33, 34]
FRACTIONS = 2e-5  # the numbers below are rounded to 5 digits, theirs to float32

M_ROPE = [
    (1, 1, 1), (2, 2, 2), (2, 2, 4), (2, 3, 2), (3, 2, 2), (5, 3, 4), (6, 6, 6),
    (8, 8, 8), (8, 10, 9), (11, 11, 11),
]  # fmt: skip
SPATIAL_RESET = [
    (1, 1, 1), (2, 0, 0), (2, 0, 2), (2, 1, 0), (3, 0, 0), (5, 1, 2), (6, 6, 6),
    (8, 0, 0), (8, 2, 1), (11, 11, 11),
]  # fmt: skip
VIDEOROPE = [
    (1, 1, 1), (2, 2, 1), (2, 2, 3), (2, 3, 1), (4, 4, 3), (8, 9, 9), (9, 9, 9),
    (11, 10, 11), (11, 12, 12), (12, 12, 12),
]  # fmt: skip
HOPE = [
    (1, 1, 1), (2, 2, 1), (2, 2, 3), (2, 3, 1), (3, 3, 2), (5, 6, 6), (6, 6, 6),
    (8, 7, 8), (8, 9, 9), (9, 9, 9),
]  # fmt: skip
V2PE = [(1,), (1.66667,), (3,), (3.66667,), (5.66667,), (17,), (18,), (21.66667,), (35,), (36,)]
VROPE = [
    (1, 1, 1, 1), (2, 4, 3, 5), (4, 2, 5, 3), (3, 5, 2, 4), (6, 8, 7, 9), (17, 15, 16, 14), (18, 18, 18, 18),
    (20, 21, 22, 23), (23, 22, 21, 20), (24, 24, 24, 24),
]  # fmt: skip
CIRCLE = [
    (1, 1, 1), (2, 9.07107, -5.07107), (7.83187, -5.86487, 4.033), (-6.16497, 6.08248, 6.08248),
    (3, 10.07107, -4.07107), (-2.90782, 7.19328, 10.71454), (13.52747, 13.52747, 13.52747),
    (15.52747, 22.59854, 8.45641), (7.50578, 18.21951, 20.85714), (23.75319, 23.75319, 23.75319),
]  # fmt: skip
LUMOS = [
    (5, 5, 5), (6, 6, 6), (6, 6, 14), (6, 6, 22), (6, 14, 6), (6, 22, 14), (6, 22, 22), (15, 15, 15),
]  # fmt: skip
LANCE = [
    (1, 1, 1), (1000, 2, 2), (1000, 3, 4), (5, 5, 5), (2000, 6, 6), (2000, 7, 7), (8, 8, 8), (9, 9, 9),
    (9, 10, 10), (11, 11, 11),
]  # fmt: skip
# angles of patches (row, column) less those of the patch in the middle
SPIRAL = {
    (1, 2): [-1.5, -0.15, -0.01061, -0.00106, 0, 0, 0.01061, 0.00106],
    (2, 3): [0, 0, 0.01061, 0.00106, 1.5, 0.15, 0.01061, 0.00106],
    (3, 3): [1.5, 0.15, 0.02121, 0.00212, 1.5, 0.15, 0, 0],
    (2, 0): [0, 0, -0.02121, -0.00212, -3, -0.3, -0.02121, -0.00212],
}
JJJ = "JJJYmmm/Multimodal-RoPEs"


@pytest.mark.parametrize(
    ("scheme", "original", "golden", "within"),
    [
        ("m-rope", f"{JJJ} mrope.py", M_ROPE, 0),
        ("m-rope", f"{JJJ} mrope_i.py", M_ROPE, 0),
        ("mm-rope", f"{JJJ} mmrope.py", M_ROPE, 0),
        ("m-rope-i", f"{JJJ} mrope_i.py, spatial_reset", SPATIAL_RESET, 0),
        ("omni", f"{JJJ} omnirope.py", SPATIAL_RESET, 0),
        ("videorope", f"{JJJ} videorope.py", VIDEOROPE, 0),
        ("videorope", "Wiselnn570/VideoRoPE modeling_videorope.py", VIDEOROPE, 0),
        ("hope", f"{JJJ} hope.py", HOPE, 0),
        ("v2pe", f"{JJJ} v2pe.py", V2PE, FRACTIONS),
        ("vrope", "johncaged/VRoPE vrope.py", VROPE, 0),
        ("circle", f"{JJJ} circlerope.py", CIRCLE, FRACTIONS),
    ],
)
def test_positions_are_those_that_released_code_gave(agree, scheme, original, golden, within):
    positions, _ = Rotary(128, scheme).place(SEGMENTS)
    theirs = torch.tensor(golden, dtype=torch.float64)
    agree(scheme, f"{original} (golden)", positions[TOKENS], theirs, within, "positions")


@pytest.mark.parametrize(
    ("scheme", "original", "segments", "tokens", "golden"),
    [
        (
            "mm-rope-lumos-1",
            "alibaba-damo-academy/Lumos modeling_chameleon_mm_rope.py",
            "text:6 image:3x3 text:1",
            [5, 6, 7, 8, 9, 13, 14, 15],
            LUMOS,
        ),
        (
            "lance",
            "bytedance/Lance shift_position_ids",
            "text:2 image:2x3 text:1 image:2x2 text:1 image:2x2 text:1",
            [1, 2, 7, 8, 9, 12, 13, 14, 17, 18],
            LANCE,
        ),
    ],
)
def test_positions_of_models_with_their_own_order_of_images(
    agree, scheme, original, segments, tokens, golden
):
    positions, _ = Rotary(128, scheme).place(segments)
    theirs = torch.tensor(golden, dtype=torch.float64)
    agree(scheme, f"{original} (golden)", positions[tokens], theirs, 0, "positions")


def test_spiral_rope_turns_along_four_directions(agree):
    """At the corners, out of the circle's reach, it repeats the border; ours is as in the article."""
    rope = Rotary(16, "spiral-rope")
    positions, _ = rope.place("image:5x5")
    angles = ((positions - positions[12]) @ rope.omega).view(5, 5, -1)
    ours = torch.stack([angles[place] for place in SPIRAL])
    theirs = torch.tensor(list(SPIRAL.values()))
    agree("spiral-rope", "huajianduzhuo-code/Spiral_RoPE rope.py (golden)", ours, theirs, 1e-5, "angles")


def test_a_image_alone_lies_on_the_circle_that_circlerope_gave_it(agree):
    golden = [
        (0, 7.07107, -7.07107), (7.52747, -1.0246, -6.50287), (5.83187, -7.86487, 2.033),
        (-8.16497, 4.08248, 4.08248), (-8.10042, 3.16288, 4.93754), (-7.90782, 2.19328, 5.71454),
    ]  # fmt: skip
    positions, _ = place([Image(2, 3)], "circle")
    theirs = torch.tensor(golden, dtype=torch.float64)
    agree("circle", "lose4578/CircleRoPE circle_rope.py (golden)", positions, theirs, FRACTIONS, "positions")


@pytest.mark.parametrize(
    ("scheme", "axes", "owners"),
    [
        ("m-rope", "tyx", "t" * 16 + "y" * 24 + "x" * 24),
        ("m-rope-i", "tyx", "tyx" * 20 + "tttt"),
        ("mm-rope", "tyx", "ttyxyxyx" * 8),
        ("mm-rope-lumos-1", "tyx", "ttttyyxxyyxxyyxx" * 4),
        # Wiselnn570's; JJJYmmm's freq_allocation/videorope.py is off by one: "t" + "yx" * 23 + "y" + "t" * 16
        ("videorope", "tyx", "yx" * 24 + "t" * 16),
        ("vrope", "pqrs", "pqrs" * 16),
    ],
)
def test_pairs_turn_with_the_axes_of_released_code(scheme, axes, owners):
    assert ownership_map(Rotary(128, scheme).omega, axes) == owners


def test_heads_turn_with_the_axes_of_released_mh_rope():
    heads = ownership_map(Rotary(128, "mh-rope", heads=8).omega, "tyx").splitlines()
    assert heads == [axis * 64 for axis in "ttyyyxxx"]
