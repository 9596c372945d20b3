"""How far the first patch of an image stands from the text around it, and how that grows with the image."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from rope_mm.analysis import markdown
from rope_mm.analysis.properties import image_in_text
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Segment

TEXT = 4  # tokens before the image


class Offsets(NamedTuple):
    """Differences of positions (a,), on every axis that rotates.

    Attributes:
        before: from the text token before an image to its first patch.
        after: from its first patch to the text token after it.
    """

    before: Tensor
    after: Tensor


def measure_offsets(scheme: Scheme, image: Segment, before: int = TEXT) -> Offsets:
    """How far an image's first patch stands from the text before and after it.

    Args:
        scheme: places the tokens.
        image: an image or a video.
        before: text tokens before it.
    """
    place = image_in_text(scheme, image, before)
    return Offsets(place.patches[0] - place.before, place.after - place.patches[0])


def offsets_table(schemes: dict[str, Scheme], images: Sequence[Segment]) -> str:
    """The offsets as a table in Markdown, t, y, x in a cell; two columns for each image.

    Args:
        schemes: name -> Scheme, a row each.
        images: of growing sizes.
    """
    titles = [f"{way} {image.grid[-2]} x {image.grid[-1]}" for way in ("to", "from") for image in images]
    rows = []
    for name, scheme in schemes.items():
        found = [measure_offsets(scheme, image) for image in images]
        rows.append([f"`{name}`", *(write(x.before) for x in found), *(write(x.after) for x in found)])
    return markdown.table(["layout", *titles], rows)


def write(offset: Iterable[Tensor]) -> str:
    """Numbers with a comma between them."""
    return ", ".join(f"{number:g}" for number in map(float, offset))
