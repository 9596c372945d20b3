"""Positions and Omega -> cosine and sine, 3e-7 from the truth up to 2**22 turns (26 million radians).

Beyond, the error doubles with the angle, as its two words have 48 bits: 3e-3 at 2**40 radians.

Angles are counted in turns, so that whole ones can be dropped exactly; what is left is at most half a turn,
for which a short polynomial will do. No branch, no library: CUDA, HIP and the interpreter run the same code.
"""

import triton
import triton.language as tl

# 1 / 2 pi in two float32 words
PER_TURN = tl.constexpr(0.15915493667125702)
PER_TURN_LOW = tl.constexpr(6.4206382432985265e-09)
# 1.5 * 2**23: added and taken away again, it leaves the nearest integer; half of it, the nearest half
ROUND = tl.constexpr(12582912.0)
ROUND_HALF = tl.constexpr(6291456.0)


@triton.jit
def rest(x, high):
    """What x has beyond its nearest float32."""
    return (x - high.to(x.dtype)).to(tl.float32)


@triton.jit
def turns(position, omega):
    """position * omega / 2 pi less whole turns, in two float32 words; omega in radians."""
    p, w = position.to(tl.float32), omega.to(tl.float32)
    f = w * PER_TURN
    # inside an fma the product is exact, so this is what the line above rounded away, and the lower words
    f_low = tl.fma(w, PER_TURN, -f) + w * PER_TURN_LOW
    if omega.dtype != tl.float32:
        f_low += rest(omega, w) * PER_TURN
    low = p * f_low
    if position.dtype != tl.float32:
        low += rest(position, p) * f
    p, f = tl.broadcast(p, f)
    whole = (p * f + ROUND) - ROUND
    # again exact but for the rounding of at most half a turn: 2**-26
    return tl.fma(p, f, -whole), low


@triton.jit
def sine(u):
    """sin(2 pi u) for |u| <= 1/4, by an odd polynomial that is 3.3e-9 off before rounding."""
    v = u * u
    tail = 81.60100555419922 + v * (-76.5497817993164 + v * 39.536705017089844)
    # the greatest term comes last, and unrounded
    return tl.fma(u, 6.283185005187988, u * v * (-41.34165573120117 + v * tail))


@triton.jit
def flip(x, bits):
    """x with its sign changed where the highest bit is set."""
    return (x.to(tl.int32, bitcast=True) ^ (bits & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def cos_sin(turn, low):
    """Cosine and sine of turn + low, less half turns and folded into the quarter of `sine`."""
    # far positions have low words of many turns
    halves = (turn + low) + ROUND_HALF
    # the low word comes last, where the sum is small and so is its rounding
    left = (turn - (halves - ROUND_HALF)) + low
    # the last bit of `halves` distinguishes odd from even, and half a turn changes both signs
    odd = halves.to(tl.int32, bitcast=True) << 31
    size = tl.abs(left)
    s = sine(0.25 - tl.abs(size - 0.25))
    return flip(sine(0.25 - size), odd), flip(s, odd ^ left.to(tl.int32, bitcast=True))
