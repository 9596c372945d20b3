"""The module that replaces a model's rotary module, and the hooks around its owner's forward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rope_mm.hf.image_positions import centres_in_radians, place_patches
from rope_mm.hf.rotary_inspection import TOKEN_CALLS, ModelRope, frequencies
from rope_mm.rotary import definition as rotation
from rope_mm.rotary.dispatch import check_positions, make_angles
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme

Rope = Rotary | ModelRope
PLAIN = str, int, list, tuple  # attributes of a rotary module that are no tensors, modules or functions


@dataclass
class PositionState:
    """Positions (b, s, a) of the forward that is under way, where the model was given them."""

    positions: Tensor | None = None


class Changes:
    """Changes of attributes that can be undone.

    Attributes:
        undo: calls that, the last one first, make everything what it was.
    """

    undo: list[Callable[[], Any]]

    def __init__(self):
        self.undo = []

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


class RopeMMRotaryEmbedding(nn.Module, Changes):
    """Replaces a model's rotary module, is called as it was, and keeps it for `unset_rope`.

    A model that had none gets one beside its layers, and its attention rotates by it. No buffers: Omega is
    rebuilt from its numbers, so that no cast and no load onto the meta device can change it.

    Attributes:
        ropes: what it runs, by layer type.
        interfaces: how the model calls it and reads its tables, by layer type; empty if it never does.
        original: the module that it replaces, None where there was none.
        specs: how their angles meet channels, by layer type.
        own_omegas: the model's own frequencies (a, r), of layer types that keep them.
        use_op: whether attention rotates by our op, and gets RotaryAngles in place of tables.
        undo: calls that, the last one first, make the model what it was; a copy of the model copies them.
        position_state: positions of the forward that is under way, shared with the hooks that set them.
        rotating: of a model that had no rotary: how many attention modules rotate.
        crossing: of such a model: how many rotate nothing, as their keys are of another sequence.
        relative_bias: of such a model: "keep" or "drop", as `set_rope` was given for its relative positions.
    """

    def __init__(self, ropes: dict[Any, Rope], interfaces: dict[Any, ModelRope], original: Any, config: Any):
        nn.Module.__init__(self)
        self.ropes, self.interfaces, self.original = ropes, interfaces, original
        self.learned = nn.ModuleList(rope for rope in ropes.values() if isinstance(rope, Rotary))
        self.specs = {layer: rope.spec for layer, rope in ropes.items()}
        with unset_fake_temporarily():  # numbers, also where models are built of fake tensors
            self.own_omegas = {
                layer: torch.tensor(rope.omega, device="cpu")
                for layer, rope in ropes.items()
                if isinstance(rope, ModelRope)
            }
        self.config, self.use_op = config, not interfaces
        self.undo = []
        self.position_state = PositionState()
        self.rotating, self.crossing = 0, 0
        self.relative_bias: str | None = None
        self.call_format = next((rope.call_format for rope in interfaces.values()), "")
        self.axes = len(self.first.omega)

    def __getattr__(self, name: str) -> Any:
        """Plain attributes of the module that it replaces, which some models read (LFM3: layer_types)."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            value = vars(vars(self).get("_modules", {}).get("original") or object).get(name)
            if isinstance(value, PLAIN):
                return value
            raise

    @property
    def first(self) -> Rope:
        """What it runs in layers of the first type; positions are the same for all types."""
        return next(iter(self.ropes.values()))

    def forward(self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None):
        layer = layer_type if layer_type in self.ropes else None
        rope, interface = self.ropes[layer], self.interfaces[layer]
        positions = self.positions(x, position_ids, rope, interface)
        omega = rope.omega if isinstance(rope, Rotary) else self.own_omegas[layer]
        if omega.is_meta:
            raise ValueError(
                "the learned Omega is on the meta device, as when accelerate offloads it; keep the rotary "
                "module on a device, by a line of its own in device_map"
            )
        if self.use_op:
            angles = make_angles(positions, omega, self.specs[layer], x.dtype)
            return angles, angles
        check_positions(positions, omega)
        own = isinstance(rope, ModelRope)
        angle = rope.angles(positions, omega) if own else rotation.angles(positions, omega)[..., 0, :]
        return interface.tables(angle, rope.spec.factor, x.dtype)

    def positions(self, x: Tensor, ids: Tensor | None, rope: Rope, interface: ModelRope) -> Tensor:
        """Positions (..., s, a) from the ids that the model gives, or from the image x without ids."""
        if ids is None:
            image = self.config, x, self.original.training
            if isinstance(rope, ModelRope):
                return centres_in_radians(*image)
            return place_patches(rope.scheme, *image)
        if self.call_format in TOKEN_CALLS:
            if (given := self.position_state.positions) is not None:
                self.check_tokens(given, ids)
                return given
            if ids.dim() == 3 and len(ids) == self.axes:
                return ids.movedim(0, -1)
            return (ids if ids.dim() == 2 else ids[0])[..., None].expand(-1, -1, self.axes)
        if isinstance(rope, ModelRope):
            return ids
        at = dict(zip(interface.axes, ids.unbind(-1), strict=True))
        return torch.stack([at.get(axis, torch.zeros_like(ids[..., 0])) for axis in rope.scheme.axes], -1)

    def check_tokens(self, positions: Tensor, ids: Tensor) -> None:
        """Refuse ids of other tokens than those whose positions were given.

        Raises:
            ValueError: such ids.
        """
        if ids.shape[-1] != positions.shape[1]:
            raise ValueError(
                f"{type(self.original).__name__} is asked for {ids.shape[-1]} tokens, but positions came for "
                f"{positions.shape[1]}; positions of images cannot be given to this model"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{layer or 'all layers'}: {describe(rope)}" for layer, rope in self.ropes.items())


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


def check_model(model: Any) -> None:
    """Refuse what is no model of transformers or a part of one.

    Raises:
        ValueError: with its type.
    """
    config, inner = getattr(model, "config", None), getattr(model, "transformer", None)
    if isinstance(model, nn.Module) and (config is None or hasattr(config, "get_text_config")):
        return
    load = "give its transformer, pipeline.transformer" if isinstance(inner, nn.Module) else "load it first"
    load = "give what was compiled, model._orig_mod" if hasattr(model, "_orig_mod") else load
    given = f"the string {model!r}" if isinstance(model, str) else type(model).__name__
    raise ValueError(f"a model of transformers or diffusers is needed, or a part of one, not {given}; {load}")


def rotary_slots(model: Any, every: bool = False) -> list[RotarySlot]:
    """Where a model keeps its rotary modules: those of its text where there are any, or every one."""
    check_model(model)
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
    config = getattr(model, "config", None)
    text = config and config.get_text_config()
    texts = [site for site in found if getattr(site.module, "config", None) is text]
    if getattr(config, "is_encoder_decoder", False):  # both of its stacks read text
        texts = found
    return found if every else texts or found


def scheme_of(model: nn.Module) -> Scheme:
    """The scheme by which a model places its tokens."""
    placing = [site.module for site in rotary_slots(model) if site.ours and site.module.interfaces]
    scheme = placing[0].first.scheme if placing else None
    if scheme is None:
        raise ValueError(f"{type(model).__name__} runs no scheme of ours that places tokens; `set_rope` one")
    return scheme
