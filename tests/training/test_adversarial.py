"""Image head against critic: losses, penalties and what accelerate does to them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))
from shares import batch, duel, keeping, shares

from rope_mm.losses import GAN_LOSSES, PENALTIES
from rope_mm.training.adversarial import AdversarialOptim
from rope_mm.training.gan import LeCamEMA

ROOT = Path(__file__).parents[2]
ALL = dict.fromkeys(PENALTIES, 0.5)


def played(players, *batches, **more):
    """Gradients of both players, and what the last round lost."""
    kept = keeping(players)
    terms = players.play([list(batches) or [batch(**more)]])
    return kept["critic"] + kept["generator"], terms


def probes(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, theirs, **how):
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **how)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_used_by_name_and_moves_the_critic(name):
    view = lambda patches: patches.flip(-1)  # noqa: E731
    free, _ = played(duel(penalties={}), view=view)
    held, terms = played(duel(penalties={name: 3.0}), view=view, probes=probes())
    assert terms[name] > 0
    assert any(not torch.equal(a, b) for a, b in zip(free, held, strict=True))


def test_penalties_of_the_shared_pass_are_those_of_passes_of_their_own():
    shared = duel(penalties={"r1": 2.0, "r2": 1.0})
    apart = duel(penalties={"r1": 2.0, "r2": 1.0}, fraction=0.9)  # of four rows that is all four
    assert shared.contest.penalties.shares and not apart.contest.penalties.shares
    close(played(shared)[0], played(apart)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["fd", "jvp"])
def test_probes_come_from_the_batch_and_take_a_fraction_of_it(method):
    players, here = duel(method=method, fraction=0.5, sigma=0.1, penalties={"r1": 1.0}), batch()
    critic = lambda patches: players.score(players.critic, here.sequences, patches)  # noqa: E731
    how = {"method": method, "fraction": 0.5, "sigma": 0.1, "generator": probes()}
    expected = PENALTIES["r1"].of(critic, here.real, here.real, **how)
    assert played(players, probes=probes())[1]["r1"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert played(players, probes=probes(1))[1]["r1"].item() != pytest.approx(expected.item(), rel=1e-3)


def test_a_penalty_is_taken_at_pictures_before_they_are_augmented():
    plain, doubled = (played(duel(), view=view)[1] for view in (lambda x: x, lambda x: 2 * x))
    twice = replace(batch(), real=2 * batch().real)
    inside = played(duel(), twice)[1]
    assert doubled["r1"].item() == pytest.approx(4 * inside["r1"].item(), rel=1e-5)  # the chain rule's factor
    assert doubled["r1"] != plain["r1"]


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    file = tmp_path / "shares.pt"
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [*torchrun, str(Path(__file__).parent / "shares.py"), str(file)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(file)
    for case, gradients in shares(0, 1).items():
        close(theirs[case], gradients, rtol=1e-4, atol=1e-6, msg=lambda said, case=case: f"{case}: {said}")


@pytest.mark.parametrize("loss", ["rpgan", "ns"])
def test_two_batches_accumulated_are_the_mean_of_both(loss):
    whole = played(duel(name=loss))[0]
    halves = [batch(slice(0, 2)), batch(slice(2, 4))]
    players = duel(Accelerator(gradient_accumulation_steps=2), name=loss)
    close(played(players, *halves)[0], whole, rtol=1e-4, atol=1e-7)
    before = [p.clone() for p in players.critic.parameters()]
    second = duel(Accelerator(gradient_accumulation_steps=2), name=loss)
    second.set_rates(0.0)
    for _ in range(2):  # steps of the optimisers themselves, whose gradients begin anew each time
        terms = second.play([halves, halves])
    assert all(term.isfinite() for term in terms.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, second.critic.parameters(), strict=True))
    assert all(p.grad is None for p in second.critic.parameters())


@pytest.fixture
def bf16():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norm under autocast
@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_under_bf16_scores_and_penalties_are_in_float32(method, bf16):
    mixed, narrow = played(duel(bf16, method=method), probes=probes())
    AcceleratorState._reset_state(reset_partial_state=True)
    full, wide = played(duel(method=method), probes=probes())
    assert all(term.dtype == torch.float32 for term in narrow.values())
    assert narrow["generator"] != wide["generator"]  # the pass for the generator is narrow
    assert narrow["r1"].item() == pytest.approx(wide["r1"].item(), rel=1e-6)  # reals do not depend on it
    close(mixed, full, rtol=0.1, atol=0.05)


def test_mixed_fp16_is_refused():
    players = duel()
    players.accelerator.state.__dict__["_mixed_precision"] = "fp16"
    try:
        with pytest.raises(ValueError, match="fp16 overflows"):
            duel(players.accelerator)
    finally:
        players.accelerator.state.__dict__["_mixed_precision"] = "no"


@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_checkpointed_blocks_change_no_gradient(method):
    plain, _ = played(duel(method=method), probes=probes())
    players = duel(method=method, checkpointing=True)
    assert all(block.gradient_checkpointing for block in players.critic.model.blocks)
    close(played(players, probes=probes())[0], plain, rtol=1e-4, atol=1e-7)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler
def test_compiled_players_have_the_gradients_of_plain_ones():
    how = {"name": "ns", "penalties": {"r1": 1.0}, "sigma": 0.1}
    plain, _ = played(duel(method="fd", **how), probes=probes())
    compiled = duel(compile="aot_eager", **how)
    assert compiled.contest.penalties.method == "fd"
    close(played(compiled, probes=probes())[0], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compile": "aot_eager", "method": "autograd"}, "compiled or sharded .* take fd"),
        ({"compile": "aot_eager", "penalties": {"one-centred": 1.0}}, "take 'autograd'"),
        ({"checkpointing": True, "method": "jvp"}, "take autograd or fd"),
        ({"method": "finite"}, "method 'finite' is unknown"),
        ({"method": "head"}, "frozen backbone"),
        ({"fraction": 0.0}, "fraction must be in"),
        ({"penalties": {"r3": 1.0}}, "penalty 'r3' is unknown"),
        ({"optim": AdversarialOptim(schedule="cosin")}, "schedule 'cosin' is unknown; did you mean 'cosine'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(wrong, message):
    with pytest.raises(ValueError, match=message):
        duel(**wrong)


def test_rates_beta2_and_gammas_go_along_the_schedule():
    optim = AdversarialOptim(
        lr=2.0, critic_lr=4.0, betas=(0.0, 0.9), schedule="cosine", until=0.5, final=0.25, final_beta2=0.99,
        final_gamma=0.1,
    )  # fmt: skip
    players = duel(optim=optim)
    for progress, part in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        players.set_rates(progress)
        ours, critic = players.generator_optim.param_groups[0], players.critic_optim.param_groups[0]
        assert ours["lr"] == pytest.approx(2 - 1.5 * part)
        assert critic["lr"] == pytest.approx(4 - 3 * part)
        assert ours["betas"] == critic["betas"] == (0.0, pytest.approx(0.9 + 0.09 * part))
        assert players.gamma == pytest.approx(1 - 0.9 * part)


def test_the_gammas_of_the_schedule_reach_the_critic():
    halved = duel(penalties={"r1": 2.0, "centring": 1.0})
    halved.gamma = 0.5
    close(played(halved)[0], played(duel(penalties={"r1": 1.0, "centring": 0.5}))[0])


def test_anchors_are_the_plain_mean_at_first_and_then_forget():
    anchors, scores = LeCamEMA(), torch.randn(300, 2, 5)
    for n, (real, fake) in enumerate(scores, start=1):
        anchors.update(real, fake)
        if n == 50:
            torch.testing.assert_close(anchors.means, scores[:50].mean((0, 2)))
    before = anchors.means.clone()
    anchors.update(*scores[0])
    torch.testing.assert_close(anchors.means, 0.99 * before + 0.01 * scores[0].mean(1))
    again = LeCamEMA()
    again.load_state_dict(anchors.state_dict())
    assert torch.equal(again.means, anchors.means) and again.batches == anchors.batches


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_every_loss_goes_with_every_penalty(loss):
    players = duel(name=loss, penalties=ALL, method="autograd")
    players.set_rates(0.0)
    terms = players.play([[batch(view=lambda patches: patches.flip(-1), probes=probes())]])
    assert set(terms) == {"critic", "generator", "real", "fake", *PENALTIES}
    assert all(term.isfinite() for term in terms.values())
