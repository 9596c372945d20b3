"""What transformers of diffusers cannot run is refused with the reason, and leaves the model as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rope_mm import Rotary
from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope, use_kernels
from rope_mm.schemes.extensions import DynamicNTK, YaRN
from rope_mm.schemes.scheme import Scheme

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

YARN = YaRN(factor=4.0, original_max_positions=8)
SQUARE = Scheme(layout="rope-tv", pairing="interleaved")


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        ("UNet1DModel", {"block_out_channels": (32,), "down_block_types": ("DownBlock1D",),
                         "up_block_types": ("UpBlock1D",), "mid_block_type": "UNetMidBlock1D"},
         "UNet1DModel has no part that is known to make tables"),
        ("OmniGenTransformer2DModel", {"in_channels": 4, "hidden_size": 48, "num_attention_heads": 2,
                                       "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 1,
                                       "pad_token_id": 0, "vocab_size": 9,
                                       "rope_scaling": {"short_factor": [1.0], "long_factor": [1.0]}},
         "rotates by OmniGenSuScaledRotaryEmbedding, and is not served"),
        ("CogVideoXTransformer3DModel", {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1,
                                         "text_embed_dim": 8, "time_embed_dim": 8},
         "adds position embeddings to its tokens and rotates nothing"),
    ],
)  # fmt: skip
def test_a_model_without_known_tables_is_refused_by_name(kind, config, match):
    model = getattr(diffusers, kind)(**config)
    for ask in (rope_of, lambda model: set_rope(model, "rope-tv")):
        with pytest.raises(ValueError, match=match):
            ask(model)
    with pytest.raises(ValueError, match="has no rope of ours to take back"):
        unset_rope(model)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("black-forest-labs/FLUX.1-dev", "not the string 'black-forest-labs/FLUX.1-dev'; load it first"),
        (SimpleNamespace(transformer=nn.Linear(1, 1)), "give its transformer, pipeline.transformer"),
        (None, "not NoneType"),
        ({"config": 1}, "not dict"),
        (SimpleNamespace(_orig_mod=nn.Linear(1, 1)), "give what was compiled, model._orig_mod"),
    ],
)
def test_what_is_no_model_is_refused_by_every_function(given, match):
    for function in (lambda model: set_rope(model, "flat"), rope_of, unset_rope, use_kernels):
        with pytest.raises(ValueError, match=match):
            function(given)


@pytest.mark.parametrize(
    ("name", "scheme", "match"),
    [
        ("Flux", "golden-gate", "has an Omega for each head"),
        (
            "Flux",
            SQUARE.replace(pairing="half"),
            "pairs channels 'half', but the weights are for 'interleaved'",
        ),
        ("Flux", SQUARE.replace(fraction=0.5), "leaves channels without a place"),
        (
            "Flux",
            SQUARE.replace(extensions=(DynamicNTK(factor=2.0, original_max_positions=8),)),
            "depends on the length",
        ),
        ("Flux", Rotary(32, SQUARE), "needs that head_dim, not 32"),
        ("Flux", None, "no scheme is saved with FluxTransformer2DModel"),
        ("Flux", "no-such-scheme", "scheme 'no-such-scheme' is unknown"),
        (
            "HunyuanVideo",
            SQUARE.replace(extensions=(YARN,)),
            "does not rotate its text, whose scores would stay",
        ),
        ("CogVideoX 1.0", SQUARE.replace(extensions=(YARN,)), "give the extension attention_factor=1"),
    ],
)
def test_a_scheme_that_tables_cannot_express_is_refused(tiny_diffusers, name, scheme, match):
    model, _ = tiny_diffusers(name)
    with pytest.raises(ValueError, match=match):
        set_rope(model, scheme)
    assert "rope_mm" not in dict(model.named_children()) and rope_of(model).error == 0


def test_a_rope_of_another_family_is_refused_and_a_second_one_too(tiny_diffusers):
    model, _ = tiny_diffusers("Flux")
    with pytest.raises(ValueError, match="read from another kind of model than FluxTransformer2DModel"):
        set_rope(model, rope_of(tiny_diffusers("Flux2")[0]))
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="has a rope of ours already; `unset_rope` it first"):
        set_rope(model, "grid")


@pytest.mark.parametrize("change", [lambda ids: ids * 2, lambda ids: ids + 1, lambda ids: ids.flip(0)])
def test_ids_that_are_no_grid_are_placed_by_the_models_own_layout_alone(tiny_diffusers, change):
    model, inputs = tiny_diffusers("Flux")
    inputs["img_ids"] = change(inputs["img_ids"])
    handle = set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="no images of rows and columns counted from 0"):
        model(**inputs)
    handle.undo()
    set_rope(model, rope_of(model).scheme, theta=50.0)
    assert model(**inputs)[0].isfinite().all()


def test_keys_of_reference_images_that_flux2_keeps_are_refused_under_another_layout(tiny_diffusers):
    model, inputs = tiny_diffusers("Flux2")
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="leave kv_cache_mode at None"):
        model(**inputs, kv_cache_mode="extract", num_ref_tokens=6)


def test_reference_images_of_flux3_are_refused_under_another_layout(tiny_diffusers):
    model, inputs = tiny_diffusers("Flux3")
    ids = inputs["img_ids"].clone()
    ids[:, 0] = 1
    more = {"image_cond_hidden_states": inputs["hidden_states"], "image_cond_ids": ids}
    before = model(**inputs, **more)[0]
    handle = set_rope(model, rope_of(model))
    assert torch.equal(model(**inputs, **more)[0], before)
    handle.undo()
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="image_cond_ids are positions of reference images"):
        model(**inputs, **more)


def test_coordinates_of_ltx_are_refused_under_another_layout(tiny_diffusers):
    model, inputs = tiny_diffusers("LTX")
    inputs["video_coords"] = torch.rand(2, 3, 36)
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="give num_frames, height and width"):
        model(**inputs)


@pytest.mark.parametrize(
    ("tables", "match"),
    [(lambda cos, sin: None, "was given no image_rotary_emb"),
     (lambda cos, sin: (sin, cos), "is not what Scheme"),
     (lambda cos, sin: (cos[1:], sin[1:]), "is not what Scheme")],
)  # fmt: skip
def test_tables_of_cogvideox_that_are_not_its_pipelines_are_refused(tiny_diffusers, tables, match):
    model, inputs = tiny_diffusers("CogVideoX 1.0")
    inputs["image_rotary_emb"] = tables(*inputs["image_rotary_emb"])
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match=match):
        model(**inputs)


def test_a_forward_that_asks_for_no_tables_is_refused_instead_of_running_without_the_scheme(tiny_diffusers):
    model, inputs = tiny_diffusers("Flux")
    set_rope(model, "rope-tv")
    model.pos_embed = type(model.pos_embed)(theta=50.0, axes_dim=model.pos_embed.axes_dim)
    with pytest.raises(ValueError, match="asked for no tables, so the scheme had no effect"):
        model(**inputs)


def test_set_rope_comes_before_what_replaces_the_forward_of_the_rotary_module(tiny_diffusers):
    model, _ = tiny_diffusers("Wan")
    model.rope.forward = lambda latents: None
    with pytest.raises(ValueError, match="call set_rope before it"):
        set_rope(model, "rope-tv")


def test_tables_on_the_meta_device_are_refused(tiny_diffusers):
    with torch.device("meta"):
        model, _ = tiny_diffusers("Wan")
    with pytest.raises(ValueError, match="load the weights first"):
        rope_of(model)


def test_functions_for_transformers_alone_say_so_of_a_model_of_diffusers(tiny_diffusers):
    model, _ = tiny_diffusers("Flux")
    with pytest.raises(ValueError, match="rotates by its own function"):
        use_kernels(model)
    with pytest.raises(ValueError, match="not FluxTransformer2DModel"):
        positions_for(model, ["text:2"])


def test_samples_of_several_sizes_in_a_batch_of_qwen_image_are_refused(tiny_diffusers):
    model, inputs = tiny_diffusers("Qwen-Image")
    set_rope(model, rope_of(model))
    inputs["img_shapes"] = [[(1, 4, 3), (1, 2, 3)], [(1, 3, 4), (1, 2, 3)]]
    with pytest.raises(ValueError, match="would all get the positions of the first one"):
        model(**inputs)
