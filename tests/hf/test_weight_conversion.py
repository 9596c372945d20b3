import importlib
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from rope_mm import SCHEMES, Rotary, Scheme, convert_pairing
from rope_mm.hf.weight_conversion import permute_rows, read_both, reordering

SMALL = {
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GQA = {**SMALL, "num_key_value_heads": 2}
TOKENS = torch.arange(22).view(2, 11)


def random_model(config):
    """A tiny causal model in float64 whose every number, norms and biases too, is random."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


def rotate_by(monkeypatch, model_type, scheme, head_dim):
    """Let a family of transformers rotate by our Rotary, whatever table it is given."""
    rope = Rotary(head_dim, scheme)

    def apply(q, k, cos, sin, unsqueeze_dim=1):
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), torch.arange(q.shape[2])[:, None].double())
        return q.transpose(1, 2), k.transpose(1, 2)

    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    monkeypatch.setattr(module, "apply_rotary_pos_emb", apply)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


FAMILIES = {
    "llama": (LlamaConfig(**GQA, attention_bias=True), {}),
    "qwen3": (Qwen3Config(**GQA, head_dim=16), {}),  # a norm of each head
    "olmo2": (Olmo2Config(**GQA), {}),  # a norm over all heads at once
    "qwen3_next": (
        Qwen3NextConfig(**GQA, head_dim=16, layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1]),
        {"fused": {"q_proj": "gated"}},
    ),
    "phi3": (Phi3Config(**GQA), {"fused": {"qkv_proj": "stacked"}, "kv_heads": 2}),
    "falcon": (
        FalconConfig(
            **GQA, new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=True, ffn_hidden_size=32
        ),
        {"fused": {"query_key_value": "grouped"}, "kv_heads": 2},
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SMALL, rotary_pct=0.5),
        {"fused": {"query_key_value": "grouped"}},
    ),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_stay_when_weights_and_rotation_change_together(monkeypatch, model_type):
    config, how = FAMILIES[model_type]
    model = random_model(config)
    before = logits(model)
    head_dim = getattr(config, "head_dim", None) or 12
    half = Scheme(layout="flat", fraction={"gpt_neox": 0.5, "qwen3_next": 0.25}.get(model_type, 1.0))
    interleaved = half.replace(pairing="interleaved")
    converted = convert_pairing(model.state_dict(), half, interleaved, head_dim=head_dim, **how)
    model.load_state_dict(converted)
    assert (logits(model) - before).abs().max() > 1e-3  # rotated as before, the new weights are wrong
    rotate_by(monkeypatch, model_type, interleaved, head_dim)
    # transformers' tables are float32
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * before.abs().max().item())
    exact = logits(model)
    rotate_by(monkeypatch, model_type, half, head_dim)
    model.load_state_dict(convert_pairing(converted, interleaved, half, head_dim=head_dim, **how))
    # norms of q and k run in float32 there, in another order of channels
    within = 1e-6 if model_type in ("qwen3", "qwen3_next", "olmo2") else 1e-12
    torch.testing.assert_close(logits(model), exact, rtol=0, atol=within * exact.abs().max().item())


def test_deepseek_goes_from_interleaved_to_half_inside_transformers():
    config = DeepseekV3Config(
        **SMALL, q_lora_rank=8, kv_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2, num_key_value_heads=4,
    )  # fmt: skip
    model = random_model(config)
    before, weights = logits(model), model.state_dict()
    mla = SCHEMES["deepseek-mla"]
    weights = convert_pairing(weights, mla, "half", head_dim=12, names=["q_b_proj"])
    latent = mla.replace(fraction=4 / 10)  # the one key of all heads, behind what values are made of
    weights = convert_pairing(weights, latent, "half", head_dim=10, names=["kv_a_proj_with_mqa"])
    config = deepcopy(config)
    config.rope_interleave = False
    other = random_model(config)
    other.load_state_dict(weights)
    torch.testing.assert_close(logits(other), before, rtol=0, atol=1e-12 * before.abs().max().item())


def test_gpt_j_becomes_half(monkeypatch):
    sizes = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 32, "n_inner": 32}
    model = random_model(GPTJConfig(**sizes, rotary_dim=8, bos_token_id=None, eos_token_id=None))
    before = logits(model)
    scheme = SCHEMES["gpt-j"].replace(fraction=8 / 12)
    model.load_state_dict(convert_pairing(model.state_dict(), scheme, "half", head_dim=12))
    assert (logits(model) - before).abs().max() > 1e-3
    rope = Rotary(8, "flat")
    monkeypatch.setattr(
        "transformers.models.gptj.modeling_gptj.apply_rotary_pos_emb",
        lambda x, sin, cos: rope.rotate_one(x, torch.arange(x.shape[1])[:, None].double()),
    )
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * before.abs().max().item())


class Attention(nn.Module):
    """Scores (b, h, s, s) of grouped queries and keys, normalised and rotated."""

    def __init__(self, head_dim, heads, kv_heads, norm_shape):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj = nn.Linear(20, heads * head_dim), nn.Linear(20, kv_heads * head_dim)
        shape = {"shared": lambda h: (head_dim,), "heads": lambda h: (h, head_dim)}[norm_shape]
        self.q_norm, self.k_norm = nn.Module(), nn.Module()
        self.q_norm.weight = nn.Parameter(torch.randn(shape(heads)))
        self.k_norm.weight = nn.Parameter(torch.randn(shape(kv_heads)))

    def forward(self, x, rope, positions):
        q, k = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        q, k = (
            nn.functional.normalize(z, dim=-1) * norm.weight
            for z, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        q, k = rope(q, k, positions)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return torch.einsum("bihd,bjhd->bhij", q, k)


EQUAL = [
    ("half", "interleaved"),
    ("gpt-neox", "interleaved"),
    (SCHEMES["gpt-neox"], SCHEMES["gpt-neox"].replace(channel_offset="end", pairing="interleaved")),
    ("gemma4-vision", "half"),
    ("interleaved", "gemma4-vision"),
    ("moonvit", "kimi-vision"),
    ("sam2", "kimi-vision"),
    ("grid", SCHEMES["grid"].replace(ownership="round-robin", pairing="interleaved")),
    ("p-rope", "interleaved"),
    ("m-rope-glm-4.1v", "half"),
    ("minimax-m3-vision", "interleaved"),
    (SCHEMES["qwen2-vl-vision"].replace(options=()), SCHEMES["qwen2-vl-vision"].replace(pairing="block")),
]


@pytest.mark.parametrize(("from_", "to"), EQUAL, ids=lambda x: x if isinstance(x, str) else x.pairing)
@pytest.mark.parametrize("norm_shape", ["shared", "heads"])
def test_scores_stay_between_schemes_of_the_same_frequencies(from_, to, norm_shape):
    attention = Attention(32, 4, 2, norm_shape).double()
    old, new = read_both(from_, to)
    x, positions = torch.randn(2, 7, 20).double(), 50 * torch.rand(2, 7, len(old.axes)).double()
    before = attention(x, Rotary(32, old), positions)
    converted = convert_pairing(attention.state_dict(), from_, to, head_dim=32)
    assert any(not torch.equal(converted[name], weight) for name, weight in attention.state_dict().items())
    back = convert_pairing(converted, to, from_, head_dim=32)
    assert all(torch.equal(back[name], weight) for name, weight in attention.state_dict().items())
    attention.load_state_dict(converted)
    torch.testing.assert_close(attention(x, Rotary(32, new), positions), before, rtol=0, atol=1e-12)


def test_a_block_of_one_axis_is_half():
    assert torch.equal(reordering(*read_both("block", "half"), 32), torch.arange(32)[None])


@given(st.integers(1, 8), st.sampled_from(["half", "interleaved"]), st.sampled_from(["start", "end"]))
def test_channels_that_are_not_rotated_keep_their_order(rotated, pairing, offset):
    source = Scheme(layout="flat", fraction=2 * rotated / 24, pairing=pairing, channel_offset=offset)
    (channels,) = reordering(
        source, source.replace(pairing="interleaved", channel_offset="start"), 24
    ).tolist()
    unrotated = range(24)[: -2 * rotated] if offset == "end" else range(24)[2 * rotated :]
    assert channels[2 * rotated :] == list(unrotated)
    assert sorted(channels) == list(range(24))


def test_a_per_head_scheme_is_converted_head_by_head():
    ltx = SCHEMES["ltx"]  # one ladder over all heads: padded pairs in the first alone
    rope, half = Rotary(16, ltx, heads=2), Rotary(16, ltx, heads=2, pairing="half", channel_offset="padded")
    attention = Attention(16, 4, 2, "heads").double()
    x, positions = torch.randn(1, 5, 20).double(), torch.rand(5, 3).double()
    before = attention(x, rope, positions)
    converted = convert_pairing(attention.state_dict(), ltx, "half", head_dim=16, heads=2)
    attention.load_state_dict(converted)
    torch.testing.assert_close(attention(x, half, positions), before, rtol=0, atol=1e-12)


def test_head_j_of_h_follows_row_j_n_h():
    source = torch.tensor([[0, 1], [1, 0]])
    assert permute_rows("q", torch.arange(8), source).tolist() == [0, 1, 2, 3, 5, 4, 7, 6]
    with pytest.raises(ValueError, match="q has 3 heads, but Omega has 2 rows that differ"):
        permute_rows("q", torch.arange(6), source)


def test_other_weights_are_passed_through_and_the_input_dict_is_unchanged():
    state = {"v_proj.weight": torch.randn(8, 3), "q_proj.weight": torch.randn(8, 3), "norm": torch.ones(8)}
    kept = {name: weight.clone() for name, weight in state.items()}
    converted = convert_pairing(state, "half", "interleaved", head_dim=8)
    assert converted["v_proj.weight"] is state["v_proj.weight"]
    assert converted["norm"] is state["norm"]
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert torch.equal(converted["q_proj.weight"], kept["q_proj.weight"][[0, 4, 1, 5, 2, 6, 3, 7]])


def test_only_one_tower_is_converted():
    state = {"text.q_proj.bias": torch.arange(8.0), "visual.qkv.bias": torch.arange(24.0)}
    converted = convert_pairing(state, "half", "interleaved", head_dim=8, only="^text")
    assert converted["visual.qkv.bias"] is state["visual.qkv.bias"]
    converted = convert_pairing(
        state, "half", "interleaved", head_dim=4, only="^visual", fused={"qkv": "stacked"}
    )
    turned = [0, 2, 1, 3, 4, 6, 5, 7]
    assert converted["visual.qkv.bias"].tolist() == [*turned, *(8 + i for i in turned), *range(16, 24)]


def test_the_order_of_a_fused_projection_matters():
    state = {"query_key_value.bias": torch.arange(24.0)}
    told = {order: {"query_key_value": order} for order in ("stacked", "grouped")}
    one, other = (
        convert_pairing(state, "half", "interleaved", head_dim=4, fused=told[order])["query_key_value.bias"]
        for order in told
    )
    assert not torch.equal(one, other)
    assert other.tolist()[8:12] == [8, 9, 10, 11]  # the first head's values


def test_gate_rows_of_a_gated_projection_keep_their_order():
    state = {"attn.q_proj.bias": torch.arange(16.0), "attn.o_proj.weight": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=r"twice the rows .* 'gated'"):
        convert_pairing(state, "half", "interleaved", head_dim=4)
    converted = convert_pairing(state, "half", "interleaved", head_dim=4, fused={"q_proj": "gated"})
    assert converted["attn.q_proj.bias"].tolist() == [0, 2, 1, 3, *range(4, 8), 8, 10, 9, 11, *range(12, 16)]
    with pytest.raises(ValueError, match="3 heads, which do not lie in the order 'gated'"):
        convert_pairing(
            {"q_proj.bias": torch.zeros(12)}, "half", "interleaved", head_dim=4, fused={"q_proj": "gated"}
        )


Q = {"q_proj.weight": torch.zeros(16, 4)}
SWAP = ("half", "interleaved")
REFUSED = {
    "no weight is named": (({"attention.query": torch.zeros(16, 4)}, *SWAP), {}),
    "only='vision'": ((Q, *SWAP), {"only": "vision"}),
    "head_dim 10 does not divide": ((Q, *SWAP), {"head_dim": 10}),
    "makes no whole pairs": ((Q, *SWAP), {"head_dim": 5}),
    "merge adapters": (({**Q, "q_proj.lora_B.weight": torch.zeros(16, 2)}, *SWAP), {}),
    "dequantize": (({**Q, "q_proj.weight_scale_inv": torch.zeros(16)}, *SWAP), {}),
    "fused=": (({**Q, "attn.qkv.weight": torch.zeros(48, 4)}, *SWAP), {}),
    "order of heads 'mixed'": (
        ({"qkv.weight": torch.zeros(48, 4)}, *SWAP),
        {"fused": {"qkv": "mixed"}},
    ),
    "6 heads are not 3 of keys": (
        ({"qkv.weight": torch.zeros(48, 4)}, *SWAP),
        {"fused": {"qkv": "stacked"}, "kv_heads": 3},
    ),
    "no reordering of channels": ((Q, "m-rope", SCHEMES["m-rope"].replace(ownership="stride3")), {}),
    "of frequencies 2 on t": ((Q, "flat", SCHEMES["flat"].replace(theta=1e6, freq_scale=2.0)), {}),
    "need the same axes": ((Q, "flat", "grid"), {}),
    "a factor of 1.0": ((Q, "flat", SCHEMES["flat"].replace(attention_factor=1.1)), {}),
    "pairing alone": ((Q, "rope-vit-mixed", SCHEMES["rope-vit-mixed"].replace(theta=100.0)), {}),
    "scheme 'halves' is unknown": ((Q, "halves", "interleaved"), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_weights_that_cannot_be_converted_are_refused(message):
    given_, how = REFUSED[message]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        convert_pairing(*given_, **{"head_dim": 8, **how})


def test_an_extension_that_agrees_only_at_short_lengths_is_refused():
    dynamic = SCHEMES["flat"].replace(
        extensions=[{"rope_type": "dynamic", "factor": 2.0, "original_max_positions": 64}]
    )
    assert torch.equal(SCHEMES["flat"].omega(8), dynamic.omega(8))
    with pytest.raises(ValueError, match="no reordering"):
        convert_pairing(Q, dynamic, "flat", head_dim=8)
    convert_pairing(Q, dynamic, "interleaved", head_dim=8)
