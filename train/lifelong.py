"""Does an adversarial image head cost text loss, and does a model keep what it learned when its data changes?

    python train/lifelong.py --config configs/lifelong/sprites.yaml

Four runs of `train/pretrain.py` for each seed, in OUTPUT_DIR/<name>-<seed>: "text" and "images" read the same
documents, rows of data.filter, and the first has no image loss; "new" and "mixed" start from the end of
"images", with rows of `new` alone and with those of both. The same command again resumes. table.md,
lifelong.json and lifelong.png in OUTPUT_DIR show the text loss and the shares of right images and captions.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import pretrain
import torch
from datasets import Dataset
from pretrain import Pretrain
from torch import Tensor
from tqdm import tqdm

from rope_mm.analysis import markdown
from rope_mm.data import FACTORS, MapDocuments, captioned_sprites, make_generator, read_caption
from rope_mm.data.images import resize_center_crop, select_rows
from rope_mm.evaluation.contact_sheet import save_sheet
from rope_mm.evaluation.sprites import classify_sprites
from rope_mm.files import write_text
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.collator import Packer
from rope_mm.training.config import check_options, option, run
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.loop import fingerprint
from rope_mm.training.packed_dataset import PackedDocumentDataset
from rope_mm.training.run_dir import is_done
from rope_mm.training.unread_keys import reset_unread

PHASES = {
    "images": "phase one: old sprites",
    "new": "then new ones alone",
    "mixed": "then new and old ones",
}
Filter = Mapping[str, Sequence[Any]]
Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Lifelong(Pretrain):
    """Text with and without images, then other images; the other keys are those of `train/pretrain.py`."""

    output_dir: str = option("runs/lifelong", "folder of all runs and of the table")
    seeds: int = option(3, "runs of phase one, from seed on", minimum=1)
    new: dict[str, list[Any]] = option({}, "rows of phase two, as data.filter of phase one")
    phase_two_steps: int = option(500, "steps of phase two", minimum=1)
    phase_two_seeds: int = option(3, "seeds that continue to it", minimum=1)
    images_per_combination: int = option(8, "images generated of each combination of factors", minimum=1)
    eval_rows: int = option(4096, "new sprites for the evaluation", minimum=1)
    eval_captions: int = option(128, "captions generated of old images, and of new ones", minimum=1)


def both(old: Filter, new: Filter) -> dict[str, list[Any]]:
    """Rows of either, where they differ in one column."""
    return {name: list(dict.fromkeys([*old[name], *new[name]])) for name in old if name in new}


def runs(config: Lifelong) -> dict[str, list[Pretrain]]:
    """The runs of every name, seed by seed.

    Raises:
        ValueError: data of no use here.
    """
    check_options(config)
    if not config.new or config.data.paths != ["sprites"]:
        raise ValueError("give data.paths [sprites], and in new the rows of phase two")
    common = Pretrain(**{f.name: getattr(config, f.name) for f in fields(Pretrain)})
    phase_two = {"new": config.new, "mixed": both(config.data.filter, config.new)}
    found: dict[str, list[Pretrain]] = {"images": [], "text": [], **{name: [] for name in phase_two}}
    for seed in range(config.seed, config.seed + config.seeds):
        one = replace(common, seed=seed, output_dir=f"{config.output_dir}/images-{seed}")
        text = {"output_dir": f"{config.output_dir}/text-{seed}", "image_head": "mse"}
        alone = replace(one, **text, image_loss_weight=0.0)
        found["text"].append(reset_unread(alone, pretrain.unread(alone)))
        found["images"].append(one)
        for name, chosen in phase_two.items() if seed < config.seed + config.phase_two_seeds else ():
            own = {"output_dir": f"{config.output_dir}/{name}-{seed}", "init_from": one.output_dir}
            data = replace(config.data, filter=chosen)
            found[name].append(replace(one, **own, steps=config.phase_two_steps, data=data))
    return found


def trained(config: Pretrain) -> RopeMMPipeline:
    """The model of a run, trained as far as it is not yet."""
    output_dir = Path(config.output_dir)
    if config.restart or not is_done(output_dir, fingerprint(config)):
        pretrain.main(config)
    return RopeMMPipeline.from_pretrained(output_dir / "model")


class LifelongEvaluator:
    """Metrics of a model on old and on new sprites."""

    def __init__(self, config: Lifelong):
        self.config = config
        filters = {"old": config.data.filter, "new": config.new}
        splits = captioned_sprites(config.eval_rows, seed=-1)
        self.rows = {name: select_rows(splits, chosen)["train"] for name, chosen in filters.items()}

    @torch.no_grad()
    def text_loss(self, pipeline: RopeMMPipeline) -> float:
        """The text loss on new documents of old sprites, each row once."""
        config, rows = self.config, self.rows["old"]
        documents = MapDocuments([rows], config.data.templates, config.data.size, config.data.channels)
        packer = Packer(pipeline.processor, config.max_length, IMAGE_HEADS["mse"].sample_time)
        dataset = PackedDocumentDataset(documents, packer, 0, config.global_batch_size)
        batches = [dataset[number] for number in range(-(-len(rows) // config.global_batch_size))]
        losses = [float(pipeline.model(**b.inputs(), labels=b.labels).loss) * b.predicted for b in batches]
        return sum(losses) / sum(batch.predicted for batch in batches)

    def evaluate(self, pipeline: RopeMMPipeline, images: bool) -> Metrics:
        """The text loss and, of a model that generates images, the metrics of old and of new sprites."""
        metrics = {"text loss": self.text_loss(pipeline)}
        for name in self.rows if images else ():
            metrics |= self.image_metrics(pipeline, name)
        return metrics

    def combinations(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors (n, f) of every combination among the rows, and which each row (r,) shows."""
        factors = torch.tensor([list(self.rows[name][factor]) for factor in FACTORS]).T
        return factors.unique(dim=0, return_inverse=True)

    def generate(self, pipeline: RopeMMPipeline, name: str) -> tuple[list[str], Tensor, Tensor]:
        """A caption of each combination, its factors (n, f), and images of it (n, images, ch, y, x)."""
        combinations, which = self.combinations(name)
        first = [which.tolist().index(number) for number in range(len(combinations))]
        captions = [cast(str, self.rows[name][row]["caption"]) for row in first]
        each = self.config.images_per_combination
        prompts = [pipeline.prompt("text2image", caption) for caption in captions for _ in range(each)]
        images = pipeline.generate_image(prompts, make_generator("lifelong"))
        return captions, combinations, images.unflatten(0, (len(captions), -1))

    def spread(self, name: str) -> float:
        """The standard deviation of a pixel among true images of one combination."""
        combinations, which = self.combinations(name)
        true = torch.stack(self.images(self.rows[name]))
        groups = [true[which == number] for number in range(len(combinations))]
        return torch.stack([each.var(0) for each in groups if len(each) > 1]).mean().sqrt().item()

    def image_metrics(self, pipeline: RopeMMPipeline, name: str) -> Metrics:
        """Shares of old or new sprites: images right, right at least once, captions right.

        `spread` is the standard deviation of a pixel among images of one caption; of true images it is 1.

        Args:
            pipeline: of the model.
            name: "old" or "new".
        """
        _, factors, images = self.generate(pipeline, name)
        classes = classify_sprites(images.flatten(0, 1))
        found = torch.stack([classes[factor] for factor in FACTORS], 1).unflatten(0, images.shape[:2])
        agrees = found == factors[:, None]
        right = agrees.all(2)
        return {
            f"{name} images right": right.float().mean().item(),
            f"{name} covered": right.any(1).float().mean().item(),
            f"{name} spread": images.var(1).mean().sqrt().item() / self.spread(name),
            f"{name} captions right": self.captions_right(pipeline, name),
            **{
                f"{name} {factor} of images right": agrees[..., i].float().mean().item()
                for i, factor in enumerate(FACTORS)
            },
        }

    def captions_right(self, pipeline: RopeMMPipeline, name: str) -> float:
        """The share of true images whose generated captions name all their factors."""
        rows = self.rows[name].select(range(min(self.config.eval_captions, len(self.rows[name]))))
        prompts = [pipeline.prompt("image2text", visual=image) for image in self.images(rows)]
        captions = pipeline.generate_text(prompts)
        right = [
            all(read_caption(caption)[factor] == row[factor] for factor in FACTORS)
            for caption, row in zip(captions, cast(Any, rows), strict=True)
        ]
        return mean(map(float, right))

    def images(self, rows: Dataset) -> list[Tensor]:
        """The images (ch, y, x) of rows, in [-1, 1]."""
        size, channels = self.config.data.size, self.config.data.channels
        return [resize_center_crop(image, size, channels) / 127.5 - 1 for image in rows["image"]]

    def sheet(self, path: Path, pipelines: Sequence[RopeMMPipeline], rows: int = 5, columns: int = 3) -> None:
        """Write a sheet: old captions, then new ones; from left to right the images of each model.

        Args:
            path: the file.
            pipelines: of the models.
            rows: of each kind.
            columns: of each model.
        """
        lines, images = [], []
        for name in self.rows:
            generated = [self.generate(pipeline, name) for pipeline in pipelines]
            captions = generated[0][0]
            for row in range(0, len(captions), -(-len(captions) // rows)):
                lines.append(captions[row])
                parts = [
                    part
                    for _, _, found in generated
                    for part in (found[row, :columns], torch.ones_like(found[row, :1]))
                ]
                images.append(torch.cat(parts[:-1]))
        save_sheet(path, torch.cat(images), lines)


def report(metrics: Mapping[str, Sequence[Metrics]]) -> tuple[str, dict[str, float]]:
    """The tables of all runs, and the mean difference of the text losses, with its standard error."""
    loss = {name: [each["text loss"] for each in metrics[name]] for name in ("text", "images")}
    differences = [images - text for images, text in zip(loss["images"], loss["text"], strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    difference = {"difference": mean(differences), "error": error}
    rows = [["text alone", markdown.spread(loss["text"], ".4f")]]
    rows += [["text, and images by a critic", markdown.spread(loss["images"], ".4f")]]
    rows += [["difference ± standard error", f"{difference['difference']:+.4f} ± {error:.4f}"]]
    lines = []
    for name in filter("text loss".__ne__, metrics["images"][0]):
        shares = [[100 * each[name] for each in metrics[phase]] for phase in PHASES]
        lines.append([name, *(markdown.spread(share, ".1f") for share in shares)])
    text = markdown.table(["trained on", "text loss"], rows, "---:")
    return f"{text}\n\n{markdown.table(['sprites, in %', *PHASES.values()], lines, '---:')}\n", difference


def write(config: Lifelong, metrics: Mapping[str, Sequence[Metrics]]) -> str:
    """The tables, which are written with all metrics."""
    output_dir, (text, difference) = Path(config.output_dir), report(metrics)
    settings = asdict(replace(config, output_dir=""))
    found = {"settings": settings, "difference of text losses": difference, "metrics": metrics}
    write_text(output_dir / "lifelong.json", json.dumps(found, indent=1))
    write_text(output_dir / "table.md", text)
    return f"{text}\n{output_dir}/table.md, lifelong.json, lifelong.png"


def main(config: Lifelong) -> None:
    """Run what is not finished; the tables after each seed.

    Raises:
        ValueError: as `train/pretrain.py`; data of no use here.
    """
    plan, evaluator, tables = runs(config), LifelongEvaluator(config), ""
    metrics: dict[str, list[Metrics]] = {name: [] for name in plan}
    with tqdm(total=sum(map(len, plan.values())), desc="runs") as bar:
        for seed in range(config.seeds):
            pipelines = {}
            for name in (name for name, found in plan.items() if seed < len(found)):
                bar.set_postfix_str(plan[name][seed].output_dir)
                pipelines[name] = trained(plan[name][seed])
                metrics[name].append(evaluator.evaluate(pipelines[name], images=name in PHASES))
                bar.update()
            tables = write(config, metrics)
            if not seed:
                path = Path(config.output_dir) / "lifelong.png"
                evaluator.sheet(path, [pipelines[name] for name in PHASES])
    print(tables)


if __name__ == "__main__":
    run(main, Lifelong, lock=True)
