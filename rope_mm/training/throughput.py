"""How fast a run is: tokens, images and floating-point operations a second, and their share of the peak."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# dense bfloat16 FLOP/s of data sheets, by a part of the device's name; the first that fits counts
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The peak of a device, FLOP/s in bfloat16; None where PEAKS does not list it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def count_pairs(document: Tensor, mask: Tensor) -> int:
    """The number of pairs of tokens of one document, each token with itself included.

    Args:
        document: (b, s), the number of each token's document.
        mask: (b, s), 0 at padding.
    """
    row = torch.arange(len(document), device=document.device)[:, None]
    number = row * (document.max() + 1) + document
    return int(torch.bincount(number.flatten(), mask.flatten()).square().sum())


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of training a decoder, forward and backward (arXiv 2204.02311, appendix B).

    A token costs 6 for every weight that multiplies it, a pair of tokens in attention 12 for every channel of
    all heads and layers: 2 products of 2 operations, thrice. What a mask hides within a document is counted,
    as in the paper; what it hides between documents is not.

    Attributes:
        weights: that multiply a token.
        channels: of all heads and layers.
    """

    weights: int
    channels: int

    @classmethod
    def of(cls, model: nn.Module) -> "FlopCounter":
        """The cost of a model with a config in transformers' names; an embedding lookup costs nothing."""
        sizes: Any = model.config
        tables = {m.weight: None for m in model.modules() if isinstance(m, nn.Embedding)}
        used = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        looked_up = sum(table.numel() for table in tables if table not in used)
        channels = sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim
        return cls(sum(p.numel() for p in model.parameters()) - looked_up, channels)

    def flops(self, tokens: float, pairs: float) -> float:
        """FLOPs of a number of tokens and of pairs of them that attend."""
        return 6 * self.weights * tokens + 12 * self.channels * pairs


@dataclass(frozen=True)
class Speed:
    """What a progress line says of speed.

    Attributes:
        peak: FLOP/s of all devices together, None if unknown.
    """

    peak: float | None

    def __call__(self, tokens: float, images: float, flops: float, seconds: float) -> dict[str, float]:
        """Tokens and images a second, and model FLOP utilisation, or GFLOP/s where the peak is unknown.

        Args:
            tokens: read in this time.
            images: generated in it; 0 is not reported.
            flops: of the model; 0 is not reported.
            seconds: the time.
        """
        found = {"tokens/s": tokens / seconds}
        if images:
            found["images/s"] = images / seconds
        if flops:
            rate = flops / seconds
            found |= {"GFLOP/s": rate / 1e9} if self.peak is None else {"MFU": rate / self.peak}
        return found
