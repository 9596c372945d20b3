"""Dirac-GAN: reals at 0, fakes at theta, a linear critic phi; where do the two players go?

A state (2, n) holds phi and theta, both (n,). Su, kexue.fm/archives/6583; Mescheder et al., arXiv 1801.04406.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.fx.experimental.proxy_tensor import make_fx

from rope_mm.checks.extras import extra
from rope_mm.losses import GAN_LOSSES, PENALTIES
from rope_mm.losses.penalties import POINTS, GradientPenalty
from rope_mm.registry import Registry

Field = Callable[[Tensor], Tensor]

CRITICS = Registry(
    "Dirac critic",
    {
        "linear": lambda phi, x: phi @ x,
        "normalised": lambda phi, x: phi @ x / phi.norm(),  # 1-Lipschitz, as spectral normalisation makes it
    },
)


@dataclass(frozen=True, kw_only=True)
class Dirac:
    """The Dirac-GAN: reals at 0, fakes at theta, a critic phi.

    Attributes:
        loss: a key of GAN_LOSSES.
        penalties: name -> gamma, of those of PENALTIES that are of gradients.
        decay: weight decay of the critic.
        critic: a key of CRITICS.
        qp_lambda: lambda of gan-qp.

    Raises:
        ValueError: an unknown loss or critic, or no gradient penalty, when the field is asked for.
    """

    loss: str = "ns"
    penalties: dict[str, float] = field(default_factory=dict)
    decay: float = 0.0
    critic: str = "linear"
    qp_lambda: float = 1.0

    def objectives(self, phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """What the critic and what the generator minimises."""
        loss, critic = GAN_LOSSES[self.loss], CRITICS[self.critic]
        origin = torch.zeros_like(theta)
        real, fake = critic(phi, origin)[None], critic(phi, theta)[None]
        extra = (theta.norm()[None], self.qp_lambda) if loss.needs_distance else ()
        critic_objective = loss.critic(real, fake, *extra) + self.decay / 2 * phi.square().sum()
        for name, gamma in self.penalties.items():
            penalty = PENALTIES[name]
            if not isinstance(penalty, GradientPenalty):
                raise ValueError(f"the Dirac-GAN takes penalties of gradients, and {name!r} is one of scores")
            slope = grad(critic, argnums=1)(phi, POINTS[penalty.at](origin, theta, 0.5))
            critic_objective = critic_objective + gamma * penalty.of_squares(slope.square().sum()[None])
        return critic_objective, loss.generator(real, fake)

    def field(self, state: Tensor) -> Tensor:
        """Velocity (2, n): both players downhill, each in its own objective."""
        phi, theta = state
        critic_slope = grad(lambda phi: self.objectives(phi, theta)[0])(phi)
        generator_slope = grad(lambda theta: self.objectives(phi, theta)[1])(theta)
        return -torch.stack([critic_slope, generator_slope])


def flow(velocity: Field, start: Tensor, times: Sequence[float] | Tensor, tolerance: float = 1e-8) -> Tensor:
    """States (t, 2, n) at the given times, by an eighth-order Runge-Kutta method.

    Args:
        velocity: state (2, n) -> its derivative (2, n).
        start: the state (2, n) at the first of the times.
        times: (t,), rising.
        tolerance: absolute and relative error of a step.

    Raises:
        ValueError: a state that leaves the finite.
    """
    with extra("train"):
        from scipy.integrate import solve_ivp
    traced = make_fx(lambda state: velocity(state))(start)  # thrice as fast as calling it
    solution = solve_ivp(
        lambda _, y: traced(torch.from_numpy(y).view_as(start)).flatten().numpy(),
        (float(times[0]), float(times[-1])),
        start.flatten().numpy(),
        method="DOP853",
        t_eval=[float(time) for time in times],
        rtol=tolerance,
        atol=tolerance,
    )
    if not solution.success:
        raise ValueError(f"the flow stops at t = {solution.t[-1]:g}: {solution.message}")
    return torch.from_numpy(solution.y.T.copy()).view(-1, *start.shape)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Gradient descent of both players, with heavy-ball momentum: v = momentum v + rate field moves a player.

    Attributes:
        rate: step size.
        turns: critic and generator steps in a turn; None: both players move at once.
        momentum: of each player.
    """

    rate: float
    turns: tuple[int, int] | None = None
    momentum: float = 0.0

    def __call__(self, velocity: Field, state: Tensor) -> Tensor:
        """The next state (2, 2, n): players, and their velocities."""
        if self.turns is None:
            players, speed = state
            speed = self.momentum * speed + self.rate * velocity(players)
            return torch.stack([players + speed, speed])
        for player, steps in enumerate(self.turns):
            mine = torch.eye(2, dtype=state.dtype)[player][:, None]
            for _ in range(steps):
                players, speed = state
                pushed = self.momentum * speed + self.rate * velocity(players)
                speed = mine * pushed + (1 - mine) * speed
                state = torch.stack([players + mine * speed, speed])
        return state


def walk(descent: Descent, velocity: Field, start: Tensor, steps: int) -> Iterator[Tensor]:
    """The players (2, n) after each of the steps, from rest.

    Args:
        descent: how they move.
        velocity: state (2, n) -> its derivative (2, n).
        start: the players (2, n).
        steps: how many.
    """
    state = torch.stack([start, torch.zeros_like(start)])
    step = make_fx(lambda state: descent(velocity, state))(state)
    for _ in range(steps):
        state = step(state)
        yield state[0]


def average(states: Tensor, decay: float) -> Tensor:
    """Exponential moving average (t, ...) of states (t, ...), beginning at the first."""
    return torch.stack(list(accumulate(states, lambda mean, state: decay * mean + (1 - decay) * state)))


def eigenvalues(function: Field, state: Tensor) -> Tensor:
    """Complex eigenvalues of a function's Jacobian at a state, by automatic differentiation."""
    return torch.linalg.eigvals(jacrev(function)(state).view(state.numel(), -1))


def growth(descent: Descent, velocity: Field, equilibrium: Tensor) -> float:
    """Spectral radius of one step at an equilibrium: below 1 the players come back to it.

    Args:
        descent: how the players move.
        velocity: state (2, n) -> its derivative (2, n).
        equilibrium: (2, n).
    """
    state = torch.stack([equilibrium, torch.zeros_like(equilibrium)])
    return eigenvalues(lambda state: descent(velocity, state), state).abs().max().item()


def wedge(states: Tensor) -> Tensor:
    """theta_1 phi_2 - theta_2 phi_1 of states (..., 2, 2).

    Constant wherever phi' is parallel to theta and theta' to phi, as for every loss of phi·theta alone: no
    such game converges in two dimensions, and a circle it ends on has radius sqrt |wedge|.
    """
    phi, theta = states.unbind(-2)
    return theta[..., 0] * phi[..., 1] - theta[..., 1] * phi[..., 0]
