"""Gradients of both players for one global batch, of which each process has its share; run under torchrun."""

import sys
from itertools import product

import torch
from accelerate import Accelerator

from rope_mm.models import IMAGE_TOKEN, ImageBatcher, load_tokenizer, read_config
from rope_mm.training.adversarial import AdversarialBatch, AdversarialOptim, AdversarialTrainer
from rope_mm.training.gan import GANConfig

LOSSES, ROWS = ("rsgan", "rasgan", "gan-qp"), 4
CAPTIONS = ["one", "a two", "three", "the four"]


def canvas():
    tokenizer = load_tokenizer()
    config = read_config(
        vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, patch_size=2, num_channels=1, rope_parameters={"scheme": "rope-tv"},
    )  # fmt: skip
    return ImageBatcher(config, tokenizer, 4)


def batch(rows=slice(None), **more):
    here, draws = canvas(), torch.Generator().manual_seed(1)
    real, noise = (torch.randn(ROWS, 4, 4, generator=draws) for _ in range(2))
    return AdversarialBatch(here.sequences(CAPTIONS[rows]), real[rows], noise[rows], **more)


def duel(accelerator=None, optim=None, compile="", checkpointing=False, **objective):
    torch.manual_seed(0)
    accelerator = accelerator or Accelerator()
    parts = GANConfig(**objective), optim or AdversarialOptim(), accelerator, compile, checkpointing
    players = AdversarialTrainer(canvas().config, *parts)
    for player in (players.critic, players.generator):
        for weight in player.parameters():  # as far from the start as training would bring them
            weight.data += 0.1 * torch.randn_like(weight)
    return players


def gradients(optimizer):
    return [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def keeping(players):
    """Both players' gradients at each step of their optimisers, weights left as they are."""
    kept = {}
    for name in ("critic", "generator"):
        optimizer = getattr(players, f"{name}_optim")

        def step(name=name, optimizer=optimizer):
            if optimizer.gradient_state.sync_gradients:
                kept[name] = gradients(optimizer)

        optimizer.step = step
    return kept


def shares(rank, world, accelerator=None):
    """Gradients and losses by case, of this process's share."""
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    probes = torch.randn(ROWS, 4, 4, generator=torch.Generator().manual_seed(2))[rows]
    found = {}
    cases = [*product(LOSSES, ("autograd", "fd")), ("rpgan", "jvp")]
    for loss, method in cases:
        players = duel(
            accelerator,
            name=loss,
            method=method,
            sigma=0.1,  # at 0.01 the rounding of scores is 100 times larger in the gradient
            penalties={"r1": 2.0, "r2": 2.0, "lecam": 1.0, "centring": 0.5},
        )
        kept, share, drawn = keeping(players), batch(rows), torch.randn
        torch.randn = lambda *size, **how: probes  # the same probe for a sample wherever it is
        try:
            terms = players.play([[share]])
        finally:
            torch.randn = drawn
        found[f"{loss} {method}"] = [*kept["critic"], *kept["generator"], terms["critic"], terms["generator"]]
    return found


if __name__ == "__main__":
    process = Accelerator()
    result = shares(process.process_index, process.num_processes, process)
    if process.is_main_process:
        torch.save(result, sys.argv[1])
    process.end_training()
