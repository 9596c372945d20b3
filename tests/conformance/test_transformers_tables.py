"""Cosine and sine of transformers' rope types, made by its Llama in fp32, against our extensions in fp64.

Positions stay below 64: there an angle's sine made in fp32 was off by up to 6e-6, over 4000 random ladders.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4TextConfig, LlamaConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rope_mm import Rotary
from rope_mm.schemes.extensions import DynamicNTK, Extension, Linear, Llama3, LongRoPE, YaRN

few = settings(max_examples=15, deadline=None)
head_dims = st.integers(2, 32).map(lambda pairs: 2 * pairs)
thetas = st.floats(1e3, 1e7)
factors = st.floats(1.0, 32.0)
places = st.lists(st.integers(0, 63), min_size=1, max_size=20)
WITHIN = 1e-5


def llama(kind: str, head_dim: int, theta: float, longest: int = 64, **numbers) -> LlamaRotaryEmbedding:
    """Llama's embedding of this rope type, newly made: some of them remember what they saw."""
    written = {"rope_type": kind, "rope_theta": theta, **numbers}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=longest, rope_parameters=written)
    return LlamaRotaryEmbedding(config)


def compare(agree, kind: str, rope: Rotary, original, where: list[int], *layer: str, scheme="flat") -> None:
    """Tables (s, 2r) at these positions, theirs relative to their attention factor."""
    positions = torch.tensor(where)
    theirs = original(torch.empty(0), positions[None], *layer)
    ours = rope.cos_sin(positions[:, None].double(), torch.float64)
    factor = rope.scheme.attention_scaling
    for mine, other in zip(ours, theirs, strict=True):
        name = f"transformers {type(original).__name__} ({kind})"
        agree(scheme, name, mine / factor, other[0] / factor, WITHIN, "cos, sin")


def check(agree, kind: str, head_dim: int, theta: float, where: list[int], extension: Extension, **numbers):
    """One rope type against one extension of RoPE-1D."""
    rope = Rotary(head_dim, "flat", theta=theta, extensions=(extension,))
    original = llama(kind, head_dim, theta, **numbers)
    compare(agree, kind, rope, original, where)
    assert rope.scheme.attention_scaling == original.attention_scaling


@few
@given(head_dim=head_dims, theta=thetas, where=places)
def test_tokens_without_extension(agree, head_dim, theta, where):
    original = llama("default", head_dim, theta)
    compare(agree, "default", Rotary(head_dim, "flat", theta=theta), original, where)


@few
@given(head_dim=head_dims, theta=thetas, where=places, factor=factors)
def test_linear(agree, head_dim, theta, where, factor):
    check(agree, "linear", head_dim, theta, where, Linear(factor=factor), factor=factor)


@few
@given(head_dim=head_dims, theta=thetas, where=places, factor=factors, longest=st.integers(8, 63))
def test_dynamic_shorter_and_longer_than_trained(agree, head_dim, theta, where, factor, longest):
    extension = DynamicNTK(factor=factor, original_max_positions=longest)
    check(agree, "dynamic", head_dim, theta, where, extension, factor=factor, longest=longest)


weights = st.floats(0.1, 2.0)


@settings(few, max_examples=40)
@given(
    head_dim=head_dims,
    theta=thetas,
    where=places,
    factor=factors,
    original=st.integers(8, 100_000),
    betas=st.tuples(st.floats(2.5, 64.0), st.floats(0.5, 2.0)),
    truncate=st.booleans(),
    attention=st.sampled_from(({}, {"attention_factor": 0.9}, {"mscale": 0.7, "mscale_all_dim": 1.3})),
)
def test_yarn(agree, head_dim, theta, where, factor, original, betas, truncate, attention):
    numbers = {
        "factor": factor,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
        "truncate": truncate,
    } | attention
    extension = YaRN(original_max_positions=original, **numbers)
    more = {"original_max_position_embeddings": original}
    check(agree, "yarn", head_dim, theta, where, extension, **numbers, **more)


@few
@given(
    head_dim=head_dims,
    theta=thetas,
    where=places,
    factor=factors,
    original=st.integers(8, 100_000),
    ends=st.tuples(st.floats(0.5, 1.5), st.floats(2.0, 8.0)),
)
def test_llama3(agree, head_dim, theta, where, factor, original, ends):
    numbers = {"factor": factor, "low_freq_factor": ends[0], "high_freq_factor": ends[1]}
    extension = Llama3(original_max_positions=original, **numbers)
    more = {"original_max_position_embeddings": original}
    check(agree, "llama3", head_dim, theta, where, extension, **numbers, **more)


@few
@given(
    head_dim=head_dims,
    theta=thetas,
    where=places,
    original=st.integers(8, 63),
    factor=factors,
    attention=st.sampled_from(({}, {"attention_factor": 1.2})),
    data=st.data(),
)
def test_longrope_short_and_long(agree, head_dim, theta, where, original, factor, attention, data):
    searched = st.lists(st.floats(1.0, 64.0), min_size=head_dim // 2, max_size=head_dim // 2)
    short, long = data.draw(searched), data.draw(searched)
    extension = LongRoPE(
        short=tuple(short), long=tuple(long), original_max_positions=original, factor=factor, **attention
    )
    more = {"original_max_position_embeddings": original, "short_factor": short, "long_factor": long}
    check(agree, "longrope", head_dim, theta, where, extension, factor=factor, **attention, **more)


@few
@given(
    head_dim=head_dims,
    theta=thetas,
    where=places,
    part=st.sampled_from((0.25, 0.5, 0.75, 1.0)),
    factor=factors,
)
def test_proportional(agree, head_dim, theta, where, part, factor):
    written = {
        "rope_type": "proportional",
        "rope_theta": theta,
        "partial_rotary_factor": part,
        "factor": factor,
    }
    layers = {"layer_types": ["full_attention"], "num_hidden_layers": 1, "global_head_dim": head_dim}
    config = Gemma4TextConfig(rope_parameters={"full_attention": written}, **layers)
    rope = Rotary(
        head_dim, "p-rope", theta=theta, unrotated_fraction=1 - part, extensions=(Linear(factor=factor),)
    )
    original = Gemma4TextRotaryEmbedding(config)
    compare(agree, "proportional", rope, original, where, "full_attention", scheme="p-rope")
