import pytest
import torch

from rope_mm.data import CaptionedImages, captioned_letters
from rope_mm.evaluation.image_evaluators import IMAGE_EVALUATORS
from rope_mm.evaluation.letters import letter_accuracy, prepare_letters, train_letter_classifier

SHARES = ("character", "style", "character_held_out", "style_held_out")


@pytest.fixture(scope="module")
def splits():
    parts = captioned_letters(train=1, held_out=2)
    return [CaptionedImages(parts[name], 32, 1, label="label") for name in ("train", "test")]


@pytest.fixture(scope="module")
def evaluator(splits):
    """An evaluator whose classifier sees few images of each combination."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_letter_classifier, "__defaults__", (16,))
        train, test = ((part.images(), part.labels) for part in splits)
        return IMAGE_EVALUATORS["letters"].make(train, test, 248, 0)


def test_shares_are_counted_apart_for_combinations_that_are_held_out():
    labels = torch.tensor([0, 13, 26, 39])  # (character, style): (0, 0), (1, 1), (2, 2), (3, 3)
    character, style = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 2, 0])
    held_out = torch.tensor([False, False, True, True])
    found = letter_accuracy(character, style, labels, held_out)
    assert found == {
        "accuracy": 0.5, "character": 1.0, "style": 0.5, "character_held_out": 0.5, "style_held_out": 0.5
    }  # fmt: skip
    assert set(letter_accuracy(character, style, labels, held_out | True)) == {
        "accuracy", "character_held_out", "style_held_out"
    }  # fmt: skip


@pytest.mark.slow
def test_real_letters_are_read_right_and_permuted_ones_wrong(evaluator, splits):
    images = splits[1].images()[evaluator.rows]
    right, wrong = evaluator.evaluate(images), evaluator.evaluate(images.roll(1, 0))
    assert all(right[name] > 0.85 for name in SHARES)
    assert all(wrong[name] < 0.2 for name in SHARES)
    assert right["frechet"] == pytest.approx(0, abs=1e-3)  # both are the real ones
    assert wrong["frechet"] == pytest.approx(0, abs=1e-3)
    assert all(evaluator.real_reference[name] > 0.85 for name in SHARES)


@pytest.mark.slow
def test_a_letter_in_the_wrong_style_has_the_right_character(evaluator, splits):
    test = splits[1]
    images, labels = test.images(), test.labels
    bold = {int(label): row for row, label in enumerate(labels.tolist())}
    pairs = [(row, bold[label + 1]) for label, row in bold.items() if label % 2 == 0 and label + 1 in bold]
    assert len(pairs) > 20
    asked, shown = (torch.tensor(part) for part in zip(*pairs, strict=True))
    character, style, _ = evaluator.classifier.classify(images[shown])
    found = letter_accuracy(character, style, labels[asked], torch.zeros(len(asked), dtype=torch.bool))
    assert found["character"] > 0.85
    assert found["style"] < 0.15


def test_training_the_classifier_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    train_letter_classifier(0, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images.expand(-1, 3, -1, -1), labels), r"not \(3, 32, 32\) with labels"),
        (lambda images, labels: (images[..., :28, :28], labels), r"not \(1, 28, 28\) with labels"),
        (lambda images, labels: (images, labels + 744), "labels below 744, not .* with labels to 1487"),
    ],
)
def test_other_data_than_letters_is_refused(change, message, splits):
    part = change(splits[1].images(), splits[1].labels * 0 + 743)
    with pytest.raises(ValueError, match=message):
        prepare_letters(part, part, 10, 0)
