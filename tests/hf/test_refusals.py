"""What set_rope refuses at once, and what it must not refuse."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    Ernie4_5_VLMoeConfig,
    EsmConfig,
    EsmModel,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    T5GemmaConfig,
    T5GemmaModel,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)

from rope_mm import SCHEMES, Video, from_hf_config, to_rope_parameters
from rope_mm.hf import explain, rope_of, set_rope, unset_rope
from rope_mm.hf.attention_rotation import moves_with_inputs, names_rotation
from rope_mm.hf.image_grids import read_grids, square_side

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(4, 12)[None]


@pytest.mark.parametrize("ask", [lambda x: set_rope(x, "flat"), rope_of, explain, unset_rope])
def test_a_string_is_refused_in_one_sentence(ask):
    with pytest.raises(ValueError, match="is needed, or a part of one, not the string 'gpt2'; load it first"):
        ask("gpt2")


@pytest.mark.parametrize("kind", [LlamaConfig, BertConfig])
def test_rows_and_columns_alone_are_refused_for_a_model_of_text(kind):
    model = AutoModel.from_config(kind(**TEXT))
    with pytest.raises(ValueError, match=r"'grid-2d' is of rows and columns alone, but .* reads text"):
        set_rope(model, "rope-2d")
    set_rope(model, "rope-tv")


def vjepa2():
    sizes = {f"pred_{name}": size for name, size in SIZES.items() if name != "intermediate_size"}
    sizes |= {"patch_size": 8, "crop_size": 16, "frames_per_clip": 4} | SIZES
    return VJEPA2Model(VJEPA2Config(**sizes | {"hidden_size": 48, "pred_hidden_size": 32}))


def test_heads_of_several_sizes_are_refused_and_the_model_stays_as_it_was():
    model = vjepa2()
    before = [sorted(vars(part)) for part in model.modules()]
    with pytest.raises(ValueError, match=r"has heads of \[16, 24\] channels, and one Omega fits one size"):
        set_rope(model, "flat")
    assert [sorted(vars(part)) for part in model.modules()] == before


def test_an_attention_that_rotates_inside_is_distinguished_from_one_that_does_not():
    model = vjepa2().encoder.layer[0].attention
    assert names_rotation(type(model))
    vit = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4)).eval()
    attention = next(part for name, part in vit.named_modules() if name.endswith("attention"))
    assert not names_rotation(type(attention)) and moves_with_inputs(vit, attention)
    esm = EsmModel(EsmConfig(**TEXT, position_embedding_type="rotary")).eval()
    rotating = next(part for part in esm.modules() if type(part).__name__ == "EsmSelfAttention")
    assert names_rotation(type(rotating)) and not moves_with_inputs(esm, rotating)


def test_attention_that_sees_positions_by_itself_is_refused():
    sizes = {name: TEXT[name] for name in TEXT if name != "vocab_size"}
    sound = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    sound |= {
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "conv_depthwise_kernel_size": 3,
    }
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**sizes, **sound)).eval()  # of relative positions
    with pytest.raises(ValueError, match="sees by itself where tokens stand, and its code names a rotation"):
        set_rope(model, "flat")


def test_a_rotary_module_without_layer_types_serves_all_layers():
    model = EsmModel(EsmConfig(**TEXT, position_embedding_type="rotary", initializer_range=0.2)).eval()
    before = model(IDS)[0]
    handle = set_rope(model, rope_of(model))
    assert torch.equal(model(IDS)[0], before)
    handle.undo()
    set_rope(model, "flat", theta=100.0)
    assert (model(IDS)[0] - before).abs().max() > 1e-3


def test_both_stacks_of_an_encoder_decoder_get_the_scheme():
    text = {**TEXT, "head_dim": 16, "num_key_value_heads": 2, "query_pre_attn_scalar": 16}
    config = T5GemmaConfig(encoder=text, decoder={**text, "cross_attention_hidden_size": 32})
    model = T5GemmaModel(config).eval()
    set_rope(model, "rope-tv", theta=50.0)
    ropes = [part.first.scheme.theta for part in (model.encoder.rotary_emb, model.decoder.rotary_emb)]
    assert ropes == [50.0, 50.0]
    assert model(input_ids=IDS, decoder_input_ids=IDS)[0].isfinite().all()


def test_layers_whose_heads_differ_in_size_are_served_and_saved(tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 16}
    kinds |= {"head_dim": 16, "global_head_dim": 32, "vocab_size_per_layer_input": 50}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**TEXT, num_key_value_heads=1, **kinds)).eval()
    set_rope(model, "rope-tv")
    assert {layer: rope.omega.shape[1] for layer, rope in rope_of(model).items()} == {
        "full_attention": 16,
        "sliding_attention": 8,
    }
    model.save_pretrained(tmp_path)
    loaded = Gemma4ForCausalLM.from_pretrained(tmp_path).eval()
    set_rope(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("model_type", ["glm", "cohere", "helium"])
def test_a_scheme_by_name_takes_the_pairing_of_the_model(tiny, model_type):
    model = tiny(model_type)
    own = rope_of(model).pairing
    set_rope(model, "rope-tv")
    assert own == "interleaved" == rope_of(model).scheme.pairing
    unset_rope(model)
    with pytest.raises(ValueError, match="pairs channels 'half', but the weights are for 'interleaved'"):
        set_rope(model, "rope-tv", pairing="half")


@pytest.mark.parametrize("head_dim", [100, 128, 80])
@pytest.mark.parametrize("fraction", [0.58, 0.29, 0.5, 0.14])
def test_the_fraction_that_is_written_is_read_back_as_it_was(head_dim, fraction):
    scheme = SCHEMES["glm"].replace(fraction=fraction)
    rotated = 2 * scheme.pairs(head_dim)
    for given in (head_dim, None):
        rope = to_rope_parameters(scheme, given)
        assert int(head_dim * rope["partial_rotary_factor"]) // 2 * 2 == rotated


def test_a_rope_type_unknown_to_transformers_is_refused():
    config = LlamaConfig(**TEXT)
    config.rope_parameters = {"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="transformers has no rope_type 'ntk'; it has default"):
        from_hf_config(config)


def test_a_video_whose_frames_are_merged_has_fewer_of_them():
    config = AutoConfig.for_model("ernie4_5_vl_moe")
    assert isinstance(config, Ernie4_5_VLMoeConfig) and config.vision_config.temporal_merge_size == 2
    inputs = {"video_grid_thw": torch.tensor([[8, 4, 8]])}
    assert read_grids(config, inputs, torch.full((1, 32), 2))[2] == [Video(4, 2, 4)]


@pytest.mark.parametrize(
    ("model_type", "side"),
    [("llava", 24), ("paligemma", 16), ("gemma3", 16), ("smolvlm", 0), ("idefics3", 0), ("internvl", 16)],
)
def test_the_one_size_of_images_is_read_from_the_config(model_type, side):
    config = AutoConfig.for_model(model_type)
    assert square_side(config) == side, json.dumps(config.vision_config.to_dict(), default=str)
