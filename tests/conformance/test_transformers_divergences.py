"""Where transformers 5.23 leaves the published algorithm: a test that fails here tells of a repair there."""

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig, HunYuanVLTextConfig, LlamaConfig, VJEPA2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_vl import modeling_hunyuan_vl as hunyuan
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from rope_mm import Rotary
from rope_mm.schemes.extensions import NTK, DynamicNTK, YaRN


def stretch(matrix: Tensor) -> float:
    """How far a matrix (d, d) is from a rotation: the largest entry of M M^T - 1."""
    return (matrix @ matrix.T - torch.eye(len(matrix))).abs().max().item()


# --- HunYuanVL's XD-RoPE: the two channels of a pair turn along different axes -----------------------------


def hunyuan_rotary(head_dim: int) -> hunyuan.HunYuanVLRotaryEmbedding:
    written = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
    written["mrope_section"] = [head_dim // 8] * 4
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    return hunyuan.HunYuanVLRotaryEmbedding(HunYuanVLTextConfig(rope_parameters=written, **sizes))


def hunyuan_matrix(place: list[int]) -> Tensor:
    """What it does to a head of 32 channels at a place on its four axes."""
    positions = torch.tensor(place).view(4, 1, 1)
    cos, sin = hunyuan_rotary(32)(torch.empty(0), positions)
    head = torch.eye(32)[None, None]
    return hunyuan.apply_rotary_pos_emb(head, head, cos, sin)[0][0, 0].T


def test_divergence_xd_rope_of_hunyuan_vl_is_not_a_rotation_where_its_axes_differ():
    assert stretch(hunyuan_matrix([9, 9, 9, 9])) < 1e-6
    assert stretch(hunyuan_matrix([9, 2, 5, 1])) > 0.5


def test_tokens_are_rotated_as_in_hunyuan_vl(agree):
    positions = torch.arange(60)
    tables = hunyuan_rotary(64)(torch.empty(0), positions.expand(4, 1, -1))
    rope = Rotary(64, "flat", extensions=(NTK(factor=1000.0),))
    for ours, theirs in zip(rope.cos_sin(positions[:, None].double()), tables, strict=True):
        original = "transformers HunYuanVLRotaryEmbedding (words, alpha)"
        agree("flat", original, ours, theirs[0], 1e-5, "cos, sin")


# --- V-JEPA 2: angles laid out for halves, channels turned in neighbours -----------------------------------


def test_divergence_v_jepa_2_is_not_a_rotation():
    attention = VJEPA2RopeAttention(VJEPA2Config(), hidden_size=24, num_attention_heads=1)
    head = torch.eye(24)[None, None]

    def matrix(*place: int) -> Tensor:
        return attention.apply_rotary_embeddings(head, [torch.full((24,), n) for n in place])[0, 0].T

    assert stretch(matrix(0, 0, 0)) == 0
    assert stretch(matrix(1, 2, 3)) > 0.5


# --- context extension -------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [True, False])
def test_divergence_yarn_ignores_truncate_where_rope_parameters_are_nested(truncate):
    numbers = {"factor": 4.0, "truncate": truncate}
    written = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **numbers}
    layers = {"layer_types": ["full_attention"], "num_hidden_layers": 1, "global_head_dim": 64}
    nested = Gemma4TextConfig(rope_parameters={"full_attention": written}, **layers)
    flat = LlamaConfig(head_dim=64, rope_parameters=written)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](nested, layer_type="full_attention")
    right, _ = ROPE_INIT_FUNCTIONS["yarn"](flat)

    def ours(truncate: bool) -> Tensor:
        extension = YaRN(factor=4.0, original_max_positions=4096, truncate=truncate)
        return Rotary(64, "flat", extensions=(extension,)).omega[0]

    torch.testing.assert_close(right.double(), ours(truncate), atol=1e-7, rtol=0)
    torch.testing.assert_close(theirs.double(), ours(True), atol=1e-7, rtol=0)  # as if it had been True
    assert (ours(True) - ours(False)).abs().max() > 1e-3


def test_divergence_dynamic_ntk_remembers_the_longest_sequence():
    written = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(head_dim=64, max_position_embeddings=32, rope_parameters=written)
    short, long = torch.arange(40)[None], torch.arange(400)[None]
    rotary = LlamaRotaryEmbedding(config)
    before, _ = rotary(torch.empty(0), short)
    rotary(torch.empty(0), long)
    after, _ = rotary(torch.empty(0), short)
    ours, _ = Rotary(64, "flat", extensions=(DynamicNTK(factor=4.0, original_max_positions=32),)).cos_sin(
        short[0, :, None]
    )
    torch.testing.assert_close(before[0], ours, atol=1e-5, rtol=0)
    assert (after[0] - ours).abs().max() > 0.1
