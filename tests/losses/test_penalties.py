"""Gradient penalties against closed forms, by every method that computes them."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rope_mm.losses import (
    GAN_LOSSES,
    METHODS,
    PENALTIES,
    gamma,
    input_gradients,
    twice_differentiable,
)
from rope_mm.losses.gradients import squared_norms


def test_the_penalty_of_a_quadratic_critic_is_half_the_mean_square_of_its_gradient():
    images = torch.randn(5, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 16, dtype=torch.float64)
    scores = torch.einsum("bi,ij,bj->b", images.flatten(1), weight, images.flatten(1))
    expected = images.flatten(1) @ (weight + weight.T)
    gradient = input_gradients(scores, images)
    torch.testing.assert_close(gradient.flatten(1), expected)
    assert PENALTIES["r1"](gradient, 0 * gradient).item() == pytest.approx(
        expected.square().sum(1).mean().item() / 2
    )
    assert PENALTIES["r2"](0 * gradient, gradient).item() == pytest.approx(
        expected.square().sum(1).mean().item() / 2
    )


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_a_penalty_is_the_same_for_a_batch_and_the_batch_twice(name):
    gradient = torch.randn(5, 1, 4, 4)
    twice = torch.cat([gradient, gradient])
    torch.testing.assert_close(PENALTIES[name](twice, twice), PENALTIES[name](gradient, gradient))


REAL, FAKE = torch.tensor([1.3, 2.9, 8.4, 6.3]), torch.tensor([4.8, 1.2, -3.5, 5.9])  # scores
HESSIAN = torch.tensor([[1.0, 0.5], [0.5, -2.0]], dtype=torch.float64)
SLOPE = torch.tensor([1.0, 2.0], dtype=torch.float64)
POINTS = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.3, 0.7]], dtype=torch.float64)


def bowl(x):
    """A quadratic critic: gradient SLOPE + HESSIAN x."""
    return x @ SLOPE + ((x @ HESSIAN) * x).sum(1) / 2


NORMS = (SLOPE + POINTS @ HESSIAN).norm(dim=1)
OF_NORMS = {
    "r1": NORMS.square(),
    "r2": NORMS.square(),
    "zero-centred": NORMS.square(),
    "one-centred": (NORMS - 1).square(),
    "wgan-div": NORMS**6,
}


@pytest.mark.parametrize("name", OF_NORMS)
def test_each_gradient_penalty_is_half_its_mean_over_samples_however_often_the_batch_comes(name):
    of = PENALTIES[name].of  # real and fake coincide, so that every point between them is known
    expected = OF_NORMS[name].mean() / 2
    torch.testing.assert_close(of(bowl, POINTS, POINTS), expected)
    twice = POINTS.repeat(2, 1)
    torch.testing.assert_close(of(bowl, twice, twice, method="autograd"), expected)


@pytest.mark.parametrize("name", OF_NORMS)
def test_each_gradient_penalty_is_taken_where_it_says(name):
    seen = []
    PENALTIES[name].of(lambda x: seen.append(x.detach()) or bowl(x), POINTS, POINTS + 3.0)
    low, high = {"r1": (0, 0), "r2": (3, 3)}.get(name, (1e-9, 3 - 1e-9))
    moved = seen[0] - POINTS
    assert ((low - 1e-12 <= moved) & (moved <= high + 1e-12)).all()
    torch.testing.assert_close(moved[:, 0], moved[:, 1])  # one mix for all entries of a sample


@pytest.mark.parametrize("method", ["fd", "jvp"])
def test_one_probe_is_right_on_average(method):
    point, generator = POINTS[2:].repeat(2**17, 1), torch.Generator().manual_seed(0)
    found = PENALTIES["r1"].of(bowl, point, point, method=method, generator=generator)
    assert found.item() == pytest.approx(NORMS[2].item() ** 2 / 2, rel=0.02)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_finite_difference_of_a_quadratic_critic_has_the_bias_of_its_hessian(sigma):
    point, generator = POINTS[2:].repeat(2**18, 1), torch.Generator().manual_seed(1)
    found = PENALTIES["r1"].of(bowl, point, point, method="fd", sigma=sigma, generator=generator)
    bias = sigma**2 / 4 * (2 * HESSIAN.square().sum() + HESSIAN.trace() ** 2)
    assert 2 * found.item() == pytest.approx((NORMS[2] ** 2 + bias).item(), rel=0.01)


class Headed(torch.nn.Module):
    """A head on a backbone."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        return self.head(self.backbone(images))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_critic(method):
    torch.manual_seed(0)
    head = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0)
    )
    critic, images = Headed(torch.nn.Linear(3, 8), head), torch.randn(6, 3)
    PENALTIES["r1"].of(critic, images, images, method=method).backward()
    assert head[0].weight.grad.abs().sum() > 0
    assert (critic.backbone.weight.grad is None) is (method == "head")
    assert method not in ("autograd", "auto", "head") or head[2].bias.grad is not None  # DDP waits for it


def test_the_penalty_of_a_head_is_that_of_its_inputs():
    critic, images = Headed(torch.nn.Linear(3, 2).double(), bowl), torch.randn(4, 3, dtype=torch.float64)
    features = critic.backbone(images).detach()
    found = PENALTIES["r2"].of(critic, 0 * images, images, method="head")
    torch.testing.assert_close(found, PENALTIES["r1"].of(bowl, features, features))
    with pytest.raises(ValueError, match=r"frozen \.backbone and a \.head, which function has not"):
        PENALTIES["r1"].of(bowl, images, images, method="head")


def test_a_fraction_takes_the_first_pairs():
    seen = []
    PENALTIES["zero-centred"].of(lambda x: seen.append(x) or bowl(x), POINTS, POINTS, fraction=0.5)
    torch.testing.assert_close(seen[0].detach(), POINTS[:2])


def test_both_calls_of_a_finite_difference_drop_the_same_units():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1))
    images = torch.randn(64, 4)
    assert PENALTIES["r1"].of(lambda x: net(x)[:, 0], images, images, method="fd", sigma=1e-3) < 1


def small():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1), torch.nn.Flatten(0)
    return torch.nn.Sequential(*layers)


def test_finite_differences_run_in_float32_under_autocast():
    net, images = small(), torch.randn(8, 4)
    method = METHODS["fd"]
    plain = method(net, images, 1e-2, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method(net, images, 1e-2, torch.Generator().manual_seed(0))
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("kind", ["weights", "autocast within"])
def test_finite_differences_in_half_precision_are_refused_below_a_sigma_that_they_can_resolve(kind):
    net, images = small(), torch.randn(8, 4)
    if kind == "weights":
        images, critic = images.bfloat16(), net.bfloat16()
    else:  # as accelerate wraps a model: in and out in float32

        def critic(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x).float()

    with pytest.raises(
        ValueError, match=r"sigma 0\.01 are lost in the rounding of a critic in torch.bfloat16"
    ):
        PENALTIES["r1"].of(critic, images, images, method="fd")
    assert PENALTIES["r1"].of(critic, images, images, method="fd", sigma=0.1).dtype == torch.float32


def test_a_finite_difference_too_small_for_float32_is_refused_and_at_the_smallest_step_it_is_right():
    net, images = small(), torch.randn(4096, 4)
    with pytest.raises(ValueError, match=r"sigma 1e-08 are lost in the rounding .* at least 0\.0001"):
        PENALTIES["r1"].of(net, images, images, method="fd", sigma=1e-8)
    truth = PENALTIES["r1"].of(net, images, images, method="autograd")
    by_steps = [
        PENALTIES["r1"].of(
            net, images, images, method="fd", sigma=sigma, generator=torch.Generator().manual_seed(0)
        )
        for sigma in (1e-4, 1e-2)
    ]
    torch.testing.assert_close(by_steps[0], by_steps[1], rtol=0.02, atol=0)
    torch.testing.assert_close(by_steps[0], truth, rtol=0.1, atol=0)
    of_double = PENALTIES["r1"].of(net.double(), images.double(), images.double(), method="fd", sigma=1e-8)
    torch.testing.assert_close(of_double, truth.double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["one-centred", "wgan-div"])
@pytest.mark.parametrize("method", ["fd", "jvp"])
def test_a_curve_of_the_norm_is_not_estimated_by_one_probe(name, method):
    with pytest.raises(ValueError, match="take 'autograd'"):
        PENALTIES[name].of(bowl, POINTS, POINTS, method=method)


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.5}, {"sigma": 0.0}, {"sigma": math.nan}])
def test_a_fraction_or_sigma_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        PENALTIES["r1"].of(bowl, POINTS, POINTS, **wrong)


def test_gradients_at_the_images_do_not_serve_a_penalty_between_them():
    with pytest.raises(ValueError, match=r"call its \.of\(critic, real, fake\)"):
        PENALTIES["zero-centred"](POINTS, POINTS)


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("consistency", (REAL, FAKE), (3.5**2 + 1.7**2 + 11.9**2 + 0.4**2) / 4 / 2),
        ("centring", (REAL, FAKE), (6.1**2 + 4.1**2 + 4.9**2 + 12.2**2) / 4 / 2),
        ("lecam", (REAL, FAKE, 5.0, 3.0), (0.2**2 + 3.8**2 + 5.4**2 + 8.5**2 + 3.3**2) / 4 / 2),
    ],
)
def test_each_penalty_of_scores_is_its_formula(name, arguments, value):
    assert PENALTIES[name](*arguments).item() == pytest.approx(value, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"must be \(b,\), one number for each image .*, not argument 1 \(3, 2\)"
    ):
        PENALTIES[name](POINTS, *arguments[1:])


def test_only_centring_sees_the_level_that_a_relativistic_loss_leaves_free():
    shift = torch.tensor(0.5, requires_grad=True)
    (free,) = torch.autograd.grad(GAN_LOSSES["rpgan"].critic(REAL + shift, FAKE + shift), shift)
    (held,) = torch.autograd.grad(PENALTIES["centring"](REAL + shift, FAKE + shift), shift)
    assert free.abs() < 1e-6 < 1 < held


@pytest.mark.parametrize(
    ("weight", "convention", "sigma", "expected"),
    [
        (1.0, "half", 1.0, 1.0),  # R3GAN
        (10.0, "whole", 1.0, 20.0),  # GAN_stability, GigaGAN
        (0.25, "whole", 1.0, 0.5),  # AFM
        (100.0, "apt", 0.01, 0.02),  # APT, images
        (100.0, "apt", 0.1, 2.0),  # APT, video
        (1000.0, "apt", 0.1, 20.0),  # AAPT
    ],
)
def test_weights_of_other_code_become_gammas(weight, convention, sigma, expected):
    assert gamma(weight, convention, sigma) == pytest.approx(expected)


def attended(images):
    q = images.view(2, 1, 4, 4)
    return scaled_dot_product_attention(q, q.tanh(), q).sum((1, 2, 3))


def test_a_penalty_trains_through_attention_made_twice_differentiable():
    images = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)

    def penalty(x):
        with twice_differentiable():
            return squared_norms(input_gradients(attended(x), x)).mean() / 2

    assert torch.autograd.gradcheck(penalty, images)


def test_a_penalty_through_fused_attention_is_refused_with_the_cure():
    images = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(ValueError, match=r"ScaledDotProductFlash.*with twice_differentiable"):
        input_gradients(attended(images), images)


class FlashAttnFunc(torch.autograd.Function):
    """Stands for a kernel that is not torch's own: one derivative, no plain form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def test_auto_takes_the_exact_gradient_where_it_can_and_else_the_finite_difference():
    images = torch.randn(2, 16, dtype=torch.float64)
    exact = PENALTIES["r1"].of(attended, images, images, method="autograd")
    torch.testing.assert_close(PENALTIES["r1"].of(attended, images, images), exact)
    fused = lambda x: FlashAttnFunc.apply(x).sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"FlashAttnFuncBackward lacks; .* or take method='fd'"):
        PENALTIES["r1"].of(fused, images, images, method="autograd")
    many = images[:1].repeat(2**14, 1)
    found = PENALTIES["r1"].of(fused, many, many, sigma=1e-4)
    assert found.item() == pytest.approx(images[0].square().sum().item() * 2, rel=0.05)


def test_checkpoints_serve_a_penalty_unless_they_are_reentrant():
    layer, images = torch.nn.Linear(16, 16).double(), torch.randn(2, 16, dtype=torch.float64)
    plain = PENALTIES["r1"].of(lambda x: layer(x).tanh().sum(1), images, images)

    def kept(reentrant):
        return lambda x: checkpoint(lambda x: layer(x).tanh().sum(1), x, use_reentrant=reentrant)

    torch.testing.assert_close(PENALTIES["r1"].of(kept(False), images, images), plain)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        PENALTIES["r1"].of(kept(True), images, images, method="autograd")


TWO_PROCESSES = """
import sys, torch
from torch import distributed, multiprocessing, nn
from rope_mm.losses import PENALTIES

def work(rank, meeting, method):
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)
    critic = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    PENALTIES["r1"].of(critic, images, images, method=method).backward()
    mine = layers[0].weight.grad
    both = [torch.zeros_like(mine), torch.zeros_like(mine)]
    distributed.all_gather(both, mine)
    assert torch.equal(*both) and mine.any()
    distributed.destroy_process_group()

if __name__ == "__main__":
    multiprocessing.start_processes(work, args=sys.argv[1:], nprocs=2, start_method="fork")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["autograd", "fd", "jvp"])
def test_two_processes_agree_on_the_gradient_of_a_penalty_alone(method, tmp_path):
    (tmp_path / "work.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "work.py"), str(tmp_path / "meeting"), method]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=100, env=environment)


@pytest.mark.compile
def test_a_compiled_critic_is_refused_and_served_by_the_finite_difference():
    images = torch.randn(4, 2, dtype=torch.float64)
    compiled = torch.compile(lambda x: (x.square() @ SLOPE).tanh(), backend="aot_eager")
    with pytest.raises(ValueError, match="call the critic uncompiled"):
        PENALTIES["r1"].of(compiled, images, images, method="autograd")
    assert PENALTIES["r1"].of(compiled, images, images) > 0


@pytest.mark.parametrize(
    ("table", "typo", "nearest"), [(GAN_LOSSES, "rsgann", "rsgan"), (PENALTIES, "r11", "r1")]
)
def test_an_unknown_name_is_answered_with_the_nearest(table, typo, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}"):
        table[typo]
