"""The stream (b, s, c) -> what is read from it: patches from their places, a score from its token."""

from torch import Tensor, nn


class Head(nn.Module):
    """A linear reading (n, out) of the stream at the n places (b, s) that a mask names, in order."""

    def __init__(self, width: int, out: int, bias: bool = True):
        super().__init__()
        self.out = nn.Linear(width, out, bias=bias)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.out(x[places])
