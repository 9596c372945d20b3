"""An evaluator of generated letters: is it the character of the caption, and is it in its style?"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from rope_mm.data.columns import choose_rows
from rope_mm.data.seeding import make_generator
from rope_mm.data.synthetic.letters import CHARACTERS, SIZE, STYLES, draw_glyphs, move_at_random
from rope_mm.evaluation.distribution import FEATURES, distribution_metrics, report_skipped
from rope_mm.evaluation.fitting import fit

IMAGES, EPOCHS, BATCH = 24, 8, 64  # of each combination, how often the classifier sees them, at once
LR = 4e-3  # the highest rate
PART = 1_000  # images classified at once


class LetterClassifier(nn.Module):
    """A small convolutional network with a head for the 62 characters and one for the 12 styles."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(SIZE * SIZE, FEATURES),
            nn.ReLU(),
        )
        self.character = nn.Linear(FEATURES, len(CHARACTERS))
        self.style = nn.Linear(FEATURES, len(STYLES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of characters (n, 62) and of styles (n, 12) of images (n, 1, 32, 32)."""
        features = self.body(images)
        return self.character(features), self.style(features)

    @torch.no_grad()
    def classify(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Characters (n,), styles (n,) and features (n, 64) of images (n, 1, 32, 32) in [-1, 1]."""
        features = torch.cat([self.body(part.clamp(-1, 1)) for part in images.split(PART)])
        return self.character(features).argmax(1), self.style(features).argmax(1), features


def train_letter_classifier(seed: int, count: int = IMAGES) -> LetterClassifier:
    """A classifier trained on real images of all combinations; the global random state is left as it was.

    Args:
        seed: of the images, of its weights and of the order of images.
        count: images of each combination.
    """
    labels = torch.arange(len(CHARACTERS) * len(STYLES)).repeat(count)
    images = move_at_random(draw_glyphs(), labels, make_generator(seed, "classifier"))[:, None] * 2 - 1
    character, style = labels // len(STYLES), labels % len(STYLES)

    def loss(classifier: LetterClassifier, rows: Tensor) -> Tensor:
        of_character, of_style = classifier(images[rows])
        return cross_entropy(of_character, character[rows]) + cross_entropy(of_style, style[rows])

    return fit(
        LetterClassifier,
        loss,
        len(labels),
        seed,
        epochs=EPOCHS,
        batch=BATCH,
        lr=LR,
        schedule=lambda optimizer, steps: OneCycleLR(optimizer, LR, steps),
    )


@dataclass(frozen=True)
class LetterEvaluator:
    """What a classifier reads in generated letters, compared with their captions and with real letters.

    Attributes:
        classifier: of characters and styles.
        real: features (m, 64) of held-out images.
        rows: held-out rows whose captions are to be generated.
        labels: the combination (n,) of those rows.
        held_out: whether each (n,) is a combination that is in no training image.
        real_reference: metrics of new real images for the same captions.
    """

    classifier: LetterClassifier
    real: Tensor
    rows: list[int]
    labels: Tensor
    held_out: Tensor
    real_reference: dict[str, float]

    def evaluate(self, images: Tensor) -> dict[str, float]:
        """Metrics of images (n, 1, 32, 32) in [-1, 1], generated for the captions of `rows` in order.

        `samples`; `letter_accuracy`; `distribution_metrics`, without those that need more samples.
        """
        character, style, features = self.classifier.classify(images)
        accuracy = letter_accuracy(character, style, self.labels, self.held_out)
        return {"samples": len(images)} | accuracy | distribution_metrics(self.real, features)


def letter_accuracy(character: Tensor, style: Tensor, labels: Tensor, held_out: Tensor) -> dict[str, float]:
    """Shares of images with the right character, with the right style, and with both (`accuracy`).

    `character` and `style` are of combinations that were trained, `character_held_out` and `style_held_out`
    of the others, `accuracy` is of all. A share of no images is skipped.

    Args:
        character: found in each image (n,).
        style: found in each image (n,).
        labels: the combination (n,) of the caption, character * 12 + style.
        held_out: whether the combination is in no training image (n,).
    """
    right = {"character": character == labels // len(STYLES), "style": style == labels % len(STYLES)}
    shares = {"accuracy": right["character"] & right["style"]}
    shares |= {name: found[~held_out] for name, found in right.items()}
    shares |= {f"{name}_held_out": found[held_out] for name, found in right.items()}
    return {name: float(found.float().mean()) for name, found in shares.items() if len(found)}


def prepare_letters(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], samples: int, seed: int
) -> LetterEvaluator:
    """An evaluator of generated letters; the data is `letters` with the column `label`.

    The classifier is trained on new images of all 744 combinations, as many of each, so that it knows those
    that are held out from the model as well as the others. The reference are the metrics of new real images
    of the same captions.

    Args:
        train: real images (n, 1, 32, 32) in [-1, 1] and their combinations (n,), character * 12 + style.
        test: held-out ones.
        samples: how many images are generated.
        seed: of the classifier and of the reference.

    Raises:
        ValueError: images or labels that are not those of `letters`.
    """
    (images, labels), (unseen, asked) = train, test
    shape, most = tuple(images.shape[1:]), max(int(labels.max()), int(asked.max()))
    if shape != (1, SIZE, SIZE) or most >= len(CHARACTERS) * len(STYLES):
        raise ValueError(
            f"the evaluator letters reads images {(1, SIZE, SIZE)} with labels below "
            f"{len(CHARACTERS) * len(STYLES)}, not {shape} with labels to {most}; give data.path letters, "
            f"data.size {SIZE}, data.channels 1 and data.label label"
        )
    report_skipped(samples, len(unseen))
    classifier, glyphs = train_letter_classifier(seed), draw_glyphs()
    chosen = torch.tensor(choose_rows(len(asked), samples))
    rows = chosen[torch.arange(samples) % len(chosen)]
    apart, real = ~torch.isin(asked, labels), classifier.classify(unseen)[2]
    evaluator = LetterEvaluator(classifier, real, rows.tolist(), asked[rows], apart[rows], {})
    other = move_at_random(glyphs, asked[rows], make_generator(seed, "reference"))[:, None] * 2 - 1
    return replace(evaluator, real_reference=evaluator.evaluate(other))
