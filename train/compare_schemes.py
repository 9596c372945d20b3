"""Do rotary schemes matter? One small model for each scheme and seed, all else equal, asked about positions.

    python train/compare_schemes.py --config configs/compare/small.yaml

The same command again resumes, and skips runs that are finished. table.md, compare.json, compare.png and
index.html in OUTPUT_DIR show the share of right answers at trained and at untrained sizes, which differences
are within the noise, and the losses over the steps. The figure needs matplotlib: pip install rope-mm[plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rope_mm import augment_positions
from rope_mm.data import batch_indices
from rope_mm.data.seeding import EVALUATION, make_generator
from rope_mm.data.synthetic.qa_tasks import make_qa_samples
from rope_mm.evaluation.position_baselines import BASELINES, add_baseline
from rope_mm.evaluation.qa import (
    EncodedQA,
    PlacedQA,
    encode_qa,
    generate_answers,
    load_qa_tokenizer,
    place_qa,
    score_answers,
)
from rope_mm.evaluation.scheme_comparison import draw_figure, summarise, write_table
from rope_mm.files import write_text
from rope_mm.models import IMAGE_TOKEN, RopeMMForConditionalGeneration, read_config
from rope_mm.models.configuration_rope_mm import read_rope
from rope_mm.training.config import check_options, option, run
from rope_mm.training.run_page import write_comparison_page
from rope_mm.training.threads import choose_threads

EVERY = 20  # steps between two points of a loss
FREE = "output_dir", "schemes", "seeds", "threads", "device"  # may change when the command is repeated


@dataclass(frozen=True, kw_only=True)
class CompareSchemes:
    """Compare schemes by questions about positions; the same command again resumes."""

    output_dir: str = option("runs/compare", "folder of all runs and of the table")
    schemes: dict[str, dict[str, Any]] = option({}, "name of a row -> fields of rope_parameters")
    theta: float = option(100.0, "of every scheme that reads one and names none", above=0)
    seeds: int = option(3, "runs of each scheme", minimum=1)
    steps: int = option(1000, "of the optimizer", minimum=1)
    global_batch_size: int = option(64, "documents of a step", minimum=1)
    documents: int = option(16384, "to train on, in equal parts of the trained forms", minimum=1)
    eval_samples: int = option(200, "questions of every form", minimum=1)
    image_loss_weight: float = option(10.0, "of the image loss, that of the text loss being 1", minimum=0)
    lr: float = option(3e-3, "learning rate", minimum=0)
    warmup_steps: int = option(50, "over which the rate rises from 0", minimum=1)
    model: dict[str, Any] = option({}, "fields of RopeMMConfig")
    augment: dict[str, dict[str, float]] = option(
        {}, "name of a row -> arguments of augment_positions, for each document of a step"
    )
    baselines: dict[str, str] = option(
        {},
        "name of a row -> alibi, continuous-bias or learned-embedding, which the row has beside its scheme",
    )
    trained: dict[str, dict[str, Any]] = option({}, "task -> form -> sizes, to train and to evaluate on")
    untrained: dict[str, dict[str, Any]] = option({}, "task -> form -> sizes, to evaluate on only")
    threads: int = option(
        0,
        "of torch on the CPU, at most OMP_NUM_THREADS where that is set; 0: as many as are faster",
        minimum=0,
    )
    device: str = option("cpu", "of torch")


class Benchmark:
    """Documents to train on, which depend on the seed, and questions, the same for all."""

    def __init__(self, config: CompareSchemes):
        self.config, self.size = config, config.model.get("patch_size", 2)
        self.trained = [(task, sizes) for task, forms in config.trained.items() for sizes in forms.values()]
        questions = {
            (kind, task, form): make_qa_samples(task, sizes, config.eval_samples, EVALUATION)
            for kind, tasks in (("trained", config.trained), ("untrained", config.untrained))
            for task, forms in tasks.items()
            for form, sizes in forms.items()
        }
        samples = [sample for form in self.trained for sample in make_qa_samples(*form, 16, "words")]
        self.tokenizer = load_qa_tokenizer([*samples, *chain(*questions.values())])
        self.questions = {
            form: [encode_qa(sample, self.size, self.tokenizer) for sample in samples]
            for form, samples in questions.items()
        }
        self.train_set = lru_cache(maxsize=1)(self.make_train_set)

    def make_train_set(self, seed: int) -> list[EncodedQA]:
        """The documents of a seed."""
        each = -(-self.config.documents // len(self.trained))
        samples = [s for form in self.trained for s in make_qa_samples(*form, each, "lesson", seed)]
        return [encode_qa(sample, self.size, self.tokenizer) for sample in samples]

    def evaluate(self, model: RopeMMForConditionalGeneration) -> dict[str, dict[str, dict[str, float]]]:
        """The share of right answers: trained or untrained -> task -> form."""
        metrics: dict[str, dict[str, dict[str, float]]] = {}
        for (kind, task, form), samples in self.questions.items():
            placed = place_qa(samples, self.tokenizer, model.config.scheme)
            right = [score_answers(model, placed[i : i + 100]) for i in range(0, len(placed), 100)]
            metrics.setdefault(kind, {}).setdefault(task, {})[form] = torch.cat(right).float().mean().item()
        return metrics


def make_model(
    config: CompareSchemes, tokenizer: PreTrainedTokenizerBase, scheme: str, seed: int
) -> RopeMMForConditionalGeneration:
    """The model of a scheme; all that is random depends on the seed alone.

    Args:
        config: of the comparison.
        tokenizer: of the questions.
        scheme: a key of `schemes`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    rope = config.schemes[scheme]
    theta = {} if "theta" in read_rope(rope).unused else {"theta": config.theta}
    settings = read_config(
        **{"num_channels": 3, **config.model},
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={**theta, **rope},
    )
    model = RopeMMForConditionalGeneration(settings).to(config.device)  # pyright: ignore[reportArgumentType]
    if scheme in config.baselines:
        add_baseline(model, config.baselines[scheme])
    return model


def move_positions(
    batch: list[PlacedQA], moves: dict[str, float], generator: torch.Generator
) -> list[PlacedQA]:
    """Documents whose positions are moved and scaled at random, each by itself.

    Args:
        batch: placed documents.
        moves: arguments of `augment_positions`.
        generator: of the random numbers.
    """
    return [
        PlacedQA(
            row._replace(positions=augment_positions(row.positions, generator=generator, **moves)), sample
        )
        for row, sample in batch
    ]


def train(config: CompareSchemes, benchmark: Benchmark, scheme: str, seed: int, bar: tqdm) -> dict[str, Any]:
    """One run: the metrics of a scheme's model, its parameters, its cost.

    Args:
        config: of the comparison.
        benchmark: data and questions.
        scheme: a key of `schemes`.
        seed: of the run.
        bar: shows the losses.
    """
    began = time.process_time()
    samples = benchmark.train_set(seed)
    made = time.process_time()
    model = make_model(config, benchmark.tokenizer, scheme, seed)
    placed = place_qa(samples, benchmark.tokenizer, model.config.scheme)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.99), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / config.warmup_steps, 1.25 * (1 - step / config.steps))
    )
    loss, losses = torch.zeros(()), {"text": [], "image": []}
    for step in range(config.steps):
        chosen = batch_indices(len(placed), config.global_batch_size, seed, step).tolist()
        batch = [placed[i] for i in chosen]
        if moves := config.augment.get(scheme):
            batch = move_positions(batch, moves, make_generator(seed, "augment", step))
        found = generate_answers(model, batch)
        loss = found.text_loss + config.image_loss_weight * found.image_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0 or step + 1 == config.steps:
            now = {"text": found.text_loss.item(), "image": found.image_loss.item()}
            bar.set_postfix({"step": step + 1} | now)
            for name, value in now.items():
                losses[name].append((step + 1, value))
    if not loss.isfinite():
        raise ValueError(f"the loss of {scheme}, seed {seed}, is not finite; give a lower --lr")
    metrics = benchmark.evaluate(model.eval())
    cost = {"data_cpu_s": made - began, "cpu_s": time.process_time() - made}
    sizes = {"parameters": model.num_parameters(), "loss": loss.item()}
    return {"metrics": metrics, **sizes, **cost, "losses": losses}


def check(config: CompareSchemes) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: with the key and its value.
    """
    check_options(config)
    if len(config.schemes) < 2 or not config.trained:
        raise ValueError(
            f"schemes must name two or more, not {list(config.schemes)}, and trained some tasks; "
            "give --config configs/compare/small.yaml"
        )
    for key in ("augment", "baselines"):
        if unknown := sorted(set(getattr(config, key)) - set(config.schemes)):
            raise ValueError(f"{key} names {unknown}, but schemes has {list(config.schemes)}")
    for name in config.baselines.values():
        BASELINES[name]
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r} is not available; give --device cpu")


def read_run(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, None where there is none.

    Raises:
        ValueError: one of other settings, or one that cannot be read.
    """
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in settings.items() if done["settings"].get(name) != value]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a run of this script; delete it") from None
    if differs:
        raise ValueError(f"{path} has another {', '.join(differs)}; delete it, or give another --output_dir")
    return done


def loss_curves(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The losses of every run over its steps, by scheme and seed; runs of earlier versions have none."""
    return {
        f"{scheme}, seed {seed}": {f"loss/{name}": points for name, points in run["losses"].items()}
        for scheme, seeds in runs.items()
        for seed, run in enumerate(seeds)
        if any(run.get("losses", {}).values())
    }


def main(config: CompareSchemes) -> None:
    """Run what is not finished; the table of all runs.

    Raises:
        ValueError: a configuration that makes no comparison, runs of another one in its folder.
    """
    check(config)
    choose_threads(config.threads)
    output_dir, benchmark = Path(config.output_dir), Benchmark(config)
    whole = {name: value for name, value in asdict(config).items() if name not in FREE}
    plan = [(seed, scheme) for seed in range(config.seeds) for scheme in config.schemes]
    runs: dict[str, list[dict[str, Any]]] = {scheme: [] for scheme in config.schemes}
    with tqdm(plan, desc="runs") as bar:
        for seed, scheme in bar:
            path = output_dir / "runs" / f"{scheme}-{seed}.json"
            settings = {**whole, "scheme": config.schemes[scheme]}
            bar.set_description(f"{scheme}, seed {seed}")
            done = read_run(path, settings)
            if done is None:
                done = {"settings": settings, **train(config, benchmark, scheme, seed, bar)}
                write_text(path, json.dumps(done, indent=1))
            runs[scheme].append({name: value for name, value in done.items() if name != "settings"})
    summary = summarise(runs)
    table = write_table(summary)
    report = {"settings": {**whole, "schemes": config.schemes}, "summary": summary, "runs": runs}
    write_text(output_dir / "compare.json", json.dumps(report, indent=1))
    write_text(output_dir / "table.md", table)
    draw_figure(output_dir / "compare.png", summary)
    write_comparison_page(output_dir, table, ["compare.png"], report["settings"], curves=loss_curves(runs))
    print(f"{table}\n{output_dir}/table.md, compare.json, compare.png")


if __name__ == "__main__":
    run(main, CompareSchemes, lock=True)
