"""The figures of the page of pitfalls show what the page says."""

import pytest
import torch

from gallery import pitfall_figures
from rope_mm.analysis.figures import new_figure


def drawn(name):
    draw, size = pitfall_figures.FIGURES[name]
    figure = new_figure(*size)
    draw(figure)
    return figure


def lines(figure):
    """The points (x, y) of each line by its label."""
    return {
        line.get_label(): [list(map(float, axis)) for axis in line.get_data()]
        for line in figure.axes[0].lines
    }


def test_two_images_without_text_between_are_one_run_of_token_types():
    labels = [text.get_text() for text in drawn("adjacent-images").axes[0].texts]
    assert labels == ["3", "6", "6", "3", "3", "12", "3"]


def test_a_mixture_of_pairings_changes_norms_and_a_rotation_does_not():
    found = lines(drawn("norms"))
    (_, wrong), (_, right) = found["mixed pairings"], found["rotation"]
    assert max(right) - min(right) < 1e-5
    assert max(wrong) - min(wrong) > 0.5
    assert wrong[0] == pytest.approx(right[0])


def test_a_document_sees_its_own_tokens_alone_where_documents_are_separate():
    leaking, separate = pitfall_figures.visibility((2, 1))
    assert leaking.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert separate.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_generated_tokens_go_on_from_the_prompt_unless_the_offset_is_that_of_another_conversation():
    found = lines(drawn("stale-offset"))
    wrong = found["generated, with the offset of the conversation before"][1]
    assert found["generated"][1][0] == found["prompt"][1][-1] + 1
    assert wrong[0] < found["prompt"][1][0]


def test_an_image_with_the_positions_of_another_size_has_other_positions():
    found = lines(drawn("first-image"))
    own, given = (set(zip(*points, strict=True)) for points in found.values())
    assert len(own) == len(given) == 32 and len(own & given) == 16


def test_half_a_row_is_lost_where_positions_are_cut_to_whole_numbers():
    from rope_mm import place

    whole, cut = (place(pitfall_figures.HALVES, scheme)[0] for scheme in pitfall_figures.SCHEMES)
    assert (whole[1, 0], cut[1, 0]) == (5.5, 5.0)
    assert torch.equal(whole[:, 1], cut[:, 1])


def test_every_figure_of_the_generator_is_on_the_page(tmp_path):
    from pathlib import Path

    pitfall_figures.main(tmp_path)
    page = (Path(pitfall_figures.__file__).parents[1] / "docs" / "pitfalls.md").read_text()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 6
    assert all(f"images/{name}" in page for name in made)
    assert page.count("![") == 10
