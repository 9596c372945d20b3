"""Whether a rotary encoding is one: its matrices, taken from it as it runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.rotary.module import Rotary

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Place = tuple[float, ...]


@dataclass(frozen=True)
class RotaryReport:
    """The largest error in each thing that a rotary encoding must be, and where it is.

    M is the matrix (d, d) that takes a head of q at position p; `relative` has those of q left, of k right.

    Attributes:
        scale: what rotated channels are multiplied by: the attention factor, 1 for most.
        rotation: max |M(p)^T M(p) - scale^2|, of q and of k; `token` is the p.
        relative: max |M(p)^T M(p + delta) - M(0)^T M(delta)|; `pair` is p and p + delta.
        alike: max |M(p) - M(p) of k|.
        origin: max |M(0) - scale|: a token there is left alone.
        tolerance: how large an error may be.
    """

    scale: float
    rotation: float
    token: Place
    relative: float
    pair: tuple[Place, Place]
    alike: float
    origin: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        return all(x <= self.tolerance for x in (self.rotation, self.relative, self.alike, self.origin))

    def __str__(self) -> str:
        answers = (
            (f"a rotation, times {self.scale:.6g}", self.rotation, f", worst at {self.token}"),
            ("relative", self.relative, f", worst between {self.pair[0]} and {self.pair[1]}"),
            ("q and k alike", self.alike, ""),
            ("origin left alone", self.origin, ""),
        )
        return "\n".join(
            f"{'yes' if error <= self.tolerance else 'NO':3} {what}: error {error:.1e}"
            + ("" if error <= self.tolerance else where)
            for what, error, where in answers
        )


def matrices(rope: Call, positions: Tensor, head_dim: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Matrices (s, h, d, d) that take q and k at positions (s, a): what becomes of the unit vectors."""
    unit = torch.eye(head_dim, dtype=dtype)[:, None, None].expand(-1, len(positions), heads, -1)
    with torch.no_grad():
        images = rope(unit.clone(), unit.clone(), positions)
    if wrong := [tuple(image.shape) for image in images if image.shape != unit.shape]:
        raise ValueError(
            f"q and k (b, s, h, d) = {tuple(unit.shape)} must keep their shape, not become {wrong}"
        )
    return [image.double().permute(1, 2, 3, 0) for image in images]


def rotation_error(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The factor (d,) on channels, one for all that are touched, and max |M^T M - factor^2| (s,)."""
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    touched = (matrix - unit).abs().amax((0, 1, 2)) > 0
    scale = matrix[..., touched].square().sum(-2).mean().sqrt()
    factor = torch.where(touched, scale, 1.0)
    return factor, (matrix.mT @ matrix - factor.square().diag()).abs().amax((1, 2, 3))


def probe_positions(axes: int, reach: int) -> Tensor:
    """Positions (8, axes + 2, axes): eight places, the first 0, and from each single steps and a far one."""
    draw = torch.Generator().manual_seed(0)
    starts, far = (torch.randint(1, reach + 1, (n, axes), generator=draw).double() for n in (8, 1))
    starts[0] = 0
    return starts[:, None] + torch.cat((torch.zeros_like(far), torch.eye(axes), far))


def check_rotary(
    rope: Rotary | Call,
    *,
    head_dim: int | None = None,
    axes: int | None = None,
    heads: int = 1,
    reach: int = 64,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> RotaryReport:
    """Whether q and k are rotated so that their scores see only how far apart they stand.

    Args:
        rope: a Rotary, whose sizes are read from it, or any (q (b, s, h, d), k, p (s, a)) -> (q, k).
        head_dim: channels of a head, for a callable.
        axes: how many coordinates p has, for a callable.
        heads: how many heads q and k have, where a Rotary does not say.
        reach: p are whole numbers from 0 to 2 * reach, in float64.
        dtype: of q and k.
        tolerance: how large an error may be; about 1e-4 for code that makes its angles in float32.

    Raises:
        ValueError: a callable without its sizes, or one that changes the shape of q or k.
    """
    if isinstance(rope, Rotary):
        head_dim, axes, heads = rope.head_dim, len(rope.scheme.axes), rope.heads or heads
    if head_dim is None or axes is None:
        raise ValueError("a callable does not say its sizes: give head_dim= and axes=")
    p = probe_positions(axes, reach)
    q, k = matrices(rope, p.flatten(0, 1), head_dim, heads, dtype)
    (factor, rotation), (_, of_keys) = rotation_error(q), rotation_error(k)
    rotation = torch.maximum(rotation, of_keys)
    between = q.unflatten(0, p.shape[:2])[:, :1].mT @ k.unflatten(0, p.shape[:2])
    relative = (between - between[:1]).abs().amax((2, 3, 4))
    start, step = divmod(int(relative.argmax()), p.shape[1])
    return RotaryReport(
        scale=factor[(factor - 1).abs().argmax()].item(),
        rotation=rotation.max().item(),
        token=tuple(p.flatten(0, 1)[rotation.argmax()].tolist()),
        relative=relative.max().item(),
        pair=(tuple(p[start, 0].tolist()), tuple(p[start, step].tolist())),
        alike=(q - k).abs().max().item(),
        origin=(q[0] - factor.diag()).abs().max().item(),
        tolerance=tolerance,
    )
