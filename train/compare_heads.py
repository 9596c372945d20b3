"""Which head draws best for the same training? Distances, flows and critics, and how many passes each takes.

    python train/compare_heads.py --config configs/heads/digits.yaml

Every head trains the same model on the same pictures, in steps that its entry in `heads` names: so many that
all do as many floating-point operations, which OUT/table.md prints beside CPU time. Each run is one of
`train/pretrain.py` in OUT/<head>-<seed>: the same command again resumes the one that was interrupted and does
not train again what is done. OUT/heads.json holds the numbers, OUT/heads.png is a figure of them, and
OUT/drawn.png shows pictures. The figure wants matplotlib: pip install rope-mm[plots].
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pretrain import Pretrain, Training
from pretrain import check as check_run
from pretrain import main as train
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from rope_mm.data import CaptionedImages, load_images, make_generator
from rope_mm.evaluation.image_grid import save_sheet
from rope_mm.evaluation.images import MIN_SAMPLES, CaptionEvaluator, report_skipped, train_classifier
from rope_mm.evaluation.quality import COSTS, REAL, Runs, draw_figure, write_table
from rope_mm.files import write_text
from rope_mm.losses import twice_differentiable
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.config import at_least, dump, run
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.loop import fingerprint
from rope_mm.training.run_dir import is_done

FREE = "out", "restart", "dry_run", "on_nan", "trackers", "profile"  # on which no result depends
PART = 250  # pictures that are drawn together
SHOWN = 2  # of each class on the sheet


@dataclass(frozen=True, kw_only=True)
class CompareHeads(Pretrain):
    """Train every head with every seed; the configuration is that of `train/pretrain.py`.

    A head changes what its entry names, such as {head: flow, steps: 2000}. A caption asks for the first of
    the classes that stands in it; held-out pictures of none are not judged. Half of the others at most are
    drawn again, by their captions, and compared with the rest.
    """

    out: str = "runs/heads"
    seeds: int = 1
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    passes: list[int] = field(default_factory=lambda: [1, 2, 4, 16, 32])  # of heads that draw in several
    judged: int = 1_000  # pictures drawn
    examples: int = 10_000  # training pictures, at most, that teach the judge
    epochs: int = 20  # of the judge


class CostMeter:
    """What training took, over all its interruptions: FLOPs of the first step, CPU seconds of all."""

    def __init__(self):
        self.flops, self.seconds = 0.0, 0.0

    def state_dict(self) -> dict[str, float]:
        """Both numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from them."""
        vars(self).update(state)


class MeteredTraining(Training):
    """A training that counts what it takes, making ready the batches included in the time."""

    def __init__(self, config: Pretrain, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.spent = CostMeter()
        accelerator.register_for_checkpointing(self.spent)

    def step(self, step: int) -> dict[str, Tensor]:
        """A step as ever; the first one's operations are counted."""
        began = time.process_time()
        if step:
            terms = super().step(step)
        else:  # attention in one piece would not be counted
            with twice_differentiable(), FlopCounterMode(display=False) as counter:
                terms = super().step(step)
            self.spent.flops = float(counter.get_total_flops())
        self.spent.seconds += time.process_time() - began
        return terms

    def remarks(self) -> dict[str, float]:
        """What the training took, and how many weights it trained, those of a critic included."""
        models = [self.learner.model, *([self.learner.rival.critic] if self.learner.rival else [])]
        return super().remarks() | {
            "steps": self.config.steps,
            "TFLOP": self.spent.flops * self.config.steps / 1e12,
            "CPU minutes": self.spent.seconds / 60,
            "weights": sum(weight.numel() for model in models for weight in model.parameters()),
        }


@dataclass(frozen=True)
class EvalSet:
    """Captions to draw, their real pictures (n, ch, y, x), columns of the sheet, and who judges."""

    exam: CaptionEvaluator
    captions: list[str]
    real: Tensor
    shown: list[int]

    def draw(self, teller: RopeMMPipeline, passes: int) -> Tensor:
        """A picture for every caption, in so many passes; the same noise for every head."""
        teller, noise = replace(teller, spec=replace(teller.spec, steps=passes)), make_generator("heads")
        prompts = [teller.prompt("text2image", caption) for caption in self.captions]
        parts = [prompts[start : start + PART] for start in range(0, len(prompts), PART)]
        return torch.cat([teller.generate_image(part, noise).cpu() for part in parts])


def find_classes(pictures: CaptionedImages, classes: Sequence[str], most: int) -> tuple[list[int], Tensor]:
    """The first rows whose captions have one of the classes as a word, and its number (n,) in the list."""
    word = re.compile(rf"\b({'|'.join(map(re.escape, classes))})\b", re.IGNORECASE)
    found = {row: match for row, text in enumerate(pictures.captions) if (match := word.search(text))}
    rows, number = list(found)[:most], {name.lower(): i for i, name in enumerate(classes)}
    return rows, torch.tensor([number[found[row][0].lower()] for row in rows], dtype=torch.long)


def prepare(config: CompareHeads) -> EvalSet:
    """The questions, and a judge who has seen none of the pictures that they are compared with.

    Raises:
        ValueError: fewer pictures of the classes than have neighbours.
    """
    known, held_out = load_images(config.data.paths[0], config.data.size, config.data.channels)
    rows, labels = find_classes(known, config.classes, config.examples)
    unseen, asked = find_classes(held_out, config.classes, len(held_out))
    judged = min(config.judged, len(unseen) // 2)
    if judged < (least := MIN_SAMPLES["accuracy"]) or not rows:
        raise ValueError(
            f"{judged} images would be evaluated, after {len(rows)} that train the classifier; accuracy "
            f"needs {least}; raise judged, or name classes that stand in captions"
        )
    report_skipped(judged, len(unseen) - judged)
    judge = train_classifier(known.images(rows), labels, config.seed, config.epochs)
    real, asked = held_out.images(unseen), asked[:judged]
    with torch.no_grad():
        exam = CaptionEvaluator(judge, judge.features(real[judged:]), unseen[:judged], asked, {})
    shown = [int(i) for label in asked.unique() for i in (asked == label).nonzero()[:SHOWN, 0]]
    return EvalSet(exam, [held_out.captions[row] for row in exam.rows], real[:judged], shown)


def configure(config: CompareHeads, head: str, seed: int) -> Pretrain:
    """The run of a head and a seed.

    Raises:
        ValueError: an entry that changes what is not there, or makes no run.
    """
    common = {f.name: getattr(config, f.name) for f in fields(Pretrain)}
    own = Pretrain(**common | {"out": f"{config.out}/{head}-{seed}", "seed": seed})
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(own), config.heads[head]))
    except OmegaConfBaseException as error:
        raise ValueError(f"heads.{head}: {str(error).splitlines()[0]}") from None
    chosen = cast(Pretrain, merged)
    check_run(chosen)
    IMAGE_HEADS[chosen.head]
    return chosen


def take(config: Pretrain, passes: Sequence[int], questions: EvalSet, samples: dict[str, Tensor]) -> Any:
    """Marks of a run by passes, trained as far as it is not yet; pictures for the sheet go to `samples`."""
    out = Path(config.out)
    if config.restart or not is_done(out, fingerprint(config)):
        train(config, MeteredTraining)
    teller, marks = RopeMMPipeline.from_pretrained(out / "model"), {}
    for count in passes if IMAGE_HEADS[config.head].steps > 1 else [1]:
        drawn = questions.draw(teller, count)
        samples[f"{out.name}, {count}"] = drawn[questions.shown]
        marks[str(count)] = questions.exam.evaluate(drawn)
    result = json.loads((out / "result.json").read_text())
    return {name: result[name] for name in COSTS} | {"metrics": marks}


def check(config: CompareHeads) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: with the key and its value.
    """
    if not config.heads or not config.classes:
        raise ValueError("heads and classes must name something; give --config configs/heads/digits.yaml")
    if len(config.data.paths) != 1:
        raise ValueError(f"pictures are those of one source, not of data.paths {config.data.paths}")
    at_least(1, config, "seeds", "judged", "examples", "epochs")
    if min(config.passes, default=0) < 1:
        raise ValueError(f"passes must be some numbers from 1, not {config.passes}")


def main(config: CompareHeads) -> None:
    """Run what is not yet done; table, figure and sheet after each run.

    Raises:
        ValueError: as `train/pretrain.py`; nothing to compare; no matplotlib.
    """
    check(config)
    if config.dry_run:
        print(dump(replace(config, dry_run=False)), end="")
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    disable_progress_bar()
    plan = list(product(range(config.seed, config.seed + config.seeds), config.heads))
    each = [(head, configure(config, head, seed)) for seed, head in plan]
    questions, out, runs = prepare(config), Path(config.out), cast(Runs, {})
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    real, samples = questions.exam.evaluate(questions.real), {REAL: questions.real[questions.shown]}
    for head, own in (bar := tqdm(each, desc="heads")):
        bar.set_postfix_str(own.out)
        runs.setdefault(head, []).append(take(own, config.passes, questions, samples))
        report = {"settings": settings, "real": real, "heads": runs}
        write_text(out / "heads.json", json.dumps(report, indent=1))
        write_text(out / "table.md", write_table(real, runs))
        draw_figure(out / "heads.png", real, runs)
        save_sheet(out / "drawn.png", torch.cat(list(samples.values())), list(samples))
    print(f"\n{write_table(real, runs)}\n{out}/table.md   {out}/heads.png   {out}/drawn.png")


if __name__ == "__main__":
    run(main, CompareHeads)
