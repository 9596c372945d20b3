"""Words and patches -> the stream (b, s, c)."""

import torch
from einops import rearrange
from torch import Tensor, nn


def to_patches(images: Tensor, size: int) -> Tensor:
    """Images (b, ch, size*y, size*x) -> patches (b, y*x, ch*size*size), in raster order.

    Raises:
        ValueError: images that whole patches do not tile.
    """
    *_, rows, columns = images.shape
    if rows % size or columns % size:
        raise ValueError(f"images of {rows} x {columns} pixels do not divide into patches of {size} x {size}")
    return rearrange(images, "b ch (y p) (x q) -> b (y x) (ch p q)", p=size, q=size)


def to_images(patches: Tensor, y: int, x: int, size: int) -> Tensor:
    """Patches (b, y*x, ch*size*size) -> images (b, ch, size*y, size*x): the inverse of `to_patches`."""
    return rearrange(patches, "b (y x) (ch p q) -> b ch (y p) (x q)", y=y, x=x, p=size, q=size)


def to_tubelets(frames: Tensor, depth: int) -> Tensor:
    """Frames (t, ch, y, x) -> `depth` of them as channels of one, (t/depth, depth*ch, y, x).

    The last frame is repeated where they do not divide, so that a picture is repeated depth times.
    """
    last = frames[-1:].expand(-len(frames) % depth, -1, -1, -1)
    return rearrange(torch.cat([frames, last]), "(t u) ch y x -> t (u ch) y x", u=depth)


def from_tubelets(tubes: Tensor, depth: int) -> Tensor:
    """Tubes (b, t, depth*ch, y, x) -> frames (b, t*depth, ch, y, x): the inverse of `to_tubelets`."""
    return rearrange(tubes, "b t (u ch) y x -> b (t u) ch y x", u=depth)


class PatchEmbedding(nn.Linear):
    """Patches (n, p) -> (n, c), whose weights may begin at a scale of their own.

    At the scale of other weights a patch of many numbers drowns the vector of the image word, by which
    attention tells places.
    """


class TokenEmbedding(nn.Module):
    """A vector for every word, and a linear map for every patch, added to the vector of the image word.

    That vector is what all patches have in common: by it attention tells places before it reads contents.
    """

    def __init__(self, vocab: int, width: int, patch_width: int):
        super().__init__()
        self.words = nn.Embedding(vocab, width)
        self.patches = PatchEmbedding(patch_width, width, bias=False)

    def forward(self, x: Tensor, patches: Tensor | None, places: Tensor) -> Tensor:
        """Words x (b, s, c) with patches (b, n, p) or (n, p) added, in order, at places (b, s).

        Raises:
            ValueError: as many patches as places there must be.
        """
        given = 0 if patches is None else patches.flatten(0, -2).shape[0]
        if torch.compiler.is_compiling():  # a graph cannot ask while it is recorded
            torch._assert_async(places.sum() == given, "there are more or fewer patches than places")
        elif given != (wanted := int(places.sum())):
            raise ValueError(f"{given} patches came for {wanted} places; a segment y x x takes y * x patches")
        if patches is None or not given:
            return x
        # gathered, not put: a compiled graph knows how many places there are, but not which
        which = (places.flatten().cumsum(0) - 1).clamp(min=0)
        mine = self.patches(patches).flatten(0, -2).to(x.dtype)[which].view_as(x)
        return x + torch.where(places[..., None], mine, 0)  # words keep clear of a patch that is not finite
