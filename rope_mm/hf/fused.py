"""Our rotation in place of a model's own function, in training and inference, proved by a forward."""

from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.attentions import attentions, base_of, clone, put_forward
from rope_mm.hf.fitting import describe
from rope_mm.hf.reading import applied
from rope_mm.hf.swap import Handle, RopeMMRotaryEmbedding, rope_of, set_rope, sites, unset_rope
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
    fresh = not any(isinstance(module, RopeMMRotaryEmbedding) for *_, module in sites(model))
    places = [(owner, module) for _, owner, _, module in sites(model)]
    found = [part for owner, _ in places for part in applied(owner)]
    if len(kinds := {type(module).__name__ for module, _ in found}) > 1:
        raise ValueError(f"{', '.join(sorted(kinds))} rotate in their own ways, and our op has one for all")
    if not found or any(
        "forward" in vars(module) and "_old_forward" not in vars(module) for module, _ in found
    ):
        raise ValueError(
            f"{type(model).__name__} has no attention with a rotary function of its own to replace"
            if not found
            else f"{type(found[0][0]).__name__} has had its forward replaced; call use_kernels before that"
        )
    if fresh:
        set_rope(model, rope_of(model))
    try:
        before = [probe(owner) for owner, _ in places]
        for _, _, _, rotary in sites(model):
            rotary.turns = True  # pyright: ignore[reportArgumentType]
        for module in {module for module, _ in found}:
            names = tuple(name for other, name in found if other is module)
            put_forward(module, clone(type(module).forward, names, turn_both))
        check_same(before, [probe(owner) for owner, _ in places])
    except Exception as error:
        (unset_rope if fresh else drop_kernels)(model)
        raise ValueError(
            f"{type(found[0][0]).__name__} cannot rotate by our op ({type(error).__name__}: {error}); "
            "the model is as it was"
        ) from error
    return Handle(model)


def drop_kernels(model: nn.Module) -> None:
    """Give attention its own forward back."""
    for _, owner, _, rotary in sites(model):
        if isinstance(rotary, RopeMMRotaryEmbedding) and rotary.turns:
            rotary.turns = False
            for module, _ in applied(owner):
                put_forward(module, None)


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
    if isinstance(rope := getattr(base_of(model), "rope_mm", None), nn.Module):
        print(f"{len(attentions(model))} attention modules: {rope}")
    for name, owner, _, module in sites(model):
        ours = isinstance(module, RopeMMRotaryEmbedding)
        ropes: Any = module.runs if ours else None
        if not ours:
            try:
                ropes = rope_of(owner)
            except ValueError as error:
                ropes = {None: error}
            ropes = ropes if isinstance(ropes, dict) else {None: ropes}
        how = "our op" if ours and module.turns else "the model's own function"
        for layer, rope in ropes.items():
            what = rope if isinstance(rope, ValueError) else describe(rope)
            print(f"{name}{f' ({layer})' if layer else ''}: {what}; applied by {how}")
