"""Noise in, images out: one pass of a model for each image or frame, and the rolling cache of long videos."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rope_mm.models.sequences import SequenceBatch
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.rotary.module import Rotary


class QueryAngles(RotaryAngles):
    """Angles that rotate queries alone; a cache rotates the keys."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (b, s, h, d), rotated, and k (b, s, g, d) as they are."""
        return self.rotate_one(q), k


class UnrotatedKeyCache(DynamicCache):
    """Keys and values of the tokens in a window; keys are kept unrotated, so that they can change places.

    Key i always stands at position i of `positions`. Where tokens are dropped, those after them move up, so
    that distances stay those of the window. Until then attention is what it is with any cache.

    Args:
        rotary: of the model.
        positions: (b, s, a), of a full window.
    """

    def __init__(self, rotary: Rotary, positions: Tensor):
        super().__init__()
        self.rotary, self.positions = rotary, positions
        self.angles: tuple[int, RotaryAngles] | None = None

    def query_angles(self, start: int, stop: int, dtype: torch.dtype) -> QueryAngles:
        """The angles of the window's tokens from start to stop, which leave keys as they are."""
        return QueryAngles(**vars(self.rotary.angles(self.positions[:, start:stop], dtype)))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """All keys, rotated to where they now stand, and all values (b, g, s, d)."""
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        tokens = k.shape[-2]
        if self.angles is None or self.angles[0] != tokens:  # the same for all layers
            self.angles = tokens, self.rotary.angles(self.positions[:, :tokens], k.dtype)
        return self.angles[1].rotate_one(k.transpose(1, 2)).transpose(1, 2), v

    def drop(self, start: int, stop: int) -> None:
        """Forget the tokens from start to stop; those after them move up."""
        for layer in cast(Any, self.layers):
            layer.keys, layer.values = (
                torch.cat([x[..., :start, :], x[..., stop:, :]], -2) for x in (layer.keys, layer.values)
            )


@torch.no_grad()
def sample_frames(
    model: PreTrainedModel,
    sequences: SequenceBatch,
    noise: Tensor,
    steps: int = 1,
    context: Tensor | None = None,
    window: int | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Patches sampled from noise at the end of sequences, frame after frame.

    One pass reads the frame sampled before, and the noise of the next one. What it read of that frame stays
    in the cache; what it read of the noise does not.

    Args:
        model: a `RopeMMForConditionalGeneration`.
        sequences: each ends in the image or video to sample. With t or steps > 1 padding is on the left.
        noise: (b, t, n, p), of t frames with n patches each.
        steps: passes for a frame; each goes an equal part of the way from the noise to what the pass
            predicts, as models of flows need it.
        context: (b, m, p), patches of the images and frames that stand before.
        window: number of frames at the end of the sequences, context included. Once they are full, the oldest
            is dropped for every new one and the others move up: no distance is longer than in the sequences.
        guidance_scale: where it is not 1, the second half of the rows is the first half without its text;
            see `classifier_free_guidance`.

    Returns:
        Patches (b, t, n, p).

    Raises:
        ValueError: fewer than 1 step, a window of fewer than 2 frames.
    """
    check_sampling(steps, window)
    (b, t, n, _), inputs = noise.shape, sequences.inputs()
    cached = t > 1 or (steps > 1 and not model.config.scheme.needs_length)
    length, cache = sequences.input_ids.shape[1], DynamicCache() if cached else None
    frames, start, before = [], 0, noise[:, :0, 0] if context is None else context
    room, oldest = t, length - (window or 0) * n
    if window is not None:
        cache = UnrotatedKeyCache(model.model.rotary, sequences.positions)
        image_tokens = int((sequences.input_ids[0] == model.config.image_token_id).sum())
        room = (image_tokens - before.shape[1]) // n
    for frame in range(t):
        end = length - max(0, room - 1 - frame) * n
        if isinstance(cache, UnrotatedKeyCache) and frame >= room:
            cache.drop(oldest, oldest + n)
            start -= n
        x = noise[:, frame]
        for step in range(steps):
            chunk = cut_inputs(inputs, start, end)
            if isinstance(cache, UnrotatedKeyCache):
                chunk["angles"] = cache.query_angles(start, end, model.dtype)
            patches = torch.cat([before, x], 1)
            out = model(**chunk, patches=patches, cache=cache, return_logits=False).patches
            made = classifier_free_guidance(out.unflatten(0, (b, -1))[:, -n:], guidance_scale)
            x = x.lerp(made, 1 / (steps - step))
            if cache is not None:
                cache.crop(-n)
                start, before = end - n, before[:, :0]
        frames.append(before := x)
    return torch.stack(frames, 1)


def cut_inputs(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Any]:
    """Inputs of the tokens from start to end, where all before start are cached.

    Args:
        inputs: of all tokens (..., s).
        start: first token.
        end: one past the last token.
    """
    cut = {name: tensor[..., start:end] for name, tensor in inputs.items() if name != "rope_deltas"}
    return cut | {"attention_mask": inputs["attention_mask"][:, :end]}


def check_sampling(steps: int, window: int | None) -> None:
    """Refuse fewer than 1 step and a window of fewer than 2 frames."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if window is not None and window < 2:
        raise ValueError(f"window must be at least 2 frames, a sampled one and the one before, not {window}")


def classifier_free_guidance(patches: Tensor, guidance_scale: float) -> Tensor:
    """Patches (2b, n, p), with text c and without it u: both halves become u + guidance_scale (c - u).

    Classifier-free guidance, arXiv 2207.12598. At 1 nothing is done, and the rows need no second half.
    """
    if guidance_scale == 1:
        return patches
    conditional, unconditional = patches.chunk(2)
    return unconditional.lerp(conditional, guidance_scale).repeat(2, 1, 1)
