"""Train the image head against a critic: caption and noise in, patches out, one pass per image.

    make train
    python train/adversarial.py --config configs/adversarial/digits.yaml
    accelerate launch train/adversarial.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/adversarial.py --config ...

The same command again resumes where the last checkpoint stopped; --restart begins anew, --dry-run prints the
resolved configuration, Ctrl-C and SIGTERM save and stop.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import draw_augmentation, load_images, make_generator
from rope_mm.evaluation.image_grid import save_sheet
from rope_mm.evaluation.images import IMAGE_EVALUATORS
from rope_mm.models import ImageBatcher, load_tokenizer
from rope_mm.models.backends import with_attention
from rope_mm.models.configuration_rope_mm import config_for
from rope_mm.training.adversarial import AdversarialBatch, AdversarialOptim, AdversarialTrainer
from rope_mm.training.config import at_least, run
from rope_mm.training.ema import Ema
from rope_mm.training.gan import GANConfig
from rope_mm.training.loop import Run, fingerprint, launch


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, as `load_splits` finds them, and the names of their columns."""

    path: str = "digits"
    image: str = "image"
    caption: str = "caption"  # "" to draw without captions
    label: str = ""  # "" where there is none; then drawn images are shown but not judged
    size: int = 8
    channels: int = 1
    cache_in_memory: bool = False  # decode all images at the start and keep their bytes
    background: str = "white"  # the colour under what is transparent, where channels is 1 or 3


@dataclass(frozen=True, kw_only=True)
class Adversarial(Run):
    """Train an image head against a critic; the same command again resumes, --restart begins anew."""

    out: str = "runs/adversarial"
    batch: int = 64  # images a process and step
    accumulate: int = 1  # batches whose gradients make a step
    critic_steps: int = 1
    tokenizer: str = "bytes"
    data: Data = field(default_factory=Data)
    rope: dict[str, Any] = field(default_factory=lambda: {"scheme": "rope-tv"})
    model: dict[str, Any] = field(default_factory=dict)  # fields of RopeMMConfig, for both players
    loss: GANConfig = field(default_factory=GANConfig)
    optim: AdversarialOptim = field(default_factory=AdversarialOptim)
    augment: dict[str, float] = field(default_factory=dict)  # strengths of AUGMENTATIONS, for real and drawn
    attention: str = "sdpa"  # or eager, or on GPUs flex_attention
    compile: str = ""  # a backend of torch.compile, such as inductor; "" compiles nothing
    checkpointing: bool = False  # blocks computed anew in the backward, to save memory
    ema: float = 0.995
    exam: str = "caption"  # of IMAGE_EXAMS
    judged: int = 1_000  # images drawn for an evaluation


EXAMPLES = 10_000  # images of each split, at most, that the judge sees


class Training:
    """Both players, what they learn from and what they are judged by."""

    def __init__(self, config: Adversarial, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        model = config_for(tokenizer, config.data.channels, config.rope, config.model)
        model = with_attention(model, config.attention, accelerator.device)
        self.canvas = ImageBatcher(model, tokenizer, config.data.size)
        self.images, self.held_out = load_images(**asdict(config.data))
        self.duel = AdversarialTrainer(
            model, config.loss, config.optim, accelerator, config.compile, config.checkpointing
        )
        self.average = Ema(self.duel.unwrapped_generator, config.ema)
        accelerator.register_for_checkpointing(self.average)
        self.pipeline = self.canvas.pipeline(self.average.model, captioned=bool(config.data.caption))
        self.exam, self.tokens, self.flops = None, 0, 0.0
        labels, asked = self.images.labels, self.held_out.labels
        if labels is not None and asked is not None and accelerator.is_main_process:
            most = max(EXAMPLES, config.judged)
            known, unknown = range(min(len(labels), most)), range(min(len(asked), EXAMPLES))
            train = self.images.images(known), labels[: len(known)]
            test = self.held_out.images(unknown), asked[: len(unknown)]
            self.exam = IMAGE_EVALUATORS[config.exam](train, test, config.judged, config.seed)

    def batch(self, turn: int) -> AdversarialBatch:
        """This process's share of the turn-th batch; its random numbers come from (seed, turn, process)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, seed, device = self.config.batch, self.config.seed, self.accelerator.device
        rows = self.images.order.batch(seed, turn, size * world)[rank::world]
        sequences = self.canvas.sequences(
            self.images.draw_captions(rows, make_generator(seed, "captions", turn, rank))
        )
        noise = self.canvas.noise(make_generator(seed, "noise", turn, rank), size)
        real = self.canvas.to_patches(self.images.images(rows))
        probes = make_generator(seed, "probes", turn, rank, device=device)
        return AdversarialBatch(
            sequences.to(device), real.to(device), noise.to(device), self.augmentation(turn), probes
        )

    def augmentation(self, turn: int) -> Callable[[Tensor], Tensor]:
        """How patches of the turn-th batch are changed before the critic sees them."""
        config, process = self.config, self.accelerator
        draws = make_generator(config.seed, "augment", turn, process.process_index)
        change = draw_augmentation(config.augment, config.batch, draws, process.device)
        if not config.augment:
            return change
        return lambda patches: self.canvas.to_patches(change(self.canvas.to_images(patches)))

    def identity(self) -> str:
        """All that the run depends on; a batch is of a process, so that their number, too."""
        return f"# processes: {self.accelerator.num_processes}\n{fingerprint(self.config)}"

    def begin(self, step: int) -> None:
        """Nothing: what a step reads is made when it begins."""

    def rounds(self, step: int) -> list[list[AdversarialBatch]]:
        """The batches of a step: `accumulate` for each of `critic_steps` updates."""
        parts, turns = self.config.accumulate, self.config.critic_steps
        return [
            [self.batch(turn * parts + part) for part in range(parts)]
            for turn in range(step * turns, (step + 1) * turns)
        ]

    def step(self, step: int) -> dict[str, Tensor]:
        """`critic_steps` updates of the critic, then one of the generator; what they lost."""
        self.duel.set_rates(step / self.config.steps)
        rounds = self.rounds(step)
        own = sum(int(batch.sequences.mask.sum()) for parts in rounds for batch in parts)
        self.tokens += own * self.accelerator.num_processes  # about: their captions differ
        terms = self.duel.play(rounds)
        self.average.update(self.duel.unwrapped_generator)
        return terms

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """What this process reads in a step, as it is kept where a number is not finite."""
        read = [batch for parts in self.rounds(step) for batch in parts]
        return [vars(batch.sequences) | {"real": batch.real, "noise": batch.noise} for batch in read]

    def look(self, path: Path) -> dict[str, float]:
        """Draw a contact sheet with the averaged generator; its marks, if there is an exam."""
        if not self.accelerator.is_main_process:
            return {}
        rows = self.held_out.examples(10)
        captions = [caption for caption in rows for _ in range(10)]
        save_sheet(
            path.with_suffix(".png"),
            self.generate(captions, make_generator("sheet")),
            rows,
        )
        if self.exam is None:
            return {}
        asked = [self.held_out.captions[row] for row in self.exam.rows]
        return self.exam.evaluate(self.generate(asked, make_generator("exam")))

    def generate(self, captions: list[str], generator: torch.Generator) -> Tensor:
        """Images (n, ch, y, x) of captions, by the averaged generator."""
        return self.pipeline(captions, generator=generator, output_type="pt").images

    def save_model(self, path: Path) -> None:
        """Write the averaged generator, as `RopeMMPipeline.from_pretrained` reads it."""
        if self.accelerator.is_main_process:
            self.pipeline.save_pretrained(path)

    def remarks(self) -> dict[str, float]:
        """What real images score in the same exam."""
        floor = self.exam.real_reference if self.exam else {}
        return {f"real_{name}": mark for name, mark in floor.items()}


def check(config: Adversarial) -> None:
    """Refuse numbers that make no run.

    Raises:
        ValueError: with the key and its value.
    """
    at_least(1, config, "batch", "accumulate", "critic_steps", "judged")
    draw_augmentation(config.augment, 1, torch.Generator())
    if config.loss.penalties.get("consistency") and not any(config.augment.values()):
        raise ValueError(
            "consistency compares images with augmented ones: give augment, such as {cutout: 0.5}"
        )
    if not 0 < config.optim.until <= 1:
        raise ValueError(f"optim.until must be in (0, 1], not {config.optim.until}")


def main(config: Adversarial) -> None:
    """Train, resume or print, as the configuration says.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    check(config)
    disable_progress_bar()
    launch(Training, config, gradient_accumulation_steps=config.accumulate)


if __name__ == "__main__":
    run(main, Adversarial)
