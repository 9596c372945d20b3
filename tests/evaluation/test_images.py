import math

import pytest
import torch

from rope_mm.data import load_images
from rope_mm.evaluation.images import (
    IMAGE_EVALUATORS,
    digits_of,
    mode_probs,
    prepare_captions,
    prepare_modes,
    train_classifier,
)


def test_an_exam_tells_good_pictures_from_mixed_up_and_from_collapsed_ones():
    train, test = load_images("digits", label="label")
    exam = prepare_captions((train.images(), train.labels), (test.images(), test.labels), 360, seed=0)
    assert exam.real_reference["recognised"] > 0.95
    good, shifted = exam.evaluate(test.images()), exam.evaluate(test.images().roll(1, 0))
    assert good["recognised"] == exam.real_reference["recognised"]
    assert good["frechet"] == pytest.approx(0, abs=1e-6)
    assert shifted["recognised"] < 0.2
    assert shifted["frechet"] == pytest.approx(0, abs=1e-6)
    collapsed = exam.evaluate(test.images()[:1].expand(360, -1, -1, -1))
    assert collapsed["worst"] == 0
    assert collapsed["coverage"] < 0.2
    assert collapsed["frechet"] > 20 * exam.real_reference["frechet"]


def test_training_a_judge_leaves_the_global_random_state_alone():
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    before = torch.get_rng_state()
    one, two = (train_classifier(images, labels, seed=1, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("pictures", "held_out"), [(5, 40), (40, 5)])
def test_an_exam_wants_pictures_that_have_neighbours(pictures, held_out):
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    test = images[:held_out], labels[:held_out]
    with pytest.raises(ValueError, match=f"more than 5 .*, not {pictures} and {held_out}"):
        prepare_captions((images, labels), test, pictures, seed=0)


@pytest.fixture(scope="module")
def stacks():
    return load_images("stacked-digits", 8, 3, label="label", keep=True)


@pytest.fixture(scope="module")
def exam(stacks):
    train, test = stacks
    return prepare_modes(
        (train.images(), train.labels), (test.images(), test.labels), 26_000, seed=0, captioned=True
    )


def test_digits_come_hundreds_first():
    assert digits_of(torch.tensor([703, 42, 0])).tolist() == [[7, 0, 3], [0, 4, 2], [0, 0, 0]]


def test_the_law_of_numbers_is_the_product_of_their_digits_shares():
    numbers = torch.tensor([0, 100, 210, 222])  # hundreds 0 1 2 2, tens 0 0 1 2, ones 0 0 0 2
    law = mode_probs(numbers)
    assert law[0] == pytest.approx(1 / 4 * 2 / 4 * 3 / 4)
    assert law[222] == pytest.approx(2 / 4 * 1 / 4 * 1 / 4)
    assert law[333] == 0
    assert law.sum() == pytest.approx(1)


def test_real_stacks_reach_every_mode_at_the_floor(exam, stacks):
    assert exam.real_reference["modes"] == 1000
    assert exam.real_reference["kl"] == pytest.approx(999 / 52_000, abs=0.003)
    assert exam.real_reference["recognised"] > 0.85
    marks = exam.evaluate(stacks[0].images(range(26_000)))
    assert marks["kl"] == exam.real_reference["kl"]
    assert marks["kl_excess"] == 0


def test_modes_that_are_missing_are_found_missing(exam, stacks):
    images, labels = stacks[0].images(), stacks[0].labels
    lower = images[labels < 500][torch.arange(26_000) % int((labels < 500).sum())]
    lacking = exam.evaluate(lower)
    assert lacking["modes"] < 600  # the judge errs, and so finds some that are not there
    assert lacking["kl"] == pytest.approx(math.log(2), abs=0.1)
    assert exam.evaluate(images[:1].expand(26_000, -1, -1, -1))["modes"] == 1


def test_pictures_are_compared_with_the_numbers_that_were_asked(exam, stacks):
    held_out = stacks[1]
    asked = held_out.labels[exam.rows]
    assert set(asked.bincount().tolist()) == {26}
    right = exam.evaluate(held_out.images(exam.rows))["recognised"]
    assert right > 0.85
    assert exam.evaluate(held_out.images(exam.rows).roll(1, 0))["recognised"] < 0.01
    swapped = held_out.images(exam.rows).flip(1)  # ones for hundreds: right only where they are the same
    assert exam.evaluate(swapped)["recognised"] == pytest.approx(right / 10, abs=0.02)


def test_without_captions_nothing_is_compared(stacks):
    train, test = ((part.images(range(300)), part.labels[:300]) for part in stacks)
    marks = IMAGE_EVALUATORS["modes"](train, test, 300, 0).evaluate(test[0])
    assert set(marks) == {"modes", "held", "kl", "kl_excess"}


def test_what_is_no_stack_of_digits_is_refused(stacks):
    images, labels = stacks[1].images(range(20)), stacks[1].labels[:20]
    with pytest.raises(ValueError, match="not 1 with labels"):
        prepare_modes((images[:, :1], labels), (images, labels), 10, 0)
    with pytest.raises(ValueError, match="not 3 with labels to 1999"):
        prepare_modes((images, labels), (images, labels * 0 + 1999), 10, 0)
