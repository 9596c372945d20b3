import pytest

from rope_mm import SCHEMES, cli
from rope_mm.analysis.figures import save_figure
from rope_mm.analysis.pictures import PICTURES, NotShown, angle_errors, picture, read_subject, text_picture

SEGMENTS = "text:3 image:2x3 text:2 video:2x2x2 text:2"


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("scheme", ["flat", "mixed", "vrope", "dual"])
def test_every_picture_can_be_made_of_schemes_with_one_three_four_and_five_axes(name, scheme, tmp_path):
    save_figure(tmp_path / "picture.png", picture(name, scheme, SEGMENTS))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_decay_of_every_axis_is_shown():
    (panel,) = picture("decay", "dual", SEGMENTS).axes
    shown = [text.get_text() for text in panel.get_legend().get_texts()]
    assert shown == ["on t", "on y", "on x", "on i", "on j", "on all axes at once"]


def test_two_schemes_stand_side_by_side():
    figure = picture("positions", "m-rope", SEGMENTS, compare="m-rope-hf")
    assert [half.get_suptitle().split(":")[0] for half in figure.subfigs] == ["m-rope", "m-rope-hf"]


def plane(scheme, segments):
    *_, panel = picture("positions", scheme, segments).axes
    return panel


def test_the_plane_shows_each_token_at_its_column_and_row():
    *lines, _ = plane("rope-tv", "text:2 image:2x3").lines  # the last one is the gap between the two
    points = [point for line in lines for point in zip(*line.get_data(), strict=True)]
    positions = read_subject("rope-tv", "text:2 image:2x3").positions
    assert points == [(x, y) for _, y, x in positions.tolist()]


def test_collisions_get_rings_and_a_sequence_without_any_gets_none():
    labels = lambda panel: [text.get_text() for text in panel.get_legend().get_texts()]  # noqa: E731
    assert "collision" in labels(plane("grid", "text:3 image:3x3"))
    assert "collision" not in labels(plane("rope-tv", "text:3 image:3x3"))


def test_pairs_that_hardly_rotate_are_hollow():
    panel = picture("wavelengths", "flat", "text:16", head_dim=8).axes[0]
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "none" for dot in dots] == [False, False, False, True]


def test_angles_made_exactly_stay_exact_where_float32_products_do_not():
    import torch

    omega, positions = torch.tensor([1.0, 0.01]).double(), torch.tensor([8e6]).double() + 0.25
    assert angle_errors(omega, positions, torch.float64)[0] < 1e-7
    assert angle_errors(omega, positions, torch.float32)[0] > 1e-2


def test_a_picture_that_the_sequence_cannot_have_is_refused():
    with pytest.raises(NotShown, match="the sequence has text alone"):
        picture("scores", "flat", "text:5")
    with pytest.raises(ValueError, match="a picture shows 1 to 2048"):
        picture("positions", "flat", "text:1000000000")
    with pytest.raises(ValueError, match="did you mean 'decay'"):
        picture("decai", "flat")


def test_a_picture_in_characters_has_text_image_and_video():
    lines = text_picture("m-rope", "text:2 image:2x2 text:2 video:1x2x2", width=8, height=8).splitlines()
    assert lines == ["t", " t", "  ii", "  ii", "    t", "     t", "      vv", "      vv", "y down, x across"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_picture_in_characters(scheme):
    assert set("tiv*") & set(text_picture(scheme, "text:3 image:2x4 text:2 video:2x2x2 text:2"))


def test_lens_prints_characters_and_writes_all_pictures(tmp_path, capsys):
    assert cli.main(["lens", "rope-tv", "text:3 image:2x3", "--compare", "grid", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(PICTURES)
    printed = capsys.readouterr().out
    assert "y down, x across" in printed
    assert "\ngrid\n" in printed


def test_lens_says_which_picture_a_text_cannot_have(tmp_path, capsys):
    assert cli.main(["lens", "flat", "text:8", "--out", str(tmp_path)]) == 0
    assert "no picture of scores: " in capsys.readouterr().out
    assert not (tmp_path / "scores.png").exists()
