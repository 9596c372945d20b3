import pytest
import torch

from rope_mm.data import load_images
from rope_mm.exam import prepare_exam, train_judge


def test_an_exam_tells_good_pictures_from_mixed_up_and_from_collapsed_ones():
    train, test = load_images("digits", label="label")
    exam = prepare_exam((train.images(), train.labels), (test.images(), test.labels), 360, seed=0)
    assert exam.floor["recognised"] > 0.95
    good, shifted = exam.mark(test.images()), exam.mark(test.images().roll(1, 0))
    assert good["recognised"] == exam.floor["recognised"]
    assert good["frechet"] == pytest.approx(0, abs=1e-6)
    assert shifted["recognised"] < 0.2
    assert shifted["frechet"] == pytest.approx(0, abs=1e-6)
    collapsed = exam.mark(test.images()[:1].expand(360, -1, -1, -1))
    assert collapsed["worst"] == 0
    assert collapsed["coverage"] < 0.2
    assert collapsed["frechet"] > 20 * exam.floor["frechet"]


def test_training_a_judge_leaves_the_global_random_state_alone():
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    before = torch.get_rng_state()
    one, two = (train_judge(images, labels, seed=1, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("pictures", "held_out"), [(5, 40), (40, 5)])
def test_an_exam_wants_pictures_that_have_neighbours(pictures, held_out):
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    test = images[:held_out], labels[:held_out]
    with pytest.raises(ValueError, match=f"more than 5 .*, not {pictures} and {held_out}"):
        prepare_exam((images, labels), test, pictures, seed=0)
