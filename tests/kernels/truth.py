"""Rotations as complex multiplication in float64, the calls that are tried, and how results are judged."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()

# q, k, positions, Omega and, for a normalised rotation, the weights of q and of k
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; n = 0 is an Omega without a head axis."""

    b: int = 2
    s: int = 5
    h: int = 4
    g: int = 2
    d: int = 16
    r: int = 8
    a: int = 3
    n: int = 0
    batched: bool = False
    pairing: str = "half"
    blocks: tuple[int, ...] = ()
    tail: bool = False
    factor: float = 1.0
    mode: str = "exact"

    @property
    def how(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        return {name: getattr(self, name) for name in ("pairing", "blocks", "tail", "factor", "mode")}

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, reach: float = 8.0, normed: bool = False
    ) -> Inputs:
        """Real positions of both signs up to `reach`; everything asks for gradients."""
        random = torch.Generator().manual_seed(0)
        q, k = (torch.randn(self.b, self.s, heads, self.d, generator=random) for heads in (self.h, self.g))
        shape = (self.b, self.s, self.a) if self.batched else (self.s, self.a)
        positions = (2 * torch.rand(shape, generator=random) - 1) * reach
        omega = torch.rand((self.n, self.a, self.r) if self.n else (self.a, self.r), generator=random)
        weights = [torch.rand(self.d, generator=random) + 0.5 for _ in range(2 * normed)]
        made = q.to(dtype), k.to(dtype), positions, omega, *weights
        return tuple(x.to(device).requires_grad_() for x in made)


def channel_pairs(r: int, d: int, pairing: str, blocks: tuple[int, ...], tail: bool) -> tuple[list[int], ...]:
    """The first and the second channel of every pair."""
    start = d - 2 * r if tail else 0
    if pairing == "interleaved":
        return list(range(start, start + 2 * r, 2)), list(range(start + 1, start + 2 * r, 2))
    first, second = [], []
    for size in blocks or (r,):
        first += range(start, start + size)
        second += range(start + size, start + 2 * size)
        start += 2 * size
    return first, second


def angles(positions: Tensor, omega: Tensor, mode: str) -> Tensor:
    """Angles (..., s, n, r) in float64; those of "hf" are rounded, and differentiated as if they were not."""
    omega = omega.reshape(-1, *omega.shape[-2:])
    exact = (positions.double()[..., :, None, :, None] * omega.double()).sum(-2)
    if mode == "exact":
        return exact
    products = positions.float()[..., :, None, :, None] * omega.float()
    rounded = sum(products.unbind(-2))
    return exact + (rounded.double() - exact).detach()


def truth(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, *weights: Tensor,
    pairing: str = "half", blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0,
    mode: str = "exact", dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Each pair as a complex number, times factor exp(i angle), in `dtype`; weights ask for RMSNorm first."""
    angle = angles(positions, omega, mode)
    turn = factor * torch.complex(angle.cos().to(dtype), angle.sin().to(dtype))

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        given, x = x.dtype, x.to(dtype)
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(dtype)
        n, heads = turn.shape[-2], x.shape[2]
        row = [head * n // heads for head in range(heads)]
        first, second = channel_pairs(turn.shape[-1], x.shape[-1], pairing, blocks, tail)
        z = torch.complex(x[..., first], x[..., second]) * turn[..., row, :]
        x = x.index_copy(-1, torch.tensor(first, device=x.device), z.real)
        x = x.index_copy(-1, torch.tensor(second, device=x.device), z.imag)
        return x if dtype == torch.float64 else x.to(given)

    return tuple(turned(x, weight) for x, weight in zip((q, k), weights or (None, None), strict=True))


def eager(*inputs: Tensor, **how) -> tuple[Tensor, ...]:
    """The same in float32, with angles of float64."""
    return truth(*inputs, **how, dtype=torch.float32)


def cotangents(out: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random gradients of q' and k', representable in this dtype, the same at every call."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random).to(dtype).to(x) for x in out]


def results(turn, inputs: Inputs, how: dict[str, Any]) -> tuple[Tensor, ...]:
    """q', k' and the gradients of all inputs; the truth's are not rounded."""
    dtype = inputs[0].dtype
    if turn is truth:
        inputs = wider(inputs)
    out = turn(*inputs, **how)
    return *out, *torch.autograd.grad(out, inputs, cotangents(out, dtype))


def penalty(turn, inputs: Inputs, how: dict[str, Any]) -> tuple[Tensor, ...]:
    """The gradients of a score and, of the squares of those, the gradients again."""
    score = sum(x.sin().sum() for x in turn(*inputs, **how))
    slopes = torch.autograd.grad(score, inputs, create_graph=True)
    return *slopes, *torch.autograd.grad(sum(x.square().sum() for x in slopes), inputs)


def wider(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return tuple(x.detach().double().requires_grad_() for x in inputs)


def agree(fast: Inputs, right: Inputs, plain: Inputs | None = None, units: int = 8) -> None:
    """Error at most twice that of the definition in the same dtype, or some units of the largest value."""
    for index, (x, y) in enumerate(zip(fast, right, strict=True)):
        assert x.shape == y.shape
        if not x.numel():
            continue
        bound = units * torch.finfo(torch.float32).eps * y.abs().max().item()
        if plain is not None:
            bound = max(bound, 2 * (plain[index].double() - y).abs().max().item())
        error = (x.double() - y.to(x.device)).abs().max().item()
        assert error <= bound, f"result {index} of q', k', dq, dk, dpositions, domega... is {error:.2e} off"
