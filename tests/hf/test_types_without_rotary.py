"""A row of docs/models.md for each much used type without rotary: served, with its error, or the reason."""

import pytest
import torch
import transformers as hf

from rope_mm.hf import set_rope

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT, EYE = {**SIZES, "vocab_size": 99}, {**SIZES, "image_size": 16, "patch_size": 4}
STACKS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99, "pad_token_id": 1}
STACKS |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
STACKS |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
SOUND = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
SOUND |= {**SIZES, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SWIN |= {"window_size": 4}
GPT, T5 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2}, {"vocab_size": 99, "d_model": 32}
T5 |= {"d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 4}
SPEC = {"patch_size": 4, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}
FRAMES = {**EYE, "num_frames": 4}
MEL = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
FORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
FORMER |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
SERIES = {"d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "context_length": 32}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20}
DETR = {name: size for name, size in STACKS.items() if name not in ("vocab_size", "pad_token_id")}
DETR |= {"use_timm_backbone": False, "num_queries": 5}
DETR["backbone_config"] = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
SAM = {
    **SIZES,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}

# the model's class without "Model" and "Config", sizes, what becomes of its bias, and the shape of its pixels
TYPES = {
    "albert": ("Albert", TEXT, None),
    "audio-spectrogram-transformer": ("AST", {**SIZES, **SPEC}, None),
    "bart": ("Bart", STACKS, None),
    "beit": ("Beit", {**EYE, "use_relative_position_bias": True}, "drop"),
    "bert": ("Bert", TEXT, None),
    "big_bird": ("BigBird", {**TEXT, "attention_type": "original_full"}, None),
    "biogpt": ("BioGpt", TEXT, None),
    "blenderbot": ("Blenderbot", STACKS, None),
    "blip_vision_model": ("BlipVision", EYE, None),
    "bloom": ("Bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "keep"),
    "camembert": ("Camembert", TEXT, None),
    "clip_text_model": ("CLIPText", {**TEXT, "bos_token_id": 1, "eos_token_id": 2}, None),
    "clip_vision_model": ("CLIPVision", EYE, None),
    "data2vec-audio": ("Data2VecAudio", SOUND, None),
    "data2vec-text": ("Data2VecText", TEXT, None),
    "data2vec-vision": ("Data2VecVision", EYE, None),
    "deberta": ("Deberta", DEBERTA, "drop"),
    "deberta-v2": ("DebertaV2", DEBERTA, "drop"),
    "deit": ("DeiT", EYE, None),
    "dinov2": ("Dinov2", EYE, None),
    "dinov2_with_registers": ("Dinov2WithRegisters", EYE, None),
    "detr": ("Detr", DETR, None),
    "distilbert": ("DistilBert", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2}, None),
    "donut-swin": ("DonutSwin", SWIN, "keep"),
    "dpt": ("DPT", EYE, None),
    "electra": ("Electra", TEXT, None),
    "ernie": ("Ernie", TEXT, None),
    "flaubert": ("Flaubert", {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 2}, None),
    "gpt2": ("GPT2", GPT, None),
    "gpt_bigcode": ("GPTBigCode", GPT, None),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 1]]},
        None,
    ),
    "hubert": ("Hubert", SOUND, None),
    "led": ("LED", {**STACKS, "attention_window": [4, 4]}, None),
    "longformer": ("Longformer", {**TEXT, "attention_window": [4, 4]}, None),
    "longt5": ("LongT5", {**T5, "local_radius": 3}, "keep"),
    "luke": ("Luke", {**TEXT, "entity_vocab_size": 9}, None),
    "m2m_100": ("M2M100", STACKS, None),
    "marian": ("Marian", {**STACKS, "decoder_vocab_size": 99}, None),
    "mbart": ("MBart", STACKS, None),
    "mobilebert": ("MobileBert", TEXT, None),
    "mpnet": ("MPNet", TEXT, "drop"),
    "mpt": ("Mpt", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 2}, "keep"),
    "mt5": ("MT5", T5, "drop"),
    "openai-gpt": ("OpenAIGPT", GPT, None),
    "opt": ("OPT", {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 64}, None),
    "patchtst": ("PatchTST", {**SERIES, "patch_length": 4, "patch_stride": 4}, None),
    "pegasus": ("Pegasus", STACKS, None),
    "rembert": ("RemBert", TEXT, None),
    "roberta": ("Roberta", TEXT, None),
    "sam_vision_model": ("SamVision", SAM, "drop"),
    "segformer": ("Segformer", FORMER, None),
    "siglip2_vision_model": ("Siglip2Vision", {**SIZES, "num_patches": 16, "patch_size": 4}, None),
    "siglip_vision_model": ("SiglipVision", EYE, None),
    "swin": ("Swin", SWIN, "keep"),
    "swinv2": ("Swinv2", SWIN, "keep"),
    "t5": ("T5", T5, "drop"),
    "timesformer": ("Timesformer", FRAMES, None),
    "umt5": ("UMT5", T5, "drop"),
    "unispeech-sat": ("UniSpeechSat", SOUND, None),
    "videomae": ("VideoMAE", FRAMES, None),
    "vit": ("ViT", EYE, None),
    "vit_mae": ("ViTMAE", EYE, None),
    "vivit": ("Vivit", {**SIZES, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 4, 4]}, None),
    "wav2vec2": ("Wav2Vec2", SOUND, None),
    "wavlm": ("WavLM", SOUND, "keep"),
    "whisper": ("Whisper", {**STACKS, **MEL}, None),
    "xglm": ("XGLM", {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 2}, None),
    "xlm": ("XLM", {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 2}, None),
    "xlm-roberta": ("XLMRoberta", TEXT, None),
    "xlnet": ("XLNet", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32}, None),
    "yolos": ("Yolos", {**EYE, "image_size": [16, 16]}, None),
}
REFUSED = {"detr", "xlnet"}  # see docs/models.md


@torch.no_grad()
def measure(name, sizes, bias):
    """The error with all tokens at one place, how far positions move outputs, and whether it is undone."""
    from rope_mm.hf.dry_run import probe

    torch.manual_seed(0)
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.3)

    def answer():
        torch.manual_seed(1)  # ViTMAE shuffles
        return probe(model)[-1]

    plain = answer()
    if bias == "drop":
        handle = set_rope(model, "grid", freq_scale=0.0, relative_bias=bias)
        unbiased = answer()
        handle.undo()
    else:
        unbiased = plain
    handle = set_rope(model, "grid", relative_bias=bias)
    moved = answer()
    context = next(part.rope_mm_context for part in model.modules() if hasattr(part, "rope_mm_context"))
    context.one_place = True
    error = ((answer() - unbiased).norm() / unbiased.norm()).item()
    handle.undo()
    return error, ((moved - unbiased).norm() / unbiased.norm()).item(), torch.equal(answer(), plain)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_without_rotary_is_served_or_refused_with_the_reason(model_type, types_without_rotary):
    name, sizes, bias = TYPES[model_type]
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=r"not served|nor one stack of attention") as refusal:
            measure(name, sizes, bias)
        types_without_rotary[model_type] = None, bias or "none", str(refusal.value)
        return
    error, moved, undone = measure(name, sizes, bias)
    assert undone and error < 1e-4 < 1e-2 < moved
    types_without_rotary[model_type] = error, bias or "none", ""


def test_the_page_has_a_row_for_each_type_without_rotary(types_without_rotary_page):
    rows = {name: (served, error, bias) for name, served, error, bias in types_without_rotary_page}
    assert list(rows) == sorted(TYPES), "write it anew: pytest tests/hf --write-families"
    for name, (served, error, _) in rows.items():
        assert (served == "yes") == (name not in REFUSED)
        assert name in REFUSED or float(error) < 1e-4
