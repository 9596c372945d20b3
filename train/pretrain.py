"""Pretrain on documents of text, images and videos in any order: to generate text and to generate images.

    python train/pretrain.py --config configs/pretrain/tiny.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml train/pretrain.py \\
        --config configs/pretrain/tiny.yaml
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/pretrain.py \\
        --config configs/pretrain/tiny.yaml

The same command again resumes from the last checkpoint, on any number of processes; --restart starts anew,
--dry-run checks and prints the configuration, Ctrl-C and SIGTERM save and stop. train/generate.py generates
with OUTPUT_DIR/model.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import MapDocuments, load_documents, make_generator
from rope_mm.data.documents import DocumentDataset, Unreadable, Visual
from rope_mm.data.pixels import check_background
from rope_mm.data.streaming import StreamingDocuments
from rope_mm.evaluation.contact_sheet import save_data_sheet
from rope_mm.evaluation.samples import document_text, write_samples
from rope_mm.evaluation.sprites import SPRITE_EVALUATORS
from rope_mm.losses import GAN_LOSSES
from rope_mm.models import RopeMMConfig, RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer
from rope_mm.models.attention_backends import ATTENTIONS, with_attention
from rope_mm.models.configuration_rope_mm import config_for
from rope_mm.models.pipeline import GenerationSpec, RopeMMPipeline
from rope_mm.models.tokenizers import check_words
from rope_mm.training.adversarial_loss import GANConfig
from rope_mm.training.checkpoint import Count, Stateful
from rope_mm.training.collator import PackedBatch, Packer, to_device
from rope_mm.training.config import check_options, option, run
from rope_mm.training.distributed import all_reduce_sum
from rope_mm.training.ema import Ema
from rope_mm.training.fingerprint import fingerprint_rows
from rope_mm.training.image_heads import (
    IMAGE_HEADS,
    EnergyConfig,
    FieldConfig,
    FlowConfig,
    check_company,
    unread_settings,
)
from rope_mm.training.loop import Run, fingerprint, launch
from rope_mm.training.metrics_log import say
from rope_mm.training.packed_dataset import PackedDocumentDataset, check_groups
from rope_mm.training.pretrain_trainer import BatchTotals, PretrainOptim, PretrainTrainer
from rope_mm.training.run_dir import Identity, check_initial_run, load_initial_run
from rope_mm.training.throughput import FlopCounter
from rope_mm.training.unread_keys import refuse_unread
from rope_mm.training.vocabulary import find_word_tokenizer, keep_tokenizer

# keys on which weights and optimizers depend: a run that starts from another one keeps them
KEPT = ["tokenizer", "data.channels", "data.streaming", "rope", "model", "image_head"]
KEPT += ["optim.betas", "optim.critic_betas", "optim.weight_decay"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where rows come from, and how templates make documents of them."""

    paths: list[str] = option(["digits"], "embedded sources, folders, files or hub names")
    templates: list[str] = option(
        ["{caption}{image:generate}", "{image} what is it? {caption}"],
        "text with columns in braces; images of {image:generate} are generated, others only read",
    )
    filter: dict[str, list[Any]] = option({}, "column -> its values in the rows to use")
    size: int = option(8, "pixels of a side", minimum=1)
    aspect_ratio: Literal["square", "keep"] = option(
        "square", "of images; keep: their own, in as many patches as the square has at most"
    )
    channels: Literal[1, 3, 4] = option(1, "grey, RGB or RGBA")
    background: str = option(
        "white", "colour under what is transparent, where channels is 1 or 3", check=check_background
    )
    flip: bool = option(False, "mirror each image and video, left to right, half of the times")
    rows_per_document: int = option(1, "rows joined in a document", minimum=1)
    streaming: bool = option(False, "read rows as they come, and hold only some")
    shuffle: int = option(1_000, "rows of streams that are shuffled together; 0: none", minimum=0)
    group_by: str = option(
        "", "column; a step reads groups of rows that agree in it, as drift and wflow need; empty: none"
    )
    group_size: int = option(32, "rows of a group", minimum=2)
    strict: bool = option(False, "stop at a row that cannot be read or is too long, instead of skipping it")
    changed: bool = option(False, "resume although the data has changed")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Pretrain on documents of text and images; the same command again resumes, --restart starts anew."""

    output_dir: str = option("runs/pretrain", "the run's folder; the same command resumes the run in it")
    init_from: str = option(
        "", "output_dir of a finished run, whose weights, average and optimizers are loaded"
    )
    steps: int = option(2_000, "steps of the optimizers; a larger number extends a finished run", minimum=1)
    global_batch_size: int = option(64, "documents of a step, of all processes together", minimum=1)
    gradient_accumulation_steps: int = option(
        1, "parts of a batch that a process computes in turn", minimum=1
    )
    max_length: int = option(256, "tokens of a row of packed documents, noisy copies included", minimum=1)
    tokenizer: str = option("bytes", "bytes, words (of all rows, filtered ones too), a folder or a hub name")
    data: Data = option(Data(), "what to train on")
    rope: dict[str, Any] = option({}, "the scheme and its fields", fill={"scheme": "rope-tv-causal"})
    model: dict[str, Any] = option({}, "fields of RopeMMConfig")
    image_head: str = option("flow", "how images are learned", choices=IMAGE_HEADS)
    image_loss_weight: float = option(1.0, "of the image loss, that of the text loss being 1", minimum=0)
    noisy_copies: int = option(
        0,
        "of each image in a step, each with its own noise and time; 0: as many as the head needs",
        minimum=0,
    )
    predict_prompts: bool = option(
        True, "learn to write the text before an image to generate as well, and not only to read it"
    )
    guidance_scale: float = option(
        1.0, "of sampling; above 1 a template must generate images without text before", minimum=0
    )
    noise_scale: float = option(
        1.0, "of sampling; below 1 images vary less, and more of them show their caption", minimum=0
    )
    loss: GANConfig = option(GANConfig(), "the objective of the adversarial head")
    flow: FlowConfig = option(FlowConfig(), "the times of the flow head")
    energy: EnergyConfig = option(EnergyConfig(), "the loss of the energy head")
    field: FieldConfig = option(FieldConfig(), "the fields of the drift and wflow heads")
    optim: PretrainOptim = option(PretrainOptim(), "the optimizers")
    attn_implementation: str = option("sdpa", "on GPUs also flex or flash attention", choices=ATTENTIONS)
    compile: str = option("", "a backend of torch.compile, such as inductor; empty: none")
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass, to save memory")
    ema_decay: float = option(0.995, "of the average of the model's weights", minimum=0, below=1)
    eval_samples: int = option(
        256, "rows of a stream held out, from its test split or else its own first ones", minimum=1
    )
    num_workers: int = option(0, "processes that prepare batches ahead", minimum=0)

    resumable_keys: ClassVar[tuple[str, ...]] = (
        *Run.resumable_keys,
        *("num_workers", "data.strict", "data.changed"),
    )


class Training:
    """The model, its data, and the critic where the image head needs one.

    Args:
        config: of the run.
        accelerator: devices and processes.

    Raises:
        ValueError: a configuration or data that cannot be used.
    """

    def __init__(self, config: Pretrain, accelerator: Accelerator):
        check_turns(config, accelerator.num_processes)
        self.config, self.accelerator, self.head = config, accelerator, IMAGE_HEADS[config.image_head]
        self.documents, self.held_out = load_data(config.data, config.eval_samples, patch_size(config))
        load = load_initial_tokenizer if config.init_from else find_tokenizer
        tokenizer = load(config, self.documents)
        torch.manual_seed(config.seed)
        settings = config_for(tokenizer, config.data.channels, config.rope, config.model)
        settings = with_attention(settings, config.attn_implementation, accelerator.device)
        self.processor = RopeMMProcessor.from_config(settings, tokenizer)
        self.make_datasets()
        model = RopeMMForConditionalGeneration(settings)
        self.average, self.skipped = Ema(model, config.ema_decay), Count()
        self.named: set[str] = set()
        options = accelerator, config.image_loss_weight, config.compile, config.gradient_checkpointing
        self.head_settings = getattr(config, self.head.settings) if self.head.settings else None
        self.trainer = PretrainTrainer(
            model, config.image_head, config.optim, config.loss, *options, head_settings=self.head_settings
        )
        self.tokens, self.generated, self.flops, self.alone = 0, 0, 0.0, 0.0
        self.counter = FlopCounter.of(self.average.model)
        how = self.head.steps, config.guidance_scale, config.noise_scale
        spec = GenerationSpec.of(self.held_out, config.data.templates, *how)
        self.pipeline = RopeMMPipeline(self.average.model, self.processor, spec)

    def make_datasets(self) -> None:
        """The data sets of packed batches, to train on and held out."""
        config, accelerator = self.config, self.accelerator
        head = self.head
        samples = config.noisy_copies or head.samples
        times = head.timing(config.flow)
        options = times, head.needs_critic, samples, config.predict_prompts, head.conditions
        packer = Packer(self.processor, config.max_length, *options)
        shares = accelerator.num_processes, accelerator.process_index, config.gradient_accumulation_steps
        size, seed = config.global_batch_size, config.seed
        self.dataset = PackedDocumentDataset(self.documents, packer, seed, size, *shares)
        self.eval_dataset = PackedDocumentDataset(
            self.held_out, replace(packer, for_critic=False), seed, size
        )

    def identity(self) -> Identity:
        """All that the run depends on."""
        splits = {"train": self.documents, "held_out": self.held_out}
        data = {name: fingerprint_rows(rows.sources, rows.files) for name, rows in splits.items()}
        by_place = isinstance(self.documents, StreamingDocuments) and any(self.documents.blocks.apart)
        return Identity(fingerprint(self.config), data, self.config.optim.constant, by_place)

    def describe(self) -> str:
        """Scheme, model and data, for a dry run."""
        rows = [
            len(d) if isinstance(d, MapDocuments) else "streamed" for d in (self.documents, self.held_out)
        ]
        lines = [
            f"scheme: {self.processor.scheme}",
            f"model: {self.average.model.num_parameters()} weights",
            f"data: {rows[0]} rows, {rows[1]} held out",
        ]
        if not {"text2image", "text2video"} & self.pipeline.spec.tasks.keys():
            keys = "image_head, image_loss_weight and noise_scale change nothing"
            lines.append(f"images: no template generates one, as {{image:generate}} does, so {keys}")
        return "\n".join(lines)

    def show_data(self, path: Path) -> None:
        """Write a sheet of documents' first images as they are read; of a stream, of held-out ones."""

        def read(split: DocumentDataset, row: int) -> Iterator[tuple[Tensor, str]]:
            with suppress(Unreadable):
                document = split.document([row], make_generator(self.config.seed, "data", row))
                visuals = [part.pixels for part in document if isinstance(part, Visual)]
                for pixels in visuals[:1]:  # of a video its first frame
                    yield pixels if pixels.dim() == 3 else pixels[0], document_text(document)

        train = self.documents if isinstance(self.documents, MapDocuments) else ()
        save_data_sheet(path, train, self.held_out, read, MapDocuments.file_kind)

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside models and optimizers."""
        states: dict[str, Any] = {"ema": self.average, "skipped_documents": self.skipped}
        if self.trainer.critic:
            states["lecam"] = self.trainer.critic.loss.lecam
        if self.config.data.streaming:
            states["stream"] = self.documents
        return states

    def begin(self, step: int) -> None:
        """Load the run to start from, and prepare to read on at a step."""
        if self.config.tokenizer == "words" and self.accelerator.is_main_process:
            keep_tokenizer(Path(self.config.output_dir), self.processor.tokenizer)  # pyright: ignore
        if self.config.init_from and not step:
            load_initial_run(Path(self.config.init_from), self.accelerator)
            self.skipped.count, self.documents.stream_state = 0, None
        self.loader = self.dataset.make_loader(step, self.config.steps, self.config.num_workers)

    def step(self, step: int) -> dict[str, Tensor]:
        """A step of the critic, if there is one, and of the model; the losses of all processes."""
        self.trainer.update_schedules(step, self.config.steps)
        batches = [next(self.loader) for _ in range(self.config.gradient_accumulation_steps)]
        self.documents.stream_state = batches[-1].stream_state  # made by a worker
        totals = self.count(step, batches)
        batches = [to_device(batch, self.accelerator.device) for batch in batches]
        process = self.accelerator
        generator = make_generator(
            self.config.seed, "probes", step, process.process_index, device=process.device
        )
        terms = self.trainer.train_step(batches, totals, generator)
        self.average.update(self.trainer.model)
        losses = all_reduce_sum(process, torch.stack([term.float() for term in terms.values()]))
        found = present(dict(zip(terms, losses, strict=True)), totals)
        found["lr"] = torch.tensor(self.trainer.optimizer.param_groups[0]["lr"], dtype=torch.float64)
        if self.alone:
            found["images_alone"] = torch.tensor(self.alone)
        if self.skipped.count:
            found["skipped_documents"] = torch.tensor(self.skipped.count)
        return found

    def count(self, step: int, batches: list[PackedBatch]) -> BatchTotals:
        """The totals of a step's batches over all processes, added to what the run has read.

        Raises:
            ValueError: no document of the first step can be read, or most of its images are alone; a skipped
                one where `data.strict` is set.
        """
        skipped = [reason for batch in batches for reason in batch.skipped]
        self.report_skipped(skipped)
        counts = torch.tensor([batch.counts for batch in batches], dtype=torch.float64).sum(0)
        counts = torch.cat([counts, counts.new_tensor([len(skipped)])])
        tokens, pairs, images, alone, *totals, missing = all_reduce_sum(self.accelerator, counts).tolist()
        if step == 0:
            self.check_first(skipped, int(missing))
            check_company(self.config.image_head, int(images), int(alone))
        self.alone = alone / images if alone else 0.0
        totals = BatchTotals(*totals)
        self.tokens += int(tokens)
        self.generated += int(images)
        self.flops += self.counter.flops(tokens, pairs)  # of the model, without the critic's
        self.skipped.count += int(missing)
        return totals

    def check_first(self, skipped: list[str], count: int) -> None:
        """Refuse a first step of which nothing is left.

        Args:
            skipped: why documents of this process were skipped.
            count: how many were, of all processes.
        """
        if count == (size := self.config.global_batch_size):
            raise ValueError(f"none of the first {size} documents can be learned from: {skipped[0]}")

    def report_skipped(self, skipped: list[str]) -> None:
        """Say which documents this process skips, and why; each reason once.

        Raises:
            ValueError: the first of them, where `data.strict` is set.
        """
        if skipped and self.config.data.strict:
            raise ValueError(f"{skipped[0]}; repair it, or skip its document by --data.strict false")
        for reason in skipped:
            if reason not in self.named:
                say(f"skipped: {reason}")
                self.named.add(reason)

    def batches(self, step: int) -> list[Any]:
        """The rows of a step's documents, and this process's batches as the model reads them."""
        parts = self.config.gradient_accumulation_steps
        packed = [self.dataset[number] for number in range(step * parts, (step + 1) * parts)]
        if step == 0:
            skipped = [reason for batch in packed for reason in batch.skipped]
            self.check_first(skipped, len(skipped))
        rows = self.documents.batch(self.config.seed, step, self.config.global_batch_size)
        return [{"rows": rows, **batch.inputs(), "labels": batch.labels} for batch in packed]

    @torch.no_grad()
    def evaluate(self, path: Path) -> dict[str, float]:
        """Samples and metrics of the averaged model on held-out documents."""
        if not self.accelerator.is_main_process:
            return {}
        batch = to_device(self.eval_dataset[0], self.accelerator.device)
        out = self.average.model(**batch.inputs(), labels=batch.labels)
        metrics = {"eval_loss/text": float(out.loss)} if batch.predicted else {}
        if self.trainer.critic is None and len(batch.noise):
            loss = self.head.loss(out.patches[batch.noisy], batch, self.head_settings)
            loss = loss / max(batch.learned_patches, 1)
            metrics["eval_loss/image"] = float(loss)
        for source in filter(SPRITE_EVALUATORS.__contains__, self.config.data.paths):
            metrics |= SPRITE_EVALUATORS[source].evaluate(self.pipeline, self.held_out)
        return metrics | write_samples(self.pipeline, self.held_out, path)

    def save_model(self, path: Path) -> None:
        """Write the averaged model, its processor and templates, for `train/generate.py`."""
        if self.accelerator.is_main_process:
            self.pipeline.save_pretrained(path)

    def extra_results(self) -> dict[str, float]:
        """The number of skipped documents, where there are any."""
        return {"skipped_documents": self.skipped.count} if self.skipped.count else {}


def present(terms: dict[str, Tensor], totals: BatchTotals) -> dict[str, Tensor]:
    """The terms of a step but those that nothing in it contributes to."""
    absent = ("loss/text",) * (not totals.predicted) + ("loss/image",) * (not totals.patches)
    critic = ("loss/critic", "penalty/", "score/") if not totals.documents else ()
    return {name: term for name, term in terms.items() if name not in absent and not name.startswith(critic)}


def patch_size(config: Pretrain) -> int:
    """Pixels of a patch's side."""
    return config.model.get("patch_size", RopeMMConfig.patch_size)


def load_data(data: Data, eval_samples: int, patch_size: int) -> tuple[DocumentDataset, MapDocuments]:
    """Documents to train on, and held-out ones.

    Args:
        data: where they come from.
        eval_samples: rows of a stream that are held out.
        patch_size: pixels of a patch's side.
    """
    return load_documents(
        data.paths,
        filter=data.filter,
        streaming=data.streaming,
        shuffle=data.shuffle,
        held_out=eval_samples,
        templates=data.templates,
        size=data.size,
        channels=data.channels,
        rows_per_document=data.rows_per_document,
        background=data.background,
        keep_aspect=patch_size if data.aspect_ratio == "keep" else None,
        flip=data.flip,
        **({"group_by": data.group_by, "group_size": data.group_size} if data.group_by else {}),
    )


def find_tokenizer(config: Pretrain, documents: DocumentDataset) -> PreTrainedTokenizerBase:
    """The tokenizer named; one of the data's words knows those of all rows, also of filtered ones."""
    if config.tokenizer != "words":
        return load_tokenizer(config.tokenizer)
    if config.data.filter:
        unfiltered = replace(config.data, filter={})
        documents, _ = load_data(unfiltered, config.eval_samples, patch_size(config))
    return find_word_tokenizer(
        Path(config.output_dir), documents.texts(), config.restart, config.data.changed
    )


def load_initial_tokenizer(config: Pretrain, documents: DocumentDataset) -> PreTrainedTokenizerBase:
    """The tokenizer of the run to start from.

    Raises:
        ValueError: a run that does not fit, documents with words that its tokenizer lacks.
    """
    check_initial_run(folder := Path(config.init_from), fingerprint(config), KEPT)
    tokenizer = load_tokenizer(str(folder / "model"))
    if config.tokenizer == "words":
        check_words(tokenizer, documents.texts())
    return tokenizer


def check_turns(config: Pretrain, processes: int) -> None:
    """Refuse a batch that leaves a micro-batch without a document, and one cut up where the loss needs it."""
    turns = processes * config.gradient_accumulation_steps
    if config.data.group_by:
        check_groups(config.global_batch_size, config.data.group_size, turns, config.data.streaming)
    if config.global_batch_size < turns:
        raise ValueError(
            f"global_batch_size {config.global_batch_size} has no document for some of {turns} micro-batches "
            f"of {processes} processes; raise it, or lower gradient_accumulation_steps"
        )
    if turns > 1 and IMAGE_HEADS[config.image_head].needs_critic and GAN_LOSSES[config.loss.name].of_means:
        raise ValueError(
            f"loss.name {config.loss.name} compares scores with means over the batch, of which each of "
            f"{turns} micro-batches is a part; use one process and gradient_accumulation_steps 1, or rpgan"
        )


def unread(config: Pretrain) -> dict[str, str]:
    """The keys that nothing reads in this configuration, with the reason."""
    head, keys = IMAGE_HEADS[config.image_head], unread_settings(config.image_head)
    if not config.data.group_by:
        keys["data.group_size"] = "data.group_by is empty"
    if config.flow.times != "logit-normal":
        reason = f"flow.times is {config.flow.times}, not logit-normal"
        keys |= dict.fromkeys(("flow.mean", "flow.deviation"), reason)
    if head.needs_critic:
        keys |= config.loss.unread()
    else:
        reason = f"image_head {config.image_head} has no critic, which adversarial has"
        keys |= dict.fromkeys(("loss", "optim.critic_lr", "optim.critic_betas"), reason)
    if config.optim.constant:
        keys["optim.schedule"] = "optim.final_lr_ratio is 1"
    if not config.data.streaming:
        keys |= dict.fromkeys(("data.shuffle", "eval_samples"), "data.streaming is false")
    if config.data.channels == 4:
        keys["data.background"] = "images of 4 channels keep what is transparent"
    return keys


def check(config: Pretrain) -> None:
    """Refuse values that make no run, and those that nothing reads.

    Raises:
        ValueError: with the key and its value.
    """
    check_options(config)
    for name in ("paths", "templates"):
        if not getattr(config.data, name):
            raise ValueError(f"data.{name} must name at least one, not []")
    head = IMAGE_HEADS[config.image_head]
    if config.noisy_copies and (config.noisy_copies < head.samples or head.needs_critic):
        wanted = "takes noisy_copies 0" if head.needs_critic else f"needs {head.samples} or more"
        raise ValueError(f"noisy_copies is {config.noisy_copies}; the {config.image_head} head {wanted}")
    refuse_unread(config, unread(config))


def main(config: Pretrain, training: Callable[[Pretrain, Accelerator], Training] = Training) -> None:
    """Train, resume or check, as the configuration says.

    Args:
        config: of the run.
        training: makes what is trained.

    Raises:
        ValueError: a configuration, data or a checkpoint that cannot be used.
    """
    check(config)
    disable_progress_bar()
    # a process whose documents have no image leaves weights without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    launch(training, config, kwargs_handlers=[unused])


if __name__ == "__main__":
    run(main, Pretrain)
