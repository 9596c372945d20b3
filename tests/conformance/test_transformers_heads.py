"""q and k as they reach the attention of tiny random transformers models, against ours.

The model runs twice, once with a rotary embedding of cosine 1 and sine 0: what it gives its attention then is
what we rotate. So its positions, tables, slice of the head and pairing of channels are all its own.
"""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from rope_mm import SCHEMES, Rotary
from rope_mm.rotary.definition import join_interleaved
from rope_mm.schemes.frequencies import apportion
from rope_mm.segments import Image, Text, Unrotated, Video

few = settings(max_examples=8, deadline=None)
SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []


def watch(module, query, key, value, *_, **__):
    """An attention that keeps the heads it is given, (b, h, s, d)."""
    SEEN.append((query, key))
    return query.transpose(1, 2)[..., : value.shape[-1]], None


WATCH = "conformance_watch"
AttentionInterface.register(WATCH, watch)


def make(kind, **sizes):
    """A model of one layer whose q and k are of order 1; its attention is watched."""
    model = kind(kind.config_class(num_hidden_layers=1, attn_implementation=WATCH, **sizes)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def heads(model, *inputs, **more):
    """q and k (b, s, h, d) at its attention; windows and images one after another."""
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
    if ours.unrotated_fraction:
        written |= {"rope_type": "proportional", "partial_rotary_factor": 1 - ours.unrotated_fraction}
        return {"rope_parameters": {"full_attention": written}, "global_head_dim": head_dim}
    if ours.channel_offset == "end":
        rotated = 2 * ours.pairs(head_dim)
        heads = {"qk_rope_head_dim": rotated, "qk_nope_head_dim": head_dim - rotated, "v_head_dim": rotated}
        return {"rope_parameters": written | {"partial_rotary_factor": 1.0}, "head_dim": rotated, **heads}
    if ours.axis_shares:
        t, y, x = apportion(ours.pairs(head_dim), ours.axis_shares)
        written["mrope_section"] = [y, x, t] if ours.ownership == "yx-then-t" else [t, y, x]
    return {"rope_parameters": written}


def interleaved_tail(scheme: str, head_dim: int):
    """DeepSeek's attention gets the evens, then the odds, of what it rotates: back to its weights' order."""
    rotated = 2 * SCHEMES[scheme].pairs(head_dim)
    return lambda x: torch.cat((x[..., :-rotated], join_interleaved(*x[..., -rotated:].chunk(2, -1))), -1)


@pytest.mark.parametrize("scheme", TEXT)
@few
@given(
    head_dim=st.sampled_from((64, 128)),
    segments=st.tuples(*[st.integers(1, 5)] * 5),
)
def test_tokens_and_images_are_rotated_as_in(scheme, agree, head_dim, segments):
    name, more = TEXT[scheme]
    rope = Rotary(head_dim, scheme)
    n, t, y, x, m = segments
    seen = [Text(n), Video(t, y, x, 0.5), Text(m), Image(x, y), Text(20)]
    positions, _ = rope.place(seen)
    sizes = {
        "hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim,
        "intermediate_size": 8, "vocab_size": 8, "vocab_size_per_layer_input": 8,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    model = make(getattr(transformers, f"{name}Model"), **(sizes | more | parameters(scheme, head_dim)))
    ids = positions.T[:, None].long()
    inputs = {"inputs_embeds": torch.randn(1, len(positions), 2 * head_dim), "use_cache": False}
    inputs["position_ids"] = ids[0] if len(ids) == 1 else ids
    if rope.scheme.axis_shares:
        tables = zip(rope.cos_sin(positions), model.rotary_emb(inputs["inputs_embeds"], ids), strict=True)
        original = f"transformers {type(model.rotary_emb).__name__}"
        for ours, theirs in tables:
            agree(scheme, original, ours, theirs[0], 1e-5, "cos, sin")
    order = interleaved_tail(scheme, head_dim) if rope.scheme.channel_offset == "end" else (lambda x: x)
    check(agree, scheme, model, "rotary_emb", rope, positions, order, **inputs)


@few
@given(rotary_dim=st.sampled_from((4, 8, 16, 64)), places=st.lists(st.integers(0, 60), min_size=1))
def test_some_channels_are_rotated_as_in_gpt_j(agree, rotary_dim, places):
    model = transformers.GPTJModel(
        transformers.GPTJConfig(
            n_embd=128, n_head=2, n_layer=1, vocab_size=8, n_positions=64, rotary_dim=rotary_dim
        )
    ).eval()
    model.config._attn_implementation = WATCH  # which its attention asks from transformers 5.24 on
    model.h[0].attn._attn = lambda q, k, v, mask: (q, SEEN.append((q, k)))
    x, p = torch.randn(1, len(places), 128), torch.tensor([places])
    before, after = (heads(model, inputs_embeds=x, position_ids=ids, use_cache=False) for ids in (0 * p, p))
    rope = Rotary(64, "gpt-j", fraction=rotary_dim / 64)
    compare(agree, "gpt-j", "transformers GPTJAttention", rope, p[0, :, None].double(), before, after)


# --- images by themselves: each tower on noise, of t frames, y rows and x columns ------------------------


def wide(d: int, **more) -> dict:
    """Sizes that most towers share, for heads of d channels."""
    return {"hidden_size": 2 * d, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4} | more


def video(t: int, y: int, x: int, name: str = "pixel_values", patch=(3 * 2 * 4 * 4,)):
    """A video of y and x blocks of 2 x 2 patches, and its patches and grid as most such towers take them."""
    seen = Video(t, 2 * y, 2 * x)
    return [seen], {name: torch.randn(seen.tokens, *patch), "grid_thw": torch.tensor([seen.grid])}


def qwen2_vl(d, t, y, x):
    sizes = {"embed_dim": 2 * d, "hidden_size": 8, "num_heads": 2, "patch_size": 4}
    model = make(Qwen2VisionTransformerPretrainedModel, **sizes)
    return model, "rotary_pos_emb", {}, *video(t, y, x, "hidden_states")


def qwen3_vl(d, t, y, x):
    sizes = wide(d, out_hidden_size=8, num_position_embeddings=16, deepstack_visual_indexes=())
    model = make(transformers.Qwen3VLVisionModel, **sizes)
    return model, "rotary_pos_emb", {}, *video(t, y, x, "hidden_states")


def pixtral(d, t, y, x):
    model = make(transformers.PixtralVisionModel, **wide(d, image_size=64))
    noise = {"pixel_values": torch.randn(1, 3, 4 * y, 4 * x)}
    return model, "patch_positional_embedding", {}, [Image(y, x)], noise


def llama4(d, t, y, x):
    sizes = {"image_size": 8 * y, "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8}
    model = make(transformers.Llama4VisionModel, **wide(d, intermediate_size=8 * d, **sizes))
    noise = {"pixel_values": torch.randn(1, 3, 8 * y, 8 * y)}
    return model, "rotary_embedding", {}, [Image(2 * y, 2 * y), Unrotated(1)], noise


def dinov3(d, t, y, x):
    model = make(transformers.DINOv3ViTModel, **wide(d, num_register_tokens=t))
    noise = {"pixel_values": torch.randn(1, 3, 4 * y, 4 * x)}
    return model, "rope_embeddings", {}, [Unrotated(1 + t), Image(y, x)], noise


def sam3_across(d, t, y, x):
    """All of the image at once: its positions are squeezed into a window's."""
    sizes = {"image_size": 4 * y, "pretrain_image_size": 4 * y, "window_size": x, "global_attn_indexes": [0]}
    model = make(transformers.Sam3ViTModel, **wide(d, **sizes))
    noise = {"pixel_values": torch.randn(1, 3, 4 * y, 4 * y)}
    options = {"options": (("y", x / y), ("x", x / y))}
    return model, "layers.0.rotary_emb", options, [Image(y, y)], noise


def sam3_windows(d, t, y, x):
    sizes = {
        "image_size": 4 * y * t,
        "pretrain_image_size": 4 * y,
        "window_size": y,
        "global_attn_indexes": [],
    }
    model = make(transformers.Sam3ViTModel, **wide(d, **sizes))
    noise = {"pixel_values": torch.randn(1, 3, 4 * y * t, 4 * y * t)}
    return model, "layers.0.rotary_emb", {}, [Image(y, y)], noise


def gemma4(d, t, y, x):
    """Positions are those of its image processor, which pads the patches up to what is read here."""
    images = transformers.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    noise = np.random.default_rng(0).integers(0, 256, (40 * y, 40 * x, 3), dtype=np.uint8)
    seen = images(noise, return_tensors="pt")
    columns, rows = (seen["image_position_ids"].amax((0, 1)) + 1).tolist()
    assert (columns > rows) == (x > y)
    there = rows * columns
    inputs = {"pixel_values": seen["pixel_values"], "pixel_position_ids": seen["image_position_ids"]}
    model = make(transformers.Gemma4VisionModel, **wide(d, head_dim=d, num_key_value_heads=1))
    return (
        model,
        "encoder.rotary_emb",
        {},
        [Image(rows, columns)],
        {k: v[:, :there] for k, v in inputs.items()},
    )


def kimi(d, t, y, x):
    model = make(transformers.Kimi_K25VisionModel, **wide(d, pos_emb_time=t))
    return model, "rotary_emb", {}, *video(t, y, x, patch=(3, 4, 4))


def minimax_m3(d, t, y, x):
    model = make(transformers.MiniMaxM3VLVisionModel, **wide(d))
    return model, "rotary_emb", {"fraction": 6 * (d // 3 // 2) / d}, *video(t, y, x)


def step3p7(d, t, y, x):
    model = make(transformers.Step3p7VisionModel, **wide(d, image_size=16))
    noise = {"pixel_values": torch.randn(1, 3, 4 * y, 4 * x)}
    return model, "rotary_emb", {"pairing": "half"}, [Image(y, x)], noise


def inkling2(d, t, y, x):
    model = make(transformers.Inkling2VisionModel, **wide(d, projection_hidden_dim=8, text_hidden_size=8))
    noise = {"pixel_values": torch.randn(y * x, 8, 8, 3), "image_grid_thw": torch.tensor([[1, y, x]])}
    options = {"options": (("first", 1.0), ("merge", 2))}
    return model, "rotary_emb", options, [Unrotated(1), Image(2 * y, 2 * x)], noise


TOWERS = {
    qwen2_vl: "qwen2-vl-vision",
    qwen3_vl: "qwen2-vl-vision",
    pixtral: "pixtral",
    llama4: "llama4-vision",
    dinov3: "dinov3",
    sam3_across: "sam2",
    sam3_windows: "sam2",
    gemma4: "gemma4-vision",
    kimi: "kimi-vision",
    minimax_m3: "minimax-m3-vision",
    step3p7: "sam2",
    inkling2: "sam2",
}


@pytest.mark.parametrize("build", TOWERS)
@few
@given(head_dim=st.sampled_from((16, 32, 64, 80)), shape=st.tuples(*[st.integers(1, 5)] * 3))
def test_images_are_rotated_as_in_the_tower_of(build, agree, head_dim, shape):
    model, rotary, changes, segments, inputs = build(head_dim, *shape)
    rope = Rotary(head_dim, TOWERS[build], **changes)
    check(agree, TOWERS[build], model, rotary, rope, rope.place(segments)[0], **inputs)
