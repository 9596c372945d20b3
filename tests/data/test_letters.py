import builtins

import pytest
import torch

from rope_mm.data import CaptionedImages, captioned_letters, is_held_out_letter
from rope_mm.data.synthetic.letters import (
    CHARACTERS,
    FINE,
    SIZE,
    STYLES,
    caption_letter,
    draw_glyphs,
    move,
    move_at_random,
)

LABELS = torch.arange(len(CHARACTERS) * len(STYLES))


@pytest.fixture(scope="module")
def splits():
    return captioned_letters(train=1, held_out=2)


@pytest.fixture(scope="module")
def glyphs():
    return draw_glyphs()


def label_of(character, family, slant, weight):
    return CHARACTERS.index(character) * len(STYLES) + STYLES.index((family, slant, weight))


def test_letters_are_the_same_at_every_call_and_others_with_another_seed(splits):
    again, other = captioned_letters(1, 2), captioned_letters(1, 2, seed=1)
    for name in ("train", "test"):
        assert splits[name].data.table.equals(again[name].data.table)
        assert splits[name].data.table.slice(0, 9) != other[name].data.table.slice(0, 9)


def test_training_has_every_combination_but_those_held_out_and_test_has_both_in_equal_numbers(splits):
    train, test = (torch.tensor(list(splits[name]["label"])) for name in ("train", "test"))
    assert train.sort().values.tolist() == LABELS[~is_held_out_letter(LABELS)].tolist()
    apart = test[is_held_out_letter(test)]
    assert apart.sort().values.tolist() == LABELS[is_held_out_letter(LABELS)].repeat_interleave(2).tolist()
    assert len(test) == 2 * len(apart)


def test_each_character_has_one_style_held_out_and_each_style_five_or_six_characters():
    apart = LABELS[is_held_out_letter(LABELS)]
    assert (apart // len(STYLES)).tolist() == list(range(len(CHARACTERS)))
    assert set((apart % len(STYLES)).bincount(minlength=len(STYLES)).tolist()) == {5, 6}


def test_captions_name_character_and_style():
    assert caption_letter(label_of("g", "serif", "italic", "bold")) == "a bold italic serif letter g"
    assert caption_letter(label_of("G", "serif", "italic", "bold")) == "a bold italic serif capital g"
    assert caption_letter(label_of("7", "mono", "upright", "regular")) == "a regular upright mono digit 7"
    assert len({caption_letter(label) for label in LABELS.tolist()}) == len(LABELS)


def test_a_row_names_its_character_and_its_style_as_the_label_does(splits):
    rows = splits["test"].remove_columns("image").select(range(20))
    style = rows.features["style"]
    assert len(rows) == 20
    for row in rows:
        assert row["label"] == row["character"] * len(STYLES) + row["style"]
        assert row["caption"] == caption_letter(row["label"])
        assert style.int2str(row["style"]) in row["caption"]


def test_images_are_32_pixels_of_light_ink_on_black(splits):
    images = CaptionedImages(splits["train"], 32, 1).images()
    assert images.shape == (682, 1, SIZE, SIZE)
    assert (images.amax((1, 2, 3)) > 0.5).all()
    assert (images.mean((1, 2, 3)) < -0.4).all()


def test_all_744_glyphs_differ_and_lie_inside_the_canvas(glyphs):
    edge = torch.cat([glyphs[:, 0], glyphs[:, -1], glyphs[:, :, 0], glyphs[:, :, -1]], 1)
    assert edge.max() == 0
    assert len(glyphs.unique(dim=0)) == len(LABELS)


def test_bold_glyphs_have_more_ink_and_italic_glyphs_lean_to_the_right(glyphs):
    ink = dict(zip(STYLES, glyphs.view(len(CHARACTERS), len(STYLES), -1).sum(2).T, strict=True))
    for family in ("sans", "serif", "mono"):
        assert (ink[family, "upright", "bold"] > 1.2 * ink[family, "upright", "regular"]).all()
    bar = glyphs[[label_of("l", "sans", slant, "regular") for slant in ("upright", "italic")]]
    middle = (bar * torch.arange(SIZE * FINE)).sum(2) / bar.sum(2).clamp_min(1e-9)
    upright, italic = middle[:, 40] - middle[:, 80]
    assert upright == 0
    assert italic == pytest.approx(40 * 0.2, abs=1)  # DejaVu leans by 11 degrees


def test_small_and_capital_letters_of_one_shape_differ_in_size(glyphs):
    heights = [
        int(glyphs[label_of(character, "sans", "upright", "regular")].any(1).sum()) for character in "oOcCzZ"
    ]
    assert all(small < 0.85 * large for small, large in zip(heights[::2], heights[1::2], strict=True))


def test_a_glyph_that_is_not_moved_is_its_mean_over_each_pixel(glyphs):
    still = move(glyphs[:20], torch.zeros(20, 5))
    # two samples across a pixel lie between four drawn ones each, so both means are over the same sixteen
    torch.testing.assert_close(still, torch.nn.functional.avg_pool2d(glyphs[:20], FINE), atol=1e-5, rtol=0)


def test_two_thirds_of_the_largest_shift_is_one_pixel_right_or_down(glyphs):
    change = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 0, 2 / 3, 0], [0, 0, 0, 0, 2 / 3]])
    still, right, down = move(glyphs[:1].expand(3, -1, -1), change)
    torch.testing.assert_close(right, still.roll(1, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(down, still.roll(1, 0), atol=1e-4, rtol=0)


def test_moved_letters_stay_on_the_canvas(glyphs):
    labels = LABELS.repeat(4)
    images = move_at_random(glyphs, labels, torch.Generator().manual_seed(0))
    whole = torch.nn.functional.avg_pool2d(glyphs, FINE).sum((1, 2))[labels]
    # scale changes ink by at most 8 %; a letter that left the canvas would have less
    assert (images.sum((1, 2)) > 0.9 * whole).all()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name, name="matplotlib")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"matplotlib is not installed; run: pip install 'rope-mm\[plots\]'"):
        captioned_letters()


@pytest.mark.parametrize(("train", "held_out"), [(0, 1), (1, 0)])
def test_splits_without_rows_are_refused(train, held_out):
    with pytest.raises(ValueError, match=f"1 image or more of a combination, not {train} and {held_out}"):
        captioned_letters(train, held_out)
