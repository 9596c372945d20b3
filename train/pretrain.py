"""Pretrain on documents of words, pictures and clips in any order: to write, and to draw.

    python train/pretrain.py --config configs/pretrain/tiny.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml train/pretrain.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/pretrain.py --config ...

The same command again resumes where the last checkpoint stopped; --restart begins anew, --dry-run prints the
resolved configuration, Ctrl-C and SIGTERM save and stop. OUT/model is then for train/evaluate.py. The batch
is that of all processes together, so that a run may go on with another number of them.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import load_documents, make_generator
from rope_mm.data.documents import DocumentDataset
from rope_mm.evaluation.samples import write_samples
from rope_mm.evaluation.sprites import SPRITE_EVALUATORS
from rope_mm.losses import GAN_LOSSES
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer
from rope_mm.models.backends import with_attention
from rope_mm.models.configuration_rope_mm import config_for
from rope_mm.models.pipeline import GenerationSpec, RopeMMPipeline
from rope_mm.models.tokenizers import check_words
from rope_mm.training.config import at_least, run
from rope_mm.training.dataset import PackedDocumentDataset
from rope_mm.training.ema import Count, Ema
from rope_mm.training.gan import GANConfig
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.loop import Run, fingerprint, launch
from rope_mm.training.packing import Packer, to_device
from rope_mm.training.pretrain import BatchTotals, PretrainOptim, PretrainTrainer
from rope_mm.training.throughput import FlopCounter
from rope_mm.training.warm_start import check_start, load_start

# what weights and optimisers depend on: a run that starts from another one's keeps it
KEPT = ["tokenizer", "data.channels", "data.streaming", "rope", "model", "head"]
KEPT += ["optim.betas", "optim.critic_betas", "optim.weight_decay"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where rows come from, and how they are told: columns in braces, {image:generate} is to be drawn."""

    paths: list[str] = field(default_factory=lambda: ["digits"])
    templates: list[str] = field(
        default_factory=lambda: ["{caption}{image:generate}", "{image} what is it? {caption}"]
    )
    where: dict[str, list[Any]] = field(default_factory=dict)  # column -> its values in the rows to take
    size: int = 8
    channels: int = 1
    background: str = "white"  # the colour under what is transparent, where channels is 1 or 3
    join: int = 1  # rows in a document
    streaming: bool = False  # read rows as they come, and hold only some
    shuffle: int = 1_000  # rows of streams that are shuffled together; 0 leaves them as they are
    held_out: int = 256  # rows of a stream, the first ones of its test split or else its own, for samples
    strict: bool = False  # stop at what cannot be read or is too long, where otherwise it is left out


@dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Pretrain on documents of words and pictures; the same command again resumes, --restart begins anew."""

    out: str = "runs/pretrain"
    start: str = ""  # the out of another run, done: its words, weights, average, critic and optimisers
    steps: int = 2_000
    batch: int = 64  # documents a step, of all processes together
    accumulate: int = 1  # parts of them that a process reads one after another
    length: int = 256  # tokens, drafts included, that documents are packed to
    tokenizer: str = "bytes"  # or words, of rows that data.where leaves out, too; a folder or a hub name
    data: Data = field(default_factory=Data)
    rope: dict[str, Any] = field(default_factory=lambda: {"scheme": "rope-tv-causal"})
    model: dict[str, Any] = field(default_factory=dict)  # fields of RopeMMConfig
    head: str = "flow"  # mse, flow or adversarial
    picture_weight: float = 1.0  # of the loss of pictures, that of words being 1
    guidance: float = 1.0  # by words in drawing; above 1 some documents must draw without words
    loss: GANConfig = field(default_factory=GANConfig)  # of the adversarial head
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    attention: str = "sdpa"  # or eager, or on GPUs flex_attention
    compile: str = ""  # a backend of torch.compile, such as inductor; "" compiles nothing
    checkpointing: bool = False  # blocks computed anew in the backward, to save memory
    ema: float = 0.995
    workers: int = 0  # processes that prepare batches ahead

    free: ClassVar[tuple[str, ...]] = (*Run.free, "workers", "data.strict")


class Training:
    """The model, what it learns from, and the critic where the head has one."""

    def __init__(self, config: Pretrain, accelerator: Accelerator):
        if config.batch < (turns := accelerator.num_processes * config.accumulate):
            raise ValueError(f"batch {config.batch} has no document for some of {turns} turns of processes")
        if turns > 1 and IMAGE_HEADS[config.head].critical and GAN_LOSSES[config.loss.name].of_means:
            raise ValueError(
                f"loss.name {config.loss.name} compares scores with means over the batch, of which each of "
                f"{turns} turns of processes reads a part; take one process and accumulate 1, or rpgan"
            )
        self.config, self.accelerator, self.head = config, accelerator, IMAGE_HEADS[config.head]
        chosen = asdict(config.data)
        del chosen["strict"]
        documents, self.held_out = load_documents(**chosen)
        tokenizer = take_words(config, documents) if config.start else find_words(config, documents)
        torch.manual_seed(config.seed)
        settings = config_for(tokenizer, config.data.channels, config.rope, config.model)
        settings = with_attention(settings, config.attention, accelerator.device)
        self.processor = RopeMMProcessor.from_config(settings, tokenizer)
        packer = Packer(self.processor, config.length, self.head.times, self.head.critical)
        every = accelerator.num_processes, accelerator.process_index, config.accumulate
        self.feed = PackedDocumentDataset(documents, packer, config.seed, config.batch, *every)
        self.exam = PackedDocumentDataset(
            self.held_out, replace(packer, whole=False), config.seed, config.batch
        )
        model = RopeMMForConditionalGeneration(settings)
        self.average, self.left_out = Ema(model, config.ema), Count()
        how = accelerator, config.picture_weight, config.compile, config.checkpointing
        self.learner = PretrainTrainer(model, config.head, config.optim, config.loss, *how)
        stream = [documents] if config.data.streaming else []
        accelerator.register_for_checkpointing(self.average, self.left_out, *stream)
        self.tokens, self.flops, self.cost = 0, 0.0, FlopCounter.of(self.average.model)
        form = GenerationSpec.of(self.held_out, config.data.templates, self.head.steps, config.guidance)
        self.teller = RopeMMPipeline(self.average.model, self.processor, form)

    def identity(self) -> str:
        """All that the run depends on; a batch is of all processes, however many they are."""
        return fingerprint(self.config)

    def begin(self, step: int) -> None:
        """Make ready to go on from a step."""
        if self.config.start and not step:
            load_start(Path(self.config.start), self.accelerator)
            self.left_out.count, self.feed.documents.mark = 0, None
        self.readings = self.feed.readings(step, self.config.steps, self.config.workers)

    def step(self, step: int) -> dict[str, Tensor]:
        """An update of the model, and of its critic; what all processes lost."""
        self.learner.set_rates(step, self.config.steps)
        readings = [next(self.readings) for _ in range(self.config.accumulate)]
        self.feed.documents.mark = readings[-1].mark  # which a worker made
        left_out = [reason for reading in readings for reason in reading.left_out]
        missing = self.name(left_out)
        packs = [to_device(reading.pack, self.accelerator.device) for reading in readings]
        counts = torch.tensor([(*pack.counts, 0) for pack in packs], dtype=torch.float64).sum(0)
        counts[-1] = missing
        tokens, pairs, *totals, missing = self.total(counts).tolist()
        if step == 0 and missing == self.config.batch:
            raise ValueError(
                f"none of the first {self.config.batch} documents can be learned from: {left_out[0]}"
            )
        self.tokens += int(tokens)
        self.flops += self.cost.flops(tokens, pairs)  # of the model; a critic's are its rival's
        self.left_out.count += int(missing)
        process = self.accelerator
        probes = make_generator(
            self.config.seed, "probes", step, process.process_index, device=process.device
        )
        terms = self.learner.learn(packs, BatchTotals(*totals), probes)
        self.average.update(self.learner.model)
        losses = self.total(torch.stack([term.float() for term in terms.values()]))
        lost = dict(zip(terms, losses, strict=True))
        return lost | ({"left_out": torch.tensor(self.left_out.count)} if self.left_out.count else {})

    def name(self, left_out: list[str]) -> int:
        """Say which documents this process leaves out, and why; how many.

        Raises:
            ValueError: the first of them, where data.strict is set.
        """
        if left_out and self.config.data.strict:
            raise ValueError(
                f"{left_out[0]}; repair it, or go on without its document by --data.strict false"
            )
        for reason in left_out:
            print(f"left out: {reason}", file=sys.stderr, flush=True)
        return len(left_out)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' numbers."""
        if self.accelerator.num_processes == 1:
            return numbers
        return cast(Tensor, self.accelerator.reduce(numbers.to(self.accelerator.device), "sum"))

    def batches(self, step: int) -> list[Any]:
        """The rows of a step's documents, and this process's share as the model reads it."""
        parts = self.config.accumulate
        packs = [self.feed[turn].pack for turn in range(step * parts, (step + 1) * parts)]
        rows = self.feed.documents.batch(self.config.seed, step, self.config.batch)
        return [{"rows": rows, **pack.inputs(), "labels": pack.labels} for pack in packs]

    @torch.no_grad()
    def look(self, path: Path) -> dict[str, float]:
        """Samples and marks of the averaged model on held-out documents."""
        if not self.accelerator.is_main_process:
            return {}
        pack = to_device(self.exam[0].pack, self.accelerator.device)
        out = self.average.model(**pack.inputs(), labels=pack.labels)
        marks = {"held_out_words": float(out.loss)} if pack.words else {}
        if self.learner.rival is None and len(pack.noise):
            lost = self.head.loss(out.patches[pack.draft], pack.target) / len(pack.noise)
            marks[f"held_out_{self.config.head}"] = float(lost)
        for source in filter(SPRITE_EVALUATORS.__contains__, self.config.data.paths):
            marks |= SPRITE_EVALUATORS[source].evaluate(self.teller, self.held_out)
        return marks | write_samples(self.teller, self.held_out, path)

    def save_model(self, path: Path) -> None:
        """Write the averaged model, its processor and what it was taught, for `evaluate.py`."""
        if self.accelerator.is_main_process:
            self.teller.save_pretrained(path)

    def remarks(self) -> dict[str, float]:
        """How many documents could not be read, where some could not."""
        return {"left_out": self.left_out.count} if self.left_out.count else {}


def find_words(config: Pretrain, documents: DocumentDataset) -> PreTrainedTokenizerBase:
    """The tokenizer named; one of the data's words knows those of all rows, also of those left for later."""
    if config.data.where:
        whole: dict[str, Any] = asdict(config.data) | {"where": {}}
        del whole["strict"]
        documents, _ = load_documents(**whole)
    return load_tokenizer(config.tokenizer, documents.texts())


def take_words(config: Pretrain, documents: DocumentDataset) -> PreTrainedTokenizerBase:
    """The tokenizer of the run to start from.

    Raises:
        ValueError: one that does not fit, documents with words that it lacks.
    """
    check_start(start := Path(config.start), fingerprint(config), KEPT)
    tokenizer = load_tokenizer(str(start / "model"))
    if config.tokenizer == "words":
        check_words(tokenizer, documents.texts())
    return tokenizer


def check(config: Pretrain) -> None:
    """Refuse numbers that make no run.

    Raises:
        ValueError: with the key and its value.
    """
    at_least(1, config, "batch", "accumulate", "length")
    at_least(0, config, "workers")
    at_least(0, config.data, "shuffle")
    at_least(1, config.data, "held_out")
    if config.data.join < 1 or not config.data.paths or not config.data.templates:
        raise ValueError("data.join must be at least 1, and data.paths and data.templates name something")


def main(config: Pretrain, training: type[Training] = Training) -> None:
    """Train, resume or print, as the configuration says.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    check(config)
    disable_progress_bar()
    # a process whose documents have no picture leaves weights without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    launch(training, config, kwargs_handlers=[unused])


if __name__ == "__main__":
    run(main, Pretrain)
