"""Pretrain on documents of words, pictures and clips in any order: to write, and to draw.

    python train/pretrain.py --config configs/pretrain/tiny.yaml
    accelerate launch train/pretrain.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/pretrain.py --config ...

The same command again resumes where the last checkpoint stopped; --restart begins anew, --dry-run prints the
resolved configuration, Ctrl-C saves and stops. OUT/model is then for train/evaluate.py.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import Documents, load_splits, seeded
from rope_mm.models import (
    IMAGE_TOKEN,
    RopeMMCritic,
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    load_tokenizer,
    read_config,
)
from rope_mm.models.duel import Objective
from rope_mm.models.objectives import HEADS
from rope_mm.models.packing import Pack, Packer, moved
from rope_mm.models.rival import Rival
from rope_mm.models.telling import Form, Teller, show
from rope_mm.run import checkpoint
from rope_mm.run.config import dump, run
from rope_mm.run.ema import Ema
from rope_mm.run.folder import open_folder
from rope_mm.run.loop import train


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where rows come from, and how they are told: columns in braces, {image:draw} is to be drawn."""

    paths: list[str] = field(default_factory=lambda: ["digits"])
    templates: list[str] = field(
        default_factory=lambda: ["{caption}{image:draw}", "{image} what is it? {caption}"]
    )
    size: int = 8
    channels: int = 1
    join: int = 1  # rows in a document


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW; rates rise over `warm_up` steps, then fall along half a cosine to `final` of themselves."""

    lr: float = 2e-3
    critic_lr: float = 2e-3
    warm_up: int = 100
    final: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    critic_betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0  # the longest gradient; 0 for any


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain on documents of words and pictures; the same command again resumes, --restart begins anew."""

    out: str = "runs/pretrain"
    seed: int = 0
    steps: int = 2_000
    batch: int = 64  # documents a step, of all processes together
    length: int = 256  # tokens, drafts included, that documents are packed to
    tokenizer: str = "bytes"
    data: Data = field(default_factory=Data)
    rope: dict[str, Any] = field(default_factory=lambda: {"scheme": "rope-tv-causal"})
    model: dict[str, Any] = field(default_factory=dict)  # fields of RopeMMConfig
    head: str = "flow"  # mse, flow or adversarial
    picture_weight: float = 1.0  # of the loss of pictures, that of words being 1
    loss: Objective = field(default_factory=Objective)  # of the adversarial head
    optim: Optim = field(default_factory=Optim)
    ema: float = 0.995
    log_every: int = 10
    sample_every: int = 500
    checkpoint_every: int = 500
    workers: int = 0  # processes that prepare batches ahead
    threads: int = 0  # of torch on the CPU; 0 leaves them to torch
    restart: bool = False
    dry_run: bool = False


class Share(Dataset):
    """This process's documents of every step, packed; what is random is so by (seed, step, document)."""

    def __init__(self, config: Pretrain, documents: Documents, packer: Packer, world: int = 1, rank: int = 0):
        self.config, self.documents, self.packer = config, documents, packer
        self.world, self.rank = world, rank

    def __getitem__(self, step: int) -> Pack:
        seed, batch = self.config.seed, self.config.batch
        rows = self.documents.batch(seed, step, batch)
        mine = range(self.rank, batch, self.world)
        generators = [seeded(seed, "document", step, number) for number in mine]
        told = [self.documents.tell(rows[n], g) for n, g in zip(mine, generators, strict=True)]
        return self.packer(told, generators)

    def packs(self, steps: range) -> Iterator[Pack]:
        """The packs of these steps, made ahead by workers."""
        return iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=self.config.workers))


class Training:
    """The model, what it learns from, and the critic where the head has one."""

    def __init__(self, config: Pretrain, accelerator: Accelerator):
        self.config, self.accelerator, self.head = config, accelerator, HEADS[config.head]
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        settings = read_config(
            **{"num_channels": config.data.channels, **config.model},
            vocab_size=len(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            eos_token_id=tokenizer.eos_token_id,
            rope_parameters=config.rope,
        )
        self.processor = RopeMMProcessor.from_config(settings, tokenizer)
        splits = [load_splits(path) for path in config.data.paths]
        chosen = config.data.templates, config.data.size, config.data.channels, config.data.join
        documents = Documents([split["train"] for split in splits], *chosen)
        self.held_out = Documents([split["test"] for split in splits], *chosen)
        critical = self.head.weigh is None
        packer = Packer(self.processor, config.length, self.head.times, critical)
        self.share = Share(config, documents, packer, accelerator.num_processes, accelerator.process_index)
        self.exam = Share(replace(config, seed=-1), self.held_out, replace(packer, whole=False))
        model = RopeMMForConditionalGeneration(settings)
        self.average = Ema(model, config.ema)
        accelerator.register_for_checkpointing(self.average)
        self.model, self.optimizer = self.prepare(model, config.optim.betas)
        self.rival = None
        if critical:
            critic = self.prepare(RopeMMCritic(settings), config.optim.critic_betas)
            self.rival = Rival(*critic, config.loss, accelerator)
        self.tokens = 0
        form = Form.of(self.held_out, config.data.templates, self.head.steps)
        self.teller = Teller(self.average.model, self.processor, form)

    def prepare(self, model: torch.nn.Module, betas: tuple[float, float]):
        """A model and its optimiser, on their devices."""
        decay = self.config.optim.weight_decay
        return self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=decay)
        )

    def begin(self, step: int) -> None:
        """Make ready to go on from a step."""
        self.packs = self.share.packs(range(step, self.config.steps))

    def step(self, step: int) -> dict[str, Tensor]:
        """An update of the model, and of its critic; what all processes lost."""
        self.set_rates(step)
        pack = moved(next(self.packs), self.accelerator.device)
        counts = [pack.tokens, pack.words, len(pack.noise), len(pack.whole.patches) if pack.whole else 0]
        tokens, words, patches, documents = self.total(torch.tensor(counts, dtype=torch.float64)).tolist()
        self.tokens += int(tokens)
        out = self.model(**pack.inputs(), labels=pack.labels, num_items_in_batch=max(words, 1))
        drawn = out.patches[pack.draft]
        terms, seen = {"words": out.loss}, {}
        if self.rival is None:
            terms[self.config.head] = self.head.loss(drawn, pack.target, pack.time) / max(patches, 1)
        else:
            whole = cast(Any, pack.whole)
            part = len(whole.patches) / documents
            seen = self.rival.update(whole, drawn.detach(), part * self.accelerator.num_processes)
            seen = {name: term * part for name, term in seen.items()}
            terms["adversarial"] = self.rival.judge(whole, drawn) * part
        lost = self.lost(step, terms | seen)
        total = terms["words"] + self.config.picture_weight * terms[self.config.head]
        self.optimizer.zero_grad()
        self.accelerator.backward(total * self.accelerator.num_processes)  # of which DDP takes the mean
        if self.config.optim.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.average.update(self.model)
        return lost

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' numbers."""
        if self.accelerator.num_processes == 1:
            return numbers
        return cast(Tensor, self.accelerator.reduce(numbers.to(self.accelerator.device), "sum"))

    def lost(self, step: int, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all processes lost.

        Raises:
            ValueError: a loss that is not finite.
        """
        losses = self.total(torch.stack([term.detach().float() for term in terms.values()]))
        lost = dict(zip(terms, losses, strict=True))
        if bad := [name for name, loss in lost.items() if not loss.isfinite()]:
            raise ValueError(
                f"the loss of {bad[0]} is not finite at step {step + 1}, on rows "
                f"{self.share.documents.batch(self.config.seed, step, self.config.batch)[0]} and on; "
                "resume from the last checkpoint with a lower rate, or look at those rows"
            )
        return lost

    def set_rates(self, step: int) -> None:
        """The learning rates of a step."""
        optim = self.config.optim
        rise = min(1.0, (step + 1) / max(optim.warm_up, 1))
        fall = (1 + math.cos(math.pi * step / self.config.steps)) / 2
        factor = rise * (optim.final + (1 - optim.final) * fall)
        rates = [(self.optimizer, optim.lr)]
        rates += [(self.rival.optimizer, optim.critic_lr)] if self.rival else []
        for optimizer, rate in rates:
            optimizer.param_groups[0]["lr"] = rate * factor

    @torch.no_grad()
    def look(self, path: Path) -> dict[str, float]:
        """Samples and marks of the averaged model on held-out documents."""
        if not self.accelerator.is_main_process:
            return {}
        pack = moved(self.exam[0], self.accelerator.device)
        out = self.average.model(**pack.inputs(), labels=pack.labels)
        marks = {"held_out_words": float(out.loss)}
        if self.rival is None and len(pack.noise):
            lost = self.head.loss(out.patches[pack.draft], pack.target, pack.time) / len(pack.noise)
            marks[f"held_out_{self.config.head}"] = float(lost)
        return marks | show(self.teller, self.held_out, path)

    def save_model(self, path: Path) -> None:
        """Write the averaged model, its processor and what it was taught, for `evaluate.py`."""
        if self.accelerator.is_main_process:
            self.teller.save(path)


def check(config: Pretrain) -> None:
    """Refuse numbers that make no run.

    Raises:
        ValueError: with the key and its value.
    """
    for name in ("steps", "batch", "length", "log_every", "sample_every", "checkpoint_every"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if min(config.threads, config.workers) < 0:
        raise ValueError(f"threads and workers must be 0 or more, not {config.threads} and {config.workers}")
    if config.data.join < 1 or not config.data.paths or not config.data.templates:
        raise ValueError("data.join must be at least 1, and data.paths and data.templates name something")
    if "num_channels" in config.model or "rope_parameters" in config.model:
        raise ValueError("model.num_channels is data.channels, and model.rope_parameters are rope: set those")


def main(config: Pretrain) -> None:
    """Train, resume or print, as the configuration says.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    check(config)
    if config.dry_run:
        print(dump(replace(config, dry_run=False)), end="")
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight it saves
    # a process whose documents have no picture leaves weights without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    out, accelerator = Path(config.out), Accelerator(kwargs_handlers=[unused])
    if config.batch < accelerator.num_processes:
        raise ValueError(
            f"batch {config.batch} has no document for some of {accelerator.num_processes} processes"
        )
    training = Training(config, accelerator)  # what cannot be used is refused before the folder is touched
    open_folder(out, dump(replace(config, out="", restart=False)), accelerator, config.restart)
    result = train(training, config, out)
    if accelerator.is_main_process:
        checkpoint.write_text(out / "result.json", json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
        print(f"samples: {out}/samples   model: {out}/model")


if __name__ == "__main__":
    run(main, Pretrain)
