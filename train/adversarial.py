"""Train the image head against a critic: caption and noise in, patches out, one pass per image.

    make train
    python train/adversarial.py --config configs/adversarial/digits.yaml
    accelerate launch train/adversarial.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/adversarial.py --config ...

The same command again resumes where the last checkpoint stopped; --restart begins anew, --dry-run prints the
resolved configuration, Ctrl-C saves and stops.
"""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import CaptionedImages, batch_indices, load_images, seeded
from rope_mm.losses import DISTANCES, GAN_LOSSES, PENALTIES, input_gradients, twice_differentiable
from rope_mm.metrics import prepare_exam
from rope_mm.models import (
    IMAGE_TOKEN,
    Canvas,
    RopeMMCritic,
    RopeMMForConditionalGeneration,
    Sequences,
    load_tokenizer,
    read_config,
)
from rope_mm.run import checkpoint
from rope_mm.run.config import dump, run
from rope_mm.run.ema import Ema
from rope_mm.run.folder import open_folder, resume, save
from rope_mm.run.log import Log
from rope_mm.run.sheet import save_sheet
from rope_mm.run.stop import Stop


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images: "digits", a folder, a parquet file or a hub name, and the names of its columns."""

    path: str = "digits"
    image: str = "image"
    caption: str = "caption"
    label: str = ""  # "" where there is none; then drawn images are shown but not judged
    size: int = 8
    channels: int = 1


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A key of GAN_LOSSES, gammas of PENALTIES, and the distance and strength of gan-qp."""

    name: str = "rpgan"
    penalties: dict[str, float] = field(default_factory=dict)
    distance: str = "l2"
    strength: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW for each player; the rate falls linearly to `final` of itself."""

    lr: float = 1e-3
    critic_lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    final: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Train an image head against a critic; the same command again resumes, --restart begins anew."""

    out: str = "runs/adversarial"
    seed: int = 0
    steps: int = 1_000
    batch: int = 64  # images a process and step
    critic_steps: int = 1
    tokenizer: str = "bytes"
    data: Data = field(default_factory=Data)
    rope: dict[str, Any] = field(default_factory=lambda: {"scheme": "rope-tv"})
    model: dict[str, Any] = field(default_factory=dict)  # fields of RopeMMConfig, for both players
    loss: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    ema: float = 0.995
    log_every: int = 10
    sample_every: int = 500
    judged: int = 1_000  # images drawn for an evaluation
    checkpoint_every: int = 500
    threads: int = 0  # of torch on the CPU; 0 leaves them to torch
    restart: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Batch:
    """Captions as sequences, with real patches and noise (b, n, p) for them."""

    sequences: Sequences
    real: Tensor
    noise: Tensor


class Training:
    """Both players, their optimisers, what they learn from and what they are judged by."""

    def __init__(self, config: Adversarial, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        model = read_config(
            **{"num_channels": config.data.channels, **config.model},
            vocab_size=len(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            rope_parameters=config.rope,
        )
        self.canvas = Canvas(model, tokenizer, config.data.size)
        self.loss = GAN_LOSSES[config.loss.name]
        self.distance = DISTANCES[config.loss.distance]
        self.penalties = {name: gamma for name, gamma in config.loss.penalties.items() if PENALTIES[name]}
        self.images, self.held_out = load_images(**asdict(config.data))
        self.generator, self.generator_optim = self.prepare(RopeMMForConditionalGeneration(model))
        self.critic, self.critic_optim = self.prepare(RopeMMCritic(model))
        self.average = Ema(accelerator.unwrap_model(self.generator), config.ema)
        accelerator.register_for_checkpointing(self.average)
        self.exam = None
        labels, asked = self.images.labels, self.held_out.labels
        if labels is not None and asked is not None:
            pictures = (self.images.images(), labels), (self.held_out.images(), asked)
            self.exam = prepare_exam(*pictures, config.judged, config.seed)

    def prepare(self, player: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A player and its optimiser, on their devices."""
        optim = self.config.optim
        return self.accelerator.prepare(
            player,
            torch.optim.AdamW(player.parameters(), betas=optim.betas, weight_decay=optim.weight_decay),
        )

    def batch(self, turn: int) -> Batch:
        """This process's share of the turn-th batch; its random numbers come from (seed, turn, process)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, seed, device = self.config.batch, self.config.seed, self.accelerator.device
        rows = batch_indices(len(self.images), size * world, seed, turn)[rank::world]
        sequences = self.canvas.sequences([self.images.captions[row] for row in rows])
        noise = self.canvas.noise(seeded(seed, "noise", turn, rank), size)
        real = self.canvas.patches(self.images.images(rows))
        return Batch(sequences.to(device), real.to(device), noise.to(device))

    def step(self, step: int) -> dict[str, float]:
        """`critic_steps` updates of the critic, then one of the generator; what they lost."""
        optim = self.config.optim
        for optimizer, rate in ((self.generator_optim, optim.lr), (self.critic_optim, optim.critic_lr)):
            optimizer.param_groups[0]["lr"] = rate * (1 - (1 - optim.final) * step / self.config.steps)
        turns = self.config.critic_steps
        *earlier, last = range(step * turns, (step + 1) * turns)
        for turn in earlier:
            self.update_critic(self.batch(turn))
        batch = self.batch(last)
        fake, terms = self.update_critic(batch)
        terms["generator"] = self.update_generator(batch, fake)
        self.average.update(self.accelerator.unwrap_model(self.generator))
        return {name: term.item() for name, term in terms.items()}

    def update_critic(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the critic on real and freshly drawn patches (b, n, p) of the same captions."""
        fake = self.generator(**batch.sequences.inputs(), patches=batch.noise).patches.view_as(batch.real)
        self.accelerator.unwrap_model(self.critic).requires_grad_(True)
        pair = torch.cat([batch.real, fake.detach()]).requires_grad_(bool(self.penalties))
        with twice_differentiable() if self.penalties else nullcontext():
            scores = self.critic(**batch.sequences.twice().inputs(), patches=pair).float()
        real_scores, fake_scores = scores.chunk(2)
        extra = ()
        if self.loss.needs_distance:
            extra = self.distance(batch.real, fake.detach()), self.config.loss.strength
        terms = {"critic": self.loss.critic(real_scores, fake_scores, *extra)}
        total = terms["critic"]
        if self.penalties:
            gradients = input_gradients(scores, pair).chunk(2)
            terms |= {name: PENALTIES[name](*gradients) for name in self.penalties}
            total = total + sum(gamma * terms[name] for name, gamma in self.penalties.items())
        self.critic_optim.zero_grad()
        self.accelerator.backward(total)
        self.critic_optim.step()
        return fake, terms | {"real": real_scores.mean(), "fake": fake_scores.mean()}

    def update_generator(self, batch: Batch, fake: Tensor) -> Tensor:
        """One step of the generator by the critic's gradient at what it has drawn."""
        # no gradient to the critic's weights is wanted, so it is neither made nor synchronised
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        with torch.no_grad():
            real_scores = critic(**batch.sequences.inputs(), patches=batch.real).float()
        fake_scores = critic(**batch.sequences.inputs(), patches=fake).float()
        loss = self.loss.generator(real_scores, fake_scores)
        self.generator_optim.zero_grad()
        self.accelerator.backward(loss)
        self.generator_optim.step()
        return loss

    def look(self, path: Path) -> dict[str, float]:
        """Draw a contact sheet with the averaged generator; its marks, if there is an exam."""
        if not self.accelerator.is_main_process:
            return {}
        rows = row_captions(self.held_out)
        captions = [caption for caption in rows for _ in range(10)]
        save_sheet(path, self.canvas.draw(self.average.model, captions, seeded("sheet")), rows)
        if self.exam is None:
            return {}
        asked = [self.held_out.captions[row % len(self.held_out)] for row in range(self.config.judged)]
        return self.exam.mark(self.canvas.draw(self.average.model, asked, seeded("exam")))

    def save_model(self, path: Path) -> None:
        """Write the averaged generator and its tokenizer, as `from_pretrained` reads them."""
        if self.accelerator.is_main_process:
            self.average.model.save_pretrained(path)
            self.canvas.tokenizer.save_pretrained(path)


def row_captions(images: CaptionedImages, rows: int = 10) -> list[str]:
    """Captions to show: the first of each label in order, or the first different ones."""
    keys = images.captions if images.labels is None else images.labels.tolist()
    first = dict(reversed(list(zip(keys, images.captions, strict=True))))
    chosen = list(dict.fromkeys(keys)) if images.labels is None else sorted(first)
    return [first[key] for key in chosen[:rows]]


def train(config: Adversarial, accelerator: Accelerator, out: Path) -> dict[str, float]:
    """Train from the last checkpoint on, or from the start; the marks at the end.

    Raises:
        KeyboardInterrupt: somebody asked to stop; a checkpoint was saved.
    """
    training, main = Training(config, accelerator), accelerator.is_main_process
    step, marks = resume(out, accelerator), {}
    with Stop() as stop, Log(out, config.steps, step, desc=config.out, main=main) as log:
        while step < config.steps and not stop.asked:
            terms = training.step(step)
            step += 1
            last = step == config.steps
            if last or step % config.log_every == 0:
                log(step, **terms)
            if last or step % config.sample_every == 0:
                marks = training.look(out / "samples" / f"step-{step:06d}.png")
                log(step, **marks)
            if last or step % config.checkpoint_every == 0 or stop.asked:
                save(out, step, accelerator)
    if step < config.steps:
        raise KeyboardInterrupt
    marks = marks or training.look(
        out / "samples" / f"step-{step:06d}.png"
    )  # of a run that was whole already
    training.save_model(out / "model")
    floor = training.exam.floor if training.exam else {}
    return marks | {f"real_{name}": mark for name, mark in floor.items()}


def main(config: Adversarial) -> None:
    """Train, resume or print, as the configuration says.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    for name in ("steps", "batch", "critic_steps", "log_every", "sample_every", "checkpoint_every", "judged"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    resolved = dump(replace(config, restart=False, dry_run=False))
    if config.dry_run:
        print(resolved, end="")
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight it saves
    out, accelerator = Path(config.out), Accelerator()
    if accelerator.is_main_process:
        open_folder(out, resolved, config.restart)
    accelerator.wait_for_everyone()
    result = train(config, accelerator, out)
    if accelerator.is_main_process:
        checkpoint.write_text(out / "result.json", json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
        print(f"drawn: {out}/samples/step-{config.steps:06d}.png   model: {out}/model")


if __name__ == "__main__":
    run(main, Adversarial)
