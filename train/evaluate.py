"""Ask a model of train/pretrain.py: write what a picture or clip shows, draw words, go on with a clip.

    python train/evaluate.py --model OUT/model --caption picture.png
    python train/evaluate.py --model OUT/model --draw "a red square" --to drawn.png
    python train/evaluate.py --model OUT/model --extend clip.gif --frames 4 --to longer.gif
    python train/evaluate.py --model OUT/model --extend clip.gif --frames 400 --cache rolling --to long.gif

A clip is an animated picture, such as GIF, WebP or PNG.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as Picture
from PIL import ImageSequence, UnidentifiedImageError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data.images import MODES, fit_picture
from rope_mm.models.telling import Teller
from rope_mm.run.checkpoint import write_file
from rope_mm.run.config import run


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Ask a pretrained model: --caption FILE writes, --draw WORDS draws, --extend CLIP goes on with it."""

    model: str = "runs/pretrain/model"
    caption: str = ""
    draw: str = ""
    extend: str = ""
    words: str = ""  # that say what the clip shows, for a model that reads them before it
    frames: int = 4  # that the clip goes on for
    cache: Literal["whole", "rolling"] = "whole"  # rolling: of as many frames as a clip it learned from
    seed: int = 0
    to: str = "drawn.png"


def read_frames(path: str, size: int, channels: int) -> Tensor:
    """The frames (t, ch, size, size) of a picture, one if it is not animated.

    Raises:
        ValueError: a file that is no picture.
    """
    try:
        with Picture.open(path) as picture:
            return (
                torch.stack([fit_picture(f, size, channels) for f in ImageSequence.Iterator(picture)]) / 127.5
                - 1
            )
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


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


def main(config: Evaluate) -> None:
    """Do what is asked.

    Raises:
        ValueError: nothing asked, or what the model was not taught.
    """
    if not (config.caption or config.draw or config.extend):
        raise ValueError("ask something: --caption FILE, --draw WORDS or --extend CLIP")
    disable_progress_bar()
    teller, generator = Teller.load(Path(config.model)), torch.Generator().manual_seed(config.seed)
    size, channels = teller.form.size, teller.processor.num_channels
    if config.caption:
        frames = read_frames(config.caption, size, channels)
        name, shown = ("narrate", frames) if len(frames) > 1 else ("caption", frames[0])
        print(teller.write([teller.prompt(name, shown=shown)])[0].strip())
    if config.draw:
        write_frames(Path(config.to), teller.draw([teller.prompt("draw", config.draw)], generator))
        print(config.to)
    if config.extend:
        frames = read_frames(config.extend, size, channels)
        prompt = teller.prompt("film", config.words, frames[0])
        window = teller.form.frames if config.cache == "rolling" else None
        drawn = teller.film([prompt], [frames], config.frames, generator, window)
        write_frames(Path(config.to), drawn[0])
        print(config.to)


if __name__ == "__main__":
    run(main, Evaluate)
