"""A generator and a critic of toy size, and captioned images of 4 x 4 pixels for them."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from rope_mm.models import IMAGE_TOKEN, ImageBatcher, load_tokenizer, read_config
from rope_mm.training.adversarial_loss import GANConfig
from rope_mm.training.adversarial_trainer import AdversarialBatch, AdversarialOptim, AdversarialTrainer

LOSSES, ROWS = ("rsgan", "rasgan", "gan-qp"), 4
CAPTIONS = ["one", "a two", "three", "the four"]


def make_batcher(**changes):
    tokenizer = load_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "patch_size": 2, "num_channels": 1,
        "rope_parameters": {"scheme": "rope-tv"},
    }  # fmt: skip
    return ImageBatcher(read_config(**settings | changes), tokenizer, 4)


def make_batch(rows=slice(None), **more):
    """The captions' batch, or some of its rows."""
    random = torch.Generator().manual_seed(1)
    real, noise = (torch.randn(ROWS, 4, 4, generator=random) for _ in range(2))
    return AdversarialBatch(make_batcher().sequences(CAPTIONS[rows]), real[rows], noise=noise[rows], **more)


def make_trainer(accelerator=None, optim=None, compile="", checkpointing=False, config=None, **loss):
    torch.manual_seed(0)
    options = GANConfig(**loss), optim or AdversarialOptim(), accelerator or Accelerator()
    trainer = AdversarialTrainer(config or make_batcher().config, *options, compile, checkpointing)
    for model in (trainer.critic.critic, trainer.generator):
        for weight in model.parameters():  # as far from the start as training would bring them
            weight.data += 0.1 * torch.randn_like(weight)
    return trainer


def keep_gradients(trainer):
    """Both models' gradients at each step of their optimizers, which then change nothing."""
    kept = {}
    for name, optimizer in (("critic", trainer.critic.optimizer), ("generator", trainer.optimizer)):

        def step(name=name, optimizer=optimizer):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            kept[name] = [p.grad.clone() for p in weights if p.grad is not None]

        optimizer.step = step
    return kept


def step(trainer, *batches, **more):
    """Gradients of both models, and the terms of a step."""
    kept = keep_gradients(trainer)
    terms = trainer.train_step([list(batches) or [make_batch(**more)]])
    return kept["critic"] + kept["generator"], terms


def random_numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients_of_share(rank, world, accelerator=None):
    """Gradients and losses by case, of a process's share of one batch."""
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    noise = torch.randn(ROWS, 4, 4, generator=torch.Generator().manual_seed(2))[rows]
    found = {}
    for loss, method in [*product(LOSSES, ("autograd", "fd")), ("rpgan", "jvp")]:
        trainer = make_trainer(
            accelerator,
            name=loss,
            method=method,
            sigma=0.1,  # at 0.01 the rounding of scores is 100 times larger in the gradient
            penalties={"r1": 2.0, "r2": 2.0, "lecam": 1.0, "centring": 0.5},
        )
        batch, randn = make_batch(rows), torch.randn
        torch.randn = lambda *size, noise=noise, **options: noise  # one probe for a sample, wherever it is
        try:
            gradients, terms = step(trainer, batch)
        finally:
            torch.randn = randn
        found[f"{loss} {method}"] = [*gradients, terms["loss/critic"], terms["loss/generator"]]
    return found


@pytest.fixture
def toy():
    """The functions of this file."""
    return SimpleNamespace(
        batcher=make_batcher,
        batch=make_batch,
        trainer=make_trainer,
        keep_gradients=keep_gradients,
        step=step,
        random_numbers=random_numbers,
        gradients_of_share=gradients_of_share,
    )
