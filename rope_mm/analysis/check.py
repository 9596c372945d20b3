"""Whether a rotary encoding is one: its matrices, taken from it as it runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.checks.fields import Count, Positive, Switch, read_value
from rope_mm.rotary.dispatch import checks
from rope_mm.rotary.module import Rotary

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Position = tuple[float, ...]
FAR = 2.0**19
NEAREST = 16.0  # starts and steps halve from half of `reach` down to this


@dataclass(frozen=True)
class RotaryReport:
    """The largest error in each thing that a rotary encoding must be, and where it is.

    M(p) is the matrix (d, d) that takes a head of q at position p.

    Attributes:
        scale: what rotated channels are multiplied by: the attention factor, 1 for most.
        rotation: max |M(p)^T M(p) - scale^2|, of q and of k.
        position: the p of that error.
        relative: max |M(p)^T M(p + delta) - M(0)^T M(delta)|, the left M of q and the right one of k.
        pair: p and p + delta of that error.
        channels: the row and the column of that error.
        same_for_q_k: max |M(p) - M(p) of k|.
        linear: max |rotated q - M(p) q| of random heads: the angles do not depend on what q and k hold.
        linear_at: the p of that error.
        alone: the same of the tokens nearest to 0, without the others: angles do not depend on where other
            tokens are.
        origin: max |M(0) - scale|: a token at position 0 is not rotated.
        tolerance: how large an error may be.
    """

    scale: float
    rotation: float
    position: Position
    relative: float
    pair: tuple[Position, Position]
    channels: tuple[int, int]
    same_for_q_k: float
    linear: float
    linear_at: Position
    alone: float
    origin: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        errors = (self.rotation, self.relative, self.same_for_q_k, self.linear, self.alone, self.origin)
        return all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        between = (
            f"between {self.pair[0]} and {self.pair[1]} in channels {self.channels[0]} and {self.channels[1]}"
        )
        answers = (
            (f"a rotation, times {self.scale:.6g}", self.rotation, f", worst at {self.position}"),
            ("relative", self.relative, f", worst {between}"),
            ("the same for q and k", self.same_for_q_k, ""),
            ("linear in q and k", self.linear, f", worst at {self.linear_at}"),
            ("the origin not rotated", self.origin, ""),
            ("the same without tokens farther away", self.alone, ""),
        )
        return "\n".join(
            f"{'yes' if error <= self.tolerance else 'NO':3} {what}: error {error:.1e}"
            + ("" if error <= self.tolerance else where)
            for what, error, where in answers
        )


def run(rope: Call, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q and k (b, s, h, d) in float64.

    Raises:
        ValueError: results that are not two tensors, or of another shape.
    """
    with torch.no_grad():
        found = rope(q.clone(), k.clone(), positions)
    if not isinstance(found, tuple | list) or [isinstance(x, Tensor) for x in found] != [True, True]:
        kinds = [type(x).__name__ for x in found] if isinstance(found, tuple | list) else type(found).__name__
        raise ValueError(f"the callable must return the tensors (q, k), not {kinds}")
    q_out, k_out = found
    for x, out in ((q, q_out), (k, k_out)):
        if out.shape != x.shape:
            raise ValueError(
                f"q and k (b, s, h, d) = {tuple(x.shape)} must keep their shape, not become "
                f"{tuple(out.shape)}"
            )
    return q_out.double(), k_out.double()


def matrices(rope: Call, positions: Tensor, head_dim: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Matrices (s, h, d, d) that take q and k at positions (s, a): what becomes of the unit vectors.

    Tokens are given in a shuffled order, so that code that counts tokens and ignores positions is found.
    """
    unit = torch.eye(head_dim, dtype=dtype)[:, None, None].expand(-1, len(positions), heads, -1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    return [out.permute(1, 2, 3, 0)[back] for out in run(rope, unit, unit, positions[order])]


def rotation_error(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (d,) of channels, one > 0 for all that are rotated, and max |M^T M - scale^2| (s,)."""
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    rotated = (matrix - unit).abs().amax((0, 1, 2)) > 0
    common = matrix[..., rotated].square().sum(-2).mean().sqrt()
    scale = torch.where(rotated & (common != 0), common, 1.0)
    return scale, (matrix.mT @ matrix - scale.square().diag()).abs().amax((1, 2, 3))


def linearity_error(rope: Call, positions: Tensor, of_q: Tensor, of_k: Tensor, dtype: torch.dtype) -> Tensor:
    """The error (s,) of rotated random heads against their matrices (s, h, d, d).

    Every token has content of its own, so angles that depend on the content, and tokens that mix, are seen.
    """
    s, heads, d, _ = of_q.shape
    seed = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, s, heads, d, generator=seed, dtype=torch.float64).to(dtype) for _ in range(2))
    errors = []
    for x, out, matrix in zip((q, k), run(rope, q, k, positions), (of_q, of_k), strict=True):
        expected = torch.einsum("shij,bshj->bshi", matrix, x.double())
        errors.append((out - expected).abs().amax((0, 2, 3)))
    return torch.maximum(*errors)


def probe_positions(axes: int, reach: float, whole: bool = False) -> Tensor:
    """Positions (n, m, axes): n starts, the first 0, and from each the same m steps, the first 0.

    Starts and steps double up to half of `reach`, so that wherever positions begin to be wrong, a start and
    a step lie on the right side of it and their sum on the wrong one: steps go the way that starts go, or,
    where positions may be negative, back. They are fractional, too. All are multiples of 1/16, so their sums
    are exact, in float32, too, up to a reach of 2**20.

    Args:
        axes: how many coordinates a position has.
        reach: positions go up to this, or to 1.
        whole: whole numbers >= 0 alone.
    """
    seed = torch.Generator().manual_seed(0)
    sizes = [reach / 2]
    while sizes[-1] >= 2 * NEAREST:
        sizes.append(sizes[-1] / 2)
    far = torch.tensor(sizes, dtype=torch.float64)[:, None]
    direction = (1 + torch.rand(axes, generator=seed, dtype=torch.float64)) / 2
    signs = torch.randint(2, (2, axes), generator=seed) * 2 - 1
    zero, single = torch.zeros(1, axes).double(), torch.eye(axes).double()
    if whole:
        doubling = (far * direction).floor()
        return torch.cat((zero, doubling))[:, None] + torch.cat((zero, single, doubling))
    doubling = (far * direction * signs[0] * 16).round() / 16
    other = (far[::4] * direction.flip(0) * signs[1] * 16).round() / 16
    starts = torch.cat((zero, doubling, other))
    return starts[:, None] + torch.cat((zero, single, single / 4, -single, -doubling))


def check_rotary(
    rope: Rotary | Call,
    *,
    head_dim: int | None = None,
    axes: int | None = None,
    heads: int = 1,
    reach: float = FAR,
    whole: bool = False,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> RotaryReport:
    """Whether q and k are rotated so that their scores depend only on the difference of their positions.

    It is tried at positions near 0 and as far as `reach`, whole and fractional, positive and negative, on
    unit vectors and on random heads.

    Args:
        rope: a Rotary, whose sizes are read from it, or any (q (b, s, h, d), k, p (s, a)) -> (q, k).
        head_dim: channels of a head, for a callable.
        axes: how many coordinates p has, for a callable.
        heads: how many heads q and k have, where a Rotary does not say.
        reach: how far p goes from 0; lower it for code that makes its angles in float32, whose error grows
            with p.
        whole: whether p are whole numbers >= 0 alone, for code that looks angles up in a table.
        dtype: of q and k; p are float64.
        tolerance: how large an error may be, beside what float64 rounds off a Rotary's angles; about
            1e-7 * reach for code that makes its angles in float32.

    Raises:
        ValueError: a callable without its sizes, or one that returns other than q and k of their shapes; what
            is no callable, a dtype that heads cannot have.

    Examples:
        >>> check_rotary(Rotary(64, "m-rope")).ok
        True
        >>> check_rotary(lambda q, k, p: (q + p[:, None], k), head_dim=2, axes=1).ok
        False
    """
    reach = read_value("check_rotary", "reach", reach, Positive)
    whole = read_value("check_rotary", "whole", whole, Switch)
    tolerance = read_value("check_rotary", "tolerance", tolerance, Positive)
    if isinstance(rope, Rotary):
        head_dim, axes, heads = rope.head_dim, len(rope.scheme.axes), rope.heads or heads
        angle = 2 * reach * rope.omega.detach().abs().sum(-2).max().item()
        tolerance = max(tolerance, 4 * torch.finfo(torch.float64).eps * angle)
    if not callable(rope):
        raise ValueError(f"give a Rotary or a function (q, k, positions) -> (q, k), not {rope!r}")
    checks.check_head_dtype(dtype)
    if head_dim is None or axes is None:
        raise ValueError("a callable does not say its sizes: give head_dim= and axes=")
    d = read_value("check_rotary", "head_dim", head_dim, Count)
    heads = read_value("check_rotary", "heads", heads, Count)
    p = probe_positions(read_value("check_rotary", "axes", axes, Count), reach, whole)
    return report_errors(rope, p, matrices(rope, p.flatten(0, 1), d, heads, dtype), dtype, tolerance)


def report_errors(
    rope: Call, p: Tensor, of_q_k: list[Tensor], dtype: torch.dtype, tolerance: float
) -> RotaryReport:
    """The report of matrices (n*m, h, d, d) of q and of k at positions p (n, m, a)."""
    of_q, of_k = of_q_k
    flat = p.flatten(0, 1)
    (scale, rotation), (_, of_keys) = rotation_error(of_q), rotation_error(of_k)
    rotation = torch.maximum(rotation, of_keys)
    linear = linearity_error(rope, flat, of_q, of_k, dtype)
    near = flat.abs().amax(-1) <= NEAREST
    between = of_q.unflatten(0, p.shape[:2])[:, :1].mT @ of_k.unflatten(0, p.shape[:2])  # (n, m, h, d, d)
    error = between.sub_(between[:1].clone()).abs_()
    start, step, _, row, column = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return RotaryReport(
        scale=scale[(scale - 1).abs().argmax()].item(),
        rotation=rotation.max().item(),
        position=tuple(flat[rotation.argmax()].tolist()),
        relative=error.max().item(),
        pair=(tuple(p[start, 0].tolist()), tuple(p[start, step].tolist())),
        channels=(row, column),
        same_for_q_k=(of_q - of_k).abs().max().item(),
        linear=linear.max().item(),
        linear_at=tuple(flat[linear.argmax()].tolist()),
        alone=linearity_error(rope, flat[near], of_q[near], of_k[near], dtype).max().item(),
        origin=(of_q[0] - scale.diag()).abs().max().item(),
        tolerance=tolerance,
    )
