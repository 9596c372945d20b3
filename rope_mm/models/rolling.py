"""A cache that rolls: keys are kept unrotated, so that what stays can move to other places."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.rotary.module import Rotary


class QueryAngles(RotaryAngles):
    """Angles that leave keys to the cache."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (b, s, h, d), rotated, and k (b, s, g, d) as they are."""
        return self.rotate_one(q), k


class UnrotatedKeyCache(DynamicCache):
    """Keys and values of the tokens in a window; key i always stands at place i of `positions` (b, s, a).

    What is dropped makes those after it move up, and their distances stay those of the window. Until then
    attention is what it is with any cache.
    """

    def __init__(self, rotary: Rotary, positions: Tensor):
        super().__init__()
        self.rotary, self.positions = rotary, positions
        self.angles: tuple[int, RotaryAngles] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """All keys, rotated to where they now stand, and all values (b, g, s, d)."""
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        tokens = k.shape[-2]
        if self.angles is None or self.angles[0] != tokens:  # one for all layers
            self.angles = tokens, self.rotary.angles(self.positions[:, :tokens], k.dtype)
        return self.angles[1].rotate_one(k.transpose(1, 2)).transpose(1, 2), v

    def drop(self, start: int, stop: int) -> None:
        """Forget the tokens from start to stop; those after them move up."""
        for layer in cast(Any, self.layers):
            layer.keys, layer.values = (
                torch.cat([x[..., :start, :], x[..., stop:, :]], -2) for x in (layer.keys, layer.values)
            )
