import copy

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ElectraConfig,
    ElectraModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxM3VLVisionConfig,
    MiniMaxM3VLVisionModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm import SCHEMES, Image, Rotary, Scheme, Text, Unrotated, rotate
from rope_mm.checks.arguments import cache_of
from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope, use_kernels
from rope_mm.rotary.dispatch import RotaryAngles

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
STRIDED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
WORDS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYES = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PLACES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def qwen2_vl(**rope):
    vision = {**EYES, "embed_dim": 32, "hidden_size": 64}
    config = Qwen2VLConfig(text_config={**WORDS, "rope_parameters": ROPE}, vision_config=vision, **PLACES)
    return Qwen2VLForConditionalGeneration(config).eval()


def qwen2_5_vl():
    vision = {**EYES, "out_hidden_size": 64, "intermediate_size": 32, "window_size": 16}
    vision["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config={**WORDS, "rope_parameters": ROPE}, vision_config=vision, **PLACES)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl():
    vision = {**EYES, "out_hidden_size": 64, "intermediate_size": 32, "num_position_embeddings": 64}
    vision["deepstack_visual_indexes"] = [0]
    config = Qwen3VLConfig(text_config={**WORDS, "rope_parameters": STRIDED}, vision_config=vision, **PLACES)
    return Qwen3VLForConditionalGeneration(config).eval()


def seen(*grids, video=False, between=1):
    """Inputs with these grids of patches (t, y, x) between words."""
    grid = torch.tensor(grids)
    ids = [1, 5]
    for t, y, x in grids:
        ids += [91 if video else 90] * (t * y * x // 4) + [7] * between
    ids = torch.tensor([[*ids, 8, 9]])
    kind, pixels = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 90).int() + 2 * (ids == 91).int(),
        f"{kind}_grid_thw": grid,
        pixels: torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 16),
    }


def logits(model, **inputs):
    for part in model.modules():
        if hasattr(part, "rope_deltas"):
            part.rope_deltas = None
    with torch.no_grad():
        return model(**inputs).logits


GRIDS = (1, 4, 8), (1, 6, 4)
SCHEMES_OF_TEXT = ["rope-tv", "rope-tv-2d", "m-rope-i", "vrope", "v2pe", "circle", "videorope"]
QWENS = [qwen2_vl, qwen2_5_vl, qwen3_vl]
GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [90, 91, 92, 93],
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("make", QWENS)
def test_text_and_tower_with_their_own_ropes_are_unchanged(make):
    model, inputs = make(), seen(*GRIDS)
    before, drawn = logits(model, **inputs), model.generate(**inputs, **GREEDY).logits
    handles = [set_rope(part, rope_of(part)) for part in (model, model.model.visual)]
    assert torch.equal(logits(model, **inputs), before)
    again = model.generate(**inputs, **GREEDY).logits
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))
    for handle in handles:
        handle.undo()
    assert torch.equal(logits(model, **inputs), before)


def test_schemes_read_from_towers_have_their_names():
    model = qwen2_vl()
    assert rope_of(model).scheme == SCHEMES["m-rope"]
    assert rope_of(model.model.visual).scheme == SCHEMES["qwen2-vl-vision"]


@pytest.mark.parametrize("make", QWENS)
def test_our_layout_of_m_rope_differs_by_the_rounding_of_their_angles(make):
    model, inputs = make(), seen(*GRIDS)
    before = logits(model, **inputs)
    set_rope(model, rope_of(model).scheme)
    assert (logits(model, **inputs) - before).abs().max() < 3e-5


@pytest.mark.parametrize(("layout", "same"), [("m-rope-hf", True), ("m-rope", False)])
def test_whether_tokens_after_a_long_video_stand_inside_it_is_a_choice(layout, same):
    model, inputs = qwen2_vl(), seen((20, 4, 4), video=True)
    before = logits(model, **inputs)
    set_rope(model, "m-rope", layout=layout)
    difference = (logits(model, **inputs) - before).abs().max()
    assert (difference < 3e-5) == same


@pytest.mark.parametrize(
    "scheme", ["rope-tv", "rope-tv-2d", "m-rope-i", "vrope", "v2pe", "circle", "videorope"]
)
@pytest.mark.parametrize("make", QWENS)
def test_decoding_of_a_vision_language_model_equals_its_full_forward(make, scheme):
    model = make()
    set_rope(model, scheme)
    generate_and_compare(model, seen(*GRIDS))


@pytest.mark.parametrize("make", QWENS)
def test_a_prompt_that_ends_in_an_image_is_refused_where_its_tokens_are_not_one_step_ahead(make):
    model, inputs = make(), seen(*GRIDS)
    ends = {name: inputs[name][:, :-3] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    set_rope(model, "rope-tv")
    assert logits(model, **inputs | ends).isfinite().all()
    with pytest.raises(ValueError, match="end it with a text token"):
        model.generate(**inputs | ends, **GREEDY)
    unset_rope(model)
    model.generate(**inputs | ends, **GREEDY)
    set_rope(model, "v2pe")
    generate_and_compare(model, inputs | ends)


def generate_and_compare(model, inputs):
    out = model.generate(**inputs, **GREEDY)
    n = inputs["input_ids"].shape[1]
    more = out.sequences.shape[1] - n
    whole = inputs | {
        "input_ids": out.sequences,
        "attention_mask": torch.ones_like(out.sequences),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more)),
    }
    full = logits(model, **whole)
    assert (torch.stack(out.logits, 1) - full[:, n - 1 : -1]).abs().max() < 3e-5
    again = model.generate(**inputs, **GREEDY)
    assert torch.equal(again.sequences, out.sequences)
    given = positions_for(model, whole)
    assert (logits(model, **whole, position_ids=given) - full).abs().max() < 3e-5


@pytest.mark.parametrize("make", [qwen2_vl, qwen3_vl])
def test_rows_padded_on_the_left_decode_as_each_alone(make):
    model, rows = make(), [seen((1, 4, 8)), seen((1, 6, 4), (1, 4, 4))]
    set_rope(model, "rope-tv")
    n = max(row["input_ids"].shape[1] for row in rows)
    both = {
        name: torch.cat([torch.nn.functional.pad(row[name], (n - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    both |= {name: torch.cat([row[name] for row in rows]) for name in ("image_grid_thw", "pixel_values")}
    drawn = torch.stack(model.generate(**both, **GREEDY).logits, 1)
    for row, ours in zip(rows, drawn, strict=True):
        alone = torch.stack(model.generate(**row, **GREEDY).logits, 1)[0]
        assert (ours - alone).abs().max() < 3e-5


def test_a_scheme_of_a_text_alone_refuses_the_positions_of_the_model_around_it():
    model, inputs, text = qwen2_vl(), seen(*GRIDS), {"input_ids": torch.arange(3, 16)[None]}
    before = logits(model, **inputs)
    handle = set_rope(model.model.language_model, "rope-tv")
    for run in (model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="give set_rope the whole model"):
            run(**inputs)
    p, reader = positions_for(model, ["text:4 image:2x3 text:3"]), model.model.language_model
    told = reader(**text, position_ids=p)[0]
    handle.undo()
    set_rope(model, "rope-tv")
    assert torch.equal(reader(**text, position_ids=p)[0], told)
    unset_rope(model)
    set_rope(reader, rope_of(reader))
    assert torch.equal(logits(model, **inputs), before)


def test_packed_rows_with_a_cache_are_refused_in_the_four_rows_of_m_rope_too():
    model, ids = qwen2_vl(), torch.arange(3, 15)[None]
    set_rope(model, "flat")
    p = torch.tensor([[*range(7), *range(5)]]).expand(4, -1, -1)
    with pytest.raises(ValueError, match="lets the documents see one another"):
        model(input_ids=ids, position_ids=p)
    packed = logits(model, input_ids=ids, position_ids=p, use_cache=False)
    alone = logits(model, input_ids=ids[:, 7:], position_ids=p[..., 7:])
    assert (packed[:, 7:] - alone).abs().max() < 3e-5


def test_images_may_follow_one_another_without_a_token_between():
    model, inputs = qwen2_vl(), seen(*GRIDS, between=0)
    set_rope(model, "rope-tv")
    assert logits(model, **inputs).isfinite().all()
    p = positions_for(model, inputs)
    placed, _ = SCHEMES["rope-tv"].place([Text(2), Image(2, 4), Image(3, 2), Text(2)])
    assert torch.equal(p[1:, 0].T, placed)
    assert torch.equal(p[0, 0], torch.arange(18.0).double())


def test_tokens_that_do_not_fill_their_grids_are_refused():
    model, inputs = qwen2_vl(), seen(*GRIDS)
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match=r"6 image or video tokens stand in a row, but image:2x4 needs 8"):
        positions_for(model, inputs | {"image_grid_thw": torch.tensor([GRIDS[1], GRIDS[0]])[[1, 1]]})
    with pytest.raises(ValueError, match="no grid is left"):
        positions_for(model, inputs | {"image_grid_thw": inputs["image_grid_thw"][:1]})
    with pytest.raises(ValueError, match="grids came for image:2x4"):
        positions_for(model, inputs | {"image_grid_thw": torch.tensor([*GRIDS, GRIDS[0]])})


def test_our_op_rotates_the_text_of_a_vision_language_model():
    model, inputs = qwen2_5_vl(), seen(*GRIDS)
    before = logits(model, **inputs)
    handle = use_kernels(model)
    assert (logits(model, **inputs) - before).abs().max() < 3e-5
    handle.undo()
    assert torch.equal(logits(model, **inputs), before)


def test_our_op_is_refused_in_one_sentence_in_towers_given_rows_and_columns():
    with pytest.raises(ValueError, match="rotary_pos_emb is given rows and columns, not tokens or an image"):
        use_kernels(qwen2_vl().model.visual)


def test_pixtral_is_unchanged_by_its_own_rope_and_takes_another():
    config = PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
    )
    model, pixels = PixtralVisionModel(config).eval(), torch.randn(2, 3, 32, 24)

    def run():
        with torch.no_grad():
            return model(pixels, image_sizes=[(32, 24), (16, 20)]).last_hidden_state

    before = run()
    set_rope(model, rope_of(model))
    assert torch.equal(run(), before)
    unset_rope(model)
    set_rope(model, "pixtral")
    assert 0 < (run() - before).abs().max() < 1e-5
    unset_rope(model)
    set_rope(model, "rope-2d")
    in_two_axes = run()
    unset_rope(model)
    set_rope(model, SCHEMES["grid"].replace(axis_order=("y", "x")))
    assert torch.equal(run(), in_two_axes) and not torch.allclose(in_two_axes, before)
    unset_rope(model)
    with pytest.raises(ValueError, match="given rows and columns alone"):
        set_rope(model, "eva-02", pairing="half")
    assert torch.equal(run(), before)


@torch.no_grad()
def test_a_tower_of_three_axes_is_unchanged_by_its_own_rope_and_by_the_scheme_of_its_name():
    config = MiniMaxM3VLVisionConfig(**SMALL, image_size=16, patch_size=4, initializer_range=0.2)
    model, grid = MiniMaxM3VLVisionModel(config).eval(), torch.tensor([[2, 4, 4]])
    pixels = torch.randn(32, 3 * config.temporal_patch_size * 16)
    before = model(pixels, grid).last_hidden_state
    handle = set_rope(model, rope_of(model))
    assert torch.equal(model(pixels, grid).last_hidden_state, before)
    handle.undo()
    set_rope(model, "minimax-m3-vision", fraction=1.0)
    assert (model(pixels, grid).last_hidden_state - before).abs().max() < 1e-5


@pytest.fixture
def dinov3():
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        **SMALL, image_size=16, patch_size=4, num_register_tokens=3, initializer_range=0.2
    )
    return DINOv3ViTModel(config).eval()


SIZES = (16, 16), (24, 44)


def seen_by(model, size):
    return model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))).last_hidden_state


@torch.no_grad()
def test_dinov3_is_unchanged_by_its_own_rope_in_images_of_all_sizes(dinov3):
    before = [seen_by(dinov3, size) for size in SIZES]
    handle = set_rope(dinov3, rope_of(dinov3))
    assert all(torch.equal(seen_by(dinov3, size), x) for size, x in zip(SIZES, before, strict=True))
    handle.undo()
    assert type(dinov3.rope_embeddings).__name__ == "DINOv3ViTRopePositionEmbedding"
    assert all(torch.equal(seen_by(dinov3, size), x) for size, x in zip(SIZES, before, strict=True))


def test_omega_of_dinov3_is_read_to_the_bit_and_has_its_name(dinov3):
    rope = rope_of(dinov3)
    own, none = dinov3.rope_embeddings.inv_freq.tolist(), [0.0] * 4
    assert rope.omega == ((*own, *none), (*none, *own))
    assert rope.scheme == SCHEMES["dinov3"]
    with torch.device("meta"):
        empty = DINOv3ViTModel(dinov3.config)
    assert rope_of(empty) == rope


def test_dinov3_with_a_frequency_that_is_not_what_its_config_says_is_read_from_its_module(dinov3):
    dinov3.rope_embeddings.inv_freq *= 1.1
    rope = rope_of(dinov3)
    assert rope.omega[0][:4] == tuple(dinov3.rope_embeddings.inv_freq.tolist())
    assert rope.scheme is None


@torch.no_grad()
def test_dinov3_by_our_scheme_differs_by_the_rounding_of_its_angles_and_by_another_for_good(dinov3):
    before = [seen_by(dinov3, size) for size in SIZES]
    for scheme, lowest, highest in (("dinov3", 0, 1e-5), ("rope-vit-axial", 0.1, 100), ("eva-02", 0.1, 100)):
        handle = set_rope(dinov3, scheme, pairing="half")
        for size, x in zip(SIZES, before, strict=True):
            assert lowest < (seen_by(dinov3, size) - x).abs().max() < highest
        handle.undo()
        assert torch.equal(seen_by(dinov3, SIZES[0]), before[0])


@pytest.mark.parametrize("scheme", ["dinov3", "rope-vit-axial"])
@torch.no_grad()
def test_class_and_register_tokens_of_dinov3_are_not_rotated_and_patches_turn_as_defined(dinov3, scheme):
    heads, firsts = [], []

    def watch(module, q, k, v, *args, **kwargs):
        heads.append((q, k))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("watch", watch)
    for off in (0.0, 1.0):
        set_rope(dinov3, SCHEMES[scheme].replace(pairing="half", freq_scale=off * SCHEMES[scheme].freq_scale))
        dinov3.config._attn_implementation = "watch"
        heads.clear()
        seen_by(dinov3, (16, 24))
        firsts.append(heads[0])
        unset_rope(dinov3)
    plain, turned = firsts
    p, _ = SCHEMES[scheme].place([Unrotated(4), Image(4, 6)])
    omega = SCHEMES[scheme].omega(16)
    exact = rotate(*(x.double().transpose(1, 2) for x in plain), p, omega, "half")
    for ours, base, true in zip(turned, plain, exact, strict=True):
        assert torch.equal(ours[:, :, :4], base[:, :, :4])
        assert (ours.transpose(1, 2) - true).abs().max() < 3e-6


def test_training_moves_patches_of_dinov3_by_its_own_rope_and_is_refused_by_ours(dinov3):
    dinov3.config.pos_embed_shift, dinov3.config.pos_embed_jitter = 0.5, 1.5
    still = seen_by(dinov3, (16, 20))

    def trained():
        torch.manual_seed(3)
        return seen_by(dinov3.train(), (16, 20))

    moved = trained()
    assert not torch.allclose(moved, still, atol=1e-2)
    set_rope(dinov3.eval(), rope_of(dinov3))
    assert torch.equal(seen_by(dinov3, (16, 20)), still)
    assert torch.equal(trained(), moved)
    unset_rope(dinov3)
    set_rope(dinov3, "dinov3")
    with pytest.raises(ValueError, match=r"pos_embed_shift=0.5, pos_embed_jitter=1.5, pos_embed_rescale=2.0"):
        trained()
    assert (seen_by(dinov3.eval(), (16, 20)) - still).abs().max() < 1e-5
    for name in ("shift", "jitter", "rescale"):
        setattr(dinov3.config, f"pos_embed_{name}", None)
    trained().square().mean().backward()
    assert dinov3.embeddings.patch_embeddings.weight.grad.isfinite().all()


@torch.no_grad()
def test_dinov3_saved_with_a_scheme_waits_for_it_and_runs_it_again(dinov3, tmp_path):
    set_rope(dinov3, "dinov3", theta=50.0)
    dinov3.save_pretrained(tmp_path)
    loaded = DINOv3ViTModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Call rope_mm"):
        seen_by(loaded, SIZES[1])
    set_rope(loaded)
    assert torch.equal(seen_by(loaded, SIZES[1]), seen_by(dinov3, SIZES[1]))


@torch.no_grad()
def test_dinov3_compiles_to_one_graph_for_each_size(dinov3):
    torch._dynamo.reset()
    set_rope(dinov3, "dinov3")
    compiled = torch.compile(dinov3, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in SIZES:
        assert (seen_by(compiled, size) - seen_by(dinov3, size)).abs().max() < 2e-6


@pytest.mark.parametrize("scheme", [None, "rope-vit-axial"])
def test_our_op_rotates_the_patches_of_dinov3_and_leaves_its_class_token(dinov3, scheme):
    own = [seen_by(dinov3, size) for size in SIZES]
    if scheme:
        set_rope(dinov3, scheme, pairing="half")
    other, _ = copy.deepcopy(dinov3), use_kernels(dinov3)
    angles, _ = dinov3.rope_embeddings(torch.zeros(1, 3, 16, 24))
    assert isinstance(angles, RotaryAngles) and len(angles.positions) == 24
    for size in SIZES:
        ours, theirs = seen_by(dinov3, size), seen_by(other, size)
        assert (ours - theirs).abs().max() < 1e-5
        for out in (ours, theirs):
            out.square().mean().backward()
    for mine, others in zip(dinov3.parameters(), other.parameters(), strict=True):
        assert mine.grad is others.grad or torch.allclose(mine.grad, others.grad, rtol=1e-3, atol=1e-6)
    unset_rope(dinov3)
    assert all(torch.equal(seen_by(dinov3, size), x) for size, x in zip(SIZES, own, strict=True))


def test_our_op_serves_the_backbone_of_dinov3_as_well(dinov3):
    backbone, pixels = DINOv3ViTBackbone(dinov3.config).eval(), torch.linspace(-1, 1, 3 * 24 * 16)
    (before,) = backbone(pixels.view(1, 3, 24, 16)).feature_maps
    use_kernels(backbone)
    assert isinstance(backbone.rope_embeddings(torch.zeros(1, 3, 8, 8))[0], RotaryAngles)
    (after,) = backbone(pixels.view(1, 3, 24, 16)).feature_maps
    assert 0 < (after - before).abs().max() < 1e-5


def test_our_op_follows_the_patches_that_training_moves(dinov3):
    dinov3.config.pos_embed_jitter = 1.5
    other = copy.deepcopy(dinov3)
    use_kernels(dinov3)
    outs = []
    for model in (dinov3, other):
        torch.manual_seed(3)
        outs.append(seen_by(model.train(), (16, 20)))
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    assert not torch.allclose(outs[0], seen_by(other.eval(), (16, 20)), atol=1e-2)


def test_llava_and_smolvlm_are_unchanged_by_the_rope_of_their_text():
    text = {**WORDS, "model_type": "llama"}
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPVisionConfig(**eyes, image_size=16, patch_size=4)
    llava = LlavaConfig(vision_config=clip, text_config=text, image_token_id=90)
    smol = SmolVLMConfig(
        vision_config={**eyes, "image_size": 16, "patch_size": 4},
        text_config=text,
        image_token_id=90,
        scale_factor=2,
    )
    for model, n in (
        (LlavaForConditionalGeneration(llava), 16),
        (SmolVLMForConditionalGeneration(smol), 4),
    ):
        ids = torch.tensor([[1, 5] + [90] * n + [7, 8]])
        pixels = torch.randn(1, 3, 16, 16)
        inputs = {"input_ids": ids, "pixel_values": pixels if n == 16 else pixels[None]}
        before = logits(model.eval(), **inputs)
        handle = set_rope(model, rope_of(model))
        assert torch.equal(logits(model, **inputs), before)
        handle.undo()
        set_rope(model, "rope-tv")
        side = int(n**0.5)
        p = positions_for(model, [f"text:2 image:{side}x{side} text:2"])
        assert not torch.allclose(logits(model, **inputs, position_ids=p), before, atol=1e-3)


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE, READER = {**SMALL, "image_size": 16, "patch_size": 4}, {**SMALL, "vocab_size": 100}
BARE = [
    (ViTModel, ViTConfig(**EYE)),
    (ViTForImageClassification, ViTConfig(**EYE)),
    (CLIPVisionModel, CLIPVisionConfig(**EYE)),
    (SiglipVisionModel, SiglipVisionConfig(**EYE)),
    (Dinov2Model, Dinov2Config(**EYE)),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**EYE)),
    (DeiTModel, DeiTConfig(**EYE)),
    (BertModel, BertConfig(**READER)),
    (BertForMaskedLM, BertConfig(**READER)),
    (RobertaModel, RobertaConfig(**READER)),
    (ElectraModel, ElectraConfig(**READER)),
    (CLIPTextModel, CLIPTextConfig(**READER, bos_token_id=1, eos_token_id=2)),
]


def bare(cls, config, attention="sdpa"):
    return cls._from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def run(model, at=0):
    kind = model.main_input_name
    torch.manual_seed(at)
    x = torch.randn(2, 3, 16, 16) if kind == "pixel_values" else torch.randint(3, 99, (2, 9))
    return model(**{kind: x})[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("cls", "config"), BARE)
def test_models_without_rotary_are_not_rotated_at_omega_zero_and_are_undone(cls, config, attention):
    model = bare(cls, config, attention)
    before = run(model)
    handle = set_rope(model, "rope-vit-axial", freq_scale=0.0) if "image_size" in config.to_dict() else None
    handle = handle or set_rope(model, "flat", freq_scale=0.0)
    assert torch.equal(run(model), before)
    handle.undo()
    set_rope(model, "rope-tv")
    assert not torch.equal(run(model), before)
    other = copy.deepcopy(model)
    assert torch.equal(run(other), run(model))
    unset_rope(other)
    assert torch.equal(run(other), before)
    assert not torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("cls", "config", "segments"),
    [(ViTModel, ViTConfig(**EYE), [Unrotated(1), Image(4, 4)]), (BertModel, BertConfig(**READER), [Text(9)])],
)
def test_queries_and_keys_are_rotated_as_the_definition_says(cls, config, segments):
    heads = []

    def watch(module, q, k, v, *args, **kwargs):
        heads.append((q, k))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("watch", watch)
    model = bare(cls, config)
    model.config._attn_implementation = "watch"
    run(model)
    plain = heads[0]
    set_rope(model, "rope-vit-axial")
    heads.clear()  # of its probe
    run(model)
    p, _ = SCHEMES["rope-vit-axial"].place(segments)
    omega = SCHEMES["rope-vit-axial"].omega(16)
    exact = rotate(*(x.double().transpose(1, 2) for x in plain), p, omega, "interleaved")
    for ours, true in zip(heads[0], exact, strict=True):
        assert (ours.transpose(1, 2) - true).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", ["rope-vit-mixed", "dinov3", "golden-gate"])
def test_checkpointing_a_model_that_had_none_with_two_forwards_before_one_backward(scheme):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = bare(CLIPVisionModel, CLIPVisionConfig(**EYE))
        set_rope(model, scheme)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        (run(model, 0).square().mean() + run(model, 1).mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20 and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize(("cls", "config"), [BARE[0], BARE[3], BARE[7]])
def test_a_model_that_had_none_compiles_to_one_graph(cls, config):
    torch._dynamo.reset()
    model = bare(cls, config)
    set_rope(model, "rope-tv")
    with torch.no_grad():
        assert (
            run(torch.compile(model, fullgraph=True, backend="aot_eager")) - run(model)
        ).abs().max() < 2e-6


def test_with_two_towers_the_caller_must_name_one():
    config = CLIPConfig(text_config=READER, vision_config=EYE)
    with pytest.raises(ValueError, match="give one of its parts: text_model, vision_model"):
        set_rope(CLIPModel(config), "rope-tv")


def test_what_has_no_attention_that_can_be_served_is_refused(tiny):
    for model in (tiny("gpt_neo"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="neither a rotary module nor one stack of attention"):
            set_rope(model, Scheme(layout="flat"))


def test_encoder_decoders_without_rotary_are_refused():
    sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = BartModel(BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2))
    t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    for refused in (model, T5ForConditionalGeneration(t5)):
        with pytest.raises(ValueError, match=r"is an encoder-decoder without rotary.* relative biases"):
            set_rope(refused, "flat")


@pytest.mark.parametrize("name", ["Yolos", "DPT", "ViTMAE", "Siglip2Vision", "Vivit", "VideoMAE"])
def test_a_family_that_is_not_served_is_refused_at_once(name):
    config = getattr(transformers, f"{name}Config")(**SMALL)
    model = getattr(transformers, f"{name}Model")(config)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"{name}Model cannot run what set_rope gave it .*as it was"):
        set_rope(model, "rope-vit-axial")
    assert dict(model.named_modules()) == before and model.training


def test_a_model_without_rotary_refuses_a_cache_under_a_scheme(tiny, cached):
    model = tiny("gpt2")
    set_rope(model, "flat")
    ids = torch.randint(3, 97, (1, 8))
    cache = cache_of(model(ids))
    with pytest.raises(ValueError, match="1 queries meet 9 keys"):
        model(ids[:, :1], **cached(cache))


@pytest.mark.parametrize("kernels", [False, True])
def test_unset_rope_leaves_nothing_of_rope_mm_behind(tiny, kernels):
    model = tiny("llama") if kernels else bare(ViTModel, ViTConfig(**EYE))

    def traces():
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        return [sorted(vars(m)) for m in model.modules()], hooks, model.config.to_dict()

    model.config.rope_parameters = getattr(model.config, "rope_parameters", None)
    before = traces()
    set_rope(model, "flat")
    use_kernels(model) if kernels else run(model)
    assert traces() != before
    unset_rope(model)
    assert traces() == before


def test_a_custom_rotary_module_is_the_one_that_runs():
    rope = Rotary(16, "rope-vit-mixed", heads=4)
    model = bare(ViTModel, ViTConfig(**EYE))
    set_rope(model, rope)
    assert rope_of(model) is rope
    run(model).square().sum().backward()
    assert rope.omega_param.grad.abs().sum() > 0
