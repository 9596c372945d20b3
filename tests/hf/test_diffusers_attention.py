"""SD3, which has no rotary, under schemes: against queries and keys rotated in front of torch's attention."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from rope_mm import Rotary, place
from rope_mm.hf import explain, rope_of, set_rope, unset_rope
from rope_mm.schemes.extensions import DynamicNTK, YaRN
from rope_mm.schemes.scheme import Scheme

diffusers = pytest.importorskip("diffusers")

WORDS, LONGER = 5, DynamicNTK(factor=2.0, original_max_positions=8)
SD3, SD35 = {}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
SIZES = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32,
         "pooled_projection_dim": 32, "pos_embed_max_size": 16}  # fmt: skip


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {"hidden_states": torch.randn(2, 4, 8, 6), "encoder_hidden_states": torch.randn(2, WORDS, 32),
            "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([7.0, 9.0]),
            "return_dict": False}  # fmt: skip


def sd3(config):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SIZES, **config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def rotated(x, p, scheme):
    """Heads (b, h, s, d) at positions (s, a), the halves of a head paired, in float64."""
    angle = p.double() @ scheme.omega(x.shape[-1])
    first, second = x.double().chunk(2, -1)
    cos, sin = (scheme.attention_scaling * f(angle) for f in (torch.cos, torch.sin))
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x)


def run_rotated(model, inputs, scheme):
    """A model without our hooks, whose q and k of the image, and then of the text, are rotated at last."""
    p, attend = (
        place(f"text:{WORDS} image:4x3", scheme.layout)[0],
        torch.nn.functional.scaled_dot_product_attention,
    )
    p = torch.cat((p[WORDS:], p[:WORDS]))

    def attention(query, key, value, **more):
        q, k = (rotated(x, p[: x.shape[2]], scheme) for x in (query, key))
        return attend(q, k, value, **more)

    with patch("torch.nn.functional.scaled_dot_product_attention", attention):
        return run(model, inputs)


@pytest.mark.parametrize("config", [SD3, SD35])
@pytest.mark.parametrize("extensions", [(), (YaRN(factor=4.0, original_max_positions=8),)])
def test_sd3_rotates_text_and_image_by_the_scheme_in_joint_and_dual_attention(inputs, config, extensions):
    model = sd3(config)
    before, truth, scheme = (
        run(model, inputs),
        copy.deepcopy(model),
        Scheme(layout="rope-tv", extensions=extensions),
    )
    handle = set_rope(model, scheme)
    out, expected = run(model, inputs), run_rotated(truth, inputs, scheme)
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max() < (out - before).abs().max()
    handle.undo()
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("config", [SD3, SD35])
def test_a_zero_omega_changes_nothing(inputs, config):
    model, rope = sd3(config), Rotary(16, "rope-tv", learnable=True)
    nn.init.zeros_(rope.omega_param)
    before = run(model, inputs)
    set_rope(model, rope)
    assert torch.equal(run(model, inputs), before)


def test_a_learned_omega_gets_the_same_gradients_through_checkpointing(inputs):
    model, grads = sd3(SD35), []
    set_rope(model, "rope-tv", learnable=True, per_head=True)
    for checkpointed in (False, True):
        model.train().zero_grad()
        model.enable_gradient_checkpointing() if checkpointed else None
        small = inputs | {"hidden_states": inputs["hidden_states"][..., :4]}
        (model(**inputs)[0].square().mean() + model(**small)[0].square().mean()).backward()
        grads.append(model.rope_mm.learned[0].omega_param.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_explain_and_rope_of_say_that_there_is_no_rotary_until_one_is_set(capsys):
    model = sd3(SD35)
    explain(model)
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no rotary; give it one by set_rope"):
        rope_of(model)
    set_rope(model, "rope-tv")
    explain(model)
    before, after = capsys.readouterr().out.splitlines()
    assert before == "SD3Transformer2DModel has no rotary; give it one by set_rope"
    assert after.startswith("3 attention modules: Scheme(layout='rope-tv'), exact angles")
    assert rope_of(model).scheme.layout == "rope-tv"


def test_processors_put_in_later_and_layers_left_out_do_not_hide_that_attention_is_not_rotated(inputs):
    model = sd3(SD3)
    set_rope(model, "rope-tv")
    assert run(model, inputs | {"skip_layers": [0]}).isfinite().all()
    model.set_attn_processor(diffusers.models.attention_processor.JointAttnProcessor2_0())
    with pytest.raises(ValueError, match="0 of 2 attention modules of SD3Transformer2DModel rotated"):
        run(model, inputs)


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (Rotary(32, "rope-tv"), "needs that head_dim, not 32"),
        (
            Scheme(layout="flat", extensions=(LONGER,)),
            "fixed factor",
        ),
        (None, "no scheme is saved with"),
    ],
)
def test_a_rotary_that_does_not_fit_is_refused(scheme, match):
    model = sd3(SD3)
    with pytest.raises(ValueError, match=match):
        set_rope(model, scheme)
    with pytest.raises(ValueError, match="has no rope of ours to take back"):
        unset_rope(model)


def test_a_processor_that_is_not_known_is_refused():
    model = sd3(SD3)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="FusedJointAttnProcessor2_0 may not norm queries and keys last"):
        set_rope(model, "rope-tv")


def test_the_scheme_of_sd3_is_saved_in_its_config(inputs, tmp_path):
    model = sd3(SD3)
    set_rope(model, "rope-tv", theta=50.0)
    model.save_pretrained(tmp_path)
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path).eval()
    set_rope(loaded)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
