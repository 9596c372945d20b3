import pytest
import torch
from torch.autograd import gradcheck

from rope_mm.data import AUGMENTATIONS, draw_augmentation

STRONG = {"brightness": 0.5, "contrast": 0.5, "saturation": 1.0, "translation": 0.25, "cutout": 0.5}


def images(count=4, channels=3):
    return torch.randn(count, channels, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def change(strengths, count=4, seed=1):
    return draw_augmentation(strengths, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_real_and_generated_images_change_in_the_same_way_and_each_pair_in_its_own(name):
    changed = change({name: STRONG[name]}, 2)(images(1).repeat(4, 1, 1, 1))  # two pairs, real above generated
    assert torch.equal(changed[:2], changed[2:])
    assert not torch.equal(changed[0], changed[1])
    assert changed.shape == (4, 3, 8, 6)
    part = change({name: STRONG[name]}, 4)
    assert torch.equal(part(images())[:3], part(images()[:3]))


def test_strength_zero_and_no_augmentation_change_nothing():
    assert torch.equal(change(dict.fromkeys(AUGMENTATIONS, 0.0))(images()), images())
    assert torch.equal(change({})(images()), images())


def test_gradients_flow_through_all_of_them_twice():
    small = images(2, 2)[:, :, :4, :4].requires_grad_()
    assert gradcheck(change(STRONG, 2), small)
    assert torch.autograd.gradgradcheck(lambda x: change(STRONG, 2)(x).square(), small)


def test_a_translation_moves_whole_pixels_and_lets_zeros_in():
    numbers = torch.arange(1.0, 49.0).view(1, 1, 8, 6)
    moves = set()
    for seed in range(60):
        moved = change({"translation": 0.25}, 1, seed)(numbers)
        kept = moved[moved > 0]
        y, x = (moved[0, 0] > 0).nonzero()[0].tolist()
        at = (kept[0].item() - 1) // 6, (kept[0].item() - 1) % 6
        move = y - at[0], x - at[1]
        assert len(kept) == (8 - abs(move[0])) * (6 - abs(move[1]))
        moves.add(move)
    assert {abs(y) for y, _ in moves} == {0, 1, 2} and {x for _, x in moves} <= {-2, -1, 0, 1, 2}


def test_a_cutout_is_at_most_its_fraction_of_the_sides_and_often_all_of_it():
    holes = [
        (change({"cutout": 0.5}, 1, seed)(torch.ones(1, 1, 8, 6)) == 0).sum().item() for seed in range(60)
    ]
    assert max(holes) == 4 * 3
    assert min(holes) >= 2 * 1  # at a corner a quarter of it lies inside


def test_contrast_and_saturation_keep_their_means():
    batch = images()
    torch.testing.assert_close(change({"contrast": 0.9})(batch).mean((1, 2, 3)), batch.mean((1, 2, 3)))
    torch.testing.assert_close(change({"saturation": 0.9})(batch).mean(1), batch.mean(1))
    moved = change({"brightness": 0.5})(batch) - batch
    torch.testing.assert_close(moved, moved[:, :1, :1, :1].expand_as(moved))
    assert moved.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cutuot": 0.5}, "augmentation 'cutuot' is unknown; did you mean 'cutout'"),
        ({"cutout": 1.5}, "not 1.5"),
    ],
)
def test_a_wrong_augmentation_is_refused_in_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        change(wrong)
