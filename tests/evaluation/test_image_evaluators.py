import math
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from rope_mm.data import load_images
from rope_mm.data.columns import choose_rows
from rope_mm.evaluation import image_evaluators
from rope_mm.evaluation.image_evaluators import (
    IMAGE_EVALUATORS,
    digits_of,
    mode_probs,
    prepare_captions,
    prepare_modes,
    train_classifier,
)


def test_an_evaluator_distinguishes_good_permuted_and_collapsed_images():
    train, test = load_images("digits", label="label")
    evaluator = prepare_captions((train.images(), train.labels), (test.images(), test.labels), 360, seed=0)
    assert evaluator.real_reference["accuracy"] > 0.95
    good, shifted = evaluator.evaluate(test.images()), evaluator.evaluate(test.images().roll(1, 0))
    assert good["accuracy"] == evaluator.real_reference["accuracy"]
    assert good["frechet"] == pytest.approx(0, abs=1e-6)
    assert shifted["accuracy"] < 0.2
    assert shifted["frechet"] == pytest.approx(0, abs=1e-6)
    collapsed = evaluator.evaluate(test.images()[:1].expand(360, -1, -1, -1))
    assert collapsed["worst_class_accuracy"] == 0
    assert collapsed["coverage"] < 0.2
    assert collapsed["frechet"] > 20 * evaluator.real_reference["frechet"]


def test_training_a_classifier_leaves_the_global_random_state_alone():
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    before = torch.get_rng_state()
    one, two = (train_classifier(images, labels, seed=1, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("samples", "held_out", "found", "skipped"),
    [
        (6, 90, set(), "accuracy (20), prdc (50), frechet (65)"),
        (60, 6, {"accuracy"}, "prdc (50), frechet (65)"),
        (60, 90, {"accuracy", "precision"}, "frechet (65)"),
        (80, 90, {"accuracy", "precision", "frechet"}, None),
    ],
)
def test_metrics_report_their_number_of_samples_and_are_skipped_below_a_minimum(
    samples, held_out, found, skipped, caplog
):
    images, labels = torch.randn(90, 1, 4, 4), torch.arange(90) % 4
    evaluator = prepare_captions((images, labels), (images[:held_out], labels[:held_out]), samples, seed=0)
    metrics = evaluator.evaluate(images[:samples])
    assert metrics["samples"] == samples
    assert set(metrics) & {"accuracy", "precision", "frechet"} == found
    said = [record.getMessage() for record in caplog.records]
    if skipped is None:
        assert not said
    else:
        (message,) = said
        assert f"{samples} generated and {held_out} held-out images: too few for {skipped}" in message


def test_images_of_sorted_classes_are_all_asked_for_and_learned(monkeypatch):
    """As in folders of classes: the first rows are of one class."""
    monkeypatch.setattr(image_evaluators, "CLASSIFIER_SAMPLES", 200)
    labels = torch.arange(1_000) // 250
    pixels = labels.float()[:, None, None, None].expand(-1, 1, 4, 4) / 2 - 1
    captions = [f"class {number}" for number in labels]
    images: Any = MagicMock(labels=labels, captions=captions, __len__=lambda _: 1_000)
    images.read = lambda rows: (pixels[rows], torch.tensor(rows))
    evaluator, captions = image_evaluators.make_evaluator("caption", images, images, 100, 0, True)
    assert set(captions) == {"class 0", "class 1", "class 2", "class 3"}
    assert evaluator.real_reference["accuracy"] == 1


def test_classes_that_no_training_image_has_are_named(caplog):
    images, labels = torch.randn(90, 1, 4, 4), torch.arange(90) % 4
    prepare_captions((images, labels), (images, labels + 2), 80, seed=0)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "2 classes of held-out images are on none of the 90 images that the classifier is trained on, "
        "so none of their images counts as right: 4, 5"
    )


def test_real_modes_are_counted_in_stacks_of_all_kinds_where_they_are_sorted(monkeypatch):
    def read(images):
        return -((images.mean((1, 2, 3))[:, None] + 1) * 4.5 - torch.arange(10)).abs()

    learned = []
    monkeypatch.setattr(image_evaluators, "STACKS", 100)
    monkeypatch.setattr(
        image_evaluators, "train_classifier", lambda images, labels, *_: (learned.append(labels), read)[1]
    )
    numbers = torch.arange(3_000) // 3
    images = digits_of(numbers)[:, :, None, None].expand(-1, -1, 4, 4) / 4.5 - 1
    found = prepare_modes((images, numbers), (images, numbers), 1_000, seed=0).real_reference
    assert found["accuracy"] == 1
    assert found["modes"] > 600, "of which the first 1,000 rows have 334"
    assert len(learned[0].view(-1, 3)[:, 0].unique()) == 10, "of hundreds the first 100 rows have one"


@pytest.fixture(scope="module")
def stacks():
    return load_images("stacked-digits", 8, 3, label="label", cache_in_memory=True)


@pytest.fixture(scope="module")
def evaluator(stacks):
    train, test = stacks
    return prepare_modes(
        (train.images(), train.labels), (test.images(), test.labels), 26_000, seed=0, captioned=True
    )


def test_digits_come_hundreds_first():
    assert digits_of(torch.tensor([703, 42, 0])).tolist() == [[7, 0, 3], [0, 4, 2], [0, 0, 0]]


def test_mode_probabilities_are_products_of_the_shares_of_digits():
    numbers = torch.tensor([0, 100, 210, 222])  # hundreds 0 1 2 2, tens 0 0 1 2, ones 0 0 0 2
    probs = mode_probs(numbers)
    assert probs[0] == pytest.approx(1 / 4 * 2 / 4 * 3 / 4)
    assert probs[222] == pytest.approx(2 / 4 * 1 / 4 * 1 / 4)
    assert probs[333] == 0
    assert probs.sum() == pytest.approx(1)


def test_real_stacked_digits_reach_every_mode_and_the_lowest_divergence(evaluator, stacks):
    assert evaluator.real_reference["modes"] == 1000
    assert evaluator.real_reference["kl"] == pytest.approx(999 / 52_000, abs=0.003)
    assert evaluator.real_reference["accuracy"] > 0.85
    metrics = evaluator.evaluate(stacks[0].images(choose_rows(len(stacks[0]), 26_000)))
    assert metrics["kl"] == evaluator.real_reference["kl"]
    assert metrics["kl_excess"] == 0


def test_modes_that_are_missing_are_found_missing(evaluator, stacks):
    images, labels = stacks[0].images(), stacks[0].labels
    lower = images[labels < 500][torch.arange(26_000) % int((labels < 500).sum())]
    missing = evaluator.evaluate(lower)
    assert missing["modes"] < 600  # the classifier errs, and so finds some that are not there
    assert missing["kl"] == pytest.approx(math.log(2), abs=0.1)
    assert evaluator.evaluate(images[:1].expand(26_000, -1, -1, -1))["modes"] == 1


def test_images_are_compared_with_the_numbers_in_their_captions(evaluator, stacks):
    held_out = stacks[1]
    asked = held_out.labels[evaluator.rows]
    assert set(asked.bincount().tolist()) == {26}
    right = evaluator.evaluate(held_out.images(evaluator.rows))["accuracy"]
    assert right > 0.85
    assert evaluator.evaluate(held_out.images(evaluator.rows).roll(1, 0))["accuracy"] < 0.01
    swapped = held_out.images(evaluator.rows).flip(1)  # ones for hundreds: right only where they are the same
    assert evaluator.evaluate(swapped)["accuracy"] == pytest.approx(right / 10, abs=0.02)


def test_without_captions_there_is_no_accuracy(stacks):
    train, test = ((part.images(range(300)), part.labels[:300]) for part in stacks)
    metrics = IMAGE_EVALUATORS["modes"].make(train, test, 300, 0).evaluate(test[0])
    assert set(metrics) == {"samples", "modes", "modes_covered", "kl", "kl_excess"}


def test_a_model_without_captions_has_no_accuracy_of_classes_and_says_so(caplog):
    images, labels = torch.randn(90, 1, 4, 4), torch.arange(90) % 4
    evaluator = prepare_captions((images, labels), (images, labels), 80, seed=0, captioned=False)
    assert "images are generated without captions: no accuracy" in caplog.text
    metrics = evaluator.evaluate(images[:80])
    assert metrics["samples"] == 80 and "frechet" in metrics
    assert not any("accuracy" in name for name in metrics)


def test_images_that_are_no_stacked_digits_are_refused(stacks):
    images, labels = stacks[1].images(range(20)), stacks[1].labels[:20]
    with pytest.raises(ValueError, match="not 1 with labels"):
        prepare_modes((images[:, :1], labels), (images, labels), 10, 0)
    with pytest.raises(ValueError, match="not 3 with labels to 1999"):
        prepare_modes((images, labels), (images, labels * 0 + 1999), 10, 0)
