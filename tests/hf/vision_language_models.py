"""Tiny models of the Qwen-VL family with random weights, for several tests."""

import tiny_sizes
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
STRIDED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
TEXT = {**tiny_sizes.TEXT, "max_position_embeddings": 512, "initializer_range": 0.2}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IMAGE, VIDEO = 90, 91  # their tokens
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}

WINDOWED = {**VISION, "out_hidden_size": 64, "intermediate_size": 32, "window_size": 16}
WINDOWED |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}


def build(model, config, vision, rope=ROPE):
    """A model of a family from the settings of its vision encoder and its text's rotary."""
    torch.manual_seed(0)
    text = {**TEXT, "rope_parameters": rope}
    return model(config(text_config=text, vision_config=vision, **IDS)).eval()


def qwen2_vl():
    vision = {**VISION, "embed_dim": 32, "hidden_size": 64}
    return build(Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision)


def qwen2_5_vl():
    return build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, WINDOWED)


def qwen3_vl():
    vision = {**VISION, "out_hidden_size": 64, "intermediate_size": 32, "num_position_embeddings": 64}
    vision["deepstack_visual_indexes"] = [0]
    return build(Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, STRIDED)


def visual_inputs(ids, grids, video=False, generator=None):
    """What a model reads: token ids and random patches that fill these grids (t, y, x)."""
    ids, grid = torch.tensor([ids]), torch.tensor(grids)
    kind, pixels = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        f"{kind}_grid_thw": grid,
        pixels: torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 16, generator=generator),
    }


def with_text(inputs, more):
    """The same inputs with these text tokens (b, n) at their end."""
    longer = {"input_ids": more, "mm_token_type_ids": torch.zeros_like(more, dtype=torch.int32)}
    longer |= {"attention_mask": torch.ones_like(more)} if "attention_mask" in inputs else {}
    return inputs | {name: torch.cat((inputs[name], part), 1) for name, part in longer.items()}
