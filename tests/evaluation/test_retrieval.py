"""Caption retrieval and copies, against distances written out image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.evaluation.retrieval import caption_retrieval, copied_share


def images(count, features, seed):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double()


def test_every_copy_of_a_caption_s_image_is_found_and_every_image_of_another_caption_is_not():
    real = images(120, 6, 0)
    assert caption_retrieval(real, real) == 1
    assert caption_retrieval(real, real.roll(1, 0), candidates=120) == 0


def test_images_that_say_nothing_of_their_captions_are_found_as_often_as_chance_finds_them():
    real, fake = images(4000, 3, 0), images(4000, 3, 1)
    assert caption_retrieval(real, fake) == pytest.approx(1 / 50, abs=0.008)
    assert caption_retrieval(real, fake, candidates=2) == pytest.approx(1 / 2, abs=0.03)


def test_an_image_as_near_to_another_caption_s_image_counts_as_wrong():
    assert caption_retrieval(torch.zeros(5, 2), torch.ones(5, 2)) == 0


@given(st.integers(2, 12), st.integers(0, 5))
def test_with_all_images_as_candidates_it_is_the_share_of_right_nearest_neighbours(count, seed):
    real, fake = images(count, 2, seed), images(count, 2, seed + 100)
    nearest = torch.cdist(fake, real).argmin(1)
    share = float((nearest == torch.arange(count)).double().mean())
    assert caption_retrieval(real, fake, candidates=50) == pytest.approx(share)


@pytest.mark.parametrize(
    ("real", "fake", "candidates", "message"),
    [
        (images(4, 2, 0), images(3, 2, 0), 50, "needs the one generated for its caption, not 4 and 3"),
        (images(4, 2, 0), images(4, 2, 0), 1, "candidates must be 2 or more, not 1"),
        (images(4, 2, 0), images(4, 3, 0), 50, "features must be equally wide"),
        (images(1, 2, 0), images(1, 2, 0), 50, "at least 2 samples"),
    ],
)
def test_what_cannot_be_retrieved_is_refused(real, fake, candidates, message):
    with pytest.raises(ValueError, match=message):
        caption_retrieval(real, fake, candidates)


@given(st.integers(3, 40), st.integers(2, 40), st.integers(0, 5))
def test_copies_are_images_nearer_to_a_known_one_than_its_own_neighbour(known, generated, seed):
    train, fake = images(known, 2, seed), images(generated, 2, seed + 100)
    between, within = torch.cdist(fake, train), torch.cdist(train, train)
    within.fill_diagonal_(torch.inf)
    copied = [row.min() < within[row.argmin()].min() for row in between]
    assert copied_share(train, fake) == pytest.approx(sum(map(float, copied)) / generated)


@pytest.mark.parametrize(("features", "share"), [(1, 2 / 3), (300, 1 / 2)])
def test_new_images_of_the_same_law_count_as_copies_as_often_as_neighbours_are_mutual(features, share):
    train, new = images(1500, features, 0), images(1500, features, 1)
    if features > 1:  # on a sphere no image is everybody's neighbour
        train, new = (part / part.norm(dim=1, keepdim=True) for part in (train, new))
    assert copied_share(train, new) == pytest.approx(share, abs=0.05)
    assert copied_share(train, train + 1e-9) == 1
