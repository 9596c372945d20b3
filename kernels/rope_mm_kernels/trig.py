"""Positions and Omega -> cosine and sine, 3e-7 from the truth up to 2**22 turns (26 million radians).

Angles are counted in turns, so that whole ones can be dropped exactly; what is left is at most half a turn,
for which a short polynomial will do. No branch, no library: CUDA, HIP and the interpreter run the same code.
"""

import triton
import triton.language as tl

# 1 / 2 pi in two float32 words
PER_TURN = tl.constexpr(0.15915493667125702)
PER_TURN_LOW = tl.constexpr(6.4206382432985265e-09)
# 1.5 * 2**23: added and taken away again, it leaves the nearest integer of a float32
ROUND = tl.constexpr(12582912.0)


@triton.jit
def less_whole(turn):
    """The same angle, at most half a turn from none."""
    return turn - ((turn + ROUND) - ROUND)


@triton.jit
def two_words(x):
    """x as the nearest float32 and the float32 nearest to what that leaves; None where nothing is left."""
    high = x.to(tl.float32)
    if x.dtype.primitive_bitwidth <= 16 or x.dtype == tl.float32:
        return high, None
    else:
        return high, (x - high.to(x.dtype)).to(tl.float32)


@triton.jit
def turns(position, omega):
    """position * omega / 2 pi in float32, less all but one of its whole turns; omega in radians."""
    p, p_low = two_words(position)
    w, w_low = two_words(omega)
    f = w * PER_TURN
    # inside an fma the product is exact, so this is what the line above rounded away, and the lower words
    f_low = tl.fma(w, PER_TURN, -f) + w * PER_TURN_LOW
    if w_low is not None:
        f_low += w_low * PER_TURN
    p, f = tl.broadcast(p, f)
    whole = (p * f + ROUND) - ROUND
    # again exact but for the rounding of at most half a turn: 2**-26
    left = tl.fma(p, f, -whole) + p * f_low
    if p_low is not None:
        left += p_low * f
    return left


@triton.jit
def sine(u):
    """sin(2 pi u) for |u| <= 1/4, by an odd polynomial that is 3.3e-9 off before rounding."""
    v = u * u
    tail = 81.60100555419922 + v * (-76.5497817993164 + v * 39.536705017089844)
    return u * (6.283185005187988 + v * (-41.34165573120117 + v * tail))


@triton.jit
def cos_sin(turn):
    """Cosine and sine of |turn| <= 1/2 turns, both folded into the quarter that `sine` covers."""
    size = tl.abs(turn)
    s = sine(0.25 - tl.abs(size - 0.25))
    return sine(0.25 - size), tl.where(turn < 0, -s, s)
