"""25 Gaussians on a grid: which modes small networks find with each loss and penalty, over several seeds.

    python train/gaussians.py --config configs/adversarial/gaussians.yaml
    python train/gaussians.py --output_dir runs/mine --rows.mine "{loss: hinge, penalties: {r1: 0.1}}"

Finished rows are kept: the same command again trains only the others. The figure needs matplotlib: pip
install rope-mm[plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu
from tqdm import tqdm, trange

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.data import make_generator
from rope_mm.evaluation.metrics import gaussian_modes
from rope_mm.files import write_file, write_text
from rope_mm.losses import DISTANCES, FIELDS, GAN_LOSSES, METHODS, PENALTIES, energy_score, follow_field
from rope_mm.losses.divergences import Curve
from rope_mm.losses.penalties import GradientPenalty
from rope_mm.registry import Registry
from rope_mm.training.config import check_options, option, run
from rope_mm.training.ema import Ema


@dataclass(frozen=True)
class FieldLoss:
    """A loss of samples that follow a field.

    Attributes:
        field: a key of FIELDS.
        options: keys of a row that the field takes.
    """

    field: str
    options: tuple[str, ...] = ()

    def __call__(self, samples: Tensor, real: Tensor, row: "Row", progress: float) -> Tensor:
        """The loss of samples (2, b, 2), the first of which follow; see `WITHOUT_CRITIC`."""
        fall = row.final_width_ratio ** min(1.0, 1.5 * progress)
        widths = [width * fall for width in row.widths]
        options = {name: getattr(row, name) for name in self.options}
        return follow_field(samples[0], real, samples[1], self.field, widths, **options).loss


# name -> (two samples (2, b, 2) for every real one, real ones (b, 2), row, part of the training) -> loss
WITHOUT_CRITIC: dict[str, Callable[[Tensor, Tensor, "Row", float], Tensor]] = {
    "energy": lambda samples, real, row, progress: energy_score(samples, real).mean(),
    **{name: FieldLoss(name) for name in FIELDS},
    "wflow": FieldLoss("wflow", ("iterations",)),
}
LOSSES: Registry[Any] = Registry("loss", {**GAN_LOSSES, **WITHOUT_CRITIC})


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a loss, with gradient penalties where it has a critic."""

    loss: str = option("rpgan", "adversarial loss, energy, or a field that samples follow", choices=LOSSES)
    penalties: dict[str, float] = option({}, "gradient penalty -> gamma", keys=PENALTIES, minimum=0)
    method: str = option("autograd", "estimator of gradient penalties", choices=METHODS)
    distance: str = option("l2", "of gan-qp", choices=DISTANCES)
    critic_steps: int = option(1, "before each step of the generator", minimum=1)
    widths: list[float] = option([0.02, 0.05, 0.2], "of a field's kernels, over the mean distance", above=0)
    final_width_ratio: float = option(
        1.0, "to which part of themselves widths fall in the first two thirds", above=0
    )
    iterations: int = option(10, "of Sinkhorn's algorithm, of wflow", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all rows share: networks of three hidden layers; Adam's rate falls in the second half."""

    steps: int = option(6_000, "of the generator", minimum=1)
    batch_size: int = option(256, "samples of a step", minimum=1)
    width: int = option(96, "of hidden layers", minimum=1)
    noise: int = option(16, "inputs of the generator", minimum=1)
    lr: float = option(1e-3, "learning rate of both networks", minimum=0)
    betas: tuple[float, float] = option((0.0, 0.99), "of Adam", minimum=0, below=1)
    ema_decay: float = option(0.999, "of the average of the generator's weights", minimum=0, below=1)
    samples: int = option(10_000, "of each seed, for the metrics", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """Train every row on every seed, all seeds at once, and print a table of their metrics.

    Writes OUTPUT_DIR/<row>.pt after each row, and gaussians.json and gaussians.png with all of them.
    """

    output_dir: str = option("runs/gaussians", "folder of the results")
    seeds: list[int] = option([0, 1, 2], "of each row")
    rows: dict[str, Row] = option({}, "rows of the table")
    settings: Settings = option(Settings(), "what all rows share")


SIGMA = 0.05
CENTRES = torch.cartesian_prod(torch.arange(-4.0, 5, 2), torch.arange(-4.0, 5, 2))  # PacGAN, 1712.04086
SCALE = 8.0025**0.5  # deviation of either coordinate; networks see data of unit deviation


def true_samples(count: int, generator: torch.Generator) -> Tensor:
    """Samples (count, 2) of the mixture."""
    modes = torch.randint(len(CENTRES), (count,), generator=generator)
    return CENTRES[modes] + SIGMA * torch.randn(count, 2, generator=generator)


class Perceptrons(nn.Module):
    """A perceptron for each seed: (s, b, i) -> (s, b, o).

    Args:
        widths: of its layers.
        activation: after each but the last.
        generators: of the weights, one for each seed.
    """

    def __init__(self, widths: Sequence[int], activation: Curve, generators: Sequence[torch.Generator]):
        super().__init__()
        self.activation, pairs = activation, list(pairwise(widths))

        def uniform(rows: int, i: int, o: int) -> nn.Parameter:  # as nn.Linear begins
            draws = [torch.rand(rows, o, generator=generator) for generator in generators]
            return nn.Parameter((2 * torch.stack(draws) - 1) / i**0.5)

        self.weights = nn.ParameterList(uniform(i, i, o) for i, o in pairs)
        self.biases = nn.ParameterList(uniform(1, i, o) for i, o in pairs)

    def forward(self, x: Tensor, seeds: slice = slice(None)) -> Tensor:
        """The outputs of all seeds, or of these."""
        *inner, last = zip(self.biases, self.weights, strict=True)
        for bias, weight in inner:
            x = self.activation(torch.baddbmm(bias[seeds], x, weight[seeds]))
        return torch.baddbmm(last[0][seeds], x, last[1][seeds])


class GanExperiment:
    """Generator and critic of a row on several seeds at once; seeds do not influence one another.

    Args:
        row: loss and penalties.
        settings: what all rows share.
        seeds: of random numbers.
    """

    def __init__(self, row: Row, settings: Settings, seeds: Sequence[int]):
        self.row, self.settings = row, settings
        self.random, hidden = [make_generator(seed, "gaussians") for seed in seeds], [settings.width] * 3
        self.generator = Perceptrons([settings.noise, *hidden, 2], relu, self.random)
        self.critic = Perceptrons([2, *hidden, 1], lambda x: leaky_relu(x, 0.2), self.random)
        self.average = Ema(self.generator, settings.ema_decay)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), settings.lr, settings.betas, fused=True)
            for network in (self.generator, self.critic)
        ]

    def noise(self, count: int) -> Tensor:
        """Inputs (s, count, noise) of the generator."""
        return torch.stack([torch.randn(count, self.settings.noise, generator=r) for r in self.random])

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """The row's penalties on the images (s, b, 2), each seed's on its own, summed."""
        terms = [torch.zeros(())]
        for name, gamma in self.row.penalties.items():
            penalty = PENALTIES[name]
            if not isinstance(penalty, GradientPenalty):
                raise ValueError(f"a row takes gradient penalties, and {name!r} is one of scores")
            for seed, generator in enumerate(self.random):
                critic = lambda x, mine=slice(seed, seed + 1): self.critic(x[None], mine)[0, :, 0]  # noqa: E731
                term = penalty.of(critic, real[seed], fake[seed], method=self.row.method, generator=generator)
                terms.append(gamma * term)
        return torch.stack(terms).sum()

    def scores(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (s, b) of either side."""
        real, fake = self.critic(torch.cat([real, fake], dim=1))[..., 0].chunk(2, dim=1)
        return real, fake

    def update_critic(self, real: Tensor, fake: Tensor) -> None:
        """One step of the critic on images (s, b, 2)."""
        loss, extra = GAN_LOSSES[self.row.loss], ()
        if loss.needs_distance:
            distance = DISTANCES[self.row.distance](real.flatten(0, 1), fake.flatten(0, 1))
            extra = (distance.view(real.shape[:2]),)
        value = torch.vmap(loss.critic)(*self.scores(real, fake), *extra).sum()
        self.optimizers[1].zero_grad()
        (value + self.penalty(real, fake)).backward()
        self.optimizers[1].step()

    def step(self, progress: float) -> None:
        """The critic's steps and one of the generator, at a part, from 0 to 1, of the training."""
        for optimizer in self.optimizers:
            late = max(0.0, 2 * progress - 1)
            optimizer.param_groups[0]["lr"] = self.settings.lr * (1 + math.cos(math.pi * late)) / 2
        value = self.generator_loss() if self.row.loss in GAN_LOSSES else self.loss_without_critic(progress)
        self.optimizers[0].zero_grad()
        value.backward(inputs=list(self.generator.parameters()))
        self.optimizers[0].step()
        self.average.update(self.generator)

    def real(self) -> Tensor:
        """True samples (s, b, 2), as networks see them."""
        return torch.stack([true_samples(self.settings.batch_size, r) for r in self.random]) / SCALE

    def generator_loss(self) -> Tensor:
        """The loss of the generator, after the critic's steps."""
        real = fake = torch.empty(0)
        for _ in range(self.row.critic_steps):
            real, fake = self.real(), self.generator(self.noise(self.settings.batch_size))
            self.update_critic(real, fake.detach())
        return torch.vmap(GAN_LOSSES[self.row.loss].generator)(*self.scores(real, fake)).sum()

    def loss_without_critic(self, progress: float) -> Tensor:
        """The loss of two independent samples for every real one, at a part of the training."""
        if self.row.penalties:
            raise ValueError(
                f"{self.row.loss} has no critic that penalties {self.row.penalties} could restrain"
            )
        real, loss = self.real(), WITHOUT_CRITIC[self.row.loss]
        samples = self.generator(self.noise(2 * self.settings.batch_size)).unflatten(1, (2, -1))
        return torch.stack(
            [loss(both, target, self.row, progress) for both, target in zip(samples, real, strict=True)]
        ).sum()

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Samples (s, samples, 2) of the averaged generators."""
        return SCALE * self.average.model(self.noise(self.settings.samples))


def train_row(row: Row, settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Train a row; the samples (s, n, 2) of its seeds and the time that they took together.

    Args:
        row: loss and penalties.
        settings: what all rows share.
        seeds: of random numbers.
    """
    began, worked = time.perf_counter(), time.process_time()
    experiment = GanExperiment(row, settings, seeds)
    for step in trange(settings.steps, leave=False):
        experiment.step(step / settings.steps)
    return {
        "samples": experiment.samples(),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }


def finished(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if it is of this row."""
    if not path.exists():
        return None
    result = torch.load(path, weights_only=True)
    return result if result["of"] == identity else None


def metrics_of(samples: Tensor) -> dict[str, list[float]]:
    """Every metric of samples (s, n, 2), seed by seed."""
    of_seeds = [gaussian_modes(of_one, CENTRES, SIGMA) for of_one in samples]
    return {name: [of_seed[name] for of_seed in of_seeds] for name in of_seeds[0]}


COLUMNS = {
    "modes": ".1f",
    "modes_covered": ".1f",
    "min_mode_share": ".2f",
    "quality": ".3f",
    "kl": ".4f",
    "spread": ".2f",
}


def table(numbers: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the processor's seconds for all of them."""
    lines = [
        [
            name,
            *(markdown.spread(row[key], form) for key, form in COLUMNS.items()),
            f"{row['cpu_seconds']:.0f}",
        ]
        for name, row in numbers.items()
    ]
    return markdown.table(["row", *COLUMNS, "CPU s"], lines)


def draw_figure(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write a figure of samples of every row's first seed, beside true ones."""
    columns = min(5, len(results))
    rows = -(-len(results) // columns)
    figure = new_figure(2.2 * columns, 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        axes.plot(*result["samples"][0, :2500].T, ",", color="k", alpha=0.6)
        axes.set(title=name, xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
        axes.title.set_fontsize("small")
    save_figure(path, figure, dpi=80)


def truth(settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """The row of true samples, the best that a generator can do."""
    samples = [true_samples(settings.samples, make_generator(seed, "truth")) for seed in seeds]
    return {"samples": torch.stack(samples), "seconds": 0.0, "cpu_seconds": 0.0}


def main(config: Gaussians) -> None:
    """Train the rows that are not finished; the table, its numbers and its figure.

    Raises:
        ValueError: no rows or seeds, a row that cannot be trained, no matplotlib.
    """
    check_options(config)
    if not config.rows or not config.seeds:
        raise ValueError(
            "rows and seeds must name something; give --config configs/adversarial/gaussians.yaml"
        )
    for row in config.rows.values():
        # refuses what cannot be trained before any row is trained
        GanExperiment(row, config.settings, config.seeds).step(0.0)
    new_figure(1, 1)  # refuses a missing matplotlib before any row is trained
    output_dir, results = Path(config.output_dir), {"true samples": truth(config.settings, config.seeds)}
    for name in (bar := tqdm(config.rows, desc="gaussians")):
        bar.set_postfix_str(name)
        row = config.rows[name]
        identity = json.loads(json.dumps([asdict(row), asdict(config.settings), config.seeds]))
        result = finished(output_dir / f"{name}.pt", identity)
        if result is None:
            result = {"of": identity} | train_row(row, config.settings, config.seeds)
            write_file(output_dir / f"{name}.pt", lambda part, r=result: torch.save(r, part))
        results[name] = result
    numbers = {
        name: metrics_of(result["samples"]) | {key: result[key] for key in ("seconds", "cpu_seconds")}
        for name, result in results.items()
    }
    write_text(output_dir / "gaussians.json", json.dumps(numbers, indent=1))
    draw_figure(output_dir / "gaussians.png", results)
    print(table(numbers))
    print(f"numbers of every seed: {output_dir}/gaussians.json   samples: {output_dir}/gaussians.png")


if __name__ == "__main__":
    run(main, Gaussians, lock=True)
