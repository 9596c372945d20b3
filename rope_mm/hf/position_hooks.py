"""What happens to positions around a model's forward: split, placed, checked, and remembered on the cache.

transformers passes position_ids from a model's outer forward to its rotary module, and makes masks of them on
the way. So `PositionHooks` stands at the outermost forward that takes position_ids: what is inside sees token
positions (b, s), and our rotary modules see positions on every axis.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.checks.arguments import bind_positional, cache_of, read, refuse_unknown_cache
from rope_mm.hf.foreign_positions import refuse_foreign_positions
from rope_mm.hf.image_grids import takes_images
from rope_mm.hf.packing.leaks import refuse_hidden_documents, refuse_packing_leak
from rope_mm.hf.position_ids import ENDS_IN_IMAGE, Conversation, next_positions, place_forward
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding
from rope_mm.schemes.scheme import Scheme


class PositionHooks:
    """The hooks around the forwards of one stack of layers, whose rotary modules share their positions.

    Attributes:
        state: the positions of the forward that is under way, shared with the rotary modules.
        native: whether the model hands its rotary module M-RoPE's rows, (3, b, s).
        scheme: the scheme that places tokens; None where the model keeps its own rope.
        text_only: whether `set_rope` was given a text part alone, whose positions the whole model makes.
        holder: the module whose forward set the positions, while it runs.
        after: where each row's next token stands (b,), once the forward that is under way is done.
    """

    def __init__(self, rotaries: list[RopeMMRotaryEmbedding], scheme: Scheme | None, text_only: bool):
        self.state, first = rotaries[0].position_state, rotaries[0]
        for rotary in rotaries:
            rotary.position_state = self.state
        self.axes, self.native = first.axes, first.call_format == "mrope"
        self.scheme, self.text_only = scheme, text_only
        self.holder: nn.Module | None = None
        self.after: Tensor | None = None

    def install(self, modules: list[nn.Module], rotary: RopeMMRotaryEmbedding) -> None:
        """Hook the forwards of these modules, the outermost first; `rotary` records how to undo it."""
        for module in modules:
            before = self.before_images if self.scheme and takes_images(module) else self.before
            rotary.undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hook = module.register_forward_hook(self.finish, with_kwargs=True, always_call=True)
            rotary.undo.append(hook.remove)

    def before_images(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Before a forward that takes images beside text, which our layout places."""
        return self.before(module, args, kwargs, places=True)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], places: bool = False):
        """Before a forward: position_ids (1 + a, b, s), given or placed, become token positions and state."""
        if self.holder is not None:
            return None
        self.state.positions = None
        kwargs = bind_positional(module, args, kwargs)
        refuse_unknown_cache(kwargs)
        ids, cache = kwargs.get("position_ids"), read(kwargs, "cache")
        check_position_shape(ids, kwargs)
        check_padding(ids, kwargs, cache, self.axes)
        if places:
            refuse_foreign_positions(module, self.scheme, ids, kwargs, cache)
        if ids is None and places:
            ids, self.after = place_forward(module, self.scheme, kwargs, cache)
        if ids is None or ids.dim() != 3:
            self.check_flat(module, ids, kwargs, cache)
            return None
        kept = self.split(module, ids, kwargs, cache)
        if self.state.positions is not None:
            self.holder = module
            if places and self.after is None and not torch.compiler.is_compiling():
                self.after = next_positions(
                    self.state.positions, ids[0] % 1 > 0, kwargs.get("attention_mask")
                )
        return (), {**kwargs, "position_ids": kept}

    def finish(self, module: nn.Module, _args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """After a forward, also one that failed: note on its cache where the next tokens stand."""
        if self.holder is not module:
            return
        cache = cache_of(out)
        if cache is not None and not torch.compiler.is_compiling():
            if self.after is not None:
                cache.rope_mm_conversation = Conversation(self.after, int(cache.get_seq_length()))
            else:
                vars(cache).setdefault("rope_mm_ends_in_image", False)
        self.state.positions = self.holder = self.after = None

    def check_flat(self, module: Any, ids: Tensor | None, kwargs: dict[str, Any], cache: Any) -> None:
        """Check a forward without positions on every axis."""
        if hasattr(cache, "rope_mm_ends_in_image"):
            raise ValueError(
                "this cache was filled at given positions, so what follows needs its own: position_ids "
                f"(1 + {self.axes}, b, s), as `positions_for` makes them for the whole sequence"
            )
        if ids is not None and self.scheme is not None:
            refuse_packing_leak(module, ids, kwargs)

    def split(self, module: Any, ids: Tensor, kwargs: dict[str, Any], cache: Any) -> Tensor:
        """Keep positions (b, s, a) in the state; return the token positions that the model gets."""
        rows, a = len(ids), self.axes
        if rows != 1 + a and not (self.native and rows in (1, 3, 4, a)):
            raise ValueError(
                f"position_ids {tuple(ids.shape)} have {rows} rows, but {a} axes need (1 + {a}, b, s), the "
                "token positions first; `positions_for` makes them"
            )
        if self.text_only and self.native and rows > 1 and not ids.is_floating_point():
            raise ValueError(
                "these position_ids are whole numbers, as M-RoPE around a text makes, not by our layout; "
                "give set_rope the whole model, or this part what `positions_for` makes"
            )
        if rows in (a, 1 + a):
            self.state.positions = ids[-a:].movedim(0, -1)
        kept, counted = ids[0].long(), rows == 1 + a or rows == 4 != a
        if rows == 1 and self.state.positions is None:  # one row for all axes
            self.state.positions = ids.movedim(0, -1).expand(-1, -1, a)
        if self.state.positions is not None:
            refuse_hidden_documents(self.scheme, self.state.positions, kept if counted else None, kwargs)
        if counted:
            refuse_packing_leak(module, kept, kwargs)
        if rows == 1 + a:
            refuse_image_end(ids[0], cache)
        if self.native:  # such models split four rows themselves, and three have no token positions
            kept = kept.expand(4 if counted else 3, -1, -1)
        return kept


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


def check_padding(ids: Tensor | None, kwargs: dict[str, Any], cache: Any, axes: int) -> None:
    """Refuse a mask longer than its tokens, and positions that were made for padding on the other side."""
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    mask: Any = kwargs.get("attention_mask")
    if tokens is None or getattr(mask, "ndim", 0) != 2 or torch.compiler.is_compiling():
        return
    past, s = int(cache.get_seq_length()) if cache is not None else 0, tokens.shape[1]
    if mask.shape[1] > past + s:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the cache holds {past} tokens and {s} are new; "
            f"give (b, {past + s})"
        )
    if past or ids is None or ids.dim() != 3 or len(ids) != 1 + axes or mask.shape[1] != s:
        return
    count = ids[0].expand(len(mask), -1)
    first = count.gather(1, mask.long().argmax(-1, keepdim=True).to(count.device))
    if (first >= 1).any():
        raise ValueError(
            "row 0 of position_ids counts padding as tokens: the first token that attention_mask keeps has "
            f"the number {int(first.max())}; give positions_for padding_side='left', or "
            "of inputs with their attention_mask"
        )


def refuse_image_end(counts: Tensor, cache: Any) -> None:
    """Refuse a step of one where the next token is not one ahead, as `positions_for` marks by a quarter.

    The host reads the numbers once, as an accelerator waits each time; whole numbers hold no marks.
    """
    ended, ends = getattr(cache, "rope_mm_ends_in_image", False), False
    if torch.compiler.is_compiling():
        if ended:
            raise ValueError(ENDS_IN_IMAGE)
        return
    if counts.is_floating_point():
        marks = counts % 1 > 0
        steps = marks[:, 1:] & (counts.diff() == 1) & marks[:, :-1]
        within, begins, ends = torch.stack([x.any() for x in (steps, marks[:, 0], marks[:, -1])]).tolist()
        if within or (ended and begins):
            raise ValueError(ENDS_IN_IMAGE)
    if cache is not None:
        cache.rope_mm_ends_in_image = ends
