"""Our rotation in place of a model's own function, in training and inference, proved by a forward."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.attentions import exchange
from rope_mm.hf.reading import APPLY, callers
from rope_mm.hf.stand_in import describe, sites
from rope_mm.hf.swap import Handle, rope_of, ropes_of, set_rope
from rope_mm.kernels import Turn


def turn_both(q: Tensor, k: Tensor, turn: Turn, _same: Turn | None = None, unsqueeze_dim: int = 1, **_: Any):
    """Stands where `apply_rotary_pos_emb` stood, for q and k (b, h, s, d), or (b, s, h, d) if it says so."""
    if unsqueeze_dim == 2:
        return turn(q, k)
    q, k = turn(q.transpose(1, 2), k.transpose(1, 2))
    return q.transpose(1, 2), k.transpose(1, 2)


def use_kernels(model: nn.Module) -> Handle:
    """Rotate queries and keys of a decoder by our op: the kernel on a GPU, the definition elsewhere.

    A small forward before and after proves that our path runs and agrees; `undo` takes the model's rope back.

    Raises:
        ValueError: a family whose attention calls no function that can be replaced, or answers that differ;
            the model is as it was.
    """
    found = [part for site in sites(model) for part in callers(site.owner, APPLY)]
    if len(kinds := {type(module).__name__ for module, _ in found}) > 1:
        raise ValueError(f"{', '.join(sorted(kinds))} rotate in their own ways, and our op has one for all")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention with a rotary function of its own to replace"
        )
    name = type(found[0][0]).__name__
    if any("forward" in vars(module) for module, _ in found):
        raise ValueError(f"{name} has had its forward replaced; call use_kernels before that")
    if fresh := not any(site.ours for site in sites(model)):
        set_rope(model, rope_of(model))
    places = [(site.owner, site.module, 0 if fresh else len(site.module.undo)) for site in sites(model)]
    try:
        before = [probe(owner) for owner, *_ in places]
        for owner, rotary, _ in places:
            rotary.turns = True
            rotary.undo.append(partial(setattr, rotary, "turns", False))
            exchange(rotary.undo, callers(owner, APPLY), turn_both)
        check_same(before, [probe(owner) for owner, *_ in places])
    except Exception as error:
        for _, rotary, left in places:
            rotary.take_back(left)
        raise ValueError(
            f"{name} cannot rotate by our op ({type(error).__name__}: {error}); the model is as it was"
        ) from error
    return Handle(model)


@torch.no_grad()
def probe(owner: Any) -> Tensor:
    """The stream (1, 8, c) that a decoder makes of fixed noise."""
    weight = owner.get_input_embeddings().weight
    noise = torch.randn(1, 8, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    training, _ = owner.training, owner.eval()
    try:
        return owner(inputs_embeds=noise.to(weight), use_cache=False)[0]
    finally:
        owner.train(training)


def check_same(before: list[Tensor], after: list[Tensor]) -> None:
    """Refuse streams that differ by more than the rounding of the model's numbers.

    Raises:
        ValueError: with the largest difference.
    """
    for one, other in zip(before, after, strict=True):
        error, eps = (one - other).abs().max().item(), torch.finfo(one.dtype).eps
        if not error <= 256 * eps * one.abs().max().item():
            raise ValueError(f"the streams of the probe differ by {error:.1e}")


def explain(model: nn.Module) -> None:
    """Print what each rotary place of a model runs."""
    for site in sites(model):
        how = "our op" if site.ours and site.module.turns else "the model's own function"
        try:
            told = {layer: describe(rope) for layer, rope in ropes_of(site).items()}
        except ValueError as error:
            told = {None: str(error)}
        for layer, what in told.items():
            print(f"{site.name}{f' ({layer})' if layer else ''}: {what}; applied by {how}")
