"""Our schemes against models of diffusers from 2026, beside those of `test_diffusers`."""

import pytest
import torch
from diffusers.models.transformers import transformer_flux3 as flux3
from diffusers.models.transformers import transformer_helios as helios
from diffusers.models.transformers import transformer_hunyuan_video15 as hunyuan
from diffusers.models.transformers import transformer_ideogram4 as ideogram4
from diffusers.models.transformers import transformer_kandinsky as kandinsky5
from diffusers.models.transformers import transformer_kandinsky6 as kandinsky6
from diffusers.models.transformers import transformer_krea2 as krea2
from diffusers.models.transformers import transformer_ltx2 as ltx2
from diffusers.models.transformers import transformer_qwenimage as qwen_image
from diffusers.models.transformers import transformer_qwenimage21 as qwen_image21
from diffusers.modular_pipelines.flux3 import before_denoise as flux3_steps
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import Ideogram4Pipeline
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from diffusers.pipelines.krea2.pipeline_krea2 import Krea2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_mm import Audio, Image, Text, Video

HEADS = 2
SIZES = st.integers(1, 6)
GRIDS = st.tuples(SIZES, SIZES)
few = settings(max_examples=10, deadline=None)
# originals that make angles in float64, and those that round angles of up to 40 radians to float32
DOUBLE, SINGLE = 1e-6, 1e-5


@few
@given(words=SIZES, grids=st.lists(GRIDS, min_size=1, max_size=3))
def test_flux3_with_images_as_references(ours, words, grids):
    mine = ours("flux3", 128, [Text(words), *(Image(*grid) for grid in grids)])
    images = [flux3_steps._prepare_image_ids(*grid, 0.5, -k) for k, grid in enumerate(grids)]
    text = flux3_steps.Flux3TextRoPEInputsStep._prepare_text_ids(torch.empty(1, words, 1))
    ids = torch.cat((text, *images))
    mine.same_positions("Flux3PrepareLatentsStep", ids)
    tables = flux3.Flux3PosEmbed(theta=10_000, axes_dim=[32] * 4)(ids)
    mine.same_table("Flux3PosEmbed", tables, DOUBLE)
    mine.same_turn(flux3.Flux3AttnProcessor(), DOUBLE, image_rotary_emb=tables)


@few
@given(words=SIZES, grid=GRIDS)
def test_krea2(ours, words, grid):
    mine = ours("krea2", 128, [Text(words), Image(*grid)])
    ids = Krea2Pipeline.prepare_position_ids(words, *grid, torch.device("cpu"))
    mine.same_positions("Krea2Pipeline", ids)
    tables = krea2.Krea2RotaryPosEmbed(theta=1000, axes_dim=[32, 48, 48])(ids)
    mine.same_table("Krea2RotaryPosEmbed", tables, DOUBLE)
    mine.same_turn(krea2.Krea2AttnProcessor(), DOUBLE, image_rotary_emb=tables)


@few
@given(words=SIZES, grid=GRIDS)
def test_ideogram4(ours, words, grid):
    """Its image starts at 65536, where angles in float32 are off by up to 4e-3 radians."""
    mine = ours("ideogram4", 128, [Text(words), Image(*grid)])
    ids = Ideogram4Pipeline._prepare_ids([words], *grid, words, torch.device("cpu"))[0]
    mine.same_positions("Ideogram4Pipeline", ids[0])
    original = ideogram4.Ideogram4MRoPE(128, 5_000_000, (24, 20, 20))
    far = [table[0] for table in original(ids)]
    assert (torch.stack(mine.rope.cos_sin(mine.positions)) - torch.stack(far)).abs().max() < 8e-3
    near = ids - 65_536 * (ids >= 65_536)
    mine.positions = near[0].double()
    tables = original(near)
    mine.same_table("Ideogram4MRoPE (from 0)", [table[0] for table in tables], SINGLE)
    mine.same_turn(ideogram4.Ideogram4AttnProcessor(), SINGLE, image_rotary_emb=tables, attention_mask=None)


@few
@given(t=SIZES, grid=GRIDS, words=SIZES)
def test_hunyuan_video_15(ours, t, grid, words):
    mine = ours("hunyuan-video", 128, [Text(words), Video(t, *grid)])
    tables = hunyuan.HunyuanVideo15RotaryPosEmbed(1, 1, [16, 56, 56])(torch.empty(1, 1, t, *grid))
    mine.same_table("HunyuanVideo15RotaryPosEmbed", tables, SINGLE)
    text = {"words": words, "words_last": True, "streams": True}
    processor = hunyuan.HunyuanVideo15AttnProcessor2_0()
    mask = torch.ones(1, words)
    mine.same_turn(processor, SINGLE, image_rotary_emb=tables, attention_mask=mask, **text)


@few
@given(frames=st.lists(st.integers(0, 40), min_size=1, max_size=5), grid=GRIDS)
def test_helios_with_given_numbers_of_frames(ours, frames, grid):
    mine = ours("helios", 128, [Video(len(frames), *grid)], options={"numbers": frames})
    original = helios.HeliosRotaryPosEmbed((44, 42, 42), 10_000.0)
    table = original(torch.tensor([frames]), *grid, "cpu").flatten(2).transpose(1, 2)
    mine.same_table("HeliosRotaryPosEmbed", table[0].chunk(2, -1), SINGLE)
    parts = {"is_amplify_history": False}
    mine.same_turn(helios.HeliosAttnProcessor(), SINGLE, rotary_emb=table, parts=parts)


@pytest.mark.parametrize("size", [480, 1024])
@few
@given(t=SIZES, grid=GRIDS)
def test_kandinsky_at_its_two_scales(ours, size, t, grid):
    factor = Kandinsky5T2VPipeline._get_scale_factor(None, size, size)
    options = {} if size == 480 else {"options": {"y": 1 / factor[1], "x": 1 / factor[2]}}
    mine = ours("kandinsky5", 128, [Video(t, *grid)], **options)
    where = [torch.arange(n) for n in (t, *grid)]
    newer = kandinsky6.Kandinsky6RoPE3D((32, 48, 48))(where, factor).flatten(0, 2)[None]
    older = kandinsky5.Kandinsky5RoPE3D((32, 48, 48))((1, t, *grid), where, factor).flatten(1, 3)
    for name, rotations in (("Kandinsky5RoPE3D", older), ("Kandinsky6RoPE3D", newer)):
        columns = rotations[0, :, 0, :, :, 0].repeat_interleave(2, 1).unbind(-1)
        mine.same_table(name, columns, SINGLE)
    # the processor of Kandinsky 5 rounds q and k to bfloat16
    mine.same_turn(kandinsky6.Kandinsky6AttnProcessor(), SINGLE, rotary_emb=newer, rotary_emb_kv=newer)


@few
@given(layers=st.lists(GRIDS, min_size=2, max_size=4), source=GRIDS, words=SIZES)
def test_qwen_image_layered(ours, layers, source, words):
    images = [Image(*grid) for grid in (*layers, source)]
    mine = ours("qwen-image-layered", 128, [*images, Text(words)], options={"layers": len(layers) - 1})
    mine.positions = mine.positions.roll(words, 0)  # attended to first
    original = qwen_image.QwenEmbedLayer3DRope(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)
    tables = original([[image.grid for image in images]], max_txt_seq_len=words)
    processor = qwen_image.QwenDoubleStreamAttnProcessor2_0()
    mine.same_turn(processor, SINGLE, words=words, streams=True, image_rotary_emb=tables)


@few
@given(grids=st.lists(GRIDS, min_size=1, max_size=3), words=SIZES, ends_in_text=st.booleans())
def test_qwen_image_21(ours, grids, words, ends_in_text):
    segments = [part for grid in grids for part in (Text(words), Image(*grid))]
    segments += [Text(words)] * ends_in_text
    mine = ours("qwen-image-2.1", 128, segments)
    mask = torch.cat([torch.full((part.tokens,), isinstance(part, Image)) for part in segments])
    original = qwen_image21.QwenImage21Rope(theta=10_000, axes_dim=[16, 56, 56])
    table = original([(1, *grid) for grid in grids], mask, torch.device("cpu"))
    mine.same_turn(qwen_image21.QwenImage21AttnProcessor(), SINGLE, rotary_emb=table)


def ltx2_rope(head_dim, pairing, modality, **sizes):
    kind = {"half": "split", "interleaved": "interleaved"}[pairing]
    return ltx2.LTX2AudioVideoRotaryPosEmbed(
        HEADS * head_dim, num_attention_heads=HEADS, rope_type=kind, modality=modality, **sizes
    )


def ltx2_turn(mine, original, positions):
    """q and k turned by ours and by the original, which rounds frequencies, but not angles, to float32."""
    tables = original(positions)
    parts = {"rope_type": original.rope_type, "to_gate_logits": None}
    mine.same_turn(ltx2.LTX2AudioVideoAttnProcessor(), DOUBLE, query_rotary_emb=tables, parts=parts)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@few
@given(t=SIZES, grid=GRIDS, head_dim=st.sampled_from([32, 64]), fps=st.sampled_from([24.0, 25.0, 50.0]))
def test_ltx2_video(ours, pairing, t, grid, head_dim, fps):
    changes = {"pairing": pairing, "options": {"fps": fps}, "learnable": True}
    mine = ours("ltx2", head_dim, [Video(t, *grid)], heads=HEADS, **changes)
    original = ltx2_rope(head_dim, pairing, "video")
    middle = original.prepare_video_coords(1, t, *grid, "cpu", fps)[0].mean(-1).T
    extents = torch.tensor([20.0, 2048, 2048])
    mine.same_positions("LTX2AudioVideoRotaryPosEmbed", 2 * middle / extents - 1, DOUBLE)
    ltx2_turn(mine, original, ((mine.positions + 1) / 2 * extents).T[None])


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@few
@given(n=st.integers(1, 30), head_dim=st.sampled_from([32, 64]))
def test_ltx2_audio(ours, pairing, n, head_dim):
    mine = ours("ltx2-audio", head_dim, [Audio(n)], heads=HEADS, pairing=pairing, learnable=True)
    original = ltx2_rope(head_dim, pairing, "audio", scale_factors=(4,))
    seconds = original.prepare_audio_coords(1, n, "cpu")[0].mean(-1).T
    theirs = torch.nn.functional.pad(seconds / 10 - 1, (0, 2))
    mine.same_positions("LTX2AudioVideoRotaryPosEmbed (audio)", theirs, DOUBLE)
    ltx2_turn(mine, original, (mine.positions[:, :1] + 1).T[None] * 10)


@few
@given(t=SIZES, grid=GRIDS)
def test_ltx2_video_has_the_time_of_its_audio_in_cross_attention(ours, t, grid):
    """Only time rotates, so that videos and audio of one second get one angle."""
    mine = ours("ltx2-audio", 32, [Video(t, *grid)], heads=HEADS, learnable=True)
    original = ltx2_rope(32, "half", "video")
    ltx2_turn(mine, original, (mine.positions[:, :1] + 1).T[None] * 10)
