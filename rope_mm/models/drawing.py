"""Noise in, pictures out: one pass of a model for each picture or frame."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rope_mm.models.stories import Sequences


@torch.no_grad()
def draw_frames(model: PreTrainedModel, sequences: Sequences, noise: Tensor) -> Tensor:
    """Patches (b, t, n, p) drawn from noise of that shape at the end of sequences, frame after frame.

    One pass draws a frame: it reads the frame drawn before it, and the noise. What it read of that frame
    stays in the cache, what it read of the noise does not. With t > 1 padding is on the left.
    """
    (b, t, n, _), inputs = noise.shape, sequences.inputs()
    cache, length = DynamicCache() if t > 1 else None, sequences.input_ids.shape[1]
    frames, read, start = [], noise[:, :0, 0], 0
    for frame in range(t):
        end = length - (t - 1 - frame) * n
        chunk = {name: x[..., start:end] for name, x in inputs.items() if name != "rope_deltas"}
        chunk["attention_mask"] = inputs["attention_mask"][:, :end]
        patches = torch.cat([read, noise[:, frame]], 1)
        drawn = model(**chunk, patches=patches, past_key_values=cache, words=False).patches
        read = drawn.view(b, -1, drawn.shape[-1])[:, -n:]
        frames.append(read)
        if cache is not None:
            cache.crop(-n)
            start = end - n
    return torch.stack(frames, 1)
