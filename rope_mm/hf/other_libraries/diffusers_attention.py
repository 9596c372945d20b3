"""A rotary in models of diffusers that have none: SD3, whose attention meets text and image in one sequence.

A processor of diffusers asks its attention module for projections and norms. `RotatingProcessor` shows it the
same module with norms that rotate what they return, so each processor that norms q and k last is served as it
is. Angles come as an argument, so that checkpointing, which calls blocks again, hands them on.
"""

from typing import Any

from torch import Tensor, nn

from rope_mm.checks.arguments import bind_positional
from rope_mm.hf.build_rotary import read_given, refuse
from rope_mm.hf.other_libraries.diffusers_positions import place, segment
from rope_mm.hf.rotary_embedding import Changes
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme

# file and name of a model's class, below diffusers.models.transformers
BARE = ("transformer_sd3.SD3Transformer2DModel",)
PROCESSOR = "JointAttnProcessor2_0"  # the norms of q and k are the last that it applies before the attention
NORMS = {"norm_q": 0, "norm_k": 0, "norm_added_q": 1, "norm_added_k": 1}  # of the image; of the text


class RotatingView:
    """An attention module whose norms of queries and keys rotate what they return.

    Attributes:
        asked: how many of these norms a processor has called.
    """

    def __init__(self, attention: nn.Module, angles: tuple[RotaryAngles, RotaryAngles]):
        self.attention, self.angles, self.asked = attention, angles, 0

    def __getattr__(self, name: str) -> Any:
        attention = self.__dict__["attention"]
        return self.rotating(name, NORMS[name]) if name in NORMS else getattr(attention, name)

    def rotating(self, name: str, part: int) -> Any:
        """A norm of the attention module, if it has one, and then the rotation of heads (b, h, s, d)."""
        norm = getattr(self.attention, name)

        def rotate(x: Tensor) -> Tensor:
            self.asked += 1
            x = x if norm is None else norm(x)
            return self.angles[part].rotate_one(x.transpose(1, 2)).transpose(1, 2)

        return rotate


class RotatingProcessor:
    """A processor of diffusers in whose attention queries and keys are rotated."""

    def __init__(self, processor: Any, rotary: "AttentionRotary"):
        self.processor, self.rotary = processor, rotary

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        rope_mm: Any = None,
        **kwargs: Any,
    ) -> Any:
        no_angles = f"{type(attn).__name__} got no angles: its model does not pass arguments on to it"
        refuse({no_angles: rope_mm is None})
        view = RotatingView(attn, rope_mm)
        out = self.processor(view, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        asked, wanted = view.asked, 2 if encoder_hidden_states is None else 4
        name = type(self.processor).__name__
        refuse({f"{name} asked for {asked} norms, not {wanted}, so it is not served": asked != wanted})
        self.rotary.calls += 1
        return out


class AttentionRotary(nn.Module, Changes):
    """The rotary of a model that had none, a child of the model.

    Attributes:
        ropes: what it runs, under the key None.
        calls: how many attention modules have rotated in the forward that is under way.
        undo: calls that, the last one first, make the model what it was.
    """

    def __init__(self, model: nn.Module, rope: Rotary):
        nn.Module.__init__(self)
        self.undo = []
        self.ropes, self.learned, self.calls = {None: rope}, nn.ModuleList([rope]), 0
        self.places = (attentions(model),)  # in a tuple, which hides them from their model's child

    @property
    def rope(self) -> Rotary:
        """What it runs."""
        return self.ropes[None]

    def install(self, model: Any) -> None:
        """Rotate in every attention module, and hand them the angles of each forward."""
        self.set_attr(model, "rope_mm", self)
        save_scheme(model, self.rope, self)
        for attention in self.places[0]:
            self.set_attr(attention, "processor", RotatingProcessor(attention.processor, self))
        self.undo.append(model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True).remove)
        self.undo.append(model.register_forward_hook(self.after, with_kwargs=True).remove)

    def before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: angles of the image's tokens and of the text's, text first, as an argument."""
        self.calls = 0
        given = bind_positional(model, args, kwargs)
        latents, words = given["hidden_states"], given["encoder_hidden_states"].shape[1]
        down, across = (size // model.config.patch_size for size in latents.shape[-2:])
        p = place(self.rope.scheme, f"text:{words} {segment(1, down, across)}", latents.device)
        angles = tuple(self.rope.angles(part, latents.dtype) for part in (p[words:], p[:words]))
        more = {"joint_attention_kwargs": (given.get("joint_attention_kwargs") or {}) | {"rope_mm": angles}}
        return (), given | more

    def after(self, model: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
        """After a forward: refuse to let a scheme be without effect.

        Raises:
            ValueError: attention modules that did not rotate.
        """
        calls, self.calls = self.calls, 0
        all_of_them = not kwargs.get("skip_layers")
        missed = f"{calls} of {len(self.places[0])} attention modules of {type(model).__name__} rotated"
        refuse({missed: calls < (len(self.places[0]) if all_of_them else 1)})

    def explain(self) -> str:
        """One line on what runs."""
        where = f"{len(self.places[0])} attention modules"
        return f"{where}: {self.rope.scheme}, exact angles; positions by layout {self.rope.scheme.layout!r}"


SAVED = "rope_mm_scheme"  # the field of a model's config
CONFIG = "_internal_dict"  # where diffusers keeps that


def save_scheme(model: Any, rope: Any, changes: Changes) -> None:
    """Write a scheme into the config of a model of diffusers, which is saved with the model."""
    config = vars(model).get(CONFIG)
    if config is not None and isinstance(rope, Rotary):
        changes.set_attr(model, CONFIG, type(config)({**config, SAVED: rope.scheme.to_dict()}))


def saved_scheme(model: Any) -> Scheme:
    """The scheme with which a model of diffusers was saved.

    Raises:
        ValueError: a config without one, or a learned Omega, which diffusers does not load.
    """
    name = type(model).__name__
    held: Any = (vars(model).get(CONFIG) or {}).get(SAVED)
    refuse({f"no scheme is saved with {name}; name one": not held})
    scheme = Scheme.from_dict(held)
    refuse({
        f"{name} was saved with a learned Omega, which diffusers does not load; name the scheme, and copy "
        "the weight rope_mm.learned.0.omega_param out of the saved file into the parameter of this name": (
            scheme.learnable
        )
    })  # fmt: skip
    return scheme


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules of a model."""
    return [part for part in model.modules() if hasattr(part, "processor") and hasattr(part, "to_out")]


def is_bare(model: nn.Module) -> bool:
    """Whether a model of diffusers has no rotary, and can be given one."""
    return f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}" in BARE


def make_attention_rotary(model: Any, given: Any, changes: dict[str, Any]) -> AttentionRotary:
    """The rotary of a model without one, checked.

    Raises:
        ValueError: a Rotary or a processor that does not fit.
    """
    name, width = type(model).__name__, model.config.attention_head_dim
    other = {type(attention.processor).__name__ for attention in attentions(model)} - {PROCESSOR}
    refuse({f"{', '.join(sorted(other))} may not norm queries and keys last, as {PROCESSOR} does": other})
    scheme = read_given(given, changes, name, width)
    heads = model.config.num_attention_heads if scheme.per_head else None
    rope = given if isinstance(given, Rotary) else Rotary(width, scheme, heads=heads)
    why = f"{scheme} has an Omega that depends on the length; give its extension a fixed factor"
    refuse({why: scheme.needs_length})
    return AttentionRotary(model, rope)
