"""Our schemes against diffusers: its positions, its tables, and q and k as its attention gets them.

The fixture `ours` compares them; `test_diffusers_newer` has the models of 2026.
"""

from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers.models import attention_processor as shared
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers import transformer_cosmos as cosmos
from diffusers.models.transformers import transformer_flux as flux
from diffusers.models.transformers import transformer_flux2 as flux2
from diffusers.models.transformers import transformer_hunyuan_video as hunyuan
from diffusers.models.transformers import transformer_ltx as ltx
from diffusers.models.transformers import transformer_lumina2 as lumina2
from diffusers.models.transformers import transformer_qwenimage as qwen_image
from diffusers.models.transformers import transformer_wan as wan
from diffusers.models.transformers import transformer_z_image as z_image
from diffusers.models.transformers.transformer_mochi import MochiRoPE
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_mm import Image, Text, Video
from rope_mm.rotary.definition import cos_sin

HEADS = 2
SIZES = st.integers(1, 6)
few = settings(max_examples=10, deadline=None)
# originals that make angles in float64, and those that round angles of up to 40 radians to float32; q and k
# are of up to 5
DOUBLE, SINGLE = 1e-6, 1e-5


@few
@given(words=SIZES, y=SIZES, x=SIZES)
def test_flux(ours, words, y, x):
    mine = ours("flux", 128, [Text(words), Image(y, x)])
    image = FluxPipeline._prepare_latent_image_ids(1, y, x, "cpu", torch.float32)
    ids = torch.cat((torch.zeros(words, 3), image))
    mine.same_positions("FluxPipeline", ids)
    tables = flux.FluxPosEmbed(theta=10_000, axes_dim=[16, 56, 56])(ids)
    mine.same_table("FluxPosEmbed", tables, DOUBLE)
    mine.same_turn(flux.FluxAttnProcessor(), DOUBLE, image_rotary_emb=tables)


@few
@given(words=SIZES, y=SIZES, x=SIZES, guides=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3))
def test_flux2_with_images_as_guides(ours, words, y, x, guides):
    mine = ours("flux2", 128, [Text(words), Image(y, x), *(Image(*size) for size in guides)])
    text = Flux2Pipeline._prepare_text_ids(torch.empty(1, words, 1))
    image = Flux2Pipeline._prepare_latent_ids(torch.empty(1, 1, y, x))
    others = Flux2Pipeline._prepare_image_ids([torch.empty(1, 1, *size) for size in guides])
    ids = torch.cat((text, image, others), 1)[0]
    mine.same_positions("Flux2Pipeline", ids)
    tables = flux2.Flux2PosEmbed(theta=2000, axes_dim=[32] * 4)(ids)
    mine.same_table("Flux2PosEmbed", tables, DOUBLE)
    mine.same_turn(flux2.Flux2AttnProcessor(), DOUBLE, image_rotary_emb=tables)


@few
@given(t=SIZES, y=SIZES, x=SIZES, words=SIZES)
def test_hunyuan_video(ours, t, y, x, words):
    mine = ours("hunyuan-video", 128, [Text(words), Video(t, y, x)])
    tables = hunyuan.HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.empty(1, 1, t, 2 * y, 2 * x))
    mine.same_table("HunyuanVideoRotaryPosEmbed", tables, SINGLE)
    text = {"words": words, "words_last": True}
    mine.same_turn(hunyuan.HunyuanVideoAttnProcessor2_0(), SINGLE, image_rotary_emb=tables, **text)


@few
@given(t=SIZES, y=SIZES, x=SIZES)
def test_wan(ours, t, y, x):
    mine = ours("wan", 128, [Video(t, y, x)])
    tables = wan.WanRotaryPosEmbed(128, (1, 2, 2), 64)(torch.empty(1, 1, t, 2 * y, 2 * x))
    mine.same_table("WanRotaryPosEmbed", [table[0, :, 0] for table in tables], DOUBLE)
    mine.same_turn(wan.WanAttnProcessor(), DOUBLE, rotary_emb=tables)


@few
@given(t=SIZES, y=SIZES, x=SIZES, extent=st.tuples(st.integers(1, 40), st.integers(1, 40)), words=SIZES)
def test_cogvideox_stretches_every_video_to_one_extent(ours, t, y, x, extent, words):
    options = (("y", extent[0]), ("x", extent[1]))
    mine = ours("cogvideox", 64, [Text(words), Video(t, y, x)], options=options)
    tables = get_3d_rotary_pos_embed(64, ((0, 0), extent), (y, x), t)
    mine.same_table("get_3d_rotary_pos_embed", tables, SINGLE)
    mine.same_turn(shared.CogVideoXAttnProcessor2_0(), SINGLE, image_rotary_emb=tables, words=words)


@few
@given(t=SIZES, scale=st.integers(1, 3))
def test_cogvideox_as_its_pipelines_ask_for_it(ours, t, scale):
    segments = [Video(t, 2 * scale, 3 * scale)]
    first, counting = (
        ours("cogvideox", 64, segments),
        ours("cogvideox", 64, segments, layout="grid", options=()),
    )
    for mine, frames, version in ((first, None, "1.0"), (counting, 1, "1.5")):
        config = SimpleNamespace(sample_width=90, sample_height=60, attention_head_dim=64)
        config.patch_size, config.patch_size_t = 2, frames
        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
        size = 16 * 2 * scale, 16 * 3 * scale
        tables = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, *size, t, "cpu")
        mine.same_table(f"CogVideoXPipeline {version}", tables, SINGLE)


@few
@given(t=SIZES, y=SIZES, x=SIZES, fps=st.sampled_from([8, 16, 24, 30]))
def test_cosmos(ours, t, y, x, fps):
    mine = ours("cosmos", 128, [Video(t, y, x)], options=(("t", 24 / fps),))
    tables = cosmos.CosmosRotaryPosEmbed(128)(torch.empty(1, 1, t, 2 * y, 2 * x), fps)
    mine.same_table("CosmosRotaryPosEmbed", tables, SINGLE)
    mine.same_turn(cosmos.CosmosAttnProcessor2_0(), SINGLE, image_rotary_emb=tables)


@few
@given(t=SIZES, y=SIZES, x=SIZES)
def test_allegro(ours, t, y, x):
    mine, crop = ours("allegro", 96, [Video(t, y, x)]), ((0, 0), (y, x))
    *tables, t, y, x = get_3d_rotary_pos_embed_allegro(96, crop, (y, x), t, (2.0, 1.0, 1.0))
    grid = torch.cartesian_prod(*(axis.long() for axis in (t, y, x)))
    rotary = (tables, [axis[None] for axis in grid.unbind(-1)])
    mine.same_turn(shared.AllegroAttnProcessor2_0(), SINGLE, image_rotary_emb=rotary)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # it asks for autocast to float32
@few
@given(t=SIZES, y=SIZES, x=SIZES, words=SIZES)
def test_mochi_with_its_learned_frequencies(ours, t, y, x, words):
    mine, size = ours("mochi", 16, [Text(words), Video(t, y, x)], heads=HEADS), (t, y, x)
    theirs = MochiRoPE()._get_positions(*size, dtype=torch.float32)
    mine.same_positions("MochiRoPE", theirs, 2e-5)  # up to 96 from the middle: neighbours are 8e-6 apart
    learned = torch.randn(3, HEADS, 8) / 30
    mine.rope.load_state_dict({"omega_param": learned.transpose(0, 1)})
    tables = MochiRoPE()(learned, *size, dtype=torch.float32)
    text = {"words": words, "words_last": True, "streams": True, "attention_mask": torch.ones(1, words)}
    mine.same_turn(shared.MochiAttnProcessor2_0(), SINGLE, image_rotary_emb=tables, **text)


@few
@given(t=SIZES, y=SIZES, x=SIZES, head_dim=st.sampled_from([32, 64]))
def test_ltx_with_its_frequencies_in_float64(ours, t, y, x, head_dim):
    """In float32 its fastest pairs, of up to 15708 radians, are off by some 1e-3."""
    mine = ours("ltx", head_dim, [Video(t, y, x)], heads=HEADS)
    original, scale = ltx.LTXVideoRotaryPosEmbed(HEADS * head_dim), (8 / 25, 32, 32)
    coordinates = original._prepare_video_coords(1, t, y, x, scale, "cpu")[0]
    mine.same_positions("LTXVideoRotaryPosEmbed", 2 * coordinates - 1, DOUBLE)
    single, linspace = original(torch.empty(1, 1, t, y, x), t, y, x, scale), torch.linspace
    seconds_and_pixels = ((mine.positions + 1) / 2 * torch.tensor([20, 2048, 2048])).T[None]
    with patch("torch.linspace", lambda *ends, **_: linspace(*ends, dtype=torch.float64)):
        tables = original(torch.empty(1, 1, t, y, x), video_coords=seconds_and_pixels)
    theirs = torch.stack([table[0, :, ::2].unflatten(1, (HEADS, -1)) for table in tables])
    table = torch.stack(cos_sin(mine.positions, mine.rope.omega))
    mine.agree("ltx", "diffusers LTXVideoRotaryPosEmbed", table, theirs, DOUBLE, "cos, sin")
    mine.same_turn(ltx.LTXVideoAttnProcessor(), DOUBLE, image_rotary_emb=tables)
    assert (torch.stack(single) - torch.stack(tables)).abs().max() < 5e-3


@cache
def qwen_rope():
    return qwen_image.QwenEmbedRope(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)


@few
@given(sizes=st.lists(st.tuples(st.integers(1, 2), SIZES, SIZES), min_size=1, max_size=3), words=SIZES)
def test_qwen_image(ours, sizes, words):
    mine = ours("qwen-image", 128, [*(Video(*size) for size in sizes), Text(words)])
    # words are counted from where the images end, but attended to first
    mine.positions = mine.positions.roll(words, 0)
    tables = qwen_rope()([sizes], max_txt_seq_len=words)
    processor = qwen_image.QwenDoubleStreamAttnProcessor2_0()
    mine.same_turn(processor, SINGLE, words=words, streams=True, image_rotary_emb=tables)


def test_qwen_image_in_diffusers_gives_a_batch_of_sizes_the_first_ones_rope():
    both, _ = qwen_rope()([(1, 2, 3), (1, 4, 4)], max_txt_seq_len=1)
    first, _ = qwen_rope()([(1, 2, 3)], max_txt_seq_len=1)
    assert torch.equal(both, first)


class Lumina2AttnProcessor2_0(lumina2.Lumina2AttnProcessor2_0):
    """It wants its tokens twice."""

    def __call__(self, attn, hidden, **inputs):
        return super().__call__(attn, hidden, hidden, **inputs)


def lumina2_rope():
    return lumina2.Lumina2RotaryPosEmbed(10_000, [32, 32, 32], [16, 16, 16])


@few
@given(words=SIZES, y=SIZES, x=SIZES)
def test_lumina2(ours, words, y, x):
    mine, latents = ours("lumina2", 96, [Text(words), Image(y, x)]), torch.empty(1, 1, 2 * y, 2 * x)
    tables = lumina2_rope()(latents, torch.ones(1, words, dtype=torch.int))[3]
    mine.same_turn(Lumina2AttnProcessor2_0(), DOUBLE, image_rotary_emb=tables)


def test_lumina2_in_diffusers_cuts_positions_to_whole_numbers_and_has_none_below_zero():
    between, before = (lumina2_rope()._get_freqs_cis(torch.full((1, 1, 3), at)) for at in (2.5, 2.0))
    assert torch.equal(between, before)
    with pytest.raises(RuntimeError, match="out of bounds"):
        lumina2_rope()._get_freqs_cis(torch.full((1, 1, 3), -1.0))


@few
@given(words=st.integers(1, 70), y=SIZES, x=SIZES)
def test_z_image(ours, words, y, x):
    mine = ours("z-image", 128, [Text(words), Image(y, x)])
    model = object.__new__(z_image.ZImageTransformer2DModel)
    caption, image = torch.empty(words, 1), torch.empty(1, 1, 2 * y, 2 * x)
    *_, image_ids, word_ids, _, _ = model.patchify_and_embed([image], [caption], 2, 1)
    ids = torch.cat((word_ids[0][:words], image_ids[0][: y * x]))
    mine.same_positions("ZImageTransformer2DModel", ids)
    tables = z_image.RopeEmbedder(256.0, [32, 48, 48], [128, 16, 16])(ids)[None]
    mine.same_turn(z_image.ZSingleStreamAttnProcessor(), SINGLE, freqs_cis=tables)


def test_z_image_in_diffusers_has_no_fractions_and_counts_below_zero_from_the_end():
    original = z_image.RopeEmbedder(256.0, [32, 48, 48], [16, 16, 16])
    with pytest.raises(IndexError, match="must be long"):
        original(torch.full((1, 3), 0.5))
    assert torch.equal(original(torch.full((1, 3), -1)), original(torch.full((1, 3), 15)))
