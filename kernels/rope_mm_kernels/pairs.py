"""The pairs of a head's channels: where they are, how they are read and how they are written.

A pairing is a tuple of block sizes. In a block of n pairs, pair i is channels (i, i + n). One size stands for
blocks that are all alike: (r,) pairs halves, (1,) neighbours. A lane has V pairs that follow each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def block_sizes(pairing: str, r: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The block sizes of a pairing of r pairs; one size where all are alike."""
    if pairing == "block":
        sizes = tuple(map(int, blocks))  # Triton compiles no numbers of numpy
        return sizes[:1] if len(set(sizes)) == 1 else sizes
    return (r,) if pairing == "half" else (1,)


def pair_channels(r: int, blocks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the second channel (r,) of every pair, counted from the first of all."""
    # counted on the device: a copy from the host would make it wait, and cannot be in a CUDA graph
    pair = torch.arange(r, device=device)
    if len(blocks) == 1:
        first = pair + pair // blocks[0] * blocks[0]
        return first, first + blocks[0]
    parts = pair.split(blocks)
    first = torch.cat([part + sum(blocks[:i]) for i, part in enumerate(parts)])
    second = torch.cat([part + sum(blocks[: i + 1]) for i, part in enumerate(parts)])
    return first, second


@triton.jit
def two_channels(pair, BLOCKS: tl.constexpr):
    """The same for one pair of each lane (L,)."""
    if len(BLOCKS) > 1:
        size, begin, end = BLOCKS[0], 0, BLOCKS[0]
        for block in tl.static_range(1, len(BLOCKS)):
            size = tl.where(pair >= end, BLOCKS[block], size)
            begin = tl.where(pair >= end, end, begin)
            end += BLOCKS[block]
        return pair + begin, pair + begin + size
    elif BLOCKS[0] == 1:
        return 2 * pair, 2 * pair + 1
    else:
        first = pair + pair // BLOCKS[0] * BLOCKS[0]
        return first, first + BLOCKS[0]


@triton.jit
def locate(
    part, tokens, s, r: tl.constexpr, V: tl.constexpr,
    FIRST: tl.constexpr, CHUNKS: tl.constexpr, L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of every lane (L,): batch row, step, first pair, and whether they are its own or another's, to read."""
    lane = (part.to(tl.int64) if WIDE else part) * L + tl.arange(0, L)
    token, pair = lane // CHUNKS, (FIRST + (lane % CHUNKS).to(tl.int32)) * V
    known = (token < tokens) & (pair < r)
    token, pair = tl.minimum(token, tokens - 1), tl.minimum(pair, r - V)
    # tensors of more than 2**31 elements need offsets of 64 bits
    return (token // s).to(tl.int64), (token % s).to(tl.int64), pair, known


@triton.jit
def pick(of_q, q, k):
    """The view of q or of k: data and strides of b, s, h, d."""
    return (
        tl.where(of_q, q[0], k[0]),
        tl.where(of_q, q[1], k[1]),
        tl.where(of_q, q[2], k[2]),
        tl.where(of_q, q[3], k[3]).to(tl.int64),
        tl.where(of_q, q[4], k[4]).to(tl.int64),
    )


@triton.jit
def address(x, batch, step, head, UNIT: tl.constexpr):
    """Pointers (L,) to where a head of every token begins."""
    return x[0] + UNIT * (batch * x[1] + step * x[2] + head * x[3])


@triton.jit
def reach(start, channel, stride, V: tl.constexpr):
    """Pointers (L, V) to the V channels from `channel` (L,) on."""
    channel = channel[:, None] + tl.arange(0, V)[None, :]
    return start[:, None] + channel * stride


@triton.jit
def load(start, channel, stride, inside, V: tl.constexpr):
    """V channels (L, V), 0 where not inside; None stands for lanes that all have something to read."""
    if inside is None:
        return tl.load(reach(start, channel, stride, V))
    else:
        return tl.load(reach(start, channel, stride, V), inside[:, None], 0.0)


@triton.jit
def load_pairs(start, stride, inside, pair, BLOCKS: tl.constexpr, V: tl.constexpr):
    """The first and the second channels (L, V) of the V pairs from `pair` (L,) on, in float32."""
    first, second = two_channels(pair, BLOCKS)
    if len(BLOCKS) == 1 and BLOCKS[0] == 1:
        # neighbours are split in registers: loads of every other channel would not be vectorised
        x = load(start, first, stride, inside, 2 * V).to(tl.float32)
        return tl.split(tl.reshape(x, (x.shape[0], V, 2)))
    else:
        x, y = load(start, first, stride, inside, V), load(start, second, stride, inside, V)
        return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def store_pairs(x, y, start, stride, inside, pair, BLOCKS: tl.constexpr, V: tl.constexpr):
    """The inverse of `load_pairs`, for the pairs (x, y)."""
    first, second = two_channels(pair, BLOCKS)
    if len(BLOCKS) == 1 and BLOCKS[0] == 1:
        rows = tl.reshape(tl.join(x, y), (x.shape[0], 2 * V))
        tl.store(reach(start, first, stride, 2 * V), rows, inside[:, None])
    else:
        tl.store(reach(start, first, stride, V), x, inside[:, None])
        tl.store(reach(start, second, stride, V), y, inside[:, None])


@triton.jit
def copy_rest(
    start, stride, goal, goal_stride, inside, chunk, first: tl.constexpr, REST: tl.constexpr, W: tl.constexpr
):
    """Copy the REST channels from `first` on, W of them by each lane."""
    channel = chunk * W
    present = inside[:, None] & (channel[:, None] + tl.arange(0, W)[None, :] < REST)
    rest = tl.load(reach(start, first + channel, stride, W), present)
    tl.store(reach(goal, first + channel, goal_stride, W), rest, present)
