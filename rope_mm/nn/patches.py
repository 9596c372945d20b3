"""Images and videos <-> patches, and the embedding of tokens and patches into the stream (b, s, c)."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def to_patches(images: Tensor, size: int) -> Tensor:
    """Images (b, ch, size*y, size*x) -> patches (b, y*x, ch*size*size), in raster order.

    Raises:
        ValueError: images that whole patches do not tile.
    """
    *_, rows, columns = images.shape
    if rows % size or columns % size:
        raise ValueError(f"images of {rows} x {columns} pixels do not divide into patches of {size} x {size}")
    b, ch = images.shape[:2]
    tiled = images.reshape(b, ch, rows // size, size, columns // size, size)
    return tiled.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, ch * size * size)


def to_images(patches: Tensor, y: int, x: int, size: int) -> Tensor:
    """Patches (b, y*x, ch*size*size) -> images (b, ch, size*y, size*x): the inverse of `to_patches`.

    Args:
        patches: (b, y * x, ch * size * size).
        y: rows of patches.
        x: columns of patches.
        size: pixels of a patch's side.
    """
    tiled = patches.reshape(len(patches), y, x, -1, size, size)
    return tiled.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, y * size, x * size)


def to_tubelets(frames: Tensor, depth: int) -> Tensor:
    """Frames (t, ch, y, x) -> `depth` of them as channels of one, (t/depth, depth*ch, y, x).

    The last frame is repeated where they do not divide; so an image is repeated `depth` times.
    """
    last = frames[-1:].expand(-len(frames) % depth, -1, -1, -1)
    return torch.cat([frames, last]).unflatten(0, (-1, depth)).flatten(1, 2)


def from_tubelets(tubelets: Tensor, depth: int) -> Tensor:
    """Tubelets (b, t, depth*ch, y, x) -> frames (b, t*depth, ch, y, x): the inverse of `to_tubelets`."""
    return tubelets.unflatten(2, (depth, -1)).flatten(1, 2)


def has_values(x: Tensor) -> bool:
    """Whether a tensor's numbers can be read: not while a graph is recorded, nor of a meta or fake tensor."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def image_index(image_mask: Tensor, count: int) -> Tensor:
    """The places (n,), among all b * s, of the `count` image tokens of a mask (b, s)."""
    ordinals = image_mask.flatten().cumsum(0)
    wanted = torch.arange(1, count + 1, device=ordinals.device)
    return torch.searchsorted(ordinals, wanted).clamp(max=ordinals.numel() - 1)


class PatchEmbedding(nn.Linear):
    """Patches (n, p) -> (n, c); a class of its own, as its weights may have their own initial scale.

    At the scale of the other weights, a patch of many numbers would drown the vector of the image token, by
    which attention finds patches.
    """


class TokenEmbedding(nn.Module):
    """A vector for every token, and a linear map for every patch, added to the vector of the image token.

    All patches share that vector: attention finds them by it before it reads what they show.

    Args:
        vocab: number of tokens.
        width: c, channels of the stream.
        patch_width: p, numbers of a patch.
    """

    def __init__(self, vocab: int, width: int, patch_width: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.patches = PatchEmbedding(patch_width, width, bias=False)

    def forward(self, x: Tensor, patches: Tensor | None, image_mask: Tensor) -> Tensor:
        """Add patches to the vectors of the image tokens.

        Args:
            x: vectors of tokens (b, s, c).
            patches: (b, n, p) or (n, p), one for every image token, in order.
            image_mask: (b, s), where image tokens are.

        Raises:
            ValueError: another number of patches than of image tokens.
        """
        count = 0 if patches is None else patches.flatten(0, -2).shape[0]
        if torch.compiler.is_compiling():
            error = "there are more or fewer patches than image tokens"
            torch._assert_async(image_mask.sum() == count, error)
        elif has_values(image_mask) and count != (wanted := int(image_mask.sum())):
            raise ValueError(
                f"{count} patches came for {wanted} image tokens; an image of y x x patches takes y * x"
            )
        if patches is None or not count:
            return x
        # gathered, not put: a compiled graph knows how many image tokens there are, but not which
        index = (image_mask.flatten().cumsum(0) - 1).clamp(min=0)
        added = self.patches(patches).flatten(0, -2).to(x.dtype)[index].view_as(x)
        return x + torch.where(
            image_mask[..., None], added, 0
        )  # a patch that is not finite stays in its place
