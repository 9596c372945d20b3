"""Samples of every task that a pretrained model was trained on, written to files."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.nn.utils.rnn import pad_sequence

from rope_mm.data.documents import Document, MapDocuments
from rope_mm.data.seeding import make_generator
from rope_mm.data.templates import find_tasks
from rope_mm.evaluation.contact_sheet import save_sheet
from rope_mm.files import write_text
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.models.tokenizers import knows_words

ROWS, COLUMNS = 8, 8  # of a sheet
TEXT_SAMPLES = 64  # held-out documents whose text is generated


def write_samples(pipeline: RopeMMPipeline, held_out: MapDocuments, path: Path) -> dict[str, float]:
    """Write samples of every task of a model.

    Rows of a sheet begin with the true image or video. A video's first half is given; one of a single frame
    is skipped.

    Args:
        pipeline: of the model.
        held_out: documents of the model's templates.
        path: what the names of the files begin with.

    Returns:
        The share of texts that are exactly the true ones, for each task of text.
    """
    metrics: dict[str, float] = {}
    if pairs := eval_pairs(pipeline, held_out, "text2image", ROWS):
        write_image_samples(pipeline, pairs, path.with_name(f"{path.name}.png"))
    if pairs := eval_pairs(pipeline, held_out, "text2video", ROWS):
        write_video_samples(pipeline, pairs, path.with_name(f"{path.name}-videos.png"))
    for task in ("image2text", "video2text"):
        if pairs := eval_pairs(pipeline, held_out, task, TEXT_SAMPLES):
            generated = pipeline.generate_text([before for before, _ in pairs])
            texts = [
                (str(true).strip(), text.strip()) for (_, true), text in zip(pairs, generated, strict=True)
            ]
            lines = "".join(f"{true} | {text}\n" for true, text in texts)
            write_text(path.with_name(f"{path.name}-{task}.txt"), lines)
            metrics[f"exact_match/{task}"] = sum(true == text for true, text in texts) / len(texts)
    return metrics


def write_image_samples(pipeline: RopeMMPipeline, pairs: Sequence[tuple[Document, Any]], path: Path) -> None:
    """Write a sheet of true images, and beside each what the model generates in its size.

    Args:
        pipeline: of the model.
        pairs: prompts and true images.
        path: of the PNG file.
    """
    shown = [pair for pair in pairs for _ in range(COLUMNS - 1)]
    prompts, true = [before for before, _ in shown], [image.pixels for _, image in shown]
    made = iter(pipeline.generate_image_like(prompts, true, make_generator("sheet")))
    rows = [[image.pixels, *islice(made, COLUMNS - 1)] for _, image in pairs]
    save_sheet(path, [image for row in rows for image in row], [document_text(before) for before, _ in pairs])


def write_video_samples(pipeline: RopeMMPipeline, pairs: Sequence[tuple[Document, Any]], path: Path) -> None:
    """Write a sheet of true videos, and beside each how the model continues its first half.

    Args:
        pipeline: of the model.
        pairs: prompts and true videos.
        path: of the PNG file.
    """
    pairs = [(before, video) for before, video in pairs if len(video.pixels) > 1]
    if not pairs:
        return
    true = [video.pixels for _, video in pairs]
    made = pipeline.continue_video([before for before, _ in pairs], true, make_generator("sheet"))
    rows = pad_sequence([video for pair in zip(true, made, strict=True) for video in pair], True, 1.0)
    save_sheet(path, rows.flatten(0, 1), [document_text(before) for before, _ in pairs])


def eval_pairs(
    pipeline: RopeMMPipeline, held_out: MapDocuments, task: str, count: int
) -> list[tuple[Document, Any]]:
    """Prompts of a task and what is true after each; none where the documents have no such task.

    Prompts with words that the model has no token for are skipped.

    Args:
        pipeline: of the model.
        held_out: documents of the model's templates.
        task: a name of TASKS.
        count: number of rows to read.
    """
    tasks = find_tasks(held_out.templates, held_out.kinds)
    pairs = held_out.eval_prompts(tasks[task], count) if task in tasks else []
    tokenizer: Any = pipeline.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    texts = [[part for part in before if isinstance(part, str)] for before, _ in pairs]
    return [
        pair
        for pair, strings in zip(pairs, texts, strict=True)
        if all(knows_words(tokenizer, text) for text in strings)
    ]


def document_text(document: Document) -> str:
    """The strings of a document, joined."""
    return "".join(part for part in document if isinstance(part, str)).strip()
