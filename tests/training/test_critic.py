"""The critic of documents plays the same game as the critic of captioned pictures."""

import pytest
import torch
from accelerate import Accelerator

from rope_mm.data.documents import Visual
from rope_mm.models import RopeMMProcessor, load_tokenizer, read_config
from rope_mm.training.adversarial import AdversarialBatch, AdversarialOptim, AdversarialTrainer
from rope_mm.training.gan import GANConfig
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.packing import Packer
from rope_mm.training.rival import CriticTrainer


def make(loss):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48)
    objective = GANConfig(name=loss, penalties={"r1": 1.0, "r2": 0.5})
    duel = AdversarialTrainer(config, objective, AdversarialOptim(), Accelerator())
    duel.critic_optim.param_groups[0]["eps"] = 1.0  # steps in proportion to gradients, rounding included
    rival = CriticTrainer(duel.critic, duel.critic_optim, objective, duel.accelerator)
    return config, duel, rival


def packed(config, *documents):
    processor = RopeMMProcessor.from_config(config, load_tokenizer())
    generators = [torch.Generator().manual_seed(i) for i in range(len(documents))]
    return Packer(processor, 300, IMAGE_HEADS["adversarial"].times, whole=True)(documents, generators)


def picture(seed, drawn=True, y=4):
    pixels = torch.rand(1, y, 8, generator=torch.Generator().manual_seed(seed))
    return Visual(pixels * 2 - 1, drawn)


@pytest.mark.parametrize("loss", ["rpgan", "ns", "gan-qp"])
def test_documents_of_one_picture_are_scored_as_captioned_pictures(loss):
    config, duel, rival = make(loss)
    whole = packed(config, ["one", picture(1)], ["twenty", picture(2)]).whole
    fake = torch.randn_like(whole.patches)
    batch = AdversarialBatch(whole.sequences, whole.patches, fake)
    weights = {name: p.clone() for name, p in duel.critic.state_dict().items()}
    mine = rival.update(whole, fake.flatten(0, 1))
    after = {name: p.clone() for name, p in duel.critic.state_dict().items()}
    duel.critic.load_state_dict(weights)
    duel.critic_optim.state.clear()
    its = duel.update_critic(batch, fake)
    assert mine.keys() == its.keys()
    for name, term in its.items():
        torch.testing.assert_close(mine[name], term, atol=1e-6, rtol=1e-5)
    for name, weight in duel.critic.state_dict().items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)


def test_padding_and_pictures_that_are_only_read_are_no_part_of_a_penalty():
    config, _, rival = make("rpgan")
    short, long = ["a", picture(1)], [picture(3, drawn=False, y=8), "b", picture(2)]
    both, alone = packed(config, short, long).whole, [packed(config, d).whole for d in (short, long)]
    fakes = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    rival.optimizer.param_groups[0]["lr"] = 0.0  # the same critic every time
    together = rival.update(both, torch.cat(fakes))
    apart = [rival.update(whole, fake) for whole, fake in zip(alone, fakes, strict=True)]
    for name in together:
        mean = (apart[0][name] + apart[1][name]) / 2
        torch.testing.assert_close(together[name], mean, atol=1e-6, rtol=1e-5)


def test_a_gradient_reaches_what_was_drawn_and_no_weight_of_the_critic():
    config, duel, rival = make("rpgan")
    whole = packed(config, ["a", picture(1)], [picture(3, drawn=False), "b", picture(2)]).whole
    drawn = torch.randn(16, 4, requires_grad=True)
    rival.judge(whole, drawn).backward()
    assert drawn.grad.ne(0).any(1).all()
    assert all(p.grad is None for p in duel.critic.parameters())


def test_a_sharded_critic_is_penalised_by_finite_differences_and_not_otherwise(monkeypatch):
    _, duel, rival = make("rpgan")
    assert rival.contest.penalties.method == "autograd"
    monkeypatch.setattr("rope_mm.training.contest.sharded", lambda accelerator: True)
    players = duel.critic, duel.critic_optim
    assert CriticTrainer(*players, GANConfig(), duel.accelerator).contest.penalties.method == "fd"
    with pytest.raises(ValueError, match=r"compiled or sharded \(FSDP\).* take fd"):
        CriticTrainer(*players, GANConfig(method="autograd"), duel.accelerator)
