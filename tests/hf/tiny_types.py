"""Tiny random models of types whose configs have parts, every size given, for several tests."""

import transformers as hf
from prepared_models import weighted
from tiny_sizes import TEXT
from torch import nn
from transformers.models.gemma3n import modeling_gemma3n

BARE = {name: size for name, size in TEXT.items() if name != "head_dim"}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_token_id": 90, "video_token_id": 91}
BOTH = ["sliding_attention", "full_attention"]


def phi4_multimodal():
    vision = {**VISION, "image_size": 28, "crop_size": 28, "patch_size": 14, "image_token_id": 90}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2}
    audio |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 32)
    audio |= {"nemo_conv_channels": 32, "audio_token_id": 91, "input_size": 16, "nemo_final_size": 2}
    config = hf.Phi4MultimodalConfig(
        **BARE, vision_config=vision, audio_config=audio, original_max_position_embeddings=256
    )
    return weighted(hf.Phi4MultimodalForCausalLM(config))


def cosmos3_edge():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = hf.Cosmos3EdgeConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={**VISION, "patch_size": 4, "num_patches": 16},
        projector_hidden_size=32,
        **IMAGE,
    )
    return weighted(hf.Cosmos3EdgeForConditionalGeneration(config))


def hunyuan_vl():
    rope = {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "mrope_section": [2, 2, 2, 2]}
    vision = {**VISION, "num_key_value_heads": 2, "out_hidden_size": 64, "text_hidden_size": 64}
    vision |= {"patch_size": 4, "max_image_size": 64, "min_image_size": 16, "max_vit_seq_len": 64}
    config = hf.HunYuanVLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=90
    )
    return weighted(hf.HunYuanVLForConditionalGeneration(config))


def voxtral():
    audio = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    audio |= {"num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 20}
    config = hf.VoxtralConfig(audio_config=audio, text_config={**TEXT, "model_type": "llama"})
    return weighted(hf.VoxtralForConditionalGeneration(config))


def deepseek_v4():
    """One layer for each way to compress keys, and one that compresses none."""
    rates = {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2}
    sizes = TEXT | {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"layer_types": [*rates, "sliding_attention"], "compress_rates": rates, "sliding_window": 8}
    sizes |= {"mlp_layer_types": ["hash_moe", "moe", "moe"], "moe_intermediate_size": 32, "hc_mult": 2}
    sizes |= {"num_experts_per_tok": 2, "n_routed_experts": 4, "q_lora_rank": 16, "o_lora_rank": 16}
    sizes |= {"o_groups": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
    sizes |= {"qk_rope_head_dim": 8, "partial_rotary_factor": 0.25}
    del sizes["intermediate_size"]
    return weighted(hf.DeepseekV4ForCausalLM(hf.DeepseekV4Config(**sizes)))


def lfm3():
    """A layer that carries a state, and one of attention; it reads layer_types of its rotary module."""
    return weighted(hf.Lfm3ForCausalLM(hf.Lfm3Config(**TEXT, layer_types=["conv", "full_attention"])))


def gemma3n(monkeypatch):
    """Without its tower, a model of timm."""
    own = modeling_gemma3n.AutoModel.from_config

    def from_config(config, **more):
        return nn.Identity() if "vision" in config.model_type else own(config, **more)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", from_config)
    text = {**TEXT, "layer_types": BOTH * 2, "num_hidden_layers": 4, "intermediate_size": [64] * 4}
    text |= {"num_kv_shared_layers": 2, "laurel_rank": 8, "sliding_window": 64}
    text |= {"activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16}
    audio = {"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
    audio |= {"input_feat_size": 16, "sscp_conv_channel_size": [8, 4], "vocab_offset": 120, "vocab_size": 8}
    config = hf.Gemma3nConfig(
        text_config={**text, "vocab_size_per_layer_input": 100},
        audio_config=audio,
        vision_config={"hidden_size": 32, "vocab_size": 8, "vocab_offset": 110},
        image_token_id=90,
        audio_token_id=91,
    )
    return weighted(hf.Gemma3nForConditionalGeneration(config))


def molmo2(_monkeypatch):
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "image_size": [16, 16], "patch_size": 4}
    adapter = {"vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2}
    adapter |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "text_hidden_size": 64}
    config = hf.Molmo2Config(
        vision_config={**vision, "num_position_embeddings": 16},
        adapter_config=adapter,
        text_config={**TEXT, "additional_vocab_size": 8, "rope_scaling_layers": None},
        image_patch_id=90,
    )
    return weighted(hf.Molmo2ForConditionalGeneration(config))


def step3p7(_monkeypatch):
    rope = {layer: {"rope_type": "default", "rope_theta": 1e4} for layer in BOTH}
    text = {**TEXT, "layer_types": BOTH, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": rope}
    text |= {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32}
    text |= {"share_expert_dim": 32, "num_sliding_attention_heads": 4, "query_pre_attn_scalar": 16}
    vision = {**VISION, "image_size": 16, "patch_size": 4, "max_position_embeddings": 16, "mlp_ratio": 1.0}
    config = hf.Step3p7Config(
        vision_config={**vision, "model_type": "step3p5_vision"},
        text_config={**text, "sliding_window": 64, "model_type": "step3p5"},
        image_token_id=90,
    )
    return weighted(hf.AutoModelForImageTextToText.from_config(config))


def llama4(_monkeypatch):
    """Its text: in transformers 5.24 the forward of text and images ends in an AttributeError."""
    layers = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    layers |= {"moe_layers": [1], "attention_chunk_size": 64, "intermediate_size_mlp": 64}
    config = hf.Llama4TextConfig(**TEXT, **layers, num_experts_per_tok=1, num_local_experts=2)
    return weighted(hf.Llama4ForCausalLM(config))
