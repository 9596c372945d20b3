"""Words beside an adversarial head, and a model that goes on with other pictures: what is lost, what is kept.

    python train/lifelong.py --config configs/lifelong/sprites.yaml

Four runs of `train/pretrain.py` for each seed, in OUT/<name>-<seed>: "words" and "pictures" read the same
documents, rows of data.where, and the first learns no pictures; "new" and "mixed" begin where "pictures"
ended, with rows of `new` alone and with those of both. The same command again goes on. OUT/table.md,
OUT/lifelong.json and OUT/lifelong.png tell how words are predicted, and what is drawn and captioned right.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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
from rope_mm.evaluation.image_grid import save_sheet
from rope_mm.evaluation.sprites import classify_sprites
from rope_mm.files import write_text
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.config import run
from rope_mm.training.dataset import PackedDocumentDataset
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.loop import fingerprint
from rope_mm.training.packing import Packer
from rope_mm.training.run_dir import is_done

PHASES = {
    "pictures": "phase one: old sprites",
    "new": "then new ones alone",
    "mixed": "then new and old ones",
}
Where = Mapping[str, Sequence[Any]]
Marks = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Lifelong(Pretrain):
    """Words with and without pictures, then other pictures; all else is as in `train/pretrain.py`."""

    out: str = "runs/lifelong"
    seeds: int = 3
    new: dict[str, list[Any]] = field(default_factory=dict)  # rows of phase two, as data.where of phase one
    more: int = 500  # steps of phase two
    later: int = 3  # seeds that go on to it
    draws: int = 8  # pictures of each combination
    fresh: int = 4096  # sprites dealt anew, for the exams; words are predicted of those of data.where
    captions: int = 128  # of old pictures, and of new ones


def both(old: Where, new: Where) -> dict[str, list[Any]]:
    """Rows of either, where they differ in one column."""
    return {name: list(dict.fromkeys([*old[name], *new[name]])) for name in old if name in new}


def runs(config: Lifelong) -> dict[str, list[Pretrain]]:
    """The runs of every name, seed by seed.

    Raises:
        ValueError: data of no use here.
    """
    if min(config.seeds, config.later) < 1 or not config.new or config.data.paths != ["sprites"]:
        raise ValueError("give 1 seed or more, data.paths [sprites], and in new the rows of phase two")
    common = Pretrain(**{f.name: getattr(config, f.name) for f in fields(Pretrain)})
    later = {"new": config.new, "mixed": both(config.data.where, config.new)}
    found: dict[str, list[Pretrain]] = {"pictures": [], "words": [], **{name: [] for name in later}}
    for seed in range(config.seed, config.seed + config.seeds):
        one = replace(common, seed=seed, out=f"{config.out}/pictures-{seed}")
        found["words"].append(replace(one, out=f"{config.out}/words-{seed}", head="mse", picture_weight=0.0))
        found["pictures"].append(one)
        for name, where in later.items() if seed < config.seed + config.later else ():
            own = {"out": f"{config.out}/{name}-{seed}", "start": one.out, "steps": config.more}
            found[name].append(replace(one, **own, data=replace(config.data, where=where)))
    return found


def trained(config: Pretrain) -> RopeMMPipeline:
    """The model of a run, trained as far as it is not yet."""
    out = Path(config.out)
    if config.restart or not is_done(out, fingerprint(config)):
        pretrain.main(config)
    return RopeMMPipeline.from_pretrained(out / "model")


class LifelongEvaluator:
    """What is asked of a model of old and of new sprites."""

    def __init__(self, config: Lifelong):
        self.config = config
        wheres = {"old": config.data.where, "new": config.new}
        splits = captioned_sprites(config.fresh, seed=-1)
        self.fresh = {name: select_rows(splits, where)["train"] for name, where in wheres.items()}

    @torch.no_grad()
    def predict(self, teller: RopeMMPipeline) -> float:
        """The loss of the words of fresh old documents, each told once."""
        config, rows = self.config, self.fresh["old"]
        told = MapDocuments([rows], config.data.templates, config.data.size, config.data.channels)
        feed = PackedDocumentDataset(
            told, Packer(teller.processor, config.length, IMAGE_HEADS["mse"].times), 0, config.batch
        )
        packs = [feed[turn].pack for turn in range(-(-len(rows) // config.batch))]
        lost = [float(teller.model(**p.inputs(), labels=p.labels).loss) * p.words for p in packs]
        return sum(lost) / sum(pack.words for pack in packs)

    def examine(self, teller: RopeMMPipeline, drawing: bool) -> Marks:
        """The loss of words and, of a model that draws, the marks of old and of new sprites."""
        marks = {"words": self.predict(teller)}
        for name in self.fresh if drawing else ():
            marks |= self.evaluate(teller, name)
        return marks

    def combinations(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors (n, f) of every combination among the rows, and which each row (r,) shows."""
        factors = torch.tensor([list(self.fresh[name][factor]) for factor in FACTORS]).T
        return factors.unique(dim=0, return_inverse=True)

    def draw(self, teller: RopeMMPipeline, name: str) -> tuple[list[str], Tensor, Tensor]:
        """A caption of each combination, its factors (n, f), and pictures of it (n, draws, ch, y, x)."""
        combinations, which = self.combinations(name)
        first = [which.tolist().index(number) for number in range(len(combinations))]
        said = [cast(str, self.fresh[name][row]["caption"]) for row in first]
        prompts = [teller.prompt("text2image", words) for words in said for _ in range(self.config.draws)]
        drawn = teller.generate_image(prompts, make_generator("lifelong")).unflatten(0, (len(said), -1))
        return said, combinations, drawn

    def spread(self, name: str) -> float:
        """The standard deviation of a pixel among true pictures of one combination."""
        combinations, which = self.combinations(name)
        true = torch.stack(self.pictures(self.fresh[name]))
        alike = [true[which == number] for number in range(len(combinations))]
        return torch.stack([each.var(0) for each in alike if len(each) > 1]).mean().sqrt().item()

    def evaluate(self, teller: RopeMMPipeline, name: str) -> Marks:
        """Shares of old or new sprites: drawn right, drawn right at least once, told right of a picture.

        `spread` is the standard deviation of a pixel among drawings of one caption; of true pictures it is 1.
        """
        _, asked, drawn = self.draw(teller, name)
        seen = classify_sprites(drawn.flatten(0, 1))
        found = torch.stack([seen[factor] for factor in FACTORS], 1).unflatten(0, drawn.shape[:2])
        agrees = found == asked[:, None]
        right = agrees.all(2)
        rows = self.fresh[name].select(range(min(self.config.captions, len(self.fresh[name]))))
        prompts = [teller.prompt("image2text", visual=picture) for picture in self.pictures(rows)]
        told = teller.generate_text(prompts)
        said = [
            all(read_caption(words)[factor] == row[factor] for factor in FACTORS)
            for words, row in zip(told, cast(Any, rows), strict=True)
        ]
        return {
            f"{name} drawn right": right.float().mean().item(),
            f"{name} covered": right.any(1).float().mean().item(),
            f"{name} spread": drawn.var(1).mean().sqrt().item() / self.spread(name),
            f"{name} captioned right": mean(map(float, said)),
            **{
                f"{name} {factor} drawn right": agrees[..., i].float().mean().item()
                for i, factor in enumerate(FACTORS)
            },
        }

    def pictures(self, rows: Dataset) -> list[Tensor]:
        """The pictures (ch, y, x) of rows, in [-1, 1]."""
        size, channels = self.config.data.size, self.config.data.channels
        return [resize_center_crop(picture, size, channels) / 127.5 - 1 for picture in rows["image"]]

    def sheet(self, path: Path, tellers: Sequence[RopeMMPipeline], rows: int = 5, columns: int = 3) -> None:
        """Old captions, then new ones; from left to right what each model draws, with gaps between."""
        lines, pictures = [], []
        for name in self.fresh:
            drawn = [self.draw(teller, name) for teller in tellers]
            said = drawn[0][0]
            for row in range(0, len(said), -(-len(said) // rows)):
                lines.append(said[row])
                parts = [
                    part
                    for _, _, made in drawn
                    for part in (made[row, :columns], torch.ones_like(made[row, :1]))
                ]
                pictures.append(torch.cat(parts[:-1]))
        save_sheet(path, torch.cat(pictures), lines)


def report(marks: Mapping[str, Sequence[Marks]]) -> tuple[str, dict[str, float]]:
    """The tables of all runs, and the mean difference of the losses of words, with its standard error."""
    loss = {name: [mark["words"] for mark in marks[name]] for name in ("words", "pictures")}
    lost = [
        with_pictures - alone for with_pictures, alone in zip(loss["pictures"], loss["words"], strict=True)
    ]
    apart = {"difference": mean(lost), "error": stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0}
    rows = [["words alone", markdown.spread(loss["words"], ".4f")]]
    rows += [["words, and pictures by a critic", markdown.spread(loss["pictures"], ".4f")]]
    rows += [["difference ± standard error", f"{apart['difference']:+.4f} ± {apart['error']:.4f}"]]
    drawn = []
    for name in filter("words".__ne__, marks["pictures"][0]):
        shares = [[100 * mark[name] for mark in marks[phase]] for phase in PHASES]
        drawn.append([name, *(markdown.spread(share, ".1f") for share in shares)])
    words = markdown.table(["learned", "loss of words"], rows, "---:")
    return f"{words}\n\n{markdown.table(['sprites, in %', *PHASES.values()], drawn, '---:')}\n", apart


def write(config: Lifelong, marks: Mapping[str, Sequence[Marks]]) -> str:
    """The tables, which are written with all marks."""
    out, (text, apart) = Path(config.out), report(marks)
    found = {"settings": asdict(replace(config, out="")), "difference of words": apart, "metrics": marks}
    write_text(out / "lifelong.json", json.dumps(found, indent=1))
    write_text(out / "table.md", text)
    return f"{text}\n{out}/table.md, lifelong.json, lifelong.png"


def main(config: Lifelong) -> None:
    """Run what is not yet done, and tell after each seed what the runs so far say.

    Raises:
        ValueError: as `train/pretrain.py`; data of no use here.
    """
    plan, exam, told = runs(config), LifelongEvaluator(config), ""
    marks: dict[str, list[Marks]] = {name: [] for name in plan}
    with tqdm(total=sum(map(len, plan.values())), desc="runs") as bar:
        for seed in range(config.seeds):
            tellers = {}
            for name in (name for name, found in plan.items() if seed < len(found)):
                bar.set_postfix_str(plan[name][seed].out)
                tellers[name] = trained(plan[name][seed])
                marks[name].append(exam.examine(tellers[name], drawing=name in PHASES))
                bar.update()
            told = write(config, marks)
            if not seed:
                exam.sheet(Path(config.out) / "lifelong.png", [tellers[name] for name in PHASES])
    print(told)


if __name__ == "__main__":
    run(main, Lifelong)
