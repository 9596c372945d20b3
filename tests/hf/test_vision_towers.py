"""Vision encoders with a rotary of their own: Pixtral, MiniMax M3 and DINOv3."""

import copy

import pytest
import torch
from transformers import (
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MiniMaxM3VLVisionConfig,
    MiniMaxM3VLVisionModel,
    PixtralVisionConfig,
    PixtralVisionModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm import SCHEMES, Image, Unrotated, rotate
from rope_mm.hf import rope_of, set_rope, unset_rope, use_kernels
from rope_mm.rotary.dispatch import RotaryAngles

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


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
