"""Where the queries and keys of an attention module stand, in a model that has no rotary of its own.

Text and sound stand by the length of the cache before them; patches by the grid that the model's forward was
given, or by the rows and columns that the attention itself is given, as in windows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_mm.checks.arguments import parameters_of
from rope_mm.hf.image_positions import place_tokens
from rope_mm.rotary.module import Rotary

CROSS = (
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "kv",
)  # arguments with another text
STATES = "hidden_states", "hidden_state", "input", "x"  # arguments with the tokens


class AttentionCall(NamedTuple):
    """What one call of an attention module says of its tokens.

    Attributes:
        cross: whether its keys are those of another sequence.
        past: how many tokens the cache held before; None without a cache.
        grid: rows and columns of its states, where it is given them.
        tokens: how many tokens its states have; None where that is not known.
        kept: the patches (b, n) that its states are, where it is given them.
    """

    cross: bool = False
    past: int | Tensor | None = None
    grid: tuple[int, int] | None = None
    tokens: int | None = None
    kept: Tensor | None = None


@dataclass
class AttentionContext:
    """What the attention modules of one model share.

    Attributes:
        rope: what rotates.
        of_images: whether the model reads images or videos, so that its forward must say their grids.
        grids: the grids (y, x) or (t, y, x) of the forward that is under way, one for all rows or one each.
        kept: the patches (b, n) that are left of the grid, where a model drops some.
        first_patch: how many other tokens come before the patches; None for all of them.
        calls: while `set_rope` proves the change: modules that rotated, and those that did not as their keys
            were of another sequence.
        proof: while `set_rope` proves the change: what rotates in place of rope.
        one_place: while `set_rope` proves the change: whether all tokens stand at one place.
    """

    rope: Rotary | None = None
    of_images: bool = False
    grids: list[tuple[int, ...]] = field(default_factory=list)
    kept: Tensor | None = None
    first_patch: int | None = None
    calls: dict[str, list[nn.Module]] | None = None
    proof: Rotary | None = None
    one_place: bool = False

    def note(self, what: str, module: nn.Module) -> None:
        """Record a call while `set_rope` proves the change."""
        if self.calls is not None:
            self.calls.setdefault(what, []).append(module)

    def positions(self, call: AttentionCall, tokens: int, device: torch.device) -> Tensor:
        """Positions (s, a), or (b, s, a) where rows differ, of all tokens of a call."""
        p = self.place(call, tokens, device)
        return torch.full_like(p, 3.0) if self.one_place else p

    @property
    def rotary(self) -> Any:
        """What rotates now."""
        return self.rope if self.proof is None else self.proof

    def place(self, call: AttentionCall, tokens: int, device: torch.device) -> Tensor:
        """Positions by the scheme's layout.

        Raises:
            ValueError: an attention outside of its model's forward, or tokens that are no grid of patches.
        """
        scheme = self.rotary.scheme
        if call.grid:
            return coarser(place_tokens(scheme, math.prod(call.grid), call.grid, device), call.grid, tokens)
        if not self.of_images:
            return place_tokens(scheme, tokens, None, device)
        if not self.grids:
            raise ValueError(
                "an attention that set_rope changed got no grid of patches; call the model that set_rope was "
                "given, not a part of it"
            )
        if len(self.grids) > 1:
            rows = [place_tokens(scheme, math.prod(grid), grid, device) for grid in self.grids]
            return torch.stack([nn.functional.pad(p, (0, 0, 0, tokens - len(p))) for p in rows])
        (grid,) = self.grids
        patches = math.prod(grid)
        kept = self.kept if call.kept is None else call.kept
        if kept is not None:
            whole = place_tokens(scheme, patches, grid, device)[kept]
            return self.with_others(whole, tokens - whole.shape[1])
        if tokens >= patches:
            return self.with_others(place_tokens(scheme, patches, grid, device), tokens - patches)
        if (
            len(grid) == 3
            and (p := one_axis(place_tokens(scheme, patches, grid, device), grid, tokens)) is not None
        ):
            return p
        return coarser(place_tokens(scheme, patches, grid, device), grid, tokens)

    def with_others(self, p: Tensor, others: int) -> Tensor:
        """Positions of patches (..., n, a) with those of other tokens around them, which are not rotated."""
        first = others if self.first_patch is None else min(self.first_patch, others)
        return nn.functional.pad(p, (0, 0, first, others - first))


def one_axis(p: Tensor, grid: tuple[int, ...], tokens: int) -> Tensor | None:
    """Positions of one patch in all frames, or of one frame behind a class token, as of a split attention.

    Args:
        p: positions (t * y * x, a) of a video.
        grid: its frames, rows and columns.
        tokens: how many tokens the attention sees.

    Returns:
        (tokens, a); None where the tokens are neither.
    """
    t, y, x = grid
    if tokens == t != 1 + y * x:
        return p.view(t, y * x, -1)[:, 0]
    if tokens == 1 + y * x != t:
        return nn.functional.pad(p[: y * x], (0, 0, 1, 0))
    return None


def coarser(p: Tensor, grid: tuple[int, ...], tokens: int) -> Tensor:
    """Positions (n, a) of a grid whose patches were merged into fewer tokens: the means of their patches.

    Raises:
        ValueError: tokens that are no such grid.
    """
    if tokens == len(p):
        return p
    y, x = grid[-2:]
    side = math.isqrt(len(p) // tokens) if tokens and len(p) % tokens == 0 else 0
    if len(grid) != 2 or not side or side**2 * tokens != len(p) or y % side or x % side:
        raise ValueError(
            f"{tokens} tokens stand for a grid of {' x '.join(map(str, grid))} patches, and nothing says "
            "which; this model is not served"
        )
    return p.view(y // side, side, x // side, side, -1).mean((1, 3)).flatten(0, 1)


def query_key_positions(
    context: AttentionContext, call: AttentionCall, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of the queries and keys of a call, each (s, a) or (b, s, a).

    Raises:
        ValueError: more keys than queries and no cache that says why, or a cache that dropped keys.
    """
    if call.past is None or (isinstance(call.past, int) and not call.past and queries == keys):
        if queries == keys:
            p = context.positions(call, keys, device)
            return p, p
        if not context.of_images:
            raise ValueError(
                f"{queries} queries meet {keys} keys, and this rotation does not know where they stand; pass "
                "use_cache=False"
            )
        return context.positions(call, queries, device), context.positions(call, keys, device)
    if isinstance(call.past, int) and call.past + queries > keys:
        raise ValueError(
            f"a cache of {call.past} tokens gave {keys} keys for {queries} queries more, as one that drops "
            "old keys does; use a dynamic or a static cache"
        )
    p = context.positions(call, keys, device)
    return p[call.past + torch.arange(queries, device=device)], p


class ReadCall:
    """A hook before an attention's forward: reads from its own arguments where its tokens stand."""

    def __init__(self, attention: nn.Module):
        self.names = parameters_of(type(attention))

    def __call__(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        attention.rope_mm_call = read_call(attention, dict(zip(self.names, args, strict=False)) | kwargs)


def read_call(attention: Any, arguments: dict[str, Any]) -> AttentionCall:
    """What the arguments of an attention's forward say of its tokens."""
    cross = any(arguments.get(name) is not None for name in CROSS)
    cache = next((x for x in arguments.values() if hasattr(x, "get_seq_length")), None)  # under any name
    past = None
    if cache is not None:
        past = cache.get_seq_length(layer_index(attention))  # the layers before have updated theirs already
        past = past.clone() if isinstance(past, Tensor) else past
    states = next((arguments[name] for name in STATES if arguments.get(name) is not None), None)
    grid, tokens = None, None
    if states is not None and states.dim() in (3, 4):
        tokens = math.prod(states.shape[1:-1])
    if isinstance(arguments.get("height"), int) and isinstance(arguments.get("width"), int):
        grid = (arguments["height"], arguments["width"])
    elif states is not None and states.dim() == 4:  # (b, rows, columns, c)
        grid = (states.shape[1], states.shape[2])
    elif states is not None and has_windows(attention):  # which are square, also where an image is smaller
        side = math.isqrt(states.shape[1])
        grid = (side, side) if side**2 == states.shape[1] else None
    return AttentionCall(cross, past, grid, tokens, arguments.get("position_mask"))


def layer_index(attention: Any) -> int:
    """The number of an attention's layer in a cache.

    Raises:
        ValueError: an attention that does not say it.
    """
    found = (getattr(attention, name, None) for name in ("layer_idx", "layer_id"))
    index = next((x for x in found if isinstance(x, int)), None)
    if index is None:
        raise ValueError(
            f"{type(attention).__name__} does not say which layer of a cache is its; pass use_cache=False"
        )
    return index


def has_windows(attention: Any) -> bool:
    """Whether an attention sees windows of an image, and has a bias of relative positions of their size."""
    bias = getattr(attention, "relative_position_bias", None)
    table = any(
        "position_bias" in name
        for name in (*dict(attention.named_parameters(recurse=False)), *vars(attention)["_modules"])
    )
    return hasattr(bias, "window_size") or (table and hasattr(attention, "window_size"))


def pixel_grids(config: Any, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    """The grids of patches of what a model is given, one for all rows or one each; none without images."""
    shapes = arguments.get("spatial_shapes")
    if shapes is not None:
        grids = [tuple(shape) for shape in shapes.tolist()]
        return grids if len(set(grids)) > 1 or len(grids) > 1 else grids[:1]
    pixels = next(
        (arguments[x] for x in ("pixel_values", "pixel_values_videos") if arguments.get(x) is not None), None
    )
    if pixels is None and arguments.get("input_values") is not None and hasattr(config, "frequency_stride"):
        time, mel = arguments["input_values"].shape[-2:]
        return [
            tuple(
                (length - config.patch_size) // stride + 1
                for length, stride in ((mel, config.frequency_stride), (time, config.time_stride))
            )
        ]
    if pixels is None:
        return []
    y, x = patch_shape(config)
    rows, columns = pixels.shape[-2] // y, pixels.shape[-1] // x
    if pixels.dim() != 5:
        return [(rows, columns)]
    tubelet = getattr(config, "tubelet_size", 1)
    t = next(iter(tubelet)) if isinstance(tubelet, Iterable) else tubelet
    return [(pixels.shape[1] // t, rows, columns)]


def patch_shape(config: Any) -> tuple[int, int]:
    """Rows and columns of pixels of a patch.

    Raises:
        ValueError: a config that does not say it.
    """
    stride = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None)
    if stride is None and isinstance(getattr(config, "tubelet_size", None), Iterable):
        stride = config.tubelet_size[1:]
    if stride is None:
        return 1, 1  # of models whose attentions are given rows and columns themselves
    y, x = stride if isinstance(stride, Iterable) else (stride, stride)
    return y, x


def reads_images(model: Any) -> bool:
    """Whether a model's tokens are patches of images, of videos or of spectrograms."""
    config = getattr(model, "config", None)
    return model.main_input_name.startswith("pixel_values") or hasattr(config, "frequency_stride")


class Replay:
    """A checkpointing function whose second forward sees what its first one saw.

    Hooks of the model do not run again when a layer is computed a second time, and by then another image may
    have passed.
    """

    def __init__(self, function: Any, context: AttentionContext):
        self.function, self.context = function, context
        self.seen = context.grids, context.kept

    def __call__(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(partial(self.replay, forward), *args, **kwargs)

    def replay(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        context = self.context
        now = context.grids, context.kept
        context.grids, context.kept = self.seen
        try:
            return forward(*args, **kwargs)
        finally:
            context.grids, context.kept = now


class ForwardHooks:
    """Hooks around the forward of a model without rotary, which keep the grids of its images meanwhile."""

    def __init__(self, context: AttentionContext, model: nn.Module):
        self.context, self.names = context, parameters_of(type(model))
        self.wrapped: list[tuple[Any, Any]] = []

    def before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the forward: what rotates, and the grids."""
        rope = model.rope_mm.ropes[None]
        if self.context.rope is not rope:
            self.context.rope = rope
        if not self.context.of_images:
            return
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.context.grids = pixel_grids(model.config, arguments)
        self.context.kept = kept_by_mask(arguments.get("bool_masked_pos"), model)
        if model.training and torch.is_grad_enabled():
            self.wrap_checkpoints(model)

    def wrap_checkpoints(self, model: nn.Module) -> None:
        """Let layers that are computed twice see the same grids twice."""
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Replay):
                self.wrapped.append((module, function))
                vars(module)["_gradient_checkpointing_func"] = Replay(function, self.context)

    def keep_shuffled(self, _embeddings: nn.Module, _args: tuple, out: Any) -> None:
        """After embeddings that drop patches: which are left, in their order (ViTMAE)."""
        if isinstance(out, tuple) and len(out) == 3 and isinstance(out[2], Tensor):
            left = out[0].shape[1] - 1
            self.context.kept = out[2].argsort(1)[:, :left]

    def after(self, _model: nn.Module, _args: tuple, _out: Any) -> None:
        """After the forward, also one that failed: forget its grids."""
        for module, function in self.wrapped:
            vars(module)["_gradient_checkpointing_func"] = function
        self.wrapped.clear()
        if self.context.of_images:
            self.context.grids, self.context.kept = [], None


def kept_by_mask(mask: Tensor | None, model: Any) -> Tensor | None:
    """The patches (b, n) that a mask (b, patches) leaves, where a model drops the others (VideoMAE)."""
    if mask is None or not hasattr(model.config, "tubelet_size"):
        return None
    left = (~mask.bool()).sum(1)
    return torch.stack([row.nonzero()[:, 0] for row in ~mask.bool()]) if (left == left[0]).all() else None
