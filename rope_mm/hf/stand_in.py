"""The module that stands where a model's rotary module stood, and what goes on around its owner's forward."""

from typing import Any

import torch
from torch import Tensor, nn

from rope_mm import rotation
from rope_mm.hf.fitting import Runs, axes_of, describe, factor_of
from rope_mm.hf.placing import ENDS_IN_PICTURE
from rope_mm.hf.reading import ModelRope
from rope_mm.kernels import Form, make_turn
from rope_mm.rotary import Rotary


class RopeMMRotaryEmbedding(nn.Module):
    """Stands where a model's rotary module stood, is called as it was, and keeps it for `unset_rope`.

    It has no buffers: Omega is rebuilt from its numbers, so that no cast and no empty load can harm it.

    Attributes:
        asked: how the model calls it and reads its tables, for each type of layer.
        runs: what it runs, for each type of layer.
        coords: positions (b, s, a) of the forward that is under way, where the model was given them.
    """

    def __init__(self, original: nn.Module, asked: dict[str | None, ModelRope], runs: dict[str | None, Runs]):
        super().__init__()
        self.original, self.asked, self.runs = original, asked, runs
        self.learned = nn.ModuleList(rope for rope in runs.values() if isinstance(rope, Rotary))
        self.config, self.rope_type = getattr(original, "config", None), "default"
        self.coords: Tensor | None = None
        self.turns = False
        self.saved = getattr(self.config, "rope_parameters", None)

    @property
    def axes(self) -> int:
        """How many coordinates a position has."""
        return axes_of(next(iter(self.runs.values())))

    @property
    def asked_natively(self) -> bool:
        """Whether the model itself hands over a row of positions for each axis, as with M-RoPE."""
        return next(iter(self.asked.values())).call == "rows"

    @property
    def reads_words(self) -> bool:
        """Whether it is told positions of words, as in decoders, not rows and columns."""
        return next(iter(self.asked.values())).call in ("words", "rows")

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None):
        layer = layer_type if layer_type in self.runs else None
        rope, asked = self.runs[layer], self.asked[layer]
        if isinstance(rope, Rotary) and rope.omega.is_meta:
            raise ValueError(
                "the learned Omega is on the meta device, as when accelerate offloads it; keep the rotary "
                "module on a device, by a line of its own in device_map"
            )
        positions = self.positions(position_ids, rope, asked)
        if self.turns:
            omega = torch.as_tensor(rope.omega, device=x.device)
            turn = make_turn(positions, omega, Form(asked.pairing, factor=factor_of(rope)), x.dtype)
            return turn, turn
        if isinstance(rope, ModelRope):
            return rope.cos_sin(positions, x.dtype)
        cos, sin = rotation.cos_sin(positions, rope.omega, torch.float32, factor_of(rope))
        return asked.fill(cos[..., 0, :], sin[..., 0, :], x.dtype)

    def positions(self, ids: Tensor, rope: Runs, asked: ModelRope) -> Tensor:
        """Positions (..., s, a) from what the model hands over."""
        a = axes_of(rope)
        if self.reads_words:
            if self.coords is not None:
                return self.coords
            if ids.dim() == 3 and len(ids) == a:
                return ids.movedim(0, -1)
            return (ids if ids.dim() == 2 else ids[0])[..., None].expand(-1, -1, a)
        if isinstance(rope, ModelRope):
            return ids
        at = dict(zip(asked.axes, ids.unbind(-1), strict=True))
        still = torch.zeros_like(ids[..., 0])
        return torch.stack([at.get(axis, still) for axis in rope.scheme.axes], -1)

    def extra_repr(self) -> str:
        return ", ".join(f"{layer or 'all layers'}: {describe(rope)}" for layer, rope in self.runs.items())


def split_positions(owner: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Before the owner's forward: (1 + a, b, s) position_ids become token positions and coordinates.

    Raises:
        ValueError: three-dimensional position_ids of other rows.
    """
    rotary = next(m for m in owner.children() if isinstance(m, RopeMMRotaryEmbedding))
    rotary.coords, ids = None, kwargs.get("position_ids")
    if ids is None or ids.dim() != 3:
        if getattr(kwargs.get("past_key_values"), "rope_mm_placed", False):
            raise ValueError(
                "this cache was filled at given positions, so what follows needs its own: position_ids "
                f"(1 + {rotary.axes}, b, s), as `positions_for` makes them for the whole story"
            )
        return None
    a, rows = rotary.axes, len(ids)
    native = rotary.asked_natively
    if rows != 1 + a and not (native and rows in (1, 3, 4, a)):
        raise ValueError(
            f"position_ids {tuple(ids.shape)} have {rows} rows, but {a} axes need (1 + {a}, b, s), the token "
            "positions first; `positions_for` makes them"
        )
    if rows in (a, 1 + a):
        rotary.coords = ids[-a:].movedim(0, -1)
    tokens = ids[:1].long()
    if rows == 1 + a:
        refuse_leak(owner, tokens[0], kwargs)
        refuse_step(ids[0], kwargs.get("past_key_values"))
    if native:  # such models split four rows themselves, and three have no token positions
        told = rows == 1 + a or (rows == 4 and a != 4)
        kept = torch.cat((tokens, *(ids[:1],) * 3)) if told else ids[:1].expand(3, -1, -1)
        return args, {**kwargs, "position_ids": kept}
    return args, {**kwargs, "position_ids": tokens[0]}


def refuse_leak(owner: Any, tokens: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse packed rows where transformers would let documents see one another.

    Raises:
        ValueError: token positions that start again, with a cache or a mask.
    """
    if tokens.shape[-1] == 1 or torch.compiler.is_compiling() or not (tokens.diff() < 0).any():
        return
    use_cache = kwargs.get("use_cache")
    cached = owner.config.use_cache if use_cache is None else use_cache
    if cached or kwargs.get("attention_mask") is not None:
        raise ValueError(
            "token positions start again within a row, and with a cache or an attention_mask transformers "
            "lets the documents see one another; pass use_cache=False and no mask"
        )


def refuse_step(counts: Tensor, cache: Any) -> None:
    """Refuse a step of one from where the next word is not one ahead, which `positions_for` marks.

    Raises:
        ValueError: a mark that was counted on.
    """
    ended, compiling = getattr(cache, "rope_mm_ended", False), torch.compiler.is_compiling()
    marks = None if compiling else counts % 1 > 0
    within = marks is not None and (marks[:, 1:] & (counts.diff() == 1) & marks[:, :-1]).any()
    if within or (ended and (marks is None or marks[:, 0].any())):
        raise ValueError(ENDS_IN_PICTURE)
    if cache is not None and marks is not None:
        cache.rope_mm_ended = bool(marks[:, -1].any())


def mark_cache(owner: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """After the owner's forward: its cache knows that positions were given."""
    rotary = next(m for m in owner.children() if isinstance(m, RopeMMRotaryEmbedding))
    cache = getattr(out, "past_key_values", None)
    if rotary.coords is not None and cache is not None and not torch.compiler.is_compiling():
        cache.rope_mm_placed = True
    rotary.coords = None
