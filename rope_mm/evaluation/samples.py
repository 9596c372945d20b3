"""Samples of every task that a pretrained model was taught, written to files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from rope_mm.data.documents import Document, MapDocuments, Visual
from rope_mm.data.seeding import make_generator
from rope_mm.data.templates import find_tasks
from rope_mm.evaluation.image_grid import save_sheet
from rope_mm.files import write_text
from rope_mm.models.pipeline import GenerationPipeline, document_text, pixels_of, processor_parts

ROWS, COLUMNS, WRITTEN = 8, 8, 64  # of a sheet, and how many held-out documents are written


def write_samples(teller: GenerationPipeline, held_out: MapDocuments, path: Path) -> dict[str, float]:
    """Samples of every task the model was taught, in files that begin with this path; how much is right.

    Rows of a sheet begin with the true picture or clip; a clip's first half is given, and one of a single
    frame is left out.
    """
    tasks = find_tasks(held_out.templates, held_out.kinds)
    marks: dict[str, float] = {}
    if "text2image" in tasks:
        asked = held_out.eval_prompts(tasks["text2image"], ROWS)
        prompts = [processor_parts(before) for before, _ in asked for _ in range(COLUMNS - 1)]
        drawn = teller.draw(prompts, make_generator("sheet")).cpu().unflatten(0, (len(asked), -1))
        true = torch.stack([pixels_of(value) for _, value in asked])[:, None]
        rows = torch.cat([true, drawn], 1).flatten(0, 1)
        save_sheet(path.with_name(f"{path.name}.png"), rows, [document_text(before) for before, _ in asked])
    if "text2video" in tasks:
        write_video_samples(
            teller,
            held_out.eval_prompts(tasks["text2video"], ROWS),
            path.with_name(f"{path.name}-videos.png"),
        )
    for name in ("image2text", "video2text"):
        if name in tasks:
            asked = held_out.eval_prompts(tasks[name], WRITTEN)
            written = teller.write([processor_parts(before) for before, _ in asked])
            pairs = [
                (str(true).strip(), said.strip()) for (_, true), said in zip(asked, written, strict=True)
            ]
            lines = "".join(f"{true} | {said}\n" for true, said in pairs)
            write_text(path.with_name(f"{path.name}-{name}.txt"), lines)
            marks[f"exact_match/{name}"] = sum(true == said for true, said in pairs) / len(pairs)
    return marks


def write_video_samples(
    teller: GenerationPipeline, asked: Sequence[tuple[Document, str | Visual]], path: Path
) -> None:
    """A sheet of true clips, and beside each how the model goes on from its first half."""
    asked = [(before, clip) for before, clip in asked if len(pixels_of(clip)) > 1]
    if not asked:
        return
    true = [pixels_of(clip) for _, clip in asked]
    made = teller.complete([processor_parts(before) for before, _ in asked], true, make_generator("sheet"))
    rows = pad_sequence([clip for pair in zip(true, made, strict=True) for clip in pair], True, 1.0)
    save_sheet(path, rows.flatten(0, 1), [document_text(before) for before, _ in asked])
