"""The module that replaces a model's rotary module, and the hooks around its owner's forward."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_mm.arguments import cache_of, read, refuse_unknown_cache
from rope_mm.hf.inspection import TOKEN_CALLS, ModelRope, frequencies
from rope_mm.hf.vision_positions import centres_in_radians, place_patches
from rope_mm.rotary import definition as rotation
from rope_mm.rotary.dispatch import check_positions, make_angles
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme

Rope = Rotary | ModelRope
ENDS_IN_IMAGE = (
    "the prompt ends in an image, and the token behind it does not stand one step further on; end it with a "
    "text token, such as the one that closes an image"
)


class RopeMMRotaryEmbedding(nn.Module):
    """Replaces a model's rotary module, is called as it was, and keeps it for `unset_rope`.

    A model that had none gets one beside its layers, and its attention rotates by it. No buffers: Omega is
    rebuilt from its numbers, so that no cast and no load onto the meta device can change it.

    Attributes:
        ropes: what it runs, by layer type.
        interfaces: how the model calls it and reads its tables, by layer type; empty if it never does.
        original: the module that it replaces, None where there was none.
        use_op: whether attention rotates by our op, and gets RotaryAngles in place of tables.
        undo: calls that, the last one first, make the model what it was; a copy of the model copies them.
        coordinates: positions (b, s, a) of the forward that is under way, where the model was given them.
        text_only: whether `set_rope` was given a text part alone, whose positions the whole model makes.
    """

    def __init__(self, ropes: dict[Any, Rope], interfaces: dict[Any, ModelRope], original: Any, config: Any):
        super().__init__()
        self.ropes, self.interfaces, self.original = ropes, interfaces, original
        self.learned = nn.ModuleList(rope for rope in ropes.values() if isinstance(rope, Rotary))
        self.config, self.use_op = config, not interfaces
        self.undo: list[Callable[[], Any]] = []
        self.coordinates: Tensor | None = None
        self.text_only = False
        self.call_format = next((rope.call_format for rope in interfaces.values()), "")
        self.axes = len(self.first.omega)

    @property
    def first(self) -> Rope:
        """What it runs in layers of the first type; positions are the same for all types."""
        return next(iter(self.ropes.values()))

    def set_attr(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or a config, and record how to undo it."""
        had = {**vars(target), **getattr(target, "_modules", {})}
        self.undo.append(
            partial(setattr, target, name, had[name]) if name in had else partial(delattr, target, name)
        )
        setattr(target, name, value)

    def restore(self, older: int = 0) -> None:
        """Undo all changes but the first `older` ones."""
        while len(self.undo) > older:
            self.undo.pop()()

    def forward(self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None):
        layer = layer_type if layer_type in self.ropes else None
        rope, interface = self.ropes[layer], self.interfaces[layer]
        positions, omega = self.positions(x, position_ids, rope, interface), torch.as_tensor(rope.omega)
        if omega.is_meta:
            raise ValueError(
                "the learned Omega is on the meta device, as when accelerate offloads it; keep the rotary "
                "module on a device, by a line of its own in device_map"
            )
        if self.use_op:
            angles = make_angles(positions, omega, rope.spec, x.dtype)
            return angles, angles
        check_positions(positions, omega)
        own = isinstance(rope, ModelRope)
        angle = rope.angles(positions) if own else rotation.angles(positions, omega)[..., 0, :]
        return interface.tables(angle, rope.spec.factor, x.dtype)

    def positions(self, x: Tensor, ids: Tensor | None, rope: Rope, interface: ModelRope) -> Tensor:
        """Positions (..., s, a) from the ids that the model gives, or from the image x without ids."""
        if ids is None:
            image = self.config, x, self.original.training
            if isinstance(rope, ModelRope):
                return centres_in_radians(*image)
            return place_patches(rope.scheme, *image)
        if self.call_format in TOKEN_CALLS:
            if self.coordinates is not None:
                return self.coordinates
            if ids.dim() == 3 and len(ids) == self.axes:
                return ids.movedim(0, -1)
            return (ids if ids.dim() == 2 else ids[0])[..., None].expand(-1, -1, self.axes)
        if isinstance(rope, ModelRope):
            return ids
        at = dict(zip(interface.axes, ids.unbind(-1), strict=True))
        return torch.stack([at.get(axis, torch.zeros_like(ids[..., 0])) for axis in rope.scheme.axes], -1)

    def split_positions(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Before the owner's forward: (1 + a, b, s) position_ids become token positions and coordinates."""
        self.coordinates, a = None, self.axes
        kwargs = bind_positional(owner, args) | kwargs if args else kwargs
        refuse_unknown_cache(kwargs)
        ids, cache = kwargs.get("position_ids"), read(kwargs, "cache")
        check_position_shape(ids, kwargs)
        if ids is None or ids.dim() != 3:
            if hasattr(cache, "rope_mm_ends_in_image"):
                raise ValueError(
                    "this cache was filled at given positions, so what follows needs its own: position_ids "
                    f"(1 + {a}, b, s), as `positions_for` makes them for the whole sequence"
                )
            if ids is not None and self.learned:
                refuse_packing_leak(owner, ids, kwargs)
            return None
        rows, native = len(ids), self.call_format == "mrope"
        if rows != 1 + a and not (native and rows in (1, 3, 4, a)):
            raise ValueError(
                f"position_ids {tuple(ids.shape)} have {rows} rows, but {a} axes need (1 + {a}, b, s), the "
                "token positions first; `positions_for` makes them"
            )
        if self.text_only and native and rows > 1 and not ids.is_floating_point():
            raise ValueError(
                "these position_ids are whole numbers, as M-RoPE around a text makes, not by our layout; "
                "give set_rope the whole model, or this part what `positions_for` makes"
            )
        if rows in (a, 1 + a):
            self.coordinates = ids[-a:].movedim(0, -1)
        kept, counted = ids[0].long(), rows == 1 + a or rows == 4 != a
        if counted:
            refuse_packing_leak(owner, kept, kwargs)
        if rows == 1 + a:
            refuse_image_end(ids[0], cache)
        if native:  # such models split four rows themselves, and three have no token positions
            kept = kept.expand(4 if counted else 3, -1, -1)
        return (), {**kwargs, "position_ids": kept}

    def mark_cache(self, _owner: nn.Module, _args: tuple, _kwargs: dict[str, Any], out: Any) -> None:
        """After the owner's forward: note on its cache that positions were given."""
        cache = cache_of(out)
        if self.coordinates is not None and cache is not None and not torch.compiler.is_compiling():
            vars(cache).setdefault("rope_mm_ends_in_image", False)
        self.coordinates = None

    def extra_repr(self) -> str:
        return ", ".join(f"{layer or 'all layers'}: {describe(rope)}" for layer, rope in self.ropes.items())


def bind_positional(owner: nn.Module, args: tuple) -> dict[str, Any]:
    """Positional arguments of a forward, by their names."""
    names = list(inspect.signature(type(owner).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def check_position_shape(ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse position_ids that do not give each token one position."""
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if ids is None or tokens is None:
        return
    b, s = tokens.shape[:2]
    if tuple(ids.shape[-2:]) not in ((1, s), (b, s)):
        raise ValueError(
            f"position_ids {tuple(ids.shape)} do not fit {b} rows of {s} tokens; give (b, s), or "
            "(1 + axes, b, s) as `positions_for` makes them"
        )


def refuse_packing_leak(owner: Any, tokens: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse packed rows where transformers would let documents see one another."""
    if tokens.shape[-1] == 1 or torch.compiler.is_compiling():
        return
    mask: Any = kwargs.get("attention_mask")
    use_cache = kwargs.get("use_cache")
    cached = getattr(owner.config, "use_cache", False) if use_cache is None else use_cache
    padded = getattr(mask, "ndim", 0) == 2  # one of more axes says itself what sees what
    there = mask[:, -tokens.shape[-1] :].bool() if padded else torch.ones_like(tokens, dtype=torch.bool)
    leaks = cached if mask is None else padded or read(kwargs, "cache") is not None
    count = tokens.where(there, -1)
    if leaks and (there & (count < count.cummax(-1).values)).any():
        raise ValueError(
            "token positions start again within a row, and with a cache or a mask (b, s) transformers "
            "lets the documents see one another; pass use_cache=False and no mask"
        )


def refuse_image_end(counts: Tensor, cache: Any) -> None:
    """Refuse a step of one where the next token is not one ahead, as `positions_for` marks by a quarter."""
    ended, compiling = getattr(cache, "rope_mm_ends_in_image", False), torch.compiler.is_compiling()
    marks = None if compiling else counts % 1 > 0
    within = marks is not None and (marks[:, 1:] & (counts.diff() == 1) & marks[:, :-1]).any()
    if within or (ended and (marks is None or marks[:, 0].any())):
        raise ValueError(ENDS_IN_IMAGE)
    if cache is not None and marks is not None:
        cache.rope_mm_ends_in_image = bool(marks[:, -1].any())


def describe(rope: Rope) -> str:
    """What runs, in one phrase."""
    if isinstance(rope, Rotary):
        return f"{rope.scheme}, exact angles"
    return f"the model's own, bit for bit ({rope.scheme or 'a scheme of no known name'})"


class RotarySlot(NamedTuple):
    """Where a model keeps a rotary module, its own or ours; a model of plain attention has room for one.

    Attributes:
        name: the module's name from the model.
        owner: the module that holds it and hands it positions.
        leaf: its attribute in the owner.
        module: the module; None where a model has no rotary yet.
    """

    name: str
    owner: Any
    leaf: str
    module: Any

    @property
    def ours(self) -> bool:
        """Whether `set_rope` was here."""
        return isinstance(self.module, RopeMMRotaryEmbedding)


def rotary_slots(model: Any, every: bool = False) -> list[RotarySlot]:
    """Where a model keeps its rotary modules: those of its text where there are any, or every one."""
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
    """The scheme by which a model places its tokens."""
    placing = [site.module for site in rotary_slots(model) if site.ours and site.module.interfaces]
    scheme = placing[0].first.scheme if placing else None
    if scheme is None:
        raise ValueError(f"{type(model).__name__} runs no scheme of ours that places tokens; `set_rope` one")
    return scheme
