"""Layouts of images by themselves that read more than the grid of an image."""

import pytest
import torch

from rope_mm import SCHEMES, Image, Rotary, Text, Video, place
from rope_mm.positions.grids import Raster, causal_latents, fill


def test_frames_stand_at_the_numbers_that_are_given():
    positions, _ = place([Text(1), Video(3, 1, 2)], "frames", numbers=[0, 19, 20.5])
    assert positions.tolist() == [
        [0, 0, 0], [0, 0, 0], [0, 0, 1], [19, 0, 0], [19, 0, 1], [20.5, 0, 0], [20.5, 0, 1],
    ]  # fmt: skip


def test_numbers_that_are_not_one_for_each_frame_are_refused():
    with pytest.raises(ValueError, match="has 3 frames, but `numbers` has 2; give one for each"):
        place([Video(3, 1, 1)], "frames", numbers=(0, 1))


def test_given_numbers_survive_json_as_a_part_of_the_scheme():
    scheme = SCHEMES["helios"].replace(options={"numbers": [0, 5, 6]})
    again = type(scheme).from_dict(scheme.to_dict())
    assert again == scheme
    assert hash(again) == hash(scheme)
    assert Rotary(32, again).place([Video(3, 1, 1)])[0][:, 0].tolist() == [0, 5, 6]


def test_more_images_than_layers_and_their_source_are_refused():
    images = [Image(1, 1)] * 6
    assert place(images, "msrope-layers")[0][:, 0].tolist() == [0, 1, 2, 3, 4, -1]
    assert place(images, "msrope-layers", layers=5)[0][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="are 6 images, but this is number 7; give the number of layers"):
        place([*images, Image(1, 1)], "msrope-layers")


def test_the_first_latent_of_a_causal_autoencoder_has_one_frame_and_the_others_eight():
    """Frames 0, 1 to 8, 9 to 16: their middles."""
    start, lead = causal_latents(8)
    small = Raster((3, 1, 1), (8 * start,), ((8,), (0,), (0,)), lead=lead)
    large = small._replace(grid=(3, 100, 100))
    assert fill([small]).flatten().tolist() == [0.5, 5.0, 13.0]
    assert torch.equal(fill([large])[::10_000], fill([small]))


def test_spiral_directions_on_three_axes_are_refused():
    with pytest.raises(ValueError, match="lie in a plane of two axes, not 3; take 'golden'"):
        Rotary(32, "spiral-rope", axis_order=("t", "y", "x"))
