"""Transformers of diffusers under their own rope and under others, against tables made without rope_mm.hf."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from rope_mm import Rotary, place
from rope_mm.analysis.markdown import round_up
from rope_mm.hf import explain, rope_of, set_rope, unset_rope
from rope_mm.schemes.extensions import NTK, YaRN
from rope_mm.schemes.scheme import Scheme

embeddings = pytest.importorskip("diffusers.models.embeddings")
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

WORDS = 5
# what stands in the tiny models' sequences, in the order in which layouts other than their own place it
VIDEO = "video:3x4x3"
SEGMENTS = {
    "Flux": f"text:{WORDS} image:4x3",
    "Flux2": f"text:{WORDS} image:4x3 image:2x3",
    "Flux3": f"text:{WORDS} image:4x3",
    "CogView4": "image:4x3",
    "GLM-Image": "image:4x3",
    "Krea 2": f"text:{WORDS} image:4x3",
    "Cosmos": VIDEO,
    "Wan": VIDEO,
    "SANA-Video": VIDEO,
    "HunyuanVideo": VIDEO,
    "Qwen-Image": f"text:{WORDS} image:4x3 image:2x3",
    "LTX": VIDEO,
    "CogVideoX 1.0": "video:4x4x3",
    "CogVideoX 1.5": "video:2x4x3",
}
HALVES = ("Cosmos", "CogView4", "GLM-Image")  # whose tables pair a channel with that in the other half


@torch.no_grad()
def run(model, inputs):
    """All that a forward returns, in one row."""
    return torch.cat([x.flatten() for x in tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)])


def other_theta(rope):
    """Changes that give a model's own scheme another theta."""
    return {"freq_range": (1.0, 50.0)} if rope.scheme.layout == "ltx" else {"theta": 50.0}


def test_a_model_is_unchanged_to_the_bit_by_its_own_rope_and_after_undo(tiny_diffusers, any_diffusers):
    model, inputs = tiny_diffusers(any_diffusers)
    before, keys = run(model, inputs), list(model.state_dict())
    rope = rope_of(model)
    assert rope.error == 0
    handle = set_rope(model, rope)
    assert torch.equal(run(model, inputs), before)
    handle.undo()
    set_rope(model, rope.scheme, **other_theta(rope))
    changed = (run(model, inputs) - before).abs().max() / before.abs().max()
    unset_rope(model)
    assert changed > 1e-3
    assert torch.equal(run(model, inputs), before)
    assert list(model.state_dict()) == keys and "rope_mm" not in dict(model.named_children())


def test_exact_angles_of_its_own_scheme_change_a_model_by_rounding_alone(
    tiny_diffusers, any_diffusers, diffusers_rows
):
    model, inputs = tiny_diffusers(any_diffusers)
    before, rope = run(model, inputs), rope_of(model)
    set_rope(model, rope)
    own = (run(model, inputs) - before).abs().max().item()
    unset_rope(model)
    set_rope(model, rope.scheme)
    off = ((run(model, inputs) - before).abs().max() / before.abs().max()).item()
    # LTX makes angles of up to 15708 radians in float32
    assert off <= (1e-4 if any_diffusers == "LTX" else 2e-5)
    kind = f"`{type(model).__name__}`"
    diffusers_rows[any_diffusers] = kind, f"`{rope.scheme.layout}`", round_up(own), round_up(off)


def test_the_page_has_a_row_for_each_transformer_of_diffusers_that_is_served(diffusers_page):
    rows, names = diffusers_page
    assert [row[0] for row in rows] == names, "write it anew: pytest tests/hf --write-families"
    assert {row[-2] for row in rows} == {"0"}


def doubled(scheme, p, head_dim):
    """Cosine and sine (s, d) in float64 at positions (s, a), neighbouring channels alike, in float32."""
    angle = p.double() @ scheme.omega(head_dim)
    return [
        (scheme.attention_scaling * f(angle)).repeat_interleave(2, -1).float() for f in (torch.cos, torch.sin)
    ]


def phases(scheme, p, head_dim):
    """Complex numbers (s, r) at positions (s, a)."""
    angle = p.double() @ scheme.omega(head_dim)
    return torch.polar(torch.ones_like(angle), angle)


def impose(name, model, inputs, scheme, p):
    """Let an unpatched model rotate by positions (s, a) of its tokens, through its own parts alone."""
    d = getattr(model.config, "attention_head_dim", 24)
    if name == "Qwen-Image":
        images, text = (phases(scheme, part, d).to(torch.complex64) for part in (p[WORDS:], p[:WORDS]))
        model.pos_embed.forward = lambda *_, **__: (images, text)
        return inputs
    cos, sin = doubled(scheme, p, d)
    if name == "Flux":
        model.pos_embed.forward = lambda ids: (cos, sin)
    elif name in ("Flux2", "Flux3"):
        model.pos_embed.forward = lambda ids: (
            (cos[:WORDS], sin[:WORDS]) if len(ids) == WORDS else (cos[WORDS:], sin[WORDS:])
        )
    elif name == "Krea 2":
        model.rotary_emb.forward = lambda ids: (cos, sin)
    elif name in HALVES:
        halves = [x[:, ::2].repeat(1, 2) for x in (cos, sin)]
        model.rope.forward = lambda latents, *_, **__: halves
    elif name in ("Wan", "SANA-Video"):
        model.rope.forward = lambda latents: (cos[None, :, None], sin[None, :, None])
    elif name == "HunyuanVideo":
        model.rope.forward = lambda latents: (cos, sin)
    elif name == "LTX":
        wide = [x.repeat(1, model.config.num_attention_heads)[None] for x in (cos, sin)]
        model.rope.forward = lambda x, *_: [table.expand(len(x), -1, -1) for table in wide]
    else:
        return inputs | {"image_rotary_emb": (cos, sin)}
    return inputs


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("scheme", ["rope-tv", "local"])
def test_a_scheme_of_another_layout_gives_what_its_tables_in_float64_give(tiny_diffusers, name, scheme):
    model, inputs = tiny_diffusers(name)
    truth = copy.deepcopy(model)
    handle = set_rope(model, scheme)
    out, own = run(model, inputs), handle.slots[0][0].rope.scheme
    assert own.pairing == ("half" if name in HALVES else "interleaved")
    p, _ = place(SEGMENTS[name], own.layout)
    expected = run(truth, impose(name, truth, inputs, own, p))
    assert (out - expected).abs().max() <= 1e-6 * expected.abs().max()


def captioned(scheme, words, image, length):
    """Complex numbers (length, r) of an image behind words, and of padding at 0."""
    p, _ = place(f"text:{words} {image}", scheme.layout)
    return torch.cat((p[words:], p.new_zeros(length - len(p) + words, len(scheme.axes))))


def test_z_image_places_each_image_behind_its_caption(tiny_diffusers):
    model, inputs = tiny_diffusers("Z-Image")
    truth, handle = copy.deepcopy(model), set_rope(model, "rope-tv")
    scheme, table = handle.slots[0][0].rope.scheme, partial(phases, head_dim=24)
    images = torch.cat([captioned(scheme, 32, "image:4x3", 32), captioned(scheme, 64, "image:2x3", 32)])
    counted, still = place("text:64", scheme.layout)[0], torch.zeros(1, 3, dtype=torch.float64)
    captions = torch.cat((counted[:32], still.expand(27, -1), counted, still.expand(24, -1)))
    truth.rope_embedder = lambda ids: table(scheme, images if len(ids) == len(images) else captions).to(
        torch.complex64
    )
    expected = run(truth, inputs)
    assert (run(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_lumina2_places_the_image_of_each_row_behind_its_own_caption(tiny_diffusers):
    model, inputs = tiny_diffusers("Lumina2")
    truth, handle = copy.deepcopy(model), set_rope(model, "rope-tv")
    scheme = handle.slots[0][0].rope.scheme
    rows = [place(f"text:{words} image:4x3", scheme.layout)[0] for words in (5, 3)]
    p = torch.stack([torch.cat((row, row.new_zeros(17 - len(row), 3))) for row in rows])
    truth.rope_embedder._get_freqs_cis = lambda ids: phases(scheme, p, 24)
    expected = run(truth, inputs)
    assert (run(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def rebuilt(name, model, inputs):
    """A model's own class of tables, made again with theta 50."""
    part = model.rope if hasattr(model, "rope") else getattr(model, "pos_embed", None)
    kind = type(part)
    if name.startswith("CogVideoX"):
        make, embedded = embeddings.get_3d_rotary_pos_embed, {}
        given = {"1.0": {"crops_coords": ((0, 3), (8, 9))}}.get(name[-3:])
        embedded = given or {"grid_type": "slice", "max_size": (4, 3), "crops_coords": None}
        frames = 4 if given else 2
        tables = make(16, grid_size=(4, 3), temporal_size=frames, theta=50.0, **embedded)
        return inputs | {"image_rotary_emb": tables}
    if name in ("Wan", "SkyReels-V2", "SANA-Video"):
        model.rope = kind(24, (1, 2, 2), 32, theta=50.0)
    elif name == "HunyuanVideo":
        model.rope = kind(2, 1, (4, 8, 12), theta=50.0)
    elif name == "Qwen-Image":
        model.pos_embed = kind(theta=50.0, axes_dim=part.axes_dim, scale_rope=True)
    elif name in ("Flux", "Flux2", "Flux3"):
        model.pos_embed = kind(theta=50.0, axes_dim=part.axes_dim)
    elif name == "Krea 2":
        model.rotary_emb = type(model.rotary_emb)(theta=50.0, axes_dim=model.rotary_emb.axes_dim)
    elif name in ("LTX", "CogView4", "GLM-Image"):
        model.rope.theta = 50.0
    else:
        kind = type(model.rope_embedder)
        model.rope_embedder = kind(50.0, [8, 8, 8], [128, 32, 32])
    return inputs


REBUILT = [name for name in SEGMENTS if name != "Cosmos"]  # whose theta is fixed in its code


@pytest.mark.parametrize("name", [*REBUILT, "SkyReels-V2", "Z-Image", "Lumina2"])
def test_another_theta_gives_what_the_original_code_gives_with_it(tiny_diffusers, name):
    model, inputs = tiny_diffusers(name)
    truth = copy.deepcopy(model)
    rope = rope_of(model)
    set_rope(model, rope.scheme, **other_theta(rope))
    expected = run(truth, rebuilt(name, truth, inputs))
    assert (run(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "extensions",
    [(NTK(factor=4.0, axes=("y", "x")),), (YaRN(factor=4.0, original_max_positions=8),)],
)
def test_extensions_for_larger_images_change_flux_as_their_omega_and_factor_say(tiny_diffusers, extensions):
    model, inputs = tiny_diffusers("Flux", 9, 11)
    truth, scheme = copy.deepcopy(model), rope_of(model).scheme.replace(extensions=extensions)
    assert not torch.equal(scheme.omega(24), rope_of(model).scheme.omega(24))
    set_rope(model, scheme)
    p = torch.cat((inputs["txt_ids"], inputs["img_ids"]))
    expected = run(truth, impose("Flux", truth, inputs, scheme, p))
    assert (run(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_ids_of_a_pipeline_are_positions_fractions_included(tiny_diffusers, shift):
    """As where one image is drawn at another resolution, or beside a reference."""
    model, inputs = tiny_diffusers("Flux")
    inputs["img_ids"] = inputs["img_ids"] * 0.75 + torch.tensor([1.0, shift, -3.0])
    truth, scheme = copy.deepcopy(model), rope_of(model).scheme.replace(theta=50.0)
    set_rope(model, scheme)
    p = torch.cat((inputs["txt_ids"], inputs["img_ids"]))
    expected = run(truth, impose("Flux", truth, inputs, scheme, p))
    assert (run(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_wan_cast_to_bfloat16_keeps_its_cast_tables_under_its_own_rope_and_loses_them_under_a_scheme(
    tiny_diffusers,
):
    model, inputs = tiny_diffusers("Wan")
    model.to(torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    before, rope = run(model, inputs), rope_of(model)
    assert rope.cast == torch.bfloat16 and rope.error == 0
    handle = set_rope(model, rope)
    assert torch.equal(run(model, inputs), before)
    handle.undo()
    set_rope(model, rope.scheme)
    assert all(table.dtype == torch.float32 for table in model.rope(inputs["hidden_states"]))


@pytest.mark.parametrize("name", ["Flux", "Wan", "LTX"])
def test_a_learned_omega_is_a_parameter_and_gets_gradients_through_checkpointing(tiny_diffusers, name):
    model, inputs = tiny_diffusers(name)
    set_rope(model, rope_of(model).scheme, learnable=True)
    (key,) = [key for key, _ in model.named_parameters() if "omega" in key]
    assert key == "rope_mm.learned.0.omega_param" and key in model.state_dict()
    grads = []
    for checkpointed in (False, True):
        model.train().zero_grad()
        model.enable_gradient_checkpointing() if checkpointed else None
        model(**inputs)[0].square().mean().backward()
        grads.append(model.rope_mm.learned[0].omega_param.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_patched_model_is_patched_and_undone_apart_from_it(tiny_diffusers):
    model, inputs = tiny_diffusers("Z-Image")
    before = run(model, inputs)
    set_rope(model, "rope-tv", learnable=True)
    after, twin = run(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        twin.rope_mm.learned[0].omega_param.zero_()
    assert torch.equal(run(model, inputs), after) and not torch.equal(run(twin, inputs), after)
    unset_rope(twin)
    assert torch.equal(run(twin, inputs), before) and torch.equal(run(model, inputs), after)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Flux", "Wan", "Qwen-Image"])
def test_one_graph_serves_a_scheme_of_the_models_own_layout_and_another_breaks_it(tiny_diffusers, name):
    model, inputs = tiny_diffusers(name)
    for fullgraph, scheme in ((True, rope_of(model).scheme), (False, "rope-tv")):
        set_rope(model, scheme)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=fullgraph, backend=counter)
        assert torch.equal(run(compiled, inputs), run(model, inputs))
        assert (counter.frame_count == 1) == fullgraph
        unset_rope(model)


def test_explain_says_what_runs_and_who_places_the_tokens(tiny_diffusers, capsys):
    model, _ = tiny_diffusers("HunyuanVideo")
    explain(model)
    set_rope(model, "rope-tv")
    explain(model)
    own, other = capsys.readouterr().out.splitlines()
    assert own.startswith("rope: the model's own, bit for bit (Scheme(layout='flux'")
    assert "positions by model and pipeline; text is not rotated" in own
    assert "exact angles; positions by layout 'rope-tv'" in other


def test_a_handle_prints_what_it_put_in(tiny_diffusers):
    model, _ = tiny_diffusers("Flux")
    handle = set_rope(model, Rotary(24, Scheme(layout="rope-tv", pairing="interleaved")))
    assert "in 1 rotary module: Scheme(layout='rope-tv'" in repr(handle)
    handle.undo()
    assert "undone" in repr(handle)


def flux_pipeline(diffusers, transformer):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 32), **blocks)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.FluxPipeline(vae=vae, scheduler=scheduler, transformer=transformer, **parts)
    pipeline.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.randn(1, WORDS, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return partial(pipeline, **prompt, height=32, width=24, num_inference_steps=2, output_type="latent")


def test_a_pipeline_generates_the_same_image_under_the_models_own_rope_and_another_under_a_scheme(
    tiny_diffusers,
):
    diffusers = pytest.importorskip("diffusers")
    config = dict(tiny_diffusers("Flux")[0].config) | {"in_channels": 16, "out_channels": None}
    model = diffusers.FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    pipeline = flux_pipeline(diffusers, model)

    def generate():
        return pipeline(generator=torch.Generator().manual_seed(0)).images

    before, handle = generate(), set_rope(model, rope_of(model))
    assert torch.equal(generate(), before)
    handle.undo()
    set_rope(model, "rope-tv")
    assert (generate() - before).abs().max() > 1e-3
