"""Do rotary schemes matter? One small model for each scheme and seed, all else equal, asked about places.

    python train/compare_schemes.py --config configs/compare/small.yaml

The same command again goes on: a run that is done is not run again. OUT/table.md, OUT/compare.json and
OUT/compare.png tell how often answers are right at trained and untrained sizes, and what is inside the noise.
The figure wants matplotlib: pip install rope-mm[plots].
"""

import json
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rope_mm.data import batch_indices
from rope_mm.data.synthetic.qa_tasks import make_qa_samples
from rope_mm.evaluation.comparison import draw_figure, summarise, write_table
from rope_mm.evaluation.qa import (
    EncodedQA,
    encode_qa,
    generate_answers,
    load_qa_tokenizer,
    place_qa,
    score_answers,
)
from rope_mm.files import write_text
from rope_mm.models import IMAGE_TOKEN, RopeMMForConditionalGeneration, read_config
from rope_mm.training.config import at_least, run

FREE = "out", "schemes", "seeds", "threads", "device"  # may change from one start to the next


@dataclass(frozen=True, kw_only=True)
class CompareSchemes:
    """Compare schemes on questions of place; the same command again goes on, runs that are done stay."""

    out: str = "runs/compare"
    schemes: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> fields of rope_parameters
    theta: float = 100.0  # of every scheme that names none
    seeds: int = 3
    steps: int = 1000
    batch: int = 64
    documents: int = 16384  # to train on, in equal parts of the trained forms
    questions: int = 200  # of every form, to judge by
    picture_weight: float = 10.0  # of squared errors of what is drawn, beside the loss of words
    lr: float = 3e-3
    warm_up: int = 50
    model: dict[str, Any] = field(default_factory=dict)  # fields of RopeMMConfig
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)  # task -> form -> sizes
    untrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    threads: int = 0  # of torch on the CPU; 0 leaves them to torch
    device: str = "cpu"


class Benchmark:
    """Documents to train on and questions to judge by; the same for every scheme, the questions for all."""

    def __init__(self, config: CompareSchemes):
        self.config, self.size = config, config.model.get("patch_size", 2)
        self.trained = [(task, sizes) for task, forms in config.trained.items() for sizes in forms.values()]
        exams = {
            (kind, task, form): make_qa_samples(task, sizes, config.questions, "exam")
            for kind, tasks in (("trained", config.trained), ("untrained", config.untrained))
            for task, forms in tasks.items()
            for form, sizes in forms.items()
        }
        sample = [quiz for form in self.trained for quiz in make_qa_samples(*form, 16, "words")]
        self.tokenizer = load_qa_tokenizer(
            [*sample, *(quiz for quizzes in exams.values() for quiz in quizzes)]
        )
        self.exams = {
            form: [encode_qa(quiz, self.size, self.tokenizer) for quiz in quizzes]
            for form, quizzes in exams.items()
        }
        self.lessons = lru_cache(maxsize=1)(self.write_lessons)

    def write_lessons(self, seed: int) -> list[EncodedQA]:
        """The documents of a seed."""
        each = -(-self.config.documents // len(self.trained))
        told = [quiz for form in self.trained for quiz in make_qa_samples(*form, each, "lesson", seed)]
        return [encode_qa(quiz, self.size, self.tokenizer) for quiz in told]

    def judge(self, model: RopeMMForConditionalGeneration) -> dict[str, dict[str, dict[str, float]]]:
        """The share of right answers: trained or untrained -> task -> form."""
        marks: dict[str, dict[str, dict[str, float]]] = {}
        for (kind, task, form), told in self.exams.items():
            asked = place_qa(told, self.tokenizer, model.config.scheme)
            right = [score_answers(model, asked[i : i + 100]) for i in range(0, len(asked), 100)]
            marks.setdefault(kind, {}).setdefault(task, {})[form] = torch.cat(right).float().mean().item()
        return marks


def make_model(
    config: CompareSchemes, tokenizer: PreTrainedTokenizerBase, scheme: str, seed: int
) -> RopeMMForConditionalGeneration:
    """The model of a scheme; what is random depends on the seed alone."""
    torch.manual_seed(seed)
    settings = read_config(
        **{"num_channels": 3, **config.model},
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"theta": config.theta, **config.schemes[scheme]},
    )
    return RopeMMForConditionalGeneration(settings).to(config.device)  # pyright: ignore[reportArgumentType]


def train(config: CompareSchemes, school: Benchmark, scheme: str, seed: int, bar: tqdm) -> dict[str, Any]:
    """One run: the marks of a scheme's model, its parameters, what it took."""
    began = time.process_time()
    lessons = school.lessons(seed)
    taught = time.process_time()
    model = make_model(config, school.tokenizer, scheme, seed)
    asked = place_qa(lessons, school.tokenizer, model.config.scheme)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.99), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / config.warm_up, 1.25 * (1 - step / config.steps))
    )
    loss = torch.zeros(())
    for step in range(config.steps):
        chosen = batch_indices(len(asked), config.batch, seed, step).tolist()
        found = generate_answers(model, [asked[i] for i in chosen])
        loss = found.text_loss + config.picture_weight * found.image_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            bar.set_postfix(
                step=step + 1, text_loss=found.text_loss.item(), image_loss=found.image_loss.item()
            )
    if not loss.isfinite():
        raise ValueError(f"the loss of {scheme}, seed {seed}, is not finite; give a lower --lr")
    marks = school.judge(model.eval())
    cost = {"lessons_cpu_s": taught - began, "cpu_s": time.process_time() - taught}
    return {"metrics": marks, "parameters": model.num_parameters(), "loss": loss.item(), **cost}


def check(config: CompareSchemes) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: with the key and its value.
    """
    if len(config.schemes) < 2 or not config.trained:
        raise ValueError(
            f"schemes {list(config.schemes)} must be two or more, and trained name tasks; "
            "give --config configs/compare/small.yaml"
        )
    at_least(1, config, "seeds", "steps", "batch", "documents", "questions", "warm_up")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r} is not here; give --device cpu")


def read_run(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a run that is done has left, None where there is none.

    Raises:
        ValueError: one of other settings, or one that cannot be read.
    """
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in settings.items() if done["settings"].get(name) != value]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} is no run of this script; delete it") from None
    if differs:
        raise ValueError(f"{path} has another {', '.join(differs)}; delete it, or give another --out")
    return done


def main(config: CompareSchemes) -> None:
    """Run what is not done yet, then tell what all runs say.

    Raises:
        ValueError: a configuration that makes no comparison, runs of another one in its folder.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    out, school = Path(config.out), Benchmark(config)
    whole = {name: value for name, value in asdict(config).items() if name not in FREE}
    plan = [(seed, scheme) for seed in range(config.seeds) for scheme in config.schemes]
    runs: dict[str, list[dict[str, Any]]] = {scheme: [] for scheme in config.schemes}
    with tqdm(plan, desc="runs") as bar:
        for seed, scheme in bar:
            path = out / "runs" / f"{scheme}-{seed}.json"
            settings = {**whole, "scheme": config.schemes[scheme]}
            bar.set_description(f"{scheme}, seed {seed}")
            done = read_run(path, settings)
            if done is None:
                done = {"settings": settings, **train(config, school, scheme, seed, bar)}
                write_text(path, json.dumps(done, indent=1))
            runs[scheme].append({name: value for name, value in done.items() if name != "settings"})
    summary = summarise(runs)
    table = write_table(summary)
    report = {"settings": {**whole, "schemes": config.schemes}, "summary": summary, "runs": runs}
    write_text(out / "compare.json", json.dumps(report, indent=1))
    write_text(out / "table.md", table)
    draw_figure(out / "compare.png", summary)
    print(f"{table}\n{out}/table.md, compare.json, compare.png")


if __name__ == "__main__":
    run(main, CompareSchemes)
