"""What to compare rotation with: a bias of the scores, or embeddings that are added to tokens.

`add_baseline` gives one to a model. All of them read the same coordinates as a rotation does.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.models import RopeMMForConditionalGeneration
from rope_mm.models.modeling_rope_mm import RopeMMModel
from rope_mm.models.position_ids import unpack_position_ids
from rope_mm.nn.attention import make_mask_fn
from rope_mm.registry import Registry


class Alibi(nn.Module):
    """Scores fall with the distance, the sum over the axes, at a fixed slope for each head.

    Source: ALiBi, Press et al. 2022 (arXiv 2108.12409, section 3); on one axis and causal it is theirs.

    Args:
        heads: h; head i of 1 to h has the slope 2^(-8 i / h).
        axes: a, of the positions.
    """

    slopes: Tensor

    def __init__(self, heads: int, axes: int):
        super().__init__()
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, differences: Tensor) -> Tensor:
        """The bias (b, h, s, s) of differences (b, s, s, a), those of queries less those of keys."""
        return -self.slopes[:, None, None] * differences.abs().sum(-1)[:, None]


class ContinuousBias(nn.Module):
    """A small network makes the bias of each head from the differences on a logarithmic scale.

    Source: Swin Transformer V2, Liu et al. 2022 (arXiv 2111.09883, equations 3 and 4, and 16 times the
    sigmoid as in its code); FIRE (arXiv 2310.04418) is its like on one axis.

    Args:
        heads: h.
        axes: a, of the positions.
        width: of the hidden layer.
    """

    def __init__(self, heads: int, axes: int, width: int = 64):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(axes, width), nn.ReLU(), nn.Linear(width, heads, bias=False))

    def forward(self, differences: Tensor) -> Tensor:
        """The bias (b, h, s, s) of differences (b, s, s, a)."""
        logarithms = differences.sign() * differences.abs().log1p()
        return 16 * self.network(logarithms).sigmoid().movedim(-1, 1)


class LearnedEmbedding(nn.Module):
    """A learned vector for each whole number on each axis; the sum over the axes is added to the token.

    Args:
        width: channels of a token.
        axes: a, of the positions.
        size: numbers from 0 that have a vector.
    """

    def __init__(self, width: int, axes: int, size: int = 128):
        super().__init__()
        self.tables = nn.Parameter(torch.randn(axes, size, width) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors (b, s, c) of positions (b, s, a).

        Raises:
            ValueError: a position without a vector.
        """
        axes, size, _ = self.tables.shape
        numbers = positions.long()
        if (numbers != positions).any() or numbers.min() < 0 or numbers.max() >= size:
            raise ValueError(
                f"learned positions have vectors for whole numbers, 0 to {size - 1}; these go from "
                f"{positions.min():g} to {positions.max():g}, or between; take a layout of whole numbers"
            )
        return self.tables[torch.arange(axes, device=numbers.device), numbers].sum(-2)


def bias_scores(model: RopeMMModel, bias: nn.Module, arguments: dict[str, Any], positions: Tensor) -> None:
    """Give a forward the mask of its tokens with the bias of their positions in it."""
    length, padding = positions.shape[1], arguments.pop("attention_mask", None)
    blocks = arguments.get("block_ids")
    if blocks is None:
        blocks = torch.arange(length, device=positions.device).expand(positions.shape[:2])
    rows = torch.arange(len(positions), device=positions.device)[:, None, None]
    queries = torch.arange(length, device=positions.device)[:, None]
    seen = make_mask_fn(blocks)(rows, queries, queries, queries.T)
    if padding is not None:
        seen = seen & padding.bool()[:, None]
    made = bias(positions[:, :, None] - positions[:, None])
    arguments["attention_mask"] = made.masked_fill(~seen[:, None], torch.finfo(made.dtype).min)


def add_vectors(
    model: RopeMMModel, embedding: nn.Module, arguments: dict[str, Any], positions: Tensor
) -> None:
    """Give a forward its tokens with the vectors of their positions added."""
    names = "input_ids", "inputs_embeds", "patches"
    tokens = model.embed_inputs(*(arguments.pop(name, None) for name in names))
    arguments["inputs_embeds"] = tokens + embedding(positions)


Change = Callable[[RopeMMModel, nn.Module, dict[str, Any], Tensor], None]

# name -> (its module from a model and the number of axes, how it changes the arguments of a forward)
BASELINES: Registry[tuple[Callable[[RopeMMModel, int], nn.Module], Change]] = Registry(
    "baseline",
    {
        "alibi": (lambda model, axes: Alibi(model.config.num_attention_heads, axes), bias_scores),
        "continuous-bias": (
            lambda model, axes: ContinuousBias(model.config.num_attention_heads, axes),
            bias_scores,
        ),
        "learned-embedding": (
            lambda model, axes: LearnedEmbedding(model.config.hidden_size, axes),
            add_vectors,
        ),
    },
)


def add_baseline(model: RopeMMForConditionalGeneration, name: str) -> None:
    """Let a model read positions in another way, beside its rotation; one of `freq_scale` 0 rotates nothing.

    Its weights are the model's from then on. Rows of padded documents are read, no packed or cached ones.

    Args:
        model: is changed.
        name: a key of BASELINES.
    """
    make, change = BASELINES[name]
    inner = model.model
    parameters = signature(inner.forward)
    module = make(inner, len(inner.rotary.scheme.axes))

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        bound = parameters.bind_partial(*args, **kwargs).arguments
        arguments = bound.pop("kwargs", {}) | bound
        given = arguments["position_ids"], inner.rotary.scheme, arguments.get("rope_deltas")
        change(inner, module, arguments, unpack_position_ids(*given)[1].to(module_dtype))
        return (), arguments

    module_dtype = next(inner.parameters()).dtype
    inner.add_module("baseline", module.to(inner.device))
    inner.register_forward_pre_hook(before, with_kwargs=True)
