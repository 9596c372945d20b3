"""What a scheme leaves as it is in a model: cross-attention, biases, position embeddings."""

import re
from typing import Any

from torch import nn

from rope_mm.hf.attention_positions import reads_images
from rope_mm.hf.own_attention import own_pairing
from rope_mm.hf.relative_bias import bias_modules
from rope_mm.hf.rotary_inspection import ATTENTION_REGISTRY, globals_used
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Video

EMBEDDINGS = re.compile(r"(position|pos)_embed|embed_positions|\bwpe\b|position_encoding")


def cross_attentions(owner: nn.Module) -> list[nn.Module]:
    """Attention modules whose class says that their keys are of another sequence."""
    named = (module for module in owner.modules() if "cross" in type(module).__name__.lower())
    return [module for module in named if globals_used(module, ATTENTION_REGISTRY)]


def position_embeddings(owner: nn.Module) -> list[str]:
    """Names of learned or fixed position embeddings, which a model adds to its tokens."""
    if own_pairing(list(owner.modules())):  # RoFormer's are its table, which the scheme replaces
        return []
    held = [name for name, _ in owner.named_parameters()] + [name for name, _ in owner.named_buffers()]
    found = (name for name in held if EMBEDDINGS.search(name) and "position_ids" not in name)
    return [name.removesuffix(".weight") for name in found]


def idle_pairs(scheme: Scheme, video: bool) -> tuple[int, list[str]]:
    """How many of 64 pairs rotate no patch against another, and the axes on which all patches are equal."""
    p, _ = scheme.place([Video(2, 2, 2) if video else Image(2, 2)])
    same = (p == p[:1]).all(0)
    omega = scheme.omega(128)
    omega = omega if omega.dim() == 2 else omega[0]
    return int((omega[~same] == 0).all(0).sum()), [
        axis for axis, x in zip(scheme.axes, same, strict=True) if x
    ]


def untouched_parts(owner: Any, crossing: int, dropped: bool) -> list[str]:
    """One line for each kind of what a scheme leaves as it is.

    Args:
        owner: the model or part that has the scheme.
        crossing: attention modules that rotate nothing in a forward, as their keys are of another sequence.
        dropped: whether the biases of relative positions were dropped.
    """
    lines = []
    rope = getattr(getattr(owner, "rope_mm", None), "ropes", {}).get(None)
    if crossing == 0 and rope is not None and reads_images(owner):
        video = any(hasattr(owner.config, name) for name in ("num_frames", "tubelet_size"))
        idle, axes = idle_pairs(rope.scheme, video)
        if idle:
            lines.append(
                f"patches differ on other axes than {', '.join(axes)}: {idle} of 64 pairs stand "
                "still; a scheme of images alone, such as 'rope-vit-axial', uses them all"
            )
    if crossing:
        lines.append(f"cross-attention of {crossing} modules: not rotated, as it is in the model")
    if biases := bias_modules(owner):
        name, _, held = biases[0]
        what = "dropped" if dropped else "kept, beside the rotation"
        lines.append(f"bias of relative positions ({f'{name}.{held}'.strip('.')}): {what}")
    if found := position_embeddings(owner):
        lines.append(f"position embeddings ({', '.join(found)}): kept")
    return lines
