"""Generate with a trained model: images, the text of an image, more frames of a video.

    python train/generate.py --model OUTPUT_DIR/model --prompt "a red square" --output square.png
    python train/generate.py --model OUTPUT_DIR/model --prompts captions.txt --size 24x40 --output image.png
    python train/generate.py --model OUTPUT_DIR/model --describe photo.png
    python train/generate.py --model OUTPUT_DIR/model --continue_video cat.gif --frames 4 --output longer.gif
    python train/generate.py --model OUTPUT_DIR/model --continue_video cat.gif --frames 400 --cache rolling

A video is an animated image, such as GIF, WebP or PNG, or with the extra `video` an MP4 file. sprites:3 and
videos:3 are row 3 of the held-out rows.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as PILImage
from PIL import ImageSequence, UnidentifiedImageError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data.images import MODES, is_made_here, load_splits, resize_center_crop
from rope_mm.data.video_files import MP4, VIDEO_ENDS, import_av, read_video_file, write_video_file
from rope_mm.evaluation.contact_sheet import save_sheet
from rope_mm.files import write_file
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.config import check_options, option, run


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate images of --prompt, the text of --describe, or more frames of --continue_video."""

    model: str = option("runs/pretrain/model", "folder of a model")
    prompt: str | None = option(None, "text of the images; with continue_video, text before the video")
    describe: str = option("", "image or video to generate a text of")
    continue_video: str = option("", "video to generate more frames of")
    context_frames: int = option(0, "of the video, from which it continues; 0: all", minimum=0)
    frames: int = option(4, "to generate", minimum=1)
    cache: Literal["whole", "rolling"] = option(
        "whole", "of keys and values; rolling: of as many frames as a training video has"
    )
    prompts: str = option("", "file with a text on each line; images of all of them are generated")
    num_images: int = option(1, "of each text, in files numbered from 0 where there are several", minimum=1)
    grid: bool = option(False, "one PNG file of all images, a row for each text, and the texts beside them")
    size: str = option("", "height x width of the images in pixels, such as 24x40; empty: that of training")
    guidance_scale: float | None = option(None, "of sampling; null: that of training", minimum=0)
    noise_scale: float | None = option(None, "of the noise; null: that of training", minimum=0)
    num_inference_steps: int | None = option(None, "of sampling; null: those of training", minimum=1)
    zoom: int = option(8, "each pixel becomes a square of this side; 1: the native size", minimum=1)
    seed: int = option(0, "of the noise")
    output: str = option("generated.png", "file of the image or video")


def read_frames(path: str, size: int | tuple[int, int], channels: int) -> Tensor:
    """The frames (t, ch, size, size) of an image or video file, or of source:row.

    Args:
        path: the file, or such as sprites:3.
        size: pixels of a side.
        channels: of the frames.

    Raises:
        ValueError: a file that is not an image, a row that does not exist.
    """
    source, colon, row = path.rpartition(":")
    try:
        if colon and is_made_here(source):
            frames = find_row(source, int(row))
        elif Path(path).suffix.lower() in VIDEO_ENDS:
            frames = read_video_file({"bytes": None, "path": path}, lambda total: list(range(total)))
        else:
            with PILImage.open(path) as image:
                frames = [frame.copy() for frame in ImageSequence.Iterator(image)]
    except (OSError, UnidentifiedImageError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return torch.stack([resize_center_crop(frame, size, channels) for frame in frames]) / 127.5 - 1


def find_row(source: str, row: int) -> list[PILImage.Image]:
    """The frames of a held-out row of embedded data; its caption is printed."""
    rows = load_splits(source)["test"]
    if not 0 <= row < len(rows):
        raise IndexError(f"its rows are 0 to {len(rows) - 1}")
    found = rows[row]
    print(f"{source}:{row} {found['caption']}")
    return found.get("frames") or [found["image"]]


def write_frames(path: Path, frames: Tensor, zoom: int = 8) -> None:
    """Write an image, or a video where there are several frames.

    Args:
        path: the file; its suffix names the format.
        frames: (t, ch, y, x) in [-1, 1].
        zoom: each pixel becomes a square of this side.
    """
    if is_mp4(path):
        write_video_file(path, frames.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1))
        return
    pixels = frames.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    mode = MODES[frames.shape[1]]
    first, *rest = (
        PILImage.fromarray(frame.numpy(), mode).resize(
            (frame.shape[1] * zoom, frame.shape[0] * zoom), PILImage.Resampling.NEAREST
        )
        for frame in pixels.permute(0, 2, 3, 1).squeeze(-1)
    )
    video = {"save_all": True, "append_images": rest, "duration": 250, "loop": 0} if rest else {}
    write_file(path, lambda part: first.save(part, **video))


def check(config: Generate) -> None:
    """Refuse what makes no task.

    Raises:
        ValueError: nothing to do, or with the key and its value.
    """
    check_options(config)
    if config.prompt is None and not (config.prompts or config.describe or config.continue_video):
        raise ValueError(
            "give one of --prompt TEXT, --prompts FILE, --describe FILE and --continue_video FILE"
        )
    if config.describe and (config.prompt is not None or config.prompts or config.continue_video):
        raise ValueError("--describe generates a text; give --prompt and --continue_video to another command")
    if config.prompts and (config.prompt is not None or config.continue_video):
        raise ValueError(
            "--prompts generates images of the texts in a file; give the others to another command"
        )
    if config.grid and (config.continue_video or Path(config.output).suffix.lower() != ".png"):
        raise ValueError(f"--grid writes images of texts to a PNG file, not {config.output}")
    if config.size and config.continue_video:
        raise ValueError("--size is of new images; the frames after a video have its size")
    read_size(config.size)
    PILImage.init()  # now all formats are known
    if is_mp4(config.output):
        import_av()  # refused before anything is generated
        return
    formats, kind = (PILImage.SAVE_ALL, "a video") if config.continue_video else (PILImage.SAVE, "an image")
    if PILImage.registered_extensions().get(Path(config.output).suffix.lower()) not in formats:
        example = "longer.gif" if config.continue_video else "square.png"
        raise ValueError(f"--output {config.output} names no format of {kind}; give a name such as {example}")


def main(config: Generate) -> None:
    """Generate what the configuration says.

    Raises:
        ValueError: see `check`; a model cut short, or a task that it was not trained on.
    """
    check(config)
    disable_progress_bar()
    pipeline = RopeMMPipeline.from_pretrained(config.model)
    size, channels = pipeline.spec.size, pipeline.processor.num_channels
    if config.describe:
        frames = read_frames(config.describe, size, channels)
        task, visual = ("video2text", frames) if len(frames) > 1 else ("image2text", frames[0])
        print(pipeline.generate_text([pipeline.prompt(task, visual=visual)])[0].strip())
        return
    if not config.continue_video and "text2image" in pipeline.spec.tasks and is_mp4(config.output):
        raise ValueError(
            f"--output {config.output} is a video, and the model generates an image for a text; give a "
            "name such as square.png"
        )
    if config.continue_video:
        videos = [more_frames(pipeline, config, read_frames(config.continue_video, size, channels))]
    else:
        videos = images_of(pipeline, config)
    output = Path(config.output)
    if config.grid:
        save_sheet(output, [image for frames in videos for image in frames], texts_of(config))
        print(output)
        return
    for number, frames in enumerate(videos):
        path = output if len(videos) == 1 else output.with_stem(f"{output.stem}-{number}")
        write_frames(path, frames, config.zoom)
        print(path)


def is_mp4(path: str | Path) -> bool:
    """Whether a file's name is that of an MP4 video."""
    return Path(path).suffix.lower() == MP4


def read_size(text: str) -> tuple[int | None, int | None]:
    """Height and width of a text such as 24x40; neither of an empty one.

    Raises:
        ValueError: another text.
    """
    if not text:
        return None, None
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size is height x width in pixels, such as 24x40, not {text!r}")
    return int(height), int(width)


def read_prompts(path: str) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
        ValueError: a file that cannot be read, or without a text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} cannot be read: {error}") from None
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts {path} holds no text")
    return texts


def texts_of(config: Generate) -> list[str]:
    """The texts of the images."""
    return read_prompts(config.prompts) if config.prompts else [config.prompt or ""]


def images_of(pipeline: RopeMMPipeline, config: Generate) -> list[Tensor]:
    """Images (1, ch, y, x) of the prompts, or videos (t, ch, y, x) of a model of videos alone."""
    height, width = read_size(config.size)
    out = pipeline(
        texts_of(config),
        height=height,
        width=width,
        num_images_per_prompt=config.num_images,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        noise_scale=config.noise_scale,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="pt",
    )
    return list(out.frames) if out.images is None else [image[None] for image in out.images]


def more_frames(pipeline: RopeMMPipeline, config: Generate, frames: Tensor) -> Tensor:
    """The frames (t, ch, y, x) of a video and those that continue it.

    Args:
        pipeline: the model.
        config: numbers of frames, and the prompt.
        frames: of the video.

    Raises:
        ValueError: fewer frames than `context_frames`.
    """
    if config.context_frames > len(frames):
        raise ValueError(
            f"context_frames {config.context_frames} is more than the {len(frames)} frames of "
            f"{config.continue_video}"
        )
    frames = frames[: config.context_frames or None]
    prompt = pipeline.prompt("text2video", config.prompt or "", frames[0])
    generator = torch.Generator().manual_seed(config.seed)
    window = pipeline.spec.frames if config.cache == "rolling" else None
    options = {"steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    options["noise_scale"] = config.noise_scale
    return pipeline.generate_video([prompt], [frames], config.frames, generator, window, **options)[0]


if __name__ == "__main__":
    run(main, Generate)
