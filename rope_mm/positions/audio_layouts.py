"""Rules of layouts for audio tokens that have a time of their own: see `layouts`."""

import math

import torch
from torch import Tensor

from rope_mm.positions.cursor import Cursor
from rope_mm.positions.grids import Raster, causal_latents
from rope_mm.segments import Segment


def ltx2_audio(cursor: Cursor, n: int, a: int) -> tuple[Raster, float]:
    """The middle of each token on the first axis, in seconds, of which 20 span -1 to 1.

    A token has four spectrogram frames of 10 ms, the first one has one (LTX-2's `prepare_audio_coords`).

    Args:
        cursor: where the sequence stands.
        n: number of audio tokens.
        a: number of axes.
    """
    start, lead = causal_latents(4)
    step = 0.04 / 10
    steps = ((step, *(0.0 for _ in range(a - 1))),) * 3
    origin = (start * step - 1, *(0.0 for _ in range(a - 1)))
    return Raster((n, 1, 1), origin, steps, lead=lead, first_frame=int(cursor.next)), cursor.next + n


def music_flamingo(cursor: Cursor, n: int, a: int) -> tuple[Tensor, float]:
    """The number of a token's window of 30 seconds, and its place in the window, each times its second.

    In MusicFlamingoRotaryEmbedding the frequencies are multiplied by -2 pi s w / 1200 and
    -2 pi s (2 pi i) / 1200, of second s, window w and place i; a window has 750 tokens of 40 ms.

    Args:
        cursor: where the sequence stands.
        n: number of audio tokens.
        a: number of axes, which is 2.
    """
    number = cursor.next + torch.arange(n, dtype=torch.float64)
    window, place = number // 750, number % 750
    seconds = 0.04 * number
    return -math.tau * seconds[:, None] * torch.stack((window, math.tau * place), -1) / 1200, cursor.next + n


def unrotated(cursor: Cursor, segment: Segment) -> tuple[Raster, float]:
    """An image or video in a layout for audio: it is not rotated."""
    return Raster(segment.grid, (0.0, 0.0), ((0.0, 0.0),) * 3), cursor.next
