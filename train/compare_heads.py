"""Which image head generates best for the same training? Squared error, flow, energy, fields and critic.

    python train/compare_heads.py --config configs/heads/digits.yaml

Every head trains the same model on the same images, for the number of steps in its entry of `heads`, such
that all take as many floating-point operations; OUTPUT_DIR/table.md shows these beside CPU time. Each run is
one of `train/pretrain.py` in OUTPUT_DIR/<head>-<seed>: the same command again resumes the one that was
interrupted and skips those that are finished. heads.json holds the numbers, heads.png is a figure of them,
samples.png shows images, and index.html has all of it and the curves of the runs. With `sample_every` below
the steps, in heads or for all, images are evaluated during training as well, which counts as no CPU time:
curves.md and curves.png show what each head reaches after how much compute, before its rate has fallen.
Figures need matplotlib: pip install rope-mm[plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from pretrain import Pretrain, Training
from pretrain import check as check_run
from pretrain import main as train
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import CaptionedImages, load_images, make_generator
from rope_mm.data.columns import choose_rows
from rope_mm.data.templates import Column, read_template
from rope_mm.evaluation.contact_sheet import save_sheet
from rope_mm.evaluation.head_comparison import (
    COSTS,
    REAL,
    Runs,
    describe_sampling,
    draw_figure,
    write_table,
)
from rope_mm.evaluation.head_curves import draw_curves, has_curves, log_point, read_curve, write_curves
from rope_mm.evaluation.image_evaluators import (
    MIN_SAMPLES,
    CaptionEvaluator,
    report_missing,
    report_skipped,
    train_classifier,
)
from rope_mm.files import write_text
from rope_mm.losses import twice_differentiable
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.checkpoint import Stateful
from rope_mm.training.config import check_options, dump, option, override, run
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.loop import fingerprint
from rope_mm.training.metrics_log import read_metrics, say
from rope_mm.training.run_dir import is_done
from rope_mm.training.run_page import write_comparison_page
from rope_mm.training.threads import choose_threads

FREE = "output_dir", "restart", "dry_run", "on_nan", "trackers", "page", "profile"  # they change no result
COUNTED = 10  # steps, the first ones, whose operations are counted
SHOWN = 2  # of each class on the sheet
FIGURES = "heads.png", "curves.png", "samples.png"


Measure = Callable[[RopeMMPipeline], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class CompareHeads(Pretrain):
    """Train every head with every seed; the other keys are those of `train/pretrain.py`.

    An entry of `heads` replaces keys, such as {image_head: flow, steps: 2000}. An image's class is the first
    of `classes` in its caption; held-out images without one are not used. At most half of the others are
    generated from their captions and compared with the rest.
    """

    output_dir: str = option("runs/heads", "folder of all runs and of the table")
    seeds: int = option(1, "runs of each head, from seed on", minimum=1)
    heads: dict[str, dict[str, Any]] = option({}, "name of a row -> the keys that it changes")
    classes: list[str] = option([], "words in captions, by which images are classified")
    passes: list[int] = option([1, 2, 4, 16, 32], "of sampling, of heads that take several", minimum=1)
    noise_scales: list[float] = option([1.0], "of the noise, each of them for every head", minimum=0)
    eval_samples: int = option(1_000, "images generated", minimum=1)
    classifier_samples: int = option(10_000, "training images, at most, of the classifier", minimum=1)
    classifier_epochs: int = option(20, "of the classifier", minimum=1)


class CostMeter:
    """The cost of a training, interruptions included: FLOPs of the first steps, CPU seconds of all."""

    def __init__(self):
        self.flops, self.counted, self.seconds = 0.0, 0, 0.0

    def state_dict(self) -> dict[str, float]:
        """The numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what `state_dict` returned."""
        vars(self).update(state)


class MeteredTraining(Training):
    """A training that measures its cost; the time includes the preparation of batches.

    Args:
        config: of the run.
        accelerator: of one process.
        measure: metrics of the model so far, which are logged.
    """

    def __init__(self, config: Pretrain, accelerator: Accelerator, measure: Measure = lambda _: {}):
        super().__init__(config, accelerator)
        self.cost, self.measure, self.done = CostMeter(), measure, 0

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside models and optimizers."""
        return super().states() | {"cost": self.cost}

    def begin(self, step: int) -> None:
        """As every pretraining; the step is remembered."""
        super().begin(step)
        self.done = step

    def step(self, step: int) -> dict[str, Tensor]:
        """A step; the operations of the first ones are counted, as captions differ in length."""
        began = time.process_time()
        if step >= COUNTED:
            terms = super().step(step)
        else:  # fused attention would not be counted
            with twice_differentiable(), FlopCounterMode(display=False) as counter:
                terms = super().step(step)
            self.cost.flops += float(counter.get_total_flops())
            self.cost.counted += 1
        self.cost.seconds += time.process_time() - began
        self.done = step + 1
        return terms

    def evaluate(self, path: Path) -> dict[str, float]:
        """As every pretraining's, with metrics of generated images; the last step's come after the run."""
        ended = self.done == self.config.steps
        return super().evaluate(path) | ({} if ended else self.measure(self.pipeline))

    def extra_results(self) -> dict[str, float]:
        """The cost of the training, and the number of weights trained, a critic's included."""
        models = [self.trainer.model, *([self.trainer.critic.critic] if self.trainer.critic else [])]
        return super().extra_results() | {
            "steps": self.config.steps,
            "TFLOP": self.cost.flops / max(self.cost.counted, 1) * self.config.steps / 1e12,
            "CPU minutes": self.cost.seconds / 60,
            "weights": sum(weight.numel() for model in models for weight in model.parameters()),
        }


@dataclass(frozen=True)
class EvalSet:
    """What heads are compared by.

    Attributes:
        evaluator: metrics of images.
        captions: to generate images of.
        real: the images (n, ch, y, x) of the captions.
        shown: numbers of the captions on the sheet.
    """

    evaluator: CaptionEvaluator
    captions: list[str]
    real: Tensor
    shown: list[int]

    @cached_property
    def of_real(self) -> dict[str, float]:
        """The metrics of the real images."""
        return self.evaluator.evaluate(self.real)

    def generate(self, pipeline: RopeMMPipeline, passes: int, noise_scale: float) -> Tensor:
        """An image for every caption; the noise is the same for every head."""
        prompts = [pipeline.prompt("text2image", caption) for caption in self.captions]
        how = {"steps": passes, "noise_scale": noise_scale}
        return pipeline.generate_image(prompts, make_generator("heads"), **how)


def find_classes(images: CaptionedImages, classes: Sequence[str], most: int) -> tuple[list[int], Tensor]:
    """The rows whose captions contain a class as a word, and the numbers (n,) of their classes.

    Args:
        images: their captions are searched.
        classes: the words.
        most: rows at most, chosen at random.
    """
    word = re.compile(rf"\b({'|'.join(map(re.escape, classes))})\b", re.IGNORECASE)
    found = {row: match for row, text in enumerate(images.captions) if (match := word.search(text))}
    rows, number = list(found), {name.lower(): i for i, name in enumerate(classes)}
    rows = [rows[i] for i in choose_rows(len(rows), most)]
    return rows, torch.tensor([number[found[row][0].lower()] for row in rows], dtype=torch.long)


def find_columns(templates: Sequence[str]) -> tuple[str, str]:
    """The columns of images and of captions: of the first template that generates an image after a column.

    Raises:
        ValueError: no such template.
    """
    for template in map(read_template, templates):
        columns = [part for part in template if isinstance(part, Column)]
        generated = [place for place, part in enumerate(columns) if part.generate]
        if generated and generated[0]:
            return columns[generated[0]].column, columns[generated[0] - 1].column
    raise ValueError(
        f"data.templates must generate images from captions, as '{{caption}}{{image:generate}}' does, not "
        f"{list(templates)}"
    )


def make_eval_set(config: CompareHeads) -> EvalSet:
    """Captions and real images, and a classifier trained on none of these.

    Raises:
        ValueError: fewer images of the classes than the metrics need.
    """
    source = config.data.paths[0], config.data.size, config.data.channels
    known, held_out = load_images(*source, *find_columns(config.data.templates))
    rows, labels = find_classes(known, config.classes, config.classifier_samples)
    unseen, targets = find_classes(held_out, config.classes, len(held_out))
    count = min(config.eval_samples, len(unseen) // 2)
    if count < (least := MIN_SAMPLES["accuracy"]) or not rows:
        raise ValueError(
            f"{count} images would be generated, after {len(rows)} that train the classifier; accuracy "
            f"needs {least}; raise eval_samples, or give classes that captions contain"
        )
    report_skipped(count, len(unseen) - count)
    report_missing(labels, targets, config.classes)
    classifier = train_classifier(known.images(rows), labels, config.seed, config.classifier_epochs)
    asked = torch.tensor(choose_rows(len(unseen), count))
    rest = torch.ones(len(unseen)).index_fill(0, asked, 0).bool()
    real, targets = held_out.images(unseen), targets[asked]
    with torch.no_grad():
        features = classifier.features(real[rest])
    evaluator = CaptionEvaluator(classifier, features, [unseen[i] for i in asked.tolist()], targets, {})
    shown = [int(i) for label in targets.unique() for i in (targets == label).nonzero()[:SHOWN, 0]]
    return EvalSet(evaluator, [held_out.captions[row] for row in evaluator.rows], real[asked], shown)


def configure(config: CompareHeads, head: str, seed: int) -> Pretrain:
    """The run of a head and a seed.

    Args:
        config: of the comparison.
        head: a key of `heads`.
        seed: of the run.

    Raises:
        ValueError: an entry with an unknown key, or one that makes no run.
    """
    common = {f.name: getattr(config, f.name) for f in fields(Pretrain)}
    own = {"output_dir": f"{config.output_dir}/{head}-{seed}", "seed": seed}
    own["eval_samples"] = Pretrain.eval_samples  # of a stream, where here it counts generated images
    chosen = override(Pretrain(**common | own), config.heads[head], f"heads.{head}")
    check_run(chosen)
    return chosen


def measure_head(pipeline: RopeMMPipeline, eval_set: EvalSet, passes: Sequence[int]) -> dict[str, float]:
    """The metrics of a head at every number of passes, and those of real images, by `log_point`."""
    made = {str(count): eval_set.generate(pipeline, count, 1) for count in passes}
    found = {count: eval_set.evaluator.evaluate(images) for count, images in made.items()}
    return log_point(found, eval_set.of_real)


def run_head(
    config: Pretrain,
    passes: Sequence[int],
    noise_scales: Sequence[float],
    eval_set: EvalSet,
    samples: dict[str, Tensor],
) -> dict[str, Any]:
    """The cost of a run, trained as far as it is not yet, its metrics by passes and noise, and its curve.

    Args:
        config: of the run.
        passes: of sampling; a head that takes one takes one.
        noise_scales: of sampling.
        eval_set: what is generated.
        samples: images for the sheet are added to it.
    """
    output_dir = Path(config.output_dir)
    counts = passes if IMAGE_HEADS[config.image_head].steps > 1 else [1]
    if config.restart or not is_done(output_dir, fingerprint(config)):
        measure = partial(measure_head, eval_set=eval_set, passes=counts)
        train(config, partial(MeteredTraining, measure=measure))
    pipeline, metrics = RopeMMPipeline.from_pretrained(output_dir / "model"), {}
    for count, scale in product(counts, noise_scales):
        images, how = eval_set.generate(pipeline, count, scale), describe_sampling(count, scale)
        samples[f"{output_dir.name}, {how}"] = images[eval_set.shown]
        metrics[how] = eval_set.evaluator.evaluate(images)
    result = json.loads((output_dir / "result.json").read_text())
    last = {str(count): metrics[str(count)] for count in counts}
    curve, others = read_curve(read_metrics(output_dir), list(last), eval_set.of_real)
    if others:
        say(
            f"{output_dir}: the curves skip {others} evaluations during training, which are by another "
            "classifier, of other images or without a number of passes"
        )
    curve |= {config.steps: last}
    return {name: result[name] for name in COSTS} | {"metrics": metrics, "curve": curve}


def check(config: CompareHeads) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: with the key and its value.
    """
    check_options(config)
    if not config.heads or not config.classes:
        raise ValueError("heads and classes must name something; give --config configs/heads/digits.yaml")
    if len(config.data.paths) != 1:
        raise ValueError(f"data.paths must name one source of images, not {config.data.paths}")
    find_columns(config.data.templates)
    if not config.passes:
        raise ValueError("passes must name at least one number, not []")
    scales = config.noise_scales
    if 1 not in scales or len({describe_sampling(1, scale) for scale in scales}) < len(scales):
        raise ValueError(
            f"noise_scales must hold 1, which the figure shows, and each scale once, not {scales}"
        )
    if config.noise_scale != 1 or any("noise_scale" in keys for keys in config.heads.values()):
        raise ValueError(
            "a comparison takes the same noise for all heads; give noise_scales, not noise_scale"
        )


def write_report(
    config: CompareHeads, real: dict[str, float], runs: Runs, samples: dict[str, Tensor]
) -> None:
    """Write table, figure, sheet and numbers of the runs so far.

    Args:
        config: of the comparison.
        real: metrics of real images.
        runs: head -> what `run_head` returned, for each seed.
        samples: images for the sheet, by the name of their row.
    """
    output_dir = Path(config.output_dir)
    report = {"settings": settings(config), "real": real, "heads": runs}
    write_text(output_dir / "heads.json", json.dumps(report, indent=1))
    write_text(output_dir / "table.md", write_table(real, runs))
    draw_figure(output_dir / "heads.png", real, runs)
    if has_curves(real, runs):
        write_text(output_dir / "curves.md", write_curves(real, runs))
        draw_curves(output_dir / "curves.png", real, runs)
    else:  # those of a command before
        for name in ("curves.md", "curves.png"):
            (output_dir / name).unlink(missing_ok=True)
    save_sheet(output_dir / "samples.png", torch.cat(list(samples.values())), list(samples))


def settings(config: CompareHeads) -> dict[str, Any]:
    """The keys that a result depends on."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def main(config: CompareHeads) -> None:
    """Run what is not finished; table, figure and sheet after each run, a page at the end.

    Raises:
        ValueError: as `train/pretrain.py`; nothing to compare; no matplotlib.
    """
    check(config)
    if config.dry_run:
        print(dump(replace(config, dry_run=False)), end="")
        return
    choose_threads(config.threads)
    disable_progress_bar()
    plan = list(product(range(config.seed, config.seed + config.seeds), config.heads))
    each = [(head, configure(config, head, seed)) for seed, head in plan]
    eval_set, runs = make_eval_set(config), cast(Runs, {})
    real, samples = eval_set.of_real, {REAL: eval_set.real[eval_set.shown]}
    for head, own in (bar := tqdm(each, desc="heads")):
        bar.set_postfix_str(own.output_dir)
        runs.setdefault(head, []).append(run_head(own, config.passes, config.noise_scales, eval_set, samples))
        write_report(config, real, runs, samples)
    output_dir, table = Path(config.output_dir), write_table(real, runs)
    if config.page:
        folders = {Path(own.output_dir).name: Path(own.output_dir) for _, own in each}
        figures = [name for name in FIGURES if (output_dir / name).exists()]
        write_comparison_page(output_dir, table, figures, settings(config), folders)
    print(
        f"\n{table}\n{output_dir}/table.md, heads.png, samples.png{has_curves(real, runs) * ', curves.png'}"
    )


if __name__ == "__main__":
    run(main, CompareHeads, lock=True)
