import copy
import gc
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MoonshineConfig,
    MoonshineModel,
    Phi3Config,
    Phi3ForCausalLM,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rope_mm import SCHEMES, Rotary
from rope_mm.hf import explain, rope_of, set_rope, unset_rope, use_kernels

IDS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "deepseek_v3"])
def test_a_scheme_is_saved_and_one_line_brings_it_back(tiny, tmp_path, model_type):
    model = tiny(model_type)
    own = rope_of(model)
    pairing = (next(iter(own.values())) if isinstance(own, dict) else own).pairing
    set_rope(model, "rope-tv", theta=5e5, pairing=pairing)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        logits(loaded)
    set_rope(loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_model_with_a_pending_scheme_has_no_rope_yet(tiny, tmp_path, capsys, model_type):
    model = tiny(model_type)
    set_rope(model, "rope-tv")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for ask in (rope_of, use_kernels):
        with pytest.raises(ValueError, match="saved with a scheme that is not set yet"):
            ask(loaded)
    explain(loaded)
    assert "saved with a scheme that is not set yet" in capsys.readouterr().out


def test_unset_rope_restores_the_config(tiny):
    model = tiny("llama")
    before = dict(model.config.rope_parameters)
    handle = set_rope(model, "rope-tv", theta=5e5)
    assert model.config.rope_parameters["rope_mm"] == {"layout": "rope-tv", "theta": 5e5}
    handle.undo()
    assert model.config.rope_parameters == before


def test_setting_its_own_rope_does_not_change_the_config(tiny):
    model = tiny("llama")
    before = dict(model.config.rope_parameters)
    set_rope(model, rope_of(model))
    assert model.config.rope_parameters == before


def test_a_learned_omega_is_saved_and_loaded_with_the_model(tiny, tmp_path):
    model = tiny("llama")
    set_rope(model, "rope-tv", learnable=True)
    with torch.no_grad():
        model.model.rotary_emb.ropes[None].omega_param.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    set_rope(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_one_learned_omega_for_several_types_of_layers_is_refused(tiny):
    model = tiny("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(ValueError, match="give one Rotary for each"):
        set_rope(model, Rotary(16, "rope-tv", learnable=True))
    set_rope(model, Rotary(16, "rope-tv"))


def test_a_learned_omega_that_was_lost_is_refused(tiny, tmp_path):
    model = tiny("llama")
    set_rope(model, "rope-tv", learnable=True)
    model.config.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="was learned, but no"):
        set_rope(other)


def test_a_config_without_a_scheme_is_refused(tiny):
    with pytest.raises(ValueError, match="contains no scheme of rope_mm"):
        set_rope(tiny("llama"))


def test_the_scheme_is_written_in_tokens(tiny):
    model = tiny("llama")
    set_rope(model, SCHEMES["m-rope"])
    assert model.config.to_dict()["rope_parameters"]["rope_mm"]["axis_shares"] == (2, 3, 3)


def test_the_scheme_and_omega_of_a_model_that_had_none_are_saved_and_brought_back(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=16, patch_size=4)
    model, pixels = ViTModel(config).eval(), torch.randn(1, 3, 16, 16)
    set_rope(model, "rope-vit-mixed")
    with torch.no_grad():
        model.rope_mm.ropes[None].omega_param.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        loaded(pixels)
    set_rope(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(pixels)[0], model(pixels)[0])
    loaded.config._name_or_path = ""
    other = ViTModel(copy.deepcopy(loaded.config))
    with pytest.raises(ValueError, match="was learned, but no"):
        set_rope(other)
    assert not hasattr(other, "rope_mm")


def test_a_patched_model_shares_its_config_with_no_other_model(tiny):
    model = tiny("llama")
    other = type(model)(model.config)
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="its config holds the scheme of another model"):
        set_rope(other, "flat")
    unset_rope(model)
    set_rope(other, "flat")


def test_a_model_built_from_a_copy_of_a_patched_config_has_a_pending_scheme():
    model = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)).eval()
    pixels = torch.randn(1, 3, 224, 224)
    set_rope(model, "rope-vit-axial")
    other = ViTModel(copy.deepcopy(model.config)).eval()
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        other(pixels)
    set_rope(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(pixels)[0], model(pixels)[0])
    assert torch.equal(copy.deepcopy(model)(pixels)[0], model(pixels)[0])


def test_a_vision_tower_has_a_pending_scheme_until_unset_rope(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PixtralVisionModel(PixtralVisionConfig(**sizes, image_size=16, patch_size=4)).eval()
    pixels = torch.randn(1, 3, 16, 16)
    before = model(pixels)[0]
    handle = set_rope(model, "pixtral", theta=100.0)
    model.save_pretrained(tmp_path)
    loaded = PixtralVisionModel.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        loaded(pixels)
    set_rope(loaded)
    assert torch.equal(loaded(pixels)[0], model(pixels)[0])
    handle.undo()
    model.save_pretrained(tmp_path)
    assert torch.equal(PixtralVisionModel.from_pretrained(tmp_path)(pixels)[0], before)


def test_a_saved_scheme_does_not_load_without_rope_mm(tiny, tmp_path, monkeypatch):
    model = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    set_rope(model, "rope-vit-axial")
    model.save_pretrained(tmp_path / "vit")
    model = tiny("llama")
    set_rope(model, "rope-tv")
    model.save_pretrained(tmp_path / "llama")
    monkeypatch.delitem(AttentionInterface._global_mapping, "rope_mm")
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "rope_mm")
    with pytest.raises(ValueError, match='attn_implementation="rope_mm"` is not supported'):
        ViTModel.from_pretrained(tmp_path / "vit")
    with pytest.raises(KeyError, match="rope_mm"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama")


def llava():
    """A composite whose tower, CLIP's, has no rotary, and whose text has one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes = CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=20)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes, text_config=text, image_token_id=9)
    ).eval()


def qwen():
    """A composite whose tower has a rotary of its own."""
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 20}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=eyes, image_token_id=9, video_token_id=10)
    return Qwen2VLForConditionalGeneration(config).eval()


def seen(model):
    """Logits of four words and an image."""
    ids = torch.tensor([[1, 2, *[9] * (16 if model.config.model_type == "llava" else 4), 3, 4]])
    pixels = torch.linspace(-1, 1, 16 * 96).view(16, 96)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs["mm_token_type_ids"] = (ids == 9).int()
    if model.config.model_type == "llava":
        inputs = {"pixel_values": pixels.flatten()[:768].view(1, 3, 16, 16)}
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize(("make", "tower"), [(llava, "vision_tower"), (qwen, "visual")])
def test_a_composite_model_with_a_scheme_in_its_tower_alone_has_a_pending_scheme(
    tmp_path, make, tower, attention
):
    model = make()
    before = seen(model)
    set_rope(getattr(model.model, tower), "rope-vit-axial", theta=50.0, pairing="half", layout="grid")
    assert not torch.equal(seen(model), before)
    model.save_pretrained(tmp_path)
    told = {"attn_implementation": attention} if attention else {}
    loaded = type(model).from_pretrained(tmp_path, **told).eval()
    with pytest.raises(ValueError, match=r"call set_rope with that part"):
        seen(loaded)
    part = getattr(loaded.model, tower)
    with pytest.raises(ValueError, match=r"saved with a scheme|no module with inv_freq"):
        rope_of(part)
    set_rope(part)
    assert part.config._attn_implementation == (attention or "sdpa")
    assert torch.allclose(seen(loaded), seen(model), rtol=1e-4, atol=1e-5)
    assert attention or torch.equal(seen(loaded), seen(model))


@pytest.mark.parametrize(("make", "tower"), [(llava, "vision_tower"), (qwen, "visual")])
def test_explain_and_unset_rope_reach_every_part_of_a_composite_model(capsys, make, tower):
    model = make()
    before = seen(model)
    set_rope(model, "rope-tv")
    set_rope(getattr(model.model, tower), "rope-vit-axial", pairing="half", layout="grid")
    explain(model)
    said = capsys.readouterr().out
    assert "layout='rope-tv'" in said and "layout='grid'" in said
    unset_rope(model)
    assert torch.equal(seen(model), before)
    set_rope(getattr(model.model, tower), "rope-vit-axial", pairing="half", layout="grid")
    unset_rope(model)
    assert torch.equal(seen(model), before)


def test_the_learned_omega_of_a_tower_is_read_from_the_folder_that_it_names(tmp_path):
    model = qwen()
    set_rope(model.model.visual, "rope-vit-axial", pairing="half", layout="grid", learnable=True)
    with torch.no_grad():
        rope_of(model.model.visual).omega_param.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    tower = loaded.model.visual
    with pytest.raises(ValueError, match="set name_or_path of the model, or of the part"):
        set_rope(tower)
    tower.name_or_path = tmp_path
    set_rope(tower)
    assert torch.equal(seen(loaded), seen(model))


def test_each_of_several_learned_omegas_is_restored_to_its_own_module(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 20}
    sizes |= {f"{part}_num_hidden_layers": 1 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder")}
    model = MoonshineModel(MoonshineConfig(**sizes))
    set_rope(model, "flat", learnable=True, pairing="interleaved")
    parts = [model.encoder.rotary_emb, model.decoder.rotary_emb]
    with torch.no_grad():
        for by, part in enumerate(parts):
            part.ropes[None].omega_param.mul_(1.5 + by)
    model.save_pretrained(tmp_path)
    loaded = MoonshineModel.from_pretrained(tmp_path)
    set_rope(loaded)
    for mine, part in zip((loaded.encoder.rotary_emb, loaded.decoder.rotary_emb), parts, strict=True):
        assert torch.equal(mine.ropes[None].omega_param, part.ropes[None].omega_param)


def test_an_ambiguous_learned_omega_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    eyes = {**sizes, "image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=eyes))
    for part in (model.text_model, model.vision_model):
        set_rope(part, "rope-tv", learnable=True)
    model.save_pretrained(tmp_path)
    eye = CLIPModel.from_pretrained(tmp_path).vision_model
    eye.name_or_path = tmp_path
    with pytest.raises(ValueError, match=r"text_model.rope_mm.learned.*vision_model.rope_mm.learned"):
        set_rope(eye)
    model.vision_model.save_pretrained(tmp_path / "eye")
    eye.name_or_path = tmp_path / "eye"
    set_rope(eye)


def test_an_unavailable_attention_is_refused_and_the_scheme_stays_pending(tmp_path):
    model = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    set_rope(model, "rope-vit-axial")
    model.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path)
    loaded.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"ImportError.*; the model is as it was"):
        set_rope(loaded)
    assert not hasattr(loaded, "rope_mm")
    loaded.config._attn_implementation = "eager"
    set_rope(loaded)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_a_requested_attention_is_used_once_the_scheme_is_set(tmp_path, attention, later):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, pixels = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)), torch.randn(1, 3, 16, 16)
    set_rope(model, "rope-vit-axial")
    model.save_pretrained(tmp_path)
    asked = {"attn_implementation": attention} if attention and not later else {}
    loaded = ViTModel.from_pretrained(tmp_path, **asked)
    if attention and later:
        loaded.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        loaded(pixels)
    set_rope(loaded)
    assert loaded.config._attn_implementation == (attention or "sdpa")
    assert torch.allclose(loaded.eval()(pixels)[0], model.eval()(pixels)[0], atol=1e-5)
    unset_rope(loaded)
    unset_rope(model)
    assert torch.allclose(loaded(pixels)[0], model(pixels)[0], atol=1e-5)


def test_the_package_lists_its_names_and_a_handle_prints_in_a_line(tiny):
    import pydoc

    import rope_mm.hf

    listed = pydoc.render_doc(rope_mm.hf, renderer=pydoc.plaintext)
    names = {"set_rope", "unset_rope", "rope_of", "use_kernels", "positions_for", "explain", "Handle"}
    packing = {"PackingCollator", "PackingReport", "packed_equals_alone", "position_ids_of"}
    assert set(rope_mm.hf.__all__) == names | packing | {"ModelRope"}
    assert all(name in listed for name in names | packing)
    handle = set_rope(tiny("llama"), "rope-tv")
    said = str(handle)
    assert said.startswith("<Handle of LlamaForCausalLM, in 1 rotary module: ") and len(said) < 120
    handle.undo()
    assert ", undone: " in str(handle)


def test_an_undone_model_leaves_no_clone_of_its_attention_behind(tiny):
    def clones():
        return [name for name in sys.modules if ".LlamaAttention.forward." in name]

    gc.collect()
    before, handle = len(clones()), use_kernels(tiny("llama"))
    assert len(clones()) > before
    handle.undo()
    gc.collect()
    assert len(clones()) == before


def test_a_loaded_model_that_is_undone_has_its_own_rope(tiny, tmp_path):
    model = tiny("llama")
    before, config = logits(model), model.config.to_dict()
    set_rope(model, "rope-tv")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    set_rope(loaded)
    unset_rope(loaded)
    assert torch.equal(logits(loaded), before)
    assert loaded.config.rope_parameters == config["rope_parameters"]


def gpt_neox():
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(**sizes, vocab_size=97, rope_parameters=rope, initializer_range=0.2)
    return GPTNeoXForCausalLM(config).eval()


def test_as_many_pairs_are_rotated_after_loading_as_before(tmp_path):
    model = gpt_neox()
    set_rope(model, "rope-tv")
    omega = rope_of(model).omega.shape
    model.save_pretrained(tmp_path)
    loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    set_rope(loaded)
    assert rope_of(loaded).omega.shape == omega
    assert torch.equal(logits(loaded), logits(model))


def phi3():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    ids = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**sizes, **ids, max_position_embeddings=64)).eval()


def test_a_scheme_that_the_config_class_refuses_is_saved_beside_its_rope_parameters(tmp_path):
    model = phi3()
    model.save_pretrained(tmp_path)
    before = model.config.to_dict()
    handle = set_rope(model, "rope-tv")
    model.save_pretrained(tmp_path)
    loaded = Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"Call rope_mm.hf.set_rope\(model\) before it runs"):
        logits(loaded)
    set_rope(loaded)
    assert torch.equal(logits(loaded), logits(model))
    handle.undo()
    assert model.config.to_dict() == before


def test_saving_and_loading_a_scheme_logs_no_warning(tiny, tmp_path, caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        for model in (tiny("llama"), ViTModel(ViTConfig(hidden_size=32, num_attention_heads=2))):
            set_rope(model, "rope-tv" if model.config.model_type == "llama" else "rope-vit-axial")
            model.save_pretrained(tmp_path)
            set_rope(type(model).from_pretrained(tmp_path))
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert "rope" not in caplog.text


TRACES = """
from transformers import PreTrainedConfig, ViTConfig, ViTModel
before = dict(vars(PreTrainedConfig))
import rope_mm.hf
assert dict(vars(PreTrainedConfig)) == before
model = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32))
handle = rope_mm.hf.set_rope(model, "rope-vit-axial")
assert dict(vars(PreTrainedConfig)) != before
handle.undo()
assert dict(vars(PreTrainedConfig)) == before
"""


def test_configs_of_other_models_do_not_change_at_import_and_after_the_last_undo():
    subprocess.run([sys.executable, "-c", TRACES], check=True)
