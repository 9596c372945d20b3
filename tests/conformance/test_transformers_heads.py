"""q and k as they reach the attention of tiny random transformers models, against ours.

The model runs twice, once with a rotary embedding of cosine 1 and sine 0: what it gives its attention then is
what we rotate. So its positions, tables, slice of the head and pairing of channels are all its own.
"""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from transformers.models.gptj.modeling_gptj import GPTJAttention

from rope_mm import SCHEMES, Image, Rotary, Text, Video, place
from rope_mm.frequencies import apportion
from rope_mm.rotation import join_interleaved

few = settings(max_examples=8, deadline=None)
SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []


def watch(module, query, key, value, *_, **__):
    """An attention that keeps the heads it is given, (b, h, s, d)."""
    SEEN.append((query, key))
    return query.transpose(1, 2)[..., : value.shape[-1]], None


AttentionInterface.register("watch", watch)


def make(name: str, config: str, **sizes):
    """A model of one layer whose q and k are of order 1; its attention is watched."""
    common = {"num_hidden_layers": 1, "attn_implementation": "watch"}
    model = getattr(transformers, name)(getattr(transformers, config)(**common, **sizes)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def heads(model, *inputs, **more):
    """q and k (b, s, h, d) at its attention; windows and pictures one after another."""
    SEEN.clear()
    with torch.no_grad():
        model(*inputs, **more)
    q, k = (torch.cat(x, dim=2).transpose(1, 2) for x in zip(*SEEN, strict=True))
    return q, k


def unturned(module, inputs, output):
    """Cosine 1 and sine 0, or 1 + 0i, in place of a rotary embedding's output."""
    if isinstance(output, torch.Tensor):
        return torch.ones_like(output)
    return torch.ones_like(output[0]), torch.zeros_like(output[1])


def compare(agree, scheme: str, original: str, rope: Rotary, positions, before, after) -> None:
    """Ours on what stood before the rotation, relative to the largest number there."""
    for ours, x, theirs in zip(rope(*before, positions), before, after, strict=True):
        agree(scheme, original, ours / x.abs().max(), theirs / x.abs().max(), 1e-5, "q, k")


def check(agree, scheme: str, model, rotary: str, rope: Rotary, positions, order=lambda x: x, **inputs):
    """The model's own q and k, turned by its module `rotary`, against ours; `order` sorts channels."""
    after = heads(model, **inputs)
    with model.get_submodule(rotary).register_forward_hook(unturned):
        before = heads(model, **inputs)
    original = f"transformers {type(model).__name__}"
    compare(agree, scheme, original, rope, positions, *(tuple(map(order, x)) for x in (before, after)))


# --- words: model, and the sizes that it needs beyond those of all ----------------------------------------

TEXT = {
    "flat": ("Llama", {}),
    "gpt-neox": ("GPTNeoX", {}),
    "glm": ("Glm", {}),
    "p-rope": ("Gemma4Text", {"layer_types": ["full_attention"], "hidden_size_per_layer_input": 0}),
    "deepseek-mla": ("DeepseekV3", {"q_lora_rank": None, "kv_lora_rank": 8, "num_key_value_heads": 2}),
    "m-rope-qwen2-vl": ("Qwen2VLText", {}),
    "m-rope-qwen2.5-vl": ("Qwen2_5_VLText", {}),
    "m-rope-qwen3-vl": ("Qwen3VLText", {}),
    "m-rope-qwen3.5": ("Qwen3_5Text", {"layer_types": ["full_attention"]}),
    "m-rope-glm-4.1v": ("Glm4vText", {}),
    "m-rope-ernie-4.5-vl": ("Ernie4_5_VLMoeText", {"moe_num_experts": 2}),
    "tm-rope": ("Qwen2_5OmniThinkerText", {}),
}


def parameters(scheme: str, head_dim: int) -> dict:
    """The scheme as transformers writes it."""
    ours = SCHEMES[scheme]
    written = {"rope_type": "default", "rope_theta": ours.theta, "partial_rotary_factor": ours.fraction}
    if ours.still:
        written |= {"rope_type": "proportional", "partial_rotary_factor": 1 - ours.still}
        return {"rope_parameters": {"full_attention": written}, "global_head_dim": head_dim}
    if ours.slot == "tail":
        rotated = 2 * ours.pairs(head_dim)
        heads = {"qk_rope_head_dim": rotated, "qk_nope_head_dim": head_dim - rotated, "v_head_dim": rotated}
        return {"rope_parameters": written | {"partial_rotary_factor": 1.0}, "head_dim": rotated, **heads}
    if ours.shares:
        t, y, x = apportion(ours.pairs(head_dim), ours.shares)
        written["mrope_section"] = [y, x, t] if ours.ownership == "yx-then-t" else [t, y, x]
    return {"rope_parameters": written}


def interleaved_tail(scheme: str, head_dim: int):
    """DeepSeek's heads with rotated channels as its weights have them: it gives attention evens, then odds."""
    rotated = 2 * SCHEMES[scheme].pairs(head_dim)
    return lambda x: torch.cat((x[..., :-rotated], join_interleaved(*x[..., -rotated:].chunk(2, -1))), -1)


@pytest.mark.parametrize("scheme", TEXT)
@few
@given(
    head_dim=st.sampled_from((64, 128)),
    story=st.tuples(*[st.integers(1, 5)] * 5),
)
def test_words_and_pictures_are_rotated_as_in(scheme, agree, head_dim, story):
    name, more = TEXT[scheme]
    rope = Rotary(head_dim, scheme)
    n, t, y, x, m = story
    seen = [Text(n), Video(t, y, x), Text(m), Image(x, y), Text(40)]
    positions, _ = rope.place(seen)
    sizes = {
        "hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim,
        "intermediate_size": 8, "vocab_size": 8, "vocab_size_per_layer_input": 8,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = "Qwen2_5OmniTextConfig" if scheme == "tm-rope" else f"{name}Config"
    model = make(f"{name}Model", config, **(sizes | more | parameters(scheme, head_dim)))
    ids = positions.T[:, None].long()
    inputs = {"inputs_embeds": torch.randn(1, len(positions), 2 * head_dim), "use_cache": False}
    inputs["position_ids"] = ids[0] if len(ids) == 1 else ids
    order = interleaved_tail(scheme, head_dim) if rope.scheme.slot == "tail" else (lambda x: x)
    check(agree, scheme, model, "rotary_emb", rope, positions, order, **inputs)


