"""What is timed: shapes, strides and passes, the bytes that each must move, and the tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Heads (b, s, h, d) of q and (b, s, g, d) of k, on `a` axes."""

    b: int
    s: int
    h: int
    g: int
    d: int
    a: int = 1

    def __str__(self):
        return " ".join(str(size) for size in self)


class Pass(NamedTuple):
    """How often the heads are read or written, and the clock it is timed by."""

    moves: int
    clock: str = "kernel"


# more than 300 MB of 16-bit heads each, so that no cache holds them
SHAPES = (
    Shape(1, 32768, 32, 8, 128, 1),  # a language model
    Shape(1, 40960, 28, 4, 128, 3),  # Qwen2.5-VL
    Shape(64, 1024, 16, 16, 80, 2),  # towers
    Shape(92, 729, 16, 16, 72, 2),
    Shape(1, 27030, 24, 24, 128, 3),  # a diffusion transformer on video
    Shape(1, 131072, 8, 1, 128, 1),  # a language model on eight GPUs
)
DECODE = tuple(Shape(b, 1, 32, 8, 128) for b in (1, 8, 128))
LAYOUTS = ("BSHD", "BHSD")
PASSES = {
    "forward": Pass(2),
    "forward in place": Pass(2),
    "backward": Pass(2),
    "backward with dOmega": Pass(3),
    "norm forward": Pass(2),
    "norm backward": Pass(3),
    "tables": Pass(0),
}
DECODES = {"decode, wall clock": Pass(2, "wall"), "decode, CUDA graph": Pass(2, "graph")}


def floor(shape: Shape, way: Pass, element: int = 2) -> int:
    """Bytes that must be moved: heads as often as the pass says, and float32 positions once."""
    b, s, h, g, d, a = shape
    return way.moves * element * b * s * (h + g) * d + 4 * s * a * bool(way.moves)


class Case(NamedTuple):
    """Tensors of a shape: heads, gradients of the results, positions, Omega, tables, weights of a norm."""

    q: Tensor
    k: Tensor
    grads: tuple[Tensor, Tensor]
    positions: Tensor
    omega: Tensor
    cos: Tensor
    sin: Tensor
    weight: Tensor
    layout: str


def heads(b: int, s: int, h: int, d: int, layout: str, device: str, dtype: torch.dtype) -> Tensor:
    """Random heads (b, s, h, d), stored as b s h d or b h s d."""
    shape = (b, s, h, d) if layout == "BSHD" else (b, h, s, d)
    x = torch.randn(shape, device=device, dtype=dtype)
    return x if layout == "BSHD" else x.transpose(1, 2)


def ladder(shape: Shape) -> Tensor:
    """Frequencies (r,) from 1 down, as of a language model."""
    return 1e4 ** -(torch.arange(shape.d // 2, dtype=torch.float64) / (shape.d // 2))


def places(shape: Shape) -> Tensor:
    """Positions (s, a) of a grid with 32 steps on every axis but the first."""
    step = torch.arange(shape.s)
    inner = [step // 32**i % 32 for i in range(shape.a - 1)]
    return torch.stack((step // 32 ** (shape.a - 1), *reversed(inner)), -1).float()


def sections(shape: Shape) -> list[int]:
    """Pairs of each axis, one axis after another."""
    r = shape.d // 2
    return [r * (i + 1) // shape.a - r * i // shape.a for i in range(shape.a)]


def make(shape: Shape, layout: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The tensors of a case; tables (1, s, d) are in the dtype of the heads, as transformers has them."""
    b, s, h, g, d, _ = shape
    q, k, dq, dk = (heads(b, s, n, d, layout, device, dtype) for n in (h, g, h, g))
    positions, axes = places(shape), torch.block_diag(*(torch.ones(1, n) for n in sections(shape)))
    omega = axes * ladder(shape)
    angle = (positions.double() @ omega).repeat(1, 2)[None]
    cos, sin = (x.to(device, dtype) for x in (angle.cos(), angle.sin()))
    weight = torch.ones(d, device=device, dtype=dtype)
    return Case(q, k, (dq, dk), positions.to(device), omega.float().to(device), cos, sin, weight, layout)


def expected(case: Case, way: str) -> tuple[Tensor, ...]:
    """What a pass returns first, in float32; nothing where only the tests know."""
    given = {"forward": (case.q, case.k), "forward in place": (case.q, case.k), "backward": case.grads}
    cos, sin = (x[0, :, None].float() for x in (case.cos, case.sin))
    sin = -sin if way == "backward" else sin
    halves = [(x.float(), *x.float().chunk(2, -1)) for x in given.get(way, ())]
    return tuple(x * cos + torch.cat((-second, first), -1) * sin for x, first, second in halves)
