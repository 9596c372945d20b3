"""The critic of documents is trained like the critic of captioned images."""

import pytest
import torch
from accelerate import Accelerator

from rope_mm.data.documents import Visual
from rope_mm.models import RopeMMProcessor, load_tokenizer, read_config
from rope_mm.training.adversarial_loss import AdversarialLoss, GANConfig
from rope_mm.training.adversarial_trainer import (
    AdversarialBatch,
    AdversarialOptim,
    AdversarialTrainer,
    CriticTrainer,
)
from rope_mm.training.collator import Packer
from rope_mm.training.image_heads import IMAGE_HEADS


def make(loss):
    """A trainer of captioned images, and one of documents with the same critic."""
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48)
    objective = GANConfig(name=loss, penalties={"r1": 1.0, "r2": 0.5})
    trainer = AdversarialTrainer(config, objective, AdversarialOptim(), Accelerator())
    trainer.critic.optimizer.param_groups[0]["eps"] = 1.0  # steps proportional to gradients, rounding too
    of_images = trainer.critic
    own_rows = AdversarialLoss(objective, of_images.critic, trainer.accelerator)
    of_documents = CriticTrainer(of_images.critic, of_images.optimizer, own_rows, trainer.accelerator)
    return config, of_images, of_documents


def packed(config, *documents):
    """What a critic reads of documents."""
    processor = RopeMMProcessor.from_config(config, load_tokenizer())
    generators = [torch.Generator().manual_seed(i) for i in range(len(documents))]
    packer = Packer(processor, 300, IMAGE_HEADS["adversarial"].sample_time, for_critic=True)
    return packer(documents, generators).for_critic


def image(seed, generate=True, y=4):
    pixels = torch.rand(1, y, 8, generator=torch.Generator().manual_seed(seed))
    return Visual(pixels * 2 - 1, generate)


@pytest.mark.parametrize("loss", ["rpgan", "ns", "gan-qp"])
def test_documents_of_one_image_are_scored_as_captioned_images(loss):
    config, of_images, of_documents = make(loss)
    documents = packed(config, ["one", image(1)], ["twenty", image(2)])
    fake = torch.randn_like(documents.real)
    weights = {name: p.clone() for name, p in of_images.critic.state_dict().items()}
    mine = of_documents.step(documents, documents.insert(fake.flatten(0, 1)))
    after = {name: p.clone() for name, p in of_images.critic.state_dict().items()}
    of_images.critic.load_state_dict(weights)
    of_images.optimizer.state.clear()
    its = of_images.step(AdversarialBatch(documents.sequences, documents.real), fake)
    assert mine.keys() == its.keys()
    for name, term in its.items():
        torch.testing.assert_close(mine[name], term, atol=1e-6, rtol=1e-5)
    for name, weight in of_images.critic.state_dict().items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)


def test_padding_and_images_that_are_only_read_are_no_part_of_a_penalty():
    config, _, trainer = make("rpgan")
    short, long = ["a", image(1)], [image(3, generate=False, y=8), "b", image(2)]
    both, alone = packed(config, short, long), [packed(config, d) for d in (short, long)]
    fakes = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    trainer.optimizer.param_groups[0]["lr"] = 0.0  # the same critic every time
    together = trainer.step(both, both.insert(torch.cat(fakes)))
    apart = [trainer.step(batch, batch.insert(fake)) for batch, fake in zip(alone, fakes, strict=True)]
    compared = [name for name in together if not name.startswith("grad_norm")]
    assert {"loss/critic", "penalty/r1"} <= set(compared)
    for name in compared:
        mean = (apart[0][name] + apart[1][name]) / 2
        torch.testing.assert_close(together[name], mean, atol=1e-6, rtol=1e-5)


def test_a_gradient_reaches_what_was_generated_and_no_weight_of_the_critic():
    config, of_images, trainer = make("rpgan")
    documents = packed(config, ["a", image(1)], [image(3, generate=False), "b", image(2)])
    generated = torch.randn(16, 4, requires_grad=True)
    trainer.generator_loss(documents, documents.insert(generated)).backward()
    assert generated.grad.ne(0).any(1).all()
    assert all(p.grad is None for p in of_images.critic.parameters())


def test_a_sharded_critic_is_penalised_by_finite_differences_and_not_otherwise(monkeypatch):
    _, of_images, trainer = make("rpgan")
    assert trainer.loss.penalties.method == "autograd"
    monkeypatch.setattr("rope_mm.training.adversarial_loss.is_sharded", lambda accelerator: True)
    critic, accelerator = of_images.critic, trainer.accelerator
    assert AdversarialLoss(GANConfig(), critic, accelerator).penalties.method == "fd"
    with pytest.raises(ValueError, match=r"compiled or sharded \(FSDP\).* use fd"):
        AdversarialLoss(GANConfig(method="autograd"), critic, accelerator)
