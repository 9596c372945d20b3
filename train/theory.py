"""The theory behind the adversarial losses, run: every figure, animation and number from its equation.

    python train/theory.py --output_dir runs/theory

Two minutes on one core. It needs matplotlib: pip install rope-mm[plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.func import vmap
from tqdm import tqdm

from rope_mm.analysis.figures import new_figure, save_animation, save_figure
from rope_mm.files import write_text
from rope_mm.losses import F_DIVERGENCES, METHODS, MONOTONE
from rope_mm.theory.dynamics import Descent, Dirac, average, eigenvalues, flow, growth, walk, wedge
from rope_mm.theory.flow import (
    follow,
    gaussian,
    gaussian_ratio,
    jko,
    langevin,
    learned_ratio,
    raw,
    transport,
)
from rope_mm.training.config import option, run


@dataclass(frozen=True, kw_only=True)
class Theory:
    """Draw the Dirac-GAN's dynamics, flows of particles, MonoFlow and the bias of finite differences.

    Writes OUTPUT_DIR/<chapter>.png after each chapter, particles.webp, and at the end theory.json with all
    numbers.
    """

    output_dir: str = option("runs/theory", "folder of the figures and numbers")
    seed: int = option(0, "of Langevin's noise, generators' batches and the critic of the last chapter")


START = torch.tensor([[0.1, 0.2], [0.2, 0.1]], dtype=torch.float64)  # kexue.fm/archives/6583
ORIGIN = torch.zeros(2, 1, dtype=torch.float64)

# the article's five portraits: the game, the time that it shows, and one by which its end is reached
PORTRAITS = {
    "ns": (Dirac(loss="ns"), 100, 700),
    "wgan, normalised critic": (Dirac(loss="wgan", critic="normalised"), 10, 10),
    "wgan, zero-centred penalty": (Dirac(loss="wgan", penalties={"zero-centred": 0.2}), 40, 40),
    "wgan, one-centred penalty": (Dirac(loss="wgan", penalties={"one-centred": 0.2}), 40, 200),
    "gan-qp": (Dirac(loss="gan-qp"), 70, 300),
}


def portraits(figure: Any, seed: int) -> dict:
    """Trajectories of five games in the plane from the article's start."""
    numbers = {}
    for axes, (name, (game, shown, end)) in zip(figure.subplots(1, 5), PORTRAITS.items(), strict=True):
        theta = flow(game.field, START, torch.linspace(0, shown, 2000), 1e-7)[:, 1]
        axes.plot(theta[:, 0], theta[:, 1], linewidth=0.6)
        axes.set(title=name, aspect="equal", xlabel="theta")
        states = flow(game.field, START, torch.linspace(0, end, 400), 1e-7)
        radius = states.norm(dim=-1)
        numbers[name] = {
            "time": end,
            "radius_end": radius[-1].tolist(),
            "theta_mean": radius[:, 1].mean().item(),
            "theta_max": radius[:, 1].max().item(),
            "wedge": wedge(states[[0, -1]]).tolist(),
        }
    return numbers


# games of two numbers, phi and theta, whose velocities fill a plane
GAMES = {
    "ns": Dirac(loss="ns"),
    "ns, r1 0.3": Dirac(loss="ns", penalties={"r1": 0.3}),
    "wgan": Dirac(loss="wgan"),
    "wgan, one-centred penalty 0.2": Dirac(loss="wgan", penalties={"one-centred": 0.2}),
}


def phase(figure: Any, seed: int) -> dict:
    """Phase portraits: where each pair of a critic phi and a generator theta goes, and one path."""
    numbers, line = {}, torch.linspace(-1.55, 1.55, 24, dtype=torch.float64)
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for axes, (name, game) in zip(figure.subplots(1, len(GAMES)), GAMES.items(), strict=True):
        states = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2, 1)
        towards = vmap(game.field)(states).view(len(line), len(line), 2)  # theta down, phi across
        speeds = {"color": towards.norm(dim=-1).numpy(), "cmap": "cividis"}
        axes.streamplot(line.numpy(), line.numpy(), *towards.movedim(-1, 0).numpy(), **speeds, linewidth=0.7)
        path = flow(game.field, start, torch.linspace(0, 60, 1200), 1e-6)[..., 0]
        axes.plot(path[:, 0], path[:, 1], color="#D55E00", linewidth=1)
        axes.plot(0, 0, "o", color="black", markersize=4)
        axes.set(title=name, xlabel="phi", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        numbers[name] = {"distance_at_60": path[-1].norm().item()}
    figure.axes[0].set_ylabel("theta")
    return numbers


def damping(figure: Any, seed: int) -> dict:
    """Eigenvalues at the equilibrium over gamma of r1, and their formula with slope f' = 1/2."""
    gammas = torch.linspace(0, 2, 41, dtype=torch.float64)
    found = torch.stack([eigenvalues(Dirac(penalties={"r1": g}).field, ORIGIN) for g in gammas.tolist()])
    root = (gammas**2 / 4 - 0.25 + 0j).sqrt()
    exact = torch.stack([-gammas / 2 + root, -gammas / 2 - root], dim=1)
    order = lambda z: z.gather(1, (z.real + 1j * z.imag).imag.add(1e-3 * z.real).argsort(1))  # noqa: E731
    axes = figure.subplots()
    axes.plot(gammas, found.real, "b.", gammas, exact.real, "b-", linewidth=0.6)
    axes.plot(gammas, found.imag, "r.", gammas, exact.imag, "r-", linewidth=0.6)
    axes.set(xlabel="gamma of r1", title="eigenvalues: real part blue, imaginary part red, formula as lines")
    return {"largest_error": (order(found) - order(exact)).abs().max().item()}


def threshold(descent: Callable[[float], Descent], game: Dirac, low: float, high: float) -> float:
    """Rate at which a step begins to grow.

    Args:
        descent: learning rate -> a step of both players.
        game: the Dirac-GAN.
        low: rate at which a step shrinks.
        high: rate at which a step grows.
    """
    return float(brentq(lambda rate: growth(descent(rate), game.field, ORIGIN) - 1 - 1e-6, low, high))  # type: ignore


def steps(figure: Any, seed: int) -> dict:
    """How much one discrete step grows, over its rate; and with momentum."""
    plain, rates = Dirac(), torch.linspace(0.05, 4.5, 60).tolist()
    kinds: dict[str, tuple[Callable[[float], Descent], Dirac, float]] = {
        "simultaneous, r1 0.1": (lambda r: Descent(rate=r), Dirac(penalties={"r1": 0.1}), 0.4),
        "simultaneous, r1 0.3": (lambda r: Descent(rate=r), Dirac(penalties={"r1": 0.3}), 1.2),
    } | {
        f"alternating {d}:{g}": (
            lambda r, turns=(d, g): Descent(rate=r, turns=turns),
            plain,
            4 / math.sqrt(d * g),
        )
        for d, g in ((1, 1), (2, 1), (5, 1))
    }
    axes = figure.subplots()
    axes.plot(rates, [growth(Descent(rate=r), plain.field, ORIGIN) for r in rates], label="simultaneous")
    numbers = {}
    for name, (descent, game, formula) in kinds.items():
        axes.plot(rates, [growth(descent(r), game.field, ORIGIN) for r in rates], label=name)
        numbers[name] = {
            "threshold": threshold(descent, game, formula / 2, formula * 1.5),
            "formula": formula,
        }
    axes.set(xlabel="rate", ylim=(0.8, 1.8), title="growth of one step; stable below 1")
    axes.legend()
    damped = Dirac(penalties={"r1": 0.3})
    numbers["momentum at rate 0.2: simultaneous, alternating, alternating with r1 0.3"] = {
        f"{beta:g}": [
            growth(Descent(rate=0.2, momentum=beta, turns=turns), game.field, ORIGIN)
            for turns, game in ((None, plain), ((1, 1), plain), ((1, 1), damped))
        ]
        for beta in (-0.5, 0.0, 0.5, 0.9)
    }
    return numbers


def averages(figure: Any, seed: int) -> dict:
    """Alternating steps of the non-saturating loss circle; the average of their weights stands still."""
    start = torch.ones(2, 1, dtype=torch.float64)
    path = torch.stack(list(walk(Descent(rate=0.1, turns=(1, 1)), Dirac().field, start, 20_000)))[:, 1, 0]
    mean = average(path, 0.999)
    axes = figure.subplots()
    axes.semilogy(path.abs(), linewidth=0.4, label="|theta|")
    axes.semilogy(mean.abs(), linewidth=0.8, label="|average|, decay 0.999")
    axes.set(xlabel="step")
    axes.legend()
    last, averaged = (x[-126:].abs().max().item() for x in (path, mean))  # of the last turn
    return {"theta": last, "average": averaged, "closer": last / averaged}


def closed_kl(time: float) -> float:
    """KL(q_t‖p) of q_0 = N(2, 0.3²), p = N(0, 1), along the flow."""
    mean, variance = 2 * math.exp(-time), 1 + (0.09 - 1) * math.exp(-2 * time)
    return (variance + mean**2 - 1 - math.log(variance)) / 2


def quantiles(count: int, mean: float, spread: float) -> Tensor:
    """Sorted particles (n, 1) of a normal distribution.

    Args:
        count: n, of particles.
        mean: of the distribution.
        spread: its standard deviation.
    """
    z = Normal(0, 1).icdf((torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count)
    return mean + spread * z / z.std(correction=0)


def divergences(figure: Any, seed: int) -> dict:
    """KL(q_t‖p) of particles that follow the flow in four ways, and its closed form."""
    p = MultivariateNormal(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    noise, start, count = torch.Generator().manual_seed(seed), quantiles(1000, 2, 0.3), 80
    proximal = [quantiles(64, 2, 0.3)]
    for _ in range(count):
        proximal.append(jko(proximal[-1][:, 0], p, 2 / count)[:, None])
    paths = {
        "exact ratio": transport(start, gaussian_ratio(p), MONOTONE["logit"], 2.0, count),
        "learned ratio": transport(
            start, learned_ratio(quantiles(1000, 0, 1)), MONOTONE["logit"], 2.0, count
        ),
        "Langevin": langevin(quantiles(2**20, 2, 0.3), p, 2.0, count, noise),
        "JKO, first order in its rate 0.025": iter(proximal[1:]),
    }
    axes, times = figure.subplots(), [2 * (step + 1) / count for step in range(count)]
    axes.semilogy(times, [closed_kl(t) for t in times], "k-", label="closed form")
    numbers: dict[str, Any] = {"closed form": {str(t): closed_kl(t) for t in (0.5, 1, 2)}}
    for name, path in paths.items():
        kl = [kl_divergence(gaussian(particles), p).item() for particles in path]
        axes.semilogy(times[::4], kl[::4], ".", label=name)
        numbers[name] = {str(t): kl[round(t * count / 2) - 1] for t in (0.5, 1, 2)}
    axes.set(xlabel="t", title="KL(q‖p)")
    axes.legend()
    return numbers


TARGET = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 0.89]]))


def monoflow(figure: Any, seed: int) -> dict:
    """MonoFlow's table: a generator of a Gaussian under each increasing h, and under raw f(r)."""
    numbers, (left, right) = {}, figure.subplots(1, 2)
    rows = [(left, f"h {name}", h, 0.01) for name, h in MONOTONE.items()]
    # without raw Neyman: its mean E q²/p is infinite where q is wider than p
    rows += [
        (right, f"raw f {name}", raw(F_DIVERGENCES[name]), 0.001)
        for name in ("reverse-kl", "gan", "kl", "pearson", "hellinger", "js")
    ]
    for axes, name, h, rate in tqdm(rows, desc="monoflow", leave=False):
        path = list(follow(TARGET, h, rounds=3000, rate=rate, seed=seed))
        axes.semilogy([q.mean.norm() for q in path[::10]], label=name)
        numbers[name] = {"mean": path[-1].mean.tolist(), "cov": path[-1].covariance_matrix.tolist()}
    for axes, title in ((left, "increasing h"), (right, "raw f(r), r held fixed")):
        axes.set(xlabel="round / 10", title=f"‖mean‖, {title}")
        axes.legend(fontsize="x-small")
    return numbers


PARTICLES, FILM_STEPS, FILM_TIME = 400, 40, 1.5
PANELS = "exact ratio", "learned ratio", "Langevin"


def particle_paths(seed: int) -> list[list[Tensor]]:
    """Particles (n, 2) at each step of the flow of KL in three ways, in the order of PANELS."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(PARTICLES, 2, generator=random) * 0.3 + torch.tensor([-2.0, 2.0])
    noise = torch.randn(PARTICLES, 2, generator=random)
    real = TARGET.mean + noise @ torch.linalg.cholesky(TARGET.covariance_matrix).T
    h, time = MONOTONE["logit"], FILM_TIME
    flows = (
        transport(start, gaussian_ratio(TARGET), h, time, FILM_STEPS),
        transport(start, learned_ratio(real), h, time, FILM_STEPS),
        langevin(start, TARGET, time, FILM_STEPS, random),
    )
    return [[start, *path] for path in flows]


def draw_particles(figure: Any, paths: list[list[Tensor]], step: int) -> None:
    """Particles at a step, and circles of one and two standard deviations of what they come to.

    Args:
        figure: to draw in.
        paths: as `particle_paths` gives them.
        step: from 0.
    """
    turn = torch.linspace(0, math.tau, 100)
    circle = torch.stack((turn.cos(), turn.sin()), -1) @ torch.linalg.cholesky(TARGET.covariance_matrix).T
    for axes, name, path in zip(figure.subplots(1, len(paths)), PANELS, paths, strict=True):
        axes.plot(path[step][:, 0], path[step][:, 1], "o", color="#0072B2", markersize=2, alpha=0.6)
        for size in (1, 2):
            axes.plot(*(size * circle).T, color="#D55E00", linewidth=1)
        axes.set(title=name, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    figure.suptitle(f"t = {FILM_TIME * step / FILM_STEPS:.2f}", fontsize=10)


def particles(figure: Any, seed: int) -> dict:
    """KL(q‖p) along the paths of `particle_paths`, which the animation shows."""
    axes, numbers = figure.subplots(), {}
    times = [FILM_TIME * step / FILM_STEPS for step in range(FILM_STEPS + 1)]
    for name, path in zip(PANELS, particle_paths(seed), strict=True):
        kl = [kl_divergence(gaussian(q), TARGET).item() for q in path]
        axes.semilogy(times, kl, label=name)
        numbers[name] = {"kl_start": kl[0], "kl_end": kl[-1]}
    axes.set(xlabel="t", title="KL(q‖p) of the particles")
    axes.legend()
    return numbers


def save_film(path: Path, seed: int) -> None:
    """Write the particles of every second step as an animation."""
    paths, figures = particle_paths(seed), []
    for step in range(0, FILM_STEPS + 1, 2):
        figures.append(new_figure(9, 3.4))
        draw_particles(figures[-1], paths, step)
    save_animation(path, figures)


def many_steps(figure: Any, seed: int) -> dict:
    """Fifty generator steps on one critic: the usual loss overshoots, the projection descends."""
    numbers, axes = {}, figure.subplots()
    for name, push in (("-E h(D)", None), ("E‖x - x_t - 0.1 ∇D‖²", 0.1)):
        path = follow(TARGET, MONOTONE["logit"], rounds=60, rate=0.01, inner=50, push=push, seed=seed)
        kl = [kl_divergence(q, TARGET).item() for q in path]
        axes.semilogy(kl, label=name)
        numbers[name] = {"kl_end": kl[-1], "kl_max_after_5": max(kl[5:])}
    axes.set(xlabel="round of 50 steps", title="KL(q‖p)")
    axes.legend()
    return numbers


class Scorer(nn.Module):
    """A critic of two transformer blocks on 16 tokens of 16 entries."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.into, self.out = nn.Linear(16, 64), nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        return 4 * self.out(self.inner(self.into(images))).mean((1, 2))


def differences(figure: Any, seed: int) -> dict:
    """‖∇D‖² by finite difference over its exact value, in float32 and with bfloat16 weights."""
    torch.manual_seed(seed)
    critic, images = Scorer(), torch.randn(256, 16, 16)
    rounded = Scorer().bfloat16()
    rounded.load_state_dict(critic.state_dict())
    exact = METHODS["autograd"](critic, images, 0.0, None).mean().item()
    numbers: dict[str, dict] = {"float32": {}, "bfloat16": {}}
    for sigma in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
        probes = [METHODS["fd"](critic, images, sigma, None).mean() for _ in range(16)]
        numbers["float32"][f"{sigma:g}"] = torch.stack(probes).mean().item() / exact
        low, square = images.bfloat16(), []
        for _ in range(16):  # without the guard of METHODS["fd"], which refuses the small sigmas
            moved = rounded(low + sigma * torch.randn_like(low)).float() - rounded(low).float()
            square.append((moved / sigma).square().mean())
        numbers["bfloat16"][f"{sigma:g}"] = torch.stack(square).mean().item() / exact
    axes = figure.subplots()
    for name, row in numbers.items():
        axes.loglog([float(sigma) for sigma in row], list(row.values()), ".-", label=name)
    axes.set(xlabel="sigma", title="finite difference / exact ‖∇D‖²")
    axes.legend()
    return numbers


CHAPTERS = {
    "portraits": (portraits, (20, 4.8)),
    "phase": (phase, (16, 4.4)),
    "damping": (damping, (7, 5)),
    "steps": (steps, (7, 5)),
    "averages": (averages, (7, 5)),
    "divergences": (divergences, (7, 5)),
    "monoflow": (monoflow, (12, 5)),
    "particles": (particles, (7, 5)),
    "many-steps": (many_steps, (7, 5)),
    "differences": (differences, (7, 5)),
}


def main(config: Theory) -> None:
    """Run every chapter; a figure after each, theory.json at the end.

    Raises:
        ValueError: no matplotlib.
    """
    output_dir, numbers = Path(config.output_dir), {}
    for name in (bar := tqdm(CHAPTERS, desc="theory")):
        bar.set_postfix_str(name)
        chapter, size = CHAPTERS[name]
        figure, began = new_figure(*size), time.perf_counter()
        numbers[name] = chapter(figure, config.seed)
        numbers[name]["seconds"] = round(time.perf_counter() - began, 1)
        save_figure(output_dir / f"{name}.png", figure, dpi=120)
        if name == "particles":
            save_film(output_dir / "particles.webp", config.seed)
    write_text(output_dir / "theory.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    print(f"{len(numbers)} figures and their numbers: {output_dir}/theory.json")


if __name__ == "__main__":
    run(main, Theory)
