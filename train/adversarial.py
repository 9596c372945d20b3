"""Train the image head against a critic: caption and noise in, patches out, one pass per image.

    make train
    python train/adversarial.py --config configs/adversarial/digits.yaml
    accelerate launch train/adversarial.py --config configs/adversarial/digits.yaml
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/adversarial.py --config configs/adversarial/digits.yaml

The same command again resumes where the last checkpoint stopped; --restart begins anew, --dry-run prints the
resolved configuration, Ctrl-C saves and stops.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.data import CaptionedImages, batch_indices, load_images, seeded
from rope_mm.losses import DISTANCES, GAN_LOSSES, PENALTIES, input_gradients, twice_differentiable
from rope_mm.metrics import Exam, prepare_exam
from rope_mm.models import Batch, Canvas, RopeMMCritic, RopeMMForConditionalGeneration, load_tokenizer, read_config
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


@dataclass
class Players:
    """The two models, the generator's average, and their optimisers."""

    generator: nn.Module
    critic: nn.Module
    average: Ema
    generator_optim: torch.optim.Optimizer
    critic_optim: torch.optim.Optimizer


def build(config: Adversarial, accelerator: Accelerator) -> tuple[Players, Canvas]:
    """Players with weights of the seed, on their devices, and the canvas they work on."""
    tokenizer = load_tokenizer(config.tokenizer)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "score")}
    settings = {"num_channels": config.data.channels, **config.model, "rope_parameters": config.rope}
    torch.manual_seed(config.seed)
    model_config = read_config(
        vocab_size=len(tokenizer), image_token_id=ids["image"], score_token_id=ids["score"], **settings
    )
    canvas = Canvas(model_config, tokenizer, config.data.size)
    canvas.grid  # refuses a size that patches do not tile, before anything is trained
    generator, critic = RopeMMForConditionalGeneration(model_config), RopeMMCritic(model_config)
    adam = partial(torch.optim.AdamW, betas=config.optim.betas, weight_decay=config.optim.weight_decay)
    prepared = accelerator.prepare(
        generator, critic, adam(generator.parameters(), config.optim.lr), adam(critic.parameters(), config.optim.critic_lr)
    )
    average = Ema(accelerator.unwrap_model(prepared[0]), config.ema)
    accelerator.register_for_checkpointing(average)
    return Players(prepared[0], prepared[1], average, prepared[2], prepared[3]), canvas


@dataclass(frozen=True)
class Minibatch:
    """Real patches and noise (b, n, p) for the same captions, as the generator and as the critic read them."""

    real: Tensor
    noise: Tensor
    blank: Batch
    framed: Batch


def minibatch(
    config: Adversarial, accelerator: Accelerator, canvas: Canvas, images: CaptionedImages, turn: int
) -> Minibatch:
    """This process's share of the turn-th batch; every random number comes from (seed, turn, process)."""
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    rows = batch_indices(len(images), config.batch * world, config.seed, turn)[rank::world]
    captions = [images.captions[row] for row in rows]
    noise = canvas.noise(seeded(config.seed, "noise", turn, rank), config.batch)
    real = canvas.patches(images.images(rows))
    return Minibatch(
        real.to(device), noise.to(device), canvas.blank(captions).to(device), canvas.framed(captions).to(device)
    )


def critic_loss(config: Objective, critic: nn.Module, batch: Minibatch, fake: Tensor) -> dict[str, Tensor]:
    """The critic's loss and the penalties, on real and drawn patches (b, n, p) of the same captions."""
    loss, pair = GAN_LOSSES[config.name], torch.cat([batch.real, fake]).requires_grad_(bool(config.penalties))
    with twice_differentiable() if config.penalties else nullcontext():
        scores = critic(**batch.framed.twice().inputs(), patches=pair).float()
    on_real, on_fake = scores.chunk(2)
    extra = (DISTANCES[config.distance](batch.real, fake), config.strength) if loss.needs_distance else ()
    terms = {"critic": loss.critic(on_real, on_fake, *extra), "real": on_real.mean(), "fake": on_fake.mean()}
    if config.penalties:
        gradients = input_gradients(scores, pair).chunk(2)
        terms |= {name: PENALTIES[name](*gradients) for name in config.penalties}
    return terms


def train_step(
    config: Adversarial, accelerator: Accelerator, players: Players, canvas: Canvas, images: CaptionedImages, step: int
) -> dict[str, float]:
    """`critic_steps` updates of the critic, then one of the generator."""
    rates = (players.generator_optim, config.optim.lr), (players.critic_optim, config.optim.critic_lr)
    for optimizer, rate in rates:
        optimizer.param_groups[0]["lr"] = rate * (1 - (1 - config.optim.final) * step / config.steps)
    critic = accelerator.unwrap_model(players.critic).requires_grad_(True)
    for turn in range(step * config.critic_steps, (step + 1) * config.critic_steps):
        batch = minibatch(config, accelerator, canvas, images, turn)
        fake = players.generator(**batch.blank.inputs(), patches=batch.noise).patches.view_as(batch.real)
        terms = critic_loss(config.loss, players.critic, batch, fake.detach())
        players.critic_optim.zero_grad()
        accelerator.backward(terms["critic"] + sum(g * terms[name] for name, g in config.loss.penalties.items()))
        players.critic_optim.step()
    critic.requires_grad_(False)  # the generator's step needs the critic's gradient by its input alone
    with torch.no_grad():
        on_real = critic(**batch.framed.inputs(), patches=batch.real)
    on_fake = critic(**batch.framed.inputs(), patches=fake)
    terms["generator"] = GAN_LOSSES[config.loss.name].generator(on_real.float(), on_fake.float())
    players.generator_optim.zero_grad()
    accelerator.backward(terms["generator"])
    players.generator_optim.step()
    players.average.update(accelerator.unwrap_model(players.generator))
    return {name: term.item() for name, term in terms.items()}


def row_captions(images: CaptionedImages, rows: int = 10) -> list[str]:
    """Captions to show: the first of each label in order, or the first different ones."""
    keys = images.captions if images.labels is None else images.labels.tolist()
    first = dict(reversed(list(zip(keys, images.captions, strict=True))))
    chosen = list(dict.fromkeys(keys)) if images.labels is None else sorted(first)
    return [first[key] for key in chosen[:rows]]


def look(
    accelerator: Accelerator, players: Players, canvas: Canvas, test: CaptionedImages, exam: Exam | None, path: Path
) -> dict[str, float]:
    """Draw the contact sheet from the averaged generator, and mark its pictures where there is an exam."""
    if not accelerator.is_main_process:
        return {}
    captions = row_captions(test)
    sheet = canvas.draw(players.average.model, [c for c in captions for _ in range(10)], seeded("sheet"))
    save_sheet(path, sheet, captions)
    if exam is None:
        return {}
    asked = [test.captions[row % len(test)] for row in range(len(exam.labels))]
    return exam.mark(canvas.draw(players.average.model, asked, seeded("exam")))


def train(config: Adversarial, accelerator: Accelerator, out: Path) -> dict[str, float]:
    """Train from the last checkpoint on, or from the start; the last marks."""
    players, canvas = build(config, accelerator)
    images, test = load_images(**asdict(config.data))
    step, marks, exam = resume(out, accelerator), {}, None
    if images.labels is not None and test.labels is not None:
        exam = prepare_exam((images.images(), images.labels), (test.images(), test.labels), config.judged, config.seed)
    with Stop() as stop, Log(out, config.steps, step, desc=config.out, main=accelerator.is_main_process) as log:
        while step < config.steps and not stop.asked:
            terms = train_step(config, accelerator, players, canvas, images, step)
            step += 1
            last = step == config.steps
            if step % config.log_every == 0 or last:
                log(step, **terms)
            if step % config.sample_every == 0 or last:
                sheet = out / "samples" / f"step-{step:06d}.png"
                marks = look(accelerator, players, canvas, test, exam, sheet)
                log(step, **marks)
            if step % config.checkpoint_every == 0 or last or stop.asked:
                save(out, step, accelerator)
    if step < config.steps:
        raise KeyboardInterrupt
    if not marks:  # the run was whole already
        marks = look(accelerator, players, canvas, test, exam, out / "samples" / f"step-{step:06d}.png")
    players.average.model.save_pretrained(out / "model")
    canvas.tokenizer.save_pretrained(out / "model")
    return marks | {f"real_{name}": mark for name, mark in (exam.floor if exam else {}).items()}


def main(config: Adversarial) -> None:
    """Train, resume or print, as the configuration says."""
    resolved = dump(replace(config, restart=False, dry_run=False))
    if config.dry_run:
        print(resolved, end="")
        return
    if config.threads:
        torch.set_num_threads(config.threads)
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
