import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.data import FACTORS, QASample, make_cell, make_frame, make_generator, make_neighbour
from rope_mm.data.synthetic.sprites import COLOURS
from rope_mm.evaluation.sprites import classify_sprites

SEEDS = st.integers(0, 1000)


def named(verdict, index=0):
    return " ".join(FACTORS[name][int(verdict[name][index])] for name in ("colour", "shape"))


@given(seed=SEEDS, rows=st.integers(1, 9), columns=st.integers(1, 9), cell=st.integers(1, 5))
def test_the_answer_is_the_cell_of_the_colour_asked_for(seed, rows, columns, cell):
    (image,), question, answer = make_cell(make_generator(seed), rows, columns, cell)
    assert image.shape == (3, rows * cell, columns * cell)
    assert image.dtype == torch.uint8
    colour = COLOURS[re.fullmatch(r"which cell is (\w+)\?", question)[1]]
    hit = (image.permute(1, 2, 0) == torch.tensor(colour)).all(2)
    assert hit.sum() == cell**2
    y, x = (int(part) for part in hit.nonzero()[0] // cell)
    assert answer == f"row {y + 1} column {x + 1}"


@given(seed=SEEDS, images=st.integers(1, 5), words=st.integers(1, 4))
def test_the_answer_is_the_word_beside_the_image_asked_for(seed, images, words):
    document, question, answer = make_neighbour(make_generator(seed), images, words, (16, 24))
    gaps, shown = document[::2], document[1::2]
    assert [len(gap.split()) for gap in gaps] == [words] * (images + 1)
    names = [named(classify_sprites(image[None])) for image in shown]
    assert len(set(names)) == images
    side, sought = re.fullmatch(r"which word stands right (\w+) the (.+)\?", question).groups()
    at = names.index(sought)
    assert answer == (gaps[at].split()[-1] if side == "before" else gaps[at + 1].split()[0])


@given(seed=SEEDS, frames=st.integers(2, 40), period=st.integers(1, 9))
def test_one_frame_has_the_sprite_asked_for_and_periodic_ones_a_look_alike(seed, frames, period):
    (video,), question, answer = make_frame(make_generator(seed), frames, period, (12, 20))
    assert video.shape == (frames, 3, 12, 20)
    verdict = classify_sprites(video)
    needle = int(answer.removeprefix("frame ")) - 1
    assert question == f"which frame shows the {named(verdict, needle)}?"
    like = (torch.arange(frames) - needle) % period == 0
    assert torch.equal(verdict["shape"] >= 0, like)
    for name in ("shape", "row", "column"):
        assert (verdict[name][like] == verdict[name][needle]).all()
    assert (verdict["colour"][like] == verdict["colour"][needle]).sum() == 1


@pytest.mark.parametrize("ask", [make_cell, make_neighbour, make_frame])
def test_a_question_depends_on_the_generator_alone(ask):
    def flat(sample: QASample):
        return [part if isinstance(part, str) else part.tolist() for part in sample.document], *sample[1:]

    assert flat(ask(make_generator(1))) == flat(ask(make_generator(1)))
    generator = make_generator(2)
    assert len({ask(generator).answer for _ in range(40)}) >= 7


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: make_cell(g, rows=0), "rows must be 1 or more, not 0"),
        (lambda g: make_neighbour(g, words=0), "words must be 1 or more, not 0"),
        (lambda g: make_neighbour(g, images=65), "64 different sprites, not 65"),
        (lambda g: make_frame(g, frames=1), "2 or more"),
        (lambda g: make_frame(g, period=0), "period must be 1 or more, not 0"),
    ],
)
def test_questions_of_impossible_sizes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(make_generator(0))
