"""The stream (b, s, c) -> patches from their places, or one score."""

from torch import Tensor, nn


class PatchHead(nn.Module):
    """Patches (n, p) read at the n places (b, s) of the image tokens, in order; bounded, within (-1, 1)."""

    def __init__(self, width: int, patch_width: int, bounded: bool = False):
        super().__init__()
        self.out, self.bounded = nn.Linear(width, patch_width), bounded

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (b, s, c), places (b, s) -> (n, p)."""
        patches = self.out(x[places])
        return patches.tanh() if self.bounded else patches


class ScoreHead(nn.Module):
    """One score (b,) for each row: the mean of what is read at its image tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (b, s, c), places (b, s) -> (b,)."""
        mean = (x * places[..., None]).sum(1) / places.sum(1, keepdim=True)
        return self.out(mean).squeeze(-1)
