"""The module that stands where a model's rotary module stood, and what goes on around its owner's forward."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_mm.hf.inspection import OF_WORDS, ModelRope, frequencies
from rope_mm.hf.vision_positions import centres_in_radians, place_patches
from rope_mm.rotary import definition as rotation
from rope_mm.rotary.dispatch import check_positions, make_angles
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme

Runs = Rotary | ModelRope
ENDS_IN_PICTURE = (
    "the prompt ends in a picture, and the word behind it does not stand one step further on; end it with a "
    "word, such as the token that closes a picture"
)


class RopeMMRotaryEmbedding(nn.Module):
    """Stands where a model's rotary module stood, is called as it was, and keeps it for `unset_rope`.

    A model that had none has one beside its layers, of which its attention is told. It has no buffers: Omega
    is rebuilt from its numbers, so that no cast and no empty load can harm it.

    Attributes:
        runs: what it runs, for each type of layer.
        asked: how the model calls it and reads its tables, for each type of layer; nothing if it never does.
        turns: whether attention rotates by our op, and is told a turn for its tables.
        undo: calls that, the last one first, make the model what it was; a copy of the model copies them.
        coords: positions (b, s, a) of the forward that is under way, where the model was given them.
        alone: whether its model is told positions by another, which places tokens without our layout.
    """

    def __init__(self, runs: dict[Any, Runs], asked: dict[Any, ModelRope], original: Any, config: Any):
        super().__init__()
        self.runs, self.asked, self.original = runs, asked, original
        self.learned = nn.ModuleList(rope for rope in runs.values() if isinstance(rope, Rotary))
        self.config, self.turns = config, not asked
        self.undo: list[Callable[[], Any]] = []
        self.coords: Tensor | None = None
        self.alone = False
        self.call = next((rope.call for rope in asked.values()), "")
        self.axes = len(self.first.omega)

    @property
    def first(self) -> Runs:
        """What it runs in layers of the first type; positions are the same for all."""
        return next(iter(self.runs.values()))

    def put(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or a config, and note how to undo it."""
        had = {**vars(target), **getattr(target, "_modules", {})}
        self.undo.append(
            partial(setattr, target, name, had[name]) if name in had else partial(delattr, target, name)
        )
        setattr(target, name, value)

    def take_back(self, left: int = 0) -> None:
        """Undo all but the first changes."""
        while len(self.undo) > left:
            self.undo.pop()()

    def forward(self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None):
        layer = layer_type if layer_type in self.runs else None
        rope, asked = self.runs[layer], self.asked[layer]
        positions, omega = self.positions(x, position_ids, rope, asked), torch.as_tensor(rope.omega)
        if omega.is_meta:
            raise ValueError(
                "the learned Omega is on the meta device, as when accelerate offloads it; keep the rotary "
                "module on a device, by a line of its own in device_map"
            )
        if self.turns:
            angles = make_angles(positions, omega, rope.spec, x.dtype)
            return angles, angles
        check_positions(positions, omega)
        own = isinstance(rope, ModelRope)
        angle = rope.angles(positions) if own else rotation.angles(positions, omega)[..., 0, :]
        return asked.tables(angle, rope.spec.factor, x.dtype)

    def positions(self, x: Tensor, ids: Tensor | None, rope: Runs, asked: ModelRope) -> Tensor:
        """Positions (..., s, a) from what the model hands over, which is an image where it has no `ids`."""
        if ids is None:
            told = self.config, x, self.original.training
            if isinstance(rope, ModelRope):
                return centres_in_radians(*told)
            return place_patches(rope.scheme, *told)
        if self.call in OF_WORDS:
            if self.coords is not None:
                return self.coords
            if ids.dim() == 3 and len(ids) == self.axes:
                return ids.movedim(0, -1)
            return (ids if ids.dim() == 2 else ids[0])[..., None].expand(-1, -1, self.axes)
        if isinstance(rope, ModelRope):
            return ids
        at = dict(zip(asked.axes, ids.unbind(-1), strict=True))
        return torch.stack([at.get(axis, torch.zeros_like(ids[..., 0])) for axis in rope.scheme.axes], -1)

    def split_positions(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Before the owner's forward: (1 + a, b, s) position_ids become token positions and coordinates."""
        self.coords, a = None, self.axes
        kwargs = by_name(owner, args) | kwargs if args else kwargs
        ids, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        refuse_misfit(ids, kwargs)
        if ids is None or ids.dim() != 3:
            if hasattr(cache, "rope_mm_ended"):
                raise ValueError(
                    "this cache was filled at given positions, so what follows needs its own: position_ids "
                    f"(1 + {a}, b, s), as `positions_for` makes them for the whole story"
                )
            if ids is not None and self.learned:
                refuse_leak(owner, ids, kwargs)
            return None
        rows, native = len(ids), self.call == "rows"
        if rows != 1 + a and not (native and rows in (1, 3, 4, a)):
            raise ValueError(
                f"position_ids {tuple(ids.shape)} have {rows} rows, but {a} axes need (1 + {a}, b, s), the "
                "token positions first; `positions_for` makes them"
            )
        if self.alone and native and rows > 1 and not ids.is_floating_point():
            raise ValueError(
                "these position_ids are whole numbers, as the M-RoPE around a text, not as our layout gives; "
                "give set_rope the whole model, or this part what `positions_for` makes"
            )
        if rows in (a, 1 + a):
            self.coords = ids[-a:].movedim(0, -1)
        kept, counted = ids[0].long(), rows == 1 + a or rows == 4 != a
        if counted:
            refuse_leak(owner, kept, kwargs)
        if rows == 1 + a:
            refuse_step(ids[0], cache)
        if native:  # such models split four rows themselves, and three have no token positions
            kept = kept.expand(4 if counted else 3, -1, -1)
        return (), {**kwargs, "position_ids": kept}

    def mark_cache(self, _owner: nn.Module, _args: tuple, _kwargs: dict[str, Any], out: Any) -> None:
        """After the owner's forward: its cache knows that positions were given."""
        cache = getattr(out, "past_key_values", None)
        if self.coords is not None and cache is not None and not torch.compiler.is_compiling():
            vars(cache).setdefault("rope_mm_ended", False)
        self.coords = None

    def extra_repr(self) -> str:
        return ", ".join(f"{layer or 'all layers'}: {describe(rope)}" for layer, rope in self.runs.items())


def by_name(owner: nn.Module, args: tuple) -> dict[str, Any]:
    """Arguments that came by their place in a forward, with their names."""
    names = list(inspect.signature(type(owner).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def refuse_misfit(ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse position_ids that do not tell each token one place."""
    words = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if ids is None or words is None:
        return
    b, s = words.shape[:2]
    if tuple(ids.shape[-2:]) not in ((1, s), (b, s)):
        raise ValueError(
            f"position_ids {tuple(ids.shape)} do not fit {b} rows of {s} tokens; give (b, s), or "
            "(1 + axes, b, s) as `positions_for` makes them"
        )


def refuse_leak(owner: Any, tokens: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse packed rows where transformers would let documents see one another."""
    if tokens.shape[-1] == 1 or torch.compiler.is_compiling():
        return
    mask: Any = kwargs.get("attention_mask")
    use_cache = kwargs.get("use_cache")
    cached = getattr(owner.config, "use_cache", False) if use_cache is None else use_cache
    padded = getattr(mask, "ndim", 0) == 2  # one of more axes says itself what sees what
    there = mask[:, -tokens.shape[-1] :].bool() if padded else torch.ones_like(tokens, dtype=torch.bool)
    leaks = cached if mask is None else padded or kwargs.get("past_key_values") is not None
    count = tokens.where(there, -1)
    if leaks and (there & (count < count.cummax(-1).values)).any():
        raise ValueError(
            "token positions start again within a row, and with a cache or a mask (b, s) transformers "
            "lets the documents see one another; pass use_cache=False and no mask"
        )


def refuse_step(counts: Tensor, cache: Any) -> None:
    """Refuse a step of one from where the next word is not one ahead, which `positions_for` marks."""
    ended, compiling = getattr(cache, "rope_mm_ended", False), torch.compiler.is_compiling()
    marks = None if compiling else counts % 1 > 0
    within = marks is not None and (marks[:, 1:] & (counts.diff() == 1) & marks[:, :-1]).any()
    if within or (ended and (marks is None or marks[:, 0].any())):
        raise ValueError(ENDS_IN_PICTURE)
    if cache is not None and marks is not None:
        cache.rope_mm_ended = bool(marks[:, -1].any())


def describe(rope: Runs) -> str:
    """In a few words, what runs."""
    if isinstance(rope, Rotary):
        return f"{rope.scheme}, exact angles"
    return f"the model's own, bit for bit ({rope.scheme or 'a scheme of no known name'})"


class RotarySlot(NamedTuple):
    """Where a model keeps a rotary module, its own or ours; a model of plain attention has room for one."""

    name: str
    owner: Any
    leaf: str
    module: Any

    @property
    def ours(self) -> bool:
        """Whether `set_rope` was here."""
        return isinstance(self.module, RopeMMRotaryEmbedding)


def rotary_slots(model: Any, every: bool = False) -> list[RotarySlot]:
    """Where a model keeps its rotary modules; those of words alone where there are any, or every one."""
    found = [
        RotarySlot(f"{name}.{leaf}".strip("."), owner, leaf, module)
        for name, owner in model.named_modules()
        if not isinstance(owner, RopeMMRotaryEmbedding)
        for leaf, module in owner.named_children()
        if isinstance(module, RopeMMRotaryEmbedding) or frequencies(module)
    ]
    if listed := [name for name, owner, *_ in found if isinstance(owner, nn.ModuleList)]:
        raise ValueError(
            f"{type(model).__name__} keeps rotary modules in a list ({', '.join(listed)}), and only its own "
            "forward knows which layer calls which; it is not served"
        )
    text = getattr(model, "config", None) and model.config.get_text_config()
    texts = [site for site in found if getattr(site.module, "config", None) is text]
    return found if every else texts or found


def scheme_of(model: nn.Module) -> Scheme:
    """The scheme by which a model places what it reads."""
    placing = [site.module for site in rotary_slots(model) if site.ours and site.module.asked]
    scheme = placing[0].first.scheme if placing else None
    if scheme is None:
        raise ValueError(f"{type(model).__name__} runs no scheme of ours that places tokens; `set_rope` one")
    return scheme
