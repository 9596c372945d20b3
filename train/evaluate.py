"""Ask a model of train/pretrain.py: write what a picture or clip shows, draw words, go on with a clip.

    python train/evaluate.py --model OUT/model --caption picture.png
    python train/evaluate.py --model OUT/model --draw "a red square" --to drawn.png
    python train/evaluate.py --model OUT/model --extend clip.gif --frames 4 --to longer.gif
    python train/evaluate.py --model OUT/model --extend clip.gif --frames 400 --cache rolling --to long.gif

A clip is an animated picture, such as GIF, WebP or PNG. sprites:3 and videos:3 are row 3 of what is held out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as Picture
from PIL import ImageSequence, UnidentifiedImageError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data.images import EMBEDDED, MODES, load_splits, resize_center_crop
from rope_mm.files import write_file
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.config import at_least, run


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Ask a pretrained model: --caption FILE writes, --draw WORDS draws, --extend CLIP goes on with it."""

    model: str = "runs/pretrain/model"
    caption: str = ""
    draw: str = ""
    extend: str = ""
    words: str = ""  # that say what the clip shows, for a model that reads them before it
    given: int = 0  # frames of the clip to go on from; 0 takes all
    frames: int = 4  # that the clip goes on for
    cache: Literal["whole", "rolling"] = "whole"  # rolling: of as many frames as a clip it learned from
    seed: int = 0
    to: str = "drawn.png"


def read_frames(path: str, size: int, channels: int) -> Tensor:
    """The frames (t, ch, size, size) of a picture, one if it is not animated, or of source:row.

    Raises:
        ValueError: a file that is no picture, a row that is not there.
    """
    source, colon, row = path.rpartition(":")
    try:
        if colon and source in EMBEDDED:
            shown = find_row(source, int(row))
        else:
            with Picture.open(path) as picture:
                shown = [frame.copy() for frame in ImageSequence.Iterator(picture)]
    except (OSError, UnidentifiedImageError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    return torch.stack([resize_center_crop(frame, size, channels) for frame in shown]) / 127.5 - 1


def find_row(source: str, row: int) -> list[Picture.Image]:
    """The frames of a held-out row of embedded data, its caption printed."""
    rows = load_splits(source)["test"]
    if not 0 <= row < len(rows):
        raise IndexError(f"its rows are 0 to {len(rows) - 1}")
    found = rows[row]
    print(f"{source}:{row} {found['caption']}")
    return found.get("frames") or [found["image"]]


def write_frames(path: Path, frames: Tensor, zoom: int = 8) -> None:
    """Frames (t, ch, y, x) in [-1, 1] as a picture, animated where there are several, each pixel a square."""
    shown = frames.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).squeeze(-1)
    mode = MODES[frames.shape[1]]
    first, *rest = (
        Picture.fromarray(frame.numpy(), mode).resize(
            (frame.shape[1] * zoom, frame.shape[0] * zoom), Picture.Resampling.NEAREST
        )
        for frame in shown
    )
    moving = {"save_all": True, "append_images": rest, "duration": 250, "loop": 0} if rest else {}
    write_file(path, lambda part: first.save(part, **moving))


def check(config: Evaluate) -> None:
    """Refuse numbers and files that fit no question.

    Raises:
        ValueError: nothing asked, or with the key and its value.
    """
    if not (config.caption or config.draw or config.extend):
        raise ValueError("ask something: --caption FILE, --draw WORDS or --extend CLIP")
    if config.draw and config.extend:
        raise ValueError("--draw and --extend would both write --to; ask one after the other")
    at_least(1, config, "frames")
    at_least(0, config, "given")
    Picture.init()  # knows all formats
    formats, example = (Picture.SAVE_ALL, "longer.gif") if config.extend else (Picture.SAVE, "drawn.png")
    if Picture.registered_extensions().get(Path(config.to).suffix.lower()) not in formats:
        made = "clip" if config.extend else "picture"
        raise ValueError(f"--to {config.to} names no format of a {made}; give a name such as {example}")


def main(config: Evaluate) -> None:
    """Do what is asked.

    Raises:
        ValueError: see `check`; a model cut short, or what it was not taught.
    """
    check(config)
    disable_progress_bar()
    teller, generator = (
        RopeMMPipeline.from_pretrained(config.model),
        torch.Generator().manual_seed(config.seed),
    )
    size, channels = teller.spec.size, teller.processor.num_channels
    if config.caption:
        frames = read_frames(config.caption, size, channels)
        name, shown = ("video2text", frames) if len(frames) > 1 else ("image2text", frames[0])
        print(teller.generate_text([teller.prompt(name, visual=shown)])[0].strip())
    if config.draw:
        drawn = teller.generate_image([teller.prompt("text2image", config.draw)], generator)
        write_frames(Path(config.to), drawn)
        print(config.to)
    if config.extend:
        frames = read_frames(config.extend, size, channels)
        if config.given > len(frames):
            raise ValueError(f"given {config.given} is more than the {len(frames)} frames of {config.extend}")
        frames = frames[: config.given or None]
        prompt = teller.prompt("text2video", config.words, frames[0])
        window = teller.spec.frames if config.cache == "rolling" else None
        drawn = teller.generate_video([prompt], [frames], config.frames, generator, window)
        write_frames(Path(config.to), drawn[0])
        print(config.to)


if __name__ == "__main__":
    run(main, Evaluate)
