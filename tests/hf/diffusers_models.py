"""Tiny transformers of diffusers: class, config and inputs, by name."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

HEADS, D, TEXT = 2, 24, 5  # of tiny models of diffusers: heads, head_dim, text tokens
TIME = torch.tensor([0.5])
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": D,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 8, 12],
}
WAN = {
    "num_attention_heads": HEADS,
    "attention_head_dim": D,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": HEADS,
    "attention_head_dim": D,
    "num_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 8, 12),
}
IMAGE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": D,
    "num_attention_heads": HEADS,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
}
COG = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 24,
    "sample_height": 16,
    "use_rotary_positional_embeddings": True,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux_inputs(y: int, x: int, **more: Any) -> dict[str, Any]:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    ids = FluxPipeline._prepare_latent_image_ids(1, y, x, "cpu", torch.float32)
    given = {
        "hidden_states": noise(1, y * x, 4),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "timestep": TIME,
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return given | more


def flux2_inputs(y: int, x: int) -> dict[str, Any]:
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    text = noise(1, TEXT, 32)
    return {
        "hidden_states": noise(1, y * x + 6, 4),
        "encoder_hidden_states": text,
        "timestep": TIME,
        "guidance": TIME,
        "txt_ids": Flux2Pipeline._prepare_text_ids(text),
        "img_ids": torch.cat(
            (
                Flux2Pipeline._prepare_latent_ids(torch.empty(1, 4, y, x)),
                Flux2Pipeline._prepare_image_ids([torch.empty(1, 4, 2, 3)]),
            ),
            1,
        ),
    }


def flux3_inputs(y: int, x: int) -> dict[str, Any]:
    """Ids are time, row, column and the number of the text token."""
    text, image = torch.zeros(TEXT, 4), torch.zeros(y * x, 4)
    text[:, 3] = torch.arange(TEXT)
    image[:, 1:3] = torch.cartesian_prod(torch.arange(y), torch.arange(x))
    return {
        "hidden_states": noise(1, y * x, 4),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "timestep": TIME,
        "txt_ids": text,
        "img_ids": image,
    }


def image_inputs(y: int, x: int) -> dict[str, Any]:
    size = torch.tensor([[2 * y, 2 * x]])
    return {
        "hidden_states": noise(1, 4, 2 * y, 2 * x),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "timestep": torch.tensor([7]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def glm_inputs(y: int, x: int) -> dict[str, Any]:
    """An image with the tokens that a language model has made of it beforehand."""
    inputs = image_inputs(y, x)
    del inputs["original_size"]
    prior = torch.arange(y * x)[None]
    return inputs | {"prior_token_id": prior, "prior_token_drop": prior < 0}


def wan_inputs(y: int, x: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, 3, 2 * y, 2 * x),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": noise(1, TEXT, 32),
    } | more


def hunyuan_inputs(y: int, x: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, 3, 2 * y, 2 * x),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    } | more


def qwen_inputs(y: int, x: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, y * x + 6, 16),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.long),
        "timestep": TIME,
        "img_shapes": [[(1, y, x), (1, 2, 3)]],
    }


def ltx_inputs(y: int, x: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 3 * y * x, 4),
        "encoder_hidden_states": noise(2, TEXT, 32),
        "timestep": TIME.expand(2),
        "encoder_attention_mask": torch.ones(2, TEXT),
        "num_frames": 3,
        "height": y,
        "width": x,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def cog_inputs(y: int, x: int, frames: int | None = None) -> dict[str, Any]:
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    config = SimpleNamespace(
        sample_width=24, sample_height=16, attention_head_dim=16, patch_size=2, patch_size_t=frames
    )
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    tables = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, 16 * y, 16 * x, 4, torch.device("cpu")
    )
    return {
        "hidden_states": noise(1, 4, 4, 2 * y, 2 * x),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "timestep": TIME,
        "image_rotary_emb": tables,
    }


def z_image_inputs(y: int, x: int) -> dict[str, Any]:
    return {
        "x": [noise(4, 1, 2 * y, 2 * x), noise(4, 1, 4, 6)],
        "t": TIME.expand(2),
        "cap_feats": [noise(TEXT, 32), noise(40, 32)],
    }


def lumina2_inputs(y: int, x: int) -> dict[str, Any]:
    mask = torch.ones(2, TEXT, dtype=torch.int)
    mask[1, 3:] = 0
    return {
        "hidden_states": noise(2, 4, 2 * y, 2 * x),
        "timestep": TIME.expand(2),
        "encoder_hidden_states": noise(2, TEXT, 32),
        "encoder_attention_mask": mask,
    }


ONES = "num_layers", "num_key_value_heads", "text_num_key_value_heads", "num_layerwise_text_blocks"
WIDTHS = "intermediate_size", "timestep_embed_dim", "text_hidden_dim", "text_intermediate_size"
KREA = dict.fromkeys((*ONES, "num_refiner_text_blocks"), 1) | dict.fromkeys(WIDTHS, 32)
DiffusersEntry = tuple[str, dict[str, Any], Callable[[int, int], dict[str, Any]]]
DIFFUSERS: dict[str, DiffusersEntry] = {
    "Flux": (
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32},
        lambda y, x: flux_inputs(y, x, pooled_projections=noise(1, 32)),
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        flux_inputs,
    ),
    "Bria": ("BriaTransformer2DModel", FLUX, flux_inputs),
    "BriaFibo": (
        "BriaFiboTransformer2DModel",
        FLUX | {"text_encoder_dim": 16},
        lambda y, x: flux_inputs(y, x, text_encoder_layers=[noise(1, TEXT, 16), noise(1, TEXT, 16)]),
    ),
    "LongCat-Image": ("LongCatImageTransformer2DModel", FLUX | {"pooled_projection_dim": 32}, flux_inputs),
    "Ovis-Image": ("OvisImageTransformer2DModel", FLUX | {"out_channels": 4}, flux_inputs),
    "Flux ControlNet": (
        "FluxControlNetModel",
        FLUX | {"pooled_projection_dim": 32},
        lambda y, x: flux_inputs(y, x, pooled_projections=noise(1, 32), controlnet_cond=noise(1, y * x, 4)),
    ),
    "Flux2": (
        "Flux2Transformer2DModel",
        FLUX | {"axes_dims_rope": (4, 8, 8, 4), "timestep_guidance_channels": 16},
        flux2_inputs,
    ),
    "Flux3": (
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": HEADS,
            "joint_attention_dim": 32,
            "timestep_channels": 16,
            "axes_dims_rope": (8, 8, 8, 8),
        },
        flux3_inputs,
    ),
    "CogView4": (
        "CogView4Transformer2DModel",
        IMAGE | {"condition_dim": 8, "rope_axes_dim": (16, 24), "pos_embed_max_size": 8},
        image_inputs,
    ),
    "GLM-Image": (
        "GlmImageTransformer2DModel",
        IMAGE | {"condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
        glm_inputs,
    ),
    "SANA-Video": (
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": HEADS,
            "attention_head_dim": D,
            "num_layers": 1,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": D,
            "cross_attention_dim": HEADS * D,
            "caption_channels": 32,
            "rope_max_seq_len": 32,
        },
        wan_inputs,
    ),
    "Krea 2": (
        "Krea2Transformer2DModel",
        KREA
        | {
            "in_channels": 4,
            "attention_head_dim": D,
            "num_attention_heads": HEADS,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "axes_dims_rope": (8, 8, 8),
        },
        lambda y, x: {
            "hidden_states": noise(1, y * x, 4),
            "encoder_hidden_states": noise(1, TEXT, 3, 32),
            "timestep": TIME,
            "position_ids": torch.cat((torch.zeros(TEXT, 3), flux_inputs(y, x)["img_ids"])),
        },
    ),
    "Cosmos": (
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": HEADS,
            "attention_head_dim": D,
            "num_layers": 2,
            "text_embed_dim": 32,
            "adaln_lora_dim": 4,
            "max_size": (16, 32, 32),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        lambda y, x: wan_inputs(y, x, fps=30, timestep=torch.tensor([0.5])),
    ),
    "Wan": ("WanTransformer3DModel", WAN, wan_inputs),
    "Wan VACE": (
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0], "vace_in_channels": 4},
        lambda y, x: wan_inputs(y, x, control_hidden_states=noise(1, 4, 3, 2 * y, 2 * x)),
    ),
    "Wan Animate": (
        "WanAnimateTransformer3DModel",
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "inject_face_latents_blocks": 1,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
        },
        lambda y, x: wan_inputs(
            y,
            x,
            hidden_states=noise(1, 12, 3, 2 * y, 2 * x),
            encoder_hidden_states_image=noise(1, 3, 16),
            pose_hidden_states=noise(1, 4, 2, 2 * y, 2 * x),
            face_pixel_values=noise(1, 3, 5, 16, 16),
        ),
    ),
    "SkyReels-V2": ("SkyReelsV2Transformer3DModel", WAN, wan_inputs),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"num_single_layers": 1, "num_refiner_layers": 1, "pooled_projection_dim": 32},
        lambda y, x: hunyuan_inputs(y, x, pooled_projections=noise(1, 32), guidance=TIME),
    ),
    "HunyuanVideo 1.5": (
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN
        | {
            "num_refiner_layers": 1,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda y, x: hunyuan_inputs(
            y,
            x,
            timestep=torch.tensor([7.0]),
            encoder_hidden_states_2=noise(1, 4, 16),
            encoder_attention_mask_2=torch.ones(1, 4, dtype=torch.bool),
            image_embeds=torch.zeros(1, 3, 16),
        ),
    ),
    "Motif-Video": ("MotifVideoTransformer3DModel", HUNYUAN | {"num_single_layers": 1}, hunyuan_inputs),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": D,
            "num_attention_heads": HEADS,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 8, 12),
        },
        qwen_inputs,
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": HEADS * D,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": 32,
            "axes_dims": [8, 8, 8],
            "axes_lens": [128, 32, 32],
        },
        z_image_inputs,
    ),
    "Lumina2": (
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": HEADS * D,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cap_feat_dim": 32,
            "axes_dim_rope": (8, 8, 8),
            "axes_lens": (32, 32, 32),
        },
        lumina2_inputs,
    ),
    "LTX": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": HEADS,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 32,
        },
        ltx_inputs,
    ),
    "CogVideoX 1.0": ("CogVideoXTransformer3DModel", COG, cog_inputs),
    "CogVideoX 1.5": (
        "CogVideoXTransformer3DModel",
        COG | {"patch_size_t": 2, "patch_bias": False},
        lambda y, x: cog_inputs(y, x, 2),
    ),
}
