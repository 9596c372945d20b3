"""Train the image head against a critic: caption and noise in, patches out, one pass per image.

    make train
    python train/adversarial.py --config configs/adversarial/digits.yaml
    accelerate launch train/adversarial.py --config configs/adversarial/digits.yaml
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/adversarial.py \\
        --config configs/adversarial/digits.yaml

The same command again resumes from the last checkpoint, on any number of processes; --restart starts anew,
--dry-run checks and prints the configuration, Ctrl-C and SIGTERM save and stop.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import CaptionedImages, draw_augmentation, load_images, make_generator
from rope_mm.data.augmentation import AUGMENTATIONS
from rope_mm.data.buckets import Size
from rope_mm.data.columns import stored_row
from rope_mm.data.images import Unreadable
from rope_mm.data.pixels import check_background
from rope_mm.data.seeding import EVALUATION
from rope_mm.evaluation.contact_sheet import save_data_sheet, save_sheet
from rope_mm.evaluation.image_evaluators import IMAGE_EVALUATORS, ImageEvaluator, make_evaluator
from rope_mm.models import ImageBatcher, load_tokenizer
from rope_mm.models.attention_backends import ATTENTIONS, with_attention
from rope_mm.models.configuration_rope_mm import config_for
from rope_mm.training.adversarial_loss import GANConfig, as_it_is
from rope_mm.training.adversarial_trainer import AdversarialBatch, AdversarialOptim, AdversarialTrainer
from rope_mm.training.checkpoint import Stateful
from rope_mm.training.config import check_options, option, run
from rope_mm.training.distributed import all_reduce_sum
from rope_mm.training.ema import Ema
from rope_mm.training.fingerprint import fingerprint_rows
from rope_mm.training.loop import Run, fingerprint, launch
from rope_mm.training.metrics_log import say
from rope_mm.training.run_dir import Identity
from rope_mm.training.unread_keys import refuse_unread
from rope_mm.training.vocabulary import find_word_tokenizer, keep_tokenizer

SHEET = 10  # captions on a contact sheet, and images of each


@dataclass(frozen=True, kw_only=True)
class Data:
    """Captioned images, as `load_splits` finds them, and the names of their columns."""

    path: str = option("digits", "an embedded source, a folder, files, or a hub name")
    image: str = option("image", "column of images")
    caption: str = option("caption", "column of captions; empty: none, the model is unconditional")
    label: str = option("", "column of classes, by which images are evaluated; empty: none")
    size: int = option(8, "pixels of a side", minimum=1)
    aspect_ratio: Literal["square", "keep"] = option(
        "square",
        "of images; keep: their own, in as many patches as the square has at most, and one size a step",
    )
    channels: Literal[1, 3, 4] = option(1, "grey, RGB or RGBA")
    cache_in_memory: bool = option(False, "decode all images at the start and keep their bytes")
    background: str = option(
        "white", "colour under what is transparent, where channels is 1 or 3", check=check_background
    )
    max_caption_length: int = option(256, "tokens of a caption", minimum=1)
    long_captions: Literal["cut", "refuse"] = option("cut", "what becomes of longer captions")
    flip: bool = option(False, "mirror each image, left to right, half of the times that it is read")
    strict: bool = option(False, "stop at an image that cannot be read, instead of taking the next one")
    changed: bool = option(False, "resume although the data has changed")


@dataclass(frozen=True, kw_only=True)
class Adversarial(Run):
    """Train an image head against a critic; the same command again resumes, --restart starts anew."""

    output_dir: str = option("runs/adversarial", "the run's folder; the same command resumes the run in it")
    global_batch_size: int = option(64, "images of a step, of all processes together", minimum=1)
    gradient_accumulation_steps: int = option(
        1, "parts of a batch that a process computes in turn", minimum=1
    )
    critic_steps: int = option(1, "steps of the critic before each of the generator", minimum=1)
    tokenizer: str = option("bytes", "bytes, words (of all captions), a folder or a hub name")
    data: Data = option(Data(), "what to train on")
    rope: dict[str, Any] = option({}, "the scheme and its fields", fill={"scheme": "rope-tv"})
    model: dict[str, Any] = option({}, "fields of RopeMMConfig, of generator and critic")
    loss: GANConfig = option(GANConfig(), "the objective")
    optim: AdversarialOptim = option(AdversarialOptim(), "the optimizers")
    augment: dict[str, float] = option(
        {}, "strengths, of real and of generated images", keys=AUGMENTATIONS, minimum=0, maximum=1
    )
    attn_implementation: str = option("sdpa", "on GPUs also flex or flash attention", choices=ATTENTIONS)
    compile: str = option("", "a backend of torch.compile, such as inductor; empty: none")
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass, to save memory")
    ema_decay: float = option(0.995, "of the average of the generator's weights", minimum=0, below=1)
    noise_scale: float = option(
        1.0, "of sampling; below 1 images vary less, and more of them show their caption", minimum=0
    )
    evaluator: str = option("caption", "metrics of generated images", choices=IMAGE_EVALUATORS)
    eval_samples: int = option(1_000, "images generated for an evaluation", minimum=1)

    resumable_keys: ClassVar[tuple[str, ...]] = (
        *Run.resumable_keys,
        "data.strict",
        "data.changed",
        "data.cache_in_memory",
    )


class SkippedRows:
    """Rows that are skipped, each with the reason; an interrupted run continues with them."""

    def __init__(self):
        self.rows: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.rows = dict(state["rows"])


class Training:
    """Generator and critic, their data, and the metrics of what is generated.

    Args:
        config: of the run.
        accelerator: devices and processes.

    Raises:
        ValueError: a configuration or data that cannot be used.
    """

    def __init__(self, config: Adversarial, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.batch_size = divide_batch(config, accelerator.num_processes)
        words = config.tokenizer == "words"
        tokenizer = load_tokenizer("bytes" if words else config.tokenizer)
        torch.manual_seed(config.seed)
        model = config_for(tokenizer, config.data.channels, config.rope, config.model)
        # refuses a size that whole patches do not tile
        self.patches = ImageBatcher(model, tokenizer, config.data.size).grid.tokens
        self.images, self.held_out = load_data(config.data, model.patch_size)
        if words:
            kept = Path(config.output_dir), texts_of(self.images, self.held_out)
            tokenizer = find_word_tokenizer(*kept, config.restart, config.data.changed)
            model = config_for(tokenizer, config.data.channels, config.rope, config.model)
        model = with_attention(model, config.attn_implementation, accelerator.device)
        self.batcher = ImageBatcher(model, tokenizer, config.data.size)
        self.long_captions = sum(
            limit_captions(s, tokenizer, config.data) for s in (self.images, self.held_out)
        )
        self.trainer = AdversarialTrainer(
            model, config.loss, config.optim, accelerator, config.compile, config.gradient_checkpointing
        )
        self.average = Ema(self.trainer.unwrapped_generator, config.ema_decay)
        how = {"captioned": bool(config.data.caption), "noise_scale": config.noise_scale}
        self.pipeline = self.batcher.pipeline(self.average.model, **how)
        self.tokens, self.generated, self.flops = 0, 0, 0.0
        self.skipped = SkippedRows()

    @cached_property
    def evaluator(self) -> tuple[ImageEvaluator, list[str]] | None:
        """Metrics of generated images and their captions, None without labels; made at the first use."""
        config, process = self.config, self.accelerator
        if not config.data.label or not process.is_main_process:
            return None
        options = config.eval_samples, config.seed, bool(config.data.caption)
        made = make_evaluator(config.evaluator, self.images, self.held_out, *options)
        for reason in self.held_out.unreadable.values():
            say(f"skipped, held out: {reason}")
        return made

    def micro_batch(self, update: int, part: int = 0) -> AdversarialBatch:
        """This process's share of a part of the batch of the critic's update-th step.

        All images and noise depend on (seed, update) and their number in the batch, whichever process reads
        them.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, seed, device = self.config.global_batch_size, self.config.seed, self.accelerator.device
        mine = slice(part * world + rank, None, world * self.config.gradient_accumulation_steps)
        pixels, rows = self.images.buckets.batch(seed, update, size)
        batcher = replace(self.batcher, size=pixels)
        images, rows[mine] = self.read_images(rows[mine])
        captions = self.images.draw_captions(rows, make_generator(seed, "captions", update))[mine]
        noise = batcher.noise(make_generator(seed, "noise", update, 0), size)[mine]
        if self.config.data.flip:
            mirrored = torch.rand(size, generator=make_generator(seed, "flip", update))[mine] < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        real = batcher.to_patches(images)
        number = update * self.config.gradient_accumulation_steps + part
        return AdversarialBatch(
            batcher.sequences(captions).to(device),
            real.to(device),
            augment=self.augmentation(number, batcher),
            generator=make_generator(seed, "probes", number, rank, device=device),
            noise=noise.to(device),
        )

    def read_images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of these rows and, where one is skipped, of the rows after it; and the rows' numbers.

        Raises:
            ValueError: an image that cannot be read, where `data.strict` is set.
        """
        if not self.config.data.strict:
            return self.images.read(rows)
        try:
            return self.images.images(rows), rows
        except Unreadable as error:
            message = f"{error}; repair it, or take the next image by --data.strict false"
            raise ValueError(message) from error

    def report_skipped(self) -> None:
        """Name the images that are skipped from now on; every process then knows those of all."""
        if (
            self.config.data.strict
        ):  # none is skipped; what the sheet of data found is refused when it is drawn
            return
        new = {row: why for row, why in self.images.unreadable.items() if row not in self.skipped.rows}
        if not int(all_reduce_sum(self.accelerator, torch.tensor(len(new)))):
            return
        for row, why in sorted(chain.from_iterable(gather_object([list(new.items())]))):
            if row not in self.skipped.rows and self.accelerator.is_main_process:
                say(f"skipped: {why}")
            self.skipped.rows[row] = self.images.unreadable[row] = why

    def augmentation(self, number: int, batcher: ImageBatcher) -> Callable[[Tensor], Tensor]:
        """How the patches of a micro-batch are changed before the critic sees them.

        Args:
            number: of the micro-batch.
            batcher: of its images.
        """
        config, process = self.config, self.accelerator
        if not config.augment:
            return as_it_is
        random = make_generator(config.seed, "augment", number, process.process_index)
        change = draw_augmentation(config.augment, self.batch_size, random, process.device)
        return lambda patches: batcher.to_patches(change(batcher.to_images(patches)))

    def identity(self) -> Identity:
        """All that the run depends on."""
        splits = {"train": self.images, "held_out": self.held_out}
        data = {name: fingerprint_rows([images.rows]) for name, images in splits.items()}
        return Identity(fingerprint(self.config), data, self.config.optim.constant)

    def describe(self) -> str:
        """Scheme, model and data, for a dry run."""
        scheme, weights = self.batcher.config.scheme, self.average.model.num_parameters()
        rows = f"{len(self.images)} rows, {len(self.held_out)} held out"
        lines = [f"scheme: {scheme}", f"generator: {weights} weights", f"data: {rows}"]
        lines += [] if self.config.data.label else ["metrics: none of images, as data.label is empty"]
        return "\n".join(lines)

    def show_data(self, path: Path) -> None:
        """Write a sheet of images of both splits, as they are read; those that cannot be read are skipped."""

        def read(split: CaptionedImages, row: int) -> Iterator[tuple[Tensor, str]]:
            with suppress(Unreadable):
                yield split.images([row])[0], split.captions[row]

        save_data_sheet(path, self.images, self.held_out, read, CaptionedImages.file_kind)

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside models and optimizers."""
        lecam = self.trainer.critic.loss.lecam
        return {"ema": self.average, "lecam": lecam, "skipped_images": self.skipped}

    def begin(self, step: int) -> None:
        """Report cut captions, and skip what the run has skipped before; each step makes its batches."""
        if self.config.tokenizer == "words" and self.accelerator.is_main_process:
            keep_tokenizer(Path(self.config.output_dir), self.batcher.tokenizer)
        self.images.unreadable |= self.skipped.rows
        if self.long_captions and self.accelerator.is_main_process:
            length = self.config.data.max_caption_length
            print(f"cut: {self.long_captions} captions of more than {length} tokens", flush=True)

    def critic_batches(self, step: int) -> list[list[AdversarialBatch]]:
        """The micro-batches of each of a step's `critic_steps`."""
        parts, updates = self.config.gradient_accumulation_steps, self.config.critic_steps
        return [
            [self.micro_batch(update, part) for part in range(parts)]
            for update in range(step * updates, (step + 1) * updates)
        ]

    def step(self, step: int) -> dict[str, Tensor]:
        """`critic_steps` steps of the critic, then one of the generator; their losses."""
        self.trainer.update_schedules(step / self.config.steps)
        batches = self.critic_batches(step)
        mine = sum(int(batch.sequences.mask.sum()) for parts in batches for batch in parts)
        self.tokens += int(all_reduce_sum(self.accelerator, torch.tensor(mine)))
        self.generated += self.config.global_batch_size * self.config.critic_steps
        terms = self.trainer.train_step(batches)
        # penalties are of the images that this process reads; the log has the mean over all of them
        values = torch.stack([term.detach().float() for term in terms.values()])
        mean = all_reduce_sum(self.accelerator, values) / self.accelerator.num_processes
        terms = dict(zip(terms, mean, strict=True))
        self.report_skipped()
        if self.skipped.rows:
            terms["skipped_images"] = torch.tensor(float(len(self.skipped.rows)))
        self.average.update(self.trainer.unwrapped_generator)
        return terms | {"lr": torch.tensor(self.trainer.optimizer.param_groups[0]["lr"], dtype=torch.float64)}

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """What this process reads in a step."""
        read = [batch for parts in self.critic_batches(step) for batch in parts]
        return [vars(batch.sequences) | {"real": batch.real, "noise": batch.noise} for batch in read]

    def evaluate(self, path: Path) -> dict[str, float]:
        """Write a contact sheet of the averaged generator; its metrics, where there are labels."""
        if not self.accelerator.is_main_process:
            return {}
        shown = self.held_out.examples(SHEET)
        save_sheet(path.with_suffix(".png"), self.make_sheet(shown), shown)
        if self.evaluator is None:
            return {}
        evaluator, captions = self.evaluator
        return evaluator.evaluate(self.generate(captions, EVALUATION))

    def make_sheet(self, captions: list[str]) -> list[Tensor]:
        """SHEET images (ch, y, x) of each caption, in the sizes that are trained, in turn."""
        sizes = self.images.buckets.sizes[:SHEET]
        columns: list[Any] = [()] * SHEET
        for place, size in enumerate(sizes):
            here = range(place, SHEET, len(sizes))
            key = ("sheet", place) if place else ("sheet",)
            images = self.generate([caption for caption in captions for _ in here], *key, size=size)
            for number, column in enumerate(here):
                columns[column] = images[number :: len(here)]
        return [image for row in zip(*columns, strict=True) for image in row]

    def generate(self, captions: list[str], *key: str | int, size: Size | None = None) -> Tensor:
        """Images (n, ch, y, x) of captions by the averaged generator.

        Args:
            captions: of each image.
            key: of the noise.
            size: pixels (y, x); None for the square.
        """
        height, width = size or (None, None)
        options = {"height": height, "width": width, "generator": make_generator(*key)}
        return self.pipeline(captions, output_type="pt", **options).images

    def save_model(self, path: Path) -> None:
        """Write the averaged generator, as `RopeMMPipeline.from_pretrained` reads it."""
        if self.accelerator.is_main_process:
            self.pipeline.save_pretrained(path)

    def extra_results(self) -> dict[str, float]:
        """The same metrics of real images."""
        real = self.evaluator[0].real_reference if self.evaluator else {}
        return {f"real_{name}": value for name, value in real.items()}


def divide_batch(config: Adversarial, processes: int) -> int:
    """Images of a micro-batch of each process.

    Raises:
        ValueError: a batch that they do not divide.
    """
    parts = processes * config.gradient_accumulation_steps
    size, rest = divmod(config.global_batch_size, parts)
    if rest:
        raise ValueError(
            f"global_batch_size {config.global_batch_size} does not divide into {parts} equal parts, of "
            f"{processes} processes by gradient_accumulation_steps {config.gradient_accumulation_steps}"
        )
    return size


def load_data(data: Data, patch_size: int) -> tuple[CaptionedImages, CaptionedImages]:
    """Images to train on, and held-out ones.

    Args:
        data: where they come from.
        patch_size: pixels of a patch's side.
    """
    columns, keep = (
        (data.image, data.caption, data.label),
        patch_size if data.aspect_ratio == "keep" else None,
    )
    return load_images(
        data.path, data.size, data.channels, *columns, data.cache_in_memory, data.background, keep
    )


def texts_of(*splits: CaptionedImages) -> Iterator[str]:
    """The captions of images, and the others among which some are chosen."""
    for images in splits:
        yield from chain(images.captions, *images.choices.values())


def limit_captions(images: CaptionedImages, tokenizer: PreTrainedTokenizerBase, data: Data) -> int:
    """Cut the captions that are too long; how many there were.

    Args:
        images: whose captions are cut.
        tokenizer: counts tokens.
        data: with the longest length and what to do beyond it.

    Raises:
        ValueError: one that is too long, where `data.long_captions` refuses it.
    """
    most, cut = data.max_caption_length, {}
    # a token stands for a byte or more
    for caption in {text for text in texts_of(images) if len(text.encode()) > most}:
        tokens = tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(tokens) > most:
            cut[caption] = str(tokenizer.decode(tokens[:most])).rstrip("\ufffd")
    if cut and data.long_captions == "refuse":
        row = next(row for row, text in enumerate(images.captions) if text in cut)
        raise ValueError(
            f"row {stored_row(images.rows, row)}: a caption has more than {most} tokens; shorten it, raise "
            "data.max_caption_length, or give data.long_captions cut"
        )
    count = sum(text in cut for text in images.captions)
    images.captions = [cut.get(text, text) for text in images.captions]
    images.choices = {row: [cut.get(t, t) for t in texts] for row, texts in images.choices.items()}
    return count


def unread(config: Adversarial) -> dict[str, str]:
    """The keys that nothing reads in this configuration, with the reason."""
    keys = config.loss.unread() | config.optim.unread(config.loss)
    if config.data.channels == 4:
        keys["data.background"] = "images of 4 channels keep what is transparent"
    if not config.data.caption:
        reason = "data.caption is empty"
        keys |= dict.fromkeys(("data.max_caption_length", "data.long_captions"), reason)
    if not config.data.label:
        keys |= dict.fromkeys(("evaluator", "eval_samples"), "data.label is empty, so nothing is evaluated")
    return keys


def check(config: Adversarial) -> None:
    """Refuse values that do not fit together, and those that nothing reads.

    Raises:
        ValueError: with the key and its value.
    """
    check_options(config)
    refuse_unread(config, unread(config))
    if config.data.aspect_ratio == "keep" and config.data.label:
        raise ValueError(
            "metrics by data.label compare images of one size; give data.label '' or data.aspect_ratio square"
        )
    needed = IMAGE_EVALUATORS[config.evaluator].captions == "needed"
    if needed and not config.data.caption:
        others = [name for name, kind in IMAGE_EVALUATORS.items() if kind.captions != "needed"]
        raise ValueError(
            f"evaluator {config.evaluator} needs data.caption; without captions take {' or '.join(others)}"
        )
    if config.loss.penalties.get("consistency") and not any(config.augment.values()):
        raise ValueError(
            "consistency compares images with augmented ones: give augment, such as {cutout: 0.5}"
        )


def main(config: Adversarial) -> None:
    """Train, resume or check, as the configuration says.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    check(config)
    disable_progress_bar()
    launch(Training, config)


if __name__ == "__main__":
    run(main, Adversarial)
