import io

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from rope_mm.data import MapDocuments, load_documents, make_generator
from rope_mm.data.buckets import Buckets
from rope_mm.data.images import CaptionedImages
from rope_mm.data.pixels import keep_aspect_ratio

SIDES = st.integers(1, 5000)


@given(height=SIDES, width=SIDES, patches=st.integers(1, 12), patch_size=st.integers(1, 16))
def test_an_image_that_keeps_its_shape_has_at_most_the_patches_of_the_square(
    height, width, patches, patch_size
):
    y, x = keep_aspect_ratio(height, width, patches * patch_size, patch_size)
    assert y % patch_size == x % patch_size == 0 and min(y, x) >= patch_size
    rows, columns = y // patch_size, x // patch_size
    assert rows * columns <= patches**2
    assert keep_aspect_ratio(width, height, patches * patch_size, patch_size) == (
        (x, y) if height != width else (y, x)
    )
    long, short = max(rows, columns), min(rows, columns)
    ratio = min(height, width) / max(height, width)
    assert short == max(1, round(long * ratio))
    assert (long + 1) * max(1, round((long + 1) * ratio)) > patches**2


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), (16, 16)),
        ((3, 4), (12, 16)),
        ((2, 1), (20, 8)),
        ((1, 1000), (4, 64)),
        ((1000, 1001), (16, 16)),
    ],
)
def test_sixteen_patches_of_four_pixels_take_the_shape_of_the_image(shape, size):
    assert keep_aspect_ratio(*shape, 16, 4) == size


def test_a_square_that_patches_do_not_tile_is_refused():
    with pytest.raises(ValueError, match="size 10 is no multiple of patches of 4 pixels"):
        keep_aspect_ratio(1, 1, 10, 4)


def test_a_batch_has_one_size_and_every_row_comes_equally_often():
    sizes = [(4, 8)] * 6 + [(8, 4)] * 3 + [(4, 4)] * 3
    buckets = Buckets(sizes)
    assert buckets.sizes == [(4, 8), (4, 4), (8, 4)]
    seen = torch.zeros(12)
    for step in range(600):
        size, rows = buckets.batch(0, step, 3)
        assert [sizes[row] for row in rows.tolist()] == [size] * 3
        seen[rows] += 1
    assert seen.min() > 0.7 * seen.mean() and seen.max() < 1.3 * seen.mean()
    again = Buckets(sizes).batch(0, 17, 3)
    assert again[0] == buckets.batch(0, 17, 3)[0] and torch.equal(again[1], buckets.batch(0, 17, 3)[1])


def picture(width, height, **options):
    """A PNG or JPEG file whose left half is black and whose right half is white."""
    image, content = PILImage.new("L", (width, height)), io.BytesIO()
    image.paste(255, (width // 2, 0, width, height))
    image.save(content, "jpeg" if options else "png", **options)
    return {"bytes": content.getvalue(), "path": None}


@pytest.fixture(scope="module")
def rows():
    """A wide, a tall, a square and a wide image that lies on its side."""
    turned = PILImage.Exif()
    turned[0x0112] = 6
    images = [picture(40, 20), picture(20, 40), picture(30, 30), picture(20, 40, exif=turned)]
    features = Features(image=Image(decode=False), caption=Value("string"))
    rows = Dataset.from_dict({"image": images, "caption": list("abcd")}, features)
    return rows.cast_column("image", Image())


def test_images_keep_their_shape_and_stand_upright(rows):
    images = CaptionedImages(rows, 8, 1, keep_aspect=2)
    assert images.sizes == [(4, 10), (10, 4), (8, 8), (4, 10)]
    wide = images.images([0, 3])
    assert wide.shape == (2, 1, 4, 10)
    assert (wide[0, ..., :5] == -1).all() and (wide[0, ..., 5:] == 1).all()
    # orientation 6: what was at the left is at the top
    assert (wide[1, :, :2] < -0.9).all() and (wide[1, :, 2:] > 0.9).all()
    with pytest.raises(
        ValueError, match=r"images of one size are read together; these have \[\(4, 10\), \(8, 8\)\]"
    ):
        images.images([0, 2])


def test_images_of_several_sizes_are_not_cached(rows):
    with pytest.raises(ValueError, match="cache_in_memory needs images of one size"):
        CaptionedImages(rows, 8, 1, cache_in_memory=True, keep_aspect=2)
    assert CaptionedImages(rows, 8, 1, cache_in_memory=True).images().shape == (4, 1, 8, 8)


def test_documents_hold_images_in_their_own_shape(rows):
    documents = MapDocuments([rows], ["{caption}{image:generate}"], 8, 1, keep_aspect=2)
    shapes = [tuple(documents.document([row], make_generator(0))[1].pixels.shape) for row in range(4)]
    assert shapes == [(1, 4, 10), (1, 10, 4), (1, 8, 8), (1, 4, 10)]
    with pytest.raises(
        ValueError, match=r"size must be the side of a square where images keep their shape, not \(8, 4\)"
    ):
        MapDocuments([rows], ["{caption}{image:generate}"], (8, 4), 1, keep_aspect=2)


def test_a_flipped_document_mirrors_half_of_its_images_and_what_is_evaluated_stays(rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    options = {"templates": ["{caption}{image:generate}"], "size": 8, "channels": 1}
    train, held_out = load_documents([str(tmp_path / "rows.parquet")], flip=True, **options)
    left = [train.document([0], make_generator(i))[1].pixels[0, 0, 0].item() for i in range(60)]
    assert 15 < sum(value == left[0] for value in left) < 45
    assert (
        len({tuple(held_out.document([0], make_generator(i))[1].pixels[0, 0].tolist()) for i in range(9)})
        == 1
    )
