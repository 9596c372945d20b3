"""Adversarial training: losses, penalties, schedules, and what accelerate does to them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rope_mm.losses import GAN_LOSSES, PENALTIES
from rope_mm.training import adversarial_trainer
from rope_mm.training.adversarial_loss import GANConfig, LeCamEMA
from rope_mm.training.adversarial_trainer import AdversarialOptim

ROOT = Path(__file__).parents[2]
ALL = dict.fromkeys(PENALTIES, 0.5)


def close(ours, theirs, **tolerance):
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def flip(patches):
    return patches.flip(-1)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_used_by_name_and_changes_the_critic(name, toy):
    free, _ = toy.step(toy.trainer(penalties={}), augment=flip)
    held, terms = toy.step(toy.trainer(penalties={name: 3.0}), augment=flip, generator=toy.random_numbers())
    assert terms[f"penalty/{name}"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(free, held, strict=True))


def test_penalties_from_the_scoring_pass_equal_penalties_from_separate_passes(toy):
    shared = toy.trainer(penalties={"r1": 2.0, "r2": 1.0})
    apart = toy.trainer(penalties={"r1": 2.0, "r2": 1.0}, fraction=0.9)  # of four rows that is all four
    assert shared.critic.loss.penalties.from_scores and not apart.critic.loss.penalties.from_scores
    close(toy.step(shared)[0], toy.step(apart)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["fd", "jvp"])
def test_estimators_take_their_random_numbers_from_the_batch_and_a_fraction_of_it(method, toy):
    trainer, batch = toy.trainer(method=method, fraction=0.5, sigma=0.1, penalties={"r1": 1.0}), toy.batch()
    critic = lambda patches: batch.score(trainer.critic.critic, patches)  # noqa: E731
    options = {"method": method, "fraction": 0.5, "sigma": 0.1, "generator": toy.random_numbers()}
    expected = PENALTIES["r1"].of(critic, batch.real, batch.real, **options).item()
    same = toy.step(trainer, generator=toy.random_numbers())[1]["penalty/r1"]
    other = toy.step(trainer, generator=toy.random_numbers(1))[1]["penalty/r1"]
    assert same.item() == pytest.approx(expected, rel=1e-6)
    assert other.item() != pytest.approx(expected, rel=1e-3)


def test_a_gradient_penalty_is_taken_at_images_before_they_are_augmented(toy):
    plain, doubled = (
        toy.step(toy.trainer(), augment=augment)[1] for augment in (lambda x: x, lambda x: 2 * x)
    )
    twice = replace(toy.batch(), real=2 * toy.batch().real)
    inside = toy.step(toy.trainer(), twice)[1]
    # the chain rule's factor
    assert doubled["penalty/r1"].item() == pytest.approx(4 * inside["penalty/r1"].item(), rel=1e-5)
    assert doubled["penalty/r1"] != plain["penalty/r1"]


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path, toy):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    file = tmp_path / "shares.pt"
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [*torchrun, str(Path(__file__).parent / "two_processes.py"), str(file)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(file)
    for case, gradients in toy.gradients_of_share(0, 1).items():
        close(theirs[case], gradients, rtol=1e-4, atol=1e-6, msg=lambda said, case=case: f"{case}: {said}")


@pytest.mark.parametrize("loss", ["rpgan", "ns"])
def test_the_gradient_of_two_accumulated_batches_is_that_of_both_in_one(loss, toy):
    whole = toy.step(toy.trainer(name=loss))[0]
    halves = [toy.batch(slice(0, 2)), toy.batch(slice(2, 4))]
    trainer = toy.trainer(name=loss)
    close(toy.step(trainer, *halves)[0], whole, rtol=1e-4, atol=1e-7)
    before = [p.clone() for p in trainer.critic.critic.parameters()]
    second = toy.trainer(name=loss)
    second.update_schedules(0.0)
    for _ in range(2):  # steps of the optimizers themselves, whose gradients start from 0 each time
        terms = second.train_step([halves, halves])
    assert all(term.isfinite() for term in terms.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, second.critic.critic.parameters(), strict=True))
    assert all(p.grad is None for p in second.critic.critic.parameters())


def test_the_logged_gradient_norms_are_those_of_the_gradients(toy):
    gradients, terms = toy.step(toy.trainer())
    norms = terms["grad_norm/critic"].square() + terms["grad_norm/generator"].square()
    torch.testing.assert_close(norms, sum(g.square().sum() for g in gradients))


def test_both_models_use_one_set_of_angles_a_batch(toy, monkeypatch):
    trainer, made = toy.trainer(), []
    for rotary in (trainer.generator.model.rotary, trainer.critic.critic.model.rotary):
        angles = rotary.angles
        monkeypatch.setattr(
            rotary, "angles", lambda *args, make=angles, **kw: made.append(1) or make(*args, **kw)
        )
    shared, _ = toy.step(trainer)
    assert len(made) == 1
    monkeypatch.setattr(adversarial_trainer, "share_angles", lambda batch, model: batch)
    apart, _ = toy.step(trainer)
    assert len(made) == 1 + 4  # one for each pass: two of the critic's step, two of the generator's
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))


def test_models_with_learned_frequencies_have_angles_of_their_own(toy):
    config = toy.batcher(rope_parameters={"scheme": "rope-tv", "learnable": True}).config
    trainer = toy.trainer(config=config)
    assert adversarial_trainer.share_angles(toy.batch(), trainer.unwrapped_generator).angles is None
    omegas = [model.model.rotary.omega_param for model in (trainer.critic.critic, trainer.generator)]
    before = [omega.clone() for omega in omegas]
    trainer.update_schedules(0.0)
    trainer.train_step([[toy.batch()]])
    assert all(not torch.equal(a, b) for a, b in zip(omegas, before, strict=True))


@pytest.fixture
def bf16():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norm under autocast
@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_under_bf16_scores_and_penalties_are_in_float32(method, bf16, toy):
    mixed, narrow = toy.step(toy.trainer(bf16, method=method), generator=toy.random_numbers())
    AcceleratorState._reset_state(reset_partial_state=True)
    full, wide = toy.step(toy.trainer(method=method), generator=toy.random_numbers())
    assert all(term.dtype == torch.float32 for term in narrow.values())
    assert narrow["loss/generator"] != wide["loss/generator"]  # the pass for the generator is in bf16
    # reals do not depend on it
    assert narrow["penalty/r1"].item() == pytest.approx(wide["penalty/r1"].item(), rel=1e-6)
    close(mixed, full, rtol=0.1, atol=0.05)


def test_mixed_fp16_is_refused(toy):
    trainer = toy.trainer()
    trainer.accelerator.state.__dict__["_mixed_precision"] = "fp16"
    try:
        with pytest.raises(ValueError, match="fp16 overflows"):
            toy.trainer(trainer.accelerator)
    finally:
        trainer.accelerator.state.__dict__["_mixed_precision"] = "no"


@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_gradient_checkpointing_changes_no_gradient(method, toy):
    plain, _ = toy.step(toy.trainer(method=method), generator=toy.random_numbers())
    trainer = toy.trainer(method=method, checkpointing=True)
    assert all(block.gradient_checkpointing for block in trainer.critic.critic.model.blocks)
    close(toy.step(trainer, generator=toy.random_numbers())[0], plain, rtol=1e-4, atol=1e-7)


def test_with_spectral_norm_the_matrices_of_the_critic_have_norm_one(toy):
    trainer = toy.trainer(spectral_norm=True)
    for _ in range(60):
        toy.step(trainer)
    layers = [layer for layer in trainer.critic.critic.eval().modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) > 4
    for layer in layers:
        torch.testing.assert_close(
            torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0), rtol=0.05, atol=0
        )
    assert not any(map(torch.nn.utils.parametrize.is_parametrized, trainer.generator.modules()))


@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_all_forwards_of_a_step_see_the_same_normalised_matrices(method, toy, monkeypatch):
    trainer, calls = toy.trainer(spectral_norm=True, method=method), []
    normalise = torch.nn.utils.parametrizations._SpectralNorm
    forward = normalise.forward
    monkeypatch.setattr(normalise, "forward", lambda self, x: calls.append(self) or forward(self, x))
    toy.step(trainer, generator=toy.random_numbers())
    layers = sum(isinstance(layer, normalise) for layer in trainer.critic.critic.modules())
    assert layers > 4 and len(calls) == 2 * layers, "once in the critic's step, once in the generator's"


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler
def test_compiled_models_have_the_gradients_of_plain_ones(toy):
    options = {"name": "ns", "penalties": {"r1": 1.0}, "sigma": 0.1}
    plain, _ = toy.step(toy.trainer(method="fd", **options), generator=toy.random_numbers())
    compiled = toy.trainer(compile="aot_eager", **options)
    assert compiled.critic.loss.penalties.method == "fd"
    close(toy.step(compiled, generator=toy.random_numbers())[0], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compile": "aot_eager", "method": "autograd"}, "compiled or sharded .* use fd"),
        ({"compile": "aot_eager", "penalties": {"one-centred": 1.0}}, "take 'autograd'"),
        ({"checkpointing": True, "method": "jvp"}, "use autograd or fd"),
        ({"spectral_norm": True, "checkpointing": True}, "spectral_norm needs whole matrices"),
        ({"spectral_norm": True, "compile": "aot_eager"}, "spectral_norm needs whole matrices"),
        ({"method": "finite"}, "method 'finite' is unknown"),
        ({"method": "head"}, "frozen backbone"),
        ({"fraction": 0.0}, "loss.fraction must be above 0 and at most 1, not 0.0"),
        ({"penalties": {"r3": 1.0}}, "penalty 'r3' is unknown"),
        ({"penalties": {"r1": -1.0}}, "loss.penalties.r1 must be at least 0, not -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(wrong, message, toy):
    with pytest.raises(ValueError, match=message):
        toy.trainer(**wrong)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            AdversarialOptim,
            {"schedule": "cosin"},
            "optim.schedule: schedule 'cosin' is unknown; did you mean",
        ),
        (AdversarialOptim, {"lr": float("nan")}, "optim.lr must be at least 0, not nan"),
        (GANConfig, {"sigma": float("nan")}, "loss.sigma must be above 0, not nan"),
        (GANConfig, {"qp_lambda": -1.0}, "loss.qp_lambda must be above 0, not -1.0"),
        (GANConfig, {"penalties": {"r1": float("inf")}}, "loss.penalties.r1 must be at least 0, not inf"),
    ],
)
def test_numbers_of_a_configuration_are_checked_when_it_is_made(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_rates_beta2_and_gammas_follow_the_schedule(toy):
    optim = AdversarialOptim(
        lr=2.0, critic_lr=4.0, betas=(0.0, 0.9), schedule="cosine", decay_until=0.5, final_lr_ratio=0.25,
        final_beta2=0.99, final_gamma=0.1,
    )  # fmt: skip
    trainer = toy.trainer(optim=optim)
    for progress, part in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        trainer.update_schedules(progress)
        ours, critic = trainer.optimizer.param_groups[0], trainer.critic.optimizer.param_groups[0]
        assert ours["lr"] == pytest.approx(2 - 1.5 * part)
        assert critic["lr"] == pytest.approx(4 - 3 * part)
        assert ours["betas"] == critic["betas"] == (0.0, pytest.approx(0.9 + 0.09 * part))
        assert trainer.gamma_scale == pytest.approx(1 - 0.9 * part)
        assert trainer.transport_scale == 1


def test_the_schedule_of_gammas_reaches_the_critic(toy):
    halved = toy.trainer(penalties={"r1": 2.0, "centring": 1.0})
    halved.gamma_scale = 0.5
    close(toy.step(halved)[0], toy.step(toy.trainer(penalties={"r1": 1.0, "centring": 0.5}))[0])


def test_transport_adds_its_gradient_times_weight_and_schedule_to_the_generators(toy):
    def gradient(**loss):
        trainer = toy.trainer(optim=AdversarialOptim(final_transport=0.25), **loss)
        trainer.update_schedules(0.5)
        kept = toy.keep_gradients(trainer)
        return kept, trainer.train_step([[toy.batch()]]), trainer

    plain, without, trainer = gradient()
    moved, terms, _ = gradient(transport=2.0)
    assert set(terms) - set(without) == {"transport"}
    assert terms["loss/generator"] == without["loss/generator"]
    assert all(map(torch.equal, plain["critic"], moved["critic"]))
    batch = toy.batch()
    cost = (trainer.generate(batch) - batch.noise).square().mean()
    assert terms["transport"].item() == pytest.approx(cost.item(), rel=1e-6)
    weights = [p for p in trainer.generator.parameters() if p.requires_grad]
    alone = [g for g in torch.autograd.grad(cost, weights, allow_unused=True) if g is not None]
    assert len(alone) == len(moved["generator"]) == len(plain["generator"]) > 5
    for with_it, without_it, own in zip(moved["generator"], plain["generator"], alone, strict=True):
        torch.testing.assert_close(with_it - without_it, 2.0 * 0.625 * own, atol=1e-6, rtol=1e-4)


def test_running_means_are_the_plain_mean_at_first_and_then_forget():
    lecam, scores = LeCamEMA(), torch.randn(300, 2, 5)
    for n, (real, fake) in enumerate(scores, start=1):
        lecam.update(real.mean(), fake.mean())
        if n == 50:
            torch.testing.assert_close(lecam.means, scores[:50].mean((0, 2)))
    before = lecam.means.clone()
    lecam.update(*scores[0].mean(1))
    torch.testing.assert_close(lecam.means, 0.99 * before + 0.01 * scores[0].mean(1))
    again = LeCamEMA()
    again.load_state_dict(lecam.state_dict())
    assert torch.equal(again.means, lecam.means) and again.batches == lecam.batches


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_every_loss_goes_with_every_penalty(loss, toy):
    trainer = toy.trainer(name=loss, penalties=ALL, method="autograd")
    trainer.update_schedules(0.0)
    terms = trainer.train_step([[toy.batch(augment=flip, generator=toy.random_numbers())]])
    losses = {"loss/critic", "loss/generator", "score/real", "score/fake"}
    norms = {"grad_norm/critic", "grad_norm/generator"}
    assert set(terms) == losses | norms | {f"penalty/{name}" for name in PENALTIES}
    assert all(term.isfinite() for term in terms.values())


def test_the_generator_learns_from_the_critic_and_leaves_it_as_it_is(toy):
    trainer, batch = toy.trainer(), toy.batch()
    critic = [p.clone() for p in trainer.critic.critic.parameters()]
    generator = [p.clone() for p in trainer.generator.parameters()]
    trainer.update_schedules(0.0)
    trainer.generator_step([batch], [trainer.generate(batch)])
    assert all(torch.equal(*pair) for pair in zip(trainer.critic.critic.parameters(), critic, strict=True))
    assert any(not torch.equal(*pair) for pair in zip(trainer.generator.parameters(), generator, strict=True))
