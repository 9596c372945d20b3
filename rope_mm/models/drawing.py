"""Noise in, pictures out: one pass of a model for each picture or frame."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rope_mm.models.stories import Sequences


@torch.no_grad()
def draw_frames(
    model: PreTrainedModel,
    sequences: Sequences,
    noise: Tensor,
    steps: int = 1,
    shown: Tensor | None = None,
) -> Tensor:
    """Patches (b, t, n, p) drawn from noise of that shape at the end of sequences, frame after frame.

    One pass draws a frame: it reads the frame drawn before it, and the noise. What it read of that frame
    stays in the cache, what it read of the noise does not. Of several steps, which a model of flows takes,
    each goes an equal part of the way from the noise to what the pass has drawn. `shown` (b, m, p) are the
    patches of what stands before. With t or steps > 1 padding is on the left.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    (b, t, n, _), inputs = noise.shape, sequences.inputs()
    cached = t > 1 or (steps > 1 and not model.config.scheme.needs_length)
    cache, length = DynamicCache() if cached else None, sequences.input_ids.shape[1]
    frames, start, before = [], 0, noise[:, :0, 0] if shown is None else shown
    for frame in range(t):
        end = length - (t - 1 - frame) * n
        here = noise[:, frame]
        for step in range(steps):
            chunk = {name: x[..., start:end] for name, x in inputs.items() if name != "rope_deltas"}
            chunk["attention_mask"] = inputs["attention_mask"][:, :end]
            patches = torch.cat([before, here], 1)
            drawn = model(**chunk, patches=patches, past_key_values=cache, words=False).patches
            here = here.lerp(drawn.view(b, -1, drawn.shape[-1])[:, -n:], 1 / (steps - step))
            if cache is not None:
                cache.crop(-n)
                start, before = end - n, before[:, :0]
        frames.append(here)
        before = here
    return torch.stack(frames, 1)
