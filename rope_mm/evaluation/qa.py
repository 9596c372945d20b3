"""Quizzes as a model reads them: told in words and patches, answered in words, or by a picture it draws."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rope_mm.data.synthetic.qa_tasks import WORDS, QASample
from rope_mm.data.synthetic.sprites import PLACES, VIDEO_FACTORS
from rope_mm.evaluation.sprites import classify_sprites
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.models.sequences import EncodedSequence, collate, encode
from rope_mm.models.tokenizers import IMAGE_TOKEN
from rope_mm.nn.patches import to_images, to_patches
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Segment, Video

START, END, PAD, NONE = "look", "<end>", "<pad>", -100
WORD = re.compile(r"\w+|[^\w\s]")


class WordTokenizer:
    """A tokenizer of the words that quizzes have, one token each, in the part of it that `encode` asks."""

    eos_token_id = 1

    def __init__(self, quizzes: Sequence[QASample]):
        texts = [part for q in quizzes for part in (*q.document, q.question, q.answer)]
        texts += [START, *WORDS, *chain(*VIDEO_FACTORS.values()), *map(str, range(1, 65))]
        words = {word for text in texts if isinstance(text, str) for word in WORD.findall(text)}
        self.number = {word: i for i, word in enumerate((PAD, END, IMAGE_TOKEN, *sorted(words)))}
        self.spelt: dict[str, list[int]] = {}

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        """Numbers of the words; a word never seen is a KeyError."""
        if text not in self.spelt:
            self.spelt[text] = [self.number[word] for word in WORD.findall(text)]
        return {"input_ids": self.spelt[text]}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The number of one token."""
        return self.number[token]


class EncodedQA(NamedTuple):
    """A quiz as strings and segments, and its patches (n, p) in 0 to 255.

    `answer` is how many of the last tokens are to say, `drawn` how many of the last patches are to draw.
    """

    story: list[str | Segment]
    patches: Tensor
    answer: int
    drawn: int


class PlacedQA(NamedTuple):
    """A quiz and its tokens where a scheme places them."""

    row: EncodedSequence
    told: EncodedQA


def encode_qa(quiz: QASample, size: int) -> EncodedQA:
    """A quiz told to a model with patches of so many pixels."""
    story: list[str | Segment] = [START]
    patches = []
    for part in (*quiz.document, quiz.question, quiz.answer):
        if isinstance(part, str):
            story.append(part)
            continue
        frames = part.view(-1, *part.shape[-3:])
        patches.append(to_patches(frames, size).flatten(0, 1))
        y, x = (side // size for side in part.shape[-2:])
        story.append(Image(y, x) if part.dim() == 3 else Video(len(frames), y, x))
    if isinstance(quiz.answer, str):
        return EncodedQA(story, torch.cat(patches), len(WORD.findall(quiz.answer)) + 1, 0)
    return EncodedQA(story, torch.cat(patches), 0, len(patches[-1]))


def place_qa(told: Sequence[EncodedQA], words: WordTokenizer, scheme: Scheme) -> list[PlacedQA]:
    """Quizzes with their tokens where a scheme places them."""
    tokenizer = cast(PreTrainedTokenizerBase, words)
    rows = encode([quiz.story for quiz in told], tokenizer, scheme, add_end=True)
    return list(map(PlacedQA, rows, told))


class Answers(NamedTuple):
    """The losses of words and of pictures (0 where there are none), which (b,) words are right, patches."""

    words: Tensor
    pictures: Tensor
    right: Tensor
    drawn: Tensor


def generate_answers(model: RopeMMForConditionalGeneration, asked: Sequence[PlacedQA]) -> Answers:
    """What a model says, each word given those before it, and draws, in one pass from empty patches.

    Words are right throughout if and only if greedy decoding writes them. `drawn` (n, p) are the patches of
    all pictures in order, in -1 to 1.
    """
    sequences = collate([row for row, _ in asked])
    labels = sequences.input_ids.masked_fill(~sequences.mask, NONE)
    for label, (row, quiz) in zip(labels, asked, strict=True):
        label[: len(row.input_ids) - quiz.answer] = NONE
    labels = labels.to(model.device)
    patches = torch.cat([quiz.patches for _, quiz in asked]).to(model.device).float() / 127.5 - 1
    draft = torch.cat([torch.arange(-len(quiz.patches), 0) >= -quiz.drawn for _, quiz in asked])
    draft = draft.to(model.device)
    given = patches.masked_fill(draft[:, None], 0)
    count = (labels != NONE).sum().clamp(min=1)
    out = model(**sequences.to(model.device).inputs(), patches=given, labels=labels, num_items_in_batch=count)
    said = out.logits[:, :-1].argmax(-1)
    right = ((said == labels[:, 1:]) | (labels[:, 1:] == NONE)).all(1)
    drawn = out.patches[draft]
    lost = (drawn - patches[draft]).square().mean(1).sum() / max(len(drawn), 1)
    return Answers(out.loss, lost, right, drawn)


@torch.no_grad()
def score_answers(model: RopeMMForConditionalGeneration, asked: Sequence[PlacedQA]) -> Tensor:
    """Which (b,) of some quizzes of one form are right; a picture is if it shows what the asked one does."""
    found = generate_answers(model, asked)
    told = asked[0].told
    if not told.drawn:
        return found.right
    shape = told.story[-1]
    assert isinstance(shape, Image)
    size = model.config.patch_size
    true = torch.stack([quiz.patches[-quiz.drawn :] for _, quiz in asked])
    pictures = (to_images(p, shape.y, shape.x, size) for p in (found.drawn.view(true.shape), true))
    return same_place(*pictures)


def same_place(pictures: Tensor, asked: Tensor) -> Tensor:
    """Which pictures (n, 3, y, x) show the colour and place of those asked for, by `classify_sprites`."""
    seen, wanted = classify_sprites(pictures), classify_sprites(asked)
    return torch.stack([seen[name] == wanted[name] for name in ("colour", *PLACES)]).all(0)
