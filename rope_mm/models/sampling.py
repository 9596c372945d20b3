"""Noise in, pictures out: one pass of a model for each picture or frame."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rope_mm.models.rolling import UnrotatedKeyCache
from rope_mm.models.sequences import SequenceBatch


@torch.no_grad()
def sample_frames(
    model: PreTrainedModel,
    sequences: SequenceBatch,
    noise: Tensor,
    steps: int = 1,
    shown: Tensor | None = None,
    window: int | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Patches (b, t, n, p) drawn from noise of that shape at the end of sequences, frame after frame.

    One pass draws a frame: it reads the frame drawn before it, and the noise. What it read of that frame
    stays in the cache, what it read of the noise does not. Of several steps, which a model of flows takes,
    each goes an equal part of the way from the noise to what the pass has drawn. `shown` (b, m, p) are the
    patches of what stands before. With t or steps > 1 padding is on the left.

    With a window the sequences end in so many frames, shown ones included. Once they are full, the oldest is
    forgotten for every new one and the others move up, so that no distance is longer than in these sequences.

    Where guidance is not 1, the second half of all rows is the first without its words; see
    `classifier_free_guidance`.

    Raises:
        ValueError: fewer than 1 step, a window of fewer than 2 frames.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    (b, t, n, _), inputs = noise.shape, sequences.inputs()
    if window is not None and window < 2:
        raise ValueError(f"window must be at least 2 frames, the one before and the one drawn, not {window}")
    cached = t > 1 or (steps > 1 and not model.config.scheme.needs_length)
    length, cache = sequences.input_ids.shape[1], DynamicCache() if cached else None
    frames, start, before = [], 0, noise[:, :0, 0] if shown is None else shown
    room, oldest = t, length - (window or 0) * n
    if window is not None:
        cache = UnrotatedKeyCache(model.model.rotary, sequences.positions)
        places = int((sequences.input_ids[0] == model.config.image_token_id).sum())
        room = (places - before.shape[1]) // n
    for frame in range(t):
        end = length - max(0, room - 1 - frame) * n
        if isinstance(cache, UnrotatedKeyCache) and frame >= room:
            cache.drop(oldest, oldest + n)
            start -= n
        here = noise[:, frame]
        for step in range(steps):
            chunk = {name: x[..., start:end] for name, x in inputs.items() if name != "rope_deltas"}
            chunk["attention_mask"] = inputs["attention_mask"][:, :end]
            patches = torch.cat([before, here], 1)
            drawn = model(**chunk, patches=patches, past_key_values=cache, words=False).patches
            here = here.lerp(
                classifier_free_guidance(drawn.unflatten(0, (b, -1))[:, -n:], guidance), 1 / (steps - step)
            )
            if cache is not None:
                cache.crop(-n)
                start, before = end - n, before[:, :0]
        frames.append(before := here)
    return torch.stack(frames, 1)


def classifier_free_guidance(drawn: Tensor, guidance: float) -> Tensor:
    """Patches (2b, n, p), with words c and without them u: both halves become u + guidance (c - u).

    Classifier-free guidance, arXiv 2207.12598. At 1 nothing is done, of however many rows.
    """
    if guidance == 1:
        return drawn
    told, untold = drawn.chunk(2)
    return untold.lerp(told, guidance).repeat(2, 1, 1)
