"""Questions about positions as a model reads them, answered by text or by an image that it generates."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rope_mm.checks.extras import extra
from rope_mm.data.synthetic.qa_tasks import WORDS, QASample
from rope_mm.data.synthetic.sprites import PLACES, VIDEO_FACTORS
from rope_mm.evaluation.sprites import classify_sprites
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.models.sequences import EncodedSequence, collate, encode
from rope_mm.models.tokenizers import load_tokenizer
from rope_mm.nn.patches import to_images, to_patches
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Segment, Video

with extra("train"):
    from transformers import PreTrainedTokenizerBase

START, NO_LABEL = "look", -100
LARGEST_NUMBER = 64  # of those that have a token


def load_qa_tokenizer(samples: Sequence[QASample]) -> PreTrainedTokenizerBase:
    """A tokenizer of the words in samples, of all words that samples can have, and of numbers."""
    texts = [part for s in samples for part in (*s.document, s.question, s.answer) if isinstance(part, str)]
    numbers = map(str, range(1, LARGEST_NUMBER + 1))
    return load_tokenizer("words", [START, *WORDS, *chain(*VIDEO_FACTORS.values()), *numbers, *texts])


class EncodedQA(NamedTuple):
    """A sample as strings, segments and patches.

    Attributes:
        sequence: the document, the question and the answer.
        patches: (n, p), whole numbers from 0 to 255.
        answer_tokens: number of the last tokens, the end included, that the model is to say.
        answer_patches: number of the last patches that the model is to generate.
    """

    sequence: list[str | Segment]
    patches: Tensor
    answer_tokens: int
    answer_patches: int


class PlacedQA(NamedTuple):
    """A sample with its tokens at the positions of a scheme."""

    row: EncodedSequence
    sample: EncodedQA


def encode_qa(sample: QASample, patch_size: int, tokenizer: PreTrainedTokenizerBase) -> EncodedQA:
    """A sample as a model reads it.

    Args:
        sample: the sample.
        patch_size: pixels of a patch's side.
        tokenizer: from `load_qa_tokenizer`.
    """
    sequence: list[str | Segment] = [START]
    patches = []
    for part in (*sample.document, sample.question, sample.answer):
        if isinstance(part, str):
            sequence.append(part)
            continue
        frames = part.view(-1, *part.shape[-3:])
        patches.append(to_patches(frames, patch_size).flatten(0, 1))
        y, x = (side // patch_size for side in part.shape[-2:])
        sequence.append(Image(y, x) if part.dim() == 3 else Video(len(frames), y, x))
    if isinstance(sample.answer, str):
        answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        return EncodedQA(sequence, torch.cat(patches), len(answer) + 1, 0)
    return EncodedQA(sequence, torch.cat(patches), 0, len(patches[-1]))


def place_qa(
    samples: Sequence[EncodedQA], tokenizer: PreTrainedTokenizerBase, scheme: Scheme
) -> list[PlacedQA]:
    """Samples with their tokens at the positions of a scheme.

    Args:
        samples: from `encode_qa`.
        tokenizer: from `load_qa_tokenizer`.
        scheme: places the tokens.
    """
    rows = encode([sample.sequence for sample in samples], tokenizer, scheme, add_end=True)
    return list(map(PlacedQA, rows, samples))


class Answers(NamedTuple):
    """What a model answers.

    Attributes:
        text_loss: the mean over the tokens of text answers, 0 where there are none.
        image_loss: the mean squared error of the patches of image answers, 0 where there are none.
        correct: (b,), whether every token of the text answer is the most likely one.
        patches: (n, p), generated, of all image answers in order, in -1 to 1.
    """

    text_loss: Tensor
    image_loss: Tensor
    correct: Tensor
    patches: Tensor


def generate_answers(model: RopeMMForConditionalGeneration, samples: Sequence[PlacedQA]) -> Answers:
    """A model's answers: each token given the true ones before it, images in one pass from empty patches.

    A text answer is correct throughout if and only if greedy decoding writes it.
    """
    sequences = collate([row for row, _ in samples])
    labels = sequences.input_ids.masked_fill(~sequences.mask, NO_LABEL)
    for label, (row, sample) in zip(labels, samples, strict=True):
        label[: len(row.input_ids) - sample.answer_tokens] = NO_LABEL
    labels = labels.to(model.device)
    patches = torch.cat([sample.patches for _, sample in samples]).to(model.device).float() / 127.5 - 1
    hidden = torch.cat([torch.arange(-len(s.patches), 0) >= -s.answer_patches for _, s in samples])
    hidden = hidden.to(model.device)
    shown = patches.masked_fill(hidden[:, None], 0)
    count = (labels != NO_LABEL).sum().clamp(min=1)
    out = model(**sequences.to(model.device).inputs(), patches=shown, labels=labels, num_items_in_batch=count)
    likely = out.logits[:, :-1].argmax(-1)
    correct = ((likely == labels[:, 1:]) | (labels[:, 1:] == NO_LABEL)).all(1)
    generated = out.patches[hidden]
    error = (generated - patches[hidden]).square().mean(1).sum() / max(len(generated), 1)
    return Answers(out.loss, error, correct, generated)


@torch.no_grad()
def score_answers(model: RopeMMForConditionalGeneration, samples: Sequence[PlacedQA]) -> Tensor:
    """Which (b,) answers to samples of one form are correct; an image is if it shows the true one's place."""
    answers = generate_answers(model, samples)
    first = samples[0].sample
    if not first.answer_patches:
        return answers.correct
    grid = first.sequence[-1]
    assert isinstance(grid, Image)
    true = torch.stack([sample.patches[-sample.answer_patches :] for _, sample in samples])
    images = (
        to_images(patches, grid.y, grid.x, model.config.patch_size)
        for patches in (answers.patches.view(true.shape), true)
    )
    return same_place(*images)


def same_place(images: Tensor, true: Tensor) -> Tensor:
    """Which images (n, 3, y, x) show the colour and place of the true ones, by `classify_sprites`."""
    found, wanted = classify_sprites(images), classify_sprites(true)
    return torch.stack([found[name] == wanted[name] for name in ("colour", *PLACES)]).all(0)
